"""LVM2's text format: nested sections of ``key = value``, as in its metadata and its configuration files.

Pure; hostile text gives GuestDamaged, in time and memory proportional to its length.
"""

from __future__ import annotations

import re
from typing import Final, TypeAlias

from xbfs_engine.core.errors import GuestDamaged

Scalar: TypeAlias = int | str
Value: TypeAlias = "Scalar | list[Scalar] | Section"

_TOKEN: Final = re.compile(
    r"""(?:\s+|\#[^\n]*)*+
        (?: "(?P<text>(?:[^"\\]|\\.)*+)" | (?P<number>[+-]?[0-9]++(?:\.[0-9]++)?)(?![A-Za-z0-9_.+-])
          | (?P<name>[A-Za-z0-9_.+-]++)
          | (?P<sign>[{}\[\],=]) | (?P<end>\Z) )""",
    re.VERBOSE | re.DOTALL,
)
_DEPTH_MAX: Final = 8
_DIGITS_MAX: Final = 20


class Section:
    """One ``{ … }``; every question about it that has no proper answer raises GuestDamaged."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._values: dict[str, Value] = {}

    def put(self, key: str, value: Value) -> None:
        """Take a value in; the last one of a key counts, as for LVM."""
        self._values[key] = value

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number, 0 <= n < 2^64."""
        value = self._values.get(key, default)
        if not isinstance(value, int) or not 0 <= value < 1 << 64:
            raise GuestDamaged(f"LVM metadata: {self.path}{key} is no number that it may be")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._values.get(key, default)
        if not isinstance(value, str):
            raise GuestDamaged(f"LVM metadata: {self.path}{key} is no string")
        return value

    def kind(self) -> str:
        """Its ``type``, empty if it says none: for looking at segments before they are taken seriously."""
        value = self._values.get("type")
        return value if isinstance(value, str) else ""

    def array(self, key: str) -> list[Scalar]:
        """Strings and numbers; a single one is a list of one, a missing one is empty."""
        value = self._values.get(key, [])
        if isinstance(value, Section):
            raise GuestDamaged(f"LVM metadata: {self.path}{key} is a section")
        return value if isinstance(value, list) else [value]

    def section(self, key: str) -> Section:
        """A section; a missing one is empty."""
        value = self._values.get(key)
        if value is None:
            return Section(f"{self.path}{key}/")
        if not isinstance(value, Section):
            raise GuestDamaged(f"LVM metadata: {self.path}{key} is no section")
        return value

    def sections(self) -> list[tuple[str, Section]]:
        """All sections in it, in order."""
        return [(key, value) for key, value in self._values.items() if isinstance(value, Section)]


class _Tokens:
    """The text cut into tokens: (kind, token)."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def next(self) -> tuple[str, str]:
        match = _TOKEN.match(self._text, self._at)
        if match is None or match.lastgroup is None:
            raise GuestDamaged(f"LVM metadata: nothing it may be at character {self._at}")
        self._at = match.end()
        return match.lastgroup, match[match.lastgroup]

    def fail(self, token: str) -> GuestDamaged:
        return GuestDamaged(f"LVM metadata: {token[:40]!r} is out of place before character {self._at}")


def parse_lvm_text(raw: bytes) -> Section:
    """The outermost section. A trailing NUL, which LVM writes, ends the text."""
    tokens = _Tokens(raw.partition(b"\0")[0].decode("utf-8", "replace"))
    return _section(tokens, "", 0)


def _section(tokens: _Tokens, path: str, depth: int) -> Section:
    if depth > _DEPTH_MAX:
        raise GuestDamaged(f"LVM metadata: {path} is nested too deep")
    section = Section(path)
    while True:
        kind, token = tokens.next()
        if (kind, token) == (("sign", "}") if depth else ("end", "")):
            return section
        if kind not in ("name", "number", "text"):
            raise tokens.fail(token)
        key = token
        kind, token = tokens.next()
        if (kind, token) == ("sign", "{"):
            section.put(key, _section(tokens, f"{path}{key}/", depth + 1))
        elif (kind, token) == ("sign", "="):
            section.put(key, _value(tokens))
        else:
            raise tokens.fail(token)


def _value(tokens: _Tokens) -> Scalar | list[Scalar]:
    kind, token = tokens.next()
    if (kind, token) != ("sign", "["):
        return _scalar(tokens, kind, token)
    values: list[Scalar] = []
    while True:
        kind, token = tokens.next()
        if (kind, token) == ("sign", "]"):
            return values
        if (kind, token) != ("sign", ","):
            values.append(_scalar(tokens, kind, token))


def _scalar(tokens: _Tokens, kind: str, token: str) -> Scalar:
    if kind == "text":
        return re.sub(r"\\(.)", r"\1", token, flags=re.DOTALL)
    if kind == "number" and len(token) <= _DIGITS_MAX:
        return token if "." in token else int(token)
    raise tokens.fail(token)
