"""What only the device plane does: seeking to data and holes, and surviving, or cleanly ending with, its helper."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fuse.conftest import NEW, SIZE, make
from tests.support.engine import CHUNK
from xbfs.fuse.mount import DataPlaneKind
from xbfs_engine.core.errors import MountFailed
from xbfs_engine.core.limits import MIB

if TYPE_CHECKING:
    from tests.support.mounts import Mounted


pytestmark = pytest.mark.parametrize("data_plane", [DataPlaneKind.DEVICE], indirect=True, scope="session")


def holds_data(mib: int) -> bool:
    return bool(NEW[mib * MIB : (mib + 1) * MIB].strip(b"\0"))


def test_seek_finds_data_and_holes_to_a_mib(mounted: Mounted) -> None:
    fd = os.open(mounted.disk, os.O_RDONLY)
    try:
        for offset in range(0, SIZE, MIB // 2):
            mib = offset // MIB
            last = -(-SIZE // MIB)
            data = next((max(offset, at * MIB) for at in range(mib, last) if holds_data(at)), None)
            hole = next((max(offset, at * MIB) for at in range(mib, last) if not holds_data(at)), SIZE)
            if data is None:
                with pytest.raises(OSError) as failure:
                    os.lseek(fd, offset, os.SEEK_DATA)
                assert failure.value.errno == errno.ENXIO
            else:
                assert os.lseek(fd, offset, os.SEEK_DATA) == data
            assert os.lseek(fd, offset, os.SEEK_HOLE) == hole
        with pytest.raises(OSError) as failure:
            os.lseek(fd, SIZE, os.SEEK_HOLE)
        assert failure.value.errno == errno.ENXIO
    finally:
        os.close(fd)


def test_qemu_sees_the_holes(mounted: Mounted) -> None:
    out = subprocess.run(["qemu-img", "map", "-f", "raw", mounted.disk], check=True, capture_output=True, text=True)
    extents = [line.split() for line in out.stdout.splitlines()[1:]]
    mapped = sum(int(line[1], 16) for line in extents)
    assert mapped == sum(min(MIB, SIZE - at * MIB) for at in range(-(-SIZE // MIB)) if holds_data(at))


def test_a_vhd_is_all_data(mounted: Mounted) -> None:
    image = mounted.disk.resolve().with_suffix(".vhd")
    fd = os.open(image, os.O_RDONLY)
    try:
        assert os.lseek(fd, 5, os.SEEK_DATA) == 5
        assert os.lseek(fd, 5, os.SEEK_HOLE) == image.stat().st_size
    finally:
        os.close(fd)


def test_a_text_longer_than_a_socket_holds_is_read(mounted: Mounted) -> None:
    report = mounted.vm / "latest/report.json"
    assert len(report.read_bytes()) == report.stat().st_size


def test_the_mount_ends_when_the_helper_that_carries_answers_dies(tmp_path: Path) -> None:
    mount = make(tmp_path)
    with mount:
        assert mount.server is not None
        children = Path(f"/proc/{mount.server.pid}/task/{mount.server.pid}/children").read_text().split()
        (pump,) = (int(child) for child in children if b"pump.py" in Path(f"/proc/{child}/cmdline").read_bytes())
        os.kill(pump, signal.SIGKILL)
        assert mount.wait() == MountFailed.exit_code
        assert not mount.is_mounted
    assert "carries answers" in mount.log.read_text()


def test_a_killed_reader_leaves_nothing_behind(tmp_path: Path) -> None:
    mount = make(tmp_path, deadline_s=2.0)
    with mount:
        mount.hang("*")
        reader = subprocess.Popen(["dd", f"if={mount.disk}", "of=/dev/null", "bs=4096", "count=1"], stderr=-3)
        time.sleep(0.3)
        reader.kill()
        began = time.monotonic()
        reader.wait()
        assert time.monotonic() - began < 4, "the deadline frees it at the latest"
        mount.release()
        time.sleep(0.3)
        with mount.disk.open("rb") as image:
            assert image.read(CHUNK) == NEW[:CHUNK]


def test_targets_of_links_are_kept_by_the_kernel(mounted: Mounted) -> None:
    assert mounted.server is not None
    link = mounted.directory / "by-id" / mounted.engine.points()[0].id
    for _ in range(10):  # a machine that is short of memory may drop what was kept
        target = link.readlink()
        os.kill(mounted.server.pid, signal.SIGSTOP)
        try:
            again = subprocess.run(["readlink", link], capture_output=True, timeout=2, check=True)
        except subprocess.TimeoutExpired:
            continue
        finally:
            os.kill(mounted.server.pid, signal.SIGCONT)
        assert Path(os.fsdecode(again.stdout.rstrip(b"\n"))) == target
        return
    raise AssertionError("the server was asked each time")
