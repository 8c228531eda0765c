"""Walks the block maps of all restore points, shared subtrees once, and checks that every reference leads somewhere.

A node is read once; the chunks that leaves name are not read: their references are gathered and compared, pack by
pack, with what that pack's directory says it holds (with what the index says, if the role can not open data packs).
A reference that does not fit is looked up in the index, as a reader would do; what is found nowhere is lost.

Memory: BATCH references of 38 bytes, a bit a node, the nodes of one path with their siblings (some MiB) and the
reader's directory cache (32 MiB), whatever the repository holds. One thread.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

import numpy as np

from xbfs_engine.catalog.node import Node, top_level
from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.codec.keys import Role
from xbfs_engine.core.errors import FormatTooNew, IntegrityError, StorageError, XbfsError
from xbfs_engine.core.ids import ID_SIZE, ChunkRef
from xbfs_engine.maintain.places import UNLISTED, Places
from xbfs_engine.maintain.report import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.codec.keys import KeySet
    from xbfs_engine.core.ids import BlobHash
    from xbfs_engine.maintain.findings import Findings
    from xbfs_engine.maintain.lists import IndexLists
    from xbfs_engine.maintain.places import PackTable
    from xbfs_engine.store.reader import ChunkReader

BATCH: Final = 256 * 1024
FAILURES: Final = (IntegrityError, FormatTooNew, StorageError)
"""What reading a damaged repository raises; anything else is not its fault."""
_IDS = np.dtype("<u8")


class MapScan:
    """Walks maps and marks in ``findings.places`` what can not be reached."""

    def __init__(
        self, keys: KeySet, reader: ChunkReader, table: PackTable, lists: IndexLists, findings: Findings
    ) -> None:
        self._reader = reader
        self._table = table
        self._findings = findings
        self._seen = Places()
        self._references = _References(keys, reader, table, lists, findings)
        self.nodes = 0

    @property
    def references(self) -> int:
        """Chunk references seen in leaves, shared leaves once."""
        return self._references.count

    def scan(self, point: RestorePoint, tick: Callable[[], None]) -> None:
        """Walk all disks of a point, except what was walked already."""
        for disk in point.disks:
            if disk.root is None:
                continue
            if disk.root.level != top_level(disk.chunks):
                message = f"the block map of disk {disk.number} has a root of level {disk.root.level}"
                self._findings.damage(Kind.POINT, f"points/{point.id}", message)
            else:
                self._walk(disk.root.ref, disk.root.level, tick)

    def finish(self) -> None:
        """Settle the references that are still gathered."""
        self._references.flush()

    def _walk(self, root: ChunkRef, level: int, tick: Callable[[], None]) -> None:
        pending: list[tuple[int, Sequence[ChunkRef]]] = [(level, [root])]
        parents: list[Node] = []
        while pending or parents:
            if pending:
                level, refs = pending.pop()
            else:
                parent = parents.pop()
                level, refs = parent.level - 1, [child for _, child in parent.children()]
            tick()
            for node in self._nodes(refs, level):
                if level:
                    parents.append(node)
                else:
                    self._references.add_leaf(node)

    def _nodes(self, refs: Sequence[ChunkRef], level: int) -> Iterator[Node]:
        """The nodes not seen before, all read at once if they can be."""
        fresh = [ref for ref in refs if self._seen.add(ref.pack, ref.ordinal)]
        self.nodes += len(fresh)
        try:
            plaintexts = self._reader.fetch(fresh, ObjectKind.METADATA_PACK) if fresh else []
            nodes = [Node(plain, level, ref.pack) for plain, ref in zip(plaintexts, fresh, strict=True)]
        except FAILURES:
            nodes = [node for ref in fresh if (node := self._node(ref, level)) is not None]
        for ref in fresh:
            number = self._table.find(ObjectKind.METADATA_PACK, ref.pack)
            if number >= 0:
                self._table.referenced[number] = True
        yield from nodes

    def _node(self, ref: ChunkRef, level: int) -> Node | None:
        try:
            return Node(self._reader.fetch([ref], ObjectKind.METADATA_PACK)[0], level, ref.pack)
        except FAILURES as exc:
            text = f"node {ref.ordinal} of level {level}: {exc.message}"
            self._findings.damaged_pack(
                ObjectKind.METADATA_PACK, ref.pack, "block map nodes can not be read", text, mask=1 << ref.ordinal
            )
            return None


class _References:
    """References to chunks, gathered and settled in batches."""

    def __init__(
        self, keys: KeySet, reader: ChunkReader, table: PackTable, lists: IndexLists, findings: Findings
    ) -> None:
        self._reader = reader
        self._table = table
        self._lists = lists
        self._findings = findings
        self._opens_data = keys.role is Role.OWNER
        self._elsewhere: list[ChunkRef] = []
        self._clear()
        self.count = 0

    def _clear(self) -> None:
        self._ids = bytearray()
        self._numbers = array("i")
        self._ordinals = array("H")

    def add_leaf(self, leaf: Node) -> None:
        """Take in all children of a leaf."""
        find, kind = self._table.find, ObjectKind.DATA_PACK
        for _, ref in leaf.children():
            number = find(kind, ref.pack)
            if number < 0:
                self._elsewhere.append(ref)
            else:
                self._ids += ref.id
                self._numbers.append(number)
                self._ordinals.append(ref.ordinal)
        self.count += leaf.count
        if len(self._numbers) + len(self._elsewhere) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Settle everything gathered."""
        numbers = np.frombuffer(self._numbers, dtype=np.int32)
        ordinals = np.frombuffer(self._ordinals, dtype=np.uint16)
        ids = np.frombuffer(bytes(self._ids), dtype=_IDS).reshape(-1, ID_SIZE // _IDS.itemsize)
        # By index blob first: a role that must ask the index then decodes each blob once.
        order = np.lexsort((numbers, self._table.source[numbers]))
        for group in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1) if len(order) else ():
            self._settle(int(numbers[group[0]]), ids[group], ordinals[group])
        # The arrays are still lent to numpy: new ones instead of emptied ones.
        self._clear()
        self._find_elsewhere()

    def _settle(self, number: int, ids: NDArray[np.uint64], ordinals: NDArray[np.uint16]) -> None:
        """Compare references into one pack with what it holds."""
        self._table.referenced[number] = True
        pack = self._table[number].pack
        if self._findings.places.mask(pack) < 0:
            return
        try:
            held = self._held(number)
        except FAILURES as exc:
            message = "can not be opened"
            self._findings.damaged_pack(ObjectKind.DATA_PACK, pack, message, exc.message, mask=-1)
            return
        if held is None:
            return
        fits = ordinals < len(held)
        fits[fits] = (held[ordinals[fits]] == ids[fits]).all(axis=1)
        for row in np.flatnonzero(~fits).tolist():
            self._elsewhere.append(ChunkRef(ids[row].tobytes(), pack, int(ordinals[row])))

    def _held(self, number: int) -> NDArray[np.uint64] | None:
        """Ids by ordinal of what a pack holds; None if this role can not know."""
        pack = self._table[number].pack
        source = int(self._table.source[number])
        if self._opens_data:
            raw = self._reader.pack(pack, ObjectKind.DATA_PACK).directory.ids
        elif source == UNLISTED:
            return None
        else:
            raw = self._lists.ids(source, pack)
        return np.frombuffer(raw, dtype=_IDS).reshape(-1, ID_SIZE // _IDS.itemsize)

    def _find_elsewhere(self) -> None:
        """Look for chunks that are not where references say; mark those that are nowhere."""
        stale, self._elsewhere = self._elsewhere, []
        if not stale:
            return
        lost: dict[BlobHash, int] = {}
        for ref, place in zip(stale, self._lists.lookup([ref.id for ref in stale]), strict=True):
            if place is None or place.pack == ref.pack or not self._is_at(ref.id, place.pack, place.ordinal):
                lost[ref.pack] = lost.get(ref.pack, 0) | 1 << ref.ordinal
        for pack, mask in lost.items():
            missing = self._table.find(ObjectKind.DATA_PACK, pack) < 0
            message = "is missing" if missing else "does not hold chunks that restore points refer to"
            self._findings.damaged_pack(ObjectKind.DATA_PACK, pack, message, mask=mask)

    def _is_at(self, chunk_id: bytes, pack: BlobHash, ordinal: int) -> bool:
        number = self._table.find(ObjectKind.DATA_PACK, pack)
        if number < 0 or self._findings.places.mask(pack) >> ordinal & 1:
            return False
        try:
            held = self._held(number)
        except XbfsError:
            return False
        self._table.referenced[number] = True
        return held is None or (ordinal < len(held) and held[ordinal].tobytes() == chunk_id)
