"""event.from: what changed since a token. Tokens are generations of the database; any thread may call it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from . import schema
from .failures import Failure

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from .context import World
    from .db import Change
    from .schema import Record, Value

_SILENT: Final = frozenset({"session", "role", "console"})  # classes whose objects make no events


def token(generation: int) -> str:
    """A generation as a token: two numbers of twenty digits, as XAPI writes them."""
    return f"{generation:020d},{generation:020d}"


def events_from(world: World, classes: Sequence[str], since: str, timeout_s: float) -> Record:
    """Wait up to ``timeout_s`` of simulated time for events. Raises Failure EVENT_FROM_TOKEN_PARSE_FAILURE."""
    generation = _parse(since)
    wanted = {name.lower() for name in classes}
    until = world.clock.monotonic() + timeout_s
    with world.db.lock:
        while True:
            latest = world.db.generation
            found = [change for change in world.db.changes(generation) if _matches(change, wanted)]
            left = until - world.clock.monotonic()
            if found or left <= 0:
                return {
                    "token": token(latest),
                    "valid_ref_counts": {cls.lower(): len(world.db.all(cls)) for cls in _counted(wanted)},
                    "events": [_event(world, change) for change in found],
                }
            generation = latest  # nothing in between was wanted
            world.db.changed.wait(min(left * world.clock.time_scale, 1.0))


def _parse(since: str) -> int:
    if not since:
        return 0
    first, _, second = since.partition(",")
    if not (first.isdigit() and second.isdigit()):
        raise Failure("EVENT_FROM_TOKEN_PARSE_FAILURE", since)
    return int(second)


def _matches(change: Change, wanted: Collection[str]) -> bool:
    name = change.cls.lower()
    if change.cls in _SILENT:
        return False
    return "*" in wanted or name in wanted or f"{name}/{change.ref}".lower() in wanted


def _counted(wanted: Collection[str]) -> list[str]:
    names = {name.partition("/")[0] for name in wanted}
    return [cls for cls in schema.classes() if cls not in _SILENT and ("*" in names or cls.lower() in names)]


def _event(world: World, change: Change) -> Record:
    event: dict[str, Value] = {
        "id": change.generation,
        "timestamp": world.clock.now(),
        "class": change.cls.lower(),
        "operation": change.operation,
        "ref": change.ref,
    }
    if change.operation != "del":
        event["snapshot"] = world.db.get(change.ref)
    return event
