"""One session's disks by NBD: nbdkit over the session's directory in the live mount, on a unix socket and on TCP.

Owns the two nbdkit of one session, the port (kept over restarts, so that clients find it again) and the certificates.
Why nbdkit on the mounted file: docs/adr/0009-exports.md. Event-loop thread only.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import trio

from xbfs.serve.certificates import Directories, make_certificates
from xbfs.serve.child import STATE_HINT, Program, answers, check_free, keep_running
from xbfs_engine.core.errors import ExportFailed, StorageError
from xbfs_engine.core.runtime import Clock, SystemClock
from xbfs_engine.storage.files import make_directories, write_replace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_SOCKET_PATH_MAX: Final = 107
"""Bytes of a unix socket's path: sun_path of unix(7), less its zero."""
_TAKEN: Final = "another program has that port; end it, or discard the session"
_WILDCARDS: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104 - what an administrator may ask for


@dataclass(frozen=True, slots=True)
class NbdExport:
    """What is exported. ``state``: a directory of this export alone; ``port`` 0: one that is free, then always that.

    Without ``tls`` anybody who reaches the port reads and writes the disks.
    """

    directory: Path
    state: Path
    address: str = "127.0.0.1"
    port: int = 0
    tls: bool = True


@dataclass(frozen=True, slots=True)
class NbdPlace:
    """Where clients find the disks. ``certificates``: the client's directory, None without TLS."""

    socket: Path
    address: str
    port: int
    certificates: Path | None

    def uri(self, file: str) -> str:
        """Of one disk on the network, for libnbd's programs; QEMU has no URI for TLS."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        if self.certificates is None:
            return f"nbd://{host}:{self.port}/{quote(file)}"
        return f"nbds://{host}:{self.port}/{quote(file)}?tls-certificates={quote(str(self.certificates))}"

    def qemu(self, file: str) -> tuple[str, str]:
        """Of one disk on the network for QEMU: the values of its options -object and -blockdev, or --image-opts."""
        where = f"driver=nbd,host={self.address},port={self.port},export={file.replace(',', ',,')}"
        if self.certificates is None:
            return "", where
        directory = str(self.certificates).replace(",", ",,")
        return f"tls-creds-x509,id=xbfs,endpoint=client,dir={directory}", f"{where},tls-creds=xbfs"

    def local_uri(self, file: str) -> str:
        """Of one disk on the unix socket, for QEMU and libnbd's programs on this machine."""
        return f"nbd+unix:///{quote(file)}?socket={quote(str(self.socket))}"


async def serve_nbd(
    export: NbdExport, *, task_status: trio.TaskStatus[NbdPlace] = trio.TASK_STATUS_IGNORED, clock: Clock | None = None
) -> None:
    """Export until cancelled; started with the place once clients can connect. Raises ExportFailed before that."""
    unix = export.state / "nbd.sock"
    if len(os.fsencode(unix)) > _SOCKET_PATH_MAX:
        raise ExportFailed(f"{unix} is too long for a socket", hint="choose a shorter --name or XBFS_STATE")
    try:
        make_directories(export.state)
        port = _port(export)
    except StorageError as exc:
        raise ExportFailed(f"the state of the NBD export can not be kept: {exc.message}", hint=STATE_HINT) from exc
    network: tuple[str, ...] = ("--ipaddr", export.address, "--port", str(port))
    certificates: Directories | None = None
    if export.tls:
        certificates = make_certificates(export.state / "tls", _names(export.address), clock or SystemClock())
        network += ("--tls=require", f"--tls-certificates={certificates.server}", "--tls-verify-peer")

    def listen() -> tuple[str, ...]:
        check_free(export.address, port, _TAKEN)
        return network

    place = NbdPlace(unix, export.address, port, certificates.client if certificates else None)
    programs = (
        (_program(export, "unix", lambda: ("--unix", str(_without(unix)))), partial(answers, unix)),
        (_program(export, "tcp", listen), partial(answers, _reached(export.address), port)),
    )
    waiting = len(programs)

    def started() -> None:
        nonlocal waiting
        waiting -= 1
        if not waiting:
            task_status.started(place)

    try:
        async with trio.open_nursery() as nursery:
            for program, is_ready in programs:
                nursery.start_soon(partial(keep_running, program, is_ready, started=started))
    except ExceptionGroup as group:
        failed = group.subgroup(ExportFailed)
        if failed is None:
            raise
        raise failed.exceptions[0] from None


def _program(export: NbdExport, name: str, where: Callable[[], tuple[str, ...]]) -> Program:
    def arguments() -> tuple[str, ...]:
        return ("--foreground", "--log=stderr", *where(), "file", f"dir={export.directory}")

    log = export.state / f"nbdkit-{name}.log"
    return Program("nbdkit", arguments, "nbdkit", export.directory, log, lambda _: "", is_killed=True)


def _without(unix: Path) -> Path:
    """The path, with no socket there that one left who was killed: nobody could bind it."""
    with suppress(OSError):
        unix.unlink()
    return unix


def _port(export: NbdExport) -> int:
    """The port that was asked for, the last one, or one that is free. Raises StorageError."""
    if export.port:
        return export.port
    kept = export.state / "port"
    with suppress(OSError, ValueError):
        return int(kept.read_text())
    port = check_free(export.address, 0, _TAKEN)
    write_replace(kept, [str(port).encode()])
    return port


def _names(address: str) -> list[str]:
    """By which clients may know this machine."""
    addresses = [] if address in _WILDCARDS else [address]
    return ["localhost", socket.gethostname(), "127.0.0.1", "::1", *addresses]


def _reached(address: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104 - as above
