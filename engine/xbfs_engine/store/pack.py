"""The pack format: layout, directory, and opening packs. Writing is in ``packer``, reading chunks in ``reader``.

A pack is the 128-byte object header, the sealed chunks back to back, the sealed directory and a 16-byte footer
(docs/format.md, "Pack"). Its name is the BLAKE3 of all its bytes, so anybody can check a copy without a key.
"""

from __future__ import annotations

import struct
from array import array
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from blake3 import blake3
from cryptography.exceptions import InvalidTag

from xbfs_engine.codec.envelope import HEADER_SIZE, LAST_NONCE, TAG_SIZE, ObjectKind, open_header
from xbfs_engine.core.errors import BlobLost, BlobNotFound, IntegrityError, PackCorrupt
from xbfs_engine.core.ids import ID_SIZE, BlobHash, ChunkId
from xbfs_engine.core.limits import CHUNK_SIZE_MAX, PACK_ENTRIES_MAX, PACK_SIZE_MAX

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from numpy.typing import NDArray

    from xbfs_engine.codec.keys import KeySet
    from xbfs_engine.storage.base import Storage

FOOTER = struct.Struct("<II8s")
"""Bytes of the sealed directory, zero, magic."""
FOOTER_MAGIC = b"XBFSEND\0"
DIRECTORY_HEAD = struct.Struct("<II")
"""Records, base ids (page deltas; none in version 1)."""
RECORD = np.dtype(
    [("id", "V32"), ("stored", "<u4"), ("raw", "<u4"), ("encoding", "u1"), ("zero", "V3"), ("base", "<u4")]
)
NO_BASE = 0xFFFFFFFF
assert FOOTER.size == 16
assert RECORD.itemsize == 48
assert array("I").itemsize == 4

_FOLDERS = {ObjectKind.DATA_PACK: "data", ObjectKind.METADATA_PACK: "meta"}
PACK_FOLDERS = tuple(f"{folder}/" for folder in _FOLDERS.values())
_DIRECTORY_SIZE_MAX = DIRECTORY_HEAD.size + PACK_ENTRIES_MAX * (RECORD.itemsize + ID_SIZE) + TAG_SIZE


def pack_name(kind: ObjectKind, pack: BlobHash) -> str:
    """The blob name of a pack: folder, first byte, whole hash."""
    text = pack.hex()
    return f"{_FOLDERS[kind]}/{text[:2]}/{text}"


def blob_hash(*parts: bytes | bytearray | memoryview) -> BlobHash:
    """BLAKE3 of the concatenation of ``parts``: what names every content-addressed blob."""
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return BlobHash(hasher.digest())


class Directory(NamedTuple):
    """What a pack holds, by ordinal. Arrays (32 bit, unsigned) are read-only and of equal length."""

    ids: bytes
    offsets: array[int]
    stored: array[int]
    raw: array[int]
    encodings: bytes

    def __len__(self) -> int:
        return len(self.encodings)

    def id_at(self, ordinal: int) -> ChunkId:
        """The id of the ordinal-th chunk."""
        return ChunkId(self.ids[ordinal * ID_SIZE : (ordinal + 1) * ID_SIZE])

    @property
    def memory_bytes(self) -> int:
        """About what this costs in memory."""
        return len(self.ids) + 13 * len(self.encodings) + 1024


class OpenPack(NamedTuple):
    """A pack whose key and directory are known. Immutable; any thread may use it."""

    pack: BlobHash
    kind: ObjectKind
    name: str
    aead: AESGCM
    directory: Directory
    size_bytes: int


def encode_directory(records: np.ndarray[tuple[int], np.dtype[np.void]]) -> bytes:
    """Plaintext of a directory of version 1 (no page deltas)."""
    return DIRECTORY_HEAD.pack(len(records), 0) + records.tobytes()


