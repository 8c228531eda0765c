"""A repository with two points of one VM, mounted once for all tests that only look."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.engine import CHUNK, LEAF, MemorySource, pattern
from tests.support.mounts import Mounted
from xbfs.fuse.mount import DataPlaneKind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 3 * LEAF + 5 * CHUNK + 777
FIRST = {0: pattern(1, 20 * CHUNK), LEAF + 7 * CHUNK: pattern(2, 30 * CHUNK), SIZE - 1000: pattern(3, 1000)}
CHANGED = (8 * CHUNK, 2 * CHUNK)


def content(pieces: dict[int, bytes]) -> bytes:
    whole = bytearray(SIZE)
    for offset, data in pieces.items():
        whole[offset : offset + len(data)] = data
    return bytes(whole)


OLD = content(FIRST)
NEW = OLD[: CHANGED[0]] + pattern(4, CHANGED[1]) + OLD[sum(CHANGED) :]


@pytest.fixture(scope="session", params=list(DataPlaneKind), ids=lambda kind: kind.value, autouse=True)
def data_plane(request: pytest.FixtureRequest) -> DataPlaneKind:
    """Every test here runs over both data planes."""
    kind: DataPlaneKind = request.param
    Mounted.data_plane = kind
    return kind


@pytest.fixture(scope="session")
def mounted(data_plane: DataPlaneKind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """Two points of the VM "vm": OLD, then NEW; disk 1 is empty but for its first chunk."""
    with make(tmp_path_factory.mktemp("mounted")) as mount:
        yield mount


def make(folder: Path, *, deadline_s: float = 30.0) -> Mounted:
    mount = Mounted(folder, deadline_s=deadline_s)
    second = MemorySource(64 << 20, {0: pattern(5)})
    mount.engine.backup(MemorySource(SIZE, FIRST), second)
    mount.engine.clock.advance(100)
    mount.engine.backup(NEW, second, changed=[CHANGED])
    return mount


@pytest.fixture
def mounted_alone(tmp_path: Path) -> Iterator[Mounted]:
    """The same, for one test that changes it."""
    with make(tmp_path) as mount:
        yield mount
