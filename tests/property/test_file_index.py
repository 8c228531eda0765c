"""Segments, roots, patterns, searches and comparisons: against the plainest models, and against hostile bytes."""

from __future__ import annotations

import fnmatch
import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tools import make_vectors as made
from xbfs_engine.catalog.fileindex.compare import ChangeKind, differences, lookup
from xbfs_engine.catalog.fileindex.glob import Pattern, escaped
from xbfs_engine.catalog.fileindex.places import locate, view_of
from xbfs_engine.catalog.fileindex.records import FileIndex, IndexMount, IndexTree, SegmentRef, VolumeIndex
from xbfs_engine.catalog.fileindex.root import _CONTEXT, open_file_index
from xbfs_engine.catalog.fileindex.search import Search
from xbfs_engine.catalog.fileindex.segment import Entry, Segment, encode_segment, order
from xbfs_engine.codec import wire
from xbfs_engine.codec.envelope import ObjectKind, seal_object
from xbfs_engine.core.errors import UsageError, XbfsError
from xbfs_engine.core.ids import BlobHash, ChunkRef, PointId
from xbfs_engine.guestfs.base import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xbfs_engine.catalog.fileindex.indexes import FileIndexes

KEYS = made.fixed_keys()
VECTORS = made.deterministic()
MEMORY_MAX = 16 << 20

names = st.binary(min_size=1, max_size=6).map(lambda raw: raw.replace(b"\0", b"a").replace(b"/", b"b"))
names = names.filter(lambda name: name not in {b".", b".."}) | st.sampled_from(
    [b"a", b"a-", b"a b", b"\xff", b"b" * 255]
)
numbers = st.integers(0, (1 << 63) - 1)
times = st.integers(-(1 << 62) * 10**9, (1 << 62) * 10**9)
leaves = st.builds(
    Entry, st.just(b""), st.sampled_from(list(Kind)), numbers, times, st.integers(1, 2**64 - 1), st.none() | times
)
trees = st.recursive(leaves, lambda below: st.dictionaries(names, below, min_size=1, max_size=5), max_leaves=20)
small = st.builds(
    Entry, st.just(b""), st.just(Kind.FILE), st.integers(0, 2), st.just(7), st.integers(1, 2), st.just(None)
)
below_trees = st.recursive(
    small, lambda below: st.dictionaries(st.sampled_from([b"a", b"b.c", b"x"]), below, max_size=3), max_leaves=8
)
small_trees = st.dictionaries(st.sampled_from([b"a", b"b", b"a-x", b"conf"]), below_trees, max_size=4)


def flat(tree: object, path: bytes = b"") -> list[Entry]:
    """Entries of nested dictionaries in path order: sorted by their components, not by our own key."""
    if isinstance(tree, Entry):
        return [tree._replace(path=path)]
    assert isinstance(tree, dict)
    found = [Entry(path, Kind.DIRECTORY, 0, 0, 1, None)] if path else []
    for name in sorted(tree):
        below = flat(tree[name], path + b"/" + name if path else name)
        # Only directories hold anything: the leaf may claim to be one, and is then empty.
        found += below
    return found


@given(tree=trees.filter(lambda tree: isinstance(tree, dict)))
def test_segments_come_back_as_they_were(tree: dict[bytes, object]) -> None:
    entries = flat(tree)
    assert [entry.path.split(b"/") for entry in entries] == sorted(entry.path.split(b"/") for entry in entries)
    for start in range(len(entries)):
        segment = Segment(encode_segment(entries[start:]))
        assert [segment.entry(number) for number in range(len(segment))] == entries[start:]


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    data = bytearray(valid)
    for at, value in draw(st.lists(st.tuples(st.integers(0, 1 << 12), st.binary(min_size=1, max_size=4)), max_size=4)):
        at %= len(data)
        data[at : at + len(value)] = value
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


def survives(decode: Callable[[], object]) -> None:
    tracemalloc.start()
    try:
        decode()
    except XbfsError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY_MAX


@settings(max_examples=300)
@given(body=mutated(VECTORS["file_segment_body"]) | st.binary(max_size=200))
@example(body=b"F\1\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")
def test_hostile_segments(body: bytes) -> None:
    def walk() -> None:
        segment = Segment(body)
        entries = [segment.entry(number) for number in range(len(segment))]
        assert encode_segment(entries) or True
        assert [order(entry.path) for entry in entries] == sorted({order(entry.path) for entry in entries})

    survives(walk)


def test_a_deep_base_does_not_unfold() -> None:
    """4096 names of one byte in a directory of 30,000 bytes would be 120 MiB of paths."""
    base = b"/".join([b"d" * 254] * 118)
    entries = [Entry(base + b"/%04d" % n, Kind.FILE, 0, 0, 1, None) for n in range(4096)]
    body = encode_segment(entries)
    assert len(body) < 256 << 10
    survives(lambda: Segment(body))
    with pytest.raises(XbfsError, match="of paths"):
        Segment(body)


