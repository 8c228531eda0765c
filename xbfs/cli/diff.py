"""diff: the extents of a disk, or with --files the files, that differ between two restore points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xbfs.cli import text
from xbfs.cli.context import catalog_of, disk_of, index_of, point_of, repository_of
from xbfs_engine.catalog.blockmap import BlockMap, NodeStore, differing_chunks
from xbfs_engine.core.errors import UsageError
from xbfs_engine.store.reader import ChunkReader

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

    from xbfs.cli.output import Output


@dataclass(frozen=True, slots=True)
class ChangedExtent:
    """Bytes of the newer disk that differ. ``data``: whether it holds data there, or zeros."""

    offset: int
    length: int
    data: bool

    def to_record(self) -> dict[str, object]:
        """For --json."""
        return {"offset": self.offset, "length": self.length, "data": self.data}


def changed_extents(chunks: Iterable[tuple[int, bool]], chunk_size: int, size_bytes: int) -> Iterator[ChangedExtent]:
    """Neighbouring chunks (position, has data), ascending, as extents that end with the disk."""
    first = end = 0
    data = False
    for position, has_data in chunks:
        if position * chunk_size >= size_bytes:
            break
        if position == end and has_data == data and end > first:
            end += 1
            continue
        if end > first:
            yield _extent(first, end, chunk_size, size_bytes, data)
        first, end, data = position, position + 1, has_data
    if end > first:
        yield _extent(first, end, chunk_size, size_bytes, data)


def _extent(first: int, end: int, chunk_size: int, size_bytes: int, data: bool) -> ChangedExtent:
    offset = first * chunk_size
    return ChangedExtent(offset, min(end * chunk_size, size_bytes) - offset, data)


def diff(arguments: argparse.Namespace, output: Output) -> None:
    """List what differs; memory does not grow with the difference."""
    if arguments.files:
        from xbfs.cli.diff_files import diff_files

        diff_files(arguments, output)
        return
    if arguments.volume is not None or arguments.build:
        raise UsageError("--volume and --build are for --files", hint="choose a disk with --disk, or add --files")
    repository = repository_of(arguments)
    catalog = catalog_of(repository, output)
    old_point, new_point = point_of(catalog, arguments.a), point_of(catalog, arguments.b)
    new = disk_of(new_point, arguments.disk)
    old = disk_of(old_point, new.number)
    if old.chunk_size != new.chunk_size:
        raise UsageError(f"the points have chunks of {old.chunk_size} and of {new.chunk_size} bytes: not comparable")
    nodes = NodeStore(ChunkReader(repository.storage, repository.keys, index_of(repository)))
    chunks = differing_chunks(BlockMap(nodes, old.root, old.chunks), BlockMap(nodes, new.root, new.chunks), nodes)
    totals = {"extents": 0, "changed_bytes": 0, "data_bytes": 0, "zero_bytes": 0}

    def records() -> Iterator[dict[str, object]]:
        for extent in changed_extents(chunks, new.chunk_size, new.size_bytes):
            totals["extents"] += 1
            totals["changed_bytes"] += extent.length
            totals["data_bytes" if extent.data else "zero_bytes"] += extent.length
            output.say(f"{extent.offset:>16} {extent.length:>14}  {'data' if extent.data else 'zero'}")
            yield extent.to_record()

    output.result(
        {
            "a": old_point.id,
            "b": new_point.id,
            "disk": new.number,
            "size_bytes": new.size_bytes,
            "old_size_bytes": old.size_bytes,
        }
    )
    output.say(f"{'OFFSET':>16} {'LENGTH':>14}")
    output.stream("extents", records())
    output.result({"totals": totals})
    if old.size_bytes != new.size_bytes:
        output.say(f"disk {new.number} had {text.size(old.size_bytes)} and has {text.size(new.size_bytes)}")
    output.say(
        f"{text.count(totals['extents'], 'extent')}, {text.size(totals['changed_bytes'])} differ: "
        f"{text.size(totals['data_bytes'])} data, {text.size(totals['zero_bytes'])} zero"
    )
