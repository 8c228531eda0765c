"""What real mkfs programs make, as blkid sees it: the same kind, label and UUID from us."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.volume_images import BytesSource, by_name, golden_disks, scan
from xbfs_engine.guestfs.volumes import VolumeStatus
from xbfs_engine.guestfs.volumes.probe import probe

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
MADE = {
    "ext2": (4, "mkfs.ext2", "-q", "-L", "label two"),
    "ext3": (8, "mkfs.ext3", "-q", "-L", "läbel3"),
    "ext4": (8, "mkfs.ext4", "-q", "-L", "exactly16letters"),
    "ext4-small-blocks": (8, "mkfs.ext4", "-q", "-b", "1024", "-O", "^has_journal"),
    "ext4-large-blocks": (16, "mkfs.ext4", "-q", "-F", "-b", "65536"),
    "jbd": (8, "mke2fs", "-q", "-O", "journal_dev"),
    "xfs": (320, "mkfs.xfs", "-q", "-L", "xfslabel"),
    "btrfs": (120, "mkfs.btrfs", "-q", "-L", "butter"),
    "ntfs": (4, "mkfs.ntfs", "-q", "-F", "-Q", "-L", "Däten"),
    "ntfs-large-clusters": (8, "mkfs.ntfs", "-q", "-F", "-Q", "-c", "65536", "-L", "system"),
    "fat12": (2, "mkfs.vfat", "-F", "12", "-n", "FLOPPY"),
    "fat16": (16, "mkfs.vfat", "-F", "16", "-n", "SIXTEEN"),
    "fat32": (48, "mkfs.vfat", "-F", "32", "-n", "THIRTY TWO"),
    "fat32-4k": (320, "mkfs.vfat", "-F", "32", "-S", "4096"),
    "exfat": (8, "mkfs.exfat", "-L", "Extündet"),
    "swap": (2, "mkswap", "-L", "swapped"),
    "swap-large-pages": (2, "mkswap", "-p", "65536"),
    "luks1": (4, "cryptsetup", "-q", "luksFormat", "--type", "luks1", "--pbkdf-force-iterations", "1000"),
    "luks2": (
        20, "cryptsetup", "-q", "luksFormat", "--type", "luks2", "--label", "secret",
        "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
    ),
}  # fmt: skip


def run(*command: str | Path, given: str = "", may_fail: bool = False) -> str:
    program = shutil.which(str(command[0]), path=PATH)
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    environment = {"PATH": PATH, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [program, *map(str, command[1:])], input=given, capture_output=True, text=True, check=False, env=environment
    )
    assert may_fail or done.returncode == 0, done.stderr
    return done.stdout


def blkid(path: Path) -> dict[str, str]:
    """What blkid found; in this form of its output only labels are escaped, and only as ``\\xNN``."""
    found = dict(line.split("=", 1) for line in run("blkid", "-p", "-o", "udev", path, may_fail=True).splitlines())
    label = re.sub(
        rb"\\x(..)", lambda match: bytes.fromhex(match[1].decode()), found.get("ID_FS_LABEL_ENC", "").encode()
    )
    return {"TYPE": found.get("ID_FS_TYPE", ""), "UUID": found.get("ID_FS_UUID", ""), "LABEL": label.decode()}


@pytest.mark.parametrize("case", MADE)
def test_blkid_says_the_same(tmp_path: Path, case: str):
    size, *command = MADE[case]
    path = tmp_path / "device"
    path.touch()
    os.truncate(path, size * MIB)
    run(*command, path, given="secret" if command[0] == "cryptsetup" else "")
    theirs = blkid(path)
    data = path.read_bytes()
    source = BytesSource(data)
    ours = probe(source).signature
    assert ours.kind == theirs["TYPE"]
    assert (ours.label, ours.uuid) == (theirs["LABEL"], theirs["UUID"])
    assert ours.size_bytes <= size * MIB
    if "luks" not in case:
        assert ours.size_bytes > size * MIB // 2
    assert source.read_bytes < MIB
    row = by_name(scan({0: data}))["0"]
    assert (row.kind, row.label, row.uuid) == (ours.kind, ours.label, ours.uuid)


@pytest.mark.parametrize("case", ["md", "md_mirrors", "lvm"])
def test_blkid_says_the_same_of_members(tmp_path: Path, case: str):
    for number, data in golden_disks(case).items():
        path = tmp_path / str(number)
        path.write_bytes(data)
        theirs = blkid(path)
        ours = probe(BytesSource(data)).signature
        assert (ours.kind, ours.uuid) == (theirs["TYPE"], theirs["UUID"]), number
        if theirs["LABEL"]:
            assert ours.label == theirs["LABEL"]


def test_an_image_of_a_cd(tmp_path: Path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"x" * 3_000_000)
    path = tmp_path / "cd"
    run("genisoimage", "-quiet", "-J", "-R", "-V", "A DISC", "-o", path, tmp_path / "tree")
    theirs = blkid(path)
    ours = probe(BytesSource(path.read_bytes())).signature
    assert (ours.kind, ours.label, ours.uuid) == (theirs["TYPE"], theirs["LABEL"], theirs["UUID"])


def test_a_filesystem_larger_than_its_device_is_listed_with_that(tmp_path: Path):
    path = tmp_path / "device"
    path.touch()
    os.truncate(path, 8 * MIB)
    run("mkfs.ext4", "-q", path)
    row = by_name(scan({0: path.read_bytes()[: 6 * MIB]}))["0"]
    assert row.status is VolumeStatus.FILESYSTEM
    assert row.reason == f"it claims {8 * MIB} bytes on a device of {6 * MIB}"


def test_a_whole_disk_filesystem_over_an_old_gpt_wins(tmp_path: Path):
    path = tmp_path / "device"
    path.touch()
    os.truncate(path, 8 * MIB)
    run("sfdisk", "-q", path, given="label: gpt\nsize=2MiB\n")
    run("mkfs.ext4", "-q", "-F", path)
    rows = by_name(scan({0: path.read_bytes()}))
    assert [row.kind for row in rows.values()] == ["ext4"]


def test_partitions_on_what_was_a_whole_disk_filesystem_win(tmp_path: Path):
    path = tmp_path / "device"
    path.touch()
    os.truncate(path, 8 * MIB)
    run("mkfs.ext4", "-q", path)
    run("sfdisk", "-q", "--wipe", "never", path, given="label: dos\nsize=2MiB\n")
    assert set(by_name(scan({0: path.read_bytes()}))) == {"0p1"}
