"""Every way of reading an image gives the bytes that were backed up."""

from __future__ import annotations

import json
import mmap
import os
import random  # noqa: TID251 - seeded
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.fuse.conftest import NEW, OLD, SIZE
from tests.support.boot_results import boot_test
from tests.support.engine import pattern
from tests.support.mounts import drop_page_cache
from xbfs_engine.catalog.boottests import put_boot_test

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.mounts import Mounted

POINTS = {"2026-09-21T141320Z": OLD, "2026-09-21T141500Z": NEW}


@pytest.mark.parametrize("time_name", POINTS)
def test_cp_brings_the_disk_back(mounted: Mounted, tmp_path: Path, time_name: str) -> None:
    copy = tmp_path / "disk.raw"
    subprocess.run(["cp", mounted.vm / time_name / "disks/0.raw", copy], check=True)
    assert copy.read_bytes() == POINTS[time_name]


@pytest.mark.parametrize("time_name", POINTS)
def test_vhd_holds_the_disk(mounted: Mounted, tmp_path: Path, time_name: str) -> None:
    out = tmp_path / "disk.raw"
    image = mounted.vm / time_name / "disks/0.vhd"
    subprocess.run(["qemu-img", "convert", "-f", "vpc", "-O", "raw", image, out], check=True)
    virtual = out.read_bytes()
    assert virtual[:SIZE] == POINTS[time_name]
    assert not virtual[SIZE:].strip(b"\0")


def test_random_reads(mounted: Mounted) -> None:
    seeded = random.Random(3)
    drop_page_cache(mounted.disk)
    with mounted.disk.open("rb", buffering=0) as image:
        for _ in range(200):
            offset, length = seeded.randrange(SIZE), seeded.choice((1, 511, 4096, 70_000, 300_000))
            image.seek(offset)
            assert image.read(length) == NEW[offset : offset + length]


def test_mmap(mounted: Mounted) -> None:
    drop_page_cache(mounted.disk)
    with mounted.disk.open("rb") as image, mmap.mmap(image.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        for offset in range(0, SIZE, 99_991):
            assert mapped[offset : offset + 100] == NEW[offset : offset + 100]
        assert mapped[:] == NEW


@pytest.mark.parametrize("size", [4096, 65536, 1 << 20])
def test_direct_reads(mounted: Mounted, size: int) -> None:
    fd = os.open(mounted.disk, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, size)
    try:
        for offset in (0, size, 3 * size, SIZE // size * size):
            count = os.preadv(fd, [buffer], offset)
            assert buffer[:count] == NEW[offset : offset + size]
    finally:
        os.close(fd)


def test_many_readers_at_once(mounted: Mounted) -> None:
    drop_page_cache(mounted.disk)
    wrong: list[int] = []

    def read(seed: int) -> None:
        seeded = random.Random(seed)
        with mounted.disk.open("rb", buffering=0) as image:
            for _ in range(60):
                offset = seeded.randrange(SIZE)
                if os.pread(image.fileno(), 9000, offset) != NEW[offset : offset + 9000]:
                    wrong.append(offset)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_opening_twice_keeps_the_pages(mounted: Mounted) -> None:
    status = mounted.directory / ".xbfs/metrics"

    def misses() -> str:
        return next(line for line in status.read_text().splitlines() if line.startswith("xbfs_cache_misses_total "))

    mounted.disk.read_bytes()
    before = misses()
    assert mounted.disk.read_bytes() == NEW
    assert misses() == before


def test_new_points_appear_while_mounted(mounted_alone: Mounted) -> None:
    mount = mounted_alone
    assert len(list(mount.vm.iterdir())) == 3
    old = mount.disk.read_bytes()
    mount.engine.clock.advance(100)
    point = mount.engine.backup(pattern(9, SIZE), vm_uuid="vm-1")
    assert (mount.directory / "by-id" / point.id).exists(), "a name that is asked for is looked for at once"
    assert mount.disk.read_bytes() == pattern(9, SIZE)
    mount.engine.clock.advance(100)
    mount.engine.backup(pattern(10, SIZE), vm_uuid="vm-1")
    deadline = time.monotonic() + 10
    while len(list(mount.vm.iterdir())) < 5:
        assert time.monotonic() < deadline, "the new point does not appear by itself"
        time.sleep(0.05)
    assert mount.disk.read_bytes() == pattern(10, SIZE)
    assert (mount.vm / "2026-09-21T141500Z/disks/0.raw").read_bytes() == old


def test_a_boot_test_appears_in_the_report_and_an_open_one_stays_as_it_was(mounted_alone: Mounted) -> None:
    mount = mounted_alone
    path = mount.vm / "latest/report.json"
    with path.open("rb", buffering=0) as old:
        before = path.stat()
        assert json.loads(path.read_bytes())["tests"] == []
        put_boot_test(mount.engine.repository, boot_test(mount.engine.points()[-1].id, before.st_mtime_ns + 1))
        deadline = time.monotonic() + 10
        while path.stat().st_size == before.st_size:
            assert time.monotonic() < deadline, "the result does not appear by itself"
            time.sleep(0.05)
        assert json.loads(path.read_bytes())["tests"][0]["verdict"] == "booted"
        assert len(path.read_bytes()) == path.stat().st_size
        assert path.stat().st_mtime_ns == before.st_mtime_ns + 1
        assert json.loads(old.readall())["tests"] == []


def test_a_pruned_point_goes_away(mounted_alone: Mounted) -> None:
    mount = mounted_alone
    first = mount.engine.points()[0]
    path = mount.vm / "2026-09-21T141320Z"
    assert path.is_dir()
    mount.engine.storage.delete(f"points/{first.id}")
    deadline = time.monotonic() + 10
    while path.exists():
        assert time.monotonic() < deadline, "the kernel still shows the point"
        time.sleep(0.05)
    assert not (mount.directory / "by-id" / first.id).is_symlink()
    assert mount.disk.read_bytes() == NEW
