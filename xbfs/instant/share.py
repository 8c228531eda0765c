"""The one NFS server of all sessions that want one: on while there are any, for the clients of all of them.

Event-loop thread only. nfs-ganesha takes other clients while it runs. It starts anew only when it has to listen further
than before: the first client that is not this machine; others wait for that as they do for a server that crashed.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from xbfs.serve.nfs import NfsExport, change_clients, serve_nfs
from xbfs_engine.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from xbfs.serve.nfs import NfsPlace

HERE: Final = ("127.0.0.1",)
"""The clients of a session that names none."""
_DISCARD_PORT: Final = 9
"""Any port does: nothing is sent (RFC 863)."""


class _Running(NamedTuple):
    clients: tuple[str, ...]
    place: NfsPlace
    scope: trio.CancelScope
    ended: trio.Event


class Share:
    """Of the live mount on ``directory``; ``state`` is what its server keeps."""

    def __init__(self, directory: Path, state: Path) -> None:
        self._directory = directory
        self._state = state
        self._running: _Running | None = None
        self._lock = trio.Lock()
        self._nursery: trio.Nursery | None = None

    @property
    def place(self) -> NfsPlace | None:
        """Where it is, while it is."""
        return None if self._running is None else self._running.place

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the server until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def settle(self, clients: Iterable[str]) -> None:
        """Serve these clients, and nobody if there are none. Raises ExportFailed; then it serves nobody."""
        wanted = tuple(sorted(set(clients)))
        async with self._lock:
            if wanted == (() if self._running is None else self._running.clients):
                return
            if self._running is not None and wanted and _address(wanted) == self._running.place.address:
                export = NfsExport(self._directory, self._state, _address(wanted), clients=wanted)
                await change_clients(export)
                self._running = self._running._replace(clients=wanted)
                return
            if self._running is not None:
                self._running.scope.cancel()
                await self._running.ended.wait()
                self._running = None
            if wanted:
                assert self._nursery is not None
                scope, ended = trio.CancelScope(), trio.Event()
                export = NfsExport(self._directory, self._state, _address(wanted), clients=wanted)
                place: NfsPlace = await self._nursery.start(_serve, export, scope, ended)
                self._running = _Running(wanted, place, scope, ended)


async def _serve(
    export: NfsExport, scope: trio.CancelScope, ended: trio.Event, *, task_status: trio.TaskStatus[NfsPlace]
) -> None:
    try:
        with scope:
            await serve_nfs(export, task_status=task_status)
    finally:
        ended.set()


def checked_clients(clients: Iterable[str]) -> tuple[str, ...]:
    """Addresses and networks as given by a person. Raises UsageError."""
    try:
        return tuple(str(ipaddress.ip_network(client, strict=False)) for client in clients)
    except ValueError as exc:
        raise UsageError(f"--client: {exc}", hint="give an address, or a network as ADDRESS/BITS") from exc


def address_towards(client: str) -> str:
    """The address of this machine that a client (or one in a network) sees; the client's own if there is no route."""
    network = ipaddress.ip_network(client, strict=False)
    target = str(network[min(1, network.num_addresses - 1)])
    family = socket.AF_INET6 if network.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, _DISCARD_PORT))
        except OSError:
            return target
        address: str = probe.getsockname()[0]
        return address


def _address(clients: tuple[str, ...]) -> str:
    """Where to listen: no further than the clients are."""
    networks = [ipaddress.ip_network(client, strict=False) for client in clients]
    if all(network.is_loopback for network in networks):
        return HERE[0] if all(network.version == 4 for network in networks) else "::1"
    return "::" if any(network.version == 6 for network in networks) else "0.0.0.0"  # noqa: S104 - they are told above
