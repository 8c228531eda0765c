"""Calls that are tried again: while something else works on an object, and while host trouble passes.

Which errors pass is told by ``failures``. A broken connection is only tried again for calls that may be
executed twice; the caller says so. Keeps no state beside the runtime; any task may use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import trio

from xbfs_engine.core.errors import PoolError, XapiFailure
from xbfs_engine.core.log import Logger
from xbfs_engine.source.xapi.failures import Handling, handling_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from xbfs_engine.core.runtime import RandomSource

T = TypeVar("T")

_FIRST_S: Final = 1.0
_LONGEST_S: Final = 30.0
BUSY_LIMIT_S: Final = 600.0
"""How long busy objects are waited for; locks of other operations are held for minutes at most."""

_TRANSIENT_TRIES: Final = 3
_FINAL: Final = frozenset({"XBFS_TASK_TIMEOUT"})
"""Took its whole deadline already."""

_log = Logger("xapi.patience")


class Patience:
    """Tries again with growing, jittered delays."""

    def __init__(self, random: RandomSource, *, limit_s: float = BUSY_LIMIT_S) -> None:
        self._random = random
        self._limit_s = limit_s

    async def get(
        self,
        attempt: Callable[[], Awaitable[T]],
        what: str,
        *,
        repeatable: bool,
        busy: Callable[[XapiFailure], bool] = lambda _: True,
    ) -> T:
        """The result of ``attempt``, which is called until it succeeds or fails for good.

        ``repeatable``: it may be executed twice, so broken connections are tried again too. ``busy``: whether a busy
        object is worth waiting for here. Raises its PoolError.
        """
        give_up_at = trio.current_time() + self._limit_s
        tries = 0
        while True:
            tries += 1
            try:
                return await attempt()
            except PoolError as exc:
                delay_s = self._delay_s(tries)
                passing = _may_pass(exc, tries, repeatable=repeatable, busy=busy)
                if not passing or trio.current_time() + delay_s > give_up_at:
                    raise
                _log.info("tried again", what=what, error=exc.message, delay_s=round(delay_s, 1))
            await trio.sleep(delay_s)

    def _delay_s(self, tries: int) -> float:
        """Doubling, and spread over half of it: those who collided shall not meet again."""
        full: float = min(_FIRST_S * (1 << min(tries - 1, 10)), _LONGEST_S)
        return full * (0.5 + int.from_bytes(self._random.token(2)) / 0x1FFFE)


def _may_pass(error: PoolError, tries: int, *, repeatable: bool, busy: Callable[[XapiFailure], bool]) -> bool:
    if isinstance(error, XapiFailure):
        match handling_of(error):
            case Handling.BUSY:
                return busy(error)
            case Handling.TRANSIENT:
                return tries < _TRANSIENT_TRIES and error.code not in _FINAL
            case _:
                return False
    return repeatable and error.retryable and tries < _TRANSIENT_TRIES
