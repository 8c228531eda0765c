"""`verify`: is every stored byte what was written? Keeps no state; blocks its thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs_engine.maintain.survey import Survey

if TYPE_CHECKING:
    from collections.abc import Callable

    from xbfs_engine.maintain.parallel import MaintenanceProgress
    from xbfs_engine.maintain.report import Report
    from xbfs_engine.store.repository import Repository


def verify(
    repository: Repository,
    progress: Callable[[MaintenanceProgress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    *,
    threads: int = 2,
) -> Report:
    """Everything ``check`` does, and read all bytes: names are hashes, every chunk authenticates, decodes to its id.

    A role without the data keys compares names with hashes and can not look inside data packs. Heap: that of ``check``
    and, per thread, one pack (32 MiB by default, at most 128) and one of its chunks. Arguments and errors: ``check``.
    """
    return Survey(repository, progress, stop, deep=True, threads=threads).run()
