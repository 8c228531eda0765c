"""A volume group over the physical volumes that are there: its logical volumes as sources, each for itself.

Owns how segments of each type lie on physical volumes and on other logical volumes. A logical volume that can not be
read does not touch the others; one on a physical volume that is missing is readable elsewhere. A thin pool's cache
makes a group serve one thread at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported, XbfsError
from xbfs_engine.guestfs.volumes.lvm.legs import mirror_is_in_sync, trusted_legs
from xbfs_engine.guestfs.volumes.lvm.thin import ThinPool
from xbfs_engine.guestfs.volumes.raid import Raid10
from xbfs_engine.guestfs.volumes.sources import Chain, Copies, Missing, Slice, Stripes, Zeros

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xbfs_engine.formats.source import BlockSource
    from xbfs_engine.guestfs.volumes.lvm.metadata import LvPart, PvPart, Segment, VgMetadata

_SECTOR: Final = 512
_STACK_MAX: Final = 16
"""Logical volumes on logical volumes: LVM itself stacks about six."""

_BUILT_MAX: Final = 1 << 16
"""Segments that are looked at in one group, so that no text describes a tree that never ends."""

_AREAS_MAX: Final = 4096
_RAID_CHUNK_MAX: Final = 1 << 30


class LogicalVolume(NamedTuple):
    """A logical volume that the guest sees."""

    name: str
    uuid: str
    size_bytes: int
    source: BlockSource | None
    reason: str
    """Why it is not readable, wholly or in part; empty if it is."""
    is_pool: bool
    """A thin pool: it holds volumes and has no content of its own."""


class VolumeGroup:
    """Logical volumes of one group. ``physical`` has the physical volumes that are there, by UUID."""

    def __init__(self, metadata: VgMetadata, physical: Mapping[str, BlockSource]) -> None:
        self._vg = metadata
        self._physical = {name: _area(part, physical.get(part.uuid)) for name, part in metadata.physical.items()}
        self._built: dict[str, BlockSource | XbfsError] = {}
        self._pools: dict[str, ThinPool] = {}
        self._missing: dict[str, set[str]] = {}
        self._stack: list[str] = []
        self._segments_left = _BUILT_MAX
        self._special = self._snapshots()

    def volumes(self) -> list[LogicalVolume]:
        """All that the guest sees, in the order of their names."""
        parts = [part for name, part in sorted(self._vg.logical.items()) if part.is_visible or name in self._special]
        return [self._volume(part) for part in parts if part.body.section("segment1").kind() != "snapshot"]

    def _volume(self, part: LvPart) -> LogicalVolume:
        size = 0
        try:
            segments = self._vg.segments(part)
            size = sum(segment.extents for segment in segments) * self._vg.extent_bytes
            if any(_plain(segment.kind) == "thin-pool" for segment in segments):
                return LogicalVolume(part.name, part.uuid, size, None, "it is a pool of thin volumes", True)
            source = self._lv(part.name)
        except XbfsError as error:
            return LogicalVolume(part.name, part.uuid, size, None, error.message, False)
        missing = sorted(self._missing.get(part.name, ()))
        reason = f"parts of it are on physical volumes that are not there: {', '.join(missing)}" if missing else ""
        return LogicalVolume(part.name, part.uuid, size, source, reason, False)

    def _snapshots(self) -> dict[str, str]:
        """Why logical volumes that take part in old-style snapshots are not what their segments say."""
        special: dict[str, str] = {}
        for part in self._vg.logical.values():
            body = part.body.section("segment1")
            try:
                if body.kind() != "snapshot":
                    continue
                if merging := body.text("merging_store", ""):
                    special[merging] = "it is a snapshot that was being merged"
                    special[body.text("origin")] = "a snapshot was being merged into it"
                else:
                    special[body.text("cow_store")] = "it is a copy-on-write snapshot (not a thin one)"
            except GuestDamaged:
                continue
        return special

    def _lv(self, name: str) -> BlockSource:
        """The source of a logical volume, hidden ones too."""
        if name not in self._built:
            if name in self._stack or len(self._stack) >= _STACK_MAX:
                raise GuestDamaged(f"LVM metadata: {name} is made of itself, or of too much")
            self._stack.append(name)
            try:
                self._built[name] = self._build(name)
            except XbfsError as error:
                self._built[name] = error
            finally:
                self._stack.pop()
        built = self._built[name]
        if self._stack and name in self._missing:
            self._missing.setdefault(self._stack[-1], set()).update(self._missing[name])
        if isinstance(built, XbfsError):
            raise built
        return built

    def _build(self, name: str) -> BlockSource:
        part = self._vg.logical.get(name)
        if part is None:
            raise GuestDamaged(f"LVM metadata: there is no logical volume {name}")
        if name in self._special:
            raise GuestUnsupported(f"{name}: {self._special[name]}")
        parts = []
        for segment in self._vg.segments(part):
            self._segments_left -= 1
            if self._segments_left < 0:
                raise GuestDamaged("LVM metadata: the volume group has too many segments")
            source = self._segment(segment)
            size = segment.extents * self._vg.extent_bytes
            if source.size_bytes < size:
                raise GuestDamaged(f"LVM metadata: a segment of {name} is shorter than it claims")
            parts.append(source if source.size_bytes == size else Slice(source, 0, size))
        return parts[0] if len(parts) == 1 else Chain(parts)

    def _segment(self, segment: Segment) -> BlockSource:
        size = segment.extents * self._vg.extent_bytes
        match _plain(segment.kind):
            case "striped" | "linear":
                return self._striped(segment, segment.body.array("stripes"), segment.body.number("stripe_count"))
            case "raid0" | "raid0_meta":
                return self._raid0(segment)
            case "mirror":
                return self._mirror(segment)
            case "raid1":
                return Copies(self._known(self._legs(segment), "raid1"))
            case "raid10" | "raid10_near":
                return self._raid10(segment, size)
            case "thin":
                return self._thin(segment, size)
            case "zero":
                return Zeros(size)
            case "error":
                return Missing(size, "the volume group says that reading here is an error")
        raise GuestUnsupported(f"segments of type {segment.kind} are not read here")

    def _areas(self, values: list[int | str], extents: int) -> list[BlockSource]:
        """The places that a list of (name, first extent) pairs says, ``extents`` long each."""
        if len(values) % 2 or not 0 < len(values) <= _AREAS_MAX:
            raise GuestDamaged("LVM metadata: a list of places is not one of pairs")
        areas: list[BlockSource] = []
        for name, first in zip(values[::2], values[1::2], strict=True):
            if not isinstance(first, int) or first < 0:
                raise GuestDamaged(f"LVM metadata: extent {first!r} can not be")
            name = str(name)
            source = self._physical.get(name)
            if isinstance(source, Missing) and self._stack:
                self._missing.setdefault(self._stack[-1], set()).add(self._vg.physical[name].uuid)
            if source is None:
                source = self._lv(name)
            areas.append(Slice(source, first * self._vg.extent_bytes, extents * self._vg.extent_bytes))
        return areas

    def _striped(self, segment: Segment, values: list[int | str], count: int) -> BlockSource:
        if not 0 < count <= segment.extents or segment.extents % count:
            raise GuestDamaged(f"LVM metadata: {segment.extents} extents can not lie on {count} stripes")
        areas = self._areas(values, segment.extents // count)
        if len(areas) != count:
            raise GuestDamaged(f"LVM metadata: {len(areas)} places for {count} stripes")
        return areas[0] if count == 1 else Stripes(areas, self._stripe_bytes(segment))

    def _stripe_bytes(self, segment: Segment) -> int:
        chunk = segment.body.number("stripe_size") * _SECTOR
        if not _SECTOR <= chunk <= _RAID_CHUNK_MAX or self._vg.extent_bytes % chunk:
            raise GuestDamaged(f"LVM metadata: stripes of {chunk} bytes can not be")
        return chunk

    def _raid0(self, segment: Segment) -> BlockSource:
        names = segment.body.array("raid0_lvs")
        if names:
            return self._striped(segment, [value for name in names for value in (name, 0)], len(names))
        legs = self._known(self._legs(segment), "raid0")
        return Stripes(legs, self._stripe_bytes(segment))

    def _mirror(self, segment: Segment) -> BlockSource:
        areas = self._areas(segment.body.array("mirrors"), segment.extents)
        log = segment.body.text("mirror_log", "")
        try:
            in_sync = bool(log) and mirror_is_in_sync(self._lv(log))
        except XbfsError:
            in_sync = False
        # Only the first leg is surely complete while the others may still be copied from it.
        return Copies(areas) if in_sync else areas[0]

    def _legs(self, segment: Segment) -> list[BlockSource | None]:
        """The image of each leg of a RAID, None where it is not to be trusted."""
        names = segment.body.array("raids")
        if len(names) % 2 or not 0 < len(names) <= _AREAS_MAX:
            raise GuestDamaged("LVM metadata: a list of legs is not one of pairs")
        if any(segment.body.number(key, 0) for key in ("data_offset", "delta_disks", "reshape_count")):
            raise GuestUnsupported("the RAID was being reshaped")
        found: list[tuple[BlockSource | None, BlockSource | None]] = []
        for meta, image in zip(names[::2], names[1::2], strict=True):
            found.append((self._maybe(str(meta)), self._maybe(str(image))))
        return trusted_legs(found)

    def _maybe(self, name: str) -> BlockSource | None:
        try:
            return self._lv(name)
        except XbfsError:
            return None

    def _known(self, legs: list[BlockSource | None], kind: str) -> list[BlockSource]:
        there = [leg for leg in legs if leg is not None]
        if not there or (kind == "raid0" and len(there) < len(legs)):
            raise GuestDamaged(f"{kind}: {len(there)} of {len(legs)} legs can be read")
        return there

    def _raid10(self, segment: Segment, size: int) -> BlockSource:
        legs = self._legs(segment)
        copies = segment.body.number("data_copies", 2)
        if not 0 < copies <= len(legs):
            raise GuestDamaged(f"LVM metadata: {copies} copies on {len(legs)} legs can not be")
        sizes = {leg.size_bytes for leg in legs if leg is not None}
        array = Raid10(legs, min(sizes, default=0), self._stripe_bytes(segment), copies, 1, False)
        return Slice(array, 0, size)

    def _thin(self, segment: Segment, size: int) -> BlockSource:
        body = segment.body
        pool = self._pool(body.text("thin_pool"))
        external = body.text("external_origin", "")
        return pool.volume(body.number("device_id"), size, self._lv(external) if external else None)

    def _pool(self, name: str) -> ThinPool:
        if name not in self._pools:
            part = self._vg.logical.get(name)
            segments = self._vg.segments(part) if part else []
            if len(segments) != 1 or _plain(segments[0].kind) != "thin-pool":
                raise GuestDamaged(f"LVM metadata: {name} is no thin pool")
            body = segments[0].body
            self._pools[name] = ThinPool(self._lv(body.text("metadata")), self._lv(body.text("pool")))
        return self._pools[name]


def _plain(kind: str) -> str:
    """The type without the flags that follow it; those of pools only say how LVM is to treat them."""
    return "thin-pool" if kind.startswith("thin-pool+") else kind


def _area(part: PvPart, source: BlockSource | None) -> BlockSource:
    """The extents of a physical volume, or what stands for them."""
    if source is None:
        return Missing(part.size_bytes, f"physical volume {part.uuid} is not there")
    if part.is_missing:
        return Missing(part.size_bytes, f"physical volume {part.uuid} is out of date: the group went on without it")
    if part.start + part.size_bytes > source.size_bytes:
        beyond = max(source.size_bytes - part.start, 0)
        rest = Missing(part.size_bytes - beyond, f"physical volume {part.uuid} is shorter than it was made")
        return Chain([Slice(source, part.start, beyond), rest]) if beyond else rest
    return Slice(source, part.start, part.size_bytes)
