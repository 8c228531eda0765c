"""One session that is served: its overlays, the NBD server it may have, and its copying in the background.

Event-loop thread only, but for what says that it may block.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn, cast

import trio

from xbfs.instant.session import TREE, Export, overlay_directory
from xbfs.instant.share import HERE, address_towards
from xbfs.serve.nbd import NbdExport, serve_nbd
from xbfs.vfs.live.stubs import stub_keys
from xbfs.view.overlay import open_overlay
from xbfs_engine.core.errors import ExportFailed, StorageError, XbfsError
from xbfs_engine.core.log import Logger

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from xbfs.instant.session import Session
    from xbfs.serve.nbd import NbdPlace
    from xbfs.serve.nfs import NfsPlace
    from xbfs.view.base import RandomAccess
    from xbfs.view.overlay import Overlay
    from xbfs_engine.core.runtime import Clock

RETRY_S: Final = 10.0
"""Between tries of what did not work: the storage may be back, the port free."""

_log = Logger("xbfs.instant")


class Progress(NamedTuple):
    """How far a disk has come in the background, in bytes."""

    done: int
    total: int


class Served:
    """``directory`` is the session's; ``shown`` the same in the live mount."""

    def __init__(self, session: Session, directory: Path, shown: Path, overlays: Mapping[str, Overlay]) -> None:
        self.session = session
        self.directory = directory
        self.shown = shown
        self.overlays = overlays
        self.problem: XbfsError | None = None
        self.started = trio.Event()
        self._nbd: NbdPlace | None = None
        self._progress: dict[str, Progress] = {}
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._ended.set()

    @property
    def clients(self) -> tuple[str, ...]:
        """Who may mount it by NFS."""
        return (self.session.clients or HERE) if self.session.export is Export.NFS else ()

    async def run(self, clock: Clock) -> None:
        """Until ``stop``; ``started`` is set once its NBD server is there, or ``problem`` tells why not."""
        self._ended = trio.Event()
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    if self.session.hydrate_bytes_s is not None:
                        nursery.start_soon(self._hydrate, clock)
                    if self.session.export is Export.NBD:
                        await self._keep_nbd()
                    self.started.set()
                    await trio.sleep_forever()
        finally:
            self.started.set()
            self._ended.set()

    async def stop(self) -> None:
        """Nothing reads or writes the disks of itself any more."""
        self._scope.cancel()
        await self._ended.wait()

    def close(self) -> None:
        """Flush and let go of the overlays, when nobody is in them. May block."""
        for key, overlay in self.overlays.items():
            try:
                overlay.close()
            except XbfsError as exc:
                _log.error("a disk could not be flushed", session=self.session.name, disk=key, problem=str(exc))

    def status(self, share: NfsPlace | None) -> dict[str, object]:
        """For answers on the control socket. May block."""
        nfs = None if share is None or not self.clients else replace(share, address=address_towards(self.clients[0]))
        nbd = self._nbd
        try:
            places = stub_keys(self.directory / TREE)
        except StorageError:
            places = {}  # shown as gone
        paths = {key: found[0] for key, found in places.items() if found}
        uris: dict[str, str] = {}
        if nbd is not None:
            uris = {key: nbd.uri(path) for key, path in paths.items()}
        elif nfs is not None:
            uris = {key: nfs.uri(self.session.name, path) for key, path in paths.items()}
        return {
            "name": self.session.name,
            "problem": None if self.problem is None else [self.problem.message, self.problem.hint],
            "files": {key: str(self.shown / path) for key, path in paths.items()},
            "uris": uris,
            "local_uris": {} if nbd is None else {key: nbd.local_uri(path) for key, path in paths.items()},
            "nfs": None if nfs is None else [nfs.address, nfs.port, nfs.path(self.session.name)],
            "read_bytes": sum(overlay.read_bytes for overlay in self.overlays.values()),
            "dirty_bytes": sum(overlay.dirty_bytes for overlay in self.overlays.values()),
            "hydrated": self._hydrated(),
            "passed": [key for key, overlay in self.overlays.items() if overlay.is_passed_through],
        }

    def _hydrated(self) -> float | None:
        """How much of the points' data is here, from 0 to 1; None if nobody asked for it."""
        if self.session.hydrate_bytes_s is None:
            return None
        if all(overlay.is_hydrated for overlay in self.overlays.values()):
            return 1.0
        total = sum(progress.total for progress in self._progress.values())
        return min(sum(progress.done for progress in self._progress.values()) / total, 0.999) if total else 0.0

    def _came(self, key: str, done: int, total: int) -> None:
        self._progress[key] = Progress(done, total)

    async def _keep_nbd(self) -> NoReturn:
        """An NBD server for ever; while it does not start, tried again."""
        while True:
            clients = self.session.clients
            address = address_towards(clients[0]) if clients else HERE[0]
            export = NbdExport(self.shown, self.directory / "nbd", address)
            try:
                async with trio.open_nursery() as nursery:
                    self._nbd = await nursery.start(partial(serve_nbd, export))
                    self.problem = None
                    self.started.set()
            except* ExportFailed as group:
                problem = cast("ExportFailed", group.exceptions[0])
                if self.problem is None or self.problem.message != problem.message:
                    _log.warning("a session is not exported", session=self.session.name, problem=str(problem))
                self.problem = problem
            self.started.set()
            await trio.sleep(RETRY_S)

    async def _hydrate(self, clock: Clock) -> None:
        """Copy all disks in a thread that is told to stop when this is cancelled."""
        stop = threading.Event()

        async def watch() -> None:
            try:
                await trio.sleep_forever()
            finally:
                stop.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await trio.to_thread.run_sync(partial(self._copy, clock, stop), limiter=trio.CapacityLimiter(1))
            nursery.cancel_scope.cancel()

    def _copy(self, clock: Clock, stop: threading.Event) -> None:
        """In a thread, until all is copied or ``stop`` is set."""
        told: str | None = None
        while not stop.is_set() and not all(overlay.is_hydrated for overlay in self.overlays.values()):
            try:
                for key, overlay in self.overlays.items():
                    rate = self.session.hydrate_bytes_s or None
                    overlay.hydrate(rate_bytes_s=rate, clock=clock, stop=stop, on_progress=partial(self._came, key))
            except XbfsError as exc:
                if told != exc.message:
                    told = exc.message
                    _log.warning("a point can not be copied", session=self.session.name, problem=str(exc))
                stop.wait(RETRY_S)


def open_overlays(
    session: Session, directory: Path, repository_id: str, bases: Mapping[str, RandomAccess]
) -> dict[str, Overlay]:
    """The overlays of a session by key; all or none. May block.

    Raises BlobNotFound, OverlayInUse, OverlayMismatch, IntegrityError, StorageError.
    """
    with ExitStack() as undo:
        found: dict[str, Overlay] = {}
        for disk in session.disks:
            identity = disk.identity(repository_id, session.point)
            overlay = open_overlay(overlay_directory(directory, disk), bases[disk.key], identity=identity)
            found[disk.key] = undo.enter_context(overlay)
        undo.pop_all()
        return found
