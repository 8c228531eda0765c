"""message.*: what the pool tells its administrators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import call

if TYPE_CHECKING:
    from datetime import datetime

    from ..context import Context
    from ..schema import Ref, Value


@call("message.create", role="pool-operator")
def create(ctx: Context, name: str, priority: int, cls: str, obj_uuid: str, body: str) -> Ref:
    """A message about an object, which must exist. Raises Failure UUID_INVALID."""
    ctx.db.by_uuid(cls, obj_uuid)
    now = ctx.world.clock.now()
    return ctx.db.create("message", name=name, priority=priority, cls=cls, obj_uuid=obj_uuid, timestamp=now, body=body)


@call("message.destroy", role="pool-operator")
def destroy(ctx: Context, message: Ref) -> None:
    """Remove one message."""
    ctx.db.destroy(ctx.db.check("message", message))


@call("message.destroy_many", role="pool-operator")
def destroy_many(ctx: Context, messages: list[Ref]) -> None:
    """Remove several messages."""
    for message in messages:
        destroy(ctx, message)


@call("message.get_all", role="read-only")
def get_all(ctx: Context) -> Value:
    """All messages."""
    return ctx.db.all("message")


@call("message.get_all_records", role="read-only")
def get_all_records(ctx: Context) -> Value:
    """All messages with their records."""
    return _records(ctx, ctx.db.all("message"))


@call("message.get_record", role="read-only")
def get_record(ctx: Context, message: Ref) -> Value:
    """One message."""
    return ctx.db.get(ctx.db.check("message", message))


@call("message.get_by_uuid", role="read-only")
def get_by_uuid(ctx: Context, uuid: str) -> Ref:
    """The message with a uuid."""
    return ctx.db.by_uuid("message", uuid)


@call("message.get", role="read-only")
def get(ctx: Context, cls: str, obj_uuid: str, since: datetime) -> Value:
    """The messages about an object since a date."""
    found = ctx.db.where("message", cls=cls, obj_uuid=obj_uuid)
    return _records(ctx, [ref for ref in found if ctx.db.date(ref, "timestamp") >= since])


@call("message.get_since", role="read-only")
def get_since(ctx: Context, since: datetime) -> Value:
    """All messages since a date."""
    return _records(ctx, [ref for ref in ctx.db.all("message") if ctx.db.date(ref, "timestamp") >= since])


def _records(ctx: Context, refs: list[Ref]) -> Value:
    with ctx.db.lock:
        return {ref: ctx.db.get(ref) for ref in refs}
