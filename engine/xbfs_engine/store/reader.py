"""Verified reads of chunks and nodes: placement, one read for neighbours, decryption, decoding, id check.

Blocking and thread-safe: any number of threads may fetch at once. Never returns bytes whose id is not the one asked
for. Keeps the keys and directories of recently used packs, bounded in bytes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

import zstandard
from cryptography.exceptions import InvalidTag

from xbfs_engine.codec.compress import Encoding, decompress
from xbfs_engine.codec.envelope import ObjectKind, nonce
from xbfs_engine.core.errors import BlobLost, BlobNotFound, ChunkCorrupt, IntegrityError
from xbfs_engine.core.limits import KIB, MIB
from xbfs_engine.store.metadata import metadata_body
from xbfs_engine.store.pack import OpenPack, open_pack

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xbfs_engine.codec.compress import Buffer
    from xbfs_engine.codec.keys import KeySet
    from xbfs_engine.core.ids import BlobHash, ChunkRef, Placement
    from xbfs_engine.storage.base import Storage

DIRECTORY_CACHE_BYTES = 32 * MIB
READ_GAP_BYTES = 64 * KIB
"""Reading over a gap of this size is cheaper than a second read, on local disks and on object stores."""
READ_SIZE_MAX = 4 * MIB


class Locator(Protocol):
    """Where the index says a chunk is, for hints that compaction made stale."""

    def locate(self, chunk_id: bytes) -> Placement | None:
        """The place of a chunk, or None if the index does not know it."""
        ...


class ChunkReader:
    """Reads chunks and nodes of one repository."""

    def __init__(self, storage: Storage, keys: KeySet, locator: Locator | None = None) -> None:
        self._storage = storage
        self._keys = keys
        self._locator = locator
        self._packs: OrderedDict[BlobHash, OpenPack] = OrderedDict()
        self._packs_bytes = 0
        self._lock = threading.Lock()
        self._local = threading.local()

    def fetch(self, refs: Sequence[ChunkRef], kind: ObjectKind) -> list[Buffer]:
        """The plaintexts of ``refs``, in their order, each checked against its id.

        Neighbours in one pack are read with one storage call; the GIL is held only between chunks.
        Raises ChunkCorrupt, PackCorrupt, BlobLost, KeyNotHeld, StorageError.
        """
        if len(refs) == 1:
            pack, ordinal = self._place(refs[0], kind)
            directory = pack.directory
            sealed = self._read(pack, directory.offsets[ordinal], directory.stored[ordinal])
            return [self._open_chunk(pack, ordinal, sealed)]
        found: list[Buffer] = [b""] * len(refs)
        wanted = sorted(
            ((*self._place(ref, kind), number) for number, ref in enumerate(refs)),
            key=lambda item: (item[0].pack, item[1]),
        )
        start = 0
        while start < len(wanted):
            end = _run_end(wanted, start)
            self._fetch_run(wanted[start:end], found)
            start = end
        return found

    def pack(self, pack: BlobHash, kind: ObjectKind) -> OpenPack:
        """A pack's key and directory, from the cache where possible. Raises as ``open_pack``."""
        with self._lock:
            known = self._packs.get(pack)
            if known is not None and known.kind is kind:
                self._packs.move_to_end(pack)
                return known
        opened = open_pack(self._storage, self._keys, kind, pack)
        with self._lock:
            if pack not in self._packs:
                self._packs[pack] = opened
                self._packs_bytes += opened.directory.memory_bytes
            while self._packs_bytes > DIRECTORY_CACHE_BYTES and len(self._packs) > 1:
                _, dropped = self._packs.popitem(last=False)
                self._packs_bytes -= dropped.directory.memory_bytes
        return opened

    def _place(self, ref: ChunkRef, kind: ObjectKind) -> tuple[OpenPack, int]:
        """The pack and ordinal where ``ref`` really is: by its hint, else by the index."""
        problem: IntegrityError
        try:
            pack = self.pack(ref.pack, kind)
            if ref.ordinal < len(pack.directory) and pack.directory.id_at(ref.ordinal) == ref.id:
                return pack, ref.ordinal
            problem = ChunkCorrupt(f"{pack.name} does not hold chunk {ref.id.hex()[:16]} at ordinal {ref.ordinal}")
        except BlobLost as exc:
            problem = exc
        place = self._locator.locate(ref.id) if self._locator else None
        if place is None or place.pack == ref.pack:
            raise problem
        pack = self.pack(place.pack, kind)
        if place.ordinal < len(pack.directory) and pack.directory.id_at(place.ordinal) == ref.id:
            return pack, place.ordinal
        raise problem

    def _fetch_run(self, run: list[tuple[OpenPack, int, int]], found: list[Buffer]) -> None:
        pack, first, _ = run[0]
        directory = pack.directory
        last = run[-1][1]
        base = directory.offsets[first]
        blob = memoryview(self._read(pack, base, directory.offsets[last] + directory.stored[last] - base))
        previous = -1
        for _, ordinal, number in run:
            if ordinal != previous:
                offset = directory.offsets[ordinal] - base
                chunk = self._open_chunk(pack, ordinal, blob[offset : offset + directory.stored[ordinal]])
                previous = ordinal
            found[number] = chunk

    def _read(self, pack: OpenPack, offset: int, length: int) -> bytes:
        try:
            return self._storage.read(pack.name, offset, length)
        except BlobNotFound as exc:
            self._forget(pack.pack)
            raise BlobLost(f"pack {pack.name} is missing") from exc

    def _forget(self, pack: BlobHash) -> None:
        with self._lock:
            dropped = self._packs.pop(pack, None)
            if dropped is not None:
                self._packs_bytes -= dropped.directory.memory_bytes

    def _open_chunk(self, pack: OpenPack, ordinal: int, sealed: Buffer) -> Buffer:
        local = self._local
        try:
            decompressor: zstandard.ZstdDecompressor = local.decompressor
        except AttributeError:
            decompressor = local.decompressor = zstandard.ZstdDecompressor()
        return open_chunk(pack, ordinal, sealed, self.id_function(pack.kind), decompressor)

    def id_function(self, kind: ObjectKind) -> Callable[[Buffer], bytes]:
        """The keyed hash that names what packs of this kind hold."""
        if kind is ObjectKind.DATA_PACK:
            return self._keys.chunk_id
        node_id = self._keys.node_id
        return lambda plaintext: node_id(metadata_body(plaintext))


