"""Restore points of a repository: commit, list, find. Any thread may use it.

Manifests are immutable, so each is read once and kept; ``refresh`` reads only the new ones.
"""

from __future__ import annotations

import datetime
import re
import threading
from typing import TYPE_CHECKING, NamedTuple

from xbfs_engine.catalog.restore_point import RestorePoint, open_manifest, seal_manifest
from xbfs_engine.core.errors import (
    BlobNotFound,
    FormatTooNew,
    IntegrityError,
    ManifestCorrupt,
    PointAmbiguous,
    PointNotFound,
)
from xbfs_engine.core.ids import PointId
from xbfs_engine.core.limits import OBJECT_SIZE_MAX
from xbfs_engine.store.pack import blob_hash

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.store.repository import Repository

PREFIX = "points/"
_ID = re.compile(r"[0-9a-f]{64}")
_ID_PREFIX = re.compile(r"[0-9a-f]{4,64}")


class DamagedPoint(NamedTuple):
    """A manifest that is there but can not be used."""

    id: PointId
    problem: XbfsError


class Catalog:
    """All restore points of one repository."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._points: dict[PointId, RestorePoint] = {}
        self._damaged: dict[PointId, XbfsError] = {}
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Read manifests that were added since, drop those that are gone. Raises StorageError."""
        storage = self._repository.storage
        listed = {
            PointId(name): blob.size_bytes
            for blob in storage.list_blobs(PREFIX)
            if _ID.fullmatch(name := blob.name[len(PREFIX) :])
        }
        with self._lock:
            for known in (self._points, self._damaged):
                for gone in known.keys() - listed.keys():
                    del known[gone]
            for point_id in sorted(listed.keys() - self._points.keys() - self._damaged.keys()):
                try:
                    self._points[point_id] = self._read(point_id, listed[point_id])
                except BlobNotFound:
                    continue
                except (IntegrityError, FormatTooNew) as exc:
                    self._damaged[point_id] = exc

    def points(self) -> list[RestorePoint]:
        """All restore points, by time."""
        with self._lock:
            return sorted(self._points.values(), key=lambda point: (point.time_ns, point.id))

    def damaged(self) -> list[DamagedPoint]:
        """Manifests that can not be used, by id."""
        with self._lock:
            return [DamagedPoint(point_id, self._damaged[point_id]) for point_id in sorted(self._damaged)]

    def latest(self, vm_uuid: str) -> RestorePoint | None:
        """The newest point of a VM."""
        return next((point for point in reversed(self.points()) if point.vm_uuid == vm_uuid), None)

    def commit(self, point: RestorePoint) -> RestorePoint:
        """Put the manifest: from here on the point exists. Everything it refers to must be durable.

        Raises ManifestCorrupt, before anything is put, for a point that could not be read back; StorageError.
        """
        blob = seal_manifest(self._repository.keys, self._repository.runtime.random, point)
        point_id = PointId(blob_hash(blob).hex())
        _check_size(point_id, len(blob))
        committed = open_manifest(self._repository.keys, point_id, blob)
        self._repository.storage.put(PREFIX + point_id, [blob])
        with self._lock:
            self._points[point_id] = committed
        return committed

    def find(self, text: str) -> RestorePoint:
        """The point that ``text`` names: an id prefix of at least 4 digits, VM@latest or VM@TIME.

        VM is a name or uuid; TIME is ISO 8601, UTC unless it says otherwise, and means the last point at or before.
        Raises PointNotFound, PointAmbiguous, ManifestCorrupt.
        """
        points = self.points()
        if "@" in text:
            return _find_by_time(points, *text.rsplit("@", 1))
        if not _ID_PREFIX.fullmatch(text):
            raise PointNotFound(f"{text!r} is neither an id (4 or more hex digits) nor VM@latest nor VM@TIME")
        found = [point for point in points if point.id.startswith(text)]
        broken = [damaged for damaged in self.damaged() if damaged.id.startswith(text)]
        if len(found) + len(broken) > 1:
            ids = ", ".join([point.id[:16] for point in found] + [damaged.id[:16] for damaged in broken])
            raise PointAmbiguous(f"{text} could be any of {ids}")
        if broken:
            raise ManifestCorrupt(f"restore point {broken[0].id[:12]} can not be used: {broken[0].problem.message}")
        if not found:
            raise PointNotFound(f"no restore point has an id that begins with {text}")
        return found[0]

    def _read(self, point_id: PointId, size_bytes: int) -> RestorePoint:
        _check_size(point_id, size_bytes)
        blob = self._repository.storage.read(PREFIX + point_id, 0, size_bytes)
        if blob_hash(blob).hex() != point_id:
            raise ManifestCorrupt(f"restore point {point_id[:12]}: its bytes do not have its name")
        return open_manifest(self._repository.keys, point_id, blob)


def points_of(points: Sequence[RestorePoint], vm: str) -> list[RestorePoint]:
    """The points of the VM of that name or uuid. Raises PointNotFound, PointAmbiguous."""
    found = [point for point in points if vm in {point.vm_uuid, point.vm_name}]
    uuids = {point.vm_uuid for point in found}
    if not found:
        raise PointNotFound(f"no restore point of a VM {vm!r}")
    if len(uuids) > 1 and vm not in uuids:
        raise PointAmbiguous(f"several VMs are called {vm!r}: {', '.join(sorted(uuids))}", hint="give the VM's uuid")
    return found


def _check_size(point_id: PointId, size_bytes: int) -> None:
    if size_bytes > OBJECT_SIZE_MAX:
        raise ManifestCorrupt(
            f"restore point {point_id[:12]} has {size_bytes} bytes, more than the {OBJECT_SIZE_MAX} allowed"
        )


def _find_by_time(points: Sequence[RestorePoint], vm: str, when: str) -> RestorePoint:
    found = points_of(points, vm)
    if when == "latest":
        return found[-1]
    try:
        time = datetime.datetime.fromisoformat(when)
    except ValueError:
        raise PointNotFound(f"{when!r} is neither 'latest' nor a time such as 2026-09-20T21:00:03Z") from None
    if time.tzinfo is None:
        time = time.replace(tzinfo=datetime.UTC)
    limit_ns = (int(time.timestamp()) + 1) * 1_000_000_000
    before = [point for point in found if point.time_ns < limit_ns]
    if not before:
        raise PointNotFound(f"the first restore point of {vm!r} is later than {when}")
    return before[-1]
