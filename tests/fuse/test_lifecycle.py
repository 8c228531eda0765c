"""Mounting and unmounting: every way a server ends, the background, and mount points that will not do."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fuse.conftest import NEW, make
from tests.support.engine import Engine, pattern
from tests.support.servers import ROOT
from xbfs.fuse import mountpoint
from xbfs.fuse.mount import MountServer
from xbfs_engine.core.errors import (
    FuseMissing,
    MountFailed,
    MountPointInside,
    MountPointInvalid,
    MountPointNotEmpty,
    NotMounted,
    XbfsError,
)
from xbfs_engine.storage.local import LocalStorage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.mounts import Mounted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts(tmp_path: Path, number: signal.Signals) -> None:
    with make(tmp_path) as mount:
        assert mount.signal(number) == 0
        assert not mount.is_mounted
        assert list(mount.directory.iterdir()) == []


def test_unmounting_from_outside_ends_the_server(tmp_path: Path) -> None:
    with make(tmp_path) as mount:
        subprocess.run(["fusermount3", "-u", mount.directory], check=True)
        assert mount.wait() == 0


def test_umount_unmounts_and_a_second_time_says_so(tmp_path: Path) -> None:
    with make(tmp_path) as mount:
        mountpoint.umount(mount.directory)
        assert mount.wait() == 0
        with pytest.raises(NotMounted):
            mountpoint.umount(mount.directory)


def test_umount_of_a_busy_mount_says_what_to_do(tmp_path: Path) -> None:
    with make(tmp_path) as mount, mount.disk.open("rb"):
        with pytest.raises(MountFailed) as failure:
            mountpoint.umount(mount.directory)
        assert "fuser" in failure.value.hint
        assert mount.is_mounted


@pytest.mark.parametrize("place", ["/proc", "/dev/shm"])
def test_umount_leaves_other_mounts_alone(place: str) -> None:
    with pytest.raises(NotMounted):
        mountpoint.umount(Path(place))


def test_a_killed_server_leaves_no_mount(tmp_path: Path) -> None:
    mount = make(tmp_path)
    with mount:
        assert mount.signal(signal.SIGKILL) == -signal.SIGKILL
        until = time.monotonic() + 5
        while mount.is_mounted:
            assert time.monotonic() < until, "the dead mount is still there"
            time.sleep(0.05)
    with mount:
        assert mount.disk.read_bytes() == NEW


def test_a_dead_mount_is_taken_away_before_mounting(tmp_path: Path) -> None:
    mount = make(tmp_path)
    with mount:
        kill_unmounter(mount)
        mount.signal(signal.SIGKILL)
        with pytest.raises(OSError) as failure:
            list(mount.directory.iterdir())
        assert failure.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        mount.start()
        assert mount.disk.read_bytes() == NEW


def test_umount_takes_a_dead_mount_away(tmp_path: Path) -> None:
    mount = make(tmp_path)
    with mount:
        kill_unmounter(mount)
        mount.signal(signal.SIGKILL)
        mountpoint.umount(mount.directory)
        assert not mount.is_mounted


def kill_unmounter(mount: Mounted) -> None:
    """Kill the helper that unmounts when the server dies."""
    assert mount.server is not None
    pid = mount.server.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    (child,) = (child for child in children if Path(f"/proc/{child}/comm").read_text() == "sh\n")
    assert os.fsencode(mount.directory) in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
    os.kill(int(child), signal.SIGKILL)


def engine(tmp_path: Path) -> Engine:
    made = Engine.fresh(tmp_path / "cache", LocalStorage(tmp_path / "repository"))
    made.backup(pattern(1))
    return made


def refuse(tmp_path: Path, directory: Path) -> XbfsError:
    made = engine(tmp_path)
    with pytest.raises(XbfsError) as failure:
        MountServer(made.repository, made.catalog, directory).serve()
    with pytest.raises(type(failure.value)):
        MountServer(made.repository, made.catalog, directory).serve_in_background()
    return failure.value


def test_a_directory_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "mnt/file").touch()
    problem = refuse(tmp_path, tmp_path / "mnt")
    assert isinstance(problem, MountPointNotEmpty)
    assert "'file'" in problem.message


def test_a_directory_inside_the_repository_is_refused(tmp_path: Path) -> None:
    (tmp_path / "repository/mnt").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "repository/mnt")
    assert isinstance(refuse(tmp_path / ".", tmp_path / "link"), MountPointInside)


@pytest.mark.parametrize("name", ["missing", "file", "file/below", "missing/below"])
def test_what_is_no_directory_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    assert isinstance(refuse(tmp_path, tmp_path / name), MountPointInvalid)


def test_mounting_twice_is_refused(tmp_path: Path) -> None:
    with make(tmp_path / ".") as mount, pytest.raises(MountPointNotEmpty, match="already"):
        mountpoint.prepare(mount.directory, "memory")


def test_missing_fuse_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FuseMissing, match="fusermount3"):
        mountpoint.check_installed()
    monkeypatch.setitem(sys.modules, "pyfuse3", None)
    with pytest.raises(FuseMissing, match="pyfuse3"):
        mountpoint.check_installed()


BACKGROUND = """
import sys
from pathlib import Path
from tests.support.engine import PASSPHRASE
from xbfs.fuse.mount import MountOptions, MountServer
from xbfs_engine.catalog.catalog import Catalog
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.storage.local import LocalStorage
from xbfs_engine.store.repository import open_repository

