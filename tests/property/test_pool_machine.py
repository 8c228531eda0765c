"""Random lives of a simulated pool: guests write and grow, people snapshot and revert, hosts crash, runs die.

After each run every new point equals the bytes of its snapshot exactly; after each run that ends well nothing of ours
is on the pool but the bases that a ledger keeps.
"""

from __future__ import annotations

import tempfile
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.support.vm_site import methods
from tests.support.vm_site_process import killed_run, local_site
from tests.support.xensim import MIB, XenSim, default_world, running_sim
from xbfs_engine.core.errors import PoolError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.catalog.restore_point import RestorePoint

VMS = 2
DISKS = 2
EXAMPLES = 6
"""Lives that have VMs of their own; later ones, each of another node, take those of earlier ones."""

SIZE_MAX = 6 * MIB
NUMBERS = count()


def world() -> dict[str, Any]:
    """Each example takes VMs of its own: one on a thin SR, one with a disk on a thick one."""
    vms = [
        {
            "name": f"vm{number}",
            "power_state": "Running",
            "disks": [{"sr": sr, "size": 2 * MIB} for sr in ("nfs", "lvm" if number % VMS else "nfs")],
        }
        for number in range(VMS * EXAMPLES)
    ]
    return default_world(vms=vms)


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[XenSim]:
    with running_sim(world(), tmp_path_factory.mktemp("sim")) as running:
        yield running


