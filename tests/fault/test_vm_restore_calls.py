"""A restore whose n-th call fails, for every n: nothing is left on the pool; or the VM is there, whole.

Calls and transfers fail before and after they took effect, as an error and as a connection that breaks; once, or for
ever from then on, as when a host dies. What the failed restore could not take back the next sweep does.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.engine import pattern
from tests.support.restore_lab import RestoreLab, content, state_of
from tests.support.xensim import MIB, XenSim, default_world, running_sim
from xbfs_engine.core.errors import XbfsError
from xbfs_engine.source.xapi.vm_record import RECORD_KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs_engine.catalog.restore_point import RestorePoint

CALLS_MAX = 200
STEP = 7
"""Of the calls every seventh, from another one on for each effect; all of them with --all."""


class Site:
    """A pool with a VM of one disk, and a point of it."""

    def __init__(self, sim: XenSim, lab: RestoreLab) -> None:
        self.sim, self.lab = sim, lab
        sim.guest_write(sim.disks("db")[0], MIB, pattern(1, MIB))
        self.point: RestorePoint = trio.run(lab.back_up, sim, "db")
        self.bare = replace(self.point, vm={RECORD_KEY: self.point.vm[RECORD_KEY]})
        self.before = state_of(sim)

    def attempt(self, nth: int, effect: str, times: int, way: str = "archive") -> bool:
        """Whether the fault struck; the pool is as before afterwards."""
        point = self.point if way == "archive" else self.bare
        sim = self.sim
        fault = sim.fault("*", effect, nth=nth, times=times, code="INTERNAL_ERROR")
        uuid = None
        try:
            uuid = trio.run(lambda: self.lab.restore(sim, point, name="copy")).made.uuid
        except XbfsError:
            if times == 1:
                # At once; only tasks may wait for a sweep.
                assert without_tasks(state_of(sim)) == without_tasks(self.before), (nth, effect)
        struck = bool(sim.do("wait_fault", number=fault, hits=1, timeout_s=0))
        sim.clear()
        if uuid is not None:
            self.check_whole(uuid)
        trio.run(self.lab.sweep, sim)
        if uuid is not None:
            self.remove(uuid)
        assert state_of(sim) == self.before, (nth, effect)
        return struck

    def check_whole(self, uuid: str) -> None:
        """The VM is complete, and the next sweep leaves it."""
        before = state_of(self.sim)
        trio.run(self.lab.sweep, self.sim)
        assert without_tasks(state_of(self.sim)) == without_tasks(before)
        made = self.sim.vm("copy")
        assert made["uuid"] == uuid
        assert made["blocked_operations"] == {}
        (disk,) = self.sim.disks("copy")
        assert content(self.sim, disk) == self.lab.engine.read(self.point.disks[0])

    def remove(self, uuid: str) -> None:
        (disk,) = self.sim.disks("copy")
        self.sim.call("VM.destroy", f"uuid:VM:{uuid}")
        self.sim.call("VDI.destroy", f"uuid:VDI:{disk}")


def without_tasks(state: dict[str, object]) -> dict[str, object]:
    return {cls: records for cls, records in state.items() if cls != "task"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("restore")
    with running_sim(default_world(), directory / "sim") as sim:
        yield Site(sim, RestoreLab(directory))


EFFECTS = ["fail", "fail_after", "drop", "drop_after"]
WAYS = ["archive", "records"]


@pytest.mark.parametrize(("first", "effect"), list(enumerate(EFFECTS, 1)))
def test_one_call_fails(site: Site, first: int, effect: str) -> None:
    # Some call of a restore does not exist: then all have been tried.
    assert not all(site.attempt(nth, effect, 1, WAYS[first % 2]) for nth in range(first, CALLS_MAX, STEP))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("effect", EFFECTS)
def test_any_call_fails(site: Site, effect: str, way: str) -> None:
    assert not all(site.attempt(nth, effect, 1, way) for nth in range(1, CALLS_MAX))


def test_a_host_that_dies_in_the_middle(site: Site) -> None:
    for nth in range(15, 60, 11):
        site.attempt(nth, "fail", 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("effect", ["fail", "drop"])
def test_a_host_that_dies_anywhere(site: Site, effect: str) -> None:
    assert not all(site.attempt(nth, effect, 10_000) for nth in range(12, CALLS_MAX, 2))


@pytest.mark.slow
@pytest.mark.parametrize("effect", EFFECTS)
def test_any_call_of_a_disk_for_a_running_vm_fails(site: Site, effect: str) -> None:
    sim, struck = site.sim, True
    for nth in range(1, CALLS_MAX):
        fault = sim.fault("*", effect, nth=nth)
        vdi = None
        with suppress(XbfsError):
            done = trio.run(lambda: site.lab.restore_disks(sim, site.point, 0, attach="web"))
            vdi = done.disks[0].made.uuid
        struck = bool(sim.do("wait_fault", number=fault, hits=1, timeout_s=0))
        sim.clear()
        if vdi is not None:
            (vbd,) = (one for one in sim.dump("VBD")["VBD"] if one["VDI"] == vdi)
            assert vbd["currently_attached"] or done.warnings
            if vbd["currently_attached"]:
                sim.call("VBD.unplug", f"uuid:VBD:{vbd['uuid']}")
            sim.call("VBD.destroy", f"uuid:VBD:{vbd['uuid']}")
            sim.call("VDI.destroy", f"uuid:VDI:{vdi}")
        trio.run(site.lab.sweep, sim)
        assert state_of(sim) == site.before, (nth, effect)
        if not struck:
            break
    assert not struck
