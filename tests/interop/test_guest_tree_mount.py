"""Trees put together here against what mount(8) and the kernel make of the same disks and the same fstab."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support.fake_guest import walk_tree
from tests.support.guest_sources import SparseSource
from tests.support.linux_images import why_not
from xbfs_engine.core.runtime import SystemClock
from xbfs_engine.guestfs.reading import GuestReading
from xbfs_engine.guestfs.tree.fstab import parse_fstab
from xbfs_engine.guestfs.volumes import Disk
from xbfs_engine.guestfs.worker.client import GuestWorkers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


MIB = 1 << 20
SIZES_MIB = {"root": 40, "boot": 24, "pool": 120}
LABELS = {"root": "xbfs-root", "boot": "xbfs boot", "pool": "xbfs-pool", "data": "xbfs-data"}

FSTAB = """# /etc/fstab
UUID={root} /              ext4  errors=remount-ro 0 1
LABEL=xbfs\\040boot   /boot  ext4  defaults,nofail
UUID="{data}" /boot/data ext4  ro
UUID={pool} /home  btrfs subvol=/@home,noatime 0 0
UUID={pool} /linked/srv  btrfs subvolid=256
UUID={pool} /mnt/all\\040of\\011it  btrfs subvolid=5
LABEL=xbfs-pool /mnt/default auto defaults
/home/alice   /mnt/alice none bind 0 0
tmpfs         none       swap sw
LABEL=no\\033where /mnt/nowhere ext4 nofail
"""


class Disks(NamedTuple):
    paths: tuple[Path, Path]
    devices: dict[str, str]
    uuids: dict[str, str]


def run(*command: str | Path, given: str = "") -> str:
    done = subprocess.run([*map(str, command)], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextmanager
def looped(path: Path, start: int = 0, size: int = 0) -> Iterator[str]:
    device = run("losetup", "--find", "--show", "--offset", str(start), "--sizelimit", str(size), path)
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def filled(device: str, point: Path) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    run("mount", device, point)
    try:
        yield point
    finally:
        run("umount", point)


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disks]:
    """Disk 0 with a GPT, disk 1 with a filesystem and nothing else."""
    missing = [tool for tool in ("sfdisk", "losetup", "blkid", "unshare", "btrfs") if shutil.which(tool) is None]
    if reason := why_not("ext4") or why_not("btrfs") or ", ".join(missing):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("disks")
    paths = folder / "disk0", folder / "disk1"
    for path, size_mib in zip(paths, (sum(SIZES_MIB.values()) + 4, 24), strict=True):
        path.touch()
        os.truncate(path, size_mib * MIB)
    lines = "".join(f'size={size}M,name="part {name}"\n' for name, size in SIZES_MIB.items())
    run("sfdisk", "--quiet", paths[0], given="label: gpt\n" + lines)
    table = json.loads(run("sfdisk", "--json", paths[0]))["partitiontable"]["partitions"]
    with ExitStack() as stack:
        devices = {
            name: stack.enter_context(looped(paths[0], row["start"] * 512, row["size"] * 512))
            for name, row in zip(SIZES_MIB, table, strict=True)
        }
        devices["data"] = stack.enter_context(looped(paths[1]))
        for name, device in devices.items():
            run("mkfs.btrfs" if name == "pool" else "mkfs.ext4", "-q", "-L", LABELS[name], device)
        uuids = {name: run("blkid", "-p", "-s", "UUID", "-o", "value", device) for name, device in devices.items()}
        fill(devices, uuids, folder)
        yield Disks(paths, devices, uuids)


def fill(devices: dict[str, str], uuids: dict[str, str], folder: Path) -> None:
    with filled(devices["root"], folder / "root") as top:
        for name in ("etc", "usr/bin", "usr/lib", "boot", "home", "srv", "mnt/all of\tit", "mnt/default", "mnt/alice"):
            (top / name).mkdir(parents=True)
        (top / "linked").symlink_to("mnt/..")
        (top / "bin").symlink_to("usr/bin")
        (top / "usr/lib/os-release").write_text("NAME=test\n")
        (top / "etc/os-release").symlink_to("../usr/lib/os-release")
        (top / "etc/fstab").write_text(FSTAB.format(**uuids))
        (top / "home/hidden").write_text("what is mounted over it hides this")
    with filled(devices["boot"], folder / "boot") as top:
        (top / "data").mkdir()
        (top / "vmlinuz").write_text("kernel")
    with filled(devices["data"], folder / "data") as top:
        (top / "numbers").write_text("1 2 3")
    with filled(devices["pool"], folder / "pool") as top:
        for name in ("@srv", "@home", "@root"):
            run("btrfs", "subvolume", "create", top / name)
        run("btrfs", "subvolume", "set-default", top / "@root")
        (top / "@home/alice").mkdir()
        (top / "@home/alice/letter").write_text("dear")
        (top / "@srv/web").write_text("page")
        (top / "@root/default").write_text("the default subvolume")
        (top / "top").write_text("top")


def guest_of(disks: Disks) -> GuestReading:
    return GuestReading([Disk(str(number), SparseSource.of_file(path)) for number, path in enumerate(disks.paths)])


def test_the_tree_is_what_mount_makes_of_it(disks: Disks, tmp_path: Path) -> None:
    fstab = tmp_path / "fstab"
    fstab.write_text(FSTAB.format(**disks.uuids).replace("/home/alice  ", f"{tmp_path}/top/home/alice"))
    point = tmp_path / "top"
    point.mkdir()
    program = """
