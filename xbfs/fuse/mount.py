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
from typing import TYPE_CHECKING, Final

import trio

from xbfs.fuse import mountpoint
from xbfs.fuse.background import run_in_background
from xbfs.fuse.connection import connected, serve_kernel
from xbfs.fuse.control import take_keys
from xbfs.fuse.files import OpenFiles
from xbfs.fuse.plane import DataPlane
from xbfs.vfs.filesystem import FileSystem, ViewOptions
from xbfs_engine.core.errors import MountFailed, StorageTimeout
from xbfs_engine.guestfs.worker.client import GuestWorkers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from xbfs.fuse.operations import Operations
    from xbfs.vfs.filesystem import Changes
    from xbfs.vfs.guests.source import Guests
    from xbfs_engine.catalog.catalog import Catalog
    from xbfs_engine.core.runtime import Clock
    from xbfs_engine.store.reader import Locator
    from xbfs_engine.store.repository import Repository

GRACE_S: Final = 2.0
"""What requests under way get when the server is told to stop."""


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


async def _serve(filesystem: FileSystem, plane: DataPlane | None, path: Path, ready: Callable[[], None]) -> None:
    def beside(nursery: trio.Nursery) -> None:
        nursery.start_soon(filesystem.tend)
        nursery.start_soon(take_keys, filesystem)
        nursery.start_soon(_stop_on_signal, nursery.cancel_scope)

    def usable(nursery: trio.Nursery, read_ahead_kib: int | None) -> None:
        filesystem.report.read_ahead_kib = read_ahead_kib
        ready()
        nursery.start_soon(_keep_fresh, filesystem)

    filesystem.tell = _tell_kernel
    await serve_kernel(plane, path, beside, usable)


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
