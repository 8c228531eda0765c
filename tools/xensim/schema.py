"""The object model the simulator serves: classes, fields, types, published calls and least roles. Read once, frozen."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Ref: TypeAlias = str
Value: TypeAlias = "str | int | float | bool | datetime | Sequence[Value] | Mapping[str, Value]"
Record: TypeAlias = "dict[str, Value]"

NULL: Final = "OpaqueRef:NULL"
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
ROLES: Final = ("read-only", "vm-operator", "vm-admin", "vm-power-admin", "pool-operator", "pool-admin", "root")
DATE_FORMAT: Final = "%Y%m%dT%H:%M:%SZ"


class Field(NamedTuple):
    """A field of a class: type as published ("VDI ref set"), qualifier (RW, RO/runtime, RO/constructor).

    ``required``: a constructor's record must have it.
    """

    type: str
    qualifier: str
    required: bool
    default: Value


class Parameter(NamedTuple):
    """A parameter of a call, the session left out."""

    name: str
    type: str
    required: bool


class Message(NamedTuple):
    """A published call: least role, result type, whether it exists for every class, parameters."""

    role: str
    result: str
    implicit: bool
    params: tuple[Parameter, ...]


class Class(NamedTuple):
    """A class of the object model."""

    fields: Mapping[str, Field]
    messages: Mapping[str, Message]
    enums: Mapping[str, Sequence[str]]


@cache
def classes() -> Mapping[str, Class]:
    """All classes by name."""
    document = json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))
    return {
        name: Class(
            fields={
                key: Field(kind, qualifier, required, _value(kind, default))
                for key, (kind, qualifier, required, default) in cls["fields"].items()
            },
            messages={
                key: Message(role, result, implicit, tuple(Parameter(*param) for param in params))
                for key, (role, result, implicit, params) in cls["messages"].items()
            },
            enums=cls["enums"],
        )
        for name, cls in document.items()
    }


def message(method: str) -> Message | None:
    """The published call ``Class.name``, or None."""
    cls, _, name = method.partition(".")
    found = classes().get(cls)
    return found.messages.get(name) if found else None


def parse_date(text: str) -> datetime:
    """A date as XAPI writes it. Raises ValueError."""
    plain = text.replace("-", "")
    return datetime.strptime(plain if plain.endswith("Z") else plain + "Z", DATE_FORMAT).replace(tzinfo=UTC)


def allows(role: str, needed: str) -> bool:
    """Whether somebody with ``role`` may do what needs at least ``needed``."""
    return ROLES.index(role) >= ROLES.index(needed)


def _value(kind: str, default: Value) -> Value:
    return parse_date(default) if kind == "datetime" and isinstance(default, str) else default
