"""Files of a guest written into a directory: what is replaced, what never is, and what becomes of trouble."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import tracemalloc
from functools import partial
from time import monotonic, sleep
from typing import TYPE_CHECKING

import pytest

from tests.support.get_files import IS_ROOT, Listening, get, names, open_files
from tests.support.get_guest import Node, TreeGuest, directory, file, folder, symlink
from tests.support.runtime import SeededRandom
from xbfs_engine.core.errors import (
    ChunkCorrupt,
    GuestDamaged,
    GuestNotFound,
    GuestUnsupported,
    StorageFull,
    StorageUnavailable,
    TargetExists,
    TargetUnwritable,
    UsageError,
)
from xbfs_engine.guestfs.base import Kind
from xbfs_engine.restore.files.directory_target import DirectoryTarget
from xbfs_engine.restore.files.records import Account, Made, Place
from xbfs_engine.restore.files.restoring import Options, Source, restore_files

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from xbfs_engine.guestfs.base import NodeId, Xattr
    from xbfs_engine.guestfs.guest import Page

BIG = bytes(range(256)) * 4096 * 3


def guest(**children: Node) -> TreeGuest:
    return TreeGuest({"0": directory(**children)})


def _slowly(call: Callable[..., None], *arguments: object, **more: object) -> None:
    sleep(0.002)
    call(*arguments, **more)


def test_files_appear_under_their_last_names(tmp_path: Path) -> None:
    tree = guest(etc=directory(a=file(b"1"), sub=directory(b=file(BIG))), c=file(b"3"))
    account, listening = get(tree, ["/etc/sub", "/c"], tmp_path / "out")
    assert names(tmp_path / "out") == {"sub", "sub/b", "c"}
    assert (tmp_path / "out/sub/b").read_bytes() == BIG
    assert (account.totals.files, account.totals.directories, account.totals.content_bytes) == (2, 1, len(BIG) + 1)
    assert not listening.failures
    assert max(tree.read_sizes) <= 1 << 20


def test_every_file_of_many_directories_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading runs ahead of writing: no directory may be taken for one that could not be made."""
    slow = partial(_slowly, os.mkdir)
    monkeypatch.setattr(os, "mkdir", slow)
    tree = guest(**{f"d{n}": folder({b"%d" % m: file(b"x") for m in range(20)}) for n in range(60)})
    account, listening = get(tree, ["/"], tmp_path)
    assert (account.totals.files, account.totals.directories) == (1200, 60)
    assert len(names(tmp_path)) == 1260
    assert not listening.failures


def test_what_exists_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("file")
    tree = guest(file=file(b"g"), dir=directory(a=file(b"a")), link=symlink(b"x"), new=file(b"n"), fifo=Node(Kind.FIFO))
    (tmp_path / "fifo").write_text("mine")
    account, listening = get(tree, ["/"], tmp_path)
    assert sorted(listening.failed_paths) == [b"/dir", b"/fifo", b"/file", b"/link"]
    assert {type(error) for _, error in listening.failures} == {TargetExists}
    assert (tmp_path / "file").read_text() == "mine"
    assert not list((tmp_path / "dir").iterdir())
    assert (account.totals.files, account.totals.directories, account.totals.failed) == (1, 0, 4)


