"""The life of a mount: mount, serve until unmounted or told to stop, unmount.

``MountServer.run`` is for an event loop that may run elsewhere too; ``serve`` is a whole process in the foreground and
``serve_in_background`` one that goes on after its parent has returned. libfuse keeps one mount per process.
"""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from xbfs.fuse import mountpoint
from xbfs.fuse.background import run_in_background
from xbfs.fuse.control import take_keys
from xbfs.fuse.device import mount_device
from xbfs.fuse.files import OpenFiles
from xbfs.fuse.plane import DataPlane
from xbfs.vfs.filesystem import FileSystem, ViewOptions
from xbfs_engine.core.errors import MountFailed, StorageTimeout
from xbfs_engine.core.log import Logger
from xbfs_engine.guestfs.worker.client import GuestWorkers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pyfuse3

    from xbfs.fuse.operations import Operations
    from xbfs.vfs.filesystem import Changes
    from xbfs.vfs.guests.source import Guests
    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.core.runtime import Clock
    from xbfs_engine.store.reader import Locator
    from xbfs_engine.store.repository import Repository

READ_AHEAD_KIB: Final = 1024
"""The kernel's read-ahead: requests of 1 MiB, the largest it sends, cost a quarter less than the usual 128 KiB."""
USABLE_S: Final = 10.0
"""What the kernel gets to answer the first stat of a new mount."""
GRACE_S: Final = 2.0
"""What requests under way get when the server is told to stop."""

Plane = TypeVar("Plane", bound=DataPlane)

_log = Logger("xbfs.mount")


class DataPlaneKind(Enum):
    """Who answers reads: threads that take them from the kernel themselves, or libfuse's event loop and a pool."""

    DEVICE = "device"
    INLINE = "inline"


@dataclass(frozen=True, slots=True)
class MountOptions:
    """``allow_other``: other users may read too. ``log_file``: where a server in the background writes its log."""

    view: ViewOptions = field(default_factory=ViewOptions)
    allow_other: bool = False
    log_file: Path | None = None
    data_plane: DataPlaneKind = DataPlaneKind.DEVICE


