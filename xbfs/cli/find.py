"""find: versions of files over restore points, by name."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from xbfs.cli import text
from xbfs.cli.context import catalog_of, point_of, repository_of
from xbfs.cli.file_indexes import Indexing
from xbfs.cli.file_text import SIZE_WIDTH, TIME_WIDTH, file_time, point_mark, shown_record, shown_text, span_text
from xbfs.vfs.times import SECOND_NS, parse_time
from xbfs_engine.catalog.catalog import points_of
from xbfs_engine.catalog.fileindex.glob import Pattern
from xbfs_engine.catalog.fileindex.search import FoundVersion, Search
from xbfs_engine.core.errors import GuestNotFound, UsageError
from xbfs_engine.guestfs.base import Kind

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from xbfs.cli.output import Output
    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.catalog.fileindex.records import SegmentRef
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.core.errors import IntegrityError


def find(arguments: argparse.Namespace, output: Output) -> None:
    """Tell each version that matches, VM by VM; memory does not grow with what is found."""
    pattern = Pattern(arguments.pattern, ignore_case=arguments.ignore_case)
    repository = repository_of(arguments)
    catalog = catalog_of(repository, output)
    groups = _chosen(catalog, arguments.vms, arguments.between)
    indexing = Indexing(repository, catalog, output)
    kinds = [Kind(letter) for letter in arguments.type or ()]
    searched: list[tuple[Search, list[RestorePoint]]] = []
    for points in groups:
        held: list[RestorePoint] = []
        roots = indexing.roots(points, held, build=arguments.build)
        searched.append((Search(indexing.indexes, roots, pattern, volume=arguments.volume, kinds=kinds), held))
    if arguments.volume is not None and not any(search.volumes for search, _ in searched):
        raise GuestNotFound(f"no index has a volume {arguments.volume}", hint="see `xbfs index --json` for their names")
    count = 0

    def records() -> Iterator[dict[str, object]]:
        nonlocal count
        for search, held in searched:
            for found in search.versions(lambda ref, exc: _damaged(ref, exc, output)):
                count += 1
                output.say(_line(found, held, with_vm=len(groups) > 1))
                yield _record(found, held)

    output.stream("files", islice(records(), arguments.limit))
    limited = arguments.limit is not None and count >= arguments.limit
    output.result({"limited": limited})
    if limited:
        output.say(f"ended after {text.count(count, 'version')}, as --limit says")
    elif not count:
        output.say("nothing found")


def _chosen(catalog: Catalog, vms: Sequence[str], between: Sequence[str] | None) -> list[list[RestorePoint]]:
    """The points of each VM, oldest first. Raises PointNotFound, PointAmbiguous, UsageError."""
    points = catalog.points()
    chosen = [point for vm in vms for point in points_of(points, vm)] if vms else points
    if between is not None:
        first, last = (_time_ns(catalog, word, end=end) for word, end in zip(between, (False, True), strict=True))
        if first > last:
            raise UsageError(f"{between[0]} is later than {between[1]}", hint="--between takes the earlier one first")
        chosen = [point for point in chosen if first <= point.time_ns <= last]
    groups: dict[str, dict[str, RestorePoint]] = {}
    for point in sorted(chosen, key=lambda point: (point.vm_name, point.vm_uuid, point.time_ns)):
        groups.setdefault(point.vm_uuid, {})[point.id] = point
    return [list(group.values()) for group in groups.values()]


def _time_ns(catalog: Catalog, word: str, *, end: bool) -> int:
    """A time, or that of a restore point; the end of its second, or of its day where only a day is given."""
    seconds = parse_time(word)
    if seconds is None:
        return point_of(catalog, word).time_ns
    span = 86400 if len(word) == len("2026-09-20") else 1
    return (seconds + (span if end else 0)) * SECOND_NS - (1 if end else 0)


def _line(found: FoundVersion, held: Sequence[RestorePoint], *, with_vm: bool) -> str:
    points = [held[number] for number in found.points]
    vm = f"{points[0].vm_name}:" if with_vm else ""
    gone = f", deleted since {text.when(held[found.gone].time_ns)}" if found.gone is not None else ""
    return (
        f"{found.kind.value} {text.size(found.size_bytes):>{SIZE_WIDTH}}  {file_time(found.mtime_ns):<{TIME_WIDTH}}  "
        f"{vm}{shown_text(found.shown)}  [{span_text(points)}{gone}]"
    )


def _record(found: FoundVersion, held: Sequence[RestorePoint]) -> dict[str, object]:
    points = [held[number] for number in found.points]
    return {
        "vm": points[0].vm_name,
        "vm_uuid": points[0].vm_uuid,
        **shown_record(found.shown),
        "type": found.kind.value,
        "size_bytes": found.size_bytes,
        "mtime": file_time(found.mtime_ns),
        "mtime_ns": found.mtime_ns,
        "points": len(points),
        "first": point_mark(points[0]),
        "last": point_mark(points[-1]),
        "deleted_since": None if found.gone is None else point_mark(held[found.gone]),
    }


def _damaged(ref: SegmentRef, exc: IntegrityError, output: Output) -> None:
    output.warn(
        f"{text.count(ref.entries, 'file')} were not searched: {exc.message}",
        "build the index anew: xbfs index VM --all --force",
    )