def decode_directory(plain: bytes, data_end: int, what: str) -> Directory:
    """Decode and check a directory whose sealed chunks must fill [HEADER_SIZE, data_end) exactly.

    Raises PackCorrupt.
    """
    if len(plain) < DIRECTORY_HEAD.size:
        raise PackCorrupt(f"{what}: its directory is truncated")
    count, bases = DIRECTORY_HEAD.unpack_from(plain)
    size = DIRECTORY_HEAD.size + count * RECORD.itemsize + bases * ID_SIZE
    if count > PACK_ENTRIES_MAX or bases > count or len(plain) != size:
        raise PackCorrupt(f"{what}: its directory of {len(plain)} bytes does not hold {count} records")
    records = np.frombuffer(plain, dtype=RECORD, count=count, offset=DIRECTORY_HEAD.size)
    stored = records["stored"].astype(np.int64)
    if count and (int(stored.min()) <= TAG_SIZE or int(records["raw"].max()) > CHUNK_SIZE_MAX):
        raise PackCorrupt(f"{what}: its directory has impossible lengths")
    ends = HEADER_SIZE + np.cumsum(stored)
    if (int(ends[-1]) if count else HEADER_SIZE) != data_end:
        raise PackCorrupt(f"{what}: its directory does not cover the pack")
    return Directory(
        records["id"].tobytes(),
        _compact(ends - stored),
        _compact(stored),
        _compact(records["raw"]),
        records["encoding"].tobytes(),
    )


def _compact(numbers: NDArray[np.integer]) -> array[int]:
    """A list of them would cost nine times as much, and is not indexed much faster."""
    return array("I", numbers.astype(np.uint32).tobytes())


def open_pack(
    storage: Storage, keys: KeySet, kind: ObjectKind, pack: BlobHash, size_bytes: int | None = None
) -> OpenPack:
    """Read header, footer and directory of a pack.

    Raises BlobLost, PackCorrupt, KeyNotHeld, FormatTooNew, StorageError.
    """
    name = pack_name(kind, pack)
    what = f"pack {name}"
    try:
        size = storage.size(name) if size_bytes is None else size_bytes
        if not HEADER_SIZE + FOOTER.size <= size <= PACK_SIZE_MAX:
            raise PackCorrupt(f"{what} has the impossible size {size}")
        header = storage.read(name, 0, HEADER_SIZE)
        length = _directory_length(storage.read(name, size - FOOTER.size, FOOTER.size), size, what)
        sealed = storage.read(name, size - FOOTER.size - length, length)
    except BlobNotFound as exc:
        raise BlobLost(f"{what} is missing") from exc
    return _opened(keys, kind, pack, header, sealed, size)


def open_pack_bytes(keys: KeySet, kind: ObjectKind, pack: BlobHash, blob: bytes) -> OpenPack:
    """Open a pack held in memory as a whole. Raises PackCorrupt, KeyNotHeld, FormatTooNew."""
    what = f"pack {pack_name(kind, pack)}"
    if not HEADER_SIZE + FOOTER.size <= len(blob) <= PACK_SIZE_MAX:
        raise PackCorrupt(f"{what} has the impossible size {len(blob)}")
    length = _directory_length(blob[-FOOTER.size :], len(blob), what)
    end = len(blob) - FOOTER.size
    return _opened(keys, kind, pack, blob[:HEADER_SIZE], blob[end - length : end], len(blob))


def _directory_length(footer: bytes, size: int, what: str) -> int:
    length, zero, magic = FOOTER.unpack(footer)
    if magic != FOOTER_MAGIC or zero:
        raise PackCorrupt(f"{what} does not end with a pack footer: it is truncated or was overwritten")
    if not DIRECTORY_HEAD.size + TAG_SIZE <= length <= min(_DIRECTORY_SIZE_MAX, size - FOOTER.size - HEADER_SIZE):
        raise PackCorrupt(f"{what}: its directory has the impossible length {length}")
    assert isinstance(length, int)
    return length


def _opened(keys: KeySet, kind: ObjectKind, pack: BlobHash, header: bytes, sealed: bytes, size: int) -> OpenPack:
    name = pack_name(kind, pack)
    what = f"pack {name}"
    try:
        aead = open_header(keys, header, kind, what).aead
        plain = aead.decrypt(LAST_NONCE, sealed, header)
    except InvalidTag as exc:
        raise PackCorrupt(f"{what}: its directory does not authenticate") from exc
    except IntegrityError as exc:
        raise PackCorrupt(exc.message) from exc
    directory = decode_directory(plain, size - FOOTER.size - len(sealed), what)
    return OpenPack(pack, kind, name, aead, directory, size)
