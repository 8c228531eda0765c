"""The live tree without FUSE: what is shown, what is open, stubs, inode numbers, and that nothing leaks."""

from __future__ import annotations

import errno
import gc
import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import CHUNK, MemoryDisk
from tests.support.runtime import FixedClock
from xbfs.vfs.live.attributes import OWN, ROOT
from xbfs.vfs.live.calls import Refused
from xbfs.vfs.live.changes import Asker, Changes
from xbfs.vfs.live.disks import LiveDisk
from xbfs.vfs.live.stubs import place_stub, stub_keys
from xbfs.vfs.live.tree import LiveTree
from xbfs.view.overlay import create_overlay
from xbfs_engine.core.errors import SessionBusy, SessionExists, StorageError, TargetExists, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs.view.overlay import Overlay

ME = Asker(os.getuid(), os.getgid())
SIZE = 5 * CHUNK + 100


@pytest.fixture
def base() -> MemoryDisk:
    return MemoryDisk.holding(SIZE, [0, 2])


@pytest.fixture
def overlay(tmp_path: Path, base: MemoryDisk) -> Iterator[Overlay]:
    with create_overlay(tmp_path / "overlay", base, identity=b"x") as made:
        yield made


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A session's directory with one stub."""
    place_stub(tmp_path / "tree", "sr/disk.raw", "0")
    return tmp_path / "tree"


@pytest.fixture
def tree(home: Path, overlay: Overlay) -> LiveTree:
    made = LiveTree(FixedClock())
    made.add("vm", home, {"0": overlay})
    return made


def refusal(code: int) -> pytest.RaisesContext[OSError]:  # type: ignore[name-defined]
    return pytest.raises(OSError, match=os.strerror(code))


def walked(tree: LiveTree, *names: str) -> int:
    inode = ROOT
    for name in names:
        inode = tree.lookup(inode, name.encode()).inode
    return inode


def descriptors() -> set[str]:
    gc.collect()  # those that earlier tests left behind may be closed any time
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_a_stub_shows_its_disk(tree: LiveTree, home: Path, overlay: Overlay) -> None:
    found = tree.attributes(walked(tree, "vm", "sr", "disk.raw"))
    assert found.size_bytes == overlay.size_bytes == SIZE
    assert found.nlink == 1
    assert found.inode == (home / "sr/disk.raw").stat().st_ino
    assert (home / "sr/disk.raw").stat().st_size == 0


def test_stubs_are_placed_once_and_nowhere_else(home: Path) -> None:
    place_stub(home, "sr/disk.raw", "0")
    place_stub(home, "a/b/c.vhd", "1")
    assert stub_keys(home) == {"0": ["sr/disk.raw"], "1": ["a/b/c.vhd"]}
    with pytest.raises(TargetExists):
        place_stub(home, "sr/disk.raw", "1")
    with pytest.raises(StorageError):
        place_stub(home, "sr/disk.raw/below", "2")
    for path, key in (("../x", "2"), ("/x", "2"), ("", "2"), ("x", "../0"), ("x", "..")):
        with pytest.raises(UsageError):
            place_stub(home, path, key)


def test_keys_are_found_where_clients_have_put_them(tree: LiveTree, home: Path) -> None:
    changes = Changes(tree.nodes)
    sr, disk = walked(tree, "vm", "sr"), walked(tree, "vm", "sr", "disk.raw")
    changes.link(disk, walked(tree, "vm"), b"second")
    assert stub_keys(home) == {"0": ["second", "sr/disk.raw"]}
    changes.unlink(sr, b"disk.raw")
    assert stub_keys(home) == {"0": ["second"]}
    assert tree.attributes(disk).nlink == 1
    changes.unlink(walked(tree, "vm"), b"second")
    assert stub_keys(home) == {"0": []}
    assert tree.attributes(disk).nlink == 0


def test_who_is_added_and_removed(tree: LiveTree, home: Path, overlay: Overlay, tmp_path: Path) -> None:
    with pytest.raises(SessionExists):
        tree.add("vm", home, {})
    with pytest.raises(StorageError):
        tree.add("again", home, {"0": overlay})
    with pytest.raises(StorageError):
        tree.add("other", tmp_path / "missing", {})
    place_stub(tmp_path / "empty", "x", "0")
    with pytest.raises(StorageError, match="no stub"):
        tree.add("empty", tmp_path / "empty", {"7": overlay})
    with pytest.raises(SessionExists):
        tree.add(".frozen", tmp_path / "empty", {})
    disk = tree.open(walked(tree, "vm", "sr", "disk.raw"), os.O_RDWR)
    assert tree.is_busy("vm")
    with pytest.raises(SessionBusy):
        tree.remove("vm")
    tree.close(disk)
    assert not tree.is_busy("vm")
    tree.remove("vm")
    with refusal(errno.ENOENT):
        walked(tree, "vm")
    tree.remove("vm")
    tree.add("vm", home, {"0": overlay})
    inode = (home / "sr/disk.raw").stat().st_ino
    assert tree.lookup(inode, b".").size_bytes == SIZE, "the kernel still knew it"
    assert walked(tree, "vm", "sr", "disk.raw") == inode


def test_files_that_are_open_when_a_session_goes_give_errors(tree: LiveTree) -> None:
    inode = walked(tree, "vm", "sr", "disk.raw")
    disk = tree.open(inode, os.O_RDWR)
    assert len(b"".join(disk.parts_now(0, 100))) == 100
    tree.remove("vm", force=True)
    assert disk.parts_cached(0, 100) is None
    with refusal(errno.EIO):
        disk.parts_now(0, 100)
    with refusal(errno.ESTALE):
        tree.attributes(inode)
    tree.close(disk)


