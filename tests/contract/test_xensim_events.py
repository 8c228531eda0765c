"""Whoever follows events sees the same objects as the database; many clients at once leave nothing behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import XenAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.xensim import default_world, running_sim
from tests.support.xensim_api import logged_in, vm_of
from tools.xensim import events
from tools.xensim.context import World
from tools.xensim.releases import RELEASES

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tools.xensim.schema import Record

ACTIONS = st.lists(st.tuples(st.sampled_from(["create", "set", "destroy", "look"]), st.integers(0, 5)), max_size=60)


def apply(picture: dict[str, Record], batch: Iterable[Record]) -> None:
    for event in batch:
        if event["operation"] == "del":
            picture.pop(event["ref"], None)
        else:
            assert event["operation"] == ("mod" if event["ref"] in picture else "add")
            picture[event["ref"]] = event["snapshot"]


@settings(max_examples=100, deadline=None)
@given(ACTIONS)
def test_followers_see_what_there_is(actions):
    world = World(None, RELEASES["8.3"])
    refs, picture, token = [], {}, ""
    for number, (action, which) in enumerate([*actions, ("look", 0)]):
        if action == "create":
            refs.append(world.db.create("VM", name_label=str(number)))
        elif action == "look":
            answer = events.events_from(world, ["vm"], token, 0.0)
            apply(picture, answer["events"])
            token = answer["token"]
            assert picture == {ref: world.db.get(ref) for ref in world.db.all("VM")}
            assert events.events_from(world, ["*"], token, 0.0)["events"] == []
        elif refs and action == "set":
            world.db.set(refs[which % len(refs)], name_description=str(number))
        elif refs:
            world.db.destroy(refs.pop(which % len(refs)))


def test_many_clients_at_once_leave_nothing(tmp_path: Path):
    with running_sim(default_world(), tmp_path / "sim") as sim:
        before = sim.dump("VM", "VBD", "VIF", "VTPM")

        def snapshots_come_and_go(number: int) -> int:
            done = 0
            with logged_in(sim, originator=f"xbfs/{number}") as api:
                for _ in range(4):
                    try:
                        snapshot = api.VM.snapshot(vm_of(api, ("web", "db")[number % 2]), f"by {number}", [])
                    except XenAPI.Failure as failure:
                        assert failure.details[0] == "OTHER_OPERATION_IN_PROGRESS"  # noqa: PT017
                        continue
                    disks = [api.VBD.get_VDI(vbd) for vbd in api.VM.get_VBDs(snapshot) if not api.VBD.get_empty(vbd)]
                    api.VM.destroy(snapshot)
                    for disk in disks:
                        api.VDI.destroy(disk)
                    done += 1
            return done

        with ThreadPoolExecutor(6) as threads:
            done = list(threads.map(snapshots_come_and_go, range(6)))
        assert sum(done) > 0
        assert sim.dump("VM", "VBD", "VIF", "VTPM") == before
        assert not [vdi for vdi in sim.dump("VDI")["VDI"] if vdi["is_a_snapshot"]]
