"""pool add, list, remove and trust: which pools there are, and which certificates their hosts are known by.

Also gives other verbs the pool that a name means. Trust begins with a person: a certificate is shown and confirmed
before anything is sent to its host; the pool then tells the certificates of its other hosts.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xbfs.cli import tasks, text
from xbfs_engine.core.errors import CertificateRejected, LoginRefused, PoolUnreachable, UsageError
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.source.xapi.config import Address, Credentials, PoolConfig
from xbfs_engine.source.xapi.members import members
from xbfs_engine.source.xapi.pools import PoolRegistry, config_directory
from xbfs_engine.source.xapi.session import open_pool
from xbfs_engine.source.xapi.trust import PinMismatch, look_at, parse_fingerprint

if TYPE_CHECKING:
    import argparse
    from collections.abc import Collection, Mapping

    from xbfs.cli.output import Output
    from xbfs_engine.source.xapi.members import Member

_LOOK_S: Final = 20.0
_COMPARE: Final = "compare with `openssl x509 -in /etc/xensource/xapi-ssl.pem -noout -fingerprint -sha256` on the host"


def registry() -> PoolRegistry:
    """The pools configured for this user."""
    return PoolRegistry(config_directory(os.environ), os.environ)


def configured(name: str) -> tuple[PoolConfig, Credentials]:
    """A pool and what to log in with. Raises PoolUnknown, CredentialsUnsafe, LoginRefused."""
    pools = registry()
    config = pools.get(name)
    return config, pools.credentials(config)


def add(arguments: argparse.Namespace, output: Output) -> None:
    """Configure a pool."""
    pools = registry()
    pools.check_new(arguments.name)
    addresses = tuple(dict.fromkeys(Address.parse(url) for url in arguments.urls))
    ports = {address.port for address in addresses}
    if len(ports) > 1:
        raise UsageError("the hosts of a pool listen on one port", hint="give URLs with the same port")
    given = _fingerprints(arguments)
    config = PoolConfig(
        name=arguments.name,
        addresses=addresses,
        user=arguments.user,
        pins={},
        originator=f"xbfs/{os.uname().nodename}",
        password_file=str(Path(arguments.password_file).absolute()) if arguments.password_file else None,
        password_env=arguments.password_env,
    )
    # Whoever is asked for a password has seen where it goes.
    config = replace(config, pins={a.host: _confirmed(a, "", given, output) for a in addresses})
    by_reference = config.password_file is not None or config.password_env is not None
    password = None if by_reference else _ask_password(config)
    secrets = pools.credentials(config) if password is None else Credentials(config.user, password)
    config, found = _met(config, secrets, given, output)
    pools.add(config, password)
    _report(config, found, output)
    output.say(f"added pool {config.name}: {text.count(len(found), 'host')}, user {config.user}")


def list_pools(_arguments: argparse.Namespace, output: Output) -> None:
    """List the configured pools."""
    configs = registry().pools()
    output.result({"pools": [_record(config) for config in configs]})
    rows = [("NAME", "HOSTS", "USER", "PASSWORD", "ADDRESSES")]
    for config in configs:
        addresses = ", ".join(map(str, config.addresses))
        rows.append((config.name, str(len(config.pins)), config.user, _password_place(config), addresses))
    for line in text.table(rows):
        output.say(line)


def remove(arguments: argparse.Namespace, output: Output) -> None:
    """Forget a pool and its password."""
    pools = registry()
    config = pools.get(arguments.name)
    output.result({"pool": _record(config), "removed": not arguments.dry_run})
    if arguments.dry_run:
        output.say(f"would forget pool {config.name}, its certificates and its password")
        return
    pools.remove(config.name)
    output.say(f"forgot pool {config.name}, its certificates and its password; nothing on the pool was changed")


def trust(arguments: argparse.Namespace, output: Output) -> None:
    """Pin the certificates that the hosts of a pool show now."""
    pools = registry()
    config, secrets = configured(arguments.name)
    given = _fingerprints(arguments)
    pins, changed = dict(config.pins), []
    hosts = dict.fromkeys([*config.addresses, *(Address(host, config.addresses[0].port) for host in pins)])
    for address in hosts:
        pinned = pins.get(address.host, "")
        try:
            shown = look_at(address, timeout_s=_LOOK_S).fingerprint
        except PoolUnreachable as exc:
            output.warn(exc.message, "its certificate stays pinned as it is")
            continue
        if shown != pinned:
            pins[address.host] = _confirmed(address, pinned, given, output)
            changed.append(address.host)
    if changed:
        pools.replace(replace(config, pins=pins))
    config, found = _met(replace(config, pins=pins), secrets, given, output)
    pools.replace(config)
    _report(config, found, output, changed)
    output.say(f"{text.count(len(changed), 'certificate')} pinned anew; {text.count(len(found), 'host')} in the pool")


def _met(
    config: PoolConfig, secrets: Credentials, given: Collection[str], output: Output
) -> tuple[PoolConfig, list[Member]]:
    """Log in, and pin what the pool says of its hosts; certificates on the way to its master are confirmed."""
    while True:
        try:
            found = tasks.run(partial(_ask_members, config, secrets))
            break
        except PinMismatch as exc:
            if exc.pinned:
                raise
            shown = _confirmed(exc.address, "", given, output)
            config = replace(config, pins={**config.pins, exc.address.host: shown})
    pins = dict(config.pins)
    port = config.addresses[0].port
    for member in found:
        if not member.fingerprint:
            output.warn(
                f"the pool does not tell the certificate of {member.name}", "run `xbfs pool trust` when it is up"
            )
        elif pins.setdefault(member.address, member.fingerprint) != member.fingerprint:
            output.warn(
                f"the certificate of {member.address} is pinned as {pins[member.address]},"
                f" but its pool says that it is {member.fingerprint}",
                "was the host down just now? then run `xbfs pool trust` again; else find out who ends TLS in between",
            )
    known = [Address(member.address, port) for member in found]
    return replace(config, pins=pins, addresses=tuple(dict.fromkeys([*config.addresses, *known]))), found


async def _ask_members(config: PoolConfig, secrets: Credentials) -> list[Member]:
    async with open_pool(config, secrets, system_runtime()) as pool:
        return await members(pool)


def _confirmed(address: Address, pinned: str, given: Collection[str], output: Output) -> str:
    """The fingerprint a host shows, once it is among the ``given`` ones or somebody said yes."""
    shown = look_at(address, timeout_s=_LOOK_S)
    if shown.fingerprint in given:
        return shown.fingerprint
    if given:
        raise CertificateRejected(
            f"{address} shows the certificate {shown.fingerprint}, which was not given with --fingerprint",
            hint=_COMPARE,
        )
    if output.json or not sys.stdin.isatty():
        raise CertificateRejected(
            f"{address} shows the certificate {shown.fingerprint}, and there is nobody to confirm it",
            hint=f"{_COMPARE}, then pass --fingerprint",
        )
    output.say(f"{address} shows the certificate")
    output.say(f"  sha256   {shown.fingerprint}")
    output.say(f"  subject  {shown.subject}")
    output.say(f"  valid    {shown.not_before:%Y-%m-%d} to {shown.not_after:%Y-%m-%d}")
    if pinned:
        output.say(f"  so far   {pinned}")
    output.say(_COMPARE)
    output.say_now("is it the same? [yes/no]")
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise CertificateRejected(f"the certificate of {address} was not confirmed", hint="nothing was sent to it")
    return shown.fingerprint


def _fingerprints(arguments: argparse.Namespace) -> frozenset[str]:
    return frozenset(parse_fingerprint(item) for item in arguments.fingerprint)


def _ask_password(config: PoolConfig) -> str:
    hint = "name a file with --password-file, or a variable with --password-env"
    if not sys.stdin.isatty():
        raise LoginRefused("a password is needed, and there is no terminal to ask at", hint=hint)
    from getpass import getpass

    try:
        given = getpass(f"password of {config.user} on pool {config.name}: ")
    except EOFError:
        given = ""
    if not given:
        raise LoginRefused("no password was given", hint=hint)
    return given


def _report(config: PoolConfig, found: Collection[Member], output: Output, changed: Collection[str] = ()) -> None:
    hosts = [{"name": m.name, "address": m.address, "fingerprint": config.pins.get(m.address, "")} for m in found]
    output.result({"pool": _record(config), "hosts": hosts, "changed": list(changed)})
    rows = [("HOST", "ADDRESS", "CERTIFICATE (SHA-256)")]
    rows += [(m.name, m.address, config.pins.get(m.address, "unknown")) for m in found]
    for line in text.table(rows):
        output.say(line)


def _record(config: PoolConfig) -> Mapping[str, object]:
    return {
        "name": config.name,
        "addresses": [str(address) for address in config.addresses],
        "user": config.user,
        "originator": config.originator,
        "password": _password_place(config),
        "pins": dict(config.pins),
    }


def _password_place(config: PoolConfig) -> str:
    if config.password_env is not None:
        return f"variable {config.password_env}"
    return f"file {config.password_file}" if config.password_file is not None else "credentials file"
