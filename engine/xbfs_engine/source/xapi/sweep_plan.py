"""What of a pool is waste of dead runs, and what only looks like it. Pure: from an inventory and ledgers to a plan.

An object goes only when a dead run's ledger has an open item for it and the object is that item's: by its uuid; or,
when the run died before it could note the uuid, by the item's marker or by a name that holds the run's id. Copies
that somebody made of such an object name another object in their marker and are not touched.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.source.xapi.ledger_record import Item, Kind
from xbfs_engine.source.xapi.markers import import_name, marker_of, run_of_reason, snapshot_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from xbfs_engine.source.xapi.inventory import Inventory, Sr, Vdi, Vm
    from xbfs_engine.source.xapi.values import Ref

SETTLE_NS: Final = 3600 * 1_000_000_000
"""A host may still execute the call during which a run died: so long an object that is not there may yet come."""

CBT_METADATA: Final = "cbt_metadata"


class Deed(StrEnum):
    """What is done to an object, in this order. Detaching is done with the disk it is for."""

    END_TASK = "end task"
    DESTROY_VM = "destroy VM"
    DESTROY_DATA = "destroy data of VDI"
    DESTROY_VDI = "destroy VDI"
    RESET = "reset switch of SR"
    FORGET_SR = "forget SR"
    UNBLOCK = "unblock operation of VM"


class Owner(NamedTuple):
    """An item of a dead run."""

    run: str
    item: Item


class Step(NamedTuple):
    """One thing to do. ``detail``: the operation, or the key, where ``deed`` needs one."""

    deed: Deed
    ref: Ref
    uuid: str
    name: str
    owner: Owner | None = None
    detail: str = ""

    @property
    def is_adopted(self) -> bool:
        """Whether it is about a disk whose owner is the item of its snapshot VM."""
        return self.deed is Deed.DESTROY_VDI and self.owner is not None and self.owner.item.kind is Kind.SNAPSHOT


class Note(NamedTuple):
    """Something of XBFS on the pool that is left alone, and why."""

    cls: str
    uuid: str
    name: str
    reason: str


class Kept(NamedTuple):
    """A base of the next delta, which stays."""

    uuid: str
    slot: str


@dataclass(slots=True)
class Plan:
    """``steps`` in their order. ``released``: items that are nothing of ours on the pool (any more).

    ``adopted``: VDIs of snapshot VMs that no ledger names yet; they must be noted before their VM goes.
    ``confirmed``: kept items whose point is known to be durable. ``strangers``: there are things of runs of this node
    that it has no ledger of; perhaps somebody with another state directory is at work.
    """

    steps: list[Step] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    released: list[Owner] = field(default_factory=list)
    adopted: list[tuple[Owner, Vdi]] = field(default_factory=list)
    confirmed: list[Owner] = field(default_factory=list)
    strangers: bool = False


def make_plan(
    inventory: Inventory,
    *,
    dead: Mapping[str, Sequence[Item]],
    live: frozenset[str],
    node: str,
    now_ns: int,
    bases: Mapping[str, str],
) -> Plan:
    """What to do. ``bases``: by slot, the uuid of the base that the repository's last point names, where known."""
    return _Planner(inventory, dead, live, node, now_ns, bases).plan()


