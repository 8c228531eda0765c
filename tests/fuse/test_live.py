"""The live mount: names, links, modes and foreign files as on any file system, with stubs among them."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import CHUNK, MemoryDisk
from tests.support.live_mounts import LiveMounted
from xbfs.fuse.mount import DataPlaneKind
from xbfs.vfs.live.stubs import stub_keys

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.parametrize("data_plane", [DataPlaneKind.DEVICE], indirect=True, scope="session")

SIZE = 4 << 20
CHUNKS = (0, 3, 20)
DISK = MemoryDisk.holding(SIZE, CHUNKS).read_at(0, SIZE)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveMounted]:
    mounted = LiveMounted(tmp_path_factory.mktemp("live"))
    mounted.disk("sr/disk.raw", "0", SIZE, CHUNKS)
    mounted.disk("other.raw", "0", SIZE, CHUNKS, session="second")
    with mounted:
        yield mounted


@pytest.fixture
def sr(live: LiveMounted) -> Path:
    """The session's directory with its one disk in it."""
    directory = live.directory / "sr"
    if not (directory / "disk.raw").exists():
        subprocess.run(["ln", live.backing.with_name("tree.stubs") / "0", live.backing / "sr/disk.raw"], check=True)
        time.sleep(1.1)  # done behind the mount's back: the kernel may not know for a second
    return directory


def fails_with(code: int) -> pytest.RaisesContext[OSError]:  # type: ignore[name-defined]
    return pytest.raises(OSError, match=os.strerror(code))


def test_the_mount_shows_sessions_and_their_disks(live: LiveMounted, sr: Path) -> None:
    assert sorted(path.name for path in live.mount.iterdir()) == ["second", "vm"]
    assert (sr / "disk.raw").read_bytes() == DISK
    found = (sr / "disk.raw").stat()
    assert (found.st_size, found.st_nlink, stat.S_IMODE(found.st_mode)) == (SIZE, 1, 0o600)
    with fails_with(errno.EPERM):
        (live.mount / "mine").mkdir()
    with fails_with(errno.EXDEV):
        os.link(sr / "disk.raw", live.mount / "second/x")
    with fails_with(errno.EXDEV):
        (sr / "disk.raw").rename(live.mount / "second/x")


def test_what_an_sr_driver_tries(live: LiveMounted, sr: Path) -> None:
    """Write test, hard-link test, room, a journal that grows, a listing that is right at once."""
    probe = sr / "0e984725-c51c-4bf4-9960-e1c80e27aba0"
    probe.touch()
    linked = probe.with_name(probe.name + ".new")
    os.link(probe, linked)
    assert probe.stat().st_nlink == linked.stat().st_nlink == 2
    assert {probe.name, linked.name} <= {path.name for path in sr.iterdir()}
    probe.unlink()
    assert linked.stat().st_nlink == 1
    linked.unlink()
    assert [path.name for path in sr.iterdir()] == ["disk.raw"]
    with (sr / "filelog.txt").open("ab") as log:
        for _ in range(3):
            log.write(b"a line\n")
            log.flush()
    assert (sr / "filelog.txt").read_bytes() == (live.backing / "sr/filelog.txt").read_bytes() == b"a line\n" * 3
    room, below = os.statvfs(sr), os.statvfs(live.backing)
    assert room.f_blocks == below.f_blocks
    assert room.f_bavail * room.f_frsize > 1 << 20
    live.directory.chmod(0o700)
    assert stat.S_IMODE(live.directory.stat().st_mode) == stat.S_IMODE(live.backing.stat().st_mode) == 0o700
    (sr / "filelog.txt").unlink()


def test_a_snapshot_as_sm_makes_it(live: LiveMounted, sr: Path) -> None:
    """The leaf becomes the parent under a new name, and a new leaf is renamed over its old one."""
    leaf, parent, child = sr / "disk.raw", sr / "parent.raw", sr / "disk.raw.new"
    os.link(leaf, parent)
    assert leaf.stat().st_nlink == 2
    child.write_bytes(b"an empty child")
    child.rename(leaf)
    assert leaf.read_bytes() == b"an empty child"
    assert parent.read_bytes() == DISK
    assert parent.stat().st_nlink == 1
    assert stub_keys(live.backing) == {"0": ["sr/parent.raw"]}
    parent.rename(leaf)
    assert leaf.read_bytes() == DISK
    assert stub_keys(live.backing) == {"0": ["sr/disk.raw"]}


