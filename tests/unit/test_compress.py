"""Encodings of chunks: what is chosen, and what a damaged encoding can do."""

from __future__ import annotations

import pytest
import zstandard

from tests.support.runtime import SeededRandom
from xbfs_engine.codec.compress import Compressor, Encoding, decompress
from xbfs_engine.core.errors import FormatTooNew, IntegrityError

NOISE = SeededRandom(7).token(65536)
TEXT = b"restore point " * 4000


def test_what_shrinks_is_compressed_and_what_does_not_is_stored_as_it_is():
    encoding, stored = Compressor(3).encode(TEXT)
    assert encoding is Encoding.ZSTD
    assert len(stored) < len(TEXT) // 10
    assert zstandard.ZstdDecompressor().decompress(bytes(stored)) == TEXT
    assert decompress(encoding, stored, len(TEXT), "it") == TEXT

    encoding, stored = Compressor(3).encode(NOISE)
    assert encoding is Encoding.RAW
    assert stored is NOISE
    assert decompress(encoding, stored, len(NOISE), "it") == NOISE


def test_little_gain_is_not_worth_decoding():
    nearly = NOISE[:64512] + bytes(1024)
    assert Compressor(3).encode(nearly)[0] is Encoding.RAW


@pytest.mark.parametrize("delta", [-1, 1])
@pytest.mark.parametrize("plain", [TEXT, NOISE])
def test_a_size_that_is_not_the_plaintexts_is_refused(plain: bytes, delta: int):
    encoding, stored = Compressor(3).encode(plain)
    with pytest.raises(IntegrityError, match=r"^it"):
        decompress(encoding, stored, len(plain) + delta, "it")


def test_a_bomb_is_refused_by_its_size_before_it_is_unpacked():
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    assert len(bomb) < 8192
    with pytest.raises(IntegrityError, match="does not hold 65536"):
        decompress(Encoding.ZSTD, bomb, 65536, "it")


def test_a_frame_that_does_not_tell_its_size_is_refused():
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(TEXT)
    with pytest.raises(IntegrityError):
        decompress(Encoding.ZSTD, frame, len(TEXT), "it")


def test_a_cut_frame_is_refused():
    stored = bytes(Compressor(3).encode(TEXT)[1])
    for size in (0, 1, 4, 12, len(stored) - 1):
        with pytest.raises(IntegrityError):
            decompress(Encoding.ZSTD, stored[:size], len(TEXT), "it")


def test_an_unknown_encoding_is_too_new():
    assert Encoding.known(1, "it") is Encoding.ZSTD
    with pytest.raises(FormatTooNew, match="it uses encoding 2"):
        Encoding.known(2, "it")