class PoolLife(RuleBasedStateMachine):
    """Two VMs of one pool, backed up by one node into one repository."""

    sim: ClassVar[XenSim]

    @initialize()
    def begin(self) -> None:
        number = next(NUMBERS)
        first = number % EXAMPLES * VMS
        self.place = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.directory = Path(self.place.name)
        self.site = local_site(self.sim, self.directory, f"node{number}")
        self.names = [f"vm{first + vm}" for vm in range(VMS)]
        self.points = dict.fromkeys(self.names, 0)
        self.by_hand: list[tuple[str, str]] = []
        # A host that crashed in an earlier life took all VMs with it.
        self._start()

    # guests and people

    @rule(vm=st.integers(0, VMS - 1), disk=st.integers(0, DISKS - 1), at=st.integers(0), data=st.binary(min_size=1))
    def write(self, vm: int, disk: int, at: int, data: bytes) -> None:
        self._write(self.names[vm], disk, at, data)

    @rule(vm=st.integers(0, VMS - 1), disk=st.integers(0, DISKS - 1), mibs=st.sampled_from([1, 2]))
    def grow(self, vm: int, disk: int, mibs: int) -> None:
        name = self.names[vm]
        vdi = self.sim.disks(name)[disk]
        size = int(self.site.vdi(vdi)["virtual_size"]) + mibs * MIB
        if size <= SIZE_MAX:
            self.sim.call("VM.hard_shutdown", self._ref(name))
            self.sim.call("VDI.resize", f"uuid:VDI:{vdi}", size)
            self._start()

    @precondition(lambda self: len(self.by_hand) < 3)
    @rule(vm=st.integers(0, VMS - 1))
    def somebody_takes_a_snapshot(self, vm: int) -> None:
        name = self.names[vm]
        self.by_hand.append((name, self.sim.call("VM.snapshot", self._ref(name), "by hand", [])))

    @precondition(lambda self: self.by_hand)
    @rule()
    def somebody_reverts(self) -> None:
        _, snapshot = self.by_hand[-1]
        self.sim.call("VM.revert", snapshot)
        self._start()

    @precondition(lambda self: self.by_hand)
    @rule()
    def somebody_deletes_a_snapshot(self) -> None:
        _, snapshot = self.by_hand.pop(0)
        vdis = [self.sim.call("VBD.get_VDI", vbd) for vbd in self.sim.call("VM.get_VBDs", snapshot)]
        self.sim.call("VM.destroy", snapshot)
        for vdi in vdis:
            self.sim.call("VDI.destroy", vdi)

    @rule(vm=st.integers(0, VMS - 1), disk=st.integers(0, DISKS - 1), on=st.booleans())
    def somebody_switches_tracking(self, vm: int, disk: int, *, on: bool) -> None:
        vdi = f"uuid:VDI:{self.sim.disks(self.names[vm])[disk]}"
        self.sim.call("VDI.disable_cbt", vdi)
        if on:
            self.sim.call("VDI.enable_cbt", vdi)

    @rule(vm=st.integers(0, VMS - 1))
    def somebody_destroys_a_base(self, vm: int) -> None:
        for base in self.site.bases(self.names[vm])[:1]:
            if not base["VBDs"]:
                self.sim.call("VDI.destroy", f"uuid:VDI:{base['uuid']}")

    @rule()
    def coalesce(self) -> None:
        self.sim.do("coalesce")

    @rule(host=st.sampled_from(["alpha", "beta"]))
    def a_host_crashes(self, host: str) -> None:
        self.sim.do("crash_host", host=host)
        self._start()

    @rule()
    def another_master(self) -> None:
        (pool,) = self.sim.dump("pool")["pool"]
        old = next(host["name_label"] for host in self.sim.dump("host")["host"] if host["uuid"] == pool["master"])
        self.sim.do("set_master", host="beta" if old == "alpha" else "alpha")

    # runs

    @rule(full=st.booleans())
    def back_up(self, *, full: bool) -> None:
        self._back_up(lambda: self.site.run(*self.names, full=full))
        assert self.site.leaks() == []

    @rule(data=st.binary(min_size=1), at=st.integers(0))
    def back_up_while_a_guest_writes(self, data: bytes, at: int) -> None:
        """The point is what the snapshot holds, whatever the guest wrote since."""
        name = self.names[0]
        self._back_up(lambda: self.site.run_with("GET /export_metadata", lambda: self._write(name, 0, at, data), name))
        assert self.site.leaks() == []

    @rule(
        point=st.sampled_from(["VM.*", "VDI.*", "*.get_*", "task.*", "GET *", "NBD.*"]),
        effect=st.sampled_from(["drop", "drop_after", "fail", "fail_after"]),
        nth=st.integers(1, 20),
        times=st.sampled_from([1, 3, 10_000]),
    )
    def back_up_on_a_bad_day(self, point: str, effect: str, nth: int, times: int) -> None:
        self.sim.fault(point, effect, nth=nth, times=times)
        self._back_up(lambda: self.site.run(*self.names), clear=True)

    @rule(nth=st.integers(1, 70))
    def back_up_and_kill(self, nth: int) -> None:
        self._back_up(lambda: killed_run(self.site, self.sim, self.directory, self.names, point="V[MD]*", nth=nth))

    def _back_up(self, run: Any, *, clear: bool = False) -> None:
        held = {name: [self.site.content(vdi) for vdi in self.sim.disks(name)] for name in self.names}
        self.sim.do("coalesce")
        try:
            run()
        except PoolError:
            pass
        finally:
            if clear:
                self.sim.clear()
        for name, point in self._newest().items():
            for content, disk in zip(held[name], point.disks, strict=True):
                assert self.site.engine.read(disk) == content, f"{name}, disk {disk.number}"

    def _newest(self) -> dict[str, RestorePoint]:
        """The newest points of VMs that have a new one."""
        points = self.site.engine.points()
        found: dict[str, RestorePoint] = {}
        for name in self.names:
            own = [point for point in points if point.vm_name == name]
            if len(own) > self.points[name]:
                found[name] = own[-1]
            self.points[name] = len(own)
        return found

    def _write(self, name: str, disk: int, at: int, data: bytes) -> None:
        vdi = self.sim.disks(name)[disk]
        size = int(self.site.vdi(vdi)["virtual_size"])
        self.sim.guest_write(vdi, at % (size - len(data) + 1), data)

    def _start(self) -> None:
        for name in self.names:
            if self.sim.vm(name)["power_state"] != "Running":
                self.sim.call("VM.start", self._ref(name), False, False)

    def _ref(self, name: str) -> str:
        return f"uuid:VM:{self.sim.vm(name)['uuid']}"

    def teardown(self) -> None:
        if hasattr(self, "place"):
            with self.place:
                self._end()

    def _end(self) -> None:
        self.sim.clear()
        while self.by_hand:
            self.somebody_deletes_a_snapshot()
        for _ in range(2):
            self._back_up(lambda: self.site.run(*self.names))
        assert self.site.leaks() == []
        last = {point.vm_name: point for point in self.site.engine.points()}
        for name in self.names:
            assert methods(last[name]) == ["cbt"] * DISKS
            assert len(self.site.bases(name)) == DISKS
            self.site.check(name, last[name])


def live(sim: XenSim, examples: int, steps: int) -> None:
    profile = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    PoolLife.sim = sim
    run_state_machine_as_test(PoolLife, settings=profile)


def test_a_short_life(sim: XenSim) -> None:
    live(sim, examples=2, steps=10)


@pytest.mark.slow
def test_long_lives(sim: XenSim) -> None:
    live(sim, examples=40, steps=40)
