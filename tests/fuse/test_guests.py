"""Guests' files in the mounted tree are what the guest's own kernel saw: every name, attribute, target and byte."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import guest_golden, xfs_golden
from tests.support.guest_mounts import guest_mount
from tests.support.guest_sources import SparseSource
from tests.support.guest_tree import Facts, first_difference, kernel_facts
from xbfs.fuse.mount import DataPlaneKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.mounts import Mounted

FACTS = {
    0: lambda: guest_golden.kernel_said("ext4"),
    1: lambda: guest_golden.kernel_said("btrfs"),
    2: lambda: xfs_golden.facts("v5"),
    3: lambda: guest_golden.kernel_said("ext4-dirty"),
}
WRITTEN = {4: "ntfs", 5: "fat", 6: "exfat"}
SPARSE = 64 << 20


@pytest.fixture(scope="module")
def guests(data_plane: DataPlaneKind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    images = [guest_golden.image("ext4"), guest_golden.image("btrfs"), xfs_golden.image("v5")]
    images += [guest_golden.image(name) for name in ("ext4-dirty", "ntfs", "fat", "exfat")]
    with guest_mount(tmp_path_factory.mktemp("guests"), *images, SparseSource(1 << 20, {})) as mount:
        yield mount


def files(mount: Mounted) -> Path:
    return (mount.vm / "latest").resolve() / "files"


def comparable(facts: dict[str, Facts], inodes: dict[str, int], *, seeks: bool) -> dict[str, Facts]:
    """Without what the mount says otherwise on purpose: its own inode numbers, and where links lead."""
    return {
        path: fact._replace(
            inode=inodes[path],
            target="",
            size=0 if fact.kind == "l" else fact.size,
            extents=fact.extents if seeks else (),
        )
        for path, fact in facts.items()
    }


@pytest.mark.parametrize("number", FACTS)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees trusted attributes and owners")
def test_everything_is_as_the_guest_saw_it(guests: Mounted, data_plane: DataPlaneKind, number: int) -> None:
    root = files(guests) / str(number)
    theirs = FACTS[number]()
    seeks = data_plane is DataPlaneKind.DEVICE
    if not seeks and max(fact.size for fact in theirs.values()) > SPARSE:
        pytest.skip("without lseek the holes of a giant are read as zeros, for hours")
    ours = kernel_facts(root)
    numbers: dict[int, int] = {}
    inodes = {
        # Hardlinks share a number; directories and links have one each.
        path: numbers.setdefault(ours[path].inode, fact.inode if fact.kind not in "dl" else ours[path].inode)
        for path, fact in theirs.items()
        if path in ours
    }
    assert len({fact.inode for fact in ours.values()}) == len({f.inode for f in theirs.values()})
    own = {path: inodes.get(path, -1) for path in ours}
    expected = {path: fact.inode if fact.kind not in "dl" else own.get(path, -2) for path, fact in theirs.items()}
    assert first_difference(comparable(ours, own, seeks=seeks), comparable(theirs, expected, seeks=seeks)) == ""
    raw = {
        path: os.fsdecode(os.getxattr(root / path, "security.xbfs.target", follow_symlinks=False))
        for path, fact in ours.items()
        if fact.kind == "l"
    }
    assert raw == {path: fact.target for path, fact in theirs.items() if fact.kind == "l"}


@pytest.mark.parametrize("number", WRITTEN)
def test_every_file_of_windows_is_as_it_was_written(guests: Mounted, number: int) -> None:
    root = files(guests) / str(number)
    written = guest_golden.contents(WRITTEN[number])
    digests = {path: hashlib.sha256((root / path).read_bytes()).hexdigest() for path in written}
    assert digests == written
    assert {(root / path).stat().st_uid for path in written} == {os.getuid()}


def test_each_volume_tells_what_it_is(guests: Mounted) -> None:
    told = {path.name: json.loads(path.read_text()) for path in files(guests).glob("*.json")}
    assert {name: (text["type"], text["state"]) for name, text in told.items()} == {
        "0.json": ("ext4", "clean"),
        "1.json": ("btrfs", "clean"),
        "2.json": ("xfs", "clean"),
        "3.json": ("ext4", "replayed"),
        "4.json": ("ntfs", "clean"),
        "5.json": ("vfat", "clean"),
        "6.json": ("exfat", "clean"),
        "7.json": ("unknown", "unsupported"),
    }
    assert all(text["reason"] for text in told.values() if text["state"] != "clean")
    assert not (files(guests) / "7").exists()
    for path in files(guests).glob("*.json"):
        assert path.stat().st_size == len(path.read_bytes())
    states = {name: os.getxattr(files(guests) / name, "user.xbfs.state") for name in ("0", "3")}
    assert states == {"0": b"clean", "3": b"replayed"}


def test_what_is_not_there_is_not_there(guests: Mounted) -> None:
    for name in ("8", "8.json", "0/nothing", "0/names/a/b", "7"):
        with pytest.raises(OSError) as failure:
            (files(guests) / name).lstat()
        assert failure.value.errno in (errno.ENOENT, errno.ENOTDIR)


def test_our_own_attributes_are_answered_but_not_listed(guests: Mounted) -> None:
    root = files(guests) / "0"
    assert os.getxattr(root / "names", "user.xbfs.btime").endswith(b"Z")
    for path in (root, root / "names", files(guests), files(guests).parent / "root"):
        assert not [name for name in os.listxattr(path) if name.startswith("user.xbfs")]
    notes = os.getxattr(files(guests).parent / "root", "user.xbfs.notes").decode()
    assert notes


def test_getfacl_shows_what_the_guest_set(guests: Mounted) -> None:
    for number in (0, 1, 2):
        root = files(guests) / str(number)
        facts = FACTS[number]()
        path = next(path for path, fact in facts.items() if "system.posix_acl_access" in fact.xattrs)
        told = subprocess.run(["getfacl", "-cpn", root / path], capture_output=True, text=True, check=True).stdout
        assert [line for line in told.splitlines() if line.startswith(("user:", "group:")) and "::" not in line], told


@pytest.mark.skipif(os.geteuid() != 0, reason="device nodes and owners can only be copied by root")
@pytest.mark.parametrize("copy", [("cp", "-a"), ("rsync", "-aHAX"), ("tar",)], ids=lambda words: words[0])
def test_copies_are_true(guests: Mounted, tmp_path_factory: pytest.TempPathFactory, copy: tuple[str, ...]) -> None:
    """Into a filesystem that can hold it all; sparse giants are left out, for the sake of time."""
    target = Path(tmp_path_factory.mktemp("copies"))
    root = files(guests) / "0"
    for top in ("names", "special", "xattrs", "dir40", "link2"):
        if copy[0] == "tar":
            packed = target / "copy.tar"
            options = ["--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner"]
            subprocess.run(["tar", "-C", root, *options, "-cf", packed, top], check=True, capture_output=True)
            subprocess.run(["tar", "-C", target, *options, "-xpf", packed], check=True, capture_output=True)
        else:
            subprocess.run([*copy, root / top, target], check=True, capture_output=True)
        if not (target / top).is_dir():
            continue

        def told(path: Path) -> dict[str, Facts]:
            facts = kernel_facts(path, hidden=lambda name: name.startswith(b"trusted."))
            return {
                name: fact._replace(
                    inode=0,
                    nlink=0 if fact.kind == "d" else fact.nlink,
                    size=0 if fact.kind == "d" else fact.size,
                    allocated=0,
                    extents=(),
                    times=(0, fact.times[1], 0),
                )
                for name, fact in facts.items()
                if fact.kind != "s"
            }

        assert first_difference(told(target / top), told(root / top)) == ""


def test_inode_numbers_are_the_same_after_a_remount(tmp_path: Path) -> None:
    def numbers(mount: Mounted) -> dict[str, int]:
        top = files(mount).parent
        return {str(path.relative_to(top)): path.lstat().st_ino for path in top.rglob("*")}

    mount = guest_mount(tmp_path, guest_golden.image("ext4"))
    with mount:
        before = numbers(mount)
    with mount:
        # Looked at in another order.
        for path in sorted(before, reverse=True)[:50]:
            (files(mount).parent / path).lstat()
        assert numbers(mount) == before
    assert all(0 < number < 1 << 63 for number in before.values())


def test_who_asks_many_files_in_vain_is_told_to_stop_but_gets_what_there_is(guests: Mounted) -> None:
    root = files(guests) / "0"
    plain = sorted((root / "dir300").iterdir())
    told = []
    for path in plain:
        with pytest.raises(OSError) as failure:
            os.getxattr(path, "security.selinux")
        told.append(failure.value.errno)
    assert set(told[:256]) == {errno.ENODATA}
    assert set(told[256:]) == {errno.EOPNOTSUPP}
    facts = FACTS[0]()
    name = "system.posix_acl_access"
    path = next(path for path, fact in facts.items() if name in fact.xattrs)
    for other in plain:
        with pytest.raises(OSError):
            os.getxattr(other, name)
    assert os.getxattr(root / path, name)
