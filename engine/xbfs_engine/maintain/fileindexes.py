"""Checks the file indexes: roots that open and hold, and segments that are where these say. One thread.

A damaged file index is damage, but hits no restore point: it is built again by ``xbfs index --force``. What a segment
holds is looked at only as far as its pack is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xbfs_engine.catalog.fileindex.indexes import read_root
from xbfs_engine.codec.envelope import ObjectKind
from xbfs_engine.core.errors import BlobNotFound, FormatTooNew, IntegrityError, StorageError
from xbfs_engine.maintain.report import Kind

if TYPE_CHECKING:
    from xbfs_engine.catalog.fileindex.indexes import Root
    from xbfs_engine.core.ids import ChunkRef, PointId
    from xbfs_engine.maintain.findings import Findings
    from xbfs_engine.maintain.lists import IndexLists
    from xbfs_engine.maintain.places import PackTable
    from xbfs_engine.store.reader import ChunkReader
    from xbfs_engine.store.repository import Repository

_FAILURES: Final = (IntegrityError, FormatTooNew, StorageError)
_AGAIN: Final = "build it anew with `xbfs index --force`; no restore point needs it"


class FileIndexScan:
    """Looks at file indexes and marks in ``table`` the packs that are in use. 110 bytes for every segment."""

    def __init__(
        self, repository: Repository, reader: ChunkReader, table: PackTable, lists: IndexLists, findings: Findings
    ) -> None:
        self._repository = repository
        self._reader = reader
        self._table = table
        self._lists = lists
        self._findings = findings
        self._good: set[bytes] = set()

    def examine(self, point: PointId, root: Root, *, is_known: bool) -> None:
        """Examine the index of a point; ``is_known``: there is such a restore point, whole or damaged."""
        if not is_known:
            self._findings.note(Kind.FILE_INDEX, root.name, "is of no restore point: nobody needs it")
        try:
            index = read_root(self._repository, point, root)
        except BlobNotFound:
            return  # replaced, or pruned, since it was listed
        except _FAILURES as exc:
            self._findings.damage(Kind.FILE_INDEX, root.name, "can not be used", f"{exc.message}; {_AGAIN}")
            return
        segments = (segment for volume in index.volumes for segment in volume.segments)
        lost = sum(segment.entries for segment in segments if not self._is_there(segment.ref))
        if lost:
            self._findings.damage(Kind.FILE_INDEX, root.name, f"lacks what it says of {lost} files", _AGAIN)

    def _is_there(self, ref: ChunkRef) -> bool:
        if ref.id in self._good:
            return True
        place = None
        if not self._holds(ref):
            place = self._lists.locate(ref.id)
            if (
                place is None
                or place.pack == ref.pack
                or not self._holds(ref._replace(pack=place.pack, ordinal=place.ordinal))
            ):
                return False
        self._good.add(ref.id)
        return True

    def _holds(self, ref: ChunkRef) -> bool:
        number = self._table.find(ObjectKind.METADATA_PACK, ref.pack)
        if number < 0 or self._findings.places.mask(ref.pack) >> ref.ordinal & 1:
            return False
        self._table.referenced[number] = True
        try:
            directory = self._reader.pack(ref.pack, ObjectKind.METADATA_PACK).directory
        except _FAILURES:
            return False
        return ref.ordinal < len(directory) and directory.id_at(ref.ordinal) == ref.id
