"""A boot test on a pool: an isolated VM there is started and watched through XAPI. Event-loop thread only.

What XAPI tells (xen-api): the power state; the domain's number, another one after each restart; the guest metrics,
which it makes anew for every VM that runs, and in which the agent alone names a system; the screen. Of HVM guests it
has no text console, and no use of processors that is fresh. What is read and written the session knows, whose disks
they are.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from xbfs.instant.boottest.observe import Observer
from xbfs.instant.boottest.rfb import screen_of
from xbfs.instant.boottest.run import Outcome, result_of, watch
from xbfs.instant.boottest.verdict import Judgement
from xbfs.instant.pool.build import start
from xbfs_engine.catalog.boottests import Signal, Verdict
from xbfs_engine.core.errors import InstantError, PoolError, XapiFailure
from xbfs_engine.source.xapi.failures import Handling, handling_of
from xbfs_engine.source.xapi.fields import Fields
from xbfs_engine.source.xapi.http import console

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from xbfs.instant.boottest.run import Examination
    from xbfs.instant.boottest.screen import Pixels
    from xbfs.instant.boottest.verdict import Observed
    from xbfs_engine.catalog.boottests import BootTest
    from xbfs_engine.core.runtime import Clock
    from xbfs_engine.source.xapi.session import Pool, Ref
    from xbfs_engine.source.xapi.wire import Wire

ACCELERATOR: Final = "xen"
_SCREEN_S: Final = 5.0
"""Between pictures: some MB of a host's time each."""
_SCREEN_LIMIT_S: Final = 15.0
_RUNNING: Final = "running"
_SETTLED_S: Final = 10.0
"""For how long a VM has to be halted or paused until it counts: one that restarts may be either for a moment."""
_NO_LOADER: Final = "BOOTLOADER_FAILED"


class Usage(NamedTuple):
    """Bytes read from and written to the session's disks."""

    read_bytes: int
    written_bytes: int


class _Words(NamedTuple):
    """What an agent said: in which record, and when."""

    metrics: Ref
    updated: str