@settings(max_examples=150, deadline=None)
@given(body=mutated(VECTORS["file_index_body"]))
def test_hostile_roots(body: bytes) -> None:
    """Signed and sealed, so that what is inside is looked at."""
    assert KEYS.signing_private is not None
    signature = Ed25519PrivateKey.from_private_bytes(KEYS.signing_private).sign(_CONTEXT + KEYS.repository_id + body)
    payload = wire.encode({"version": 1, "body": body, "signature": signature})
    blob = seal_object(KEYS, ObjectKind.FILE_INDEX, payload, b"k" * 32)
    survives(lambda: open_file_index(KEYS, made.file_index().point, blob))


def test_an_unsigned_root_is_refused() -> None:
    payload = wire.encode({"version": 1, "body": VECTORS["file_index_body"], "signature": bytes(64)})
    blob = seal_object(KEYS, ObjectKind.FILE_INDEX, payload, b"k" * 32)
    with pytest.raises(XbfsError, match="signature"):
        open_file_index(KEYS, made.file_index().point, blob)


class Store:
    """Segments in memory, cut after every few entries; counts what is decoded."""

    def __init__(self, cut: int) -> None:
        self.cut = cut
        self.bodies: dict[bytes, bytes] = {}
        self.decoded: list[bytes] = []

    def volume(self, name: str, entries: Sequence[Entry]) -> VolumeIndex:
        refs, held = [], []
        for number, entry in enumerate(entries):
            held.append(entry)
            if sum(entry.path) % self.cut == 0 or number == len(entries) - 1:
                body = encode_segment(held)
                ref = ChunkRef(KEYS.node_id(body), BlobHash(b"p" * 32), 0)
                self.bodies[ref.id] = body
                refs.append(SegmentRef(ref, len(held), held[0].path))
                held = []
        return replace(EMPTY, name=name, root=b"r", entries=len(entries), segments=tuple(refs))

    def segment(self, ref: SegmentRef) -> Segment:
        self.decoded.append(ref.ref.id)
        return Segment(self.bodies[ref.ref.id])

    @property
    def as_indexes(self) -> FileIndexes:
        return self  # type: ignore[return-value] - all that is asked of it here is ``segment``


EMPTY = VolumeIndex("v", "ext4", "", "", 0, "filesystem", "", "clean", "", b"", True, 0, (), 0, (), ())
NO_TREE = IndexTree("", (), ())
ROOT = IndexTree("unix", (IndexMount(b"/", "v", b"r", b"", ""),), ())


def index_of(number: int, *volumes: VolumeIndex, tree: IndexTree = ROOT) -> FileIndex:
    return FileIndex(PointId(f"{number:064x}"), "test", 1, (), tree, volumes, ())


@given(old=small_trees, new=small_trees, cut=st.integers(1, 4))
def test_differences_are_those_of_dictionaries(old: dict[bytes, object], new: dict[bytes, object], cut: int) -> None:
    store = Store(cut)
    before, after = ({entry.path: entry for entry in flat(tree)} for tree in (old, new))
    volumes = [store.volume("v", list(entries.values())) for entries in (before, after)]
    found = {change.path: change.kind for change in differences(store.as_indexes, *volumes)}
    expected = dict.fromkeys(after.keys() - before.keys(), ChangeKind.ADDED)
    expected |= dict.fromkeys(before.keys() - after.keys(), ChangeKind.REMOVED)
    expected |= {path: ChangeKind.CHANGED for path in before.keys() & after.keys() if before[path] != after[path]}
    assert found == expected
    assert list(found) == sorted(found, key=lambda path: path.split(b"/"))
    for path in before.keys() | after.keys():
        assert lookup(store.as_indexes, volumes[1], path) == after.get(path)


@given(points=st.lists(small_trees, min_size=1, max_size=4), cut=st.integers(1, 4), pattern=st.sampled_from(
    ["*", "a", "a*", "*.c", "/a/*", "/**/x", "a/b.c", "/**", "*/", "/a-x/**/x"]
))  # fmt: skip
def test_searches_are_those_of_dictionaries(points: list[dict[bytes, object]], cut: int, pattern: str) -> None:
    store = Store(cut)
    listed = [{entry.path: entry for entry in flat(tree)} for tree in points]
    roots = [index_of(number, store.volume("v", list(entries.values()))) for number, entries in enumerate(listed)]
    search = Search(store.as_indexes, roots, Pattern(pattern))
    found = list(search.versions(lambda ref, exc: pytest.fail(exc.message)))
    assert len(store.decoded) == len(set(store.decoded)), "what points share is decoded once"
    expected: dict[tuple[bytes, Kind, int], list[int]] = {}
    for number, entries in enumerate(listed):
        for entry in entries.values():
            if Pattern(pattern).matches(b"/" + entry.path):
                expected.setdefault((entry.path, entry.kind, entry.size_bytes), []).append(number)
    assert {(each.inside, each.kind, each.size_bytes): list(each.points) for each in found} == expected
    for each in found:
        holding = [number for number, entries in enumerate(listed) if each.inside in entries]
        assert each.gone == (holding[-1] + 1 if holding[-1] + 1 < len(listed) else None)
        assert each.shown.path == b"/" + each.inside
    assert [each.inside.split(b"/") for each in found] == sorted(each.inside.split(b"/") for each in found)


