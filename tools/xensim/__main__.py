"""``python -m tools.xensim --world WORLD.json --state DIR``: one simulated pool, until SIGTERM or SIGINT.

Prints one JSON line when everything listens: hosts with address, port and fingerprint, the control socket, the root
password. Refuses to run if the addresses of the hosts (127.0.0.1, 127.0.0.2 …) cannot be bound.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from . import world as worlds
from .control import ControlServer
from .releases import DEFAULT, RELEASES
from .server import HostServer

if TYPE_CHECKING:
    from .context import World

_TRIES = 20
_MAX_SOCKET_PATH = 100  # sun_path holds 108 bytes


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.xensim", description=__doc__)
    parser.add_argument("--world", type=Path, required=True, help="the pool, as JSON")
    parser.add_argument("--state", type=Path, required=True, help="directory for disks and keys")
    parser.add_argument("--time-scale", type=float, default=1.0, help="delays last this part of their length")
    parser.add_argument("--release", choices=RELEASES, default=DEFAULT)
    parser.add_argument("--port", type=int, default=0, help="the port of all hosts (default: a free one)")
    parser.add_argument("--with-parent", action="store_true", help="end when standard input does")
    options = parser.parse_args(arguments)
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    document = worlds.load(options.world)
    world = worlds.build(document, options.state.resolve(), RELEASES[options.release], options.time_scale)
    servers = _listen(world, options.port)
    socket_dir = _socket_dir(options.state.resolve())
    control = ControlServer(world, socket_dir / "control")
    try:
        world.storage.start()
        for server in servers:
            server.start()
        control.start()
        worlds.power_on(world, document)
        sys.stdout.write(json.dumps(_ready(world, document, control.path)) + "\n")
        sys.stdout.flush()
        if options.with_parent:
            threading.Thread(target=_watch_parent, args=(over,), daemon=True).start()
        over.wait()
    finally:
        control.close()
        for server in servers:
            server.close()
        world.storage.close()
        if socket_dir != options.state.resolve():
            shutil.rmtree(socket_dir)
    return 0


def _listen(world: World, port: int) -> list[HostServer]:
    """All hosts on the same port, since HOST_IS_SLAVE names an address without one."""
    for attempt in range(_TRIES):
        servers: list[HostServer] = []
        try:
            for node in world.nodes.values():
                node.port = port or (servers[0].port if servers else 0)
                servers.append(HostServer(world, node))
        except OSError:
            for server in servers:
                server.close()
            if port or attempt == _TRIES - 1:
                raise
            continue
        return servers
    raise AssertionError("unreachable")


def _socket_dir(state_dir: Path) -> Path:
    if len(os.fsencode(state_dir / "control")) <= _MAX_SOCKET_PATH:
        return state_dir
    return Path(tempfile.mkdtemp(prefix="xensim-"))


def _ready(world: World, document: worlds.Document, control: Path) -> dict[str, object]:
    hosts = [
        {
            "name": node.name,
            "address": node.address,
            "port": node.port,
            "fingerprint": node.fingerprint_sha256,
            "uuid": world.db.text(node.ref, "uuid"),
        }
        for node in world.nodes.values()
    ]
    password = document.get("root_password", worlds.ROOT_PASSWORD)
    return {"hosts": hosts, "control": str(control), "root_password": password, "pid": os.getpid()}


def _watch_parent(over: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while sys.stdin.buffer.read(1):
            pass
    over.set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