def open_chunk(
    pack: OpenPack,
    ordinal: int,
    sealed: Buffer,
    id_function: Callable[[Buffer], bytes],
    decompressor: zstandard.ZstdDecompressor,
) -> Buffer:
    """Decrypt, decode and check one sealed chunk. Raises ChunkCorrupt, FormatTooNew."""
    directory = pack.directory
    try:
        payload = pack.aead.decrypt(nonce(ordinal), sealed, None)
    except InvalidTag as exc:
        raise ChunkCorrupt(f"chunk {ordinal} of pack {pack.name} does not authenticate") from exc
    encoding = directory.encodings[ordinal]
    if encoding > Encoding.ZSTD:
        Encoding.known(encoding, f"chunk {ordinal} of pack {pack.name}")
    try:
        plain = decompress(Encoding(encoding), payload, directory.raw[ordinal], "chunk", decompressor)
    except IntegrityError as exc:
        raise ChunkCorrupt(f"chunk {ordinal} of pack {pack.name}: {exc.message}") from exc
    if id_function(plain) != directory.id_at(ordinal):
        raise ChunkCorrupt(f"chunk {ordinal} of pack {pack.name} does not have its id")
    return plain


def _run_end(wanted: list[tuple[OpenPack, int, int]], start: int) -> int:
    """Where the run of ``wanted[start]`` ends that one storage read should fetch."""
    pack = wanted[start][0]
    offsets, stored = pack.directory.offsets, pack.directory.stored
    begin = offsets[wanted[start][1]]
    reach = begin + stored[wanted[start][1]]
    end = start + 1
    while end < len(wanted) and wanted[end][0].pack == pack.pack:
        ordinal = wanted[end][1]
        stop = offsets[ordinal] + stored[ordinal]
        if offsets[ordinal] - reach > READ_GAP_BYTES or stop - begin > READ_SIZE_MAX:
            break
        reach = max(reach, stop)
        end += 1
    return end
