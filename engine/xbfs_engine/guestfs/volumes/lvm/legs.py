"""Which legs of a mirrored logical volume hold valid data, by what the kernel keeps beside them.

Layouts: Linux ``drivers/md/dm-raid.c`` (struct dm_raid_superblock, at the start of each metadata image) and
``drivers/md/dm-log.c`` (struct log_header_disk). All integers are little-endian. Pure functions.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import GuestDamaged, XbfsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.formats.source import BlockSource

_RAID: Final = struct.Struct("<4sIIIQQQQ")
_RAID_MAGIC: Final = b"DmRd"
_COMPLETE: Final = 0xFFFF_FFFF_FFFF_FFFF
_LOG: Final = struct.Struct("<IIQ")
_LOG_MAGIC: Final = 0x4D69_5272
_LOG_BITS_AT: Final = 1024
_LOG_REGIONS_MAX: Final = 1 << 26
_FAILED_BITS: Final = 64
_EVENTS_BEHIND_MAX: Final = 1
"""As for md: the crash came between writing the one superblock and the other."""


class _State(NamedTuple):
    position: int
    events: int
    failed: int
    recovered: int


def trusted_legs(
    legs: Sequence[tuple[BlockSource | None, BlockSource | None]],
) -> list[BlockSource | None]:
    """The images of (metadata, image) pairs; None for one that failed, is behind, is being rebuilt or not there.

    Without any metadata that says otherwise all legs are equal: a volume that was never activated has none.
    """
    states = [None if meta is None else _state(meta) for meta, _ in legs]
    known = [state for state in states if state is not None]
    if not known:
        return [image for _, image in legs]
    newest = max(known, key=lambda state: state.events)
    trusted: list[BlockSource | None] = []
    for index, (state, (_, image)) in enumerate(zip(states, legs, strict=True)):
        if state is not None and state.position != index:
            raise GuestDamaged(f"leg {index} of the RAID says it is leg {state.position}")
        is_valid = (
            state is not None
            and newest.events - state.events <= _EVENTS_BEHIND_MAX
            and state.recovered == _COMPLETE
            and not (index < _FAILED_BITS and newest.failed >> index & 1)
        )
        trusted.append(image if is_valid else None)
    return trusted


def _state(meta: BlockSource) -> _State | None:
    try:
        fields = _RAID.unpack(meta.read_at(0, _RAID.size))
    except XbfsError:
        return None
    magic, _, _, position, events, failed, recovered, _ = fields
    return _State(position, events, failed, recovered) if magic == _RAID_MAGIC else None


def mirror_is_in_sync(log: BlockSource) -> bool:
    """Whether a mirror's log says that every region is the same on all legs."""
    magic, _, regions = _LOG.unpack(log.read_at(0, _LOG.size))
    if magic != _LOG_MAGIC or not 0 < regions <= _LOG_REGIONS_MAX:
        return False
    whole, rest = divmod(regions, 8)
    bits = log.read_at(_LOG_BITS_AT, whole + (rest > 0))
    return bits[:whole] == b"\xff" * whole and (not rest or bits[whole] & (1 << rest) - 1 == (1 << rest) - 1)
