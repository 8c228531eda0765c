"""diff --files: the files that were added, removed or changed between two restore points."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs.cli.context import catalog_of, point_of, repository_of
from xbfs.cli.file_indexes import Indexing
from xbfs.cli.file_text import entry_record, entry_text, shown_record, shown_text
from xbfs.cli.points import ID_DIGITS
from xbfs_engine.catalog.fileindex.compare import ChangeKind, differences
from xbfs_engine.catalog.fileindex.places import view_of
from xbfs_engine.core.errors import GuestNotFound, UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from xbfs.cli.output import Output
    from xbfs_engine.catalog.fileindex.compare import Change
    from xbfs_engine.catalog.fileindex.places import Shown
    from xbfs_engine.catalog.fileindex.records import FileIndex

_SIGNS = {ChangeKind.ADDED: "+", ChangeKind.REMOVED: "-", ChangeKind.CHANGED: "M"}


def diff_files(arguments: argparse.Namespace, output: Output) -> None:
    """List what differs, volume by volume in path order; memory does not grow with it."""
    if arguments.disk is not None:
        raise UsageError("--disk does not go with --files", hint="choose a volume with --volume")
    repository = repository_of(arguments)
    catalog = catalog_of(repository, output)
    points = [point_of(catalog, arguments.a), point_of(catalog, arguments.b)]
    indexing = Indexing(repository, catalog, output)
    found = [indexing.root(point, build=arguments.build) for point in points]
    roots = [root for root in found if root is not None]
    if len(roots) < len(points):
        missing = " ".join(point.id[:ID_DIGITS] for point, root in zip(points, found, strict=True) if root is None)
        raise GuestNotFound(f"no file index of {missing}", hint="run `xbfs index POINT` for it, or add --build")
    old, new = roots
    names = _volumes(old, new, arguments.volume, output)
    totals = dict.fromkeys((kind.value for kind in ChangeKind), 0)

    def records() -> Iterator[dict[str, object]]:
        for name in names:
            # What is no more is shown where it was.
            views = [view_of(root, name, in_tree=arguments.volume is None) for root in (old, new)]
            for change in differences(indexing.indexes, old.volume(name), new.volume(name)):
                totals[change.kind.value] += 1
                shown = views[change.kind is not ChangeKind.REMOVED].show(change.path)
                output.say(_line(change, shown))
                yield _record(change, shown)

    output.result({"a": points[0].id, "b": points[1].id})
    output.stream("files", records())
    output.result({"totals": totals})
    output.say(", ".join(f"{count} {kind}" for kind, count in totals.items()))


def _volumes(old: FileIndex, new: FileIndex, chosen: str | None, output: Output) -> list[str]:
    """The volumes to compare; those of which an index does not tell are warned of. Raises GuestNotFound."""
    listed = {volume.name: volume for root in (old, new) for volume in root.volumes if volume.root}
    names = sorted(listed if chosen is None else {chosen} & listed.keys())
    if chosen is not None and not names:
        raise GuestNotFound(f"neither index lists a volume {chosen}", hint=f"there are: {', '.join(sorted(listed))}")
    found = []
    for name in names:
        silent = next((v for root in (old, new) if (v := root.volume(name)) is not None and not v.root), None)
        if silent is None:
            found.append(name)
        else:
            output.warn(
                f"volume {name} was not listed in one of the points: {silent.reason or silent.status}",
                "give its key in XBFS_UNLOCK and run `xbfs index POINT --force`" if silent.status == "locked" else "",
            )
            continue
        if old.volume(name) is None or new.volume(name) is None:
            where = "A" if new.volume(name) is None else "B"
            output.say(f"volume {name} is only in {where}")
    return found


def _line(change: Change, shown: Shown) -> str:
    fields = f"  ({', '.join(change.fields)})" if change.fields else ""
    return f"{_SIGNS[change.kind]} {entry_text(change.new or change.old)}  {shown_text(shown)}{fields}"


def _record(change: Change, shown: Shown) -> dict[str, object]:
    return {
        "change": change.kind.value,
        **shown_record(shown),
        "fields": list(change.fields),
        "old": entry_record(change.old) if change.old else None,
        "new": entry_record(change.new) if change.new else None,
    }
