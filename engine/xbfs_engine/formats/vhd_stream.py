"""What a host's VHD stream says about allocation before any data comes: its footer, header and BAT.

A host streams a VHD as: footer at 0, header at 512, one empty sector, BAT at 2048, then the blocks (xen-api, vhd-tool
and ocaml-vhd). A block is missing from the BAT when no layer of the disk's chain has it, so the rest is zero. Pure: the
bytes come from a callable; whoever calls drops the stream afterwards. Values are immutable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from xbfs_engine.core.errors import SourceUnreadable
from xbfs_engine.core.limits import KIB
from xbfs_engine.formats.vhd_records import (
    FOOTER_SIZE,
    HEADER_SIZE,
    VhdType,
    parse_vhd_footer,
    parse_vhd_header,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ENTRY_SIZE: Final = 4
_UNUSED: Final = 0xFFFFFFFF
_GAP_MAX: Final = 64 * KIB
"""Bytes skipped before header and BAT: hosts leave one sector, blktap's locators take 1.5 KiB."""

_RUNS_AT_ONCE: Final = 4096
"""Runs that are Python objects at a time: half a million of them would take 100 MiB."""

_HINT: Final = "all of the disk is read instead"


@dataclass(frozen=True, slots=True)
class AllocatedBlocks:
    """Which VHD blocks are allocated: block i is bit 0x80 >> (i & 7) of byte i >> 3 of ``present``."""

    size_bytes: int
    block_size: int
    present: bytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the disk in allocated blocks."""
        return sum(length for _, length in self.extents())

    def extents(self) -> Iterator[tuple[int, int]]:
        """(offset, length) in bytes of the allocated runs: ascending, disjoint, within the disk."""
        bits = np.unpackbits(np.frombuffer(self.present, dtype=np.uint8))
        edges = np.flatnonzero(np.diff(bits, prepend=np.uint8(0), append=np.uint8(0))).reshape(-1, 2)
        for at in range(0, len(edges), _RUNS_AT_ONCE):
            for start, end in edges[at : at + _RUNS_AT_ONCE].tolist():
                offset = start * self.block_size
                yield offset, min(end * self.block_size, self.size_bytes) - offset


def allocated_blocks(read: Callable[[int], bytes], *, disk_size_bytes: int) -> AllocatedBlocks:
    """Read the head of a stream; ``read(n)`` gives its next n bytes, fewer only where it ends.

    Raises SourceUnreadable for a stream that is no VHD of a disk of this size, and whatever ``read`` raises. Reads at
    most 16 MiB and 128 KiB.
    """

    def exactly(size: int, what: str) -> bytes:
        data = read(size)
        if len(data) != size:
            raise SourceUnreadable(f"the host's VHD stream ends within its {what}", hint=_HINT)
        return data

    def skip(size: int, what: str) -> None:
        if not 0 <= size <= _GAP_MAX:
            raise SourceUnreadable(f"the host's VHD stream has {size} bytes before its {what}", hint=_HINT)
        if size:
            exactly(size, what)

    footer = parse_vhd_footer(exactly(FOOTER_SIZE, "footer"))
    if footer.disk_type != VhdType.DYNAMIC:
        raise SourceUnreadable(f"the host's VHD stream is {footer.disk_type.name}, not dynamic", hint=_HINT)
    if footer.size_bytes != disk_size_bytes:
        raise SourceUnreadable(
            f"the host's VHD stream is of {footer.size_bytes} bytes, the disk has {disk_size_bytes}", hint=_HINT
        )
    skip(footer.data_offset - FOOTER_SIZE, "header")
    header = parse_vhd_header(exactly(HEADER_SIZE, "header"), footer)
    skip(header.table_offset - footer.data_offset - HEADER_SIZE, "BAT")
    table = np.frombuffer(exactly(header.entries * _ENTRY_SIZE, "BAT"), dtype=">u4")
    blocks = -(-disk_size_bytes // header.block_size)
    present = np.packbits(table[:blocks] != _UNUSED).tobytes()
    return AllocatedBlocks(disk_size_bytes, header.block_size, present)
