"""Cuts entries into segments and stores those that are not there yet. A SegmentWriter belongs to one thread.

A segment ends after an entry whose path, not its metadata, hashes to a certain value: so a changed file changes one
segment, and a new or removed one at most its neighbours.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final

from xbfs_engine.catalog.fileindex.records import SegmentRef
from xbfs_engine.catalog.fileindex.root import SEGMENTS_BYTES_MAX
from xbfs_engine.catalog.fileindex.segment import ENTRIES_MAX, encode_segment
from xbfs_engine.codec.compress import Compressor
from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.core.errors import GuestUnsupported, IntegrityError
from xbfs_engine.core.ids import ID_SIZE, ChunkRef
from xbfs_engine.store.metadata import metadata_chunk
from xbfs_engine.store.packer import PackWriter
from xbfs_engine.store.session import METADATA_PACK_TARGET, WriteSession

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xbfs_engine.catalog.fileindex.segment import Entry
    from xbfs_engine.store.packer import PackTicket
    from xbfs_engine.store.reader import ChunkReader
    from xbfs_engine.store.repository import Repository

CUT_MASK: Final = 511
"""A segment ends where the CRC-32 of a path has these bits clear: 640 entries on average, 40 KiB, 5 KiB stored. Longer
ones compress by 5 % better, but a changed file then stores twice as much (ADR 0006)."""
ENTRIES_MIN: Final = 128
_PATHS_TARGET: Final = 1 << 20
"""Bytes of all paths of a segment after which it ends: half of what a segment may have."""
_LEVEL: Final = 9
"""Of zstd: 7 % smaller than the default, for a twentieth of the time that listing takes."""


class SegmentWriter:
    """Stores the segments of one point's volumes. ``known``: where segments of earlier points lie, by id.

    ``reader``, if given, reads every segment that would be shared, and one that can not be read is stored anew.
    """

    def __init__(
        self,
        repository: Repository,
        session: WriteSession,
        known: Iterable[SegmentRef],
        reader: ChunkReader | None,
    ) -> None:
        self._session = session
        self._node_id = repository.keys.node_id
        self._writer = PackWriter(
            repository.storage,
            repository.keys,
            repository.runtime.random,
            ObjectKind.METADATA_PACK,
            target_bytes=METADATA_PACK_TARGET,
        )
        self._compressor = Compressor(_LEVEL)
        self._reader = reader
        self._places: dict[bytes, ChunkRef | tuple[PackTicket, int]] = {}
        self._known = {segment.ref.id: segment.ref for segment in known}
        self.stored = self.shared = 0
        """Segments that were stored, and that were there already."""

    def write(self, entries: Iterable[Entry]) -> list[tuple[bytes, int, bytes]]:
        """Store the entries of a volume; returns id, entries and first path of each segment: see ``finish``."""
        found: list[tuple[bytes, int, bytes]] = []
        firsts = 0
        held: list[Entry] = []
        paths = 0
        for entry in entries:
            held.append(entry)
            paths += len(entry.path)
            if (
                (len(held) >= ENTRIES_MIN and not zlib.crc32(entry.path) & CUT_MASK)
                or len(held) >= ENTRIES_MAX
                or paths >= _PATHS_TARGET
            ):
                found.append(self._store(held))
                firsts += len(held[0].path) + 1
                if firsts + ID_SIZE * len(found) > SEGMENTS_BYTES_MAX // 2:
                    raise GuestUnsupported("the volume has more files than a file index can hold")
                held, paths = [], 0
        if held:
            found.append(self._store(held))
        return found

    def finish(self) -> None:
        """Make all segments durable and listed: from here on ``ref`` knows where they are."""
        self._session.seal(self._writer)
        self._session.list_packs()

    def ref(self, segment: tuple[bytes, int, bytes]) -> SegmentRef:
        """A stored segment with its place."""
        segment_id, entries, first = segment
        place = self._places[segment_id]
        if isinstance(place, ChunkRef):
            return SegmentRef(place, entries, first)
        ticket, ordinal = place
        assert ticket.pack is not None
        return SegmentRef(ChunkRef(segment_id, ticket.pack, ordinal), entries, first)

    def _store(self, entries: list[Entry]) -> tuple[bytes, int, bytes]:
        body = encode_segment(entries)
        segment_id = self._node_id(body)
        if segment_id not in self._places:
            self._places[segment_id] = self._stored_before(segment_id) or self._add(segment_id, body)
        return segment_id, len(entries), entries[0].path

    def _add(self, segment_id: bytes, body: bytes) -> tuple[PackTicket, int]:
        if self._writer.full:
            self._session.seal(self._writer)
        plaintext = metadata_chunk(body, b"")
        encoding, payload = self._compressor.encode(plaintext)
        self.stored += 1
        return self._writer.ticket, self._writer.add(segment_id, payload, len(plaintext), encoding)

    def _stored_before(self, segment_id: bytes) -> ChunkRef | None:
        ref = self._known.get(segment_id)
        if ref is None:
            place = self._session.find([segment_id])[0]
            ref = None if place is None else ChunkRef(segment_id, *place)
        if ref is None or not self._session.holds(ref.pack):
            return None
        if self._reader is not None:
            try:
                self._reader.fetch([ref], ObjectKind.METADATA_PACK)
            except IntegrityError:
                return None
        self.shared += 1
        return ref