def test_overwriting_replaces_and_never_follows(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("safe")
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").symlink_to("../outside/victim")
    (out / "dir").symlink_to("../outside")
    (out / "link").write_text("old")
    (out / "merged").mkdir(mode=0o500)
    (out / "merged/kept").write_text("kept") if IS_ROOT else None
    tree = guest(
        file=file(b"guest"),
        dir=directory(victim=file(b"guest")),
        link=symlink(b"/etc/passwd"),
        merged=directory(new=file(b"new")),
    )
    _, listening = get(tree, ["/"], out, overwrite=True)
    assert not listening.failures
    assert (outside / "victim").read_text() == "safe"
    assert not (out / "file").is_symlink()
    assert (out / "file").read_bytes() == b"guest"
    assert not (out / "dir").is_symlink()
    assert os.readlink(out / "link") == "/etc/passwd"  # noqa: PTH115 - the target alone
    assert (out / "merged/new").read_bytes() == b"new"
    assert stat.S_IMODE((out / "merged").stat().st_mode) == 0o755


def test_directories_are_never_replaced_by_files(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    _, listening = get(guest(a=file(b"1"), c=symlink(b"x")), ["/"], tmp_path, overwrite=True)
    assert listening.failed_paths == [b"/a"]
    assert (tmp_path / "a/b").is_dir()


def test_a_link_of_the_guest_does_not_lead_out(tmp_path: Path) -> None:
    """A hostile directory lists one name twice: first as a link that leads out, then as a directory."""
    (tmp_path / "outside").mkdir()

    class Doubled(TreeGuest):
        def list(self, volume: str, node: NodeId, cookie: int = 0) -> Page:
            page = super().list(volume, node, cookie)
            return page._replace(
                entries=tuple(
                    row._replace(entry=row.entry._replace(name=b"x")) if row.entry.name in (b"one", b"two") else row
                    for row in page.entries
                )
            )

    for overwrite in (False, True):
        out = tmp_path / f"out{overwrite}"
        tree = Doubled(
            {"0": directory(top=directory(one=symlink(b"../../outside"), two=directory(evil=file(b"evil"))))}
        )
        get(tree, ["/top"], out, overwrite=overwrite)
        assert not list((tmp_path / "outside").iterdir())


def test_holes_stay_holes(tmp_path: Path) -> None:
    content = b"a" * 8192 + bytes(1 << 20) + b"b" * 8192 + bytes(3 << 20)
    holes = ((8192, 1 << 20), (8192 * 2 + (1 << 20), 3 << 20))
    get(guest(sparse=file(content, holes=holes), small=file(bytes(8192), holes=((0, 8192),))), ["/"], tmp_path)
    assert (tmp_path / "sparse").read_bytes() == content
    assert (tmp_path / "sparse").stat().st_blocks * 512 < 1 << 18
    assert (tmp_path / "small").stat().st_blocks == 0
    assert (tmp_path / "small").read_bytes() == bytes(8192)


def test_hardlinks_stay_one_file(tmp_path: Path) -> None:
    shared, odd = file(BIG, nlink=3), file(b"odd", nlink=2)
    tree = guest(a=shared, d=directory(b=shared, c=shared, odd=odd), link=directory())
    account, listening = get(tree, ["/"], tmp_path)
    assert not listening.failures
    inodes = {(tmp_path / name).stat().st_ino for name in ("a", "d/b", "d/c")}
    assert len(inodes) == 1
    assert (account.totals.files, account.totals.hardlinks) == (2, 2)
    again, listening = get(tree, ["/"], tmp_path, overwrite=True, seed=2)
    assert not listening.failures
    assert (tmp_path / "a").stat().st_nlink == 3
    assert not [name for name in names(tmp_path) if ".xbfs" in name]
    assert again.totals.hardlinks == 2


def test_a_name_of_a_file_that_could_not_be_made_is_a_file(tmp_path: Path) -> None:
    shared = file(b"guest's", nlink=2)
    (tmp_path / "a").write_text("mine")
    _, listening = get(guest(a=shared, b=shared), ["/"], tmp_path)
    assert listening.failed_paths == [b"/a"]
    assert (tmp_path / "b").read_bytes() == b"guest's"
    assert (tmp_path / "a").read_text() == "mine"


def test_links_that_the_target_refuses_become_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMLINK, "Too many links")

    monkeypatch.setattr(os, "link", refuse)
    shared = file(b"guest's", nlink=2)
    account, listening = get(guest(a=shared, b=shared), ["/"], tmp_path)
    assert not listening.failures
    assert (tmp_path / "b").read_bytes() == b"guest's"
    assert [loss.count for what, loss in account.losses.items() if "hardlinks" in what] == [1]


def test_links_are_made_only_to_what_was_restored(tmp_path: Path) -> None:
    """Somebody replaces the first name before the second one comes."""
    shared = file(b"guest's", nlink=2)

    class Slow(TreeGuest):
        def xattrs(self, volume: str, node: NodeId) -> Sequence[Xattr]:
            if not (tmp_path / "moved").exists() and len(self.read_sizes) > 20:
                until_s = monotonic() + 20
                while not (tmp_path / "a").exists() and monotonic() < until_s:
                    sleep(0.001)
                (tmp_path / "a").rename(tmp_path / "moved")
                (tmp_path / "a").write_text("another's")
            return super().xattrs(volume, node)

    big = {f"f{n}": file(b"x" * 200_000) for n in range(40)}
    _, listening = get(Slow({"0": directory(a=shared, **big, z=shared)}), ["/"], tmp_path)
    assert (tmp_path / "moved").exists()
    assert (tmp_path / "z").read_bytes() == b"guest's"
    assert not listening.failures


def test_trouble_with_one_file_leaves_the_others(tmp_path: Path) -> None:
    tree = guest(
        a=file(b"a"),
        damaged=file(BIG, read_error=(2 << 20, GuestDamaged("block 7"))),
        lost=file(b"x", read_error=(0, ChunkCorrupt("byte 5 of the disk"))),
        unknown=file(error=GuestUnsupported("a reparse tag")),
        broken=folder({b"first": file(b"1")}),
        closed=Node(Kind.DIRECTORY, error=GuestDamaged("inode 9"), children={b"in": file()}),
        z=file(b"z"),
    )
    tree._tops["0"].children[b"broken"].list_error = GuestDamaged("leaf 3")
    account, listening = get(tree, ["/"], tmp_path)
    assert dict(listening.failures).keys() == {b"/damaged", b"/lost", b"/unknown", b"/broken", b"/closed"}
    assert names(tmp_path) == {"a", "z", "broken", "broken/first"}
    assert account.totals.failed == 5
    assert {path: error.message for path, error in listening.failures}[b"/damaged"] == "block 7"


def test_trouble_with_the_repository_ends_it(tmp_path: Path) -> None:
    before = open_files()
    tree = guest(a=file(b"a"), d=directory(b=file(BIG, read_error=(2 << 20, StorageUnavailable("gone")))))
    with pytest.raises(StorageUnavailable):
        get(tree, ["/"], tmp_path)
    assert not [name for name in names(tmp_path) if ".xbfs" in name]
    assert not (tmp_path / "d/b").exists()
    assert open_files() == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_target_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", full)
    before = open_files()
    with pytest.raises(StorageFull):
        get(guest(d=directory(a=file(BIG), b=file(b"b"))), ["/d"], tmp_path)
    assert names(tmp_path) == {"d"}
    assert open_files() == before


def test_directories_that_lie_in_themselves_end(tmp_path: Path) -> None:
    loop = directory(a=file(b"a"))
    loop.children[b"again"] = directory(up=loop)
    _, listening = get(TreeGuest({"0": directory(loop=loop)}), ["/loop"], tmp_path)
    assert listening.failed_paths == [b"/loop/again/up"]
    assert names(tmp_path) == {"loop", "loop/a", "loop/again"}


def test_depth_is_bounded(tmp_path: Path) -> None:
    top = here = directory()
    for _ in range(1100):
        here.children[b"d"] = directory()
        here = here.children[b"d"]
    try:
        account, listening = get(TreeGuest({"0": top}), ["/d"], tmp_path)
    finally:
        # Python's own way of removing them, which pytest takes, is recursive.
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)
    assert [type(error) for _, error in listening.failures] == [GuestUnsupported]
    assert account.totals.directories == 1024


