"""A volume as its journal's recovery would leave it: nothing is written, blocks are read from the journal instead.

Stateful only in what it was made with, so it may be used by as many threads as the source below.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported
from xbfs_engine.guestfs.base import VolumeState
from xbfs_engine.guestfs.ext.layout import (
    COMPAT_HAS_JOURNAL,
    INCOMPAT_RECOVER,
    STATE_ERROR,
    STATE_VALID,
    journal_runs,
    read_superblock,
)
from xbfs_engine.guestfs.ext.log import MAGIC, Copy, read_log

if TYPE_CHECKING:
    from xbfs_engine.formats.source import BlockSource

_MAGIC_BYTES: Final = MAGIC.to_bytes(4, "big")


class Replay(NamedTuple):
    """A volume to read, and how far it is what the guest would see after its next mount."""

    source: BlockSource
    state: VolumeState
    reason: str
    transactions: int
    blocks: int
    """Blocks that come from the journal."""


def replay(source: BlockSource) -> Replay:
    """The volume with its journal replayed. A journal that can not be used leaves the volume as it is, and DIRTY.

    GuestDamaged: the volume has no usable superblock.
    """
    sb = read_superblock(source)
    if not sb.incompat & INCOMPAT_RECOVER:
        state, reason = VolumeState.CLEAN, ""
        if sb.state & STATE_ERROR:
            state, reason = VolumeState.DIRTY, "the guest found errors in it and has not checked it since"
        elif not sb.state & STATE_VALID:
            state, reason = VolumeState.DIRTY, "it was mounted and has no journal: what the guest cached is missing"
        return Replay(source, state, reason, 0, 0)
    if not sb.compat & COMPAT_HAS_JOURNAL:
        return Replay(source, VolumeState.DIRTY, "it needs the recovery of a journal that it does not have", 0, 0)
    try:
        log = read_log(source, journal_runs(source, sb), sb.block_bytes)
    except (GuestDamaged, GuestUnsupported) as error:
        return Replay(source, VolumeState.DIRTY, f"its journal is not replayed: {error}", 0, 0)
    # The kernel would stop at a block outside the volume; nothing that is read can lie there.
    copies = {block: copy for block, copy in log.copies.items() if block < sb.blocks}
    replayed = _Overlay(source, sb.block_bytes, copies) if copies else source
    if log.trouble:
        return Replay(replayed, VolumeState.DIRTY, log.trouble, log.transactions, len(copies))
    what = f"{log.transactions} transactions of its journal were replayed in memory"
    return Replay(replayed, VolumeState.REPLAYED, what, log.transactions, len(copies))


class _Overlay:
    """Reads blocks from their copies in the journal."""

    def __init__(self, source: BlockSource, block_bytes: int, copies: dict[int, Copy]) -> None:
        self._source = source
        self._block_bytes = block_bytes
        self._copies = copies
        self._order = sorted(copies)

    @property
    def size_bytes(self) -> int:
        return self._source.size_bytes

    def read_at(self, offset: int, length: int) -> bytes:
        size = self._block_bytes
        first = bisect_left(self._order, offset // size)
        last = bisect_left(self._order, -(-(offset + length) // size))
        below = self._source.read_at(offset, length)
        if first == last:
            return below
        patched = bytearray(below)
        for block in self._order[first:last]:
            copy = self._copies[block]
            data = self._source.read_at(copy.journal_block * size, size)
            if copy.escaped:
                data = _MAGIC_BYTES + data[4:]
            start = block * size - offset
            if start < 0:
                data, start = data[-start:], 0
            data = data[: length - start]
            patched[start : start + len(data)] = data
        return bytes(patched)
