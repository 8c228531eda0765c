"""Block sources for tests of guest readers: a file, bytes in memory that tests damage, and a packed form to keep."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Self

import zstandard

from xbfs_engine.core.errors import SourceUnreadable

if TYPE_CHECKING:
    from pathlib import Path

CHUNK = 4096
RECORD = struct.Struct("<Q")


class FileSource:
    """An image file, closed at the end of ``with``; one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.size_bytes = os.fstat(self._file.fileno()).st_size
        self.bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read_at(self, offset: int, length: int) -> bytes:
        refuse_outside(self.size_bytes, offset, length)
        self.bytes_read += length
        return os.pread(self._file.fileno(), length, offset)


class SparseSource:
    """An image in memory as its chunks that are not zero; ``write_at`` changes it."""

    def __init__(self, size_bytes: int, chunks: dict[int, bytes]) -> None:
        self.size_bytes = size_bytes
        self.chunks = chunks
        self.bytes_read = 0

    @classmethod
    def of_file(cls, path: Path) -> SparseSource:
        size = path.stat().st_size
        chunks: dict[int, bytes] = {}
        with path.open("rb") as file:
            at = 0
            while at < size:
                try:
                    at = os.lseek(file.fileno(), at, os.SEEK_DATA) // CHUNK * CHUNK
                except OSError:
                    break
                data = os.pread(file.fileno(), 1 << 20, at)
                for start in range(0, len(data), CHUNK):
                    if chunk := data[start : start + CHUNK].rstrip(b"\0"):
                        chunks[(at + start) // CHUNK] = chunk.ljust(CHUNK, b"\0")
                at += len(data)
        return cls(size, chunks)

    @classmethod
    def unpack(cls, packed: bytes) -> SparseSource:
        data = zstandard.ZstdDecompressor().decompress(packed)
        count = RECORD.unpack_from(data, 8)[0]
        numbers = struct.unpack_from(f"<{count}Q", data, 16)
        start = 16 + 8 * count
        chunks = {number: data[start + i * CHUNK : start + (i + 1) * CHUNK] for i, number in enumerate(numbers)}
        return cls(RECORD.unpack_from(data)[0], chunks)

    def pack(self) -> bytes:
        numbers = sorted(self.chunks)
        parts = [RECORD.pack(self.size_bytes), RECORD.pack(len(numbers)), struct.pack(f"<{len(numbers)}Q", *numbers)]
        return zstandard.ZstdCompressor(level=19).compress(b"".join(parts + [self.chunks[n] for n in numbers]))

    def copy(self) -> SparseSource:
        return SparseSource(self.size_bytes, dict(self.chunks))

    def read_at(self, offset: int, length: int) -> bytes:
        refuse_outside(self.size_bytes, offset, length)
        self.bytes_read += length
        first, last = offset // CHUNK, (offset + length + CHUNK - 1) // CHUNK
        data = b"".join(self.chunks.get(number, bytes(CHUNK)) for number in range(first, last))
        return data[offset - first * CHUNK :][:length]

    def write_at(self, offset: int, data: bytes) -> None:
        at = 0
        while at < len(data):
            number, inside = divmod(offset + at, CHUNK)
            piece = data[at : at + CHUNK - inside]
            old = self.chunks.get(number, bytes(CHUNK))
            self.chunks[number] = old[:inside] + piece + old[inside + len(piece) :]
            at += len(piece)


def refuse_outside(size_bytes: int, offset: int, length: int) -> None:
    if offset < 0 or length < 0 or offset + length > size_bytes:
        raise SourceUnreadable(f"{length} bytes at {offset} are outside of {size_bytes}")
