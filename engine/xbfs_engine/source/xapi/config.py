"""What is known of a pool before anybody talks to it: addresses, user, pinned certificates. Frozen records, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from xbfs_engine.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

HTTPS_PORT: Final = 443


class Address(NamedTuple):
    """Where a host listens: a name or IP address (IPv6 without brackets) and a TCP port."""

    host: str
    port: int = HTTPS_PORT

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == HTTPS_PORT else f"{host}:{self.port}"

    @classmethod
    def parse(cls, text: str, *, port: int = HTTPS_PORT) -> Self:
        """From ``https://host[:port][/]``, ``host[:port]``, or a bare IPv6 address as HOST_IS_SLAVE gives it.

        Without a port it is ``port``. Raises UsageError.
        """
        scheme, separator, rest = text.strip().rpartition("://")
        if separator and scheme.lower() != "https":
            raise UsageError(f"{text}: hosts are reached by https only", hint="give https://HOST, or HOST alone")
        rest = rest.removesuffix("/")
        host, found = rest, ""
        if rest.startswith("["):
            host, _, tail = rest[1:].partition("]")
            found = tail.removeprefix(":")
            rest = "" if tail and not tail.startswith(":") else rest
        elif rest.count(":") == 1:
            host, _, found = rest.partition(":")
        if found:
            port = int(found) if found.isascii() and found.isdigit() and len(found) <= 5 else 0
        plain = host.isascii() and all(char.isalnum() or char in "-._:%" for char in host)
        if not rest or not host or not plain or not 0 < port < 1 << 16:
            raise UsageError(f"{text!r} is not the address of a host", hint="give https://HOST[:PORT], or HOST alone")
        return cls(host, port)


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """A configured pool. ``pins``: the SHA-256 fingerprint (colon hex) of each known host, by its address' host.

    The password is in the credentials file, or where ``password_file`` or ``password_env`` says.
    """

    name: str
    addresses: tuple[Address, ...]
    user: str
    pins: Mapping[str, str]
    originator: str
    password_file: str | None = None
    password_env: str | None = None


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one logs in with."""

    user: str
    password: str = field(repr=False)
