"""pool check and pool sweep: whether a pool is fit for backups, and taking away what dead runs left on it."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from xbfs.cli import tasks, text
from xbfs.cli.context import catalog_of, repository_of
from xbfs.cli.pool import configured
from xbfs_engine.core.errors import XbfsError
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.ingest.vm.base import known_bases
from xbfs_engine.source.xapi.ledger import Ledgers
from xbfs_engine.source.xapi.preflight import Severity, check_pool
from xbfs_engine.source.xapi.session import open_pool
from xbfs_engine.source.xapi.sweep import sweep as sweep_pool

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.output import Output
    from xbfs_engine.source.xapi.config import Credentials, PoolConfig
    from xbfs_engine.source.xapi.preflight import Finding
    from xbfs_engine.source.xapi.sweep import KnownBases, SweepReport


def check(arguments: argparse.Namespace, output: Output) -> None:
    """Tell whether a pool is fit for backups."""
    config, secrets = configured(arguments.name)
    findings = tasks.run(partial(_check, config, secrets))
    output.result({"pool": config.name, "findings": [finding._asdict() for finding in findings]})
    shown = [f for f in findings if f.severity is Severity.NOTE or (arguments.all and f.severity is Severity.OK)]
    rows = [(f.severity.value, f.topic, f.subject, f.fact) for f in shown]
    for line in text.table(rows):
        output.say(line)
    warnings = [finding for finding in findings if finding.severity is Severity.WARNING]
    for finding in warnings:
        output.warn(f"{finding.topic}: {finding.subject}: {finding.fact}", finding.fix)
    told = text.count(len(warnings), "warning") if warnings else "fit for backups"
    output.say(f"pool {config.name}: {told}")


def sweep(arguments: argparse.Namespace, output: Output) -> None:
    """Remove what dead runs of this node left on a pool."""
    config, secrets = configured(arguments.name)
    bases = _known_bases(arguments, output)
    report = tasks.run(partial(_sweep, config, secrets, bases, dry_run=arguments.dry_run))
    output.result(
        {
            "pool": config.name,
            "dry_run": report.dry_run,
            "done": [{"deed": step.deed.value, "uuid": step.uuid, "name": step.name} for step in report.done],
            "failed": [
                {"deed": failed.step.deed.value, "uuid": failed.step.uuid, "message": failed.reason}
                for failed in report.failed
            ],
            "kept": [kept._asdict() for kept in report.kept],
            "notes": [note._asdict() for note in report.notes],
        }
    )
    would = "would " if report.dry_run else ""
    for step in report.done:
        output.say(f"{would}{step.deed.value} {step.uuid} {step.name}".rstrip())
    for failed in report.failed:
        output.warn(f"could not {failed.step.deed.value} {failed.step.uuid}: {failed.reason}", failed.hint)
    for note in report.notes:
        output.say(f"left alone: {note.cls} {note.uuid} {note.name}: {note.reason}")
    output.say(f"{text.count(len(report.done), 'leftover')} {'found' if report.dry_run else 'removed'}")


def _known_bases(arguments: argparse.Namespace, output: Output) -> KnownBases | None:
    """From the repository, if one is named. Without it a sweep only removes less."""
    if not (getattr(arguments, "repository", None) or os.environ.get("XBFS_REPOSITORY")):
        return None
    try:
        repository = repository_of(arguments)
        return known_bases(catalog_of(repository, output), repository.id)
    except XbfsError as exc:
        output.warn(f"the repository is not asked which bases its points need: {exc.message}", exc.hint)
        return None


async def _check(config: PoolConfig, secrets: Credentials) -> list[Finding]:
    runtime = system_runtime()
    async with open_pool(config, secrets, runtime) as pool:
        ledgers = Ledgers.of_pool(config.name, os.environ, runtime)
        return await check_pool(pool, ledgers, node=os.uname().nodename, pins=config.pins)


async def _sweep(config: PoolConfig, secrets: Credentials, bases: KnownBases | None, *, dry_run: bool) -> SweepReport:
    runtime = system_runtime()
    async with open_pool(config, secrets, runtime) as pool:
        ledgers = Ledgers.of_pool(config.name, os.environ, runtime)
        return await sweep_pool(pool, ledgers, node=os.uname().nodename, dry_run=dry_run, bases=bases)
