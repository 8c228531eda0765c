"""An overlay on a disk that is full, fails or was tampered with: typed errors, and the acknowledged bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import CHUNK, MemoryDisk
from tests.support.overlays import faulty
from xbfs.view.overlay import create_overlay, open_overlay
from xbfs.view.overlay.header import Header, encode
from xbfs_engine.core.errors import (
    BlobNotFound,
    ChunkCorrupt,
    FormatTooNew,
    IntegrityError,
    OverlayInUse,
    StorageDenied,
    StorageError,
    StorageFull,
    TargetUnwritable,
    XbfsError,
)
from xbfs_engine.core.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


UNIT = 4096
BASE = MemoryDisk.full(4 * CHUNK)
CONTENT = BASE.read_at(0, BASE.size_bytes)


@pytest.mark.parametrize("file", ["data", "map"])
def test_after_a_failed_sync_nothing_is_written_until_the_overlay_is_opened_again(tmp_path: Path, file: str) -> None:
    with faulty(tmp_path / "o", BASE) as (overlay, fails):
        overlay.write_at(0, [b"flushed"])
        overlay.flush()
        overlay.write_at(UNIT, [b"lost?"])
        fails[file]["sync"] = StorageError("medium error")
        with pytest.raises(StorageError, match="medium error"):
            overlay.flush()
        # The kernel tells of a lost write once: the next sync would say that all is well.
        fails[file].clear()
        for deed in (
            lambda: overlay.write_at(0, [b"x"]),
            lambda: overlay.discard(0, UNIT),
            lambda: overlay.write_zeroes(0, UNIT),
            lambda: overlay.resize(UNIT),
            overlay.flush,
        ):
            with pytest.raises(StorageError, match="the overlay stopped: medium error"):
                deed()
        assert overlay.read_at(0, 7) == b"flushed"
        assert overlay.read_at(UNIT, 5) == b"lost?"
        overlay.close()
    with open_overlay(tmp_path / "o", BASE, identity=b"") as again:
        assert again.read_at(0, UNIT) == b"flushed" + CONTENT[7:UNIT]
        assert again.read_at(UNIT, 5) in (b"lost?", CONTENT[UNIT : UNIT + 5])
        again.write_at(0, [b"x"])


@pytest.mark.parametrize(("file", "method"), [("header", "write_at"), ("header", "sync"), ("map", "truncate")])
def test_a_shrink_that_fails_half_way_stops_the_overlay(tmp_path: Path, file: str, method: str) -> None:
    with faulty(tmp_path / "o", BASE) as (overlay, fails):
        overlay.write_at(3 * CHUNK, [b"x" * UNIT])
        overlay.flush()
        fails[file][method] = StorageError("medium error")
        with pytest.raises(StorageError, match="medium error"):
            overlay.resize(0)
        fails[file].clear()
        with pytest.raises(StorageError, match="stopped"):
            overlay.resize(BASE.size_bytes)
    with open_overlay(tmp_path / "o", BASE, identity=b"") as again:
        size = again.size_bytes
        assert again.read_at(0, size) in (b"", CONTENT[: 3 * CHUNK] + b"x" * UNIT + CONTENT[3 * CHUNK + UNIT :])
        again.resize(BASE.size_bytes)
        assert again.read_at(size, BASE.size_bytes) == bytes(BASE.size_bytes - size)


def test_a_full_disk_at_the_map_is_told_before_anything_is_acknowledged(tmp_path: Path) -> None:
    with faulty(tmp_path / "o", BASE) as (overlay, fails):
        fails["map"]["reserve"] = StorageFull("no room")
        for deed in (lambda: overlay.write_at(5, [b"x"]), lambda: overlay.discard(0, UNIT)):
            with pytest.raises(StorageFull):
                deed()
        assert overlay.read_at(0, BASE.size_bytes) == CONTENT
        fails["map"].clear()
        overlay.write_at(5, [b"x"])
        # A file system that does not keep its word about the room: the flush says so, and can be repeated.
        fails["map"]["write_at"] = StorageFull("no room")
        with pytest.raises(StorageFull):
            overlay.flush()
        overlay.write_at(6, [b"y"])
        fails["map"].clear()
        overlay.flush()
    with open_overlay(tmp_path / "o", BASE, identity=b"") as again:
        assert again.read_at(4, 4) == CONTENT[4:5] + b"xy" + CONTENT[7:8]


def test_a_write_that_fails_changes_no_unit_that_was_the_bases(tmp_path: Path) -> None:
    with faulty(tmp_path / "o", BASE) as (overlay, fails):
        fails["data"]["write_at"] = StorageError("medium error")
        with pytest.raises(StorageError):
            overlay.write_at(10, [b"x" * 2 * UNIT])
        fails["data"].clear()
        assert overlay.read_at(0, BASE.size_bytes) == CONTENT
        overlay.write_at(10, [b"y"])
        fails["data"]["read_at"] = StorageError("medium error")
        with pytest.raises(StorageError):
            overlay.read_at(0, CHUNK)
        assert overlay.read_at(UNIT, CHUNK) == CONTENT[UNIT : UNIT + CHUNK]


class BrokenDisk(MemoryDisk):
    """Its second chunk can not be read."""

    def parts_at(self, offset: int, length: int) -> list[bytes]:
        if offset < 2 * CHUNK and offset + length > CHUNK:
            raise ChunkCorrupt("byte 65536 of the disk: not what was written")
        return super().parts_at(offset, length)


def test_errors_of_the_base_pass_through_and_never_become_zeros(tmp_path: Path) -> None:
    base = BrokenDisk.full(BASE.size_bytes)
    with create_overlay(tmp_path / "o", base, identity=b"") as overlay:
        for deed in (
            lambda: overlay.read_at(0, CHUNK + 1),
            lambda: overlay.write_at(CHUNK + 1, [b"x"]),
            lambda: overlay.write_at(CHUNK + 1, [b"x" * (UNIT - 1)]),
            lambda: overlay.write_at(CHUNK, [b"x" * (UNIT + 1)]),
            lambda: overlay.discard(CHUNK + 1, 2 * UNIT),
        ):
            with pytest.raises(ChunkCorrupt):
                deed()
        assert overlay.dirty_bytes == 0
        # What is written whole needs nothing of the base: a guest can mend the disk.
        overlay.write_at(CHUNK, [b"x" * UNIT])
        overlay.discard(CHUNK + UNIT, CHUNK - UNIT)
        assert overlay.read_at(CHUNK - 1, UNIT + 2) == CONTENT[CHUNK - 1 : CHUNK] + b"x" * UNIT + b"\0"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "x", place], check=False).returncode:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_guest_fills_the_disk(small_disk: Path) -> None:
    """Every acknowledged write is there after the flush and after opening again; with room there are more."""
    base = MemoryDisk.full(64 * MIB + 20 * CHUNK)
    written: dict[int, bytes] = {}
    with create_overlay(small_disk / "o", base, identity=b"") as overlay:

        def fill() -> None:
            for number in range(2000):
                offset = (number * 37 % 40) * CHUNK + number % 16 * UNIT + 512 if number % 5 else number * 7 * UNIT
                overlay.write_at(offset, [bytes([number % 255 + 1]) * 1024])
                written[offset] = bytes([number % 255 + 1]) * 1024

        with pytest.raises(StorageFull, match="No space left on device"):
            fill()
        assert len(written) > 50
        overlay.flush()
        with pytest.raises(StorageFull):
            overlay.write_at(60 * MIB, [b"x" * 2 * MIB])
        assert overlay.read_at(60 * MIB, 2 * MIB) == base.read_at(60 * MIB, 2 * MIB)
        first = next(iter(written))
        overlay.discard(first // UNIT * UNIT, UNIT)
        overlay.write_at(first, [written[first]])
    with open_overlay(small_disk / "o", base, identity=b"") as again:
        for offset, data in written.items():
            assert again.read_at(offset, len(data)) == data


LIMITED = """
import resource, sys
from pathlib import Path
from tests.support.disks import CHUNK, MemoryDisk
from tests.support.overlays import faulty
from xbfs.view.overlay import create_overlay
from xbfs_engine.core.errors import StorageFull

