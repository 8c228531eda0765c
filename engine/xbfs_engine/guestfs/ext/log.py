"""The journal of ext3 and ext4 (jbd2): which blocks its committed transactions hold, and where.

Owns the log's format and the rules of recovery; does not replay anything itself. What recovery would write is found
out in one walk, transaction by transaction; like the kernel the walk ends where the log does: at the first block that
is not of the expected transaction. A transaction whose checksums are wrong ends it too, and is reported.
Facts: the kernel's documentation ``filesystems/ext4/journal.rst``, and for fast commits ``fast_commit.h``; all
numbers of the log are big-endian, those of fast commits little-endian.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported
from xbfs_engine.guestfs.crc32c import crc32c, crc32c_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.formats.source import BlockSource
    from xbfs_engine.guestfs.ext.layout import Run

MAGIC: Final = 0xC03B_3998
_DESCRIPTOR, _COMMIT, _SUPERBLOCK_V1, _SUPERBLOCK_V2, _REVOKE = 1, 2, 3, 4, 5

_COMPAT_CHECKSUM: Final = 0x1
_REVOKES, _64BIT, _ASYNC_COMMIT, _CSUM_V2, _CSUM_V3, _FAST_COMMIT = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
_KNOWN: Final = _REVOKES | _64BIT | _ASYNC_COMMIT | _CSUM_V2 | _CSUM_V3 | _FAST_COMMIT
_CRC32C: Final = 4
"""s_checksum_type."""

_TAG_ESCAPED, _TAG_SAME_UUID, _TAG_LAST = 0x1, 0x2, 0x8
_TAIL_BYTES: Final = 4
"""The checksum that ends descriptor and revoke blocks."""

_FAST_COMMIT_BLOCKS: Final = 256
"""JBD2_DEFAULT_FAST_COMMIT_BLOCKS, where the superblock says 0."""
_LOG_BLOCKS_MIN: Final = 1024
"""JBD2_MIN_JOURNAL_BLOCKS."""
_FC_TAIL, _FC_HEAD = 8, 9

_COPIES_MAX: Final = 1 << 20
"""Blocks that are overlaid at most: a full journal of 4 GiB in 4 KiB blocks."""
_BATCH: Final = 256
"""Journal blocks that are read and checked at once."""

_ONES: Final = 0xFFFF_FFFF


class Copy(NamedTuple):
    """A block's newest committed content."""

    journal_block: int
    """Its physical block."""
    escaped: bool
    """Its first four bytes are the log's magic number, stored as zeros."""


class LogState(NamedTuple):
    """What recovery would write."""

    copies: dict[int, Copy]
    """Physical block of the filesystem -> content."""
    transactions: int
    trouble: str
    """Why there may be more than that; empty if it is all."""


class _Log(NamedTuple):
    block_bytes: int
    first: int
    last: int
    """Where the log wraps: the first block behind it."""
    end: int
    """Where the journal, fast commits included, ends."""
    start: int
    sequence: int
    compat: int
    incompat: int
    seed: int
    """CRC register that the journal's checksums start with."""


class _BadTransaction(Exception):
    """The walk ends before this transaction."""


def read_log(source: BlockSource, runs: Sequence[Run], block_bytes: int) -> LogState:
    """Walks the log of a filesystem that was not unmounted.

    GuestDamaged, GuestUnsupported: the log as a whole can not be used.
    """
    journal = _Journal(source, runs, block_bytes)
    log = _superblock(journal, block_bytes)
    if not log.start:
        return LogState({}, 0, "")
    walk = _Walk(journal, log)
    walk.run()
    trouble = walk.trouble
    if not trouble and log.incompat & _FAST_COMMIT and _has_fast_commits(journal, log, walk.sequence):
        trouble = "its journal ends with fast commits, which are not replayed"
    return LogState(walk.copies, walk.transactions, trouble)


class _Journal:
    """Blocks of the journal by their number within it."""

    def __init__(self, source: BlockSource, runs: Sequence[Run], block_bytes: int) -> None:
        self._source = source
        self._runs = runs
        self._starts = [run.logical for run in runs]
        self._block_bytes = block_bytes
        self.blocks = runs[-1].logical + runs[-1].blocks if runs else 0

    def locate(self, block: int) -> tuple[int, int]:
        """Physical block, and how many from there on lie together."""
        index = bisect_right(self._starts, block) - 1
        if index >= 0:
            run = self._runs[index]
            inside = block - run.logical
            if inside < run.blocks:
                return run.physical + inside, run.blocks - inside
        raise GuestDamaged(f"ext: block {block} of the journal is not mapped")

    def read(self, block: int, count: int = 1) -> bytes:
        parts = []
        while count:
            physical, together = self.locate(block)
            take = min(together, count)
            offset, length = physical * self._block_bytes, take * self._block_bytes
            if offset + length > self._source.size_bytes:
                raise GuestDamaged(f"ext: block {block} of the journal lies behind the volume's end")
            parts.append(self._source.read_at(offset, length))
            block += take
            count -= take
        return b"".join(parts)


