"""Examines one pack: its structure, or all its bytes. Any thread may call a PackExaminer.

Memory: with ``deep`` one whole pack (at most 128 MiB, 32 by default) per thread; else its directory.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import zstandard

from xbfs_engine.core.errors import (
    BlobNotFound,
    FormatTooNew,
    IntegrityError,
    KeyNotHeld,
    StorageError,
)
from xbfs_engine.core.ids import ID_SIZE
from xbfs_engine.core.limits import PACK_SIZE_MAX
from xbfs_engine.maintain.findings import ordinals_text
from xbfs_engine.maintain.places import ALL, PackEntry
from xbfs_engine.store.pack import blob_hash, open_pack, open_pack_bytes, pack_name
from xbfs_engine.store.reader import open_chunk

if TYPE_CHECKING:
    from xbfs_engine.maintain.findings import Findings
    from xbfs_engine.store.pack import Directory, OpenPack
    from xbfs_engine.store.packer import SealedPack
    from xbfs_engine.store.reader import ChunkReader
    from xbfs_engine.store.repository import Repository

UNREADABLE_IN_A_ROW_MAX = 8
"""So many packs in a row that the storage fails to give mean that the storage is gone, not that they are damaged."""


class PackTask(NamedTuple):
    """A pack to examine, and what an index blob says of it. ``again``: its bytes were examined already."""

    entry: PackEntry
    listed: SealedPack | None
    again: bool


class PackExaminer:
    """Examines packs one by one."""

    def __init__(self, repository: Repository, reader: ChunkReader, findings: Findings, *, deep: bool) -> None:
        self._storage = repository.storage
        self._keys = repository.keys
        self._reader = reader
        self._findings = findings
        self._deep = deep
        self._local = threading.local()
        self._lock = threading.Lock()
        self._unreadable = 0
        self.packs = self.chunks = self.read_bytes = 0

    def examine(self, task: PackTask) -> None:
        """Examine one pack; what is wrong goes to the findings. Raises StorageError if the storage is gone."""
        entry = task.entry
        try:
            if self._deep and not task.again:
                self._examine_bytes(task)
            else:
                self._examine_structure(task)
        except BlobNotFound:
            self._damaged(entry, "is missing: it went while it was examined", mask=ALL)
        except StorageError as exc:
            with self._lock:
                self._unreadable += 1
                gone = self._unreadable >= UNREADABLE_IN_A_ROW_MAX
            if gone:
                raise
            self._damaged(entry, "can not be read", exc.message, mask=ALL)
        else:
            self._unreadable = 0
        with self._lock:
            self.packs += not task.again

    def _examine_structure(self, task: PackTask) -> None:
        kind, pack, size = task.entry
        try:
            opened = open_pack(self._storage, self._keys, kind, pack, size)
        except KeyNotHeld:
            self._compare_size(task, mask=ALL)
        except (IntegrityError, FormatTooNew) as exc:
            self._damaged(task.entry, "can not be opened", exc.message, mask=ALL)
        else:
            self._compare(task, opened.directory)

    def _examine_bytes(self, task: PackTask) -> None:
        kind, pack, size = task.entry
        if size > PACK_SIZE_MAX:
            self._damaged(task.entry, f"has the impossible size of {size} bytes", mask=ALL)
            return
        blob = self._storage.get(pack_name(kind, pack))
        with self._lock:
            self.read_bytes += len(blob)
        named = blob_hash(blob) == pack
        try:
            opened = open_pack_bytes(self._keys, kind, pack, blob)
        except KeyNotHeld:
            if not named:
                # Without the key nobody can tell which of its chunks are whole.
                self._damaged(task.entry, "its bytes do not have its name", mask=ALL)
            self._compare_size(task, mask=ALL)
            return
        except (IntegrityError, FormatTooNew) as exc:
            self._damaged(task.entry, "can not be opened", exc.message, mask=ALL)
            return
        if not named:
            self._damaged(task.entry, "its bytes do not have its name", mask=0)
        self._open_chunks(task.entry, opened, blob)
        self._compare(task, opened.directory)

    def _open_chunks(self, entry: PackEntry, opened: OpenPack, blob: bytes) -> None:
        try:
            decompressor: zstandard.ZstdDecompressor = self._local.decompressor
        except AttributeError:
            decompressor = self._local.decompressor = zstandard.ZstdDecompressor()
        view = memoryview(blob)
        directory = opened.directory
        id_function = self._reader.id_function(entry.kind)
        mask, first = 0, ""
        for ordinal, (offset, stored) in enumerate(zip(directory.offsets, directory.stored, strict=True)):
            try:
                open_chunk(opened, ordinal, view[offset : offset + stored], id_function, decompressor)
            except (IntegrityError, FormatTooNew) as exc:
                mask |= 1 << ordinal
                first = first or exc.message
        with self._lock:
            self.chunks += len(directory)
        if mask:
            which = ordinals_text(mask, len(directory))
            message = f"{mask.bit_count()} of its {len(directory)} chunks are damaged"
            self._damaged(entry, message, f"chunks {which}; {first}", mask=mask)

    def _compare(self, task: PackTask, directory: Directory) -> None:
        """Does the pack hold what the index says? Whether that loses anything, the references tell."""
        listed = task.listed
        if listed is None:
            return
        self._compare_size(task, mask=0)
        if listed.ids != directory.ids:
            mask = differing(listed.ids, directory.ids)
            which = ordinals_text(mask, max(len(listed), len(directory)))
            self._damaged(task.entry, "does not hold what the index says", f"they differ in chunks {which}", mask=0)

    def _compare_size(self, task: PackTask, *, mask: int) -> None:
        listed = task.listed
        if listed is not None and listed.size_bytes != task.entry.size_bytes:
            message = f"has {task.entry.size_bytes} bytes, {listed.size_bytes} by the index"
            self._damaged(task.entry, message, mask=mask)

    def _damaged(self, entry: PackEntry, message: str, detail: str = "", *, mask: int) -> None:
        self._findings.damaged_pack(entry.kind, entry.pack, message, detail, mask=mask)


def differing(left: bytes, right: bytes) -> int:
    """Which ordinals have other ids, as bits; those that only one side has differ."""
    ours, theirs = (np.frombuffer(side, dtype=np.uint8).reshape(-1, ID_SIZE) for side in (left, right))
    common = min(len(ours), len(theirs))
    differs = np.ones(max(len(ours), len(theirs)), dtype=np.bool_)
    differs[:common] = (ours[:common] != theirs[:common]).any(axis=1)
    return int.from_bytes(np.packbits(differs, bitorder="little").tobytes(), "little")
