"""The storage manager of the simulated pool: keeps objects (VDI, SR) and disks in step, attaches and detaches.

Any thread may call it. Locks of the store may be taken with the lock of the database held, never the other way round.
"""

from __future__ import annotations

import errno
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from ..failures import Failure
from ..schema import NULL
from . import coalesce
from .kinds import EXTENT, KINDS, Kind
from .layers import vhd_overhead
from .nbd import NbdServers
from .share import IoFailure, Share
from .store import DiskStore, Node

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ..context import Context, World
    from ..schema import Ref

MIGRATIONS_MOST: Final = 3
"""Disks that move at once in a pool (xen-api, TOO_MANY_STORAGE_MIGRATES)."""
GC_PERIOD_S: Final = 30.0
"""Simulated seconds between passes of the coalescer."""
_ALWAYS: Final = ["forget", "update", "generate_config", "force_unlock"]
_IDLE: Final = ["clone", "copy", "destroy", "resize", "snapshot", "set_on_boot"]
_ATTACHED: Final = ["snapshot", "clone", "copy"]
_METADATA: Final = ["forget", "destroy"]


class Attachment(NamedTuple):
    """A VDI in use by a plugged VBD."""

    vdi: Ref
    host: Ref
    writable: bool
    system: bool  # by dom0, which is exempt from the rules of sharing