repository = open_repository(LocalStorage(Path(sys.argv[1])), system_runtime(), PASSPHRASE)
options = MountOptions(log_file=Path(sys.argv[3]))
print(MountServer(repository, Catalog(repository), Path(sys.argv[2]), options).serve_in_background())
"""


def run_background(storage: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BACKGROUND, storage, directory, storage.parent / "log"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "engine")])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_background_server_is_usable_when_its_parent_returns(tmp_path: Path) -> None:
    mount = make(tmp_path)
    done = run_background(mount.storage, mount.directory)
    try:
        assert done.returncode == 0, done.stderr
        pid = int(done.stdout)
        assert mount.disk.read_bytes() == NEW
        assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
        assert os.getsid(pid) != os.getsid(0)
        mountpoint.umount(mount.directory)
        until = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            assert time.monotonic() < until, "the server does not end"
            time.sleep(0.05)
        assert (tmp_path / "log").read_text() == ""
    finally:
        if mount.is_mounted:
            mountpoint.umount(mount.directory)


def test_the_background_server_tells_its_parent_why_not(tmp_path: Path) -> None:
    mount = make(tmp_path)
    (mount.storage / "points").rename(mount.storage / "gone")
    (mount.storage / "points").symlink_to("points")
    done = run_background(mount.storage, mount.directory)
    assert done.returncode != 0
    assert "BlobNotFound" in done.stderr.splitlines()[-1]
    assert "Too many levels of symbolic links" in done.stderr.splitlines()[-1]
    assert not mount.is_mounted


NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        path.chmod(0o755)
        yield path


@as_root
@pytest.mark.skipif(Path("/dev/fuse").stat().st_mode & 0o006 != 0o006, reason="here only root may use /dev/fuse")
def test_a_user_without_privileges_mounts_and_leaves_nothing(open_folder: Path) -> None:
    mount = make(open_folder)
    mount.user = NOBODY
    expected = open_folder / "expected"
    expected.write_bytes(NEW)
    for path in (open_folder, *open_folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    with mount:
        with pytest.raises(PermissionError):
            list(mount.directory.iterdir())  # not even root, without allow_other
        subprocess.run(["cmp", mount.disk, expected], user=NOBODY, group=NOBODY, check=True)
        assert mount.signal(signal.SIGKILL) == -signal.SIGKILL
        until = time.monotonic() + 5
        while mount.is_mounted:
            assert time.monotonic() < until, "the dead mount is still there"
            time.sleep(0.05)
    with mount:
        assert mount.signal(signal.SIGTERM) == 0
        assert not mount.is_mounted


@as_root
@pytest.mark.parametrize("allow_other", [False, True])
def test_other_users_read_only_where_they_are_let_in(open_folder: Path, allow_other: bool) -> None:
    mount = make(open_folder)
    mount.allow_other = allow_other
    with mount:
        read = subprocess.run(["head", "-c", "1", mount.disk], user=NOBODY, capture_output=True, check=False)
        assert (read.returncode == 0) == allow_other
        assert read.stdout == (NEW[:1] if allow_other else b"")
