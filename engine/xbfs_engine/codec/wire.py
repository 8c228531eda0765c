"""Wire encoding of records: canonical MessagePack, bounded and strictly checked.

Owns the encoding, not the records. A record is a map from text keys to None, bool, int, bytes, str, lists and maps.
Canonical means: keys sorted, shortest forms, so that equal records have equal bytes and signatures can be checked
over re-encoded records. Decoding bounds sizes before it allocates and refuses anything that is not canonical.
"""

from __future__ import annotations

from typing import TypeAlias

import msgpack

from xbfs_engine.core.errors import FormatTooNew, WireError
from xbfs_engine.core.limits import DISK_SIZE_MAX, MIB

Value: TypeAlias = "bool | int | bytes | str | list[Value] | dict[str, Value] | None"

RECORD_SIZE_MAX = 64 * MIB
DEPTH_MAX = 16
VALUES_MAX = 200_000
"""Values in one record. An empty map is one byte stored and some 150 in memory: size alone bounds too little."""

_MAPS = frozenset({*range(0x80, 0x90), 0xDE, 0xDF})
_LISTS = frozenset({*range(0x90, 0xA0), 0xDC, 0xDD})
"""First bytes of maps and lists (MessagePack specification, "Overview")."""


def encode(record: dict[str, Value]) -> bytes:
    """Canonical bytes of a record."""
    packed = msgpack.packb(_sorted(record, 0), use_bin_type=True)
    assert isinstance(packed, bytes)
    return packed


def decode(data: bytes, what: str, *, size_max: int = RECORD_SIZE_MAX) -> Record:
    """Decode a record of at most ``size_max`` bytes; ``what`` names it in errors. Raises WireError."""
    if len(data) > size_max:
        raise WireError(f"{what} has {len(data)} bytes, more than the {size_max} allowed")
    try:
        _check_count(data)
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=len(data),
            max_bin_len=len(data),
            max_array_len=len(data),
            max_map_len=len(data),
            max_ext_len=0,
        )
    except (ValueError, IndexError, msgpack.UnpackException, RecursionError) as exc:
        raise WireError(f"{what} is not a valid record: {type(exc).__name__}") from exc
    if not isinstance(value, dict):
        raise WireError(f"{what} is not a map")
    try:
        canonical = encode(value) == data
    except (TypeError, ValueError, OverflowError, AttributeError) as exc:
        raise WireError(f"{what} holds a value of an unknown type") from exc
    if not canonical:
        raise WireError(f"{what} is not in canonical form")
    return Record(value, what)


def _check_count(data: bytes) -> None:
    """Raise ValueError if there are more than VALUES_MAX values, without building any."""
    scan = msgpack.Unpacker(max_buffer_size=max(1, len(data)), max_ext_len=0)
    scan.feed(data)
    seen, left = 0, 1
    while left:
        first = data[scan.tell()]
        if first in _MAPS:
            left += 2 * scan.read_map_header()
        elif first in _LISTS:
            left += scan.read_array_header()
        else:
            scan.skip()
        left -= 1
        seen += 1
        if seen + left > VALUES_MAX:
            raise ValueError("too many values")


def _sorted(value: Value, depth: int) -> Value:
    if depth > DEPTH_MAX:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("the keys of a record are text")
        return {key: _sorted(value[key], depth + 1) for key in sorted(value)}
    if isinstance(value, list):
        return [_sorted(item, depth + 1) for item in value]
    if value is None or isinstance(value, (bool, int, bytes, str)):
        return value
    raise TypeError(f"a record can not hold {type(value).__name__}")


class Record:
    """A decoded map whose fields are taken one by one, each with its type and bounds checked.

    Every getter raises WireError; ``done`` refuses fields nobody asked for.
    """

    __slots__ = ("_fields", "_what")

    def __init__(self, fields: dict[str, Value], what: str) -> None:
        self._fields = dict(fields)
        self._what = what

    def version(self, supported: int) -> None:
        """Take ``version``: equal to ``supported``, else FormatTooNew."""
        found = self.integer("version", 1, 0xFFFF)
        if found != supported:
            raise FormatTooNew(f"{self._what} has version {found}; this program knows {supported}")

    def integer(self, key: str, low: int = 0, high: int = DISK_SIZE_MAX) -> int:
        """An int within [low, high]."""
        value = self._take(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise WireError(f"{self._what}: {key} is not an integer from {low} to {high}")
        return value

    def boolean(self, key: str) -> bool:
        """A bool."""
        value = self._take(key)
        if not isinstance(value, bool):
            raise WireError(f"{self._what}: {key} is not a boolean")
        return value

    def raw(self, key: str, size: int | None = None, *, size_max: int = RECORD_SIZE_MAX) -> bytes:
        """Bytes, of exactly ``size`` where given, else of at most ``size_max``."""
        value = self._take(key)
        if not isinstance(value, bytes) or len(value) > size_max or (size is not None and len(value) != size):
            raise WireError(f"{self._what}: {key} is not a byte string of the right size")
        return value

    def text(self, key: str, size_max: int = 4096) -> str:
        """Text of at most ``size_max`` characters."""
        value = self._take(key)
        if not isinstance(value, str) or len(value) > size_max:
            raise WireError(f"{self._what}: {key} is not a text of at most {size_max} characters")
        return value

    def optional(self, key: str) -> bool:
        """Whether the field is there and not None; a None is taken."""
        if self._fields.get(key) is None:
            self._fields.pop(key, None)
            return False
        return True

    def record(self, key: str) -> Record:
        """A nested map."""
        value = self._take(key)
        if not isinstance(value, dict):
            raise WireError(f"{self._what}: {key} is not a map")
        return Record(value, f"{self._what}.{key}")

    def records(self, key: str, count_max: int) -> list[Record]:
        """A list of at most ``count_max`` maps."""
        value = self._take(key)
        if not isinstance(value, list) or len(value) > count_max:
            raise WireError(f"{self._what}: {key} is not a list of at most {count_max} maps")
        found = []
        for number, item in enumerate(value):
            if not isinstance(item, dict):
                raise WireError(f"{self._what}: {key}[{number}] is not a map")
            found.append(Record(item, f"{self._what}.{key}[{number}]"))
        return found

    def mapping(self, key: str) -> dict[str, Value]:
        """A nested map taken as it is: contents that we only pass on."""
        value = self._take(key)
        if not isinstance(value, dict):
            raise WireError(f"{self._what}: {key} is not a map")
        return value

    def done(self) -> None:
        """Raise WireError if a field is left that nobody took."""
        if self._fields:
            names = ", ".join(repr(key[:32]) for key in sorted(self._fields)[:8])
            raise WireError(f"{self._what} has unknown fields: {names}")

    def _take(self, key: str) -> Value:
        try:
            return self._fields.pop(key)
        except KeyError:
            raise WireError(f"{self._what}: {key} is missing") from None
