"""Writing block maps as a stream of leaves in ascending order; memory is one open node per level.

With ``carry`` the new map continues ``base`` and only what is put differs (a delta); without it, what is not put is
zero (a full read) and the base serves only to find unchanged nodes. Either way a node that equals its counterpart in
the base is referred to, not written. One thread at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs_engine.catalog.blockmap import MapRoot
from xbfs_engine.catalog.node import SAME_PACK, fanout, node_plaintext, top_level
from xbfs_engine.core.errors import IntegrityError
from xbfs_engine.core.ids import ChunkRef
from xbfs_engine.core.limits import NODE_FANOUT
from xbfs_engine.store.metadata import metadata_body
from xbfs_engine.store.session import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xbfs_engine.catalog.blockmap import NodeStore
    from xbfs_engine.catalog.node import Node
    from xbfs_engine.core.ids import BlobHash
    from xbfs_engine.store.session import MetadataWriter

Child = tuple[bytes, Place]
"""A child's id and where it lies or will lie."""


class _OpenNode:
    """An inner node that still gets children."""

    __slots__ = ("base", "children", "index")

    def __init__(self, index: int, base: Node | None, *, carry: bool) -> None:
        self.index = index
        self.base = base
        self.children: dict[int, Child] = {}
        if carry and base is not None:
            self.children = {slot: _known(ref) for slot, ref in base.children()}


class MapWriter:
    """Writes the map of one disk. ``chunks`` is the disk's new size in chunks; it never shrinks below the base's."""

    def __init__(
        self,
        nodes: NodeStore,
        writer: MetadataWriter,
        node_id: Callable[[memoryview], bytes],
        *,
        base: MapRoot | None,
        carry: bool,
        chunks: int,
    ) -> None:
        self._nodes = nodes
        self._writer = writer
        self._node_id = node_id
        self._carry = carry
        self._top = top_level(chunks)
        self._base = self._lift(base)
        self._open: dict[int, _OpenNode] = {}
        self._root: Child | None = None
        self._touched = False
        self._last_leaf = -1

    def base_leaf(self, number: int) -> Node | None:
        """The base's leaf of that number; any thread may ask."""
        return self._base_node(0, number)

    def put_leaf(self, number: int, children: Sequence[Child | None], *, maybe_known: bool) -> None:
        """Set all 64 children of a leaf; numbers ascend strictly.

        ``maybe_known``: none of its chunks is new, so the same leaf may exist elsewhere and is looked up.
        Every child's pack must be known by name.
        """
        assert number > self._last_leaf
        self._last_leaf = number
        self._touched = True
        base = self._base_node(0, number)
        place = self._store(0, children, base, self._base_ref(0, number), maybe_known=maybe_known)
        self._set(1, number, place)

    def finish(self) -> MapRoot | None:
        """Close all nodes; the root, or None for a disk of zeros. The root's pack is durable after a flush."""
        if not self._touched:
            return self._base if self._carry else None
        for level in range(1, self._top + 1):
            if level in self._open:
                self._close(level)
        root = self._root
        if root is None:
            return None
        self._writer.flush()
        pack = root[1].known_pack()
        assert pack is not None
        return MapRoot(ChunkRef(root[0], pack, root[1].ordinal), self._top)

    def _set(self, level: int, index: int, child: Child | None) -> None:
        """Make ``child`` the index-th node of level - 1."""
        if level > self._top:
            self._root = child
            return
        number, slot = divmod(index, NODE_FANOUT)
        node = self._open.get(level)
        if node is not None and node.index != number:
            self._close(level)
            node = None
        if node is None:
            node = self._open[level] = _OpenNode(number, self._base_node(level, number), carry=self._carry)
        if child is None:
            node.children.pop(slot, None)
        else:
            node.children[slot] = child

    def _close(self, level: int) -> None:
        node = self._open.pop(level)
        children: list[Child | None] = [node.children.get(slot) for slot in range(fanout(level))]
        place = self._store(level, children, node.base, self._base_ref(level, node.index), maybe_known=False)
        self._set(level + 1, node.index, place)

    def _store(
        self,
        level: int,
        children: Sequence[Child | None],
        base: Node | None,
        base_ref: ChunkRef | None,
        *,
        maybe_known: bool,
    ) -> Child | None:
        present = sum(child is not None for child in children)
        if not present:
            return None
        if base is not None and base_ref is not None and base.count == present:
            same = all((at := children[slot]) is not None and at[0] == ref.id for slot, ref in base.children())
            if same:
                return _known(base_ref)
        ticket = self._writer.current
        refs = [
            None
            if child is None
            else ChunkRef(child[0], SAME_PACK if child[1].pack is ticket else _pack_of(child[1]), child[1].ordinal)
            for child in children
        ]
        plaintext = node_plaintext(level, refs)
        node_id = self._node_id(metadata_body(plaintext))
        known = self._writer.find(node_id) if maybe_known else None
        if known is not None:
            return node_id, known
        return node_id, self._writer.write(node_id, plaintext)

    def _lift(self, base: MapRoot | None) -> MapRoot | None:
        """The base under as many single-child nodes as a grown disk needs."""
        if base is None or base.level == self._top:
            return base
        child: Child = _known(base.ref)
        for level in range(base.level + 1, self._top + 1):
            places: list[Child | None] = [None] * fanout(level)
            places[0] = child
            stored = self._store(level, places, None, None, maybe_known=True)
            assert stored is not None
            child = stored
        self._writer.flush()
        pack = child[1].known_pack()
        assert pack is not None
        return MapRoot(ChunkRef(child[0], pack, child[1].ordinal), self._top)

    def _base_ref(self, level: int, index: int) -> ChunkRef | None:
        if self._base is None:
            return None
        if level == self._top:
            return self._base.ref if index == 0 else None
        parent = self._base_node(level + 1, index // NODE_FANOUT)
        return None if parent is None else parent.child(index % NODE_FANOUT)

    def _base_node(self, level: int, index: int) -> Node | None:
        if level > 0 and (node := self._open.get(level)) is not None and node.index == index:
            return node.base
        ref = self._base_ref(level, index)
        if ref is None:
            return None
        try:
            return self._nodes.get(ref, level)
        except IntegrityError:
            if self._carry:
                raise
            return None  # a full read needs no base: it writes anew what is damaged


def _known(ref: ChunkRef) -> Child:
    return ref.id, Place(ref.pack, ref.ordinal)


def _pack_of(place: Place) -> BlobHash:
    pack = place.known_pack()
    assert pack is not None, "children are written and named before their parent"
    return pack
