"""Which pools are configured, and with which secrets: ``pools.json`` and ``credentials`` in one directory.

``pools.json`` holds no secrets. A password is in ``credentials``, a file that only its owner can read, or where the
pool's configuration refers to: another file or an environment variable. Files are replaced as a whole, and changed
under a lock: any number of processes may use the directory at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import (
    CredentialsUnsafe,
    LoginRefused,
    PoolError,
    PoolExists,
    PoolUnknown,
    StorageError,
    UsageError,
)
from xbfs_engine.core.limits import KIB, MIB
from xbfs_engine.source.xapi.config import Address, Credentials, PoolConfig
from xbfs_engine.source.xapi.trust import parse_fingerprint
from xbfs_engine.storage.files import make_directories, storage_error, write_replace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_VERSION: Final = 1
_FILE_MAX: Final = 4 * MIB
_PASSWORD_MAX: Final = 4 * KIB
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names are parts of file names too."""


def config_directory(environment: Mapping[str, str]) -> Path:
    """XBFS_CONFIG, or xbfs below XDG_CONFIG_HOME or ~/.config."""
    chosen = environment.get("XBFS_CONFIG")
    if chosen:
        return Path(chosen).absolute()
    return Path(environment.get("XDG_CONFIG_HOME") or Path.home() / ".config", "xbfs").absolute()