class _Planner:
    def __init__(
        self,
        inventory: Inventory,
        dead: Mapping[str, Sequence[Item]],
        live: frozenset[str],
        node: str,
        now_ns: int,
        bases: Mapping[str, str],
    ) -> None:
        self._inventory = inventory
        self._live = live
        self._node = node
        self._now_ns = now_ns
        self._dead = {(run, item.number): Owner(run, item) for run, items in dead.items() for item in items}
        self._dead_runs = frozenset(dead)
        self._staying = self._choose_bases(bases)
        self._bases = bases
        self._plan = Plan()
        self._doomed_vms: dict[Ref, Owner] = {}
        self._handled: set[Ref] = set()
        self._marked: dict[tuple[str, int], list[Vm | Vdi | Sr]] = defaultdict(list)
        for thing in self._things():
            marker = marker_of(thing.other_config)
            if marker is not None and marker.node == node and marker.is_on(thing.uuid):
                self._marked[marker.run, marker.item].append(thing)

    def plan(self) -> Plan:
        # VMs first: whether a disk is still used depends on which of them go.
        for owner in self._of(Kind.SNAPSHOT, Kind.VM):
            self._plan_vm(owner)
        for owner in self._of(Kind.VDI):
            self._plan_vdi(owner)
        for ref, owner in self._doomed_vms.items():
            self._plan_disks_of(ref, owner)
        for owner in self._of(Kind.SWITCH):
            self._plan_switch(owner)
        for owner in self._of(Kind.SR):
            self._plan_sr(owner)
        self._plan_blocks()
        self._note_the_rest()
        order = list(Deed)
        self._plan.steps.sort(key=lambda step: order.index(step.deed))
        return self._plan

    def _of(self, *kinds: Kind) -> list[Owner]:
        return [owner for owner in self._dead.values() if owner.item.kind in kinds]

    def _things(self) -> Iterator[Vm | Vdi | Sr]:
        yield from self._inventory.vms.values()
        yield from self._inventory.vdis.values()
        yield from self._inventory.srs.values()

    def _choose_bases(self, bases: Mapping[str, str]) -> dict[str, str]:
        """By uuid, the slots of what stays: the repository's, else the newest durable base and all newer."""
        slots: dict[str, list[Item]] = defaultdict(list)
        for owner in self._dead.values():
            if owner.item.keep is not None and owner.item.uuid:
                slots[owner.item.keep.slot].append(owner.item)
        staying: dict[str, str] = {}
        for slot, items in slots.items():
            if slot in bases:
                chosen = [item for item in items if item.uuid == bases[slot]]
            else:
                durable = [item.keep.kept_ns for item in items if item.keep and item.keep.confirmed]
                newest = max(durable, default=0)
                chosen = [item for item in items if item.keep and item.keep.kept_ns >= newest]
            staying.update({item.uuid: slot for item in chosen})
        return staying

    def _missing(self, owner: Owner) -> None:
        """An item without an object on the pool: forgotten, unless a host may be about to make it."""
        if owner.item.uuid or self._now_ns - owner.item.intended_ns > SETTLE_NS:
            self._plan.released.append(owner)

    def _step(self, deed: Deed, thing: Vm | Vdi | Sr, owner: Owner | None, detail: str = "") -> None:
        self._handled.add(thing.ref)
        self._plan.steps.append(Step(deed, thing.ref, thing.uuid, thing.name, owner, detail))

    def _note(self, cls: str, thing: Vm | Vdi | Sr, reason: str) -> None:
        self._handled.add(thing.ref)
        self._plan.notes.append(Note(cls, thing.uuid, thing.name, reason))

    def _plan_vm(self, owner: Owner) -> None:
        vm = self._find_vm(owner)
        if vm is None:
            self._missing(owner)
        elif owner.item.kind is Kind.VM and vm.name != _name(owner):
            # Its name is the last thing a restore sets: the VM is complete and its user's.
            self._plan.released.append(owner)
        elif vm.power_state != "Halted" and not vm.is_a_snapshot:
            self._note("VM", vm, f"of dead run {owner.run}, but its power state is {vm.power_state}")
        else:
            self._doomed_vms[vm.ref] = owner
            self._step(Deed.DESTROY_VM, vm, owner)

    def _find_vm(self, owner: Owner) -> Vm | None:
        item = owner.item
        if item.uuid:
            found = [vm for vm in self._inventory.vms.values() if vm.uuid == item.uuid]
        else:
            marked = self._marked[owner.run, item.number]
            found = [vm for vm in self._inventory.vms.values() if vm in marked or self._is_named(vm, owner)]
        if item.kind is Kind.SNAPSHOT:
            found = [vm for vm in found if vm.is_a_snapshot]
        return found[0] if len(found) == 1 else None

    def _is_named(self, vm: Vm, owner: Owner) -> bool:
        if vm.name != _name(owner):
            return False
        if owner.item.kind is Kind.VM:
            return not vm.is_a_template
        source = self._inventory.vms.get(vm.snapshot_of or "")
        return source is None or source.uuid == owner.item.vm_uuid

    def _plan_vdi(self, owner: Owner) -> None:
        item = owner.item
        if item.uuid:
            vdi = self._inventory.vdi_of_uuid.get(item.uuid)
        else:
            marked = [vdi for vdi in self._inventory.vdis.values() if vdi in self._marked[owner.run, item.number]]
            vdi = marked[0] if len(marked) == 1 else None
        if vdi is None:
            self._missing(owner)
        elif vdi.uuid in self._staying:
            self._plan_base(vdi, owner)
        else:
            self._plan_waste(vdi, owner)

    def _plan_base(self, vdi: Vdi, owner: Owner) -> None:
        keep, user = owner.item.keep, self._user_of(vdi)
        assert keep is not None
        if vdi.type != CBT_METADATA and not keep.with_data:
            if not vdi.cbt_enabled:
                # Without a log it is the base of nothing.
                self._plan_waste(vdi, owner)
                return
            if user is not None:
                self._note("VDI", vdi, f"of dead run {owner.run}, a base whose data VM {user.name} uses")
            else:
                # The item stays: without an owner nothing is written to the ledger.
                self._step(Deed.DESTROY_DATA, vdi, None)
        self._handled.add(vdi.ref)
        self._plan.kept.append(Kept(vdi.uuid, keep.slot))
        if not keep.confirmed and keep.slot in self._bases:
            self._plan.confirmed.append(owner)

    def _plan_waste(self, vdi: Vdi, owner: Owner) -> None:
        user = self._user_of(vdi)
        if user is None:
            self._step(Deed.DESTROY_VDI, vdi, owner)
        elif vdi.is_a_snapshot:
            self._note("VDI", vdi, f"of dead run {owner.run}, but VM {user.name} uses it")
        else:
            self._handled.add(vdi.ref)
            self._plan.released.append(owner)

    def _user_of(self, vdi: Vdi) -> Vm | None:
        """A VM that uses a disk and stays."""
        for vbd in self._inventory.vbds_of_vdi.get(vdi.ref, ()):
            vm = self._inventory.vms.get(vbd.vm)
            if vm is not None and not vm.is_control_domain and vm.ref not in self._doomed_vms:
                return vm
        return None

    def _plan_disks_of(self, vm: Ref, owner: Owner) -> None:
        """The disks of a snapshot VM that goes: XAPI leaves them behind."""
        if owner.item.kind is not Kind.SNAPSHOT:
            return
        for vbd in self._inventory.vbds_of_vm.get(vm, ()):
            vdi = self._inventory.vdi_of(vbd)
            if vdi is None or vdi.ref in self._handled or not vdi.is_a_snapshot or vbd.type == "CD":
                continue
            self._plan.adopted.append((owner, vdi))
            self._plan_waste(vdi, owner)

    def _plan_switch(self, owner: Owner) -> None:
        about = owner.item.about
        sr = self._inventory.sr_by_uuid(about.get("sr", ""))
        key = about.get("key", "")
        if sr is None or not key or sr.other_config.get(key) != about.get("value"):
            self._missing(owner)
        else:
            self._plan.steps.append(Step(Deed.RESET, sr.ref, sr.uuid, sr.name, owner, key))

    def _plan_sr(self, owner: Owner) -> None:
        if owner.item.uuid:
            sr = self._inventory.sr_by_uuid(owner.item.uuid)
        else:
            marked = [sr for sr in self._inventory.srs.values() if sr in self._marked[owner.run, owner.item.number]]
            sr = marked[0] if len(marked) == 1 else None
        if sr is None:
            self._missing(owner)
        else:
            self._step(Deed.FORGET_SR, sr, owner)

    def _plan_blocks(self) -> None:
        """By the reasons on the VMs, whatever the ledgers say: XAPI copies them to copies of a VM."""
        owners = {(owner.run, owner.item.vm_uuid): owner for owner in self._of(Kind.BLOCK)}
        blocked: list[Owner] = []
        for vm in self._inventory.vms.values():
            for operation, reason in vm.blocked_operations.items():
                who = run_of_reason(reason)
                if who is None or vm.ref in self._doomed_vms:
                    continue
                run, node = who
                if run in self._dead_runs and node == self._node:
                    owner = owners.get((run, vm.uuid))
                    blocked += [owner] if owner else []
                    self._plan.steps.append(Step(Deed.UNBLOCK, vm.ref, vm.uuid, vm.name, owner, operation))
                else:
                    self._plan.notes.append(
                        Note("VM", vm.uuid, vm.name, f"{operation} is blocked {self._by(run, node)}")
                    )
        for owner in owners.values():
            if owner not in blocked:
                self._missing(owner)

    def _note_the_rest(self) -> None:
        for cls, things in (
            ("VM", self._inventory.vms),
            ("VDI", self._inventory.vdis),
            ("SR", self._inventory.srs),
        ):
            for thing in things.values():
                marker = marker_of(thing.other_config)
                if marker is not None and marker.is_on(thing.uuid) and thing.ref not in self._handled:
                    self._note(cls, thing, f"made {self._by(marker.run, marker.node)}")

    def _by(self, run: str, node: str) -> str:
        if node != self._node:
            return f"by run {run} of node {node}"
        if run in self._live:
            return f"by run {run}, which is at work"
        self._plan.strangers |= run not in self._dead_runs
        return f"by run {run}, of which this node has no open note"


def _name(owner: Owner) -> str:
    """What an item's VM is called while it is ours."""
    name = import_name if owner.item.kind is Kind.VM else snapshot_name
    return name(owner.run, owner.item.number, owner.item.about.get("name", ""))
