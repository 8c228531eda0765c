"""Whatever a guest's tables and registry hold: a tree that ends, sentences for the rest, and typed errors inside."""

from __future__ import annotations

import contextlib
import struct
from functools import cache

import msgpack
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fake_guest import Entry, FakeBtrfsGuest, FakeGuest, Shown, system, volume
from tests.support.registry_hives import Keys, build, mounted_devices, seal
from xbfs_engine.core.errors import GuestDamaged, GuestError
from xbfs_engine.guestfs.tree.fstab import parse_crypttab, parse_fstab, parse_mount_unit
from xbfs_engine.guestfs.tree.hive import Hive, Key
from xbfs_engine.guestfs.worker import replies
from xbfs_engine.guestfs.worker.codes import code_tree

PATHS = [
    "/",
    "/a",
    "/a/b",
    "/a/b/c",
    "/b",
    "/b/a",
    "/link",
    "/loop",
    "/a/up",
    "/new",
    "/new/b",
    "//a/../b/.",
    "/d",
    "/d/x",
]
SOURCES = ["UUID=root", "UUID=two", "LABEL=two", "/dev/xvdb1", "/dev/vg/lv", "/dev/mapper/x", "nas:/x", *PATHS]
OPTIONS = [
    "defaults",
    "bind",
    "rbind",
    "noauto",
    "subvol=a",
    "subvol=/",
    "subvolid=5",
    "subvolid=7",
    "subvolid=-1",
    "ro,bind",
]
LINE = st.builds(
    "{} {} {} {}\n".format,
    st.sampled_from(SOURCES),
    st.sampled_from(PATHS),
    st.sampled_from(["ext4", "auto", "none", "btrfs", "overlay"]),
    st.sampled_from(OPTIONS),
)
TWO: Entry = {"a": {"b": {"c": {}}}, "x": {}, "b": {"a": {}}, "link": "/a"}


def root_with(fstab: str) -> Entry:
    more: dict[str, Entry] = {
        "a": {"b": {"c": {}}, "up": "../.."},
        "b": {"a": {}},
        "link": "a/b",
        "loop": "loop",
        "d": {},
    }
    return system("UUID=root / auto subvol=/\n" + fstab, etc={"crypttab": b"x UUID=two\n"}, **more)


def is_sound(found: Shown) -> None:
    tree = found.tree
    paths = [mount.path for mount in tree.mounts]
    assert len(set(paths)) == len(paths)
    assert tree.kind == "unix"
    assert paths[0] == b"/"
    for index, mount in enumerate(tree.mounts[1:], 1):
        names = mount.path.split(b"/")
        assert names[0] == b""
        assert not {b"", b".", b".."}.intersection(names[1:])
        assert all(not other.startswith(mount.path + b"/") for other in paths[:index])
        assert mount.over is not None or len(names) == 2
        # What is said of each mount is what whoever walks there finds.
        assert found.find(mount.path.decode()) == (mount.volume, mount.node)
    hidden = [mount.over for mount in tree.mounts if mount.over]
    assert len(set(hidden)) == len(hidden)
    assert not {(mount.volume, mount.node) for mount in tree.mounts}.intersection(hidden)
    assert all(note.isprintable() for note in tree.notes)
    found.directories()
    # The process that is told of it believes every word.
    assert replies.tree(msgpack.unpackb(msgpack.packb(code_tree(tree)), use_list=False), {"0p1", "1p1"}) == tree


@settings(max_examples=150, deadline=None)
@given(st.lists(LINE, max_size=8), st.sampled_from(["ext4", "btrfs"]))
def test_any_fstab_makes_a_tree_that_ends_and_is_what_it_says(lines: list[str], kind: str) -> None:
    two = volume("1p1", TWO, kind, uuid="two", label="two")
    root = volume("0p1", root_with("".join(lines)), kind, uuid="root")
    is_sound(Shown(FakeGuest(root, two)))
    is_sound(Shown(FakeBtrfsGuest({0: "", 7: "a/b"}, root, two)))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300) | st.text(alphabet='ab=/\\ \t\n#0123u,"[]MountWhatere.', max_size=300).map(str.encode))
