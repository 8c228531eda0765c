"""A disk whose power goes: files with what programs see, what is durable, and the operations between the two.

The parts of a model, for tests of the overlay; one thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random  # noqa: TID251 - seeded by the test
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

SECTOR = 512


class PowerCut(BaseException):
    """The machine is off."""


@dataclass
class Power:
    """Goes out before the operation after next of ``left``; never if that is None."""

    left: int | None = None

    def use(self) -> None:
        if self.left is not None:
            if self.left == 0:
                raise PowerCut
            self.left -= 1


@dataclass
class ModelFile:
    """A StateFile whose operations are volatile until it is synced."""

    power: Power
    durable: bytes = b""
    content: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, int, bytes | None]] = field(default_factory=list)
    """(offset, length, bytes) of a write or a punched hole; (size, -1, None) of a truncation."""
    makes_holes: bool = True
    forgets: bool = False
    """Whether a sync does nothing: a disk that lies."""
    tears: float = 0.0
    """How likely a sector that is written while the power goes is neither old nor new."""
    during_sync: Callable[[], None] = lambda: None
    """What the guest does while the disk is busy."""

    def read_at(self, offset: int, length: int) -> bytes:
        return bytes(self.content[offset : offset + length])

    def read_now(self, offset: int, length: int) -> bytes | None:
        return None

    def write_at(self, offset: int, buffers: Sequence[Buffer]) -> None:
        # A long write is not one operation to a disk.
        for at, piece in pieces(offset, b"".join(buffers)):
            self._do((at, len(piece), piece))

    def punch(self, offset: int, length: int) -> bool:
        length = min(length, len(self.content) - offset)
        if length > 0 and self.makes_holes:
            self._do((offset, length, bytes(length)))
        return self.makes_holes

    def room(self) -> tuple[int, int]:
        return 1 << 40, 1 << 40

    def fileno(self) -> int:
        return -1

    def reserve(self, offset: int, length: int) -> None:
        self._do((max(offset + length, len(self.content)), -1, None))

    def truncate(self, size_bytes: int) -> None:
        self._do((size_bytes, -1, None))

    def size(self) -> int:
        return len(self.content)

    def next_data(self, offset: int) -> int | None:
        rest = bytes(self.content[offset:])
        return offset + len(rest) - len(rest.lstrip(b"\0")) if rest.strip(b"\0") else None

    def sync(self) -> None:
        self.power.use()
        if self.forgets:
            return
        content, self.pending = bytes(self.content), []
        self.during_sync()
        self.durable = content

    def unnamed(self) -> ModelFile:
        # Never synced and never opened again: its operations need no power.
        return ModelFile(Power())

    def close(self) -> None:
        pass

    def _do(self, operation: tuple[int, int, bytes | None]) -> None:
        self.power.use()
        self.pending.append(operation)
        apply(self.content, operation)

    def cut(self, chance: random.Random, kept: float) -> None:
        """What the disk has when it is on again: each pending piece with probability ``kept``, in order."""
        content = bytearray(self.durable)
        for offset, length, data in self.pending:
            if data is None:
                if chance.random() < kept:
                    apply(content, (offset, length, data))
                continue
            for at, piece in pieces(offset, data):
                if chance.random() < kept:
                    torn = chance.random() < self.tears
                    apply(content, (at, len(piece), chance.randbytes(len(piece)) if torn else piece))
        self.content, self.durable, self.pending = content, bytes(content), []


def pieces(offset: int, data: bytes) -> list[tuple[int, bytes]]:
    """``data`` by the sectors it lies in."""
    edges = [offset, *range(offset // SECTOR * SECTOR + SECTOR, offset + len(data), SECTOR), offset + len(data)]
    return [(low, data[low - offset : high - offset]) for low, high in pairwise(edges)]


def apply(content: bytearray, operation: tuple[int, int, bytes | None]) -> None:
    offset, length, data = operation
    if data is None:
        del content[offset:]
        content.extend(bytes(offset - len(content)))
    else:
        content.extend(bytes(max(0, offset + length - len(content))))
        content[offset : offset + length] = data