class PoolObserver(Observer):
    """Of a VM on a pool. ``usage``: of its session until now, None if nobody tells."""

    poll_s = 2.0

    def __init__(self, pool: Pool, vm: Ref, usage: Callable[[], Awaitable[Usage | None]]) -> None:
        super().__init__()
        self.seen.is_on_pool = True
        self.screen_problem = ""
        self._pool = pool
        self._vm = vm
        self._usage = usage
        self._stale: _Words | None = None
        self._counted: Usage | None = None
        self._domid = -1
        self._state = _RUNNING
        self._state_from_s = 0.0
        self._screen_s = -_SCREEN_S

    async def note_before(self) -> None:
        """What is there before the VM is started: the words of its agent at the backup, which an import brings along
        (xen-api, import.ml), and what the hosts read for themselves. Raises PoolError."""
        vm = await self._record("VM", self._vm)
        self._stale = await self._words(vm.reference("guest_metrics"))
        self._counted = await self._usage()

    async def look(self, elapsed_s: float) -> Observed:
        """What is to be seen now. Raises PoolError if the VM or the pool is not there any more."""
        seen = self.seen
        seen.elapsed_s = elapsed_s
        vm = await self._record("VM", self._vm)
        self._look_at_domain(vm, elapsed_s)
        if not seen.agent_answered:
            words = await self._words(vm.reference("guest_metrics"))
            seen.agent_answered = words is not None and words != self._stale
        self._count(await self._usage())
        self._saw_use(elapsed_s, None)
        if elapsed_s - self._screen_s >= _SCREEN_S:
            await self.look_at_screen(elapsed_s)
        return seen

    async def look_at_screen(self, elapsed_s: float) -> None:
        """Take a picture if there is one to be had; ``screen_problem`` says why not."""
        self._screen_s = elapsed_s
        if self._state != _RUNNING:
            return
        try:
            with trio.fail_after(_SCREEN_LIMIT_S):
                picture = await self._picture()
        except trio.TooSlowError:
            self.screen_problem = f"it does not come within {_SCREEN_LIMIT_S:.0f} s"
        except (InstantError, PoolError) as exc:
            self.screen_problem = exc.message
        else:
            self.screen_problem = ""
            await self._saw_screen(elapsed_s, picture)

    async def _picture(self) -> Pixels:
        """Of the first console that is a screen. Raises InstantError, PoolError."""
        for ref in (await self._record("VM", self._vm)).texts("consoles"):
            if (await self._record("console", ref)).text("protocol") == "rfb":
                async with console(self._pool, ref, timeout_s=_SCREEN_LIMIT_S) as wire:
                    return await trio.to_thread.run_sync(partial(screen_of, _Screen(wire)), abandon_on_cancel=True)
        raise InstantError("the VM has no screen")

    def _count(self, usage: Usage | None) -> None:
        """What came since the last look. A server that was started anew counts from 0."""
        self.seen.knows_use = usage is not None
        if usage is None:
            return
        before = self._counted or Usage(0, 0)
        read, written = (now if now < then else now - then for now, then in zip(usage, before, strict=True))
        self.seen.read_bytes += read
        self.seen.written_bytes += written
        self._counted = usage

    def _look_at_domain(self, vm: Fields, elapsed_s: float) -> None:
        seen, state, domid = self.seen, vm.text("power_state").lower(), vm.integer("domid", -1)
        if domid >= 0:
            seen.resets += self._domid not in (-1, domid)
            self._domid = domid
        if state != self._state:
            self._state, self._state_from_s = state, elapsed_s
        has_settled = state == _RUNNING or elapsed_s - self._state_from_s >= _SETTLED_S
        seen.status = state if has_settled else _RUNNING
        seen.has_shut_down = seen.status == "halted"

    async def _words(self, metrics: Ref | None) -> _Words | None:
        """What an agent that is alive says of its system, and when; None if there is none. Raises PoolError."""
        if metrics is None:
            return None
        try:
            found = await self._pool.call("VM_guest_metrics.get_record", metrics)
        except XapiFailure as exc:
            if handling_of(exc) is not Handling.GONE:
                raise
            return None  # XAPI makes a new one when a VM starts
        record = found if isinstance(found, dict) else {}
        fields = Fields("VM_guest_metrics", metrics, record)
        system = fields.mapping("os_version")
        if not fields.flag("live") or not any(system.values()):
            return None
        return _Words(metrics, str(record.get("last_updated", "")))

    async def _record(self, cls: str, ref: Ref) -> Fields:
        found = await self._pool.call(f"{cls}.get_record", ref)
        return Fields(cls, ref, found if isinstance(found, dict) else {})


class _Screen:
    """A console as a stream of RFB."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def read(self, length: int) -> bytes:
        """Raises TransferFailed."""
        data = bytearray(length)
        return bytes(data[: self._wire.read_into(memoryview(data))])

    def send(self, data: bytes) -> None:
        """Raises TransferFailed."""
        self._wire.send([data])


async def examine_on_pool(
    what: Examination,
    pool: Pool,
    vm: Ref,
    usage: Callable[[], Awaitable[Usage | None]],
    clock: Clock,
    report: Callable[[Observed], None],
) -> BootTest:
    """Start a halted VM, and the result; the VM is left as it is then. Raises PoolError before it is started."""
    observer = PoolObserver(pool, vm, usage)
    await observer.note_before()
    began_s = clock.monotonic_s()
    try:
        await start(pool, vm)
    except PoolError as exc:
        is_its_own = isinstance(exc, XapiFailure) and exc.code == _NO_LOADER
        verdict = Verdict.FAILED if is_its_own else Verdict.UNCLEAR
        judgement = Judgement(verdict, f"the pool did not start the VM: {exc.message}")
        outcome = Outcome(judgement, clock.monotonic_s() - began_s)
    else:
        outcome = await watch(what, clock, observer, began_s, report)
    problem = [Signal("picture", "", observer.screen_problem)] if observer.screen_problem else []
    return await result_of(what, observer, outcome, clock, Signal("pool", "", pool.name), *problem)
