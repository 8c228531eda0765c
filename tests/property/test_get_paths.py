"""Paths and patterns of `get` against plain models."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.get_guest import Node, TreeGuest, directory, file, folder, symlink
from xbfs_engine.core.errors import GuestNotFound, GuestUnsupported, UsageError, XbfsError
from xbfs_engine.guestfs.base import Kind
from xbfs_engine.guestfs.guest import GuestMount, GuestTree
from xbfs_engine.restore.files.paths import expand, split, wanted, without_drive
from xbfs_engine.restore.files.view import View

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = st.sampled_from([b"a", b"b", b"ab", b"a.c", b"A", b"[b]", b"\xff", b"a\nb"])
TREES = st.recursive(st.just(None), lambda below: st.dictionaries(NAMES, below, max_size=4), max_leaves=12)
PARTS = st.sampled_from(
    [b"a", b"b", b"*", b"**", b"?", b"[ab]", b"[!a]*", b"a*", b"*b", b"[b]", b"??", b"a?b", b"[\xff]"]
)


def _node(tree: dict[bytes, object] | None) -> Node:
    return file() if tree is None else folder({name: _node(below) for name, below in tree.items()})  # type: ignore[arg-type]  # recursive


def _paths(node: Node, prefix: bytes = b"") -> Iterator[tuple[bytes, ...]]:
    for name, child in node.children.items():
        yield (*prefix.split(b"/")[1:], name) if prefix else (name,)
        yield from _paths(child, prefix + b"/" + name)


def _expression(parts: list[bytes]) -> re.Pattern[bytes]:
    """A regular expression of the whole path, by another way than the product's."""
    last = len(parts) - 1
    pieces = []
    for number, part in enumerate(parts):
        if part == b"**" and number < last:
            pieces.append(rb"(?:/[^/]+)*")
            continue
        if part == b"**":
            part = b"*"
        one = re.escape(part).replace(rb"\*", rb"[^/]*").replace(rb"\?", rb"(?:[^/\x80-\xff]|[\x80-\xff])")
        one = re.sub(rb"\\\[(!?)([^\\]*)\\\]", lambda found: b"[" + (b"^/" if found[1] else b"") + found[2] + b"]", one)
        pieces.append(b"/(?:" + one + b"|" + re.escape(part) + b")")
    return re.compile(b"".join(pieces), re.DOTALL)


def _found(view: View, pattern: bytes, *, ignore_case: bool = False) -> list[bytes]:
    failures: list[XbfsError] = []
    path = wanted(pattern, windows=view.is_windows)
    items = [item.path for item in expand(view, path, lambda _, error: failures.append(error), ignore_case=ignore_case)]
    assert not failures
    return items


@given(st.dictionaries(NAMES, TREES, max_size=4), st.lists(PARTS, min_size=1, max_size=4))
def test_patterns_match_what_an_expression_matches(tree: dict[bytes, object], parts: list[bytes]) -> None:
    top = _node(tree)
    expression = _expression(parts)
    matched = [path for path in _paths(top) if expression.fullmatch(b"/" + b"/".join(path))]
    # What is below a match comes with it.
    alone = [path for path in matched if not any(path[: len(up)] == up and path != up for up in matched)]
    found = _found(View(TreeGuest({"0": top})), b"/" + b"/".join(parts))
    assert sorted(found) == sorted(b"/" + b"/".join(path) for path in alone)


@given(st.text(max_size=30), st.text(max_size=30))
def test_the_path_begins_at_a_colon_before_a_slash(point: str, path: str) -> None:
    found = split(f"{point}:/{path}")
    assert (point, f"/{path}".encode(errors="surrogateescape")) in [(each, text) for each, text in found] or any(
        "\ud800" <= char <= "\udfff" for char in path
    )
    for before, after in found:
        assert f"{before}:{after.decode(errors='surrogateescape')}" == f"{point}:/{path}"


@pytest.mark.parametrize(
    ("word", "point", "path"),
    [
        ("web@latest:/etc", "web@latest", b"/etc"),
        ("web@2026-09-20T21:00:03Z:/a:/b", "web@2026-09-20T21:00:03Z", b"/a:/b"),
        ("web@2026-09-20T21:00:03+02:00:/a", "web@2026-09-20T21:00:03+02:00", b"/a"),
        ("desk@latest:C:/Users", "desk@latest", b"C:/Users"),
        ("desk@latest:C:\\Users", "desk@latest", b"C:\\Users"),
        ("desk@latest:/C:/Users", "desk@latest", b"/C:/Users"),
        ("desk@latest:c:", "desk@latest", b"c:"),
        ("/mnt/xbfs/vms/web/latest:/etc", "/mnt/xbfs/vms/web/latest", b"/etc"),
    ],
)
def test_words_are_taken_apart(word: str, point: str, path: bytes) -> None:
    assert split(word)[0] == (point, path)


@pytest.mark.parametrize("word", ["web@latest", "web@2026-09-20T21:00:03Z", "abcd", "web:etc", ""])
def test_words_without_a_path(word: str) -> None:
    assert split(word) == []


