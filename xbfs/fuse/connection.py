"""The connection to the kernel that each mount of ours has: made, served while it stands, let go of.

Both mounts are built on it, ``mount``'s and ``live``'s; what they show, and when they end, is theirs. Event-loop thread
only, but for what the data plane does by itself. libfuse keeps one mount per process.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from xbfs.fuse import mountpoint
from xbfs.fuse.device import mount_device
from xbfs.fuse.plane import DataPlane
from xbfs_engine.core.errors import MountFailed
from xbfs_engine.core.log import Logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pyfuse3

READ_AHEAD_KIB: Final = 1024
"""The kernel's read-ahead: requests of 1 MiB, the largest it sends, cost a quarter less than the usual 128 KiB."""
USABLE_S: Final = 10.0
"""What the kernel gets to answer the first stat of a new mount."""

Plane = TypeVar("Plane", bound=DataPlane)

_log = Logger("xbfs.mount")


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


async def serve_kernel(
    plane: DataPlane | None,
    path: Path,
    beside: Callable[[trio.Nursery], None],
    usable: Callable[[trio.Nursery, int | None], None],
) -> None:
    """Answer the kernel until the mount on ``path`` is gone, or the nursery is cancelled. Raises MountFailed.

    ``beside`` starts what runs all the time. ``usable`` is called once the mount answers, with its read-ahead in KiB.
    """
    import pyfuse3

    problem: str | None = None
    async with trio.open_nursery() as nursery:

        async def answer() -> None:
            nonlocal problem
            try:
                await pyfuse3.main()
            except Exception as exc:  # noqa: BLE001 - libfuse's loop; whatever it is, the mount is over
                _log.error("the connection to the kernel broke", exc_info=exc)
                problem = f"the connection to the kernel broke: {exc}"
            nursery.cancel_scope.cancel()

        beside(nursery)
        if plane is not None:
            nursery.start_soon(plane.tend)
        nursery.start_soon(answer)
        try:
            with trio.fail_after(USABLE_S):
                status = await trio.to_thread.run_sync(path.stat, abandon_on_cancel=True)
        except (trio.TooSlowError, OSError) as exc:
            problem = f"the mount on {path} does not answer: {exc}"
            nursery.cancel_scope.cancel()
        else:
            usable(nursery, _tune_read_ahead(status.st_dev))
    if plane is not None and plane.problem is not None:
        problem = plane.problem
    if problem is not None:
        raise MountFailed(problem)


def _tune_read_ahead(device: int) -> int | None:
    """Set the kernel's read-ahead where we may; returns what it is now, in KiB, if that can be read."""
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    with suppress(OSError):
        setting.write_text(str(READ_AHEAD_KIB))
    try:
        return int(setting.read_text())
    except (OSError, ValueError):
        return None
