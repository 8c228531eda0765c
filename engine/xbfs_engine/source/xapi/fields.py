"""Fields of XAPI's records, taken with their types checked. Pure.

A field with a default may be missing: older releases lack it. A missing or wrongly typed field is a PoolError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs_engine.core.errors import PoolError
from xbfs_engine.source.xapi.values import NULL_REF

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xbfs_engine.source.xapi.values import Ref, XapiValue


class Fields:
    """One object's record. ``cls`` names the class in errors."""

    __slots__ = ("_cls", "_record", "ref")

    def __init__(self, cls: str, ref: Ref, record: Mapping[str, XapiValue]) -> None:
        self._cls = cls
        self._record = record
        self.ref = ref

    def text(self, name: str, default: str | None = None) -> str:
        """A string or enumeration."""
        value = self._record.get(name, default)
        if isinstance(value, str):
            return value
        raise self._unusable(name)

    def reference(self, name: str) -> Ref | None:
        """A reference; None if it is null, empty or missing."""
        value = self.text(name, NULL_REF)
        return None if value in {NULL_REF, ""} else value

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer: XML-RPC carries it as a decimal string (xen-api, wire protocol)."""
        value = self._record.get(name, default)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and len(value) <= 20:
            digits = value.removeprefix("-")
            if digits.isascii() and digits.isdigit():
                return int(value)
        raise self._unusable(name)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """A truth value."""
        value = self._record.get(name, default)
        if isinstance(value, bool):
            return value
        raise self._unusable(name)

    def texts(self, name: str) -> tuple[str, ...]:
        """A set of strings, enumerations or references; empty if missing."""
        value = self._record.get(name, [])
        if isinstance(value, list):
            found = tuple(item for item in value if isinstance(item, str))
            if len(found) == len(value):
                return found
        raise self._unusable(name)

    def mapping(self, name: str) -> dict[str, str]:
        """A map of strings to strings, as other_config is; empty if missing. Numbers become decimal strings."""
        value = self._record.get(name, {})
        if isinstance(value, dict):
            found = {key: str(item) for key, item in value.items() if isinstance(item, str | int)}
            if len(found) == len(value):
                return found
        raise self._unusable(name)

    def _unusable(self, name: str) -> PoolError:
        return PoolError(
            f"a {self._cls} of the pool has no usable field {name}", hint="is it really a XenServer or XCP-ng pool?"
        )
