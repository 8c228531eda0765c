"""Kept images of guests' filesystems restored: what appears is what the kernel saw in them, also by way of GNU tar."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import guest_golden, xfs_golden
from tests.support.get_files import IS_ROOT, Listening, get, guest_on
from tests.support.guest_tree import kernel_facts
from xbfs_engine.restore.files.records import Account
from xbfs_engine.restore.files.restoring import Options, Source, restore_files
from xbfs_engine.restore.files.tar_target import FileOutput, TarTarget
from xbfs_engine.storage.files import AtomicOutput

if TYPE_CHECKING:
    from tests.support.guest_tree import Facts
    from xbfs_engine.formats.source import BlockSource

UNIX = ("ext4", "btrfs", "ext4-dirty", "ext3-dirty", "xfs-v5")
WINDOWS = ("ntfs", "fat", "exfat")
WITHOUT_ROOT = frozenset(("owner", "device", "xattrs", "mode"))
"""What nobody but root restores all of: suid goes with the owner, and modes become narrower where an ACL is refused."""

HIDDEN = "s" if IS_ROOT else "sbc"


def _image(name: str) -> BlockSource:
    if name.startswith("xfs-"):
        return xfs_golden.image(name.removeprefix("xfs-"))
    return guest_golden.image(name)


def _said(name: str) -> dict[str, Facts]:
    said = xfs_golden.facts(name.removeprefix("xfs-")) if name.startswith("xfs-") else guest_golden.kernel_said(name)
    return {path: facts for path, facts in said.items() if path != "." and facts.kind not in HIDDEN}


def _differences(found: dict[str, Facts], said: dict[str, Facts], *, atime: bool) -> list[str]:
    """Numbers of inodes, sizes of directories and where exactly holes are belong to the filesystem."""
    found = {path: facts for path, facts in found.items() if facts.kind not in HIDDEN}
    different = [f"{path}: only on one side" for path in (found.keys() - {"."}) ^ said.keys()]
    for path in found.keys() & said.keys():
        ours, theirs = found[path], said[path]
        fields = {"kind", "mode", "owner", "device", "xattrs", "target"} - (frozenset() if IS_ROOT else WITHOUT_ROOT)
        if theirs.kind == "f":
            fields |= {"size", "nlink"} | ({"content"} if theirs.size <= 64 << 20 else set())
        different += [
            f"{path}: {field} {getattr(ours, field)} {getattr(theirs, field)}"
            for field in fields
            if getattr(ours, field) != getattr(theirs, field)
        ]
        if ours.times[1] != theirs.times[1] or (atime and ours.times[0] != theirs.times[0]):
            different.append(f"{path}: times {ours.times} {theirs.times}")
        if theirs.size > 64 << 20 and ours.allocated > 1 << 20:
            different.append(f"{path}: it is not sparse: {ours.allocated}")
    return different


@pytest.fixture
def roomy(tmp_path: Path) -> Path:
    """A directory whose filesystem holds all times and attributes, if there is one."""
    folder = Path("/dev/shm") / f"xbfs-get-{os.getpid()}"
    try:
        folder.mkdir()
        os.setxattr(folder, "user.probe", b"x" * 2000)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip("/dev/shm does not hold attributes")
    return folder


@pytest.fixture(autouse=True)
def _cleared() -> object:
    yield
    shutil.rmtree(Path("/dev/shm") / f"xbfs-get-{os.getpid()}", ignore_errors=True)


@pytest.mark.parametrize("name", UNIX)
def test_a_volume_comes_back_as_it_was(name: str, roomy: Path) -> None:
    account, listening = get(guest_on(_image(name)), ["/"], roomy, volume="0")
    assert not listening.failures
    if IS_ROOT:
        assert not account.losses
    assert not _differences(kernel_facts(roomy), _said(name), atime=True)


@pytest.mark.parametrize("name", ["ext4", "btrfs", "xfs-v5"])
def test_gnu_tar_restores_the_archive(name: str, roomy: Path, tmp_path: Path) -> None:
    if not IS_ROOT:
        pytest.skip("restoring owners and devices needs root")
    archive = tmp_path / "x.tar"
    account, listening = Account(), Listening()
    with AtomicOutput(archive, overwrite=False) as output:
        target = TarTarget(FileOutput(output), account, owner=(0, 0), with_owner=True)
        restore_files([Source(guest_on(_image(name)), b"/", "0")], target, Options(), listening)
    assert not listening.failures
    assert not account.losses
    command = [
        "tar",
        "--xattrs",
        "--xattrs-include=*",
        "--acls",
        "--same-owner",
        "-xpf",
        str(archive),
        "-C",
        str(roomy),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert archive.stat().st_size < 32 << 20, "holes of many GiB are in it"
    assert not _differences(kernel_facts(roomy), _said(name), atime=False)


@pytest.mark.parametrize("name", WINDOWS)
def test_files_of_windows_come_back(name: str, tmp_path: Path) -> None:
    _, listening = get(guest_on(guest_golden.image(name)), ["/"], tmp_path, volume="0", with_owner=False)
    for path, digest in guest_golden.contents(name).items():
        if ":" in path:  # streams come when they are asked for; short ones as attributes, too
            get(guest_on(guest_golden.image(name)), ["/" + path], tmp_path / "files", volume="0")
        if os.fsencode("/" + path) not in listening.failed_paths:
            assert hashlib.sha256((tmp_path / path).read_bytes()).hexdigest() == digest, path
    assert listening.failed_paths in ([], [b"/links/deduplicated"])


def test_windows_names_are_found_without_case(tmp_path: Path) -> None:
    guest = guest_on(guest_golden.image("ntfs"))
    top = sorted(entry.entry.name for entry in guest.list("0", guest.root("0")).entries if entry.entry.name == b"files")
    assert top == [b"files"]
    get(guest, ["C:\\FILES\\OF1"], tmp_path, volume="0")
    assert [path.name for path in tmp_path.iterdir()] == ["of1"]