@given(st.binary(max_size=40), st.booleans())
def test_any_path_is_taken_or_refused(text: bytes, windows: bool) -> None:
    view = View(TreeGuest({"0": directory(a=directory(b=file()))}))
    try:
        path = wanted(text, windows=windows)
    except UsageError:
        return
    for item in expand(view, path, lambda *_: None):
        assert item.above is not None


def test_links_on_the_way_are_followed_within_the_guest() -> None:
    top = directory(
        etc=directory(x=file(), up=symlink(b"../../../etc")), run=symlink(b"/etc"), far=symlink(b"run/up/../etc/./up"),
        loop=symlink(b"loop"), none=symlink(b"/nothing"), toward=symlink(b"etc/x"),
    )  # fmt: skip
    view = View(TreeGuest({"0": top}))
    for way in (b"/etc/x", b"/run/x", b"/run/up/up/x", b"/far/x", b"/r*/up/x"):
        assert _found(view, way) == [b"/etc/x"], way
    assert _found(view, b"/run") == [b"/run"], "the last one stands for itself"
    assert _found(view, b"/run/") == [b"/etc"]
    assert _found(view, b"/**/x") == [b"/etc/x"], "none is followed by **"
    for way in (b"/none/x", b"/toward/x", b"/etc/x/y", b"/toward/"):
        assert _found(view, way) == [], way
    failures: list[XbfsError] = []
    assert not list(expand(view, wanted(b"/loop/x", windows=False), lambda _, error: failures.append(error)))
    assert isinstance(failures[0], GuestUnsupported)


def _mounted(guest: TreeGuest) -> GuestTree:
    top = guest.root("root")
    var = guest.lookup("root", top, b"var")
    assert var is not None
    return GuestTree(
        "unix",
        (
            GuestMount(b"/", "root", top, None, ""),
            GuestMount(b"/var", "var", guest.root("var"), ("root", var.entry.node), ""),
            GuestMount(b"/extra", "var", guest.root("var"), None, ""),
        ),
        (),
    )


def test_mounts_are_crossed() -> None:
    volumes = {"root": directory(var=directory(hidden=file()), a=file()), "var": directory(log=directory(x=file()))}
    view = View(TreeGuest(volumes, _mounted))
    assert _found(view, b"/var/*") == [b"/var/log"]
    assert _found(view, b"/**/x") == [b"/var/log/x", b"/extra/log/x"]
    assert [item.name for item in view.entries(view.top)] == [b"var", b"a", b"extra"]
    assert _found(View(TreeGuest(volumes, _mounted), "root"), b"/var/*") == [b"/var/hidden"]


def test_windows_paths() -> None:
    target = {b"user.ntfs.target": rb"\??\D:\data"}
    drives = {
        "0p1": directory(
            Users=directory(Me=file()),
            here=symlink(b"/Users"),
            Data=Node(Kind.SYMLINK, target=b"/data", xattrs=target),
        ),
        "1p1": directory(data=directory(x=file())),
    }

    def tree(guest: TreeGuest) -> GuestTree:
        mounts = [
            GuestMount(b"/C:", "0p1", guest.root("0p1"), None, ""),
            GuestMount(b"/D:", "1p1", guest.root("1p1"), None, ""),
        ]
        return GuestTree("windows", tuple(mounts), ())

    guest = TreeGuest(drives, tree, {"0p1": "ntfs", "1p1": "ntfs"})
    view = View(guest)
    assert _found(view, b"C:\\Users\\Me") == [b"/C:/Users/Me"]
    assert _found(view, b"/C:/users/me") == []
    assert _found(view, b"c:/users/ME", ignore_case=True) == [b"/C:/Users/Me"]
    assert set(_found(view, b"c:/*/m*", ignore_case=True)) == {b"/C:/Users/Me"}
    assert _found(view, b"C:/here/Me") == [b"/C:/Users/Me"]
    assert _found(view, b"C:/Data/x") == [b"/D:/data/x"]
    assert _found(view, b"/*") == [b"/C:", b"/D:"]
    assert without_drive(b"C:\\Users\\Me") == b"/Users\\Me".replace(b"\\", b"/")
    assert without_drive(b"/Users/c:") == b"/Users/c:"


def test_linux_takes_case_and_backslash_as_they_are() -> None:
    view = View(TreeGuest({"0": folder({b"A": file(), b"a\\b": file()})}))
    assert _found(view, b"/a", ignore_case=True) == []
    assert _found(view, b"/a\\b") == [b"/a\\b"]


def test_without_a_tree_the_volumes_are_named() -> None:
    with pytest.raises(GuestNotFound) as caught:
        View(TreeGuest({"0p1": directory(), "vg-data": directory()}))
    assert "0p1 (ext4), vg-data (ext4)" in caught.value.hint
    with pytest.raises(GuestNotFound):
        View(TreeGuest({"0p1": directory()}), "0p7")
