"""index: builds the file indexes of restore points."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs.cli import text
from xbfs.cli.context import catalog_of, point_of, repository_of
from xbfs.cli.file_indexes import Indexing
from xbfs.cli.file_text import path_text
from xbfs.cli.points import ID_DIGITS
from xbfs_engine.catalog.catalog import points_of
from xbfs_engine.core.errors import PointNotFound, UsageError

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.output import Output
    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.catalog.fileindex.records import VolumeIndex
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.ingest.fileindex.build import IndexedPoint


def index(arguments: argparse.Namespace, output: Output) -> None:
    """Index what has no index, or what is named."""
    repository = repository_of(arguments)
    catalog = catalog_of(repository, output)
    wanted = chosen_points(catalog, arguments.point, every=arguments.all)
    indexing = Indexing(repository, catalog, output)
    indexed = set() if arguments.force else indexing.indexes.points()
    todo = [point for point in wanted if point.id not in indexed]
    records: list[dict[str, object]] = []

    def done(point: RestorePoint, built: IndexedPoint) -> None:
        records.append(_record(point, built))
        _tell(point, built, output)

    count = indexing.build(todo, force=arguments.force, done=done)
    output.result({"indexed": records, "had_index": len(wanted) - len(todo)})
    if len(todo) < len(wanted):
        output.say(f"{text.count(len(wanted) - len(todo), 'point')} had an index already")
    elif not count and not todo:
        output.say("no restore points yet")


def chosen_points(catalog: Catalog, chosen: str | None, *, every: bool) -> list[RestorePoint]:
    """The points meant by a POINT, a VM or nothing: see ``xbfs index --help``. Raises PointNotFound, UsageError."""
    points = catalog.points()
    if chosen is not None and "@" not in chosen and "/" not in chosen:
        try:
            points = points_of(points, chosen)
        except PointNotFound:
            points = [point_of(catalog, chosen)]
            if every:
                raise UsageError(f"{chosen} is a single restore point", hint="leave out --all") from None
            return points
    elif chosen is not None:
        if every:
            raise UsageError(f"{chosen} is a single restore point", hint="name the VM, or leave out --all")
        return [point_of(catalog, chosen)]
    return points if every else list({point.vm_uuid: point for point in points}.values())


def _tell(point: RestorePoint, built: IndexedPoint, output: Output) -> None:
    taken = f", {', '.join(built.taken)} taken over" if built.taken else ""
    output.say(
        f"{point.id[:ID_DIGITS]} of {point.vm_name} at {text.when(point.time_ns)}: "
        f"{text.count(built.index.entries, 'file')}, {text.size(built.stored_bytes)} stored in "
        f"{text.duration(built.elapsed_s)}{taken}"
    )
    for note in built.index.notes:
        output.say(f"  {path_text(note.encode())}")
    for volume in built.index.volumes:
        for line in _volume_lines(volume):
            output.say(f"  {line}")
        if volume.problems:
            output.warn(
                f"of volume {volume.name}, {text.count(len(volume.problems) + volume.problems_omitted, 'place')} could"
                " not be read: what is there will not be found",
                "the index says where: xbfs index --json",
            )


def _volume_lines(volume: VolumeIndex) -> list[str]:
    reason = volume.reason or volume.state_reason
    state = volume.state or volume.status
    line = f"{volume.name}: {volume.kind}, {text.size(volume.size_bytes)}, {state}"
    if volume.root:
        line += f", {text.count(volume.entries, 'file')}"
    lines = [line + (f": {path_text(reason.encode())}" if reason else "")]
    lines += [f"  {path_text(b'/' + problem.path)}: {problem.message}" for problem in volume.problems[:8]]
    return lines


def _record(point: RestorePoint, built: IndexedPoint) -> dict[str, object]:
    return {
        "point": point.id,
        "vm": point.vm_name,
        "entries": built.index.entries,
        "stored_bytes": built.stored_bytes,
        "segments_stored": built.segments_stored,
        "segments_shared": built.segments_shared,
        "elapsed_s": built.elapsed_s,
        "base": built.base,
        "notes": list(built.index.notes),
        "volumes": [
            {
                "name": volume.name,
                "type": volume.kind,
                "label": volume.label,
                "uuid": volume.uuid,
                "size_bytes": volume.size_bytes,
                "status": volume.status,
                "reason": volume.reason,
                "state": volume.state or None,
                "state_reason": volume.state_reason,
                "entries": volume.entries,
                "taken_over": volume.name in built.taken,
                "problems": [
                    {"path": problem.path.decode(errors="replace"), "message": problem.message}
                    for problem in volume.problems
                ],
                "problems_omitted": volume.problems_omitted,
            }
            for volume in built.index.volumes
        ],
    }
