"""Reading block maps: disk offset to chunk, walking only what is asked for, differences in time of the difference.

Any thread may read; nodes are cached by id in a bounded LRU that all points of a repository share, so that unchanged
subtrees are read once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from xbfs_engine.catalog.node import Node, node_span, top_level
from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.core.errors import ChunkCorrupt, IntegrityError, MapCorrupt
from xbfs_engine.core.ids import ChunkRef
from xbfs_engine.core.limits import LEAF_FANOUT, MIB, NODE_FANOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.store.reader import ChunkReader

NODE_CACHE_BYTES = 16 * MIB


class MapRoot(NamedTuple):
    """The root of a block map; ``level`` follows from the disk's size."""

    ref: ChunkRef
    level: int


class NodeStore:
    """Fetches and caches block map nodes."""

    def __init__(self, reader: ChunkReader, cache_bytes: int = NODE_CACHE_BYTES) -> None:
        self._reader = reader
        self._cache: OrderedDict[bytes, Node] = OrderedDict()
        self._cache_bytes = 0
        self._cache_bytes_max = cache_bytes
        self._lock = threading.Lock()

    def get(self, ref: ChunkRef, level: int) -> Node:
        """The node of ``level`` that ``ref`` names. Raises MapCorrupt, BlobLost, StorageError."""
        node = self.cached(ref)
        if node is not None and node.level == level:
            return node
        try:
            plaintext = self._reader.fetch([ref], ObjectKind.METADATA_PACK)[0]
        except ChunkCorrupt as exc:
            raise MapCorrupt(f"a block map node of level {level} can not be read: {exc.message}") from exc
        node = Node(plaintext, level, ref.pack)
        with self._lock:
            if ref.id not in self._cache:
                self._cache[ref.id] = node
                self._cache_bytes += node.memory_bytes
            while self._cache_bytes > self._cache_bytes_max and len(self._cache) > 1:
                _, dropped = self._cache.popitem(last=False)
                self._cache_bytes -= dropped.memory_bytes
        return node

    def cached(self, ref: ChunkRef) -> Node | None:
        """The node if it is in the cache; never waits for storage."""
        with self._lock:
            node = self._cache.get(ref.id)
            if node is not None:
                self._cache.move_to_end(ref.id)
            return node


class BlockMap:
    """The block map of one disk of one restore point."""

    def __init__(self, nodes: NodeStore, root: MapRoot | None, chunks: int) -> None:
        if root is not None and root.level != top_level(chunks):
            raise MapCorrupt(f"a block map of {chunks} chunks has a root of level {root.level}")
        self._nodes = nodes
        self.root = root
        self.chunks = chunks

    def leaf(self, number: int) -> Node | None:
        """The leaf that covers chunks [64*number, 64*number+64), or None if all are zero."""
        return self._descend(number, wait=True)

    def leaf_cached(self, number: int) -> tuple[bool, Node | None]:
        """Whether the leaf is known without waiting, and the leaf."""
        try:
            return True, self._descend(number, wait=False)
        except _NotCachedError:
            return False, None

    def _descend(self, number: int, *, wait: bool) -> Node | None:
        if self.root is None:
            return None
        ref: ChunkRef | None = self.root.ref
        for level in range(self.root.level, -1, -1):
            assert ref is not None
            node = self._nodes.get(ref, level) if wait else self._nodes.cached(ref)
            if node is None:
                raise _NotCachedError
            if level == 0:
                return node
            ref = node.child(number // NODE_FANOUT ** (level - 1) % NODE_FANOUT)
            if ref is None:
                return None
        return None

    def chunk(self, position: int) -> ChunkRef | None:
        """The chunk at a position, or None where the disk is zero."""
        leaf = self.leaf(position // LEAF_FANOUT)
        return None if leaf is None else leaf.child(position % LEAF_FANOUT)

    def leaves(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, Node]]:
        """All leaves with number in [first, last), ascending, without those that do not exist."""
        if self.root is not None:
            end = -(-self.chunks // LEAF_FANOUT) if last is None else last
            yield from self._walk(self.root.ref, self.root.level, 0, first, end)

    def _walk(self, ref: ChunkRef, level: int, base: int, first: int, last: int) -> Iterator[tuple[int, Node]]:
        node = self._nodes.get(ref, level)
        if level == 0:
            yield base, node
            return
        span = int(NODE_FANOUT ** (level - 1))
        for slot, child in node.children():
            start = base + slot * span
            if start < last and start + span > first:
                yield from self._walk(child, level - 1, start, first, last)

    def all_nodes(
        self, seen: set[bytes], problems: list[tuple[int, IntegrityError]]
    ) -> Iterator[tuple[ChunkRef, Node]]:
        """Every node whose id is not in ``seen`` (and add it there); unreadable subtrees go to ``problems``.

        A problem is (first chunk covered, error).
        """
        if self.root is not None:
            yield from self._all(self.root.ref, self.root.level, 0, seen, problems)

    def _all(
        self, ref: ChunkRef, level: int, base: int, seen: set[bytes], problems: list[tuple[int, IntegrityError]]
    ) -> Iterator[tuple[ChunkRef, Node]]:
        if ref.id in seen:
            return
        try:
            node = self._nodes.get(ref, level)
        except IntegrityError as exc:
            problems.append((base, exc))
            return
        seen.add(ref.id)
        yield ref, node
        if level:
            for slot, child in node.children():
                yield from self._all(child, level - 1, base + slot * node_span(level - 1), seen, problems)


class _NotCachedError(Exception):
    """A node on the way is not in the cache."""


def differing_chunks(old: BlockMap, new: BlockMap, nodes: NodeStore) -> Iterator[tuple[int, bool]]:
    """Positions where two maps differ, ascending, with whether the new one has data there.

    Visits only subtrees whose ids differ.
    """
    level = max(root.level for root in (old.root, new.root) if root) if old.root or new.root else 0
    yield from _differ(nodes, _lifted(old.root, level), _lifted(new.root, level), level, 0)


def _lifted(root: MapRoot | None, level: int) -> MapRoot | ChunkRef | None:
    """A root seen from a higher level: itself where the levels agree, else to be found under child 0."""
    if root is None or root.level == level:
        return root.ref if root else None
    return root


def _children(nodes: NodeStore, at: MapRoot | ChunkRef | None, level: int) -> dict[int, MapRoot | ChunkRef]:
    if at is None:
        return {}
    if isinstance(at, MapRoot):
        inner = _lifted(at, level - 1)
        return {} if inner is None else {0: inner}
    return dict(nodes.get(at, level).children())


def _differ(
    nodes: NodeStore, old: MapRoot | ChunkRef | None, new: MapRoot | ChunkRef | None, level: int, base: int
) -> Iterator[tuple[int, bool]]:
    if isinstance(old, ChunkRef) and isinstance(new, ChunkRef) and old.id == new.id:
        return
    olds, news = _children(nodes, old, level), _children(nodes, new, level)
    for slot in sorted(olds.keys() | news.keys()):
        before, after = olds.get(slot), news.get(slot)
        if level == 0:
            assert not isinstance(before, MapRoot)
            assert not isinstance(after, MapRoot)
            if (before.id if before else None) != (after.id if after else None):
                yield base + slot, after is not None
        else:
            yield from _differ(nodes, before, after, level - 1, base + slot * node_span(level - 1))
