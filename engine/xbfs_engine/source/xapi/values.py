"""Values of XAPI calls, and how they travel in XML-RPC. Pure.

XAPI's 64-bit integers are strings in XML-RPC (xen-api, wire protocol): they are sent as strings, and what comes back
as a string stays one, for only the caller knows the field. Times are sent and returned in UTC.
"""

from __future__ import annotations

import xmlrpc.client
from datetime import UTC, datetime
from typing import Final, TypeAlias, Union

from xbfs_engine.core.errors import PoolError

Ref = str
NULL_REF: Final = "OpaqueRef:NULL"

XapiValue: TypeAlias = Union[str, int, float, bool, datetime, "list[XapiValue]", "dict[str, XapiValue]"]

_DEPTH_MAX: Final = 32
"""Nesting of a value; XAPI's deepest, a map of records that hold maps, needs five."""


def to_wire(value: XapiValue, depth: int = 0) -> object:
    """What xmlrpc.client sends for a value. Raises PoolError for text that XML can not carry."""
    assert depth <= _DEPTH_MAX
    match value:
        case bool() | float():
            return value
        case int():
            return str(value)
        case str():
            if any(char < " " and char not in "\t\n\r" for char in value):
                raise PoolError("a text for XAPI holds control characters: they are not XML")
            return value
        case datetime():
            return xmlrpc.client.DateTime(value.astimezone(UTC).strftime("%Y%m%dT%H:%M:%SZ"))
        case list():
            return [to_wire(item, depth + 1) for item in value]
        case dict():
            return {key: to_wire(item, depth + 1) for key, item in value.items()}


def from_wire(value: object, depth: int = 0) -> XapiValue:
    """The value that xmlrpc.client parsed. Raises PoolError for what XAPI never sends."""
    if depth > _DEPTH_MAX:
        raise PoolError("a reply of XAPI is nested too deeply", hint="is it really a XenServer host?")
    match value:
        case str() | bool() | int() | float():
            return value
        case None:
            return ""
        case xmlrpc.client.DateTime():
            return _time(value.value)
        case list() | tuple():
            return [from_wire(item, depth + 1) for item in value]
        case dict():
            return {str(key): from_wire(item, depth + 1) for key, item in value.items()}
        case _:
            raise PoolError(f"a reply of XAPI holds a {type(value).__name__}", hint="is it really a XenServer host?")


def _time(text: str) -> datetime:
    """Hosts write 20260920T21:00:03Z, newer ones also 2026-09-20T21:00:03.123Z; without a zone it is UTC."""
    try:
        time = datetime.fromisoformat(text)
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError) as exc:
        raise PoolError(f"a reply of XAPI holds the time {text[:40]!r}, which is none") from exc
