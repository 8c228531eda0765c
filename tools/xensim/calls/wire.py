"""Values as they come over the wire, converted to the published type of a parameter or field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from .. import schema
from ..failures import Failure

if TYPE_CHECKING:
    from collections.abc import Collection

    from ..schema import Record, Value

_MAP = re.compile(r"\((.+?) -> (.+)\) map")


def convert(kind: str, value: Value, name: str) -> Value:
    """``value`` as the published type ``kind``. Raises Failure FIELD_TYPE_ERROR [name]."""
    try:
        return _convert(kind, value)
    except (ValueError, TypeError) as exc:
        raise Failure("FIELD_TYPE_ERROR", name) from exc


def constructor(cls: str, record: Mapping[str, Value], *, optional: Collection[str] = ()) -> Record:
    """The fields a constructor may set, out of a converted record. Raises Failure FIELD_TYPE_ERROR [field] if one of
    the fields without published default is missing, but for those in ``optional``.
    """
    known = schema.classes()[cls].fields
    for name, field in known.items():
        if field.required and name not in record and name not in optional:
            raise Failure("FIELD_TYPE_ERROR", name)
    return {name: value for name, value in record.items() if known[name].qualifier != "RO/runtime"}


def _convert(kind: str, value: Value) -> Value:
    if kind == "any":
        return value
    if kind.endswith(" map"):
        found = _MAP.fullmatch(kind)
        if not isinstance(value, Mapping) or not found:
            raise TypeError(kind)
        return {key: _convert(found[2], item) for key, item in value.items()}
    if kind.endswith(" set"):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(kind)
        return [_convert(kind.removesuffix(" set"), item) for item in value]
    if kind.endswith(" record"):
        return _record(kind.removesuffix(" record"), value)
    return _scalar(kind, value)


def _record(cls: str, value: Value) -> Value:
    if not isinstance(value, Mapping):
        raise TypeError(cls)
    known = schema.classes()[cls].fields
    return {key: convert(known[key].type, item, key) for key, item in value.items() if key in known}


def _scalar(kind: str, value: Value) -> Value:
    if kind == "int" and isinstance(value, str | int) and not isinstance(value, bool):
        return int(value)
    if kind == "float" and isinstance(value, float | int) and not isinstance(value, bool):
        return float(value)
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "datetime":
        if isinstance(value, datetime):
            return value
        if isinstance(value, str):
            return schema.parse_date(value)
    if kind not in {"int", "float", "bool", "datetime"} and isinstance(value, str):
        return value
    raise TypeError(kind)