def test_removing_by_force_waits_for_who_is_inside(tree: LiveTree, base: MemoryDisk) -> None:
    entered, go_on = threading.Event(), threading.Event()
    read = base.parts_at

    def slow(offset: int, length: int) -> object:
        entered.set()
        go_on.wait(10)
        return read(offset, length)

    base.parts_at = slow  # type: ignore[method-assign,assignment]  # a storage that takes its time
    disk = tree.open(walked(tree, "vm", "sr", "disk.raw"), os.O_RDWR)
    reader = threading.Thread(target=disk.parts_now, args=(0, 100))
    reader.start()
    entered.wait(10)
    remover = threading.Thread(target=tree.remove, args=("vm",), kwargs={"force": True})
    remover.start()
    remover.join(0.1)
    assert remover.is_alive()
    go_on.set()
    remover.join(10)
    assert not remover.is_alive()
    reader.join()


def test_images_are_shown_for_a_while(tree: LiveTree, base: MemoryDisk) -> None:
    tree.show_images("vm", {"0.raw": base})
    inode = walked(tree, ".frozen", "vm", "0.raw")
    assert inode > OWN
    found = tree.attributes(inode)
    assert (found.size_bytes, stat.S_IMODE(found.mode)) == (SIZE, 0o400)
    assert tree.names(ROOT) == [b"vm"], "who does not know of it does not see it"
    image = tree.open(inode, os.O_RDONLY)
    assert b"".join(image.parts_now(0, SIZE)) == base.read_at(0, SIZE)
    with refusal(errno.EROFS):
        tree.open(inode, os.O_RDWR)
    with refusal(errno.EROFS):
        Changes(tree.nodes).make(walked(tree, ".frozen", "vm"), b"x", 0o600, ME)
    tree.hide_images("vm")
    with refusal(errno.ESTALE):
        tree.attributes(inode)
    with refusal(errno.ENOENT):
        walked(tree, ".frozen", "vm")


def test_generations_tell_files_with_one_number_apart(tree: LiveTree, home: Path) -> None:
    changes = Changes(tree.nodes)
    top = walked(tree, "vm")
    seen: dict[int, set[int]] = {}
    for _ in range(50):
        made = changes.make(top, b"file", stat.S_IFREG | 0o600, ME)
        assert tree.lookup(top, b"file")[:2] == made[:2]
        changes.unlink(top, b"file")
        tree.forget(made.inode, 2)
        seen.setdefault(made.inode, set()).add(made.generation)
    assert sum(len(generations) for generations in seen.values()) == 50


def test_a_file_is_found_by_its_number_alone(tree: LiveTree, home: Path, overlay: Overlay) -> None:
    (home / "a/b").mkdir(parents=True)
    (home / "a/b/file").touch()
    (home / "a/link").symlink_to("/etc")
    inside = (home / "a/b/file").stat().st_ino
    for inode in (inside, (home / "a").stat().st_ino, (home / "sr/disk.raw").stat().st_ino, home.stat().st_ino):
        assert tree.lookup(inode, b".").inode == inode
    above = tree.lookup((home / "a").stat().st_ino, b"..").inode
    assert above == home.stat().st_ino
    assert tree.lookup(above, b"..").inode == ROOT
    for inode in (home.parent.stat().st_ino, (home.parent / "overlay/data").stat().st_ino, 1 << 40):
        with refusal(errno.ESTALE):
            tree.lookup(inode, b".")


def test_nothing_outside_is_reached(tree: LiveTree, home: Path) -> None:
    (home / "out").symlink_to("/")
    out = tree.lookup(walked(tree, "vm"), b"out").inode
    assert tree.readlink(out) == b"/"
    with refusal(errno.ENOTDIR):
        tree.lookup(out, b"etc")
    with refusal(errno.ELOOP):
        tree.open(out, os.O_RDONLY)
    with refusal(errno.EPERM):
        Changes(tree.nodes).make(walked(tree, "vm"), b"null", stat.S_IFCHR | 0o666, ME)


def test_no_descriptor_is_lost(home: Path, overlay: Overlay) -> None:
    before = descriptors()
    tree = LiveTree(FixedClock())
    tree.add("vm", home, {"0": overlay})
    changes = Changes(tree.nodes)
    known: list[int] = []
    top = walked(tree, "vm")
    known.append(top)
    for number in range(20):
        known.append(changes.make(top, f"{number}".encode(), stat.S_IFREG | 0o600, ME).inode)
        file = tree.open(known[-1], os.O_RDWR)
        tree.close(file)
        with refusal(errno.EEXIST):
            changes.make(top, f"{number}".encode(), stat.S_IFDIR | 0o700, ME)
        with refusal(errno.ENOENT):
            tree.lookup(top, b"none")
    for inode in known:
        tree.forget(inode, 1)
    tree.remove("vm")
    assert descriptors() <= before


def test_a_write_behind_the_end_and_one_too_far(overlay: Overlay, tmp_path: Path) -> None:
    (tmp_path / "stub").touch()
    disk = LiveDisk(overlay, os.open(tmp_path / "stub", os.O_PATH), FixedClock())
    disk.write_at(SIZE + 10, b"behind", 6)
    assert overlay.read_at(SIZE - 1, 100)[1:] == bytes(10) + b"behind"
    with pytest.raises(Refused, match=os.strerror(errno.EFBIG)):
        disk.write_at((1 << 53) + 1, b"x", 1)
    os.close(disk.stub)
