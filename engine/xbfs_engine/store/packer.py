"""Filling packs. A PackWriter belongs to one thread; a PackTicket may be read by any.

Chunks are encrypted straight into one reused buffer: a list of ciphertexts would touch fresh pages for every chunk and
cost five times as much.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from xbfs_engine.codec.envelope import HEADER_SIZE, KEY_SIZE, LAST_NONCE, TAG_SIZE, ObjectKind, make_header, nonce
from xbfs_engine.core.limits import CHUNK_SIZE_MAX, PACK_ENTRIES_TARGET
from xbfs_engine.store.pack import FOOTER, FOOTER_MAGIC, NO_BASE, RECORD, blob_hash, encode_directory, pack_name

if TYPE_CHECKING:
    from xbfs_engine.codec.compress import Buffer, Encoding
    from xbfs_engine.codec.keys import KeySet
    from xbfs_engine.core.ids import BlobHash
    from xbfs_engine.core.runtime import RandomSource
    from xbfs_engine.storage.base import Storage


class PackTicket:
    """A pack that is being filled: its name is known once it is durable."""

    __slots__ = ("pack",)

    def __init__(self) -> None:
        self.pack: BlobHash | None = None


class SealedPack:
    """A pack that was written: what the index needs to know."""

    __slots__ = ("ids", "kind", "pack", "size_bytes")

    def __init__(self, kind: ObjectKind, pack: BlobHash, size_bytes: int, ids: bytes) -> None:
        self.kind = kind
        self.pack = pack
        self.size_bytes = size_bytes
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids) // 32


class PackWriter:
    """Fills packs of one kind, one after the other. Use from one thread at a time.

    ``target_bytes``: a pack is full when its stored chunks reach this.
    """

    def __init__(
        self, storage: Storage, keys: KeySet, random: RandomSource, kind: ObjectKind, *, target_bytes: int
    ) -> None:
        self._storage = storage
        self._keys = keys
        self._random = random
        self._kind = kind
        self._target = target_bytes
        self._buffer = bytearray(HEADER_SIZE + target_bytes + CHUNK_SIZE_MAX + TAG_SIZE)
        self._view = memoryview(self._buffer)
        self._begin()

    def _begin(self) -> None:
        self.ticket = PackTicket()
        # Flat: a pack of tiny chunks has thousands, and two workers fill packs at once.
        self._ids = bytearray()
        self._stored = array("I")
        self._raw = array("I")
        self._encodings = bytearray()
        self._end = HEADER_SIZE
        self._aead: AESGCM | None = None

    @property
    def count(self) -> int:
        """Chunks in the pack that is being filled; also the ordinal the next one gets."""
        return len(self._encodings)

    @property
    def full(self) -> bool:
        """Whether the pack must be sealed before anything is added."""
        return self._end - HEADER_SIZE >= self._target or len(self._encodings) >= PACK_ENTRIES_TARGET

    def add(self, chunk_id: bytes, payload: Buffer, raw_bytes: int, encoding: Encoding) -> int:
        """Encrypt one encoded chunk of at most CHUNK_SIZE_MAX bytes into the pack; returns its ordinal."""
        assert not self.full
        if self._aead is None:
            key = self._random.token(KEY_SIZE)
            self._view[:HEADER_SIZE] = make_header(self._keys, self._kind, key)
            self._aead = AESGCM(key)
        ordinal = len(self._encodings)
        stored = len(payload) + TAG_SIZE
        self._aead.encrypt_into(nonce(ordinal), payload, None, self._view[self._end : self._end + stored])
        self._end += stored
        self._ids += chunk_id
        self._stored.append(stored)
        self._raw.append(raw_bytes)
        self._encodings.append(encoding)
        return ordinal

    def seal(self) -> SealedPack | None:
        """Write the pack durably, fulfil its ticket and begin a new one; None if it is empty."""
        if self._aead is None:
            return None
        ids = bytes(self._ids)
        records = np.zeros(self.count, dtype=RECORD)
        records["id"] = np.frombuffer(ids, dtype="V32")
        records["stored"] = self._stored
        records["raw"] = self._raw
        records["encoding"] = np.frombuffer(self._encodings, dtype=np.uint8)
        records["base"] = NO_BASE
        header = bytes(self._view[:HEADER_SIZE])
        directory = self._aead.encrypt(LAST_NONCE, encode_directory(records), header)
        tail = directory + FOOTER.pack(len(directory), 0, FOOTER_MAGIC)
        body = self._view[: self._end]
        pack = blob_hash(body, tail)
        self._storage.put(pack_name(self._kind, pack), [body, tail])
        sealed = SealedPack(self._kind, pack, self._end + len(tail), ids)
        self.ticket.pack = pack
        self._begin()
        return sealed
