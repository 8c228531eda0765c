"""The disks of a restore: VDIs are made, all before the first is filled, and then written one after the other.

A VHD stream leaves out what is zero; where a host or an SR takes none, or the disk is too large for one, all of it is
sent raw. Every chunk is checked against its id on the way; that the disk is written is the task's word alone.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import trio

from xbfs_engine.core.errors import TransferFailed, VmNotReady, XapiFailure
from xbfs_engine.core.limits import GIB, MIB
from xbfs_engine.core.log import Logger
from xbfs_engine.formats.raw import RawLayout
from xbfs_engine.formats.vhd_records import VHD_SIZE_MAX
from xbfs_engine.restore.image import send_image
from xbfs_engine.restore.layouts import ImageFormat, image_layout
from xbfs_engine.restore.vm.calls import make, patiently, put_key, release
from xbfs_engine.source.xapi.fields import Fields
from xbfs_engine.source.xapi.http import import_raw
from xbfs_engine.source.xapi.ledger import Kind
from xbfs_engine.source.xapi.markers import SELF_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.formats.segments import Layout
    from xbfs_engine.restore.image import ExportProgress, ExportStatistics
    from xbfs_engine.restore.vm.plan import DiskPlan
    from xbfs_engine.source.xapi.inventory import Sr
    from xbfs_engine.source.xapi.ledger import Item, RunLedger
    from xbfs_engine.source.xapi.session import Pool, Ref, XapiValue
    from xbfs_engine.store.reader import Locator
    from xbfs_engine.store.repository import Repository

_SILENCE_S: Final = 1200.0
"""The longest a host may take no data, or think after the last of them (as long as Xen Orchestra waits)."""

_TOO_LARGE: Final = frozenset({"VDI_TOO_LARGE", "SR_BACKEND_FAILURE_79"})
"""What VDI.create says of sizes that the SR's format has not (xen-api; SM, VDISize)."""

_REFUSED_BYTES: Final = 8 * MIB
"""Who takes no VHD says so at once, but the network takes some MiB meanwhile. The code tells nothing: whatever vhd-tool
dislikes is VDI_IO_ERROR (xen-api)."""

Format = Literal["vhd", "raw"]

_log = Logger("xbfs.restore")


class Stored(NamedTuple):
    """Where a point's disks are read from."""

    repository: Repository
    point: RestorePoint
    locator: Locator | None


class MadeDisk(NamedTuple):
    """A VDI on the pool. ``size_bytes``: as the SR rounded it."""

    plan: DiskPlan
    ref: Ref
    uuid: str
    size_bytes: int
    item: Item


class FilledDisk(NamedTuple):
    """What writing a VDI took; ``reason``: why it was not sent as VHD, or empty."""

    made: MadeDisk
    format: Format
    reason: str
    statistics: ExportStatistics


class DiskMaker:
    """Makes and fills VDIs. Belongs to one task."""

    def __init__(self, pool: Pool, ledger: RunLedger, stored: Stored, sr: Sr) -> None:
        self._pool = pool
        self._ledger = ledger
        self._stored = stored
        self._sr = sr
        self._sent_bytes = 0  # of the last disk, as far as it came

    async def make(self, plans: Sequence[DiskPlan]) -> list[MadeDisk]:
        """Empty VDIs, marked as ours. Raises PoolError, StorageError, VmNotReady."""
        made = []
        for plan in plans:
            # Between a call and its note nobody would know of the VDI: that is not interrupted.
            with trio.CancelScope(shield=True):
                made.append(await self._make(plan))
            await trio.lowlevel.checkpoint()
        return made

    async def fill(self, made: MadeDisk, report: Callable[[ExportProgress], None]) -> FilledDisk:
        """Write the disk's data. Raises PoolError, IntegrityError, StorageError.

        When it breaks off it is sent once more: what was written before is written again.
        """
        how: Format = "vhd"
        reason = ""
        if made.plan.disk.size_bytes > VHD_SIZE_MAX:
            how, reason = "raw", "too large for a VHD"
        again = True
        while True:
            try:
                statistics = await self._send(made, how, report)
            except (TransferFailed, XapiFailure) as exc:
                _log.info("disk not written", vdi=made.uuid, format=how, sent_bytes=self._sent_bytes, error=exc.message)
                if how == "vhd" and self._sent_bytes <= _REFUSED_BYTES:
                    how, reason = "raw", f"the host did not take it as VHD: {exc.message}"
                elif again:
                    again = False
                else:
                    raise
            else:
                return FilledDisk(made, how, reason, statistics)

    async def release(self, made: Sequence[MadeDisk]) -> None:
        """Make them the user's: no longer marked as ours. Their items stay open. Raises PoolError."""
        for disk in made:
            await release(self._pool, "VDI", disk.ref, self._stored.point)

    async def _make(self, plan: DiskPlan) -> MadeDisk:
        item = await self._ledger.intend(Kind.VDI, vm_uuid=self._stored.point.vm_uuid)
        try:
            ref = await make(
                self._pool,
                "VDI.create",
                {
                    "name_label": plan.name,
                    "name_description": plan.description,
                    "SR": self._sr.ref,
                    "virtual_size": plan.disk.size_bytes,
                    "type": "user",
                    "sharable": False,
                    "read_only": False,
                    "other_config": dict(self._ledger.marker(item).to_other_config()),
                    "xenstore_data": {},
                    "tags": [],
                    # The old one names parents and keys of the old SR (Xen Orchestra, issue 4482).
                    "sm_config": {},
                },
            )
        except XapiFailure as exc:
            if plan.disk.size_bytes > VHD_SIZE_MAX and exc.code in _TOO_LARGE:
                raise VmNotReady(
                    f"disk {plan.number} has {plan.disk.size_bytes / GIB:.0f} GiB, and SR {self._sr.name} takes at "
                    f"most {VHD_SIZE_MAX // GIB} GiB a disk: {exc.message}",
                    hint="choose an SR whose disks are raw or qcow2, or leave the disk out with --disk",
                ) from exc
            raise
        fields = Fields("VDI", ref, _record(await patiently(self._pool, "VDI.get_record", ref)))
        item = await self._ledger.made(item, fields.text("uuid"))
        await put_key(self._pool, "VDI", ref, SELF_KEY, item.uuid)
        return MadeDisk(plan, ref, item.uuid, fields.integer("virtual_size"), item)

    async def _send(self, made: MadeDisk, how: Format, report: Callable[[ExportProgress], None]) -> ExportStatistics:
        disk, point = made.plan.disk, self._stored.point
        layout: Layout = RawLayout(disk.size_bytes)
        # Beyond the disk's end too: what a raw VDI holds before is not always zero.
        length = max(made.size_bytes, disk.size_bytes)
        if how == "vhd":
            layout = image_layout(point, disk, ImageFormat.VHD)
            length = layout.size_bytes
        async with import_raw(self._pool, made.ref, format=how, length=length, timeout_s=_SILENCE_S) as sink:
            try:
                send = partial(send_image, self._stored.repository, point, disk, layout, sink.write)
                return await send(size_bytes=length, locator=self._stored.locator, report=report)
            finally:
                self._sent_bytes = sink.sent_bytes


def _record(value: object) -> dict[str, XapiValue]:
    return value if isinstance(value, dict) else {}