def _superblock(journal: _Journal, block_bytes: int) -> _Log:
    raw = journal.read(0)
    magic, kind, _, size, blocks, first, sequence, start = struct.unpack_from(">8I", raw, 0)
    if magic != MAGIC or kind not in (_SUPERBLOCK_V1, _SUPERBLOCK_V2):
        raise GuestDamaged("ext: the journal has no superblock")
    compat = incompat = 0
    if kind == _SUPERBLOCK_V2:
        compat, incompat = struct.unpack_from(">II", raw, 0x24)
    if unknown := incompat & ~_KNOWN:
        raise GuestUnsupported(f"the journal has unknown features {unknown:#x}")
    if incompat & (_CSUM_V2 | _CSUM_V3):
        if raw[0x50] != _CRC32C:
            raise GuestUnsupported(f"the journal has checksums of type {raw[0x50]}")
        bare = raw[:0xFC] + bytes(4) + raw[0x100:0x400]
        if crc32c(bare) ^ _ONES != struct.unpack_from(">I", raw, 0xFC)[0]:
            raise GuestDamaged("ext: the checksum of the journal's superblock does not match")
    last = blocks
    if incompat & _FAST_COMMIT:
        fast = struct.unpack_from(">I", raw, 0x54)[0] or _FAST_COMMIT_BLOCKS
        if blocks - fast >= _LOG_BLOCKS_MIN:
            last = blocks - fast
    if (
        size != block_bytes
        or not 0 < first < last
        or blocks > journal.blocks
        or not (start == 0 or first <= start < last)
    ):
        raise GuestDamaged(f"ext: a journal of {blocks} blocks of {size} bytes, log {first}..{last} from {start}")
    seed = crc32c(raw[0x30:0x40]) ^ _ONES
    return _Log(block_bytes, first, last, blocks, start, sequence, compat, incompat, seed)


class _Walk:
    """One pass over the log. Copies count once their transaction's commit block is found to be right."""

    def __init__(self, journal: _Journal, log: _Log) -> None:
        self._journal = journal
        self._log = log
        self._sealed = bool(log.incompat & (_CSUM_V2 | _CSUM_V3))
        self._at = log.start
        self._left = log.last - log.first
        self._copies: dict[int, Copy] = {}
        self._revoked: set[int] = set()
        self._crc32 = _ONES
        self.sequence = log.sequence
        self.copies: dict[int, Copy] = {}
        self.transactions = 0
        self.trouble = ""

    def run(self) -> None:
        """Fills in what is public."""
        try:
            while self._left > 0 and self._step():
                pass
        except _BadTransaction as error:
            self.trouble = f"its journal is damaged in transaction {self.sequence}: {error}"

    def _step(self) -> bool:
        block = self._take(1)
        magic, kind, sequence = struct.unpack_from(">III", block, 0)
        if magic != MAGIC or sequence != self.sequence:
            return False
        if kind == _DESCRIPTOR:
            self._descriptor(block)
        elif kind == _REVOKE:
            self._revoke(block)
        elif kind == _COMMIT:
            self._commit(block)
        else:
            return False
        return True

    def _take(self, count: int) -> bytes:
        """The next blocks of the log, which wraps."""
        parts = []
        self._left -= count
        if self._left < 0:
            raise _BadTransaction("it is longer than the log")
        while count:
            run = min(count, self._log.last - self._at)
            parts.append(self._journal.read(self._at, run))
            count -= run
            self._at += run
            if self._at == self._log.last:
                self._at = self._log.first
        return b"".join(parts)

    def _check_tail(self, block: bytes, what: str) -> None:
        if self._sealed:
            found = struct.unpack_from(">I", block, len(block) - _TAIL_BYTES)[0]
            if self._register(block[:-_TAIL_BYTES] + bytes(_TAIL_BYTES)) != found:
                raise _BadTransaction(f"the checksum of {what} does not match")

    def _register(self, data: bytes) -> int:
        return crc32c(data, self._log.seed ^ _ONES) ^ _ONES

    def _descriptor(self, block: bytes) -> None:
        self._check_tail(block, "a descriptor block")
        if self._log.compat & _COMPAT_CHECKSUM:
            self._crc32 = _crc32_be(block, self._crc32)
        tags = _tags(block, self._log.incompat)
        if len(self._copies) + len(self.copies) + len(tags) > _COPIES_MAX:
            raise GuestUnsupported(f"the journal holds more than {_COPIES_MAX} blocks")
        for start in range(0, len(tags), _BATCH):
            batch = tags[start : start + _BATCH]
            at = self._at
            data = self._take(len(batch))
            self._check_data(batch, data)
            for index, tag in enumerate(batch):
                place = at + index
                if place >= self._log.last:
                    place -= self._log.last - self._log.first
                self._copies[tag.block] = Copy(self._journal.locate(place)[0], tag.escaped)

    def _check_data(self, tags: list[_Tag], data: bytes) -> None:
        if self._log.compat & _COMPAT_CHECKSUM:
            self._crc32 = _crc32_be(data, self._crc32)
        if not self._sealed:
            return
        start = self._register(struct.pack(">I", self.sequence)) ^ _ONES
        rows = np.frombuffer(data, np.uint8).reshape(len(tags), -1).copy()
        # A register before the first byte is the same as its bytes added to the first four.
        rows[:, :4] ^= np.frombuffer(start.to_bytes(4, "little"), np.uint8)
        mask = _ONES if self._log.incompat & _CSUM_V3 else 0xFFFF
        for tag, found in zip(tags, crc32c_rows(rows).tolist(), strict=True):
            if tag.checksum != (found ^ _ONES) & mask:
                raise _BadTransaction(f"the checksum of what belongs to block {tag.block} does not match")

    def _revoke(self, block: bytes) -> None:
        self._check_tail(block, "a revoke block")
        used = struct.unpack_from(">I", block, 12)[0]
        if not 16 <= used <= len(block) - (_TAIL_BYTES if self._sealed else 0):
            raise _BadTransaction(f"a revoke block uses {used} bytes")
        width, code = (8, "Q") if self._log.incompat & _64BIT else (4, "I")
        self._revoked.update(struct.unpack_from(f">{(used - 16) // width}{code}", block, 16))
        if len(self._revoked) > _COPIES_MAX:
            raise GuestUnsupported(f"the journal revokes more than {_COPIES_MAX} blocks at once")

    def _commit(self, block: bytes) -> None:
        kind, size = block[12], block[13]
        found = struct.unpack_from(">I", block, 16)[0]
        if self._sealed:
            if self._register(block[:16] + bytes(4) + block[20:]) != found:
                raise _BadTransaction("the checksum of its commit block does not match")
        elif self._log.compat & _COMPAT_CHECKSUM:
            # Type 1 is CRC32; all zeros were written by systems that did not sum up (jbd2/recovery.c, "do_one_pass").
            if (kind, size, found) not in ((1, 4, self._crc32), (0, 0, 0)):
                raise _BadTransaction("its checksum does not match")
            self._crc32 = _ONES
        self.copies.update(self._copies)
        for revoked in self._revoked:
            self.copies.pop(revoked, None)
        self._copies.clear()
        self._revoked.clear()
        self.transactions += 1
        self.sequence = (self.sequence + 1) & _ONES