class Nowhere:
    """A target that keeps nothing."""

    fatal = (StorageFull,)
    wants_extents = False

    def __init__(self) -> None:
        self.top = Place()
        self.account = Account()

    def enter(self, place: Place) -> None:
        pass

    def leave(self, place: Place) -> None:
        pass

    def create(self, *_: object) -> Nowhere:
        return self

    def write(self, offset: int, data: bytes) -> None:
        pass

    def commit(self) -> Made:
        return Made(b"", (0, 0))

    def abandon(self) -> None:
        pass

    def link(self, *_: object) -> None:
        pass

    def node(self, *_: object) -> None:
        pass

    def finish(self) -> None:
        pass


def test_memory_does_not_grow_with_a_directory() -> None:
    def peak(count: int) -> int:
        target = Nowhere()
        tree = TreeGuest({"0": directory(many=Node(Kind.DIRECTORY, mode=0o755, generated=count))})
        tracemalloc.start()
        try:
            restore_files([Source(tree, b"/many")], target, Options(), Listening())
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            assert target.account.totals.files == count

    peak(100)
    assert peak(25_000) < peak(8_000) + (1 << 20)


def test_sources_must_not_clash(tmp_path: Path) -> None:
    tree = guest(a=directory(x=file(b"1")), b=directory(x=file(b"2")))
    _, listening = get(tree, ["/*/x"], tmp_path)
    assert listening.failed_paths == [b"/b/x"]
    assert (tmp_path / "x").read_bytes() == b"1"
    _, listening = get(tree, ["/a/x", "/b/x"], tmp_path, overwrite=True)
    assert listening.failed_paths == [b"/b/x"]
    account, listening = get(tree, ["/a/x", "/a/?"], tmp_path, overwrite=True)
    assert (account.totals.files, listening.failures) == (1, []), "one file that was asked for twice"


