"""What a parser sees of a disk: its size, and bytes at an offset. Between parsers and whatever holds the bytes."""

from __future__ import annotations

from typing import Protocol


class BlockSource(Protocol):
    """Bytes that never change while they are read. Who may call it concurrently is said by the implementation."""

    @property
    def size_bytes(self) -> int:
        """Size of what can be read."""
        ...

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``; a range that is not within 0..``size_bytes`` raises XbfsError."""
        ...
