"""Keys of guests' encrypted volumes: from the environment or a terminal, never from an argument, never kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from xbfs_engine.core.errors import PassphraseMissing
from xbfs_engine.guestfs.volumes.records import VolumeKey

VARIABLE: Final = "XBFS_UNLOCK"
_FILE_MAX: Final = 32 << 10


def given_keys(volume: str = "") -> list[VolumeKey]:
    """What XBFS_UNLOCK or the file of XBFS_UNLOCK_FILE holds, for one volume or (empty) any; none if neither is set.

    A file may be a key file, whose every byte counts, or text with a line end that does not: both are tried. Raises
    PassphraseMissing if the file can not be read.
    """
    secret = os.environ.get(VARIABLE)
    if secret:
        return [VolumeKey(os.fsencode(secret), volume)]
    name = os.environ.get(f"{VARIABLE}_FILE")
    if not name:
        return []
    try:
        with Path(name).open("rb") as file:
            content = file.read(_FILE_MAX + 1)
    except OSError as exc:
        raise PassphraseMissing(f"{VARIABLE}_FILE: {name} can not be read: {exc.strerror}", hint="check it") from exc
    if not content or len(content) > _FILE_MAX:
        raise PassphraseMissing(f"{VARIABLE}_FILE: {name} is empty or longer than {_FILE_MAX} bytes")
    line = content.removesuffix(b"\n").removesuffix(b"\r")
    return [VolumeKey(secret, volume) for secret in dict.fromkeys((line, content)) if secret]


def asked_keys(prompt: str, volume: str = "") -> list[VolumeKey]:
    """``given_keys``, else a passphrase asked for. Raises PassphraseMissing."""
    found = given_keys(volume)
    if found:
        return found
    if sys.stdin is None or not sys.stdin.isatty():
        raise PassphraseMissing(
            "a key of the volume is needed, and there is no terminal to ask at",
            hint=f"set {VARIABLE} or {VARIABLE}_FILE",
        )
    from getpass import getpass

    try:
        return [VolumeKey(getpass(prompt).encode(errors="surrogateescape"), volume)]
    except EOFError:
        raise PassphraseMissing("no key was given", hint=f"type it, or set {VARIABLE}") from None
