"""Boot tests on a pool, by a pool that does what a test says: what is seen there, and what is made of it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from trio.testing import MockClock

from tests.support.fake_boot_pool import FakeBootPool
from tests.support.points import point
from xbfs.instant.boottest.on_pool import Usage, examine_on_pool
from xbfs.instant.boottest.run import Examination
from xbfs_engine.catalog.boottests import BootTest, Verdict
from xbfs_engine.core.errors import XapiFailure

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from xbfs_engine.core.runtime import Clock
    from xbfs_engine.source.xapi.session import Pool

MIB = 1 << 20
DEADLINE_S = 60.0
BUSY = Usage(9 * MIB, MIB)


class TrioClock:
    """The event loop's, which jumps where nothing happens."""

    def now_ns(self) -> int:
        return 1_790_000_000 * 10**9

    def monotonic_s(self) -> float:
        return trio.current_time()


class Lab:
    """A halted VM on a pool, and what becomes of it: functions by the second at which they happen."""

    def __init__(self) -> None:
        self.pool = FakeBootPool({}, ())
        self.vm = self.pool.vm("web", domid=-1)
        self.usage: Usage | None = Usage(0, 0)
        self.script: dict[float, Callable[[], object]] = {1.0: partial(self.uses, BUSY)}

    def uses(self, usage: Usage | None) -> None:
        self.usage = usage

    def set(self, **fields: Any) -> None:
        self.pool.db.set(self.vm, **fields)

    def agent_speaks(self, **fields: Any) -> None:
        said = {"live": True, "last_updated": self.pool.time, "os_version": {"name": "Debian GNU/Linux 12"}} | fields
        self.set(guest_metrics=self.pool.db.create("VM_guest_metrics", **said))

    async def used(self) -> Usage | None:
        return self.usage

    def test(self) -> BootTest:
        what = Examination(point("web").id, DEADLINE_S, None, "xbfs test", "xen", "bios")

        async def happen() -> None:
            began_s = trio.current_time()
            for at_s, does in sorted(self.script.items()):
                await trio.sleep_until(began_s + at_s)
                does()

        async def work() -> BootTest:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(happen)
                clock = cast("Clock", TrioClock())
                pool = cast("Pool", self.pool)
                result = await examine_on_pool(what, pool, self.vm, self.used, clock, lambda _: None)
                nursery.cancel_scope.cancel()
            return result

        return run(work)


def run(work: Callable[[], Awaitable[BootTest]]) -> BootTest:
    return trio.run(work, clock=MockClock(autojump_threshold=0.01))


@pytest.fixture
def lab() -> Lab:
    return Lab()


def speaks(result: BootTest) -> dict[str, str]:
    return {signal.name: signal.speaks for signal in result.signals}


def test_an_agent_that_speaks_is_a_system_that_runs(lab: Lab) -> None:
    lab.script |= {9.0: lab.agent_speaks}
    result = lab.test()
    assert result.verdict is Verdict.BOOTED
    assert 9_000 <= result.elapsed_ms <= 12_000
    assert (result.accelerator, result.firmware, result.screenshot) == ("xen", "bios", b"")
    assert speaks(result)["agent"] == "for"
    assert not {"console", "processor", "panic"} & speaks(result).keys(), "nobody knows of them there"
    assert "no screen" in next(signal.reading for signal in result.signals if signal.name == "picture")


def test_what_the_agent_said_before_the_backup_is_no_proof(lab: Lab) -> None:
    lab.agent_speaks()
    assert lab.test().verdict is Verdict.UNCLEAR
    stale = lab.pool.db.text(lab.vm, "guest_metrics")
    lab.set(power_state="Halted")
    lab.script |= {5.0: lambda: lab.pool.db.set(stale, last_updated=lab.pool.time.replace(year=2030))}
    assert lab.test().verdict is Verdict.BOOTED, "the same record, but new words"
    lab.set(power_state="Halted")
    lab.script |= {5.0: lambda: lab.pool.db.destroy(stale)}
    assert lab.test().verdict is not Verdict.BOOTED, "it is gone, and nobody speaks"


def test_an_agent_that_is_not_alive_is_no_proof(lab: Lab) -> None:
    lab.script |= {5.0: lambda: lab.agent_speaks(live=False)}
    assert lab.test().verdict is Verdict.UNCLEAR


@pytest.mark.parametrize(
    ("usage", "verdict", "reason"),
    [
        (Usage(0, 0), Verdict.FAILED, "hung in its loader"),
        (Usage(MIB, 4096), Verdict.FAILED, "hung in its loader"),
        (Usage(5 * MIB, 4096), Verdict.UNCLEAR, "something runs"),
        (Usage(MIB, MIB), Verdict.UNCLEAR, "something runs"),
    ],
)
def test_at_the_deadline_what_was_read_decides(lab: Lab, usage: Usage, verdict: Verdict, reason: str) -> None:
    lab.script = {1.0: partial(lab.uses, usage)}
    result = lab.test()
    assert (result.verdict, reason in result.reason) == (verdict, True), result.reason
    assert result.elapsed_ms >= 1000 * DEADLINE_S


def test_a_vm_that_is_halted_for_long_has_switched_itself_off(lab: Lab) -> None:
    lab.script |= {10.0: lambda: lab.set(power_state="Halted", domid=-1)}
    result = lab.test()
    assert result.verdict is Verdict.FAILED
    assert "switched itself off" in result.reason


