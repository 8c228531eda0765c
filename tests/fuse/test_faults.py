"""What a reader of the mount meets when storage hangs, chunks are damaged or we have a bug: EIO, and nothing more."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.fuse.conftest import CHANGED, NEW, OLD, SIZE, make
from tests.support.engine import CHUNK, LEAF, pattern
from tests.support.mounts import Mounted, drop_page_cache
from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.store.pack import open_pack, pack_name

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs_engine.catalog.restore_point import RestorePoint

DEADLINE_S = 2.5


def place_of(mount: Mounted, point: RestorePoint, position: int) -> tuple[str, int]:
    """Blob name of the pack, and offset in it, of the chunk at a position of disk 0."""
    ref = mount.engine.block_map(point.disks[0]).chunk(position)
    assert ref is not None
    keys = mount.engine.repository.keys
    directory = open_pack(mount.engine.storage, keys, ObjectKind.DATA_PACK, ref.pack).directory
    return pack_name(ObjectKind.DATA_PACK, ref.pack), directory.offsets[ref.ordinal]


def read(path: Path, offset: int, length: int = 4096) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_hung_storage_is_eio_by_the_deadline_and_others_read_on(tmp_path: Path) -> None:
    mount = make(tmp_path, deadline_s=DEADLINE_S)
    _, new = mount.engine.points()
    hung, _ = place_of(mount, new, 0)
    healthy = next(p for p in range(LEAF // CHUNK + 7, LEAF // CHUNK + 37) if place_of(mount, new, p)[0] != hung)
    with mount:
        image = mount.disk.resolve()
        mount.hang(hung)
        failures: list[tuple[int, float]] = []

        def stuck() -> None:
            started = time.monotonic()
            try:
                read(image, 0)
            except OSError as exc:
                failures.append((exc.errno or 0, time.monotonic() - started))

        threads = [threading.Thread(target=stuck) for _ in range(12)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        slowest = 0.0
        until = time.monotonic() + DEADLINE_S - 1
        while time.monotonic() < until:
            drop_page_cache(image)
            started = time.monotonic()
            assert read(image, healthy * CHUNK) == NEW[healthy * CHUNK : healthy * CHUNK + 4096]
            slowest = max(slowest, time.monotonic() - started)
        for thread in threads:
            thread.join(DEADLINE_S + 5)
        assert [number for number, _ in failures] == [errno.EIO] * len(threads)
        assert max(took for _, took in failures) < 2 * DEADLINE_S + 1
        assert slowest < 1
        assert hung in json.loads((mount.directory / ".xbfs/status.json").read_text())["stalled_blobs"]
        mount.release()
        time.sleep(0.2)
        assert read(image, 0) == NEW[:4096], "the mount is well again once the storage is"


def test_a_storage_that_hangs_as_a_whole_still_lists_and_ends(tmp_path: Path) -> None:
    mount = make(tmp_path, deadline_s=1.0)
    with mount:
        mount.hang("*")
        for _ in range(3):
            with pytest.raises(OSError) as failure:
                read(mount.disk, 0)
            assert failure.value.errno == errno.EIO
        assert len(list(mount.vm.iterdir())) == 3
        started = time.monotonic()
        assert mount.signal(signal.SIGTERM) == 0
        assert time.monotonic() - started < 10
        assert not mount.is_mounted


def test_a_damaged_chunk_is_eio_and_one_line_in_the_log(tmp_path: Path) -> None:
    mount = make(tmp_path)
    _, new = mount.engine.points()
    position = 3
    name, offset = place_of(mount, new, position)
    flip(mount.storage / name, offset + 5)
    with mount:
        image = mount.disk.resolve()
        for path in (image, image.with_suffix(".vhd")):
            with pytest.raises(OSError) as failure:
                path.read_bytes()
            assert failure.value.errno == errno.EIO
        for offset in (position * CHUNK, (position + 1) * CHUNK - 4096):
            with pytest.raises(OSError):
                read(image, offset)
        for offset in ((position - 1) * CHUNK, (position + 1) * CHUNK, SIZE - 4096):
            assert read(image, offset) == NEW[offset : offset + 4096]
        assert (mount.vm / "2026-09-21T141320Z/disks/1.raw").read_bytes()[:CHUNK] == pattern(5)
        status = json.loads((mount.directory / ".xbfs/status.json").read_text())
        assert not status["healthy"]
    lines = [line for line in mount.log.read_text().splitlines() if "read failed" in line and "0.raw" in line]
    assert len(lines) == 1
    for fact in ("warning", new.id, "disk=0", f"byte {position * CHUNK} of the disk", name):
        assert fact in lines[0], fact


def test_a_damaged_manifest_is_shown_with_its_reason(tmp_path: Path) -> None:
    mount = make(tmp_path)
    old, _ = mount.engine.points()
    flip(mount.storage / "points" / old.id, 200)
    with mount:
        assert [path.name for path in mount.vm.iterdir()] == ["2026-09-21T141500Z", "latest"]
        text = (mount.directory / "by-id" / f"{old.id}.error.txt").read_text()
        assert old.id[:12] in text
        status = json.loads((mount.directory / ".xbfs/status.json").read_text())
        assert [damaged["id"] for damaged in status["damaged_points"]] == [old.id]
        assert mount.disk.read_bytes() == NEW


def test_a_lost_pack_is_eio_and_the_rest_is_read(tmp_path: Path) -> None:
    mount = make(tmp_path)
    _, new = mount.engine.points()
    name, _ = place_of(mount, new, CHANGED[0] // CHUNK)
    (mount.storage / name).unlink()
    with mount:
        with pytest.raises(OSError):
            mount.disk.read_bytes()
        assert (mount.vm / "2026-09-21T141320Z/disks/0.raw").read_bytes() == OLD


def test_a_bug_in_a_handler_does_not_end_the_mount(tmp_path: Path) -> None:
    mount = make(tmp_path)
    with mount, mount.disk.open("rb") as image:
        (mount.control / "raise").touch()
        with pytest.raises(OSError) as failure:
            list(mount.vm.iterdir())
        assert failure.value.errno == errno.EIO
        assert image.read() == NEW
        (mount.control / "raise").unlink()
        assert len(list(mount.vm.iterdir())) == 3
    log = mount.log.read_text()
    assert "ZeroDivisionError: injected" in log
    assert "opendir" in log


def test_a_name_that_is_asked_for_while_others_go_away(mounted_alone: Mounted) -> None:
    """The kernel is told of the pruned point while it waits for an answer about another name in that directory."""
    mount = mounted_alone
    first = mount.engine.points()[0]
    for name in ("2026-09-21T141320Z", "latest"):
        assert (mount.vm / name).exists()
    time.sleep(1.1)  # a miss looks again at most once a second
    mount.engine.storage.delete(f"points/{first.id}")
    asked = subprocess.run(["stat", mount.vm / "no-such-name"], capture_output=True, timeout=10, check=False)
    assert asked.returncode == 1
    deadline = time.monotonic() + 2
    while (mount.vm / "2026-09-21T141320Z").exists():
        assert time.monotonic() < deadline, "the kernel still shows the point"
        time.sleep(0.02)
