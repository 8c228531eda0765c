"""What workers say: any bytes are a sound answer or a breach of the rules, and sound answers come back whole."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import msgpack
from hypothesis import given, settings
from hypothesis import strategies as st

from xbfs_engine.core.errors import GuestDamaged, GuestError
from xbfs_engine.guestfs.base import DirEntry, FileExtent, Kind, NodeId, NodeStat, VolumeInfo, VolumeState, Xattr
from xbfs_engine.guestfs.guest import ExtentPage, GuestMount, GuestTree, Listed, Page, VolumeRow, VolumeRows
from xbfs_engine.guestfs.volumes import VolumeStatus
from xbfs_engine.guestfs.worker import codes, replies
from xbfs_engine.guestfs.worker.forms import CONTROL, ENTRY, STAT, is_name
from xbfs_engine.guestfs.worker.frames import FRAME_BYTES_MAX, HEADER_BYTES, BadMessage, body_bytes, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable

DECODERS: list[Callable[[object], object]] = [
    replies.volumes,
    lambda value: replies.tree(value, {"0", "vol"}),
    replies.info,
    replies.node_id,
    replies.stat,
    lambda value: replies.found(value, b"name"),
    lambda value: replies.page(value, 0),
    lambda value: replies.extents(value, 0),
    lambda value: replies.content(value, 10),
    replies.link,
    replies.xattrs,
    replies.error,
    replies.confinement,
    replies.answer,
    replies.number,
]

sizes = st.integers(0, (1 << 63) - 1)
words = st.text(max_size=20).filter(lambda text: not CONTROL.search(text))
names = st.binary(min_size=1, max_size=255).filter(is_name)
nodes = st.binary(min_size=1, max_size=32).map(NodeId)
times = st.integers(-(1 << 63) * 1_000_000_000, (1 << 63) * 1_000_000_000 - 1)
u32 = st.integers(0, (1 << 32) - 1)
stats = st.builds(
    NodeStat, st.integers(1, (1 << 64) - 1), st.sampled_from([*Kind][:-1]), st.integers(0, 0o7777), u32, u32, u32,
    sizes, sizes, times, *[st.none() | times] * 3, u32, u32,
)  # fmt: skip
volume_names = words.filter(lambda name: is_name(name.encode()))
rows = st.builds(
    VolumeRow, volume_names, words, words, words, sizes, words, st.lists(words, max_size=3).map(tuple),
    st.sampled_from(VolumeStatus), words, words, words, sizes, words,
)  # fmt: skip
volume_rows = st.builds(
    VolumeRows,
    st.lists(rows, max_size=4, unique_by=lambda row: row.name).map(tuple),
    st.lists(words, max_size=3).map(tuple),
)

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.binary() | st.text()
    | st.binary(min_size=ENTRY.size, max_size=ENTRY.size) | st.binary(min_size=STAT.size, max_size=STAT.size)
    | st.sampled_from(["", "0", "vol", "unix", "windows", "clean", "filesystem", "GuestDamaged", b"name", b"/", b"/a"]),
    lambda inner: st.lists(inner, max_size=10) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=20,
)  # fmt: skip


def wired(value: object) -> object:
    """Through the wire."""
    frame = pack(value)
    assert body_bytes(frame[:HEADER_BYTES]) == len(frame) - HEADER_BYTES
    return unpack(frame[HEADER_BYTES:])


def only_breaches(call: Callable[[], object]) -> None:
    with suppress(BadMessage):
        call()


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_breach(body: bytes) -> None:
    only_breaches(lambda: unpack(body))
    only_breaches(lambda: body_bytes(body[:4].ljust(4, b"\xff")))


@settings(max_examples=300)
@given(anything)
def test_any_value_is_an_answer_or_a_breach(value: object) -> None:
    for decode in DECODERS:
        only_breaches(lambda decode=decode: decode(unpack(msgpack.packb(value))))  # type: ignore[misc]


def test_lengths_are_bounded_before_anything_is_allocated() -> None:
    for body in (b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"):
        only_breaches(lambda body=body: unpack(body))  # type: ignore[misc]
    only_breaches(lambda: body_bytes((FRAME_BYTES_MAX + 1).to_bytes(4, "little")))
    only_breaches(lambda: unpack(b"\x91" * 100_000))


@given(stats)
def test_metadata_comes_back_whole(stat: NodeStat) -> None:
    assert replies.stat(wired(codes.code_stat(stat))) == stat


@given(stats, st.sampled_from(["inode", "size_bytes", "allocated_bytes", "uid", "mode", "rdev_major", "mtime_ns"]))
def test_metadata_that_makes_no_sense_is_damage_and_no_breach(stat: NodeStat, field: str) -> None:
    for value in (-1, 1 << 64, 1 << 100):
        if field != "mtime_ns" or value == 1 << 100:
            try:
                codes.code_stat(stat._replace(**{field: value}))
            except GuestDamaged:
                continue
            raise AssertionError(field)


@given(st.lists(st.tuples(names, nodes, st.sampled_from(Kind), st.none() | stats), max_size=5), st.integers(0, 1 << 40))
def test_a_page_comes_back_whole(entries: list[tuple[bytes, NodeId, Kind, NodeStat | None]], cookie: int) -> None:
    listed = [
        Listed(DirEntry(name, node, kind, cookie + number), stat)
        for number, (name, node, kind, stat) in enumerate(entries, start=1)
    ]
    page = Page(tuple(listed), is_last=not listed or cookie % 2 == 0)
    assert replies.page(wired(codes.code_page(page)), cookie) == page
    for one in listed:
        assert replies.found(wired(codes.code_listed(one)), one.entry.name) == one
    assert replies.found(wired(codes.code_listed(None)), b"name") is None


@given(volume_rows, words, st.sampled_from(VolumeState), sizes)
def test_volumes_come_back_whole(volumes: VolumeRows, word: str, state: VolumeState, size: int) -> None:
    assert replies.volumes(wired(codes.code_volumes(volumes))) == volumes
    info = VolumeInfo(word, word, word, size, state, word)
    assert replies.info(wired(codes.code_info(info))) == info


@given(st.lists(st.tuples(names, nodes, st.none() | nodes), unique_by=lambda mount: mount[0], max_size=4), words)
def test_a_tree_comes_back_whole(mounts: list[tuple[bytes, NodeId, NodeId | None]], word: str) -> None:
    root = GuestMount(b"/", "a", NodeId(b"root"), None, word)
    rest = [GuestMount(b"/" + name, "b", node, over and ("a", over), word) for name, node, over in mounts]
    for tree in (
        GuestTree("unix", (root, *rest), (word,)),
        GuestTree("windows", tuple(rest), ()),
        GuestTree("", (), ()),
    ):
        assert replies.tree(wired(codes.code_tree(tree)), {"a", "b"}) == tree


@given(st.text(), st.text())
def test_no_text_acts_upon_a_terminal(message: str, hint: str) -> None:
    error = replies.error(wired(codes.code_error(GuestError(message, hint=hint))))
    assert type(error) is GuestDamaged
    assert not CONTROL.search(error.message + error.hint)


@given(st.lists(st.tuples(st.integers(1, 1 << 40), st.booleans()), max_size=5), st.integers(0, 1 << 40))
def test_extents_come_back_whole(lengths: list[tuple[int, bool]], start: int) -> None:
    extents = []
    at = start
    for length, is_data in lengths:
        extents.append(FileExtent(at, length, is_data))
        at += length
    page = ExtentPage(tuple(extents), is_last=True)
    assert replies.extents(wired(page), start) == page


@given(
    st.lists(
        st.builds(Xattr, st.binary(min_size=1, max_size=255).filter(lambda b: b"\0" not in b), st.binary()), max_size=4
    )
)
def test_attributes_come_back_whole(xattrs: list[Xattr]) -> None:
    assert replies.xattrs(wired(codes.code_xattrs(xattrs))) == xattrs
