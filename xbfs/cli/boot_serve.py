"""boot serve: the live server in the foreground."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from xbfs.cli.context import catalog_of, index_of, repository_of
from xbfs.fuse import mountpoint
from xbfs.instant import client
from xbfs.instant.state import state_of

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.output import Output


def serve(arguments: argparse.Namespace, output: Output) -> None:
    """Serve until told to stop."""
    mountpoint.check_installed()
    repository = repository_of(arguments)
    catalog, index = catalog_of(repository, output), index_of(repository)
    live = state_of(repository.id, os.environ).live
    output.result({"mount_point": str(live)})

    def ready() -> None:
        _notify()
        output.say_now(f"sessions are served in {live}; Ctrl-C or SIGTERM ends it")

    client.serve(repository, catalog, index, ready)


def _notify() -> None:
    """Tell systemd, if it started us (sd_notify(3))."""
    place = os.environ.get("NOTIFY_SOCKET")
    if not place:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\0" + place[1:] if place.startswith("@") else place)
        notify.send(b"READY=1")
