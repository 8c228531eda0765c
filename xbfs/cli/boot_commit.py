"""boot commit: a session's disks become a restore point."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from xbfs import __version__
from xbfs.cli import tasks, text
from xbfs.cli.context import catalog_of, index_of, repository_of
from xbfs.cli.describe import disk_lines, source_bytes
from xbfs.cli.points import ID_DIGITS
from xbfs.cli.progress import ProgressLine
from xbfs.instant import commit as commits
from xbfs.vfs.records import point_record

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.output import Output
    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.ingest.statistics import Progress
    from xbfs_engine.store.repository import Repository


def commit(arguments: argparse.Namespace, output: Output) -> None:
    """Make the point, or say what that would read."""
    repository = repository_of(arguments)
    catalog = catalog_of(repository, output)
    if arguments.dry_run:
        _tell_plan(repository, catalog, arguments.name, output)
        return
    index = index_of(repository)
    with ProgressLine(output, repository.runtime.clock) as progress:

        def report(now: Progress) -> None:
            progress.update(f"disk {now.disk}", now.read.source_bytes, now.planned_bytes)

        work = partial(commits.commit, repository, catalog, index, arguments.name)
        point = tasks.run(partial(work, program=f"xbfs {__version__}", report=report))
    if index.lost:
        output.warn(
            f"the repository has lost {text.count(len(index.lost), 'pack')}: nothing was deduplicated against them",
            "run `xbfs verify` to see which points are hit",
        )
    read, run = source_bytes(point), point.run
    output.result({"session": arguments.name, "point": point_record(point), "read_bytes": read, "dry_run": False})
    output.say(f"restore point {point.id[:ID_DIGITS]} of {point.vm_name} at {text.when(point.time_ns)}")
    for disk in point.disks:
        for line in disk_lines(disk):
            output.say(line)
    output.say(f"stored {text.size(run.stored_bytes)} and {text.size(run.metadata_bytes)} of metadata")
    output.say(f"session {arguments.name} goes on; `xbfs boot discard {arguments.name}` ends it")


def _tell_plan(repository: Repository, catalog: Catalog, name: str, output: Output) -> None:
    plan = commits.plan(repository, catalog, name)
    disks = [{"number": number, "read_bytes": read} for number, read in plan.read_bytes.items()]
    read_bytes = sum(plan.read_bytes.values())
    output.result({"session": name, "base": plan.base.id, "disks": disks, "read_bytes": read_bytes, "dry_run": True})
    for number, read in plan.read_bytes.items():
        output.say(f"disk {number}: {text.size(read)} would be read")
    output.say(f"would make a restore point of {plan.base.vm_name} out of session {name}, since {plan.base.id[:12]}")
