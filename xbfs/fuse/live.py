"""The life of the writable mount: mount, serve sessions until cancelled or unmounted, unmount.

Not ``xbfs mount``, which the kernel keeps read-only: this one shows only sessions (``xbfs.vfs.live``). libfuse keeps
one mount per process.
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from xbfs.fuse import mountpoint
from xbfs.fuse.connection import connected, serve_kernel
from xbfs.fuse.files import OpenFiles
from xbfs.fuse.live_plane import LivePlane
from xbfs.vfs.live.disks import LEAVE_S
from xbfs.vfs.live.tree import ignored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from xbfs.vfs.live.tree import LiveTree
    from xbfs_engine.core.runtime import Clock

NAME: Final = "xbfs-live"
"""What the mount table says is mounted."""
SETTLE_S: Final = 1.0
"""How often the times of disks that are written to are put down."""
FILES_MAX: Final = 65536
"""Descriptors wanted: each file that the kernel knows takes one."""
_POLL_S: Final = 0.01


class LiveMount:
    """``tree`` shown on ``directory``; to be served once. ``allow_other``: not only to the user who runs it."""

    def __init__(self, tree: LiveTree, directory: Path, *, clock: Clock, allow_other: bool) -> None:
        self._tree = tree
        self._directory = directory
        self._clock = clock
        self._allow_other = allow_other

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Mount, say so once it is usable, and serve until cancelled or until somebody unmounts. Raises MountError."""
        mountpoint.check_installed()

        from xbfs.fuse.live_operations import LiveOperations

        path = mountpoint.prepare(self._directory, "")
        _allow_descriptors()
        files = OpenFiles()

        def plane_of(device: int, ended: Callable[[], None]) -> LivePlane:
            tree = self._tree
            return LivePlane(
                device, files, self._clock, attributes=tree.attributes, passable=tree.passable, ended=ended
            )

        options = {"default_permissions", "nosuid", "nodev", f"fsname={NAME}", f"subtype={mountpoint.SUBTYPE}"}
        hint = ""
        if self._allow_other:
            options.add("allow_other")
            hint = "" if os.geteuid() == 0 else "allow_other needs the line user_allow_other in /etc/fuse.conf"
        try:
            with connected(plane_of, LiveOperations(self._tree, files), path, options, hint) as plane:
                self._tree.tell_gone = _forget
                try:
                    await self._serve(plane, path, task_status)
                finally:
                    self._tree.tell_gone = ignored  # libfuse crashes when it is asked without a mount
        finally:
            # Threads may still be in a disk that whoever runs this is going to close.
            with trio.move_on_after(LEAVE_S, shield=True):
                while not self._tree.is_quiet:  # noqa: ASYNC110 - threads tell nobody when they leave
                    await trio.sleep(_POLL_S)

    async def _serve(self, plane: LivePlane, path: Path, task_status: trio.TaskStatus[None]) -> None:
        def beside(nursery: trio.Nursery) -> None:
            nursery.start_soon(self._tend)

        def usable(_nursery: trio.Nursery, _read_ahead_kib: int | None) -> None:
            if os.geteuid() == 0:
                # Clients can make links (NFSv3 always), and what exports a directory may follow them on this host.
                mountpoint.follow_no_links(path)
            task_status.started()

        await serve_kernel(plane, path, beside, usable)

    async def _tend(self) -> NoReturn:
        """Put down times."""
        while True:
            await trio.sleep(SETTLE_S)
            self._tree.settle()


def _forget(name: bytes, disks: Iterable[int]) -> None:
    """Have the kernel forget a session that is shown no more."""
    import pyfuse3

    with suppress(OSError):  # the kernel does not know it
        pyfuse3.invalidate_entry(pyfuse3.ROOT_INODE, name)
    for inode in disks:
        with suppress(OSError):
            pyfuse3.invalidate_inode(inode)


def _allow_descriptors() -> None:
    """As many open files as the system lets us have, within reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_MAX if hard == resource.RLIM_INFINITY else min(FILES_MAX, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
