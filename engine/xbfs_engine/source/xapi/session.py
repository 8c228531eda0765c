"""The session with a pool: logging in, calling, following the master.

``Xapi`` is what everybody else uses of a pool; ``Pool`` does it, and ``open_pool`` gives one that is logged in. All
methods may be called by many tasks of one trio run at once: each call has a connection of its own, and calls that
wait for events do not keep others from theirs.
"""

from __future__ import annotations

import math
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import trio

from xbfs_engine.core.errors import PoolError, PoolUnreachable, UsageError
from xbfs_engine.core.log import Logger
from xbfs_engine.source.xapi.config import Address, Credentials, PoolConfig
from xbfs_engine.source.xapi.failures import HOST_IS_SLAVE, SESSION_INVALID, Handling, failure, meaning_of
from xbfs_engine.source.xapi.tasks import run_task
from xbfs_engine.source.xapi.transport import CallBroken, Link, Refused
from xbfs_engine.source.xapi.values import NULL_REF, Ref, XapiValue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from xbfs_engine.core.runtime import Runtime

__all__ = ["NULL_REF", "Address", "Credentials", "Pool", "PoolConfig", "Ref", "Xapi", "XapiValue", "open_pool"]

_log = Logger("xapi.session")

CALLS_MAX: Final = 8
"""Calls to a pool at once: xapi serves each by a thread of dom0, and everybody shares it."""

WAITS_MAX: Final = 32
"""Calls of event.from at once, which wait at the host."""

LOGIN_S: Final = 40.0
"""A host answers a wrong password after 5 s (xen-api, session)."""

LOGOUT_S: Final = 5.0
RECORDS_S: Final = 180.0
RETRY_DELAYS_S: Final = (1.0, 4.0, 15.0)
"""A restart of xapi takes some seconds, a change of the master longer: after that the caller's run is at stake."""

_IDLE_S: Final = 10.0
"""Age of an idle connection that is used again: hosts close them after 30 s and more (xen-api, http_svr)."""

_HOPS_MAX: Final = 4
_API_VERSION: Final = "2.21"
"""Ignored by hosts (xen-api, session.login_with_password); what tools of XenServer 8 send."""

_READS: Final = frozenset({"event.from", "VDI.list_changed_blocks"})


class Xapi(Protocol):
    """What one needs of a pool."""

    async def call(self, method: str, *arguments: XapiValue, timeout_s: float = 60.0) -> XapiValue:
        """Call ``method`` ("VM.get_record"); the session is added. Raises PoolError.

        XapiFailure: the host refused, with its code and parameters. LoginRefused: also a role that does not suffice.
        PoolUnreachable: no host answers or the connection broke; reads were tried again before, other calls were not
        and may have been executed. CertificateRejected: a host is not the one that was pinned.
        """
        ...

    async def run_task(
        self,
        method: str,
        *arguments: XapiValue,
        timeout_s: float,
        progress: Callable[[float], None] | None = None,
    ) -> str:
        """Call ``method`` as a task ("Async." is added), wait for its end and destroy it; the result, often a Ref.

        ``progress`` gets 0 to 1. Raises what ``call`` raises, XapiFailure with the task's error, and XapiFailure
        XBFS_TASK_TIMEOUT after ``timeout_s``; then, and when cancelled, the task is cancelled on the pool too.
        """
        ...

    async def records(self, cls: str) -> dict[Ref, dict[str, XapiValue]]:
        """All records of a class ("VM")."""
        ...

    @property
    def name(self) -> str:
        """The configured name of the pool."""
        ...

    @property
    def originator(self) -> str:
        """What our sessions are called on the pool: "xbfs/NODE"."""
        ...


