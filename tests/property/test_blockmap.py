"""Block maps against a dictionary: any sequence of full and incremental writes, growth included."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.runtime import SeededRandom
from tools.make_vectors import fixed_keys
from xbfs_engine.catalog.blockmap import BlockMap, MapRoot, NodeStore, differing_chunks
from xbfs_engine.catalog.mapwriter import Child, MapWriter
from xbfs_engine.catalog.node import node_span, top_level
from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.core.ids import BlobHash
from xbfs_engine.core.limits import LEAF_FANOUT, MIB
from xbfs_engine.storage.memory import MemoryStorage
from xbfs_engine.store.packer import PackWriter
from xbfs_engine.store.reader import ChunkReader
from xbfs_engine.store.session import MetadataWriter, Place

KEYS = fixed_keys()
PACKS = [BlobHash(bytes([number]) * 32) for number in range(1, 4)]

_SIZES = [0, 1, 63, 64, 65, 128, 64 * 256, 64 * 256 + 1, 64 * 256 * 256 + 5, 1 << 30]
_SPOTS = sorted({max(0, size + delta) for size in _SIZES for delta in (-2, -1, 0, 1, 70)})
_WRITES = st.dictionaries(st.sampled_from(_SPOTS), st.none() | st.integers(0, 5), max_size=12)


class Step(NamedTuple):
    full: bool
    size: int
    writes: dict[int, int | None]


_STEPS = st.lists(st.builds(Step, st.booleans(), st.sampled_from(_SIZES), _WRITES), min_size=1, max_size=6)


class Session:
    """As much of a write session as metadata needs: packs of any size, nothing known from elsewhere."""

    def __init__(self, storage: MemoryStorage) -> None:
        self.known: dict[bytes, Place] = {}
        self.storage = storage

    def recent(self, node_id: bytes) -> Place | None:
        return self.known.get(node_id)

    def find(self, ids: list[bytes]) -> list[None]:
        return [None] * len(ids)

    def claim(self, node_id: bytes, place: Place) -> Place:
        return self.known.setdefault(node_id, place)

    def list_packs(self) -> None:
        pass

    def seal(self, writer: PackWriter) -> None:
        writer.seal()


def child(position: int, content: int) -> Child:
    return KEYS.chunk_id(b"%d %d" % (position % 7, content)), Place(PACKS[content % 3], position & 0xFFFF)


class Maps:
    """A storage with maps, written through MapWriter and read through BlockMap."""

    def __init__(self, seed: int, pack_bytes: int) -> None:
        storage = MemoryStorage()
        self.nodes = NodeStore(ChunkReader(storage, KEYS), cache_bytes=20_000)
        kind = ObjectKind.METADATA_PACK
        packs = PackWriter(storage, KEYS, SeededRandom(seed), kind, target_bytes=pack_bytes)
        self.writer = MetadataWriter(Session(storage), packs)  # type: ignore[arg-type]  # stands in for a session

    def write(self, base: MapRoot | None, old: dict[int, int], step: Step) -> tuple[MapRoot | None, dict[int, int]]:
        """The root and what it should hold after a step."""
        new = {} if step.full else dict(old)
        touched = set()
        for position, content in step.writes.items():
            if position < step.size:
                touched.add(position // LEAF_FANOUT)
                new.pop(position, None)
                if content is not None:
                    new[position] = content
        maps = MapWriter(self.nodes, self.writer, KEYS.node_id, base=base, carry=not step.full, chunks=step.size)
        for leaf in sorted(touched):
            children = [
                child(at, new[at]) if (at := leaf * LEAF_FANOUT + slot) in new else None for slot in range(LEAF_FANOUT)
            ]
            maps.put_leaf(leaf, children, maybe_known=len(children) % 2 == 0)
        root = maps.finish()
        self.writer.finish()
        return root, new


@settings(max_examples=80, deadline=None)
@given(steps=_STEPS, seed=st.integers(0, 100), pack_bytes=st.sampled_from([200, 5000, MIB]))
def test_maps_hold_what_was_put_and_differ_where_they_differ(steps: list[Step], seed: int, pack_bytes: int) -> None:
    maps = Maps(seed, pack_bytes)
    root: MapRoot | None = None
    truth: dict[int, int] = {}
    size = 0
    history: list[tuple[BlockMap, dict[int, int]]] = []
    for step in steps:
        size = max(size, step.size)
        root, truth = maps.write(root, truth, step._replace(size=size))
        history.append((BlockMap(maps.nodes, root, size), truth))
    for block_map, expected in history:
        wanted = {at: child(at, content) for at, content in expected.items()}
        found = {
            number * LEAF_FANOUT + slot: ref for number, leaf in block_map.leaves() for slot, ref in leaf.children()
        }
        assert {at: ref.id for at, ref in found.items()} == {at: each[0] for at, each in wanted.items()}
        assert (block_map.root is None) == (not expected)
        for at in (spot for spot in _SPOTS if spot < block_map.chunks):
            ref = block_map.chunk(at)
            assert (ref.id if ref else None) == (wanted[at][0] if at in wanted else None)
    for old, before in history:
        for new, after in history:
            ids = [{at: child(at, content)[0] for at, content in each.items()} for each in (before, after)]
            changed = sorted(at for at in ids[0].keys() | ids[1].keys() if ids[0].get(at) != ids[1].get(at))
            assert list(differing_chunks(old, new, maps.nodes)) == [(at, at in after) for at in changed]


@settings(max_examples=40, deadline=None)
@given(writes=_WRITES, size=st.sampled_from(_SIZES))
def test_the_same_content_has_the_same_root_however_it_came_about(writes: dict[int, int | None], size: int) -> None:
    maps = Maps(1, 5000)
    at_once, _ = maps.write(None, {}, Step(full=True, size=size, writes=writes))
    root, truth = maps.write(None, {}, Step(full=True, size=size, writes={0: 1, 3: 2, size // 2: 4}))
    undo: dict[int, int | None] = dict.fromkeys(truth)
    root, _ = maps.write(root, truth, Step(full=False, size=size, writes=undo | writes))
    assert (at_once and at_once.ref.id) == (root and root.ref.id)


@given(chunks=st.integers(0, 1 << 45))
def test_the_root_is_at_the_lowest_level_that_covers_the_disk(chunks: int) -> None:
    level = top_level(chunks)
    assert node_span(level) >= chunks
    assert level == 0 or node_span(level - 1) < chunks
