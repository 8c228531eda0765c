"""Hostile BitLocker volumes: fields, datums and key files overwritten, with checksums and even the sealed hash made
right again. Only typed errors come out, and what is shown lies within the device."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support import bitlocker_images as made
from tests.support.bitlocker_images import KIB, Recipe, pattern, startup_file, volume
from tests.support.volume_images import BytesSource, scan
from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported, XbfsError
from xbfs_engine.guestfs.volumes import VolumeKey, VolumeStatus
from xbfs_engine.guestfs.volumes.bitlocker import datums, find_bitlocker, unlock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.formats.source import BlockSource

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SPECIAL = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)
EDITS = st.lists(
    st.tuples(
        st.integers(0, 1 << 12), st.sampled_from((1, 2, 4, 8)), st.sampled_from(SPECIAL) | st.integers(0, 1 << 64)
    ),
    min_size=1,
    max_size=5,
)
PLACES = (64 * KIB, 128 * KIB, 192 * KIB)
RECIPES = {
    1: Recipe("elephant-128", version=1, protectors=("external", "tpm"), places=PLACES),
    2: Recipe(protectors=("tpm", "external", "clear"), places=PLACES, head_at=32 * KIB),
}
VOLUMES = {version: volume(recipe, pattern(256 * KIB)) for version, recipe in RECIPES.items()}
FILES = {1: startup_file(0), 2: startup_file(1)}


def edit(data: bytearray, edits: Sequence[tuple[int, int, int]], start: int, length: int) -> None:
    """Overwrite whole words within a range, aligned to two bytes, as datums are."""
    for at, size, value in edits:
        place = start + at % (length - size) // 2 * 2
        data[place : place + size] = (value % (1 << 8 * size)).to_bytes(size, "little")


def survives(data: bytes, secret: bytes) -> None:
    source = BytesSource(data)
    header = find_bitlocker(source)
    if header is not None and not header.problem:
        for key in (None, secret):
            try:
                plain = unlock(source, header, key)
            except (GuestDamaged, GuestUnsupported):
                continue
            if plain is not None:
                assert plain.size_bytes <= len(data)
                read(plain)
    for row in scan({0: data}, (VolumeKey(secret),)).volumes:
        assert row.source is not None or row.reason
        assert row.status is not VolumeStatus.LOCKED or "it opens with" in row.reason


def read(plain: BlockSource) -> None:
    for at in range(0, plain.size_bytes, 48 * KIB):
        length = min(1000, plain.size_bytes - at)
        assert len(plain.read_at(at, length)) == length
    with pytest.raises(XbfsError):
        plain.read_at(plain.size_bytes, 1)


@pytest.mark.parametrize("version", VOLUMES)
@given(edits=EDITS)
@SETTINGS
def test_any_boot_sector_gives_a_volume_or_a_reason(version: int, edits: list[tuple[int, int, int]]):
    data = bytearray(VOLUMES[version])
    edit(data, edits, 11, 501)
    survives(bytes(data), FILES[version])


@pytest.mark.parametrize("version", VOLUMES)
@given(edits=EDITS)
@example(edits=[(16, 8, 0)])
@example(edits=[(8, 2, 0xFFFF)])
@example(edits=[(64, 4, 0xFFFFFFFF)])
@SETTINGS
def test_any_metadata_with_right_checksums_give_a_volume_or_a_reason(version: int, edits: list[tuple[int, int, int]]):
    data = bytearray(VOLUMES[version])
    size = int.from_bytes(data[PLACES[0] + 8 : PLACES[0] + 10], "little") * (16 if version == 2 else 1)
    block = data[PLACES[0] : PLACES[0] + size]
    edit(block, edits, 8, size - 8)
    whole = made.validated(bytes(block), version)
    for place in PLACES:
        data[place : place + len(whole)] = whole
    survives(bytes(data), FILES[version])


@given(edits=EDITS)
@SETTINGS
def test_any_validation_is_checked(edits: list[tuple[int, int, int]]):
    data = bytearray(VOLUMES[2])
    size = int.from_bytes(data[PLACES[0] + 8 : PLACES[0] + 10], "little") * 16
    tail = data[PLACES[0] + size : PLACES[0] + size + 88]
    edit(tail, edits, 0, len(tail))
    tail[4:8] = zlib.crc32(data[PLACES[0] : PLACES[0] + size]).to_bytes(4, "little")
    for place in PLACES:
        data[place + size : place + size + len(tail)] = tail
    survives(bytes(data), FILES[2])


@given(edits=EDITS, length=st.integers(0, 4096))
@SETTINGS
def test_any_startup_key_file_opens_or_does_not(edits: list[tuple[int, int, int]], length: int):
    secret = bytearray(FILES[1])
    edit(secret, edits, 0, len(secret))
    for given_secret in (bytes(secret), bytes(secret)[:length], bytes(secret).ljust(length, b"\0")):
        survives(VOLUMES[1], given_secret)


@given(st.binary(max_size=200))
@SETTINGS
def test_datums_are_within_their_bytes(data: bytes):
    try:
        found = datums.datums(data)
    except GuestDamaged:
        return
    assert sum(len(datum.data) + 8 for datum in found) <= len(data)
    for datum in found:
        for parse in (datums.key, datums.sealed, datums.protector, datums.external_key):
            try:
                parse(datum)
            except GuestDamaged:
                continue


@given(st.integers(512, 256 * KIB))
@SETTINGS
def test_a_volume_cut_anywhere_gives_what_is_there_or_a_reason(length: int):
    survives(VOLUMES[2][:length], FILES[2])
