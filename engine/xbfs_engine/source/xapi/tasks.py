"""Tasks of a pool: started, followed with event.from, and never left behind. Keeps no state.

XAPI ends, but does not remove, a task: its creator destroys it (xen-api, tasks). A task that nobody waits for any
more is cancelled first. What can not be cleaned up in time goes by itself: xapi drops ended tasks after 65 minutes
and pending ones after 24 hours.
"""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import unescape

import trio

from xbfs_engine.core.errors import PoolError, XapiFailure
from xbfs_engine.core.log import Logger
from xbfs_engine.source.xapi.failures import TASK_TIMEOUT, failure, meaning_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from xbfs_engine.source.xapi.session import Xapi
    from xbfs_engine.source.xapi.values import Ref, XapiValue

_log = Logger("xapi.tasks")

_EVENT_WAIT_S: Final = 30.0
_POLL_S: Final = 1.0
_CLEAN_UP_S: Final = 10.0
_SETTLE_S: Final = 5.0
"""How long a cancelled task may take to end before it is destroyed: whoever cleans up wants its objects idle."""

_SETTLE_TRANSFER_S: Final = 0.5
"""The same for a transfer, whose connection is closed already; one that never reached its host ends by nothing."""

_START_S: Final = 60.0
_ENDED: Final = frozenset({"success", "failure", "cancelled"})
_VALUE: Final = re.compile(r"\s*<value>\s*(?:<string>)?(.*?)(?:</string>)?\s*</value>\s*", re.DOTALL)


async def run_task(
    xapi: Xapi,
    method: str,
    arguments: Sequence[XapiValue],
    *,
    timeout_s: float,
    progress: Callable[[float], None] | None = None,
) -> str:
    """``Xapi.run_task``."""
    # Cancelled between question and answer, nobody would know the task: that moment is not interrupted.
    with trio.CancelScope(shield=True):
        task = str(await xapi.call(f"Async.{method}", *arguments, timeout_s=_START_S))
    try:
        return await wait_for(xapi, task, method, timeout_s=timeout_s, progress=progress)
    finally:
        await _discard(xapi, task, _SETTLE_S)


@asynccontextmanager
async def own_task(xapi: Xapi, label: str) -> AsyncIterator[Ref]:
    """A task of our own to hand to a transfer; cancelled if still pending, and destroyed, on leaving.

    Its name begins with the originator, so that a sweep knows whose it is.
    """
    with trio.CancelScope(shield=True):
        task = str(await xapi.call("task.create", f"{xapi.originator}: {label}", "", timeout_s=_START_S))
    try:
        yield task
    finally:
        await _discard(xapi, task, _SETTLE_TRANSFER_S)


async def wait_for(
    xapi: Xapi, task: Ref, what: str, *, timeout_s: float, progress: Callable[[float], None] | None = None
) -> str:
    """The result of a task, once it succeeded, without the XML around it; ``what`` names it in errors.

    Raises XapiFailure with the task's error_info, or XBFS_TASK_TIMEOUT, and what ``Xapi.call`` raises.
    """
    with trio.move_on_after(timeout_s):
        return await _follow(xapi, task, what, progress)
    told = f"{what}: {meaning_of(TASK_TIMEOUT).text} of {timeout_s:g} s"
    raise XapiFailure(told, code=TASK_TIMEOUT, hint=meaning_of(TASK_TIMEOUT).hint)


async def failure_of(xapi: Xapi, task: Ref, what: str, *, timeout_s: float) -> PoolError | None:
    """Why a task failed, if it fails within ``timeout_s``; None if it succeeds, goes on, or can not be asked."""
    try:
        await wait_for(xapi, task, what, timeout_s=timeout_s)
    except XapiFailure as exc:
        return None if exc.code == TASK_TIMEOUT else exc
    except PoolError:
        return None
    return None


async def _follow(xapi: Xapi, task: Ref, what: str, progress: Callable[[float], None] | None) -> str:
    token = ""
    while True:
        # First the event's token, then the record: what happens between the two wakes the next wait.
        token = await _event(xapi, task, token)
        record = await _record(xapi, task)
        match record.get("status"):
            case "success":
                result = str(record.get("result", ""))
                match = _VALUE.fullmatch(result)
                return unescape(match[1]) if match else result
            case "failure":
                info = record.get("error_info")
                raise failure(what, [str(part) for part in info] if isinstance(info, list) else [])
            case "cancelled":
                raise failure(what, ["TASK_CANCELLED"])
            case _:
                done = record.get("progress")
                if progress is not None and isinstance(done, int | float):
                    progress(min(max(float(done), 0.0), 1.0))


async def _record(xapi: Xapi, task: Ref) -> dict[str, XapiValue]:
    record = await xapi.call("task.get_record", task)
    if not isinstance(record, dict):
        raise PoolError("task.get_record: the host's answer is no record", hint="is it really a XenServer host?")
    return record


async def _event(xapi: Xapi, task: Ref, token: str) -> str:
    """Wait until something happens to ``task``, or for a while; returns the token to wait with next."""
    try:
        answer = await xapi.call("event.from", [f"task/{task}"], token, _EVENT_WAIT_S, timeout_s=2 * _EVENT_WAIT_S)
    except XapiFailure as exc:
        _log.debug("event_from_refused", code=exc.code)
        await trio.sleep(_POLL_S)
        return ""
    found = answer.get("token") if isinstance(answer, dict) else None
    if not isinstance(found, str) or not found:
        await trio.sleep(_POLL_S)
        return ""
    return found


async def _discard(xapi: Xapi, task: Ref, settle_s: float) -> None:
    with trio.move_on_after(_CLEAN_UP_S, shield=True):
        try:
            if (await _record(xapi, task)).get("status") not in _ENDED:
                await xapi.call("task.cancel", task)
                await wait_for(xapi, task, "task.cancel", timeout_s=settle_s)
        except PoolError as exc:
            _log.debug("task_cancelled", reason=exc.message)
        try:
            await xapi.call("task.destroy", task)
        except PoolError as exc:
            _log.debug("task_not_destroyed", reason=exc.message)