def test_points_that_do_not_tell_are_no_proof_of_deletion() -> None:
    store = Store(1)
    file = [Entry(b"a", Kind.FILE, 1, 1, 1, None)]
    locked = replace(EMPTY, status="locked")
    roots = [index_of(0, store.volume("v", file)), index_of(1, locked), index_of(2, store.volume("v", file[:0]))]

    def gone(*shown: FileIndex) -> int | None:
        (found,) = Search(store.as_indexes, shown, Pattern("a")).versions(lambda ref, exc: None)
        return found.gone

    assert [gone(roots[0], roots[1]), gone(*roots), gone(roots[0], index_of(3))] == [None, 2, 1]


texts = st.text(alphabet="ab.-[]*?!ä\n", max_size=8)


@given(name=texts, pattern=texts.filter(lambda text: text.strip("/") != ""))
def test_names_match_as_in_fnmatch(name: str, pattern: str) -> None:
    try:
        mine = Pattern(pattern).may_match(name.encode())
    except UsageError:
        return
    if "[^" not in pattern:
        assert mine == fnmatch.fnmatchcase(name, pattern)
    assert Pattern(escaped(pattern)).may_match(pattern.encode())


@pytest.mark.parametrize(
    ("pattern", "path", "wanted"),
    [
        ("/etc/*.conf", b"/etc/a.conf", True),
        ("/etc/*.conf", b"/etc/a/b.conf", False),
        ("/etc/**/*.conf", b"/etc/a/b.conf", True),
        ("/etc/**/*.conf", b"/etc/b.conf", True),
        ("/etc/**", b"/etc", True),
        ("etc/*.conf", b"/usr/etc/a.conf", True),
        ("/etc", b"/usr/etc", False),
        ("?", "/ä".encode(), True),
        ("?", b"/\xff", True),
        ("[!a-c]", b"/d", True),
        ("[!a-c]", b"/b", False),
        ("*", b"/line\nbreak", True),
    ],
)
def test_patterns_on_paths(pattern: str, path: bytes, wanted: bool) -> None:
    assert Pattern(pattern).matches(path) is wanted


def test_case_is_ignored_where_asked_also_beyond_ascii() -> None:
    assert Pattern("*Ä.TXT", ignore_case=True).may_match("Straßeä.txt".encode())
    assert not Pattern("*Ä.TXT").may_match("ä.txt".encode())


def test_a_hostile_name_takes_no_time() -> None:
    assert not Pattern("*a" * 20 + "b").may_match(b"a" * 255)


def test_paths_are_shown_where_the_guest_mounts_them() -> None:
    mounts = (
        IndexMount(b"/", "root", b"1", b"@", ""),
        IndexMount(b"/home", "data", b"2", b"", ""),
        IndexMount(b"/srv/old", "root", b"3", b"@old/srv", ""),
    )
    index = index_of(1, tree=IndexTree("unix", mounts, ()))
    root, data = view_of(index, "root"), view_of(index, "data")
    assert root.show(b"@/etc/fstab") == (b"/etc/fstab", "root", True)
    assert root.show(b"@") == (b"/", "root", True)
    assert root.show(b"@old/srv/x") == (b"/srv/old/x", "root", True)
    assert root.show(b"@other/x") == (b"/@other/x", "root", False)
    assert root.show(b"@/home/hidden") == (b"/@/home/hidden", "root", False), "another volume is mounted over it"
    assert root.show(b"@/homestead") == (b"/homestead", "root", True)
    assert data.show(b"me/.profile") == (b"/home/me/.profile", "data", True)
    assert view_of(index, "data", in_tree=False).show(b"me") == (b"/me", "data", False)
    assert locate(index, b"/home/me/.profile") == ("data", b"me/.profile")
    assert locate(index, b"/srv/old/x") == ("root", b"@old/srv/x")
    assert locate(index, b"//etc/fstab/") == ("root", b"@/etc/fstab")
    assert locate(index, b"/") == ("root", b"@")
