"""What a guest's own tables say that it mounts: /etc/fstab, mount units of systemd, and the names of /etc/crypttab.

Pure functions over bytes, callable from any thread. Nothing in a table raises: what is no entry is left out.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

TABLE_BYTES_MAX: Final = 1 << 20
"""Longer tables are not read."""

ENTRIES_MAX: Final = 1024
"""Entries of one table that are looked at."""

_OCTAL: Final = re.compile(rb"\\([0-3][0-7]{2})")
_HEXADECIMAL: Final = re.compile(rb"\\x([0-9a-fA-F]{2})")
_ENDS: Final = re.compile(rb"\\\r?\n")


class Entry(NamedTuple):
    """One line of fstab(5), its escapes resolved."""

    source: bytes
    """``UUID=…``, a device, a directory for a bind mount."""
    target: bytes
    """An absolute path without double or closing slashes and ``.``; empty if it is mounted nowhere."""
    kind: str
    """The filesystem's type as it is written, ``auto`` and ``none`` too."""
    options: Mapping[bytes, bytes]
    """By name; the value is empty where there is none."""


def parse_fstab(text: bytes) -> list[Entry]:
    """Entries in their order."""
    found = []
    for line in text.splitlines():
        fields = [_OCTAL.sub(_from_octal, field) for field in line.split()]
        if len(fields) < 2 or fields[0].startswith(b"#"):
            continue
        kind = fields[2] if len(fields) > 2 else b"auto"
        options = fields[3] if len(fields) > 3 else b""
        found.append(_entry(fields[0], fields[1], kind, options))
        if len(found) == ENTRIES_MAX:
            break
    return found


def parse_mount_unit(text: bytes) -> Entry | None:
    """The entry that a mount unit (systemd.mount(5)) is instead of; None if it is none."""
    values: dict[bytes, bytes] = {}
    section = b""
    for raw in _ENDS.sub(b" ", text).splitlines():
        line = raw.strip()
        if line.startswith(b"["):
            section = line
        elif section == b"[Mount]" and b"=" in line and line[:1] not in b"#;":
            name, _, value = line.partition(b"=")
            values[name.strip()] = _HEXADECIMAL.sub(_from_hexadecimal, value.strip())
    if not values.get(b"What") or not values.get(b"Where"):
        return None
    return _entry(values[b"What"], values[b"Where"], values.get(b"Type") or b"auto", values.get(b"Options", b""))


def parse_crypttab(text: bytes) -> dict[str, bytes]:
    """Where the devices below /dev/mapper lie that crypttab(5) names."""
    found: dict[str, bytes] = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) > 1 and not fields[0].startswith(b"#") and len(found) < ENTRIES_MAX:
            found.setdefault(fields[0].decode("utf-8", "replace"), fields[1])
    return found


def unescape_udev(name: bytes) -> bytes:
    r"""A name below /dev/disk/by-…: udev writes what it does not allow there as ``\x20``."""
    return _HEXADECIMAL.sub(_from_hexadecimal, name)


def components(path: bytes) -> list[bytes]:
    """The names in a path, without those that say nothing."""
    return [name for name in path.split(b"/") if name not in (b"", b".")]


def _entry(source: bytes, target: bytes, kind: bytes, options: bytes) -> Entry:
    # A target that is no path (none, swap) is mounted nowhere; with "..", it is resolved when it is mounted.
    path = b"/" + b"/".join(components(target)) if target.startswith(b"/") else b""
    pairs = (option.partition(b"=") for option in options.split(b","))
    return Entry(
        source,
        path,
        kind.decode("ascii", "replace"),
        {name: value.strip(b'"') for name, _, value in pairs if name},
    )


def _from_octal(match: re.Match[bytes]) -> bytes:
    return bytes([int(match[1], 8)])


def _from_hexadecimal(match: re.Match[bytes]) -> bytes:
    return bytes([int(match[1], 16)])
