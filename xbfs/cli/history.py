"""history: the versions of one file over all restore points."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from xbfs.cli.context import catalog_of, repository_of
from xbfs.cli.file_indexes import Indexing
from xbfs.cli.file_text import entry_record, entry_text, path_text, point_mark, span_text
from xbfs_engine.catalog.catalog import points_of
from xbfs_engine.catalog.fileindex.compare import lookup
from xbfs_engine.catalog.fileindex.glob import Pattern, escaped
from xbfs_engine.catalog.fileindex.places import locate
from xbfs_engine.catalog.fileindex.search import Search
from xbfs_engine.core.errors import GuestNotFound, IntegrityError, PointNotFound, UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from xbfs.cli.output import Output
    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.catalog.fileindex.indexes import FileIndexes
    from xbfs_engine.catalog.fileindex.records import FileIndex
    from xbfs_engine.catalog.fileindex.segment import Entry
    from xbfs_engine.catalog.restore_point import RestorePoint

_SPLIT = re.compile(r":(?=[/\\]|[A-Za-z]:[/\\])")


class _State(NamedTuple):
    """What one index says of the file. ``state``: present, absent or unknown, then with a reason."""

    state: str
    entry: Entry | None
    reason: str


def history(arguments: argparse.Namespace, output: Output) -> None:
    """Tell when the file was there, and when it changed."""
    repository = repository_of(arguments)
    catalog = catalog_of(repository, output)
    points, path = _parsed(catalog, arguments.file)
    indexing = Indexing(repository, catalog, output)
    held: list[RestorePoint] = []
    roots = list(indexing.roots(points, held, build=arguments.build))
    if not roots:
        raise GuestNotFound(f"no restore point of {points[0].vm_name} has a file index", hint="run `xbfs index` first")
    states = _states(indexing.indexes, roots, path, arguments.volume)
    if not any(state.entry for state in states) and any(root.tree.kind == "windows" for root in roots):
        spelled = _spelled(indexing.indexes, roots, path, arguments.volume)
        if spelled is not None:
            volume, inside = spelled
            states = [_state(indexing.indexes, root, volume, inside) for root in roots]
    if all(state.state == "unknown" for state in states):
        raise GuestNotFound(f"{path_text(path)} can not be told of: {states[-1].reason}")
    runs = _runs(states)
    output.result({"vm": points[0].vm_name, "path": path.decode(errors="replace"), "volume": arguments.volume})
    output.result({"versions": [_record(states[first], held[first:last]) for first, last in runs]})
    for first, last in runs:
        output.say(_line(states[first], held[first:last]))


def _parsed(catalog: Catalog, word: str) -> tuple[list[RestorePoint], bytes]:
    """VM:/path; the first colon before which there is the name of a VM. Raises PointNotFound, UsageError."""
    problem: PointNotFound | None = None
    for match in _SPLIT.finditer(word):
        try:
            points = points_of(catalog.points(), word[: match.start()])
        except PointNotFound as exc:
            problem = problem or exc
            continue
        return points, os.fsencode(word[match.end() :])
    raise problem or UsageError(f"{word!r} is not VM:/path", hint="such as web:/etc/fstab or desk:C:/Users")


def _states(indexes: FileIndexes, roots: Sequence[FileIndex], path: bytes, volume: str | None) -> list[_State]:
    states = []
    for root in roots:
        try:
            held, inside = (volume, _clean(path)) if volume is not None else locate(root, _in_tree(path, root))
        except GuestNotFound as exc:
            states.append(_State("unknown", None, f"{exc.message}; {exc.hint}"))
        else:
            states.append(_state(indexes, root, held, inside))
    return states


def _state(indexes: FileIndexes, root: FileIndex, name: str, inside: bytes) -> _State:
    volume = root.volume(name)
    if volume is None:
        names = ", ".join(volume.name for volume in root.volumes) or "none"
        return _State("unknown", None, f"there is no volume {name}; there are: {names}")
    if not volume.root:
        return _State("unknown", None, f"volume {name} was not listed: {volume.reason or volume.status}")
    try:
        entry = lookup(indexes, volume, inside)
    except IntegrityError as exc:
        return _State("unknown", None, f"{exc.message}; run `xbfs index {root.point[:12]} --force`")
    return _State("present" if entry else "absent", entry, "")


def _in_tree(path: bytes, root: FileIndex) -> bytes:
    return b"/" + _clean(path.replace(b"\\", b"/") if root.tree.kind == "windows" else path)


def _clean(path: bytes) -> bytes:
    """Without slashes that mean nothing."""
    return b"/".join(part for part in path.split(b"/") if part not in {b"", b"."})


def _spelled(
    indexes: FileIndexes, roots: Sequence[FileIndex], path: bytes, volume: str | None
) -> tuple[str, bytes] | None:
    """Windows takes capitals and small letters for the same: where some point has the path, spelled otherwise."""
    text = (b"/" + _clean(path.replace(b"\\", b"/"))).decode(errors="surrogateescape")
    pattern = Pattern(escaped(text), ignore_case=True)
    found = next(Search(indexes, roots, pattern, volume=volume).versions(lambda ref, exc: None), None)
    return None if found is None else (found.shown.volume, found.inside)


def _runs(states: Sequence[_State]) -> list[tuple[int, int]]:
    """Neighbours that say the same, as [first, last)."""
    starts = [number for number, state in enumerate(states) if not number or state != states[number - 1]]
    return list(zip(starts, [*starts[1:], len(states)], strict=True))


def _line(state: _State, points: list[RestorePoint]) -> str:
    return f"{state.state:<7}  {entry_text(state.entry)}  [{span_text(points)}]" + (
        f"  {state.reason}" if state.reason else ""
    )


def _record(state: _State, points: Sequence[RestorePoint]) -> dict[str, object]:
    return {
        "state": state.state,
        "reason": state.reason or None,
        "file": entry_record(state.entry) if state.entry else None,
        "points": [point_mark(point) for point in points],
    }