class _Tag(NamedTuple):
    block: int
    escaped: bool
    checksum: int


def _tags(block: bytes, incompat: int) -> list[_Tag]:
    """What a descriptor block says of the blocks that follow it."""
    third = bool(incompat & _CSUM_V3)
    wide = third or bool(incompat & _64BIT)
    # journal_tag_bytes: version 2 grew by two bytes that nothing uses.
    width = 16 if third else 8 + (4 if wide else 0) + (2 if incompat & _CSUM_V2 else 0)
    end = len(block) - (_TAIL_BYTES if incompat & (_CSUM_V2 | _CSUM_V3) else 0)
    at, tags = 12, []
    while at + width <= end:
        if third:
            low, flags, high, checksum = struct.unpack_from(">IIII", block, at)
        else:
            low, checksum, flags = struct.unpack_from(">IHH", block, at)
            high = struct.unpack_from(">I", block, at + 8)[0] if wide else 0
        wide_number = low | (high << 32 if incompat & _64BIT else 0)
        tags.append(_Tag(wide_number, bool(flags & _TAG_ESCAPED), checksum))
        at += width + (0 if flags & _TAG_SAME_UUID else 16)
        if flags & _TAG_LAST:
            break
    return tags


_REVERSED: Final = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _crc32_be(data: bytes, register: int) -> int:
    """CRC-32 with the highest bit first, which zlib's is on mirrored bytes."""
    mirrored = int(f"{register:032b}"[::-1], 2)
    result = zlib.crc32(data.translate(_REVERSED), mirrored ^ _ONES) ^ _ONES
    return int(f"{result:032b}"[::-1], 2)


def _has_fast_commits(journal: _Journal, log: _Log, sequence: int) -> bool:
    """Whether a complete fast commit follows the last transaction.

    Their area holds records: tag, length, value. The first is a head with the transaction they follow; each commit
    ends with a tail whose checksum covers it. Older ones are left lying there.
    """
    if log.last >= log.end:
        return False
    register = 0
    # The kernel leaves the first block behind the log unused (j_fc_first).
    for block in range(log.last + 1, log.end):
        raw = journal.read(block)
        at = 0
        while at + 4 <= len(raw):
            tag, length = struct.unpack_from("<HH", raw, at)
            value = raw[at + 4 : at + 4 + length]
            if len(value) < length or (block == log.last + 1 and at == 0 and tag != _FC_HEAD):
                return False
            if tag == _FC_HEAD and (length < 8 or struct.unpack_from("<I", value, 4)[0] != sequence):
                return False
            if tag == _FC_TAIL:
                covered = crc32c(raw[at : at + 8], register ^ _ONES) ^ _ONES
                return length >= 8 and struct.unpack_from("<II", value) == (sequence, covered)
            register = crc32c(raw[at : at + 4 + length], register ^ _ONES) ^ _ONES
            at += 4 + length
    return False