def test_tables_of_any_bytes_are_parsed(text: bytes) -> None:
    for entry in parse_fstab(text):
        assert entry.target == b"" or entry.target.startswith(b"/")
    parse_crypttab(text)
    parse_mount_unit(b"[Mount]\nWhat=/x\nWhere=/y\n" + text)
    parse_mount_unit(text)
    found = Shown(FakeGuest(volume("0p1", root_with(text.decode("utf-8", "surrogateescape")), uuid="root")))
    assert all(note.isprintable() for note in found.tree.notes)


@cache
def hive(form: str) -> bytes:
    letters = {f"\\DosDevices\\{letter}:": b"DMIO:ID:" + bytes([number]) * 16 for number, letter in enumerate("CDEFG")}
    more: dict[str, Keys] = {
        "Filler": {f"key{number}": {"v": bytes(number * 9)} for number in range(60)},
        "long": {"v": bytes(40_000)},
    }
    return build(mounted_devices(letters) | more, form)  # type: ignore[arg-type]


def walk(data: bytes) -> int:
    """Reads all that can be; returns how much that was."""
    opened = Hive(lambda offset, length: data[offset : offset + length], len(data))
    waiting: list[Key] = [opened.root]
    seen = 0
    while waiting and seen < 2000:
        key = waiting.pop()
        with contextlib.suppress(GuestError):
            for value in opened.values(key):
                seen += 1
                assert len(value.data) <= len(data)
        with contextlib.suppress(GuestError):
            for below in opened.subkeys(key):
                seen += 1
                waiting.append(below)
                if seen > 2000:
                    break
    return seen


CHANGE = st.tuples(
    st.integers(0, 1 << 20),
    st.sampled_from([0, 1, 4, 8, 0x20, 0x1000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF8, 0xFFFFFFFF])
    | st.integers(0, 0xFFFFFFFF),
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["lf", "lh", "li", "ri"]), st.lists(CHANGE, min_size=1, max_size=6), st.integers(0, 4))
def test_a_hive_of_lies_gives_typed_errors_and_ends(form: str, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(hive(form))
    for at, value in changes:
        struct.pack_into("<I", data, 4096 + at * 4 % (len(data) - 4096), value)
    lies = seal(bytes(data[: len(data) - cut * 1000]))
    with contextlib.suppress(GuestError):
        walk(lies)
    tree = {"Windows": {"System32": {"config": {"SYSTEM": lies}}}}
    found = FakeGuest(volume("0p1", tree, "ntfs", part_uuid="01010101-0101-0101-0101-010101010101")).tree()
    assert found.kind == "windows"
    assert len(found.mounts) == 1
    assert all(note.isprintable() for note in found.notes)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=6000))
def test_any_bytes_are_a_hive_or_a_typed_error(data: bytes) -> None:
    with contextlib.suppress(GuestError):
        walk(data)
    with contextlib.suppress(GuestError):
        walk(b"regf" + data)


def test_an_untouched_hive_is_walked_whole() -> None:
    for form in ("lf", "lh", "li", "ri"):
        assert walk(hive(form)) == 1 + 1 + 1 + 1 + 1 + 5 + 1 + 60 + 60 + 1 + 1


def test_everything_that_can_not_be_read_is_survived() -> None:
    """Each file and directory in turn is damaged: there is a tree all the same, or a sentence on why not."""
    paths = ["etc", "etc/fstab", "etc/crypttab", "etc/os-release", "usr", "usr/lib", "var", "a", "a/b", "bin"]
    for path in paths:
        tree = root_with("UUID=two /a/b ext4\nUUID=two /b ext4\n")
        *folders, last = path.split("/")
        copy = here = dict(tree)  # type: ignore[arg-type]
        for name in folders:
            here[name] = here = dict(here[name])  # type: ignore[arg-type]
        here[last] = GuestDamaged(f"{path} is torn")
        two = volume("1p1", TWO, uuid="two", label="two")
        found = FakeGuest(volume("0p1", copy, uuid="root"), two).tree()
        assert found.mounts or found.notes, path
        if path not in ("etc", "etc/fstab"):
            assert b"/b" in [mount.path for mount in found.mounts], path
