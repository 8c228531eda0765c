"""The course of a check or verify: what is listed first, what is examined in which order, and what is concluded.

Names are listed in the opposite order of writing (file indexes and boot tests, points, index blobs, packs), so that a
backup running meanwhile shows up as packs that nothing refers to yet, never as damage. One thread conducts; packs are
examined by several.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING, Final

from xbfs_engine.catalog import boottests
from xbfs_engine.catalog.blockmap import NodeStore
from xbfs_engine.catalog.catalog import Catalog
from xbfs_engine.catalog.fileindex.indexes import listed_roots
from xbfs_engine.codec.config import CONFIG_SIZE_MAX, decode_config
from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.codec.keys import Role
from xbfs_engine.codec.slots import SlotContents
from xbfs_engine.core.errors import (
    BlobNotFound,
    FormatTooNew,
    IntegrityError,
    KeySlotDamaged,
    RepositoryError,
    StorageError,
)
from xbfs_engine.core.ids import BlobHash
from xbfs_engine.maintain.fileindexes import FileIndexScan
from xbfs_engine.maintain.findings import PACK_KINDS, Findings
from xbfs_engine.maintain.impact import Impact
from xbfs_engine.maintain.lists import IndexLists
from xbfs_engine.maintain.packs import PackExaminer, PackTask
from xbfs_engine.maintain.parallel import MaintenanceProgress, Ticker, run_parallel
from xbfs_engine.maintain.places import UNLISTED, PackEntry, PackTable
from xbfs_engine.maintain.references import MapScan
from xbfs_engine.maintain.report import Examined, Kind, PointHit, Report
from xbfs_engine.store.pack import pack_name
from xbfs_engine.store.reader import ChunkReader
from xbfs_engine.store.repository import CONFIGS, SLOTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xbfs_engine.catalog.fileindex.indexes import Root
    from xbfs_engine.core.ids import PointId
    from xbfs_engine.storage.base import BlobInfo
    from xbfs_engine.store.packer import SealedPack
    from xbfs_engine.store.repository import Repository

_NAMES: Final = {
    "config": re.compile(r"config/([0-9]{8})"),
    "keys": re.compile(r"keys/([0-9a-f]{16})"),
    "points": re.compile(r"points/([0-9a-f]{64})"),
    "index": re.compile(r"index/([0-9a-f]{64})"),
    "data": re.compile(r"data/([0-9a-f]{2})/(\1[0-9a-f]{62})"),
    "files": re.compile(r"files/([0-9a-f]{64})/([0-9]{8})"),
    "meta": re.compile(r"meta/([0-9a-f]{2})/(\1[0-9a-f]{62})"),
    "tests": boottests.NAME,
}
"""Our folders, and what blobs in them are called."""
_PACKS: Final = {"data": ObjectKind.DATA_PACK, "meta": ObjectKind.METADATA_PACK}


class Survey:
    """One examination of one repository."""

    def __init__(
        self,
        repository: Repository,
        progress: Callable[[MaintenanceProgress], None] | None,
        stop: Callable[[], bool] | None,
        *,
        deep: bool,
        threads: int,
    ) -> None:
        self._repository = repository
        self._storage = repository.storage
        self._deep = deep
        self._threads = threads
        self._findings = Findings()
        self._ticker = Ticker(repository.runtime.clock, progress, stop)
        self._catalog = Catalog(repository)
        self._stage, self._done, self._total, self._total_bytes = "list", 0, 0, 0

    def run(self) -> Report:
        """Examine everything. Raises Cancelled, and StorageError if the storage itself fails."""
        file_indexes = listed_roots(self._storage)
        boot_tests = boottests.listed_tests(self._storage)
        self._catalog.refresh()
        points = self._catalog.points()
        index_names = [
            BlobHash(bytes.fromhex(match[1]))
            for blob in self._storage.list_blobs("index/")
            if (match := _NAMES["index"].fullmatch(blob.name))
        ]
        table = PackTable(self._packs())
        self._check_configs()
        self._check_slots()
        hits = self._damaged_points()
        self._note_parents()
        with IndexLists(self._repository, index_names, self._findings) as lists:
            reader = ChunkReader(self._storage, self._repository.keys, lists)
            examiner = PackExaminer(self._repository, reader, self._findings, deep=self._deep)
            self._examine_packs(examiner, table, lists)
            scan = MapScan(self._repository.keys, reader, table, lists, self._findings)
            self._begin("maps", len(points))
            for point in points:
                scan.scan(point, lambda: self._tick(examiner.read_bytes))
                self._done += 1
            scan.finish()
            self._examine_file_indexes(
                file_indexes, FileIndexScan(self._repository, reader, table, lists, self._findings)
            )
            self._examine_boot_tests(boot_tests)
            self._conclude(table)
            if self._findings.damages:
                self._begin("impact", 0)
                impact = Impact(NodeStore(reader), self._findings, lambda: self._tick(examiner.read_bytes))
                hits += impact.assess(points)
        return Report(
            deep=self._deep,
            findings=self._findings.listing(),
            damages=self._findings.damages,
            notes=self._findings.notes,
            points_hit=tuple(hits),
            examined=Examined(
                points=len(points),
                index_blobs=len(index_names),
                packs=examiner.packs,
                nodes=scan.nodes,
                references=scan.references,
                chunks=examiner.chunks,
                read_bytes=examiner.read_bytes,
            ),
        )

    def _begin(self, stage: str, total: int) -> None:
        self._stage, self._done, self._total = stage, 0, total

    def _tick(self, read_bytes: int) -> None:
        self._ticker.tick(
            lambda: MaintenanceProgress(
                self._stage, self._done, self._total, read_bytes, self._total_bytes, self._findings.damages
            )
        )

    def _packs(self) -> Iterator[PackEntry]:
        """All packs; names that are not ours become findings on the way."""
        for blob in self._storage.list_blobs(""):
            folder = blob.name.partition("/")[0]
            pattern = _NAMES.get(folder)
            match = pattern.fullmatch(blob.name) if pattern else None
            if match is None:
                self._foreign(blob, ours=pattern is not None)
            elif folder in _PACKS:
                self._total_bytes += blob.size_bytes
                yield PackEntry(_PACKS[folder], BlobHash(bytes.fromhex(match[2])), blob.size_bytes)

    def _foreign(self, blob: BlobInfo, *, ours: bool) -> None:
        if ours:
            self._findings.damage(Kind.BLOB, blob.name, "is not a name that belongs into this folder")
        else:
            self._findings.note(Kind.BLOB, blob.name, "does not belong to the repository")

    def _check_configs(self) -> None:
        """Every generation is signed by this repository's key and lies under its own number."""
        keys = self._repository.keys
        # Generation 0 vouches for no config in particular, only for the signer of configs and the repository.
        vouched = SlotContents(keys.repository_id, None, b"", keys.config_public, 0, b"")
        good = 0
        for blob in self._storage.list_blobs(CONFIGS):
            match = _NAMES["config"].fullmatch(blob.name)
            if match is None:
                continue
            try:
                # One byte more than allowed is enough for the decoder to refuse it.
                raw = self._storage.read(blob.name, 0, min(blob.size_bytes, CONFIG_SIZE_MAX + 1))
                decode_config(raw, blob.name).verify(vouched, int(match[1]))
                good += 1
            except (RepositoryError, StorageError) as exc:
                message = "is damaged: with it, the repository can not be opened"
                self._findings.damage(Kind.CONFIG, blob.name, message, exc.message)
        if not good:
            self._findings.damage(Kind.CONFIG, CONFIGS, "holds no good config: the repository can not be opened again")

    def _check_slots(self) -> None:
        """Every key slot decodes. What is sealed in it shows only when its secret opens it."""
        try:
            slots = self._repository.list_slots()
        except (KeySlotDamaged, StorageError) as exc:
            self._findings.damage(Kind.KEY_SLOT, SLOTS, "can not be read", exc.message)
            return
        for listed in slots:
            if listed.problem is not None:
                name = SLOTS + listed.slot_id
                self._findings.damage(Kind.KEY_SLOT, name, "can not be used", listed.problem.message)
        if not any(listed.slot is not None and listed.slot.role is Role.OWNER for listed in slots):
            self._findings.damage(Kind.KEY_SLOT, SLOTS, "holds no owner's key slot that can be read")

    def _damaged_points(self) -> list[PointHit]:
        hits = []
        for point in self._catalog.damaged():
            hit = PointHit(point.id, None, None, ())
            hits.append(hit)
            blob = f"points/{point.id}"
            self._findings.damage(Kind.POINT, blob, "its manifest can not be used", point.problem.message)
            if self._findings.listed(blob):
                self._findings.hit(blob, hit)
        return hits

    def _note_parents(self) -> None:
        """A parent that is gone is what prune leaves; but so is one that somebody deleted."""
        known = {point.id for point in self._catalog.points()} | {point.id for point in self._catalog.damaged()}
        for point in self._catalog.points():
            if point.parent is not None and point.parent not in known:
                message = "is not there any more; a later restore point names it as its parent and does not need it"
                self._findings.note(Kind.POINT, f"points/{point.parent}", message, f"named by {point.id[:12]}")

    def _examine_packs(self, examiner: PackExaminer, table: PackTable, lists: IndexLists) -> None:
        if self._repository.keys.role is not Role.OWNER:
            message = "this role can not open data packs: of them, only names and sizes are examined"
            self._findings.note(Kind.ROLE, "data/", message)
        self._begin("packs", len(table))

        def work(task: PackTask) -> None:
            examiner.examine(task)
            self._done = examiner.packs
            self._tick(examiner.read_bytes)

        listed = self._listed_packs(table, lists)
        # A chain is lazy: which packs no index lists is asked when all index blobs were read.
        run_parallel(chain(listed, _unlisted_packs(table)), work, self._threads)

    def _listed_packs(self, table: PackTable, lists: IndexLists) -> Iterator[PackTask]:
        for source, listed in lists.packs():
            number = table.find(listed.kind, listed.pack)
            if number < 0:
                self._missing_pack(listed)
                continue
            again = table.source[number] != UNLISTED
            table.source[number] = source
            yield PackTask(table[number], listed, again)

    def _examine_file_indexes(self, roots: dict[PointId, Root], scan: FileIndexScan) -> None:
        self._begin("file indexes", len(roots))
        known = {point.id for point in self._catalog.points()} | {point.id for point in self._catalog.damaged()}
        for point, root in sorted(roots.items()):
            scan.examine(point, root, is_known=point in known)
            self._done += 1
            self._tick(0)

    def _examine_boot_tests(self, listed: list[boottests.Listed]) -> None:
        """A damaged result is damage, but hits no restore point."""
        self._begin("boot tests", len(listed))
        known = {point.id for point in self._catalog.points()} | {point.id for point in self._catalog.damaged()}
        for each in listed:
            if each.point not in known:
                self._findings.note(Kind.BOOT_TEST, each.name, "is of no restore point: nobody needs it")
            try:
                boottests.read_boot_test(self._repository, each)
            except BlobNotFound:
                pass  # deleted since it was listed
            except (IntegrityError, FormatTooNew, StorageError) as exc:
                detail = f"{exc.message}; test the point again, and delete this file; no restore point needs it"
                self._findings.damage(Kind.BOOT_TEST, each.name, "can not be used", detail)
            self._done += 1
            self._tick(0)

    def _missing_pack(self, listed: SealedPack) -> None:
        """Whether this loses anything, the references tell: what it held may lie elsewhere too."""
        name = pack_name(listed.kind, listed.pack)
        try:
            self._storage.size(name)
        except BlobNotFound:
            self._findings.damage(PACK_KINDS[listed.kind], name, "is missing", f"the index lists {len(listed)} chunks")

    def _conclude(self, table: PackTable) -> None:
        """What packs that no index lists mean."""
        lost = []
        for number in (table.source == UNLISTED).nonzero()[0].tolist():
            entry = table[number]
            if table.referenced[number]:
                lost.append(entry.pack.hex()[:16])
            else:
                message = "is an orphan: no index lists it and no restore point uses it, as an interrupted run leaves"
                self._findings.note(PACK_KINDS[entry.kind], pack_name(entry.kind, entry.pack), message)
        if lost:
            message = f"{len(lost)} packs that restore points use are in no readable index blob: one is lost or damaged"
            self._findings.damage(Kind.INDEX, "index/", message, f"packs {', '.join(lost[:8])}")


def _unlisted_packs(table: PackTable) -> Iterator[PackTask]:
    for number in (table.source == UNLISTED).nonzero()[0].tolist():
        yield PackTask(table[number], None, again=False)
