"""unlock: a mount in the background gets the key of a volume that qemu encrypted, and shows its files from then on."""

from __future__ import annotations

import stat
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.support import guest_golden
from tests.support.cli import World

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECRET = "open sesame"
BUSY = b"accurate CPU usage"


def encrypt(plain: Path, device: Path) -> None:
    """LUKS1 by qemu, which has to measure the processor first and gives up while something else keeps that busy."""
    command = [
        "qemu-img", "convert", "--object", f"secret,id=s,data={SECRET}", "-f", "raw", "-O", "luks",
        "-o", "key-secret=s,iter-time=10", plain, device,
    ]  # fmt: skip
    for _ in range(12):
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode == 0:
            return
        assert BUSY in done.stderr, done.stderr
    raise AssertionError(done.stderr)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("unlock")
    source = guest_golden.image("ext4")
    (folder / "plain").write_bytes(source.read_at(0, source.size_bytes))
    encrypt(folder / "plain", folder / "locked")
    world = World(folder)
    world.good("init")
    world.good("backup", "image", folder / "plain", folder / "locked", "--vm", "web")
    return world


@pytest.fixture
def point(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A restore point in a mount of its own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(world.directory))
    mount = tmp_path / "mnt"
    mount.mkdir()
    world.good("mount", mount, "--background")
    try:
        yield mount / "vms/web/latest"
    finally:
        world.good("umount", mount)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def facts(top: Path) -> dict[Path, tuple[object, ...]]:
    """What everything below is; of small files what they hold, too."""
    found: dict[Path, tuple[object, ...]] = {}
    for path in top.rglob("*"):
        status = path.lstat()
        small = stat.S_ISREG(status.st_mode) and status.st_size < 1 << 20
        content = path.read_bytes() if small else b""
        found[path.relative_to(top)] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_uid, content)
    return found


def test_a_key_opens_the_volume_in_the_mount_that_runs(world: World, point: Path) -> None:
    files = point / "files"
    assert '"locked"' in (files / "1.json").read_text()
    assert names(files) == ["0", "0.json", "1.json"]

    wrong = world.run("unlock", point, XBFS_UNLOCK="not this one")
    assert wrong.code == 94, wrong.err
    assert "not this one" not in wrong.err
    assert names(files) == ["0", "0.json", "1.json"]

    done = world.run("unlock", point.parent, "--volume", "1", "--json", XBFS_UNLOCK=SECRET)
    assert done.code == 0, done.err
    assert done.json["opened"] == ["1"]
    assert '"clean"' in (files / "1.json").read_text()
    there = facts(files / "0")
    assert len(there) > 500
    assert facts(files / "1") == there

    again = world.run("unlock", point, XBFS_UNLOCK=SECRET)
    assert again.code == 0
    assert b"no volume is locked" in again.out
    everything = b"".join(path.read_bytes() for path in world.directory.rglob("*.log"))
    assert SECRET.encode() not in everything


def test_a_file_with_the_key_and_a_line_end(world: World, point: Path) -> None:
    (world.directory / "key").write_text(SECRET + "\n")
    done = world.run("unlock", point, XBFS_UNLOCK_FILE=str(world.directory / "key"))
    assert done.code == 0, done.err
    assert "opened 1;" in done.out.decode()


def test_points_that_come_later_are_open_too(world: World, point: Path) -> None:
    assert world.run("unlock", point, XBFS_UNLOCK=SECRET).code == 0
    device = world.directory / "locked"
    newer = world.good("backup", "image", world.directory / "plain", device, "--vm", "web", "--json").json
    opened = point.parents[2] / "by-id" / newer["point"]["id"] / "files" / "1"
    deadline = time.monotonic() + 30
    while not opened.is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_key_that_is_there_at_the_mount(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(world.directory))
    (tmp_path / "mnt").mkdir()
    assert world.run("mount", tmp_path / "mnt", "--background", XBFS_UNLOCK=SECRET).code == 0
    try:
        assert '"clean"' in (tmp_path / "mnt/vms/web/latest/files/1.json").read_text()
    finally:
        world.good("umount", tmp_path / "mnt")


def test_what_is_no_place_in_a_mount(world: World, point: Path) -> None:
    assert world.run("unlock", world.directory, XBFS_UNLOCK="x").code == 65
    assert world.run("unlock", point.parents[1], XBFS_UNLOCK="x").code == 2
    silent = world.run("unlock", point)
    assert silent.code == 56
    assert "XBFS_UNLOCK" in silent.err
