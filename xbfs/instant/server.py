"""The live server: the one process that has a repository's sessions open, shows and exports them.

Owns which sessions are served. Sessions that can not be are tried again. Event-loop thread only; what may block runs
in threads. ``handlers`` answer on the control socket; other modules of this package may add theirs.
"""

from __future__ import annotations

import hashlib
import os
import signal
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from xbfs.control import place, wire
from xbfs.control.server import ControlServer
from xbfs.fuse.live import LiveMount
from xbfs.instant import sessions
from xbfs.instant.freezing import Freezing
from xbfs.instant.served import RETRY_S, Served, open_overlays
from xbfs.instant.session import TREE, Export
from xbfs.instant.share import Share
from xbfs.serve.device import same_device
from xbfs.vfs.live.tree import LiveTree
from xbfs_engine.core.errors import ExportFailed, OverlayInUse, SessionBusy, SessionNotFound, XbfsError
from xbfs_engine.core.log import Logger
from xbfs_engine.storage.files import write_changed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AsyncExitStack
    from pathlib import Path

    from xbfs.control.server import Handler
    from xbfs.instant.bases import Bases
    from xbfs.instant.state import StateDirectory
    from xbfs_engine.core.runtime import Clock

LET_GO_S: Final = 3.0
"""What exports of a server that died get to end: the kernel may write to disks for them until then."""
BUSY_S: Final = 2.0
"""The kernel tells of a close when it has returned already."""
BUSY_NFS_S: Final = 12.0
"""nfs-ganesha looks every 5 s which files nobody uses."""
IDLE_S: Final = 3.0
"""For how long there is no session before a server in the background ends: the next one may come at once."""
_IDLE_POLL_S: Final = 0.5
_POLL_S: Final = 0.1

_log = Logger("xbfs.instant")