def test_a_vm_that_restarts_is_halted_for_a_moment_and_three_times_are_too_many(lab: Lab) -> None:
    def starts(domid: int) -> Callable[[], None]:
        return partial(lab.set, power_state="Running", domid=domid)

    off = partial(lab.set, power_state="Halted", domid=-1)
    lab.script |= {0.5: starts(1), 10.0: off, 14.0: starts(2), 20.0: starts(3), 30.0: lab.agent_speaks}
    assert lab.test().verdict is Verdict.BOOTED
    lab.set(power_state="Halted", guest_metrics="OpaqueRef:NULL")
    lab.script |= {0.5: starts(1), 10.0: starts(2), 20.0: starts(3), 30.0: starts(4)}
    result = lab.test()
    assert (result.verdict, "reset 3 times" in result.reason) == (Verdict.FAILED, True)


@pytest.mark.parametrize("state", ["Paused", "Suspended"])
def test_a_vm_that_somebody_stops_tells_nothing(lab: Lab, state: str) -> None:
    lab.script |= {10.0: lambda: lab.set(power_state=state)}
    result = lab.test()
    assert (result.verdict, state.lower() in result.reason) == (Verdict.UNCLEAR, True)


def test_a_vm_that_somebody_deletes_tells_nothing(lab: Lab) -> None:
    lab.script |= {10.0: lambda: lab.pool.db.destroy(lab.vm)}
    result = lab.test()
    assert (result.verdict, "lost" in result.reason) == (Verdict.UNCLEAR, True)


@pytest.mark.parametrize(
    ("code", "verdict"), [("HOST_NOT_ENOUGH_FREE_MEMORY", Verdict.UNCLEAR), ("BOOTLOADER_FAILED", Verdict.FAILED)]
)
def test_a_vm_that_the_pool_does_not_start(lab: Lab, code: str, verdict: Verdict) -> None:
    lab.pool.faults["VM.start"] = [code]
    result = lab.test()
    assert (result.verdict, "did not start" in result.reason) == (verdict, True), result.reason


def test_a_vm_that_is_gone_before_it_starts_is_an_error(lab: Lab) -> None:
    lab.pool.db.destroy(lab.vm)
    with pytest.raises(ExceptionGroup) as raised:
        lab.test()
    assert raised.group_contains(XapiFailure)


def test_metrics_that_xapi_itself_makes_of_every_vm_are_no_agent(lab: Lab) -> None:
    lab.script = {1.0: partial(lab.agent_speaks, os_version={}, other={"has-vendor-device": "0"})}
    assert lab.test().verdict is Verdict.FAILED


def test_stale_words_that_could_not_be_read_before_the_start_are_no_proof(lab: Lab) -> None:
    lab.agent_speaks()
    lab.pool.faults["VM_guest_metrics.get_record"] = ["INTERNAL_ERROR"]
    with pytest.raises(ExceptionGroup):
        lab.test()


def test_an_agent_whose_record_goes_while_it_is_read_is_no_end(lab: Lab) -> None:
    lab.script |= {5.0: partial(lab.agent_speaks, live=False), 20.0: lab.agent_speaks}
    lab.pool.faults["VM_guest_metrics.get_record"] = ["HANDLE_INVALID"] * 3
    assert lab.test().verdict is Verdict.BOOTED


def test_a_vm_that_restarts_is_paused_for_a_moment(lab: Lab) -> None:
    lab.script |= {
        0.5: partial(lab.set, domid=1),
        10.0: partial(lab.set, power_state="Paused", domid=2),
        14.0: partial(lab.set, power_state="Running", domid=2),
        20.0: lab.agent_speaks,
    }
    assert lab.test().verdict is Verdict.BOOTED


def test_reads_that_nobody_counts_are_no_failure_of_the_guest(lab: Lab) -> None:
    lab.script = {0.5: partial(lab.uses, None)}
    assert lab.test().verdict is Verdict.UNCLEAR


def test_the_time_begins_with_the_start(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    original = lab.pool.run_task

    async def slow(method: str, *arguments: Any, **options: Any) -> str:
        await trio.sleep(20)
        return await original(method, *arguments, **options)

    monkeypatch.setattr(lab.pool, "run_task", slow)
    assert lab.test().elapsed_ms < 75_000


def test_ten_seconds_are_enough_to_be_off(lab: Lab) -> None:
    lab.script |= {10.0: lambda: lab.set(power_state="Halted", domid=-1)}
    assert lab.test().elapsed_ms < 24_000


def test_what_hosts_read_before_the_start_is_not_the_guests(lab: Lab) -> None:
    lab.usage, lab.script = Usage(50 * MIB, 10 * MIB), {}
    result = lab.test()
    assert (result.verdict, "hung in its loader: 0 bytes" in result.reason) == (Verdict.FAILED, True)


def test_a_server_that_is_started_anew_counts_from_nothing(lab: Lab) -> None:
    def uses(read_mib: int, written_mib: int) -> Callable[[], None]:
        return partial(lab.uses, Usage(read_mib * MIB, written_mib * MIB))

    lab.script = {5.0: uses(3, 1), 20.0: uses(1, 1), 30.0: uses(2, 1)}
    readings = {signal.name: signal.reading for signal in lab.test().signals}
    assert (readings["reads"], readings["writes"]) == (f"{5 * MIB} bytes", f"{MIB} bytes")


def test_a_reason_names_no_reference(lab: Lab) -> None:
    lab.script |= {10.0: lambda: lab.pool.db.destroy(lab.vm)}
    assert "OpaqueRef" not in lab.test().reason
