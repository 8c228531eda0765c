"""A volume group as its metadata text describes it, typed and checked.

Pure; what contradicts itself raises GuestDamaged, for one logical volume where it concerns only that one. The text's
words are those of LVM2 ``lib/format_text/`` (export.c, import_vsn1.c) and of each segment type's own source file.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from xbfs_engine.core.errors import GuestDamaged
from xbfs_engine.guestfs.volumes.lvm.text import Section, parse_lvm_text

_SECTOR: Final = 512
_EXTENT_SECTORS_MAX: Final = 1 << 31
_SIZE_MAX: Final = 1 << 62
_NAME: Final = re.compile(r"[a-zA-Z0-9_.+][a-zA-Z0-9_.+-]{0,126}")
"""Names that LVM allows (lvm(8), "Valid names"); ``.`` and ``..`` are not among them."""


class PvPart(NamedTuple):
    """A physical volume as its group knows it. Sizes are bytes."""

    name: str
    uuid: str
    start: int
    """Of its first extent."""
    size_bytes: int
    is_missing: bool
    """The group has gone on without it: what it holds is out of date."""


class Segment(NamedTuple):
    """A part of a logical volume; ``body`` has the words of its type."""

    start_extent: int
    extents: int
    kind: str
    body: Section


class LvPart(NamedTuple):
    """A logical volume, hidden ones too."""

    name: str
    uuid: str
    is_visible: bool
    body: Section


class VgMetadata(NamedTuple):
    """A volume group at one point of its life."""

    name: str
    uuid: str
    sequence: int
    extent_bytes: int
    physical: dict[str, PvPart]
    logical: dict[str, LvPart]

    def segments(self, volume: LvPart) -> list[Segment]:
        """The parts of a logical volume in order, without gaps."""
        found = []
        for index in range(1, volume.body.number("segment_count") + 1):
            body = volume.body.section(f"segment{index}")
            extents = body.number("extent_count")
            found.append(Segment(body.number("start_extent"), extents, body.text("type"), body))
        found.sort(key=lambda segment: segment.start_extent)
        end = 0
        for segment in found:
            if segment.start_extent != end or not segment.extents:
                raise GuestDamaged(f"LVM metadata: {volume.name} has a gap at extent {end}")
            end += segment.extents
        if end * self.extent_bytes > _SIZE_MAX:
            raise GuestDamaged(f"LVM metadata: {volume.name} claims {end} extents")
        return found


def parse_metadata(raw: bytes) -> VgMetadata:
    """The volume group that a metadata text is about."""
    for name, section in parse_lvm_text(raw).sections():
        extent_sectors = section.number("extent_size")
        if not 0 < extent_sectors <= _EXTENT_SECTORS_MAX:
            raise GuestDamaged(f"LVM metadata: {name} claims extents of {extent_sectors} sectors")
        extent_bytes = extent_sectors * _SECTOR
        return VgMetadata(
            _checked(name),
            section.text("id"),
            section.number("seqno"),
            extent_bytes,
            {key: _physical(key, body, extent_bytes) for key, body in section.section("physical_volumes").sections()},
            {
                key: LvPart(_checked(key), body.text("id"), "VISIBLE" in body.array("status"), body)
                for key, body in section.section("logical_volumes").sections()
            },
        )
    raise GuestDamaged("LVM metadata: it describes no volume group")


def _physical(name: str, body: Section, extent_bytes: int) -> PvPart:
    return PvPart(
        name,
        body.text("id"),
        body.number("pe_start") * _SECTOR,
        body.number("pe_count") * extent_bytes,
        "MISSING" in body.array("flags"),
    )


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise GuestDamaged(f"LVM metadata: {name!r} is no name that LVM allows")
    return name
