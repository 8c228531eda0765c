"""The tree as the kernel shows it: names, attributes, links, and that it can only be read."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fuse.conftest import NEW, OLD, SIZE, make
from tests.support.mounts import drop_page_cache

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.mounts import Mounted

TIMES = ["2026-09-21T141320Z", "2026-09-21T141500Z"]


def walk(directory: Path) -> dict[str, os.stat_result]:
    found = {}
    for folder, folders, files in os.walk(directory):
        for name in folders + files:
            path = Path(folder, name)
            found[str(path.relative_to(directory))] = path.lstat()
    return found


def test_the_listing_is_exactly_the_documented_one(mounted: Mounted) -> None:
    points = mounted.engine.points()
    expected = {"vms", "vms/vm", "vms/vm/latest", "by-id", "at", "live", ".xbfs", ".xbfs/status.json", ".xbfs/metrics"}
    expected |= {f"by-id/{point.id}" for point in points}
    for time in TIMES:
        expected |= {f"at/{time}", f"at/{time}/vm"}
        expected |= {f"vms/vm/{time}{rest}" for rest in ("", "/disks", "/vm.json", "/report.json", "/root")}
        expected |= {f"vms/vm/{time}/files{rest}" for rest in ("", "/0.json", "/1.json")}
        expected |= {f"vms/vm/{time}/disks/{name}" for name in ("0.raw", "0.vhd", "1.raw", "1.vhd")}
    assert set(walk(mounted.directory)) == expected


def test_links_lead_to_the_points(mounted: Mounted) -> None:
    old, new = mounted.engine.points()
    root = mounted.directory
    assert (root / "vms/vm/latest").readlink() == Path(TIMES[1])
    for point, time in ((old, TIMES[0]), (new, TIMES[1])):
        directory = root / "vms/vm" / time
        assert (root / "by-id" / point.id).resolve() == directory
        assert (root / "at" / time / "vm").resolve() == directory
        assert json.loads((directory / "vm.json").read_text())["id"] == point.id


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("2026-09-21T141459Z", TIMES[0]),
        ("2026-09-21T141500Z", TIMES[1]),
        ("2026-09-21 14:14", TIMES[0]),
        ("2026-09-21T16:15:00+02:00", TIMES[1]),
        ("20260922", TIMES[1]),
        ("2026-09-21", None),
    ],
)
def test_any_time_leads_to_the_last_point_at_or_before(mounted: Mounted, time: str, expected: str | None) -> None:
    directory = mounted.directory / "at" / time
    assert sorted(path.name for path in directory.iterdir()) == (["vm"] if expected else [])
    if expected:
        assert (directory / "vm").resolve() == mounted.directory / "vms/vm" / expected


@pytest.mark.parametrize("name", ["yesterday", "2026-13-01", "0001-01-01", "9" * 250])
def test_what_is_no_time_is_not_there(mounted: Mounted, name: str) -> None:
    with pytest.raises(FileNotFoundError):
        (mounted.directory / "at" / name).lstat()


def test_attributes_say_what_is_true(mounted: Mounted) -> None:
    old = mounted.engine.points()[0]
    disks = mounted.vm / TIMES[0] / "disks"
    raw = (disks / "0.raw").stat()
    assert raw.st_size == SIZE
    assert raw.st_blocks * 512 == 6 << 20
    assert (disks / "1.raw").stat().st_blocks * 512 == 1 << 20
    assert stat.S_IMODE(raw.st_mode) == 0o400
    assert stat.S_IMODE(disks.stat().st_mode) == 0o500
    for path in (mounted.vm / TIMES[0], disks, disks / "0.raw", disks / "0.vhd", disks.parent / "vm.json"):
        assert path.stat().st_mtime_ns == old.time_ns
    report = disks.parent / "report.json"
    assert len(report.read_bytes()) == report.stat().st_size


def test_du_and_sparse_copies_stay_small(mounted: Mounted, tmp_path: Path) -> None:
    image = mounted.vm / TIMES[1] / "disks/1.raw"
    used = int(subprocess.run(["du", "-k", image], capture_output=True, check=True, text=True).stdout.split()[0])
    assert used == 1024
    copy = tmp_path / "copy.raw"
    subprocess.run(["cp", "--sparse=always", image, copy], check=True)
    assert copy.stat().st_size == 64 << 20
    assert copy.stat().st_blocks * 512 <= 1 << 20


def test_extended_attributes_name_the_point(mounted: Mounted) -> None:
    new = mounted.engine.points()[1]
    image = mounted.disk.resolve()
    found = {name: os.getxattr(image, name).decode() for name in os.listxattr(image)}
    assert found == {"user.xbfs.point": new.id, "user.xbfs.disk": "0", "user.xbfs.format": "raw"}
    with pytest.raises(OSError, match="No data available"):
        os.getxattr(image, "user.other")


WRITES: dict[str, Callable[[Path, Path], object]] = {
    "create": lambda root, file: (root / "new").write_bytes(b""),
    "open for writing": lambda root, file: os.open(file, os.O_WRONLY),
    "open for both": lambda root, file: os.open(file, os.O_RDWR),
    "truncate": lambda root, file: os.truncate(file, 0),
    "unlink": lambda root, file: file.unlink(),
    "mkdir": lambda root, file: (root / "vms/vm/new").mkdir(),
    "rmdir": lambda root, file: (root / "vms").rmdir(),
    "rename": lambda root, file: file.rename(root / "vms/other"),
    "symlink": lambda root, file: (root / "vms/link").symlink_to("x"),
    "link": lambda root, file: (root / "vms/hard").hardlink_to(file),
    "chmod": lambda root, file: file.chmod(0o600),
    "utime": lambda root, file: os.utime(file),
    "setxattr": lambda root, file: os.setxattr(file, "user.x", b"1"),
}


@pytest.mark.parametrize("write", WRITES)
def test_nothing_can_be_written(mounted: Mounted, write: str) -> None:
    with pytest.raises(OSError) as failure:
        WRITES[write](mounted.directory, mounted.disk.resolve())
    assert failure.value.errno == errno.EROFS


def test_statfs_is_sane(mounted: Mounted) -> None:
    status = os.statvfs(mounted.directory)
    assert status.f_blocks * status.f_frsize >= 2 * (SIZE + (64 << 20))
    assert status.f_bfree == status.f_bavail == 0
    assert status.f_namemax == 255


def test_status_and_metrics_are_fresh_at_every_open(mounted: Mounted) -> None:
    status = mounted.directory / ".xbfs/status.json"
    before = json.loads(status.read_text())
    assert before["points"] == 2
    assert before["healthy"]
    drop_page_cache(mounted.disk)
    mounted.disk.read_bytes()
    assert json.loads(status.read_text())["cache"]["hits"] > before["cache"]["hits"]
    lines = (mounted.directory / ".xbfs/metrics").read_text().splitlines()
    assert "xbfs_points 2" in lines


def test_inodes_names_and_times_are_the_same_after_a_remount(tmp_path: Path) -> None:
    def look(mount: Mounted) -> dict[str, tuple[int, ...]]:
        found = walk(mount.directory)
        del found[".xbfs/status.json"], found[".xbfs/metrics"]
        return {name: (s.st_ino, s.st_mode, s.st_size, s.st_blocks, s.st_mtime_ns) for name, s in found.items()}

    mount = make(tmp_path)
    with mount:
        before = look(mount)
        kept = os.open(mount.directory, os.O_RDONLY | os.O_DIRECTORY)
        os.close(kept)
    with mount:
        assert look(mount) == before
    hard_links = [name for name in before if name.startswith(("by-id/", "at/20"))]
    assert len(hard_links) == 6
    assert len({inode for inode, *_ in before.values()}) == len(before)


def test_a_file_handle_survives_the_server(tmp_path: Path) -> None:
    """What NFS needs: a handle taken before a restart opens its file when nothing is cached."""
    program = Path(__file__).parent / "file_handle.py"

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(["/usr/bin/python3", program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    mount = make(tmp_path)
    with mount:
        image = run("take", mount.vm / TIMES[0] / "disks/0.raw")
        directory = run("take", mount.vm / TIMES[0] / "disks")
    with mount:
        assert run("read", mount.directory, image, "0", "16") == OLD[:16].hex()
        assert run("list", mount.directory, directory) == "0.raw 0.vhd 1.raw 1.vhd"
        assert mount.disk.read_bytes() == NEW
