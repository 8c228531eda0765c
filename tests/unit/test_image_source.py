"""Local images as sources, on the real file system."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from xbfs_engine.core.errors import SourceChanged, SourceUnreadable
from xbfs_engine.core.limits import MIB
from xbfs_engine.source.image import ImageSource


def sparse(path: Path, size: int, pieces: dict[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in pieces.items():
            file.seek(offset)
            file.write(data)
    return path


def test_holes_are_not_in_the_extents(tmp_path: Path) -> None:
    source = ImageSource(sparse(tmp_path / "d", 64 * MIB + 77, {8 * MIB: b"x" * MIB, 64 * MIB: b"end"}))
    extents = list(source.data_extents())
    covered = sum(length for _, length in extents)
    assert any(at <= 8 * MIB and at + length >= 9 * MIB for at, length in extents)
    assert any(at <= 64 * MIB and at + length >= 64 * MIB + 3 for at, length in extents)
    assert covered < 4 * MIB, "a file system rounds, but does not read holes"
    assert all(at + length <= 64 * MIB + 77 for at, length in extents)
    source.close()


@pytest.mark.parametrize("size", [0, 1, MIB])
def test_a_file_of_holes_has_no_extents(tmp_path: Path, size: int) -> None:
    source = ImageSource(sparse(tmp_path / "d", size, {}))
    assert (source.size_bytes, list(source.data_extents())) == (size, [])
    source.close()


def test_reads_are_exact(tmp_path: Path) -> None:
    source = ImageSource(sparse(tmp_path / "d", 100, {10: b"abc"}))
    buffer = bytearray(b"?" * 5)
    source.read_into(9, memoryview(buffer))
    assert buffer == b"\0abc\0"
    source.close()


def test_a_disk_that_shrinks_is_noticed_while_reading(tmp_path: Path) -> None:
    path = sparse(tmp_path / "d", MIB, {0: b"x"})
    source = ImageSource(path)
    with path.open("r+b") as file:
        file.truncate(10)
    with pytest.raises(SourceChanged, match="ends at 10"):
        source.read_into(0, memoryview(bytearray(20)))
    with pytest.raises(SourceChanged):
        source.check_unchanged()
    source.close()


def test_a_disk_that_grows_is_noticed_at_the_end(tmp_path: Path) -> None:
    path = sparse(tmp_path / "d", MIB, {0: b"x"})
    source = ImageSource(path)
    source.check_unchanged()
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(SourceChanged):
        source.check_unchanged()
    source.close()


def test_what_can_not_be_opened_is_typed(tmp_path: Path) -> None:
    with pytest.raises(SourceUnreadable):
        ImageSource(tmp_path / "missing")
    with pytest.raises(SourceUnreadable):
        ImageSource(tmp_path)


def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SourceUnreadable):
        ImageSource(tmp_path / "fifo")


def test_a_device_is_read_like_a_file() -> None:
    devices = [path for path in Path("/dev").glob("loop[0-9]*") if stat.S_ISBLK(path.stat().st_mode)]
    if not devices or not os.access(devices[0], os.R_OK):
        pytest.skip("no block device here")
    source = ImageSource(devices[0])
    assert sum(length for _, length in source.data_extents()) == source.size_bytes
    source.close()
