"""Random lives of a VM: writes, growth, reverts, switched tracking, lost bases, failing and cancelled runs.

After each run the new point equals the disks at the moment of the snapshot, byte by byte; whatever happened, the sweep
and the next run leave nothing on the pool but the bases of the last point.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.support.fake_pool import Fault
from tests.support.vm_lab import NODE, Lab
from xbfs_engine.core.errors import PoolError
from xbfs_engine.core.limits import KIB, MIB
from xbfs_engine.ingest.vm.base import known_bases
from xbfs_engine.ingest.vm.cycle import Wishes
from xbfs_engine.source.xapi.sweep import sweep

DISKS = 2
SIZE_MAX = 4 * MIB
CODES = ["INTERNAL_ERROR", "UNREACHABLE", "VDI_IN_USE", "OTHER_OPERATION_IN_PROGRESS", "HANDLE_INVALID"]


class VmLife(RuleBasedStateMachine):
    """One VM on one pool, backed up by one node."""

    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.lab = Lab(Path(self.directory.name))
        self.pool = self.lab.pool
        self.vm = self.pool.vm("web")
        for number in range(DISKS):
            self.pool.disk(self.vm, number, size_bytes=MIB)
        self.taken: dict[int, bytes] = {}

    def vdis(self) -> list[str]:
        return [self.pool.db.text(vbd, "VDI") for vbd in self.pool.db.refs(self.vm, "VBDs")]

    @rule(disk=st.integers(0, DISKS - 1), at=st.integers(0, SIZE_MAX - 1), data=st.binary(min_size=1, max_size=200))
    def write(self, disk: int, at: int, data: bytes) -> None:
        vdi = self.vdis()[disk]
        self.pool.write(vdi, at % (len(self.pool.content[vdi]) - len(data)), data)

    @rule(disk=st.integers(0, DISKS - 1), mibs=st.integers(1, 2), odd=st.integers(0, 3))
    def grow(self, disk: int, mibs: int, odd: int) -> None:
        vdi = self.vdis()[disk]
        size = len(self.pool.content[vdi]) + mibs * MIB + odd * 17 * KIB // 512 * 512
        if size <= SIZE_MAX:
            self.pool.grow(vdi, size)

    @rule()
    def revert(self) -> None:
        self.pool.revert(self.vm)

    @rule(disk=st.integers(0, DISKS - 1), on=st.booleans())
    def switch_tracking(self, disk: int, *, on: bool) -> None:
        self.pool.VDI_disable_cbt(self.vdis()[disk])
        if on:
            self.pool.VDI_enable_cbt(self.vdis()[disk])

    @rule(which=st.integers(0, DISKS - 1))
    def lose_a_base(self, which: int) -> None:
        bases = self.pool.snapshot_vdis()
        if which < len(bases) and not self.pool.db.refs(bases[which], "VBDs"):
            self.pool.VDI_destroy(bases[which])

    @rule(full=st.booleans(), keep_data=st.booleans())
    def back_up(self, *, full: bool, keep_data: bool) -> None:
        self._run(Wishes(full=full, keep_data=keep_data))
        assert self.pool.leftovers() == [] or keep_data

    @rule(number=st.integers(1, 90), code=st.sampled_from(CODES), after=st.booleans())
    def back_up_with_a_fault(self, number: int, code: str, *, after: bool) -> None:
        async def disturb(call: int, method: str) -> None:
            if call == number:
                self.pool.faults.append(Fault(method, code, after=after))

        self._disturbed(disturb)

    @rule(number=st.integers(1, 90))
    def back_up_cancelled(self, number: int) -> None:
        scope = trio.CancelScope()

        async def disturb(call: int, _: str) -> None:
            if call == number:
                scope.cancel()

        self._disturbed(disturb, scope)

    def _disturbed(self, disturb: Any, scope: trio.CancelScope | None = None) -> None:
        self.pool.calls = 0
        self.pool.before_call = disturb
        with suppress(PoolError):
            self._run(Wishes(), scope)
        self.pool.before_call = None
        self.pool.faults.clear()

    def _run(self, wishes: Wishes, scope: trio.CancelScope | None = None) -> None:
        known = len(self.lab.engine.points())

        async def work() -> None:
            with scope or trio.CancelScope():
                await self._sweep()
                await self.lab.cycle(self.vm, wishes)

        try:
            self.lab.run(work)
        finally:
            points = self.lab.engine.points()
            if len(points) > known:
                # Nothing writes to the disks during a run here, so they are what the snapshot held.
                self.taken = {number: bytes(self.pool.content[vdi]) for number, vdi in enumerate(self.vdis())}
            if points:
                self.lab.check_point(points[-1], self.taken)

    async def _sweep(self) -> None:
        bases = known_bases(self.lab.engine.catalog, self.lab.engine.repository.id)
        await sweep(self.pool, self.lab.ledgers, node=NODE, dry_run=False, bases=bases)

    def teardown(self) -> None:
        if not hasattr(self, "lab"):
            return
        self._run(Wishes())
        self._run(Wishes())
        assert self.pool.leftovers() == []
        assert len(self.pool.snapshot_vdis()) == DISKS
        last = self.lab.engine.points()[-1]
        assert [disk.method for disk in last.disks] == ["cbt"] * DISKS
        self.directory.cleanup()


TestVmLife = VmLife.TestCase
TestVmLife.settings = settings(
    max_examples=25, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