resource.setrlimit(resource.RLIMIT_FSIZE, (2 * CHUNK, 2 * CHUNK))
for chunks in (3, 1):
    try:
        overlay = create_overlay(Path(sys.argv[1]) / str(chunks), MemoryDisk.full(chunks * CHUNK), identity=b"")
    except StorageFull:
        assert chunks == 3
try:
    overlay.resize(3 * CHUNK)
except StorageFull:
    overlay.resize(2 * CHUNK)
    overlay.write_at(2 * CHUNK - 5, [b"there"])
    overlay.close()
    sys.exit(7)
"""


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], env=environment, capture_output=True, check=False)
    assert done.returncode == 7, done.stderr
    with open_overlay(tmp_path / "1", MemoryDisk.full(CHUNK), identity=b"") as overlay:
        assert overlay.read_at(2 * CHUNK - 6, 10) == b"\0there"


LOCKER = """
import sys
from pathlib import Path
from tests.support.disks import CHUNK, MemoryDisk
from tests.support.overlays import faulty
from xbfs.view.overlay import open_overlay
open_overlay(Path(sys.argv[1]), MemoryDisk.full(4 * CHUNK), identity=b"")
"""


def test_an_overlay_is_open_once(tmp_path: Path) -> None:
    with create_overlay(tmp_path / "o", BASE, identity=b"") as overlay:
        for again in (open_overlay, create_overlay):
            with pytest.raises(OverlayInUse, match="in use"):
                again(tmp_path / "o", BASE, identity=b"")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
        command = [sys.executable, "-c", LOCKER, tmp_path / "o"]
        other = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert b"OverlayInUse" in other.stderr
        overlay.write_at(0, [b"still mine"])
    open_overlay(tmp_path / "o", BASE, identity=b"").close()


def damaged(place: Path, name: str, offset: int, data: bytes) -> None:
    with (place / name).open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    with create_overlay(tmp_path / "o", BASE, identity=b"id") as overlay:
        overlay.write_at(0, [b"x" * UNIT])
    return tmp_path / "o"


def test_one_damaged_copy_of_the_header_is_mended(closed: Path) -> None:
    whole = (closed / "header").read_bytes()
    for offset in (0, 8, 30, 100, 511, 4096, 4600):
        damaged(closed, "header", offset, bytes([whole[offset] ^ 4]))
        open_overlay(closed, BASE, identity=b"id").close()
        assert (closed / "header").read_bytes() == whole


def test_damage_of_both_copies_is_told(closed: Path) -> None:
    for at in (0, 4096):
        damaged(closed, "header", at + 20, b"damage")
    with pytest.raises(IntegrityError, match="both copies"):
        open_overlay(closed, BASE, identity=b"id")
    damaged(closed, "header", 0, bytes(4608))
    with pytest.raises(IntegrityError, match="blank"):
        open_overlay(closed, BASE, identity=b"id")


def test_a_newer_version_is_not_guessed_at(closed: Path) -> None:
    record = bytearray((closed / "header").read_bytes()[:480])
    struct.pack_into("<I", record, 8, 2)
    damaged(closed, "header", 4096, bytes(record) + hashlib.sha256(record).digest())
    with pytest.raises(FormatTooNew):
        open_overlay(closed, BASE, identity=b"id")


@pytest.mark.parametrize(
    "header",
    [
        Header(b"id", base_size=BASE.size_bytes, base_limit=BASE.size_bytes + 1, size=1 << 30),
        Header(b"id", base_size=BASE.size_bytes, base_limit=5, size=4),
        Header(b"id", base_size=BASE.size_bytes, base_limit=5, size=1 << 63),
        Header(b"id", base_size=BASE.size_bytes, base_limit=5, size=BASE.size_bytes, generation=0),
    ],
)
def test_headers_that_contradict_themselves(closed: Path, header: Header) -> None:
    for at in (0, 4096):
        damaged(closed, "header", at, encode(header))
    with pytest.raises(IntegrityError):
        open_overlay(closed, BASE, identity=b"id")


def test_lost_and_cut_files(closed: Path) -> None:
    os.truncate(closed / "data", BASE.size_bytes - 1)
    with pytest.raises(IntegrityError, match=re.escape(f"{BASE.size_bytes - 1} of {BASE.size_bytes} bytes")):
        open_overlay(closed, BASE, identity=b"id")
    (closed / "data").unlink()
    with pytest.raises(IntegrityError, match="not there"):
        open_overlay(closed, BASE, identity=b"id")
    (closed / "header").unlink()
    with pytest.raises(BlobNotFound):
        open_overlay(closed, BASE, identity=b"id")


def test_a_data_file_that_is_cut_under_an_open_overlay(tmp_path: Path) -> None:
    with create_overlay(tmp_path / "o", BASE, identity=b"") as overlay:
        overlay.write_at(CHUNK, [b"x" * UNIT])
        os.truncate(tmp_path / "o" / "data", CHUNK + 5)
        with pytest.raises(IntegrityError, match=f"ends at {CHUNK + 5}"):
            overlay.read_at(CHUNK, 10)


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, StorageFull), (errno.EDQUOT, StorageFull), (errno.EROFS, StorageDenied), (errno.EIO, StorageError)],
)
def test_what_the_file_system_says_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[XbfsError]
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with create_overlay(tmp_path / "o", BASE, identity=b"") as overlay:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", refuse)
            with pytest.raises(kind, match="data at 0"):
                overlay.write_at(0, [b"x" * UNIT])
        overlay.write_at(0, [b"x" * UNIT])


def test_places_where_no_overlay_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TargetUnwritable):
        create_overlay(tmp_path / "file", BASE, identity=b"")
    with pytest.raises(StorageError):
        create_overlay(tmp_path / "missing" / "o", BASE, identity=b"")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "header").symlink_to(tmp_path / "file")
    with pytest.raises(StorageError):
        create_overlay(tmp_path / "o", BASE, identity=b"")
