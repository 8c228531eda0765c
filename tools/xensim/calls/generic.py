"""Getters, and setters that only store, of every class of the schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .. import schema
from ..failures import Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..context import Context
    from ..schema import Message, Parameter, Ref, Value

    Found = tuple[str, str, Callable[..., Value | None], tuple[Parameter, ...], str]


def find(method: str) -> Found | None:
    """Name, role, implementation, parameters and result of a generic call, or None."""
    cls, _, name = method.partition(".")
    message = schema.message(method)
    if message is None:
        return None
    run = _whole(cls, name) if message.implicit else None
    run = run or _of_field(cls, name, message)
    return (method, message.role, run, message.params, message.result) if run else None


def _whole(cls: str, name: str) -> Callable[..., Value | None] | None:
    def get_all(ctx: Context) -> Value:
        return ctx.db.all(cls)

    def get_all_records(ctx: Context) -> Value:
        with ctx.db.lock:
            return {ref: ctx.db.get(ref) for ref in ctx.db.all(cls)}

    def get_record(ctx: Context, ref: Ref) -> Value:
        return ctx.db.get(ctx.db.check(cls, ref))

    def get_by_uuid(ctx: Context, uuid: str) -> Value:
        return ctx.db.by_uuid(cls, uuid)

    def get_by_name_label(ctx: Context, label: str) -> Value:
        return ctx.db.where(cls, name_label=label)

    whole = (get_all, get_all_records, get_record, get_by_uuid, get_by_name_label)
    runs: Mapping[str, Callable[..., Value | None]] = {run.__name__: run for run in whole}
    return runs.get(name)


def _of_field(cls: str, name: str, message: Message) -> Callable[..., Value | None] | None:
    known = schema.classes()[cls].fields
    for prefix, make in _ACCESSORS.items():
        field = name.removeprefix(prefix)
        if field == name or field not in known:
            continue
        kind = known[field].type
        fits = {"add_to_": " map", "remove_from_": " map", "add_": " set", "remove_": " set"}.get(prefix, "")
        if kind.endswith(fits) and len(message.params) == (1 if prefix == "get_" else 3 if prefix == "add_to_" else 2):
            return make(cls, field)
    return None


def _get(cls: str, field: str) -> Callable[..., Value | None]:
    def get(ctx: Context, ref: Ref) -> Value:
        return ctx.db.field(ctx.db.check(cls, ref), field)

    return get


def _set(cls: str, field: str) -> Callable[..., Value | None]:
    def change(ctx: Context, ref: Ref, value: Value) -> None:
        ctx.db.set(ctx.db.check(cls, ref), **{field: value})

    return change


def _add_to(cls: str, field: str) -> Callable[..., Value | None]:
    def add_to(ctx: Context, ref: Ref, key: str, value: str) -> None:
        with ctx.db.lock:
            held = ctx.db.mapping(ctx.db.check(cls, ref), field)
            if key in held:
                raise Failure("MAP_DUPLICATE_KEY", cls, field, ref, key)
            ctx.db.set(ref, **{field: {**held, key: value}})

    return add_to


def _remove_from(cls: str, field: str) -> Callable[..., Value | None]:
    def remove_from(ctx: Context, ref: Ref, key: str) -> None:
        with ctx.db.lock:
            held = ctx.db.mapping(ctx.db.check(cls, ref), field)
            held.pop(key, None)
            ctx.db.set(ref, **{field: held})

    return remove_from


def _add(cls: str, field: str) -> Callable[..., Value | None]:
    def add(ctx: Context, ref: Ref, value: str) -> None:
        with ctx.db.lock:
            held = ctx.db.refs(ctx.db.check(cls, ref), field)
            ctx.db.set(ref, **{field: held if value in held else [*held, value]})

    return add


def _remove(cls: str, field: str) -> Callable[..., Value | None]:
    def remove(ctx: Context, ref: Ref, value: str) -> None:
        with ctx.db.lock:
            held = ctx.db.refs(ctx.db.check(cls, ref), field)
            ctx.db.set(ref, **{field: [item for item in held if item != value]})

    return remove


# The longer prefix of two comes first.
_ACCESSORS: Final[dict[str, Callable[[str, str], Callable[..., Value | None]]]] = {
    "get_": _get,
    "set_": _set,
    "add_to_": _add_to,
    "remove_from_": _remove_from,
    "add_": _add,
    "remove_": _remove,
}
