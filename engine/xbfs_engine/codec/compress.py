"""Encodings of chunks: zstd or raw. Pure; a Compressor belongs to one thread."""

from __future__ import annotations

from enum import IntEnum
from typing import Self, TypeAlias

import zstandard

from xbfs_engine.core.errors import FormatTooNew, IntegrityError

Buffer: TypeAlias = bytes | bytearray | memoryview

WORTH_IT = 0.97
"""Compressed chunks above this share of their size are stored raw: saves decoding for next to no space."""


class Encoding(IntEnum):
    """How a chunk's plaintext is stored. 2 is kept for page deltas."""

    RAW = 0
    ZSTD = 1

    @classmethod
    def known(cls, number: int, what: str) -> Self:
        """The encoding of that number, else FormatTooNew."""
        try:
            return cls(number)
        except ValueError:
            raise FormatTooNew(f"{what} uses encoding {number}, which this program does not know") from None


class Compressor:
    """zstd at one level, falling back to raw for what does not shrink."""

    def __init__(self, level: int) -> None:
        self._zstd = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)

    def encode(self, plaintext: Buffer) -> tuple[Encoding, Buffer]:
        """The encoding chosen and the bytes to seal (the plaintext itself when raw)."""
        compressed = self._zstd.compress(plaintext)
        if len(compressed) < WORTH_IT * memoryview(plaintext).nbytes:
            return Encoding.ZSTD, compressed
        return Encoding.RAW, plaintext


def decompress(
    encoding: Encoding,
    stored: Buffer,
    size_bytes: int,
    what: str,
    decompressor: zstandard.ZstdDecompressor | None = None,
) -> Buffer:
    """The plaintext of exactly ``size_bytes``. ``decompressor`` belongs to the calling thread.

    Never allocates more than ``size_bytes``. Raises IntegrityError.
    """
    if encoding is Encoding.RAW:
        plaintext = stored
    else:
        try:
            if zstandard.frame_content_size(stored) != size_bytes:
                raise IntegrityError(f"{what}: its compressed frame does not hold {size_bytes} bytes")
            plaintext = (decompressor or zstandard.ZstdDecompressor()).decompress(stored, max_output_size=size_bytes)
        except zstandard.ZstdError as exc:
            raise IntegrityError(f"{what} does not decompress") from exc
    if memoryview(plaintext).nbytes != size_bytes:
        raise IntegrityError(f"{what} has {memoryview(plaintext).nbytes} bytes instead of {size_bytes}")
    return plaintext
