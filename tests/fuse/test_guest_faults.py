"""What a reader of guests' files meets when the process that reads them dies or hangs, or the storage does."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support import guest_golden
from tests.support.engine import MemorySource, pattern
from tests.support.guest_mounts import guest_mount
from tests.support.guest_sources import SparseSource
from tests.support.mounts import Mounted
from xbfs.fuse.mount import DataPlaneKind

BIG = 24 << 20


def ext4_with(folder: Path, name: str, content: bytes) -> SparseSource:
    source = folder / "source"
    source.mkdir()
    (source / name).write_bytes(content)
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(len(content) + (8 << 20))
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", source, image], check=True, capture_output=True)
    return SparseSource.of_file(image)


def point(mount: Mounted) -> Path:
    return (mount.vm / "latest").resolve()


def workers(mount: Mounted) -> list[int]:
    """Processes that read guests: children of the child that makes them."""
    assert mount.server is not None

    def children(pid: int) -> list[int]:
        tasks = Path(f"/proc/{pid}/task").iterdir()  # each thread has its own
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]

    return [worker for child in children(mount.server.pid) for worker in children(child)]


def status(mount: Mounted) -> dict[str, object]:
    found = json.loads((mount.directory / ".xbfs/status.json").read_text())["guests"]
    assert isinstance(found, dict)
    return found


def test_a_reader_that_is_killed_is_replaced_while_a_file_is_read(tmp_path: Path) -> None:
    content = pattern(1, BIG)
    with guest_mount(tmp_path, ext4_with(tmp_path, "big", content)) as mount:
        assert workers(mount) == []
        with (point(mount) / "files/0/big").open("rb") as file:
            found = file.read(1 << 20)
            (before,) = workers(mount)
            os.kill(before, signal.SIGKILL)
            found += file.read()
        assert found == content
        (after,) = workers(mount)
        assert after != before
        assert status(mount)["readers"] == 1


def test_a_reader_that_hangs_is_killed_and_others_are_served_meanwhile(tmp_path: Path) -> None:
    with guest_mount(tmp_path, ext4_with(tmp_path, "big", pattern(1, BIG))) as mount:
        folder = point(mount) / "files/0"
        assert {path.name for path in folder.iterdir()} == {"big", "lost+found"}
        (hung,) = workers(mount)
        os.kill(hung, signal.SIGSTOP)
        outcome: list[object] = []

        def ask() -> None:
            try:
                outcome.append(os.getxattr(folder / "big", "user.xbfs.btime"))
            except OSError as exc:
                outcome.append(exc.errno)

        asking = threading.Thread(target=ask)
        asking.start()
        began = time.monotonic()
        while time.monotonic() < began + 3:
            assert len((point(mount) / "disks/0.raw").read_bytes()) == BIG + (8 << 20)
            assert len(list(point(mount).iterdir())) == 5
        asking.join(60)
        assert outcome
        assert isinstance(outcome[0], bytes), outcome
        assert hung not in workers(mount)


def test_a_storage_that_hangs_is_an_error_by_the_deadline(tmp_path: Path) -> None:
    mount = guest_mount(tmp_path, ext4_with(tmp_path, "big", pattern(1, BIG)), deadline_s=2.0)
    with mount:
        mount.hang("*")
        began = time.monotonic()
        with pytest.raises(OSError) as failure:
            os.listdir(point(mount) / "files")  # noqa: PTH208 - it shall fail as the kernel says
        assert failure.value.errno == errno.EIO
        assert time.monotonic() - began < 20
        assert len(list(point(mount).iterdir())) == 5
        mount.release()
        time.sleep(0.5)
        assert (point(mount) / "files/0/big").stat().st_size == BIG


def test_nothing_of_a_guest_is_read_before_somebody_looks(tmp_path: Path) -> None:
    with guest_mount(tmp_path, guest_golden.image("ext4")) as mount:
        for _, folders, _ in os.walk(mount.directory):
            folders[:] = [name for name in folders if name not in ("files", "root")]
        assert (point(mount) / "files").stat().st_mode
        assert (point(mount) / "root").stat().st_mode
        assert workers(mount) == []
        assert status(mount)["confined_by"] is None
        assert sorted(path.name for path in (point(mount) / "files").iterdir()) == ["0", "0.json"]
        assert status(mount)["readers"] == 1
        assert "seccomp" in str(status(mount)["confined_by"]) or "seccomp" in str(status(mount)["not_confined_by"])


def test_no_parser_of_filesystems_is_in_the_process_that_serves(tmp_path: Path) -> None:
    """Python maps compiled modules and caches none of the sources: what was imported is asked for by a new import."""
    program = (
        "import sys, xbfs.fuse.mount, xbfs.fuse.operations, xbfs.vfs.filesystem\n"
        "found = [m for m in sys.modules if m.startswith(('xbfs_engine.guestfs.explorer', 'fs_explorer',"
        " 'xbfs_engine.guestfs.xfs', 'xbfs_engine.guestfs.ext', 'xbfs_engine.guestfs.reading'))]\n"
        "sys.exit(' '.join(found) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": "engine:."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_damaged_volume_fails_alone_and_says_why(tmp_path: Path) -> None:
    broken = guest_golden.image("ext4")
    broken.write_at(1024 + 0x20, b"\xff" * 4)  # blocks per group: the checksum does not fit any more
    with guest_mount(tmp_path, broken, guest_golden.image("ext4-dirty")) as mount:
        files = point(mount) / "files"
        text = json.loads((files / "0.json").read_text())
        assert text["state"] == "unsupported"
        assert text["reason"]
        for path in (files / "0", files / "0" / "x"):
            with pytest.raises(OSError) as failure:
                os.listdir(path)  # noqa: PTH208 - the same
            assert failure.value.errno == errno.EIO
        assert (files / "0").stat().st_size == 0
        assert len(os.listdir(files / "1")) > 1  # noqa: PTH208 - the same
        assert "files/0" in str(status(mount)["recent_problems"])
        assert json.loads((mount.directory / ".xbfs/status.json").read_text())["healthy"]
    lines = [line for line in mount.log.read_text().splitlines() if "a guest's file" in line and "files/0" in line]
    assert 1 <= len(lines) <= 2


def test_a_disk_without_anything_known_on_it(tmp_path: Path) -> None:
    mount = Mounted(tmp_path)
    mount.engine.backup(MemorySource(4 << 20, {0: pattern(9)}))
    with mount:
        assert [path.name for path in (point(mount) / "files").iterdir()] == ["0.json"]
        assert json.loads((point(mount) / "files/0.json").read_text())["reason"]


def test_what_was_listed_once_is_listed_again_by_the_kernel_alone(tmp_path: Path, data_plane: DataPlaneKind) -> None:
    if data_plane is DataPlaneKind.INLINE:
        pytest.skip("pyfuse3 can not tell the kernel that it may keep a listing")
    source = tmp_path / "source"
    (source / "many").mkdir(parents=True)
    names = {f"file number {number}" for number in range(3000)}
    for name in names:
        (source / "many" / name).touch()
    image = tmp_path / "image"
    command = ["mke2fs", "-q", "-t", "ext4", "-N", "4096", "-d", source, image, "16M"]
    subprocess.run(command, check=True, capture_output=True)
    with guest_mount(tmp_path, SparseSource.of_file(image)) as mount:
        folder = point(mount) / "files/0/many"
        for _ in range(10):
            assert {path.name for path in folder.iterdir()} == names
            for worker in workers(mount):
                os.kill(worker, signal.SIGKILL)
            while workers(mount):
                time.sleep(0.02)
            assert {path.name for path in folder.iterdir()} == names
            if not workers(mount):
                return
        # Once is enough: a machine that is short of memory may take the pages away in between.
        pytest.fail("each time a reader was started for what the kernel had")
