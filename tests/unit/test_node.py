"""Block map nodes at their limits."""

from __future__ import annotations

import pytest

from tools.make_vectors import filler
from xbfs_engine.catalog.node import SAME_PACK, Node, encode_node, fanout, node_plaintext
from xbfs_engine.core.errors import FormatTooNew, MapCorrupt
from xbfs_engine.core.ids import BlobHash, ChunkRef
from xbfs_engine.core.limits import MAP_LEVEL_MAX
from xbfs_engine.store.metadata import metadata_chunk

HERE = BlobHash(b"h" * 32)


def ref(number: int, pack: BlobHash | None = None) -> ChunkRef:
    return ChunkRef(filler(f"id {number}", 32), pack or BlobHash(filler(f"pack {number}", 32)), number * 257 & 0xFFFF)


@pytest.mark.parametrize("level", [0, 1, MAP_LEVEL_MAX])
def test_a_full_node_with_a_pack_a_child(level: int) -> None:
    children: list[ChunkRef | None] = [ref(number) for number in range(fanout(level))]
    assert Node(node_plaintext(level, children), level, HERE).to_list() == children


@pytest.mark.parametrize("slot", [0, 7, 8, 63])
def test_a_single_child_anywhere(slot: int) -> None:
    children: list[ChunkRef | None] = [None] * 64
    children[slot] = ref(slot)
    node = Node(node_plaintext(0, children), 0, HERE)
    assert [node.child(at) for at in range(64)] == children
    assert (list(node.children()), node.count) == ([(slot, ref(slot))], 1)


def test_the_same_pack_is_the_one_it_was_read_from() -> None:
    children: list[ChunkRef | None] = [ref(1, SAME_PACK), ref(2), *[None] * 62]
    node = Node(node_plaintext(0, children), 0, HERE)
    assert node.child(0) == ref(1, HERE)
    assert node.child(1) == ref(2)


def test_hints_do_not_change_the_body() -> None:
    """What makes moving packs possible without a new id for every node above."""
    bodies = {
        encode_node(0, [ref(1, BlobHash(bytes([n]) * 32))._replace(ordinal=n), *[None] * 63])[0] for n in range(9)
    }
    assert len(bodies) == 1


def test_every_child_changes_the_body() -> None:
    base: list[ChunkRef | None] = [ref(number) for number in range(64)]
    bodies = {encode_node(0, base)[0]}
    for slot in range(64):
        bodies.add(encode_node(0, [None if at == slot else child for at, child in enumerate(base)])[0])
        bodies.add(encode_node(0, [ref(99) if at == slot else child for at, child in enumerate(base)])[0])
    assert len(bodies) == 129


def test_nodes_out_of_place_and_of_other_versions_are_told() -> None:
    leaf = node_plaintext(0, [ref(1), *[None] * 63])
    body, hints = encode_node(0, [ref(1), *[None] * 63])
    with pytest.raises(MapCorrupt, match="level"):
        Node(leaf, 1, HERE)
    with pytest.raises(FormatTooNew):
        Node(metadata_chunk(b"\2" + body[1:], hints), 0, HERE)
    with pytest.raises(MapCorrupt, match="does not list"):
        Node(metadata_chunk(body, hints[:34] + b"\1" + hints[35:]), 0, HERE)
    with pytest.raises(MapCorrupt, match="counts"):
        Node(metadata_chunk(body[:4] + b"\3" + body[5:], hints), 0, HERE)
    with pytest.raises(MapCorrupt):
        Node(metadata_chunk(body[:2] + b"\0\0" + bytes(8), b"\0\0"), 0, HERE)
