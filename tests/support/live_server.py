"""A live mount as a process of its own, over disks in memory.

    python -m tests.support.live_server STATE MOUNTPOINT CONTROL

STATE holds sessions: `NAME/tree`, `NAME/overlays/KEY`, `NAME/disks/KEY` (a file with the size of the disk, whose bytes
are ``content``). All are shown. "ready" goes to stdout. While CONTROL/hang exists, reads of the base do not return.
CONTROL/hydrate is taken away once all disks are hydrated, CONTROL/freeze once they are frozen for good, or "refused" is
in it. With --passes the kernel is given disks. CONTROL/syncs gets the path of each file that is synced, a line each.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import trio

from tests.support.disks import MemoryDisk
from xbfs.fuse.live import LiveMount
from xbfs.vfs.live.stubs import anchors
from xbfs.vfs.live.tree import LiveTree
from xbfs.view.overlay import create_overlay, freeze_all, open_overlay
from xbfs_engine.core.errors import BlobNotFound, SessionBusy, XbfsError
from xbfs_engine.core.runtime import SystemClock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs.view.base import Part, RandomAccess
    from xbfs.view.overlay import Overlay

HANG_MAX_S = 60


class SlowDisk(MemoryDisk):
    """Has nothing in memory, and does not answer while a file exists."""

    hang: Path

    def parts_at(self, offset: int, length: int) -> Sequence[Part]:
        end = time.monotonic() + HANG_MAX_S
        while self.hang.exists() and time.monotonic() < end:
            time.sleep(0.02)
        return super().parts_at(offset, length)

    def parts_cached(self, offset: int, length: int) -> Sequence[Part] | None:
        return None if self.hang.exists() else super().parts_cached(offset, length)


def overlay_of(directory: Path, base: RandomAccess) -> Overlay:
    directory.parent.mkdir(exist_ok=True)
    try:
        return open_overlay(directory, base, identity=b"test")
    except BlobNotFound:
        return create_overlay(directory, base, identity=b"test")


def show_all(tree: LiveTree, state: Path, *, passes: bool) -> list[Overlay]:
    overlays: list[Overlay] = []
    for session in sorted(state.iterdir()):
        disks = {}
        for anchor in anchors(session / "tree").iterdir():
            size, chunks = (session / "disks" / anchor.name).read_text().split(";")
            base = SlowDisk.holding(int(size), [int(chunk) for chunk in chunks.split(",") if chunk])
            disks[anchor.name] = overlay_of(session / "overlays" / anchor.name, base)
        overlays += disks.values()
        tree.add(session.name, session / "tree", disks, passes=passes)
    return overlays


def hydrate(overlays: Sequence[Overlay]) -> None:
    for overlay in overlays:
        overlay.hydrate(rate_bytes_s=None, clock=SystemClock(), stop=threading.Event())


def freeze(overlays: Sequence[Overlay], wish: Path) -> None:
    """Nobody has the disks settled: so this sees how soon they are free by themselves."""
    try:
        freeze_all(overlays)
    except SessionBusy:
        wish.write_text("refused")
    else:
        wish.unlink()


def grant(overlays: Sequence[Overlay], control: Path) -> None:
    if (control / "hydrate").exists():
        hydrate(overlays)
        (control / "hydrate").unlink()
    if (control / "freeze").exists() and not (control / "freeze").read_text():
        freeze(overlays, control / "freeze")


async def grant_wishes(overlays: Sequence[Overlay], control: Path) -> NoReturn:
    while True:
        await trio.sleep(0.02)
        await trio.to_thread.run_sync(grant, overlays, control)


def tell_syncs(told: Path) -> None:
    sync = os.fdatasync

    def noted(fd: int) -> None:
        sync(fd)
        with told.open("a") as file:
            file.write(f"{os.readlink(f'/proc/self/fd/{fd}')}\n")  # noqa: PTH115 - as it is

    os.fdatasync = noted


async def serve(state: Path, directory: Path, control: Path, deadline_s: float, *, passes: bool) -> None:
    clock = SystemClock()
    tell_syncs(control / "syncs")
    tree = LiveTree(clock, deadline_s=deadline_s)
    SlowDisk.hang = control / "hang"
    overlays = show_all(tree, state, passes=passes)
    async with trio.open_nursery() as nursery:

        async def until_gone(task_status: trio.TaskStatus[None]) -> None:
            await LiveMount(tree, directory, clock=clock, allow_other=True).run(task_status=task_status)
            nursery.cancel_scope.cancel()

        await nursery.start(until_gone)
        nursery.start_soon(grant_wishes, overlays, control)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                nursery.cancel_scope.cancel()
    for overlay in overlays:
        overlay.close()


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("state", "directory", "control"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--deadline", type=float, default=30.0)
    parser.add_argument("--passes", action="store_true")
    arguments = parser.parse_args()
    run = partial(serve, passes=arguments.passes)
    try:
        trio.run(run, arguments.state, arguments.directory, arguments.control, arguments.deadline)
    except XbfsError as exc:
        sys.stderr.write(f"{type(exc).__name__}: {exc} ({exc.hint})\n")
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
