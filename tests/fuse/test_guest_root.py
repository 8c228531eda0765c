"""`root/` of guests with several volumes, and what `files/` tells of volumes that hold no files."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support import guest_golden
from tests.support.cli import World
from tests.support.guest_mounts import guest_mount
from tests.support.guest_sources import SparseSource
from tests.support.volume_images import golden_disks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from xbfs.fuse.mount import DataPlaneKind

ROOT_UUID = "5b8c0a6a-5a0f-4b3e-9a51-2b7a6a1d8f01"
HOME_UUID = "5b8c0a6a-5a0f-4b3e-9a51-2b7a6a1d8f02"
FSTAB = f"""\
UUID={ROOT_UUID} /      ext4 defaults 0 1
UUID={HOME_UUID} /home  ext4 defaults 0 2
UUID=00000000-0000-0000-0000-00000000dead /srv ext4 nofail 0 2
/dev/xvdc        none   swap sw 0 0
"""


def ext4(folder: Path, name: str, uuid: str, tree: Path) -> SparseSource:
    image = folder / name
    command = [shutil.which("mke2fs") or "/sbin/mke2fs", "-q", "-t", "ext4", "-U", uuid, "-d", tree, image, "8M"]
    subprocess.run(command, check=True, capture_output=True)
    return SparseSource.of_file(image)


def swap(folder: Path) -> SparseSource:
    image = folder / "swap"
    with image.open("wb") as file:
        file.truncate(1 << 20)
    subprocess.run([shutil.which("mkswap") or "/sbin/mkswap", image], check=True, capture_output=True)
    return SparseSource.of_file(image)


@pytest.fixture(scope="module")
def point(tmp_path_factory: pytest.TempPathFactory, data_plane: DataPlaneKind) -> Iterator[Path]:
    """Disks: root, home, swap, and one of three that a volume group needs."""
    folder = tmp_path_factory.mktemp("root")
    root, home = folder / "root", folder / "home"
    for name in ("etc", "bin", "sbin", "usr", "home/hidden", "srv"):
        (root / name).mkdir(parents=True)
    (root / "etc/fstab").write_text(FSTAB)
    (root / "etc/os-release").write_text("ID=test\n")
    (root / "etc/settings").symlink_to("/home/me/settings")
    (home / "me").mkdir(parents=True)
    (home / "me/settings").write_text("mine\n")
    (home / "me/system").symlink_to("../../etc/os-release")
    (home / "me/escape").symlink_to("../../../../../../../etc/os-release")
    physical = folder / "physical"
    physical.write_bytes(golden_disks("lvm")[0])
    disks = [ext4(folder, "0", ROOT_UUID, root), ext4(folder, "1", HOME_UUID, home), swap(folder)]
    with guest_mount(folder, *disks, SparseSource.of_file(physical)) as mounted:
        yield (mounted.vm / "latest").resolve()


def test_the_tree_is_that_of_the_fstab(point: Path) -> None:
    root = point / "root"
    assert (root / "etc/fstab").read_text() == FSTAB
    assert [path.name for path in (root / "home").iterdir() if path.name != "lost+found"] == ["me"]
    assert (root / "home/me/settings").read_text() == "mine\n"
    assert [path.name for path in (point / "files/0/home").iterdir()] == ["hidden"], "what is mounted over it"
    assert (root / "home/..").samefile(root)
    notes = os.getxattr(root, "user.xbfs.notes").decode()
    assert "/srv" in notes


def test_links_lead_from_one_volume_into_the_other_and_no_further(point: Path) -> None:
    root = point / "root"
    assert (root / "etc/settings").read_text() == "mine\n"
    assert (root / "home/me/system").read_text() == "ID=test\n"
    assert (root / "home/me/escape").read_text() == "ID=test\n"
    assert (root / "home/me/escape").resolve() == root / "etc/os-release"
    alone = point / "files/1/me"
    assert not (alone / "system").exists(), "in its own volume there is no such file"
    assert (alone / "system").resolve().is_relative_to(point / "files/1")


def test_volumes_without_files_say_what_they_are(point: Path) -> None:
    texts = {path.stem: json.loads(path.read_text()) for path in (point / "files").glob("*.json")}
    assert {name: (text["type"], text["state"]) for name, text in texts.items() if not name.startswith("vg0")} == {
        "0": ("ext4", "clean"),
        "1": ("ext4", "clean"),
        "2": ("swap", "unsupported"),
        "3": ("LVM2_member", "unsupported"),
    }
    assert "vg0" in texts["3"]["reason"]
    assert all(text["reason"] for name, text in texts.items() if text["state"] != "clean")
    directories = {path.name for path in (point / "files").iterdir() if path.is_dir()}
    assert directories == {"0", "1"}
    notes = os.getxattr(point / "files", "user.xbfs.notes").decode()
    assert "missing" in notes


@pytest.mark.parametrize("ownership", ["guest", "operator"])
def test_whose_files_they_are_can_be_chosen(tmp_path: Path, ownership: str) -> None:
    world = World(tmp_path)
    golden = guest_golden.image("ext4")
    (tmp_path / "disk").write_bytes(golden.read_at(0, golden.size_bytes))
    (tmp_path / "mnt").mkdir()
    world.good("init")
    world.good("backup", "image", tmp_path / "disk", "--vm", "web")
    world.good("mount", tmp_path / "mnt", "--background", "--ownership", ownership)
    try:
        top = tmp_path / "mnt/vms/web/latest/files/0"
        statuses = [path.lstat() for path in top.rglob("*")]
        owners = {status.st_uid for status in statuses}
        if ownership == "guest":
            assert len(owners) > 1
        else:
            assert owners == {os.getuid()}
            plain = [status.st_mode for status in statuses if stat.S_ISREG(status.st_mode)]
            assert all(mode & stat.S_IRUSR for mode in plain)
    finally:
        world.good("umount", tmp_path / "mnt")


def test_without_a_system_there_is_no_tree_and_it_says_why(tmp_path: Path) -> None:
    with guest_mount(tmp_path, guest_golden.image("ext4"), guest_golden.image("btrfs")) as mounted:
        root = (mounted.vm / "latest").resolve() / "root"
        assert list(root.iterdir()) == []
        assert os.getxattr(root, "user.xbfs.notes")