def test_a_disk_that_was_unlinked_works_until_it_is_closed(live: LiveMounted, sr: Path) -> None:
    with (sr / "disk.raw").open("rb+", buffering=0) as disk:
        (sr / "disk.raw").unlink()
        assert not list(sr.iterdir())
        assert os.fstat(disk.fileno()).st_nlink == 0
        assert disk.read(CHUNK) == DISK[:CHUNK]
        disk.seek(0)
        disk.write(b"still there")
        os.fsync(disk.fileno())
        assert os.pread(disk.fileno(), 11, 0) == b"still there"
        os.pwrite(disk.fileno(), DISK[:11], 0)
    assert stub_keys(live.backing) == {"0": []}


def test_a_file_that_was_unlinked_works_until_it_is_closed(sr: Path) -> None:
    with (sr / "temporary").open("wb+", buffering=0) as file:
        (sr / "temporary").unlink()
        file.write(b"content")
        os.ftruncate(file.fileno(), 3)
        assert os.pread(file.fileno(), 10, 0) == b"con"
        assert os.fstat(file.fileno()).st_nlink == 0


def test_nobody_makes_or_reads_a_stub(live: LiveMounted, sr: Path) -> None:
    """A file with the very bytes of a stub is that file; anchors lie where no name leads."""
    (sr / "copy").write_bytes((live.backing / "sr/disk.raw").read_bytes())
    assert (sr / "copy").stat().st_size == 0
    for way in ("../tree.stubs/0", "../../vm/tree.stubs/0"):
        assert not (live.directory / way).exists()
    (sr / "out").symlink_to(live.backing.with_name("tree.stubs"))
    assert (sr / "out").readlink() == live.backing.with_name("tree.stubs")
    assert stat.S_ISLNK((sr / "out").lstat().st_mode)
    assert not list(live.backing.with_name("tree.stubs").glob("x"))
    if os.geteuid() == 0:
        (sr / "in").symlink_to("copy")
        for name in ("out/0", "in"):
            with fails_with(errno.ELOOP):
                (sr / name).stat()
        (sr / "in").unlink()
    with fails_with(errno.EPERM):
        os.mknod(sr / "device", stat.S_IFBLK | 0o600, os.makedev(1, 1))
    for name in ("copy", "out"):
        (sr / name).unlink()


def test_modes_owners_times_and_special_files(live: LiveMounted, sr: Path) -> None:
    for path in (sr / "disk.raw", sr / "file"):
        path.touch()
        path.chmod(0o640)
        os.chown(path, 12, 34)
        os.utime(path, ns=(10**18 + 1, 10**18 + 2))
        found, below = path.stat(), (live.backing / "sr" / path.name).stat()
        for status in (found, below):
            assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o640, 12, 34)
            assert (status.st_atime_ns, status.st_mtime_ns) == (10**18 + 1, 10**18 + 2)
        assert found.st_ino == below.st_ino
    os.chown(sr / "disk.raw", 0, 0)
    os.mkfifo(sr / "pipe", 0o604)
    assert (sr / "pipe").lstat().st_mode == stat.S_IFIFO | 0o604
    (sr / "link").symlink_to("nowhere")
    os.chown(sr / "link", 5, 6, follow_symlinks=False)
    assert (sr / "link").lstat().st_uid == 5
    for name in ("file", "pipe", "link"):
        (sr / name).unlink()


def test_files_of_other_users_are_theirs(live: LiveMounted, sr: Path) -> None:
    sr.chmod(0o777)
    script = "umask 027; mkdir d; echo x >d/f; ln -s f d/l; mkfifo d/p; ! cat disk.raw"
    command = ["setpriv", "--reuid=1234", "--regid=77", "--clear-groups", "sh", "-ec", script]
    live.directory.chmod(0o755)
    subprocess.run(command, cwd=sr, check=True, capture_output=True)
    for name, mode in (("d", 0o750), ("d/f", 0o640), ("d/p", 0o640), ("d/l", 0o777)):
        found = (live.backing / "sr" / name).lstat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 77, mode)
    for name in ("f", "l", "p"):
        (sr / "d" / name).unlink()
    (sr / "d").rmdir()