import json, os, subprocess, sys
subprocess.run(["mount", sys.argv[3], sys.argv[2]], check=True)
done = subprocess.run(["mount", "--all", "--fstab", sys.argv[1], "--target-prefix", sys.argv[2]], capture_output=True)
found = {}
for folder, folders, files in os.walk(sys.argv[2]):
    for name in folders + files:
        path = os.path.join(folder, name)
        is_link, is_folder = os.path.islink(path), os.path.isdir(path)
        content = os.readlink(path) if is_link else None if is_folder else open(path).read()
        found[path[len(sys.argv[2]):]] = content
print(json.dumps([found, done.stderr.decode()]))
"""
    # In a namespace of its own: what it mounts is gone with it. `mount --all` leaves out the root.
    command = ("unshare", "--mount", "/usr/bin/python3", "-c", program, fstab, point, disks.devices["root"])
    found, errors = json.loads(run(*command))
    guest = guest_of(disks)
    tree = guest.tree()
    assert walk_tree(guest, tree) == found, errors
    assert found["/linked"] == "mnt/.."
    assert found["/mnt/default/default"] == "the default subvolume"
    assert found["/boot/data/numbers"] == "1 2 3"
    assert "/home/hidden" not in found
    assert [note for note in tree.notes if "nowhere" not in note] == []


def test_a_sandboxed_worker_tells_the_same_tree(disks: Disks) -> None:
    sources = [Disk(str(number), SparseSource.of_file(path)) for number, path in enumerate(disks.paths)]
    with GuestWorkers(SystemClock()) as workers:
        tree = workers.open("test", sources).tree()
    assert tree == GuestReading(sources).tree()
    assert any("no\\x1bwhere" in note for note in tree.notes)
    assert [mount.path for mount in tree.mounts][:4] == [b"/", b"/boot", b"/home", b"/boot/data"]


def test_rows_tell_the_partitions_as_sfdisk_and_blkid_do(disks: Disks) -> None:
    rows = {row.name: row for row in guest_of(disks).volumes().rows}
    table = json.loads(run("sfdisk", "--json", disks.paths[0]))["partitiontable"]["partitions"]
    for number, (name, entry) in enumerate(zip(SIZES_MIB, table, strict=True), 1):
        row = rows[f"0p{number}"]
        assert (row.part_uuid, row.part_label) == (entry["uuid"].lower(), entry["name"])
        assert row.part_start_bytes == entry["start"] * 512
        assert row.uuid == disks.uuids[name]
    assert (rows["1"].part_uuid, rows["1"].part_start_bytes) == ("", 0)


HARD = r"""
  # a comment
UUID=1	/a\040b	ext4	rw,subvol=/x\040y,foo="a,b" 0 1
LABEL=l\134x   /c//d/  auto
	/dev/sda1 /e\011f\012g xfs defaults 0 2
/dev/sdb1 none swap sw 0 0

//nas/s /net cifs credentials=/etc/x,uid=0
"""


def test_lines_are_read_as_libmount_does(tmp_path: Path) -> None:
    path = tmp_path / "fstab"
    path.write_text(HARD)
    table = run("findmnt", "--tab-file", path, "--json", "--list", "--output", "SOURCE,TARGET,FSTYPE,OPTIONS")
    theirs = json.loads(table)["filesystems"]
    ours = parse_fstab(HARD.encode())
    assert [entry.source.decode() for entry in ours] == [row["source"] for row in theirs]
    assert [entry.kind for entry in ours] == [row["fstype"] for row in theirs]
    targets = [row["target"].rstrip("/").replace("//", "/") for row in theirs]
    assert [entry.target.decode() or "none" for entry in ours] == targets
    assert ours[0].options[b"subvol"] == b"/x y"
    assert "subvol=/x y" in theirs[0]["options"]