class PoolRegistry:
    """The configured pools. Keeps nothing in memory: every call reads the files."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self.pools_file = directory / "pools.json"
        self.credentials_file = directory / "credentials"
        self._directory = directory
        self._environment = environment

    def pools(self) -> list[PoolConfig]:
        """All configured pools by name. Raises PoolError, StorageError."""
        return sorted(self._load().values(), key=lambda config: config.name)

    def get(self, name: str) -> PoolConfig:
        """A configured pool. Raises PoolUnknown, PoolError, StorageError."""
        found = self._load()
        if name not in found:
            raise PoolUnknown(f"no pool is called {name!r}")
        return found[name]

    def check_new(self, name: str) -> None:
        """Raise UsageError for what can not be a name, PoolExists for one that is taken."""
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} can not be a pool's name", hint="letters, digits and . _ - , at most 64")
        if name in self._load():
            raise PoolExists(f"a pool {name!r} is configured already")

    def add(self, config: PoolConfig, password: str | None) -> None:
        """Configure a pool; ``password`` goes into the credentials file. Raises PoolExists, StorageError."""
        with self._locked():
            self.check_new(config.name)
            if password is not None:
                self._save_passwords({**self._passwords(), config.name: password})
            self._save({**self._load(), config.name: config})

    def replace(self, config: PoolConfig) -> None:
        """Change what is configured of a pool. Raises PoolUnknown, StorageError."""
        with self._locked():
            self.get(config.name)
            self._save({**self._load(), config.name: config})

    def remove(self, name: str) -> None:
        """Forget a pool and its password. Raises PoolUnknown, StorageError."""
        with self._locked():
            self.get(name)
            self._save({other: config for other, config in self._load().items() if other != name})
            passwords = self._passwords()
            if passwords.pop(name, None) is not None:
                self._save_passwords(passwords)

    def credentials(self, config: PoolConfig) -> Credentials:
        """What to log in to a pool with. Raises CredentialsUnsafe, LoginRefused if there is no password."""
        return Credentials(config.user, self._password(config))

    def _password(self, config: PoolConfig) -> str:
        if config.password_env is not None:
            found = self._environment.get(config.password_env, "")
            where = f"the variable {config.password_env}"
        elif config.password_file is not None:
            found = _from_file(Path(config.password_file), config.name)
            where = config.password_file
        else:
            found = self._passwords().get(config.name, "")
            where = str(self.credentials_file)
        if not found or len(found) > _PASSWORD_MAX:
            raise LoginRefused(f"{where} holds no password of pool {config.name}", hint="add the pool again")
        return found

    def _load(self) -> dict[str, PoolConfig]:
        try:
            with self.pools_file.open("rb") as file:
                text = file.read(_FILE_MAX + 1)
        except FileNotFoundError:
            return {}
        except OSError as exc:
            raise _unreadable(exc, self.pools_file) from exc
        try:
            version, pools = _decode_all(text)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError, PoolError) as exc:
            hint = "correct the file, or remove it and add the pools again"
            raise PoolError(f"{self.pools_file} can not be decoded: {exc}", hint=hint) from exc
        if version != _VERSION:
            raise PoolError(f"{self.pools_file} was written by another release", hint="upgrade xbfs")
        return pools

    def _save(self, pools: Mapping[str, PoolConfig]) -> None:
        document = {"version": _VERSION, "pools": {name: _encode(pools[name]) for name in sorted(pools)}}
        write_replace(self.pools_file, [json.dumps(document, indent=2).encode() + b"\n"])

    def _passwords(self) -> dict[str, str]:
        """The credentials file, looked at through one descriptor: what is checked is what is read."""
        path = self.credentials_file
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_uid != os.geteuid():
                    raise CredentialsUnsafe(f"{path} belongs to another user", hint=f"chown {os.geteuid()} {path}")
                if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077:
                    mode = stat.filemode(found.st_mode)
                    raise CredentialsUnsafe(
                        f"{path} can be used by others than its owner ({mode})",
                        hint=f"chmod 600 {path}, and consider the passwords in it known",
                    )
                text = file.read(_FILE_MAX + 1)
        except FileNotFoundError:
            return {}
        except OSError as exc:
            raise _unreadable(exc, path) from exc
        try:
            passwords = {str(name): str(fields["password"]) for name, fields in json.loads(text)["pools"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            # Without the reason: it could quote the file.
            raise CredentialsUnsafe(f"{path} can not be decoded", hint="remove it and add the pools again") from exc
        return passwords

    def _save_passwords(self, passwords: Mapping[str, str]) -> None:
        document = {"version": _VERSION, "pools": {name: {"password": passwords[name]} for name in sorted(passwords)}}
        write_replace(self.credentials_file, [json.dumps(document, indent=2).encode() + b"\n"])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        make_directories(self._directory)
        path = self._directory / ".lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise storage_error(exc, f"write {path}") from exc
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _encode(config: PoolConfig) -> dict[str, object]:
    fields: dict[str, object] = {
        "addresses": [f"https://{address}" for address in config.addresses],
        "user": config.user,
        "originator": config.originator,
        "pins": dict(sorted(config.pins.items())),
    }
    for name in ("password_file", "password_env"):
        value = getattr(config, name)
        if value is not None:
            fields[name] = value
    return fields


def _decode_all(text: bytes) -> tuple[object, dict[str, PoolConfig]]:
    """The version, and the pools if it is ours."""
    document = json.loads(text)
    version = document["version"]
    pools = document["pools"].items() if version == _VERSION else ()
    return version, {name: _decode(name, fields) for name, fields in pools}


def _decode(name: str, fields: Mapping[str, object]) -> PoolConfig:
    addresses, pins = fields["addresses"], fields["pins"]
    if not _NAME.fullmatch(name) or not isinstance(addresses, list) or not addresses or not isinstance(pins, dict):
        raise ValueError(f"pool {name[:80]!r}")
    return PoolConfig(
        name=name,
        addresses=tuple(Address.parse(_text(address)) for address in addresses),
        user=_text(fields["user"]),
        originator=_text(fields["originator"]),
        pins={_text(host): parse_fingerprint(_text(pin)) for host, pin in pins.items()},
        password_file=_text(fields["password_file"]) if "password_file" in fields else None,
        password_env=_text(fields["password_env"]) if "password_env" in fields else None,
    )


def _unreadable(exc: OSError, path: Path) -> StorageError:
    error = storage_error(exc, f"read {path}")
    return type(error)(error.message, hint="check owner and mode of the file")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _from_file(path: Path, pool: str) -> str:
    """A password alone in a file; one line end at its end is not part of it."""
    try:
        with path.open("rb") as file:
            return file.read(_PASSWORD_MAX + 2).decode().removesuffix("\n").removesuffix("\r")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        raise LoginRefused(f"{path}, the password of pool {pool}, can not be read: {reason}", hint="") from exc
