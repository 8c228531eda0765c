"""Connections to the NBD servers of hosts: a host has sixteen for everybody, so a process takes only some of them.

One HostBudget is shared by all that a process reads. It belongs to one event loop; any task of that may use it.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

HOST_CONNECTIONS = 8
"""Half of what a host has in all, for all clients (xapi-nbd allows 16)."""


class _Host(NamedTuple):
    tokens: trio.CapacityLimiter
    door: trio.Lock


class HostBudget:
    """Hands out connections per host label, first come, first served; waiting can be cancelled."""

    def __init__(self, connections_per_host: int = HOST_CONNECTIONS) -> None:
        assert connections_per_host > 0
        self._connections = connections_per_host
        self._hosts: dict[str, _Host] = {}

    def free(self, owner: str) -> int:
        """Connections of this host that can be had without waiting."""
        return int(self._host(owner).tokens.available_tokens)

    @asynccontextmanager
    async def token(self, owner: str) -> AsyncIterator[None]:
        """Hold one connection's right to exist. A task holds at most one of each host."""
        async with self._host(owner).tokens:
            yield

    @asynccontextmanager
    async def opening(self, owner: str) -> AsyncIterator[None]:
        """Be alone in opening a connection: hosts pick device numbers without a lock (VBD.create, autodetect)."""
        async with self._host(owner).door:
            yield

    def _host(self, owner: str) -> _Host:
        host = self._hosts.get(owner)
        if host is None:
            host = self._hosts[owner] = _Host(trio.CapacityLimiter(self._connections), trio.Lock())
        return host