class Pool:
    """A pool that one is logged in to: Xapi, and what transfers need beside calls. Made by ``open_pool``."""

    def __init__(
        self, config: PoolConfig, secrets: Credentials, runtime: Runtime, *, retry_delays_s: Sequence[float]
    ) -> None:
        self.config = config
        self._secrets = secrets
        self._clock = runtime.clock
        self._retry_delays_s = retry_delays_s
        self._master = config.addresses[0]
        self._session = ""
        self._breaks = 0  # calls in a row whose connection broke
        self._login_lock = trio.Lock()
        self._idle: list[tuple[float, Link]] = []
        self._calls = trio.CapacityLimiter(CALLS_MAX)
        self._waits = trio.CapacityLimiter(WAITS_MAX)
        # The two above count; threads of calls that were given up end by themselves soon.
        self._threads = trio.CapacityLimiter(math.inf)

    @property
    def name(self) -> str:
        """The configured name of the pool."""
        return self.config.name

    @property
    def originator(self) -> str:
        """What our sessions are called on the pool."""
        return self.config.originator

    @property
    def master(self) -> Address:
        """The host that is master as far as we know."""
        return self._master

    async def session(self) -> str:
        """The session's reference, a secret: valid for all hosts of the pool. Logs in if there is none."""
        async with self._login_lock:
            if not self._session:
                self._session = await self._log_in()
            return self._session

    async def call(self, method: str, *arguments: XapiValue, timeout_s: float = 60.0) -> XapiValue:
        """``Xapi.call``."""
        delays, renewed, hops, session = iter(self._retry_delays_s), False, 0, ""
        while True:
            try:
                session = await self.session()
                value = await self._send(self._master, method, [session, *arguments], timeout_s)
            except Refused as exc:
                code = exc.description[0] if exc.description else ""
                if code == SESSION_INVALID and not renewed:
                    renewed = True
                    self._forget(session)
                elif code == HOST_IS_SLAVE and hops < _HOPS_MAX:
                    hops += 1
                    self._master = self._told_master(self._master, exc)
                else:
                    raise self._failure(method, exc, session) from None
            except PoolUnreachable as exc:
                sent = isinstance(exc, CallBroken)
                self._breaks += 1
                if not sent or self._breaks > 1:
                    # No connection, or only such that break: another host may be the master now; logging in finds it.
                    self._forget(session)
                delay = next(delays, None)
                if delay is None or (sent and not _is_read(method)):
                    raise
                _log.info("call_tried_again", method=method, reason=exc.message)
                await trio.sleep(delay)
            else:
                self._breaks = 0
                return value

    async def run_task(
        self,
        method: str,
        *arguments: XapiValue,
        timeout_s: float,
        progress: Callable[[float], None] | None = None,
    ) -> str:
        """``Xapi.run_task``."""
        return await run_task(self, method, arguments, timeout_s=timeout_s, progress=progress)

    async def records(self, cls: str) -> dict[Ref, dict[str, XapiValue]]:
        """``Xapi.records``."""
        method = f"{cls}.get_all_records"
        found = await self.call(method, timeout_s=RECORDS_S)
        if not isinstance(found, dict):
            raise PoolError(f"{method}: the host's answer is no map of records", hint="is it really a XenServer host?")
        records = {ref: record for ref, record in found.items() if isinstance(record, dict)}
        if len(records) != len(found):
            raise PoolError(f"{method}: the host's answer holds what is no record", hint="")
        return records

    async def close(self) -> None:
        """Log out, if the host answers soon."""
        with trio.move_on_after(LOGOUT_S, shield=True):
            if self._session:
                with suppress(PoolError, Refused):
                    await self._send(self._master, "session.logout", [self._session], LOGOUT_S)
        self._session = ""
        while self._idle:
            self._idle.pop()[1].close()

    async def _log_in(self) -> str:
        config = self.config
        hosts = [Address(host, config.addresses[0].port) for host in config.pins]
        queue = list(dict.fromkeys([self._master, *config.addresses, *hosts]))
        tried: dict[Address, str] = {}
        arguments = [self._secrets.user, self._secrets.password, _API_VERSION, config.originator]
        while queue:
            address = queue.pop(0)
            if address in tried:
                continue
            try:
                session = await self._send(address, "session.login_with_password", [*arguments], LOGIN_S)
            except PoolUnreachable as exc:
                tried[address] = exc.message
                continue
            except Refused as exc:
                code = exc.description[0] if exc.description else ""
                if meaning_of(code).handling not in {Handling.TRANSIENT, Handling.BUSY}:
                    raise self._failure(f"log in to pool {self.name} as {self._secrets.user}", exc, "") from None
                tried[address] = f"{address} says {code}"
                if code == HOST_IS_SLAVE:
                    queue.insert(0, self._told_master(address, exc))
                continue
            if not isinstance(session, str) or not session:
                raise PoolError(f"{address} answered a login without a session", hint="is it really a XenServer host?")
            self._master = address
            return session
        raise PoolUnreachable(f"no host of pool {self.name} lets us in: {'; '.join(tried.values())}")

    async def _send(self, address: Address, method: str, arguments: Sequence[XapiValue], timeout_s: float) -> XapiValue:
        """One call on a connection of its own, within ``timeout_s`` from the moment that it is its turn."""
        async with self._waits if method == "event.from" else self._calls:
            link = self._take(address)
            call = partial(link.call, method, arguments, timeout_s=timeout_s)
            try:
                with trio.fail_after(timeout_s):
                    value = await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._threads)
            except trio.TooSlowError:
                link.abort()
                raise CallBroken(f"{method}: {address} did not answer within {timeout_s:g} s") from None
            except Refused:
                self._give_back(link)
                raise
            except BaseException:
                link.abort()
                raise
            self._give_back(link)
            return value

    def _take(self, address: Address) -> Link:
        now_s = self._clock.monotonic_s()
        while self._idle:
            since_s, link = self._idle.pop()
            # A host may close a connection that we just use: then nobody knows whether the call was executed.
            if link.address == address and now_s - since_s < _IDLE_S and not link.is_stale():
                return link
            link.close()
        return Link(address, self.config.pins)

    def _give_back(self, link: Link) -> None:
        self._idle.append((self._clock.monotonic_s(), link))
        while len(self._idle) > CALLS_MAX:
            self._idle.pop(0)[1].close()

    def _forget(self, session: str) -> None:
        if self._session == session:
            self._session = ""

    def _told_master(self, address: Address, refused: Refused) -> Address:
        """Where HOST_IS_SLAVE sends us: a bare address, and the port that this pool is reached at."""
        try:
            return Address.parse(refused.description[1] if len(refused.description) > 1 else "", port=address.port)
        except UsageError as exc:
            raise PoolError(f"{address} does not say which host is the pool's master: {exc.message}") from exc

    def _failure(self, what: str, refused: Refused, session: str) -> PoolError:
        return failure(what, refused.description, secrets=(session, self._secrets.password))


@asynccontextmanager
async def open_pool(
    config: PoolConfig, secrets: Credentials, runtime: Runtime, *, retry_delays_s: Sequence[float] = RETRY_DELAYS_S
) -> AsyncIterator[Pool]:
    """A pool, logged in; leaving logs out. ``retry_delays_s``: before each further try of what may be tried again.

    Raises PoolUnreachable, LoginRefused, CertificateRejected, PoolError.
    """
    pool = Pool(config, secrets, runtime, retry_delays_s=retry_delays_s)
    try:
        await pool.session()
        yield pool
    finally:
        await pool.close()


def _is_read(method: str) -> bool:
    """Whether a call changes nothing, so that it may be executed twice."""
    return method in _READS or method.rpartition(".")[2].startswith("get_")