@dataclass(frozen=True, slots=True)
class MountServer:
    """A mount of ``repository`` on ``directory``, to be served once.

    ``locator`` finds chunks that compaction moved; ``guests`` makes what reads guests' files.
    """

    repository: Repository
    catalog: Catalog
    directory: Path
    options: MountOptions = field(default_factory=MountOptions)
    locator: Locator | None = None
    guests: Callable[[Clock], Guests] = GuestWorkers

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Mount and serve until somebody unmounts or SIGTERM or SIGINT comes; ``ready`` is called once it is usable.

        Raises FuseMissing, MountPoint..., MountFailed; StorageError if the restore points can not be listed.
        """
        mountpoint.check_installed()
        from xbfs.fuse.operations import Operations

        options = self.options
        path = mountpoint.prepare(self.directory, self.repository.storage.location())
        view = replace(options.view, for_others=options.allow_other)
        guests = self.guests(self.repository.runtime.clock)
        filesystem = FileSystem(self.repository, self.catalog, view, guests, self.locator)
        try:
            await self._list(filesystem)
            files = OpenFiles()
            operations = Operations(filesystem, files)
            connect = _by_device if options.data_plane is DataPlaneKind.DEVICE else _by_libfuse
            with mountpoint.unmounted_after_death(path), connect(operations, files, filesystem, path, options) as plane:
                await _serve(filesystem, plane, path, ready)
        finally:
            guests.close()
            filesystem.close()

    def serve(self, ready: Callable[[], None] = lambda: None) -> None:
        """``run`` as a whole process: returns when the mount is gone."""
        trio.run(self.run, ready)

    def serve_in_background(self) -> int:
        """``serve`` in a process of its own; returns its pid once the mount is usable.

        Must be called before this process starts threads. Raises what ``run`` raises.
        """
        mountpoint.check_installed()
        mountpoint.prepare(self.directory, self.repository.storage.location())
        server = replace(self, directory=mountpoint.resolved(self.directory))
        return run_in_background(server.serve, self.options.log_file)

    async def _list(self, filesystem: FileSystem) -> None:
        limit_s = self.options.view.deadline_s
        try:
            with trio.fail_after(limit_s):
                await filesystem.refresh()
        except trio.TooSlowError as exc:
            where = self.repository.storage.location()
            raise StorageTimeout(f"{where} did not list its restore points in {limit_s:g} s") from exc


@contextmanager
def _by_libfuse(
    operations: Operations, _files: OpenFiles, _filesystem: FileSystem, path: Path, options: MountOptions
) -> Iterator[None]:
    """Mounted by libfuse, which reads the device."""
    import pyfuse3

    try:
        pyfuse3.init(operations, str(path), _kernel_options(options))
    except RuntimeError as exc:
        raise MountFailed(f"{path} can not be mounted on: {exc}", hint=_refusal_hint(options)) from exc
    try:
        yield None
    finally:
        pyfuse3.close(unmount=True)


@contextmanager
def _by_device(
    operations: Operations, files: OpenFiles, filesystem: FileSystem, path: Path, options: MountOptions
) -> Iterator[DataPlane]:
    """Mounted by us; the data plane reads the device, libfuse gets what is not a read."""

    def plane(device: int, ended: Callable[[], None]) -> DataPlane:
        return DataPlane(device, files, filesystem.clock, ended=ended)

    with connected(plane, operations, path, _kernel_options(options), _refusal_hint(options)) as connection:
        yield connection


@contextmanager
def connected(
    plane_of: Callable[[int, Callable[[], None]], Plane],
    operations: pyfuse3.Operations,
    path: Path,
    options: set[str],
    hint: str,
) -> Iterator[Plane]:
    """``path`` is mounted inside: ``plane_of`` makes the data plane of device and what it calls at the end.

    Raises MountFailed with ``hint``, FuseMissing.
    """
    import pyfuse3

    token = trio.lowlevel.current_trio_token()
    open_session = False

    def terminate() -> None:
        if open_session:  # libfuse crashes when it is asked without one
            pyfuse3.terminate()

    def ended() -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(terminate)

    device = mount_device(path, options, hint)
    plane = plane_of(device, ended)
    try:
        pyfuse3.init(operations, f"/dev/fd/{plane.control}", options)
        open_session = True
        plane.start()
        try:
            yield plane
        finally:
            mountpoint.let_go(path)
            open_session = False
            pyfuse3.close(unmount=False)
    finally:
        plane.close()


async def _serve(filesystem: FileSystem, plane: DataPlane | None, path: Path, ready: Callable[[], None]) -> None:
    import pyfuse3

    problem: MountFailed | None = None
    filesystem.tell = _tell_kernel
    async with trio.open_nursery() as nursery:

        async def serve_kernel() -> None:
            nonlocal problem
            try:
                await pyfuse3.main()
            except Exception as exc:  # noqa: BLE001 - libfuse's loop; whatever it is, the mount is over
                _log.error("the connection to the kernel broke", exc_info=exc)
                problem = MountFailed(f"the connection to the kernel broke: {exc}")
            nursery.cancel_scope.cancel()

        nursery.start_soon(filesystem.tend)
        if plane is not None:
            nursery.start_soon(plane.tend)
        nursery.start_soon(take_keys, filesystem)
        nursery.start_soon(serve_kernel)
        nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
        try:
            with trio.fail_after(USABLE_S):
                status = await trio.to_thread.run_sync(path.stat, abandon_on_cancel=True)
        except (trio.TooSlowError, OSError) as exc:
            problem = MountFailed(f"the mount on {path} does not answer: {exc}")
            nursery.cancel_scope.cancel()
        else:
            filesystem.report.read_ahead_kib = tune_read_ahead(status.st_dev)
            ready()
            nursery.start_soon(_keep_fresh, filesystem)
    if plane is not None and plane.problem is not None:
        problem = MountFailed(plane.problem)
    if problem is not None:
        raise problem


async def _stop_on_signal(everything: trio.CancelScope) -> None:
    import pyfuse3

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            pyfuse3.terminate()
            await trio.sleep(GRACE_S)
            everything.cancel()


async def _keep_fresh(filesystem: FileSystem) -> None:
    """Look for new points for ever."""
    while True:
        await trio.sleep(filesystem.options.refresh_s)
        await filesystem.look_again()


def _tell_kernel(changes: Changes) -> None:
    import pyfuse3

    for directory, name in changes.gone:
        pyfuse3.invalidate_entry_async(directory, os.fsencode(name), ignore_enoent=True)
    for directory in changes.grown:
        with suppress(OSError):  # the kernel does not know it
            pyfuse3.invalidate_inode(directory, attr_only=True)
    for inode in changes.turned:
        with suppress(OSError):
            pyfuse3.invalidate_inode(inode)  # and the target or text that it keeps


def _kernel_options(options: MountOptions) -> set[str]:
    name = mountpoint.SUBTYPE
    wanted = {"default_permissions", "ro", "nosuid", "nodev", f"fsname={name}", f"subtype={name}"}
    return wanted | ({"allow_other"} if options.allow_other else set())


def _refusal_hint(options: MountOptions) -> str:
    if options.allow_other and os.geteuid() != 0:
        return "allow_other needs the line user_allow_other in /etc/fuse.conf; see also the message above"
    return "" if options.data_plane is DataPlaneKind.DEVICE else f"see the message of {mountpoint.FUSERMOUNT} above"


def tune_read_ahead(device: int) -> int | None:
    """Set the kernel's read-ahead where we may; returns what it is now, in KiB, if that can be read."""
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    with suppress(OSError):
        setting.write_text(str(READ_AHEAD_KIB))
    try:
        return int(setting.read_text())
    except (OSError, ValueError):
        return None
