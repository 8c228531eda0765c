"""Sources made of other sources: parts, chains, stripes, copies, and what is not there.

Owns how bytes of a made-up device lie on those below it. All but Kept are stateless, so as concurrent as what they
stand on; a read outside 0..``size_bytes`` and one of bytes that are missing raise GuestDamaged, never zeros.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from xbfs_engine.core.errors import GuestDamaged, XbfsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.formats.source import BlockSource


class Derived(ABC):
    """A BlockSource that checks the range of every read before it is done."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes

    @property
    def size_bytes(self) -> int:
        """Size of what can be read."""
        return self._size_bytes

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes; GuestDamaged if the range is not within the size or bytes are missing."""
        if offset < 0 or length < 0 or offset + length > self._size_bytes:
            raise GuestDamaged(
                f"bytes {offset} to {offset + length} were asked of a device of {self._size_bytes} bytes"
            )
        return self._read(offset, length) if length else b""

    @abstractmethod
    def _read(self, offset: int, length: int) -> bytes: ...


class Slice(Derived):
    """``size_bytes`` of a source from ``start``; the range must lie within the source."""

    def __init__(self, source: BlockSource, start: int, size_bytes: int) -> None:
        super().__init__(size_bytes)
        if start < 0 or size_bytes < 0 or start + size_bytes > source.size_bytes:
            raise GuestDamaged(f"{size_bytes} bytes at {start} are claimed on a device of {source.size_bytes} bytes")
        self._source = source
        self._start = start

    def _read(self, offset: int, length: int) -> bytes:
        return self._source.read_at(self._start + offset, length)


class Missing(Derived):
    """A device that should be there; every read tells why it is not."""

    def __init__(self, size_bytes: int, reason: str) -> None:
        super().__init__(size_bytes)
        self.reason = reason

    def _read(self, offset: int, length: int) -> bytes:
        raise GuestDamaged(self.reason)


class Zeros(Derived):
    """A device of zeros, as the guest itself has declared it."""

    def _read(self, offset: int, length: int) -> bytes:
        return bytes(length)


class Chain(Derived):
    """Sources one after the other."""

    def __init__(self, parts: Sequence[BlockSource]) -> None:
        self._parts = parts
        self._ends: list[int] = []
        end = 0
        for part in parts:
            end += part.size_bytes
            self._ends.append(end)
        super().__init__(end)

    def _read(self, offset: int, length: int) -> bytes:
        pieces = []
        while length:
            index = bisect_right(self._ends, offset)
            end = self._ends[index]
            part = self._parts[index]
            take = min(length, end - offset)
            pieces.append(part.read_at(offset - (end - part.size_bytes), take))
            offset += take
            length -= take
        return b"".join(pieces)


class Stripes(Derived):
    """Chunks of ``chunk_bytes`` from each source in turn, beginning with number ``first``.

    All sources are of one size, a multiple of the chunk.
    """

    def __init__(self, members: Sequence[BlockSource], chunk_bytes: int, first: int = 0) -> None:
        super().__init__(sum(member.size_bytes for member in members))
        self._members = members
        self._chunk_bytes = chunk_bytes
        self._first = first

    def _read(self, offset: int, length: int) -> bytes:
        pieces = []
        while length:
            chunk, inside = divmod(offset, self._chunk_bytes)
            row, turn = divmod(chunk, len(self._members))
            take = min(length, self._chunk_bytes - inside)
            member = self._members[(turn + self._first) % len(self._members)]
            pieces.append(member.read_at(row * self._chunk_bytes + inside, take))
            offset += take
            length -= take
        return b"".join(pieces)


class Copies(Derived):
    """The same bytes more than once: the first copy is read, the others only where it can not be."""

    def __init__(self, copies: Sequence[BlockSource]) -> None:
        super().__init__(min(copy.size_bytes for copy in copies))
        self._copies = copies

    def _read(self, offset: int, length: int) -> bytes:
        return read_first([(copy, offset) for copy in self._copies], length)


def read_first(places: Sequence[tuple[BlockSource, int]], length: int) -> bytes:
    """``length`` bytes from the first place that gives them; if none does, the first one's error."""
    first: XbfsError | None = None
    for source, offset in places:
        try:
            return source.read_at(offset, length)
        except XbfsError as error:
            first = first or error
    raise first or GuestDamaged("no copy of the data is there")


class Kept(Derived):
    """A source of which the last pieces that were read are kept, because each costs as much as many times its size.

    For one thread at a time. Reads of ``piece_bytes`` and more go through.
    """

    def __init__(self, source: BlockSource, piece_bytes: int, pieces_max: int) -> None:
        super().__init__(source.size_bytes)
        self._source = source
        self._piece_bytes = piece_bytes
        self._pieces_max = pieces_max
        self._pieces: OrderedDict[int, bytes] = OrderedDict()

    def _read(self, offset: int, length: int) -> bytes:
        if length >= self._piece_bytes:
            return self._source.read_at(offset, length)
        first, skip = divmod(offset, self._piece_bytes)
        last = (offset + length - 1) // self._piece_bytes
        return b"".join(self._piece(number) for number in range(first, last + 1))[skip : skip + length]

    def _piece(self, number: int) -> bytes:
        piece = self._pieces.pop(number, None)
        if piece is None:
            start = number * self._piece_bytes
            piece = self._source.read_at(start, min(self._piece_bytes, self._size_bytes - start))
            if len(self._pieces) >= self._pieces_max:
                self._pieces.popitem(last=False)
        self._pieces[number] = piece
        return piece


class BadRange(NamedTuple):
    """Bytes of a member that it holds no valid copy of."""

    start: int
    length: int


class Except(Derived):
    """A source without the ranges that its owner has recorded as bad."""

    def __init__(self, source: BlockSource, bad: Sequence[BadRange], reason: str) -> None:
        super().__init__(source.size_bytes)
        self._source = source
        self._bad = bad
        self._reason = reason

    def _read(self, offset: int, length: int) -> bytes:
        for start, count in self._bad:
            if offset < start + count and start < offset + length:
                raise GuestDamaged(self._reason)
        return self._source.read_at(offset, length)
