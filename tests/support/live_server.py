"""A live mount as a process of its own, over disks in memory.

    python -m tests.support.live_server STATE MOUNTPOINT CONTROL

STATE holds sessions: `NAME/tree`, `NAME/overlays/KEY`, `NAME/disks/KEY` (a file with the size of the disk, whose bytes
are ``content``). All are shown. "ready" goes to stdout. While CONTROL/hang exists, reads of the base do not return.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tests.support.disks import MemoryDisk
from xbfs.fuse.live import LiveMount
from xbfs.vfs.live.stubs import anchors
from xbfs.vfs.live.tree import LiveTree
from xbfs.view.overlay import create_overlay, open_overlay
from xbfs_engine.core.errors import BlobNotFound, XbfsError
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


def show_all(tree: LiveTree, state: Path) -> list[Overlay]:
    overlays: list[Overlay] = []
    for session in sorted(state.iterdir()):
        disks = {}
        for anchor in anchors(session / "tree").iterdir():
            size, chunks = (session / "disks" / anchor.name).read_text().split(";")
            base = SlowDisk.holding(int(size), [int(chunk) for chunk in chunks.split(",") if chunk])
            disks[anchor.name] = overlay_of(session / "overlays" / anchor.name, base)
        overlays += disks.values()
        tree.add(session.name, session / "tree", disks)
    return overlays


async def serve(state: Path, directory: Path, control: Path, deadline_s: float) -> None:
    clock = SystemClock()
    tree = LiveTree(clock, deadline_s=deadline_s)
    SlowDisk.hang = control / "hang"
    overlays = show_all(tree, state)
    async with trio.open_nursery() as nursery:

        async def until_gone(task_status: trio.TaskStatus[None]) -> None:
            await LiveMount(tree, directory, clock=clock, allow_other=True).run(task_status=task_status)
            nursery.cancel_scope.cancel()

        await nursery.start(until_gone)
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
    arguments = parser.parse_args()
    try:
        trio.run(serve, arguments.state, arguments.directory, arguments.control, arguments.deadline)
    except XbfsError as exc:
        sys.stderr.write(f"{type(exc).__name__}: {exc}\n")
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
