"""``report.json`` of points that were tested: read again when there are other results, and bounded in memory.

Keeps nothing: what is known goes in and comes out as a whole. Blocking; any thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs.vfs.records import test_record
from xbfs.vfs.texts import report_json
from xbfs_engine.catalog.boottests import listed_tests, read_boot_test
from xbfs_engine.core.errors import BlobNotFound, FormatTooNew, IntegrityError
from xbfs_engine.core.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from xbfs.vfs.points import ShownPoint
    from xbfs_engine.catalog.boottests import Listed
    from xbfs_engine.core.ids import PointId
    from xbfs_engine.store.repository import Repository

TEXT_BYTES_MAX: Final = 32 * MIB
"""Of all texts with results; points whose newest result is older than those of the others only tell how many."""
READS_MAX: Final = 64
"""Results read at a time, but for those of one point: a mount must not wait for all that there are."""


class Report(NamedTuple):
    """``results`` are those that there are, the newest last. ``text`` tells of them, or just how many there are unless
    it ``is_whole``: they have no room or were not read yet. ``whole_bytes``: its size when it was whole, 0 before."""

    results: tuple[Listed, ...]
    text: bytes
    is_whole: bool = False
    whole_bytes: int = 0


Reports = dict["PointId", Report]


def look_for_tests(
    repository: Repository,
    points: Mapping[PointId, ShownPoint],
    before: Mapping[PointId, Report],
    *,
    text_bytes_max: int = TEXT_BYTES_MAX,
    reads_max: int = READS_MAX,
) -> Reports:
    """The report of each of ``points`` that has results; some may be whole only after a later look.

    Raises StorageError.
    """
    listed: dict[PointId, list[Listed]] = {}
    for result in listed_tests(repository.storage):
        if result.point in points:
            listed.setdefault(result.point, []).append(result)
    found: Reports = {}
    room, reads = text_bytes_max, reads_max
    for point_id, results in sorted(listed.items(), key=lambda item: item[1][-1].made_ns, reverse=True):
        point = points[point_id].point
        report = before.get(point_id)
        if report is None or report.results != tuple(results):
            report = Report(tuple(results), report_json(point, not_shown=len(results)))
        if not report.is_whole and report.whole_bytes <= room and reads > 0:
            reads -= len(results)
            tests = _records(repository, results)
            text = report_json(point, tests, not_shown=len(results) - len(tests))
            report = Report(report.results, text, is_whole=True, whole_bytes=len(text))
        if report.is_whole and report.whole_bytes > room:
            report = report._replace(text=report_json(point, not_shown=len(results)), is_whole=False)
        if report.is_whole:
            room -= report.whole_bytes
        found[point_id] = report
    return found


def _records(repository: Repository, results: Sequence[Listed]) -> list[dict[str, object]]:
    """Of the results that can be read."""
    found = []
    for listed in results:
        try:
            found.append(test_record(read_boot_test(repository, listed)))
        except (BlobNotFound, FormatTooNew, IntegrityError):
            continue  # they are counted
    return found
