"""The chunk index: a local, rebuildable cache over the repository's index blobs.

Look-ups come in batches from many threads; ``refresh`` and ``add`` are serialised by a lock and swap an immutable tuple
of runs, so a look-up never waits. Several processes may share the cache directory: files are immutable, named by what
they stand for and put in place atomically; whoever adds or removes some holds a lock on the directory.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from xbfs_engine.core.errors import BlobNotFound, IndexCorrupt, XbfsError
from xbfs_engine.core.ids import ID_SIZE, BlobHash, Placement
from xbfs_engine.core.log import Logger
from xbfs_engine.storage.files import storage_error, write_replace
from xbfs_engine.store.index_blob import PREFIX, get_index
from xbfs_engine.store.index_run import Run, encode_run, merged, run_file_name, run_of
from xbfs_engine.store.pack import PACK_FOLDERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from xbfs_engine.codec.keys import KeySet
    from xbfs_engine.storage.base import Storage
    from xbfs_engine.store.packer import SealedPack

MERGE_WIDTH = 4
"""Runs of one size class before they are merged; also about how many runs a look-up sees per class."""
BUILD_ENTRIES = 1024 * 1024
"""Entries gathered in memory before a run is written while catching up: about 110 MiB at the peak."""
MERGE_ENTRIES_MAX = BUILD_ENTRIES // MERGE_WIDTH
"""Runs of so many entries are merged no further: a merge takes 100 bytes of heap an entry. 10^8 chunks are then some
hundred runs, each of which costs a look-up of 64 ids some 30 microseconds."""

_NAME = re.compile(re.escape(PREFIX) + r"([0-9a-f]{64})")

_PACK_NAME = re.compile(r"(?:data|meta)/[0-9a-f]{2}/([0-9a-f]{64})")

_log = Logger("xbfs.index")


class ChunkIndex:
    """Answers where chunks are. ``directory`` is this repository's folder in the local cache."""

    def __init__(self, storage: Storage, keys: KeySet, directory: Path) -> None:
        self._storage = storage
        self._keys = keys
        self._directory = directory
        self._runs: tuple[Run, ...] = ()
        self._lock = threading.Lock()
        self._skipped: set[BlobHash] = set()
        self._present: set[BlobHash] = set()
        self.lost: tuple[BlobHash, ...] = ()

    def refresh(self) -> None:
        """Take in index blobs written since, by anybody; drop what stands for blobs that are gone.

        Packs that an index blob lists but the storage does not are in ``lost`` from here on, and nothing is
        deduplicated against them. A damaged index blob is left out with a warning: it costs deduplication, never data.
        Raises StorageError.
        """
        with self._exclusive():
            named = (_NAME.fullmatch(blob.name) for blob in self._storage.list_blobs(PREFIX))
            listed = {BlobHash(bytes.fromhex(match[1])) for match in named if match}
            # After the index blobs: another writer's packs are durable before a blob lists them.
            self._present = self._list_packs()
            self.lost = ()
            self._runs = self._cached_runs(listed)
            missing = listed - {source for run in self._runs for source in run.sources} - self._skipped
            self._catch_up(sorted(missing))

    def add(self, source: BlobHash, packs: Sequence[SealedPack]) -> None:
        """Make the packs of an index blob that was just put findable."""
        with self._exclusive():
            self._present.update(pack.pack for pack in packs)
            self._append([source], packs)

    def holds(self, pack: BlobHash) -> bool:
        """Whether the pack was on the storage at the last ``refresh``, or was added since."""
        return pack in self._present

    def lookup(self, ids: Sequence[bytes]) -> list[Placement | None]:
        """The places of chunks or nodes, in one batch. Never raises for a missing cache."""
        found: list[Placement | None] = [None] * len(ids)
        runs = self._runs
        if runs and ids:
            words = np.frombuffer(b"".join(ids), dtype="<u8").reshape(-1, ID_SIZE // 8)
            high, low = words[:, 0], words[:, 1]
            for run in runs:
                run.lookup(high, low, found)
        return found

    def locate(self, chunk_id: bytes) -> Placement | None:
        """One place, refreshing once if it is unknown: for readers whose hint is stale."""
        place = self.lookup([chunk_id])[0]
        if place is None:
            self.refresh()
            place = self.lookup([chunk_id])[0]
        return place

    def entries(self) -> int:
        """Places known."""
        return sum(len(run) for run in self._runs)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Alone among threads and processes: else one could tidy away a run that another is about to map."""
        with self._lock:
            try:
                self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as exc:
                raise storage_error(exc, f"open the index cache {self._directory}") from exc
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
                yield
            finally:
                os.close(folder)

    def _list_packs(self) -> set[BlobHash]:
        """Packs there are: 32 bytes and an object's overhead each, some 30 MiB for 10 TiB of stored data."""
        named = (
            _PACK_NAME.fullmatch(blob.name) for folder in PACK_FOLDERS for blob in self._storage.list_blobs(folder)
        )
        return {BlobHash(bytes.fromhex(match[1])) for match in named if match}

    def _open(self, path: Path) -> Run:
        run = Run(path)
        self.lost = (*self.lost, *run.keep(self._present))
        return run

    def _cached_runs(self, listed: set[BlobHash]) -> tuple[Run, ...]:
        runs: list[Run] = []
        known: set[BlobHash] = set()
        candidates = []
        for path in self._directory.glob("*.run"):
            try:
                candidates.append(self._open(path))
            except XbfsError:
                path.unlink(missing_ok=True)
        for run in sorted(candidates, key=lambda run: -len(run.sources)):
            if not listed.issuperset(run.sources):
                run.path.unlink(missing_ok=True)
            elif known.isdisjoint(run.sources):
                runs.append(run)
                known.update(run.sources)
            else:  # another process merged the same sources otherwise
                run.path.unlink(missing_ok=True)
        return tuple(runs)

    def _catch_up(self, missing: list[BlobHash]) -> None:
        sources: list[BlobHash] = []
        packs: list[SealedPack] = []
        for source in missing:
            try:
                packs.extend(get_index(self._storage, self._keys, source))
            except BlobNotFound:
                continue
            except IndexCorrupt as exc:
                self._skipped.add(source)
                _log.warning("index blob is damaged and left out", blob=source.hex(), problem=exc.message)
                continue
            sources.append(source)
            if sum(len(pack) for pack in packs) >= BUILD_ENTRIES:
                self._append(sources, packs)
                sources, packs = [], []
        if sources:
            self._append(sources, packs)

    def _append(self, sources: Sequence[BlobHash], packs: Sequence[SealedPack]) -> None:
        path = self._directory / run_file_name(sources)
        write_replace(path, encode_run(run_of(sources, packs)))
        self._runs = (*self._runs, self._open(path))
        self._merge()

    def _merge(self) -> None:
        """Merge the runs of a size class once there are MERGE_WIDTH of them: a look-up sees few runs."""
        while True:
            classes: dict[int, list[Run]] = {}
            for run in self._runs:
                if len(run) < MERGE_ENTRIES_MAX:
                    classes.setdefault((len(run).bit_length() + 1) // 2, []).append(run)
            crowded = next((group[:MERGE_WIDTH] for group in classes.values() if len(group) >= MERGE_WIDTH), None)
            if crowded is None:
                return
            data = merged([run.data() for run in crowded])
            path = self._directory / run_file_name(data.sources)
            write_replace(path, encode_run(data))
            merged_run = Run(path)
            merged_run.keep(self._present)
            self._runs = (*(run for run in self._runs if run not in crowded), merged_run)
            for run in crowded:
                run.path.unlink(missing_ok=True)