def renameat2(old: Path, new: Path, flags: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if libc.renameat2(-100, bytes(old), -100, bytes(new), flags) else 0


def test_errors_are_those_of_a_file_system(sr: Path) -> None:
    (sr / "d").mkdir()
    (sr / "d/f").write_bytes(b"1")
    (sr / "g").write_bytes(b"2")
    (sr / "l").symlink_to("g")
    for code, attempt in [
        (errno.ENOTEMPTY, (sr / "d").rmdir),
        (errno.EEXIST, (sr / "d").mkdir),
        (errno.EISDIR, (sr / "d").unlink),
        (errno.ENOTDIR, (sr / "g").rmdir),
        (errno.ENOENT, (sr / "none").unlink),
        (errno.EEXIST, lambda: os.link(sr / "g", sr / "d/f")),
        (errno.EISDIR, lambda: (sr / "g").rename(sr / "d")),
        (errno.ENOTDIR, lambda: (sr / "d").rename(sr / "g")),
        (errno.EINVAL, lambda: (sr / "d").rename(sr / "d/e")),
        (errno.ENAMETOOLONG, (sr / ("x" * 256)).touch),
        (errno.EEXIST, lambda: os.open(sr / "g", os.O_CREAT | os.O_EXCL)),
        (errno.ELOOP, lambda: os.open(sr / "l", os.O_NOFOLLOW)),
    ]:
        with fails_with(code):
            attempt()
    assert renameat2(sr / "g", sr / "d/f", 1) == errno.EEXIST
    assert renameat2(sr / "g", sr / "d/f", 2) == 0
    assert ((sr / "g").read_bytes(), (sr / "d/f").read_bytes()) == (b"1", b"2")
    assert renameat2(sr / "g", sr / "disk.raw", 2) == 0
    assert (sr / "g").read_bytes() == DISK
    assert (sr / "disk.raw").read_bytes() == b"1"
    (sr / "g").rename(sr / "disk.raw")
    (sr / "d/f").unlink()
    (sr / "d").rmdir()
    (sr / "l").unlink()


def test_extended_attributes(live: LiveMounted, sr: Path) -> None:
    for path in (sr / "disk.raw", sr):
        os.setxattr(path, "user.xbfs.test", b"value")
        assert os.getxattr(path, "user.xbfs.test") == b"value"
        assert "user.xbfs.test" in os.listxattr(path)
        os.removexattr(path, "user.xbfs.test")
        with fails_with(errno.ENODATA):
            os.getxattr(path, "user.xbfs.test")
        with fails_with(errno.EOPNOTSUPP):
            os.setxattr(path, "trusted.x", b"")


def test_a_listing_that_goes_on_while_files_come_and_go(sr: Path) -> None:
    (sr / "many").mkdir()
    for number in range(700):
        (sr / "many" / f"{number:04}").touch()
    with os.scandir(sr / "many") as entries:
        seen = {next(entries).name}
        for number in range(350, 700):
            (sr / "many" / f"{number:04}").unlink()
        seen |= {entry.name for entry in entries}
    assert {f"{number:04}" for number in range(350)} <= seen
    assert len(list((sr / "many").iterdir())) == 350
    subprocess.run(["rm", "-r", sr / "many"], check=True)


def test_a_foreign_file_keeps_its_bytes_and_holes(live: LiveMounted, sr: Path) -> None:
    with (sr / "child").open("wb+", buffering=0) as child:
        os.truncate(child.fileno(), 10 << 20)
        os.pwrite(child.fileno(), b"data" * 1024, 5 << 20)
        os.fsync(child.fileno())
        assert os.lseek(child.fileno(), 0, os.SEEK_DATA) == 5 << 20
        assert os.lseek(child.fileno(), 5 << 20, os.SEEK_HOLE) == (5 << 20) + 4096
        os.posix_fallocate(child.fileno(), 0, 11 << 20)
        assert os.fstat(child.fileno()).st_blocks * 512 >= 11 << 20
    below = live.backing / "sr/child"
    assert below.read_bytes() == (sr / "child").read_bytes()
    with (sr / "child").open("ab") as child:
        child.write(b"more")
    assert below.stat().st_size == (11 << 20) + 4
    (sr / "child").unlink()