class StorageManager:
    """Storage of one pool."""

    def __init__(self, world: World, state_dir: Path) -> None:
        self._world = world
        self._db = world.db
        self.store = DiskStore(state_dir)
        self.nbd = NbdServers(world, self)
        self.migrations = threading.Semaphore(MIGRATIONS_MOST)
        self._attached: dict[Ref, Attachment] = {}
        self._closed = threading.Event()

    def start(self) -> None:
        """Start the NBD servers and the coalesce timer."""
        self.nbd.start()
        threading.Thread(target=self._collect, name="storage gc", daemon=True).start()

    def close(self) -> None:
        """Stop them."""
        self._closed.set()
        self.nbd.close()

    # Attaching

    def plug_vbd(self, vbd: Ref) -> None:
        """Attach and activate the VDI of a VBD. Raises Failure."""
        db = self._db
        with db.lock:
            vdi = db.text(vbd, "VDI")
            if vdi == NULL:
                return
            vm, writable = db.text(vbd, "VM"), db.text(vbd, "mode") == "RW"
            host, system = db.text(vm, "resident_on"), db.flag(vm, "is_control_domain")
            self.refuse_metadata(vdi)
            self._check_sharing(vdi, writable=writable, system=system)
            if host not in self.hosts(db.text(vdi, "SR")):
                raise Failure("SR_NOT_ATTACHED", db.text(vdi, "SR"))
            node = self.store.find(db.text(vdi, "uuid"))
            if (share := self.share(db.text(vdi, "SR"))) and not (node and node.raw):
                share.open_disk(db.text(vdi, "uuid"))
            if writable and not self.writers(vdi):
                self._activate(vdi)
            self._attached[vbd] = Attachment(vdi, host, writable, system)
            self.describe_use(vdi)

    def unplug_vbd(self, vbd: Ref) -> None:
        """Detach in good order."""
        db = self._db
        with db.lock:
            gone = self._attached.pop(vbd, None)
            if gone is not None and db.exists(gone.vdi):
                if gone.writable and not self.writers(gone.vdi):
                    self.store.tracking.deactivate(db.text(gone.vdi, "uuid"))
                self.describe_use(gone.vdi)

    def crash_host(self, host: Ref) -> None:
        """Power loss: what was attached there is not any more, and the logs of what was written stay inconsistent."""
        with self._db.lock:
            lost = {vbd: one for vbd, one in self._attached.items() if one.host == host}
            for vbd, one in lost.items():
                del self._attached[vbd]
                if self._db.exists(one.vdi):
                    self.describe_use(one.vdi)

    def writers(self, vdi: Ref) -> list[Ref]:
        """The VBDs through which a VDI is attached for writing."""
        with self._db.lock:
            return [vbd for vbd, one in self._attached.items() if one.vdi == vdi and one.writable]

    def users(self, vdi: Ref) -> list[Ref]:
        """The VBDs through which a VDI is attached at all."""
        with self._db.lock:
            return [vbd for vbd, one in self._attached.items() if one.vdi == vdi]

    def user_hosts(self, vdi: Ref) -> set[Ref]:
        """The hosts a VDI is attached to."""
        with self._db.lock:
            return {one.host for one in self._attached.values() if one.vdi == vdi}

    def hosts(self, sr: Ref) -> list[Ref]:
        """The hosts that see an SR."""
        db = self._db
        with db.lock:
            return [db.text(pbd, "host") for pbd in db.refs(sr, "PBDs") if db.flag(pbd, "currently_attached")]

    @contextmanager
    def written(self, vdi: Ref) -> Iterator[None]:
        """dom0 writes a VDI: activated before and deactivated after, unless a guest has it open anyway."""
        if self.writers(vdi):
            yield
            return
        self._activate(vdi)
        try:
            yield
        finally:
            self.store.tracking.deactivate(self._db.text(vdi, "uuid"))

    def _activate(self, vdi: Ref) -> None:
        """Open for writing: a log that a crash left inconsistent ends here (SM, blktap2.py)."""
        if not self.store.tracking.activate(self._db.text(vdi, "uuid")):
            self._stop_tracking(vdi, "VDI_CBT_METADATA_INCONSISTENT")

    def check_tracking(self, vdi: Ref, moment: str) -> bool:
        """Whether a VDI is tracked still: a fault on ``cbt.snapshot`` or ``cbt.resize`` is what ends it in SM."""
        tracked = self._db.flag(vdi, "cbt_enabled")
        if tracked and self._world.faults.take(f"cbt.{moment}", vdi):
            self.store.tracking.disable(self._db.text(vdi, "uuid"))
            self._stop_tracking(vdi, f"VDI_CBT_{moment.upper()}_FAILED")
            return False
        return tracked

    def _stop_tracking(self, vdi: Ref, message: str) -> None:
        self._db.set(vdi, cbt_enabled=False)
        self._world.alert(message, "VDI", vdi)

    def refuse_metadata(self, vdi: Ref) -> None:
        """Raises Failure VDI_INCOMPATIBLE_TYPE for what data_destroy has left."""
        kind = self._db.text(vdi, "type")
        if kind == "cbt_metadata":
            raise Failure("VDI_INCOMPATIBLE_TYPE", vdi, kind)

    def _check_sharing(self, vdi: Ref, *, writable: bool, system: bool) -> None:
        db = self._db
        if writable and db.flag(vdi, "read_only"):
            raise Failure("VDI_READONLY", vdi)
        if system or db.flag(vdi, "sharable"):
            return
        others = [one for one in self._attached.values() if one.vdi == vdi and not one.system]
        if any(writable or one.writable for one in others):
            raise Failure("VDI_IN_USE", vdi)

    def describe_use(self, vdi: Ref) -> None:
        """Show in the object who uses the VDI and what may be done with it now."""
        db = self._db
        modes: dict[str, str] = {}
        for one in self._attached.values():
            if one.vdi == vdi:
                key = f"host_{one.host}"
                modes[key] = "RW" if one.writable else modes.get(key, "RO")
        config = {key: value for key, value in db.mapping(vdi, "sm_config").items() if not key.startswith("host_")}
        # CBT operations are never listed (xen-api filters them out on purpose).
        usable = _ALWAYS + (_ATTACHED if modes else _IDLE)
        allowed = _METADATA if db.text(vdi, "type") == "cbt_metadata" else usable
        db.set(vdi, sm_config=config | modes, allowed_operations=allowed)

    # Space and objects

    def kind(self, sr: Ref) -> Kind:
        """What the driver of an SR can do."""
        return KINDS[self._db.text(sr, "type")]

    def share(self, sr: Ref) -> Share | None:
        """The directory of an SR that is a real one."""
        return self.store.shares.get(self._db.text(sr, "uuid"))

    def full_size(self, sr: Ref, size_bytes: int) -> int:
        """What a thick SR sets aside for a disk."""
        return -(-(size_bytes + vhd_overhead(size_bytes)) // EXTENT) * EXTENT if self.kind(sr).thick else 0

    def used(self, sr: Ref) -> int:
        """Bytes in use: thick disks in full; bases, snapshots and thin disks as far as they are written."""
        db, total = self._db, 0
        if share := self.share(sr):
            return share.room.used
        thick = self.kind(sr).thick
        for node in self.store.members(db.text(sr, "uuid")):
            if thick and self._inflated(node):
                total += self.full_size(sr, node.size_bytes)
            else:
                step = EXTENT if thick else 1
                total += -(-self.store.utilisation(node) // step) * step
        return total

    def free(self, sr: Ref) -> int:
        """Bytes left."""
        return max(0, self._db.number(sr, "physical_size") - self.used(sr))

    def refresh(self, sr: Ref, *measure: Ref, scan: bool = False) -> None:
        """Bring the objects of an SR in line with its disks; utilisation only of the SR and of ``measure``.

        ``scan``: disks without an object get one (bases always do).
        """
        db, share = self._db, self.share(sr)
        with db.lock:
            if share:
                db.set(sr, physical_size=share.room.total)
            known = {db.text(vdi, "uuid"): vdi for vdi in db.refs(sr, "VDIs")}
            nodes = {node.uuid: node for node in self.store.members(db.text(sr, "uuid"))}
            for uuid, vdi in known.items():
                if uuid not in nodes and (not db.flag(vdi, "managed") or (share and scan)):
                    db.destroy(vdi)
            for uuid, node in nodes.items():
                if uuid not in known and (scan or node.hidden):
                    known[uuid] = self._discovered(sr, node)
                if uuid in known:
                    self._describe(known[uuid], node, measure=known[uuid] in measure)
            sizes = (db.number(vdi, "virtual_size") for vdi in db.refs(sr, "VDIs") if db.flag(vdi, "managed"))
            db.set(sr, physical_utilisation=self.used(sr), virtual_allocation=sum(sizes))

    def _inflated(self, node: Node) -> bool:
        db = self._db
        with db.lock:
            found = db.where("VDI", uuid=node.uuid)
            return not node.hidden and not (found and db.flag(found[0], "is_a_snapshot"))

    def _discovered(self, sr: Ref, node: Node) -> Ref:
        """An object for a base that a snapshot made, or for a disk that an introduced SR holds."""
        vdi = self._db.create(
            "VDI",
            uuid=node.uuid,
            name_label="base copy" if node.hidden else "",
            SR=sr,
            type="user",
            virtual_size=node.size_bytes,
            location=node.uuid,
            managed=not node.hidden,
            read_only=node.hidden,
            physical_utilisation=self.store.utilisation(node),
        )
        self.describe_use(vdi)
        return vdi

    def _describe(self, vdi: Ref, node: Node, *, measure: bool) -> None:
        db = self._db
        config = {key: value for key, value in db.mapping(vdi, "sm_config").items() if key != "vhd-parent"}
        if node.parent is not None:
            config["vhd-parent"] = node.parent.uuid
        db.set(vdi, sm_config=config, virtual_size=node.size_bytes)
        if measure:
            db.set(vdi, physical_utilisation=self.store.utilisation(node))

    # Disks

    def import_file(self, vdi: Ref, path: Path) -> None:
        """Fill a fresh VDI with a raw image, sparsely and untracked."""
        self.store.import_file(self._db.text(vdi, "uuid"), path)
        self.refresh(self._db.text(vdi, "SR"), vdi)

    def guest_write(self, vdi: Ref, offset: int, data: bytes) -> None:
        """Write as the guest would; tracked by CBT. Raises OSError as the guest sees it."""
        with _errors_of_guests():
            self.store.write(self._db.text(vdi, "uuid"), offset, data)

    def read(self, vdi: Ref, offset: int, length: int) -> bytes:
        """The bytes of a VDI. Raises OSError as the guest sees it."""
        with _errors_of_guests():
            return self.store.read(self._db.text(vdi, "uuid"), offset, length)

    # Coalescing

    def coalesce(self) -> None:
        """Merge now whatever may be merged; SRs with ``other_config:gc=false`` are left alone."""
        while merged := coalesce.step(self.store, self._may_merge):
            for vdi in self._db.where("VDI", uuid=merged.removed):
                self.refresh(self._db.text(vdi, "SR"))

    def _collect(self) -> None:
        """The timer; a fault set on the point ``storage.gc`` keeps it from working, so that a backlog builds up."""
        while not self._closed.is_set():
            self._world.clock.sleep(GC_PERIOD_S)
            if not self._closed.is_set() and not self._world.faults.take("storage.gc"):
                self.coalesce()

    def _may_merge(self, node: Node) -> bool:
        db = self._db
        with db.lock:
            for sr in db.where("SR", uuid=node.sr):
                if self.share(sr):  # what lies on a real share is left to whoever exports it
                    return False
                config = db.mapping(sr, "other_config")
                switch = "coalesce" if node.hidden else "leaf-coalesce"
                return config.get("gc") != "false" and config.get(switch) != "false" and bool(self.hosts(sr))
        return False


@contextmanager
def _errors_of_guests() -> Iterator[None]:
    try:
        yield
    except IoFailure as exc:
        raise OSError(errno.EIO, exc.params[1]) from exc


def storage(ctx: Context) -> StorageManager:
    """The storage of the pool a call is about."""
    found = ctx.world.storage
    assert isinstance(found, StorageManager)
    return found
