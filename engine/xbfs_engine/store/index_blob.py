"""The index blob: which packs a session wrote and the ids they hold, by ordinal. Format only, no state.

One blob lists packs with their sizes and ids (docs/format.md, "Index blob"). It is sealed to the metadata pair, so that
a write-only node can deduplicate although it can not open a data pack.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from xbfs_engine.codec.envelope import KEY_SIZE, ObjectKind, open_object, seal_object
from xbfs_engine.core.errors import IndexCorrupt, IntegrityError
from xbfs_engine.core.ids import ID_SIZE, BlobHash
from xbfs_engine.core.limits import OBJECT_SIZE_MAX, PACK_ENTRIES_MAX, PACK_SIZE_MAX
from xbfs_engine.store.pack import blob_hash
from xbfs_engine.store.packer import SealedPack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.codec.keys import KeySet
    from xbfs_engine.core.runtime import RandomSource
    from xbfs_engine.storage.base import Storage

PREFIX = "index/"
VERSION = 1
HEAD = struct.Struct("<HHI")
"""Version, zero, packs."""
PACK = struct.Struct("<32sBxxxII")
"""Pack hash, object kind, chunks, size in bytes."""
assert HEAD.size == 8
assert PACK.size == 44


def put_index(storage: Storage, keys: KeySet, random: RandomSource, packs: Sequence[SealedPack]) -> BlobHash:
    """Write an index blob for packs that are durable; returns its hash."""
    heads = [PACK.pack(pack.pack, pack.kind, len(pack), pack.size_bytes) for pack in packs]
    payload = b"".join([HEAD.pack(VERSION, 0, len(packs)), *heads, *(pack.ids for pack in packs)])
    blob = seal_object(keys, ObjectKind.INDEX, payload, random.token(KEY_SIZE), level=1)
    name = blob_hash(blob)
    storage.put(PREFIX + name.hex(), [blob])
    return name


def get_index(storage: Storage, keys: KeySet, name: BlobHash) -> list[SealedPack]:
    """Read an index blob. Raises IndexCorrupt, FormatTooNew, StorageError."""
    what = f"index {name.hex()[:16]}"
    size = storage.size(PREFIX + name.hex())
    if size > OBJECT_SIZE_MAX:
        raise IndexCorrupt(f"{what} has {size} bytes, more than the {OBJECT_SIZE_MAX} allowed")
    blob = storage.read(PREFIX + name.hex(), 0, size)
    if blob_hash(blob) != name:
        raise IndexCorrupt(f"{what}: its bytes do not have its name")
    try:
        return decode_index(open_object(keys, ObjectKind.INDEX, blob, what), what)
    except IntegrityError as exc:
        raise IndexCorrupt(exc.message) from exc


def decode_index(payload: bytes, what: str) -> list[SealedPack]:
    """The packs listed in an index payload. Raises IndexCorrupt."""
    if len(payload) < HEAD.size:
        raise IndexCorrupt(f"{what} is truncated")
    version, zero, count = HEAD.unpack_from(payload)
    start = HEAD.size + count * PACK.size
    if version != VERSION or zero or start > len(payload):
        raise IndexCorrupt(f"{what}: its head does not fit its {len(payload)} bytes")
    packs = []
    for number in range(count):
        pack, kind, chunks, size = PACK.unpack_from(payload, HEAD.size + number * PACK.size)
        end = start + chunks * ID_SIZE
        if kind not in {ObjectKind.DATA_PACK, ObjectKind.METADATA_PACK} or not 0 < chunks <= PACK_ENTRIES_MAX:
            raise IndexCorrupt(f"{what}: pack {number} is of kind {kind} with {chunks} chunks")
        if end > len(payload) or size > PACK_SIZE_MAX:
            raise IndexCorrupt(f"{what}: pack {number} does not fit")
        packs.append(SealedPack(ObjectKind(kind), BlobHash(pack), size, payload[start:end]))
        start = end
    if start != len(payload):
        raise IndexCorrupt(f"{what} has {len(payload) - start} bytes too many")
    return packs
