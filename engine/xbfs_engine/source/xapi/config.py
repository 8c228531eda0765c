"""What is known of a pool before anybody talks to it: addresses, user, pinned certificates. Frozen records, no I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from xbfs_engine.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

HTTPS_PORT: Final = 443

_ADDRESS: Final = re.compile(
    r"(?:(?P<bare>[0-9A-Fa-f.]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(?:%[\w.-]+)?)"
    r"|(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<name>[\w.-]+))(?::(?P<port>[0-9]{1,5}))?)/?",
    re.ASCII,
)


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
        match = _ADDRESS.fullmatch(rest)
        host = match["v6"] or match["bare"] or match["name"] if match else ""
        if match and match["port"]:
            port = int(match["port"])
        if not host or (":" in host and not _is_ipv6(host)) or not 0 < port < 1 << 16:
            raise UsageError(f"{text!r} is not the address of a host", hint="give https://HOST[:PORT], or HOST alone")
        return cls(host, port)


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


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
