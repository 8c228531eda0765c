"""A write session: packs being filled, what was written already, and the index blobs that make it findable.

Several worker threads share one session: ``claim``, ``seal`` and ``find`` may be called by any. Metadata is written by
one thread at a time (``MetadataWriter``). Order on the storage: data packs, then an index blob that lists them, then
the metadata packs that point at them; the manifest comes after ``finish``.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

from xbfs_engine.codec.compress import Encoding
from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.core.ids import ID_SIZE
from xbfs_engine.core.limits import INDEX_ENTRIES_PER_BLOB, MIB
from xbfs_engine.store.index_blob import put_index
from xbfs_engine.store.packer import PackTicket, PackWriter, SealedPack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.core.ids import BlobHash, Placement
    from xbfs_engine.store.index import ChunkIndex
    from xbfs_engine.store.repository import Repository

METADATA_PACK_TARGET = 8 * MIB
"""Metadata packs are small: one node is read at a time, and a run of a few changes should stay a few KiB."""


class Place(NamedTuple):
    """Where a chunk lies or will lie: a pack known by name, or one that is still being filled."""

    pack: BlobHash | PackTicket
    ordinal: int

    def known_pack(self) -> BlobHash | None:
        """The pack's name, or None while it is being filled."""
        pack = self.pack
        return pack.pack if isinstance(pack, PackTicket) else pack


class WriteSession:
    """What one run writes into a repository."""

    def __init__(self, repository: Repository, index: ChunkIndex) -> None:
        self._repository = repository
        self._index = index
        self._recent: dict[bytes, Place] = {}
        self._unlisted: list[SealedPack] = []
        self._lock = threading.Lock()
        self.stored_bytes = 0
        self.metadata_bytes = 0
        self.packs = 0

    def data_writer(self) -> PackWriter:
        """A writer of data packs for one worker thread."""
        return self._writer(ObjectKind.DATA_PACK, self._repository.parameters.pack_size_target)

    def metadata_writer(self) -> MetadataWriter:
        """The writer of block map nodes."""
        return MetadataWriter(self, self._writer(ObjectKind.METADATA_PACK, METADATA_PACK_TARGET))

    def _writer(self, kind: ObjectKind, target: int) -> PackWriter:
        repository = self._repository
        return PackWriter(repository.storage, repository.keys, repository.runtime.random, kind, target_bytes=target)

    def find(self, ids: Sequence[bytes]) -> list[Placement | None]:
        """Places of chunks that earlier sessions, or earlier index blobs of this one, have written."""
        return self._index.lookup(ids)

    def holds(self, pack: BlobHash) -> bool:
        """Whether a pack that an earlier point refers to is still on the storage."""
        return self._index.holds(pack)

    def claim(self, chunk_id: bytes, place: Place) -> Place:
        """Say that the caller is about to store a chunk at ``place``; returns the place of whoever said so first."""
        return self._recent.setdefault(chunk_id, place)

    def recent(self, chunk_id: bytes) -> Place | None:
        """Where this session stored, or is about to store, a chunk that is in no index blob yet."""
        return self._recent.get(chunk_id)

    def seal(self, writer: PackWriter) -> None:
        """Write out what ``writer`` has gathered; lists packs in an index blob once there are many chunks."""
        sealed = writer.seal()
        if sealed is None:
            return
        with self._lock:
            self.packs += 1
            if sealed.kind is ObjectKind.DATA_PACK:
                self.stored_bytes += sealed.size_bytes
            else:
                self.metadata_bytes += sealed.size_bytes
            self._unlisted.append(sealed)
            if sum(len(pack) for pack in self._unlisted) >= INDEX_ENTRIES_PER_BLOB:
                self._list_packs()

    def list_packs(self) -> None:
        """Write an index blob for every sealed pack that is in none yet."""
        with self._lock:
            self._list_packs()

    def _list_packs(self) -> None:
        packs, self._unlisted = self._unlisted, []
        if not packs:
            return
        repository = self._repository
        name = put_index(repository.storage, repository.keys, repository.runtime.random, packs)
        self._index.add(name, packs)
        for pack in packs:
            for at in range(0, len(pack.ids), ID_SIZE):
                self._recent.pop(pack.ids[at : at + ID_SIZE], None)


class MetadataWriter:
    """Writes metadata chunks one after the other. One thread at a time."""

    def __init__(self, session: WriteSession, writer: PackWriter) -> None:
        self._session = session
        self._writer = writer

    @property
    def current(self) -> PackTicket:
        """The pack the next chunk goes into."""
        if self._writer.full:
            self.flush()
        return self._writer.ticket

    def find(self, node_id: bytes) -> Place | None:
        """Where a node with this id already lies, written by anybody."""
        recent = self._session.recent(node_id)
        if recent is not None:
            return recent
        place = self._session.find([node_id])[0]
        return None if place is None else Place(*place)

    def write(self, node_id: bytes, plaintext: bytes) -> Place:
        """Store a metadata chunk in the current pack. Nodes are mostly hashes: compressing them gains nothing."""
        ticket = self.current
        place = Place(ticket, self._writer.count)
        self._writer.add(node_id, plaintext, len(plaintext), Encoding.RAW)
        return self._session.claim(node_id, place)

    def flush(self) -> None:
        """Make everything written so far durable, data packs and their index blob first."""
        self._session.list_packs()
        self._session.seal(self._writer)

    def finish(self) -> None:
        """Flush, and list the metadata packs too."""
        self.flush()
        self._session.list_packs()