def test_nothing_is_written_when_a_source_is_wrong(tmp_path: Path) -> None:
    tree = guest(a=file(b"1"), closed=Node(Kind.DIRECTORY, list_error=GuestDamaged("leaf 3")))
    cases: list[tuple[str, type[Exception]]] = [
        ("/b", GuestNotFound), ("/a/b", GuestNotFound), ("/a/", GuestNotFound), ("/../a", UsageError),
        ("/closed/*", GuestDamaged), ("/[b-a]", UsageError),
    ]  # fmt: skip
    for path, error in cases:
        with pytest.raises(error):
            get(tree, ["/a", path], tmp_path)
        assert not list(tmp_path.iterdir()), path


def test_the_target_must_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "no/such/place"):
        with pytest.raises(TargetUnwritable):
            get(guest(a=file()), ["/a"], tmp_path / place)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    get(guest(a=file()), ["/a"], tmp_path / "link")
    assert names(tmp_path / "real") == {"a"}, "a link that the user names is his own"


def test_names_that_differ_only_in_case_do_not_replace_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on FAT; a case-sensitive target that is said to be none stands for it."""
    monkeypatch.setattr(DirectoryTarget, "_tells_case", lambda _: False)
    tree = guest(a=file(b"1"), A=file(b"2"), d=directory(x=file(b"3")), D=directory(y=file(b"4")), b=file(b"5"))
    _, listening = get(tree, ["/"], tmp_path, overwrite=True)
    assert listening.failed_paths == [b"/A", b"/D"]
    assert names(tmp_path) == {"a", "d", "d/x", "b"}
    again, listening = get(tree, ["/a", "/b"], tmp_path, overwrite=True, seed=2)
    assert (again.totals.files, listening.failures) == (2, [])


def test_the_target_tells_whether_it_knows_case(tmp_path: Path) -> None:
    with DirectoryTarget(tmp_path, Account(), SeededRandom(1), overwrite=False, with_owner=False) as target:
        (tmp_path / "probe").touch()
        assert target._knows_case is not (tmp_path / "PROBE").exists()
    assert names(tmp_path) == {"probe"}