class LiveServer:
    """Of the sessions in ``state``, over ``bases`` of the repository with that id. ``stays``: also without sessions."""

    def __init__(self, state: StateDirectory, bases: Bases, repository_id: str, clock: Clock, *, stays: bool) -> None:
        self.state = state
        self.stays = stays
        self.is_needed = True
        self.tree = LiveTree(clock)
        self.served: dict[str, Served] = {}
        self.handlers: dict[str, Handler] = {
            "open": self._on_open,
            "discard": self._on_discard,
            "list": self._on_list,
            "status": self._on_status,
        }
        self._bases = bases
        self._repository_id = repository_id
        self._clock = clock
        self._problems: dict[str, XbfsError] = {}
        self._share = Share(state.live, state.nfs)
        self._changing = trio.Lock()
        self._nursery: trio.Nursery | None = None
        self._freezing = Freezing(self.tree, self.served, bases, self._changing, clock)
        self.handlers |= self._freezing.handlers

    async def run(self, ready: Callable[[], None]) -> None:
        """Serve all sessions until SIGTERM, SIGINT, somebody unmounts, or it is not needed. Raises MountError,
        StorageError."""
        control = ControlServer(_socket(self.state), self.handlers)
        mount = LiveMount(self.tree, self.state.live, clock=self._clock, allow_other=os.geteuid() == 0)
        try:
            async with trio.open_nursery() as self._nursery:
                nursery = self._nursery
                nursery.start_soon(self._stop_on_signal, nursery.cancel_scope)
                await self._open_all()

                async def until_gone(*, task_status: trio.TaskStatus[None]) -> None:
                    await mount.run(task_status=task_status)
                    nursery.cancel_scope.cancel()

                with same_device(self.state.device_file, self.state.live):
                    await nursery.start(until_gone)
                await nursery.start(self._share.run)
                await control.listen()
                write_changed(self.state.control_file, os.fsencode(control.path))
                nursery.start_soon(control.serve)
                for served in self.served.values():
                    nursery.start_soon(served.run, self._clock)
                nursery.start_soon(self._tend)
                if not self.stays:
                    nursery.start_soon(self._end_when_idle, nursery.cancel_scope)
                ready()
        finally:
            control.close()
            with trio.CancelScope(shield=True):
                for name in list(self.served):
                    await self._drop(name, force=True)

    async def _open_all(self) -> None:
        """Have all sessions in the tree that can be."""
        until_s = trio.current_time() + LET_GO_S
        left = await trio.to_thread.run_sync(sessions.names, self.state)
        while left:
            for name in left:
                await self._try(name)
            left = [name for name in left if isinstance(self._problems.get(name), OverlayInUse)]
            if trio.current_time() > until_s:
                break
            await trio.sleep(_POLL_S)

    async def _try(self, name: str) -> Served | None:
        """Have a session in the tree, or its problem kept."""
        try:
            served = await trio.to_thread.run_sync(self._opened, name)
            try:
                self.tree.add(name, served.directory / TREE, served.overlays, passes=served.session.passthrough)
            except XbfsError:
                await trio.to_thread.run_sync(served.close)
                raise
        except SessionNotFound:
            self._problems.pop(name, None)
        except XbfsError as exc:
            if name not in self._problems:
                _log.warning("a session can not be served", session=name, problem=exc.message, hint=exc.hint)
            self._problems[name] = exc
        else:
            self._problems.pop(name, None)
            self.served[name] = served
            return served
        return None

    def _opened(self, name: str) -> Served:
        """In a thread."""
        with self.state.changing():
            session = sessions.load(self.state, name)
            directory = self.state.session(name)
            overlays = open_overlays(session, directory, self._repository_id, self._bases.of(session))
            return Served(session, directory, self.state.live / name, overlays)

    async def _drop(self, name: str, *, force: bool) -> None:
        """Serve a session no more. Raises SessionBusy unless ``force``."""
        served = self.served[name]
        await self._freezing.let_go(name, force=force)
        if not force:
            await self._wait_until_unused(served)
        await served.stop()
        self.tree.remove(name, force=force)
        del self.served[name]
        await trio.to_thread.run_sync(served.close)

    async def _wait_until_unused(self, served: Served) -> None:
        with trio.move_on_after(BUSY_NFS_S if served.session.export is Export.NFS else BUSY_S):
            while self.tree.is_busy(served.session.name):  # noqa: ASYNC110 - it tells nobody
                await trio.sleep(_POLL_S)
        if self.tree.is_busy(served.session.name):
            raise SessionBusy(
                f"disks of session {served.session.name} are in use", hint="shut its VM down first, or use --force"
            )

    async def _tend(self) -> NoReturn:
        """Try again what did not work, and have the NFS server serve whom it should."""
        while True:
            async with self._changing:
                for name in list(self._problems):
                    await self._begin(name)
                await self._settle()
            await trio.sleep(RETRY_S)

    async def _end_when_idle(self, everything: trio.CancelScope) -> None:
        """End once there is no session. Who makes one just then finds nobody, and starts the next server."""
        since_s = trio.current_time()
        while self.is_needed:
            await trio.sleep(_IDLE_POLL_S)
            async with self._changing:
                if await trio.to_thread.run_sync(self._has_sessions):
                    since_s = trio.current_time()
                self.is_needed = trio.current_time() - since_s < IDLE_S
        everything.cancel()

    def _has_sessions(self) -> bool:
        """Also such as can not be served, or as nobody can tell of. In a thread."""
        try:
            return bool(sessions.names(self.state))
        except XbfsError:
            return True

    async def _begin(self, name: str) -> None:
        assert self._nursery is not None
        served = await self._try(name)
        if served is not None:
            self._nursery.start_soon(served.run, self._clock)

    async def _settle(self) -> None:
        """The NFS server serves the clients of all sessions that are there."""
        exported = [served for served in self.served.values() if served.clients]
        try:
            await self._share.settle(client for served in exported for client in served.clients)
        except ExportFailed as exc:
            for served in exported:
                served.problem = exc
            if exported:
                _log.warning("sessions are not exported by NFS", problem=exc.message, hint=exc.hint)
        else:
            for served in exported:
                served.problem = None

    async def _on_open(self, arguments: Mapping[str, object], _: AsyncExitStack) -> object:
        """Serve a session that was made since; what ``list`` tells of it."""
        name = _name(arguments)
        async with self._changing:
            if name not in self.served:
                await self._begin(name)
                if name in self._problems:
                    raise self._problems[name]
                if name not in self.served:
                    raise SessionNotFound(f"there is no session {name}")
            await self._settle()
            served = self.served[name]
            await served.started.wait()
            if served.problem is not None:
                problem, served.problem = served.problem, None
                await self._drop(name, force=True)
                await self._settle()
                raise problem
            return await self._told(served)

    async def _on_discard(self, arguments: Mapping[str, object], _: AsyncExitStack) -> object:
        """Have a session no more; with ``force`` even if somebody uses it."""
        name = _name(arguments)
        async with self._changing:
            if name in self.served:
                await self._drop(name, force=arguments.get("force") is True)
            await trio.to_thread.run_sync(self._erased, name)
            self._problems.pop(name, None)
            await self._settle()
        return None

    def _erased(self, name: str) -> None:
        """In a thread."""
        with self.state.changing():
            sessions.erase(self.state, name)

    async def _on_list(self, _: Mapping[str, object], __: AsyncExitStack) -> object:
        """Of each session what is known, and why others are not served."""
        return [
            *[await self._told(served) for served in list(self.served.values())],
            *[{"name": name, "problem": [exc.message, exc.hint]} for name, exc in self._problems.items()],
        ]

    async def _on_status(self, _: Mapping[str, object], __: AsyncExitStack) -> object:
        """Of the server itself."""
        return {"pid": os.getpid(), "sessions": sorted(self.served), "mount": str(self.state.live)}

    async def _told(self, served: Served) -> dict[str, object]:
        status = await trio.to_thread.run_sync(served.status, self._share.place)
        is_shown = served.session.name in self.served
        return status | {"busy": is_shown and self.tree.is_busy(served.session.name), "served": is_shown}

    async def _stop_on_signal(self, everything: trio.CancelScope) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                everything.cancel()


def serve(
    state: StateDirectory,
    bases: Bases,
    repository_id: str,
    clock: Clock,
    ready: Callable[[], None],
    *,
    stays: bool,
) -> bool:
    """A live server as a whole process: returns when it ended, whether that is for good: nobody needs it."""

    async def run() -> bool:
        server = LiveServer(state, bases, repository_id, clock, stays=stays)
        await server.run(ready)
        return not server.is_needed

    try:
        return trio.run(run)
    except BaseExceptionGroup as group:
        problem: BaseException | None = group.subgroup(XbfsError)
        while isinstance(problem, BaseExceptionGroup):
            problem = problem.exceptions[0]
        raise problem or group from None


def _socket(state: StateDirectory) -> Path:
    ours = hashlib.blake2b(os.fsencode(state.path), digest_size=8).hexdigest()
    return place.make_directory(os.environ) / f"live-{ours}.control"


def _name(arguments: Mapping[str, object]) -> str:
    name = arguments.get("name")
    if not isinstance(name, str):
        raise wire.not_understood()
    return name
