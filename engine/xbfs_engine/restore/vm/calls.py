"""Calls that make something on a pool: tried again while their object is busy or a host in trouble, and marked as ours.

Keeps no state beside the session and the ledger; any task of the session's event loop may use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from xbfs_engine.core.errors import PoolError, XapiFailure
from xbfs_engine.core.log import Logger
from xbfs_engine.source.xapi.failures import Handling, handling_of
from xbfs_engine.source.xapi.markers import PREFIX

if TYPE_CHECKING:
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.source.xapi.session import Ref, Xapi, XapiValue

ORIGIN_KEY: Final = f"{PREFIX}restored-from"
"""In other_config of what a restore made: the point's id, for people. No marker, so no sweep takes it for ours."""

CREATE_S: Final = 300.0
"""A VDI of a thick SR takes seconds; one on a busy SR waits for its turn (SM serialises)."""

BUSY_LIMIT_S: Final = 120.0
"""How long busy objects are waited for. They are our own: a host that just wrote a disk still detaches it."""

_FIRST_S: Final = 0.5
_LONGEST_S: Final = 10.0
_TRANSIENT_TRIES: Final = 3
_TAKEN: Final = "MAP_DUPLICATE_KEY"

_log = Logger("xbfs.restore")


async def make(xapi: Xapi, method: str, *arguments: XapiValue) -> Ref:
    """The reference that a creating call returns. Never repeated where it may have been executed. Raises PoolError."""
    return str(await patiently(xapi, method, *arguments, repeatable=False))


async def patiently(xapi: Xapi, method: str, *arguments: XapiValue, repeatable: bool = True) -> XapiValue:
    """Call until it succeeds or fails for good; broken connections only where ``repeatable``. Raises PoolError."""
    give_up_at = trio.current_time() + BUSY_LIMIT_S
    tries = 0
    while True:
        try:
            return await xapi.call(method, *arguments, timeout_s=CREATE_S)
        except PoolError as exc:
            tries += 1
            delay_s = min(_FIRST_S * (1 << min(tries - 1, 10)), _LONGEST_S)
            passing = _passes(exc, tries, repeatable=repeatable)
            if not passing or trio.current_time() + delay_s > give_up_at:
                raise
            _log.info("tried again", what=method, error=exc.message)
        await trio.sleep(delay_s)


async def put_key(xapi: Xapi, cls: str, ref: Ref, key: str, value: str) -> None:
    """Set a key of other_config that is not there yet. Raises PoolError."""
    try:
        await patiently(xapi, f"{cls}.add_to_other_config", ref, key, value)
    except XapiFailure as exc:
        # Our own first try, whose answer was lost.
        if exc.code != _TAKEN:
            raise


async def release(xapi: Xapi, cls: str, ref: Ref, point: RestorePoint) -> None:
    """Take our marker from an object that is complete, and leave word where it came from. Raises PoolError."""
    found = await patiently(xapi, f"{cls}.get_other_config", ref)
    pairs: dict[str, XapiValue] = {ORIGIN_KEY: point.id}
    if isinstance(found, dict):
        pairs |= {key: value for key, value in found.items() if not key.startswith(PREFIX)}
    await patiently(xapi, f"{cls}.set_other_config", ref, pairs)


def _passes(error: PoolError, tries: int, *, repeatable: bool) -> bool:
    """Whether another try is worth while, and harmless: who is busy has done nothing yet."""
    if isinstance(error, XapiFailure) and handling_of(error) is Handling.BUSY:
        return True
    return repeatable and handling_of(error) is Handling.TRANSIENT and tries < _TRANSIENT_TRIES
