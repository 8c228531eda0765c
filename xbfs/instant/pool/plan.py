"""What a session is going to make on a pool, decided before anything is made. Pure."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from xbfs.instant.pool.notes import working_name
from xbfs.instant.pool.record import PoolRecord
from xbfs_engine.core.errors import ObjectNotFound, VmNotReady
from xbfs_engine.restore.vm.plan import VmWishes, plan_vm
from xbfs_engine.restore.vm.target import Network, Target
from xbfs_engine.source.xapi.inventory import Sr
from xbfs_engine.source.xapi.vm_record import RECORD_KEY, vm_record_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.core.runtime import RandomSource
    from xbfs_engine.restore.vm.plan import VmPlan
    from xbfs_engine.source.xapi.inventory import Host


class BootWishes(NamedTuple):
    """As a person gives them. ``sr_name``, ``host``, ``name``: None for what is usual. ``disks``: none for all."""

    sr_name: str | None = None
    host: str | None = None
    name: str | None = None
    disks: frozenset[int] = frozenset()
    networks: Mapping[str, str] = {}
    isolated: bool = False


class BootPlan(NamedTuple):
    """``vm``: as for a restore, onto the SR that is to be. ``hosts``: that shall see it. ``isolated``: its VIFs go into
    a network that is to be, and that leads nowhere. ``master``: the address of the pool's master."""

    vm: VmPlan
    sr_name: str
    hosts: tuple[Host, ...]
    isolated: bool
    master: str
    record: PoolRecord

    def path(self, number: int) -> str:
        """Of a disk, below what the hosts mount."""
        return f"{self.record.sr_uuid}/{self.record.vdis[number]}.vhd"


def plan_boot(point: RestorePoint, target: Target, wishes: BootWishes, pool: str, random: RandomSource) -> BootPlan:
    """Raises ObjectNotFound, VmNotReady, UsageError, WireError, FormatTooNew."""
    inventory = target.inventory
    hosts = _hosts(list(inventory.hosts.values()), wishes.host)
    sr_uuid = _uuid(random)
    name = wishes.name if wishes.name is not None else point.vm_name
    sr_name = wishes.sr_name or f"xbfs {name[:80]}"
    # A restore's plan wants an SR and networks that are there: these are, once the VM is made. The SR's size is
    # nobody's concern.
    sr = Sr(
        *("", sr_uuid, sr_name, "nfs", "user"),
        thick=False,
        tracks_changes=False,
        takes_snapshots=True,
        size_bytes=0,
        used_bytes=0,
        shared=True,
        hosts=tuple(host.ref for host in hosts),
        other_config={},
    )
    # An import finds networks by their name (xen-api, import.ml): nobody else's may have it.
    nowhere = Network("", sr_uuid, f"{sr_name} (isolated {sr_uuid[:8]})", "")
    networks = _all_to(nowhere, point) if wishes.isolated else wishes.networks
    to_be = Target(replace(inventory, srs={**inventory.srs, "": sr}), (*target.networks, nowhere))
    vm = plan_vm(point, to_be, VmWishes(sr_uuid, name, wishes.disks, networks, keep_identity=False))
    if not vm.disks:
        raise VmNotReady(f"restore point {point.id[:12]} has no disk to boot from")
    record = PoolRecord(
        pool=pool,
        pool_uuid=inventory.pool_uuid,
        sr_uuid=sr_uuid,
        vdis={disk.number: _uuid(random) for disk in vm.disks},
        working_name=working_name(sr_uuid, name),
    )
    master = inventory.hosts.get(inventory.master or "")
    return BootPlan(vm, sr_name, hosts, wishes.isolated, (master or hosts[0]).address, record)


def _hosts(hosts: Sequence[Host], wanted: str | None) -> tuple[Host, ...]:
    enabled = [host for host in hosts if host.enabled]
    found = [host for host in enabled if wanted in (None, host.uuid, host.name)]
    if not found:
        names = ", ".join(sorted(host.name for host in enabled)) or "none"
        what = "enabled host" if wanted is None else f"enabled host {wanted!r}"
        raise ObjectNotFound(f"the pool has no {what}", hint=f"it has: {names}")
    return tuple(found)


def _all_to(network: Network, point: RestorePoint) -> dict[str, str]:
    """Each network of the VM to one."""
    if RECORD_KEY not in point.vm:
        return {}
    had = (shape.network for shape in vm_record_of(point.vm).vifs)
    keys = (other.get("uuid") or other.get("name_label") for other in had)
    return {str(key): network.uuid for key in keys if key}


def _uuid(random: RandomSource) -> str:
    return str(uuid.UUID(bytes=random.token(16), version=4))
