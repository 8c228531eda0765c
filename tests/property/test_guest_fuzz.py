"""Hostile volumes: whatever ext, btrfs, NTFS, FAT and exFAT hold, only XbfsError is raised, and all calls end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import guest_golden, guest_walk

if TYPE_CHECKING:
    from tests.support.guest_sources import SparseSource

NODES_MAX, ENTRIES_MAX = 250, 700
SOURCE_BYTES_MAX = 600 << 20
VALUES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([bytes([value]) * size for value in (0, 1, 0x7F, 0x80, 0xFF) for size in (1, 2, 4, 8)]),
)
CHANGES = st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 4095), VALUES), min_size=1, max_size=25)


@pytest.mark.parametrize("name", guest_golden.NAMES)
@settings(max_examples=25, suppress_health_check=list(HealthCheck), deadline=None)
@given(changes=CHANGES)
def test_changed_volumes(name: str, changes: list[tuple[int, int, bytes]]) -> None:
    source = guest_golden.image(name)
    places = sorted(source.chunks)
    for where, at, value in changes:
        # Half of the changes hit the first blocks, where what all depends on is.
        number = places[where % len(places)] if where & 1 else places[where % min(12, len(places))]
        source.write_at(number * 4096 + min(at, 4096 - len(value)), value)
        guest_golden.seal(name, source, number)
    walk(name, source)


@pytest.mark.parametrize("name", guest_golden.NAMES)
def test_volumes_that_end_early(name: str) -> None:
    whole = guest_golden.image(name)
    for size in (0, 511, 512, 2048, 65_536 + 4096, whole.size_bytes // 3, whole.size_bytes - 512):
        source = guest_golden.image(name)
        source.size_bytes = size
        walk(name, source)


def walk(name: str, source: SparseSource) -> None:
    guest_walk.walk(
        guest_golden.NAMES[name], source, nodes=NODES_MAX, entries=ENTRIES_MAX, read_bytes_max=SOURCE_BYTES_MAX
    )
