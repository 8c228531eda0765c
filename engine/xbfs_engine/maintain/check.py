"""`check`: is the repository's structure whole? Reads everything but the chunks. Keeps no state; blocks its thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs_engine.maintain.survey import Survey

if TYPE_CHECKING:
    from collections.abc import Callable

    from xbfs_engine.maintain.parallel import MaintenanceProgress
    from xbfs_engine.maintain.report import Report
    from xbfs_engine.store.repository import Repository


def check(
    repository: Repository,
    progress: Callable[[MaintenanceProgress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    *,
    threads: int = 2,
) -> Report:
    """Examine names, configs, key slots, manifests, index blobs, every pack's directory and every block map.

    Finds whatever is missing, truncated, under another's name or changed in those; not a changed byte within a chunk
    of a data pack (that is what ``verify`` is for), nor one in the sealed part of a key slot, which only its secret
    opens. ``progress`` is called by any thread, one at a time, at most five times a second. ``stop`` is asked between
    packs and nodes.

    Heap: 54 bytes a pack, 64 bytes an index blob, a bit a block map node, every manifest (as the catalog keeps them),
    two decoded index blobs (4 MiB each, at most 64), 10 MiB of references, 48 MiB of caches, and for every damaged pack
    some 300 bytes: nothing by chunk. For 10^9 chunks in 10^6 packs that adds up to some 150 MiB (computed). Where hints
    are stale, 24 bytes of temporary disk a chunk.

    Raises Cancelled; StorageError if the storage as a whole fails.
    """
    return Survey(repository, progress, stop, deep=False, threads=threads).run()
