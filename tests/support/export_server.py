"""A live mount and its export as one process, as the live server has them, over disks in memory.

    python -m tests.support.export_server nbd|nfs STATE MOUNTPOINT CONTROL ADDRESS [PORT MOUNT_PORT CLIENT...]

STATE, MOUNTPOINT and CONTROL are those of ``live_server``. Prints the place as one line of JSON once clients can
connect. At SIGHUP it shows STATE/../late too. If there is CONTROL/passes, the disks are hydrated first, and the kernel
is given them. CONTROL/counts has how many flushes, discards and writes of zeroes the overlays got.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections import Counter
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tests.support.live_mounts import SESSION
from tests.support.live_server import SlowDisk, hydrate, show_all
from xbfs.fuse.live import LiveMount
from xbfs.serve.device import same_device
from xbfs.serve.nbd import NbdExport, serve_nbd
from xbfs.serve.nfs import NfsExport, serve_nfs
from xbfs.vfs.live.tree import LiveTree
from xbfs_engine.core.runtime import SystemClock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xbfs.view.overlay import Overlay

LATE = "late"
COUNTED = ("flush", "discard", "write_zeroes")


def count(overlays: Sequence[Overlay], file: Path) -> None:
    """Have ``file`` tell what the overlays were called for; a call is counted when it has returned."""
    counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
    lock = threading.Lock()

    def counted(name: str, method: Callable[..., None]) -> Callable[..., None]:
        @wraps(method)
        def call(*arguments: int) -> None:
            method(*arguments)
            with lock:
                counts[name] += 1
                file.write_text(json.dumps(counts))

        return call

    for overlay in overlays:
        for name in COUNTED:
            setattr(overlay, name, counted(name, getattr(overlay, name)))
    file.write_text(json.dumps(counts))


async def serve(kind: str, state: Path, mount: Path, control: Path, address: str, *rest: str) -> None:
    clock = SystemClock()
    tree = LiveTree(clock)
    SlowDisk.hang = control / "hang"
    passes = (control / "passes").exists()
    overlays = show_all(tree, state, passes=passes)
    if passes:
        hydrate(overlays)
    count(overlays, control / "counts")
    async with trio.open_nursery() as nursery:
        with same_device(state.parent / "device", mount):
            await nursery.start(LiveMount(tree, mount, clock=clock, allow_other=True).run)
        home = state.parent / kind
        if kind == "nbd":
            place = await nursery.start(partial(serve_nbd, NbdExport(mount / SESSION, home, address)))
        else:
            port, mount_port, *clients = rest
            export = NfsExport(mount, home, address, int(port), tuple(clients), int(mount_port))
            place = await nursery.start(partial(serve_nfs, export))
        told = {name: str(getattr(place, name, "")) for name in ("socket", "port", "mount_port", "certificates")}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as signals:
            async for number in signals:
                if number == signal.SIGTERM:
                    nursery.cancel_scope.cancel()
                else:
                    tree.add(LATE, state.parent / LATE, {})
    for overlay in overlays:
        overlay.close()


if __name__ == "__main__":
    kind, state, mount, control, *others = sys.argv[1:]
    trio.run(partial(serve, kind, Path(state), Path(mount), Path(control), *others))
