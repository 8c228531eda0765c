"""A rewind fails, loses an answer, is cancelled or killed, at every call and at every write.

Whatever happened: disks that are neither as before nor as the point can not be started; what was not begun leaves no
trace; and running it again ends it, with the next increment exact.
"""

from __future__ import annotations

import json
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.fake_pool import Fault
from tests.support.rewind_lab import RewindLab
from xbfs_engine.core.errors import TransferFailed, XbfsError
from xbfs_engine.core.limits import KIB, MIB
from xbfs_engine.restore.rewind.guard import half_written
from xbfs_engine.source.xapi.sweep import sweep

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BLOCK = 64 * KIB
CALLS_MIN, CALLS_MAX = 40, 200

EVERY = pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 9])
"""Every call, or some."""


class KilledError(BaseException):
    """The process is no more: nothing it does from here on has any effect."""


class Scene:
    """A VM of two disks that has a point, and was written to since."""

    def __init__(self, directory: Path) -> None:
        self.lab = RewindLab(directory)
        self.pool = self.lab.pool
        self.vm = self.pool.vm("web")
        self.vdis = [self.pool.disk(self.vm, number, size_bytes=MIB, content=b"a" * MIB) for number in range(2)]
        self.point = self.lab.backup(self.vm).point
        self.wanted = self.contents
        for vdi in self.vdis:
            self.pool.write(vdi, 2 * BLOCK, b"b" * BLOCK)
            self.pool.write(vdi, 9 * BLOCK, bytes(BLOCK))
        self.present = self.contents
        self.calls = self.writes = 0

    @property
    def contents(self) -> list[bytes]:
        return [bytes(self.pool.content[vdi]) for vdi in self.vdis]

    def rewind(self) -> None:
        self.lab.rewind(self.vm, self.point, safety=True, stop=True, start=True)

    def kill_at(self, call: int = 0, write: int = 0) -> None:
        """Die before call or write number ``call``, ``write`` from now on."""
        dead = False

        async def before_call(_number: int, method: str) -> None:
            nonlocal dead
            del method
            self.calls += 1
            dead = dead or self.calls == call
            if dead:
                raise KilledError

        def before_write() -> None:
            nonlocal dead
            self.writes += 1
            dead = dead or self.writes == write
            if dead:
                raise KilledError

        self.pool.before_call, self.lab.disks.before_write = before_call, before_write

    def at_call(self, number: int, action: Callable[[str], None]) -> None:
        """Call ``action`` with the method right before call ``number`` from now on."""

        async def before_call(_number: int, method: str) -> None:
            self.calls += 1
            if self.calls == number:
                action(method)

        self.pool.before_call = before_call

    def fail_next(self, code: str, after: bool, method: str) -> None:
        self.pool.faults.append(Fault(method, code, after=after))

    def revive(self) -> None:
        self.pool.before_call, self.lab.disks.before_write = None, lambda: None
        self.pool.faults.clear()

    def check(self) -> None:
        """What is allowed to be, once the sweep was here; then to the end."""
        self.lab.run(lambda: sweep(self.pool, self.lab.ledgers, node="test", dry_run=False))
        blocked = self.pool.blocked(self.vm)
        if half_written(blocked) is None:
            assert blocked == {}
            assert self.contents in (self.present, self.wanted)
        else:
            assert set(blocked) == {"start", "start_on", "snapshot", "pool_migrate", "migrate_send"}
            assert self.pool.db.text(self.vm, "power_state") == "Halted"
        with suppress(XbfsError):
            self.pool.VM_clean_shutdown(self.vm)
        self.rewind()
        assert self.contents == self.wanted
        assert self.pool.blocked(self.vm) == {}
        assert self.pool.db.text(self.vm, "power_state") == "Running"
        after = self.lab.backup(self.vm).point
        assert [disk.method for disk in after.disks] == ["cbt", "cbt"]
        self.lab.check_point(after, dict(enumerate(self.wanted)))
        # A snapshot that a dead run was about to ask for may yet come: the sweep keeps the note for an hour.
        assert set(self.lab.noted()) <= {"snapshot"}
        assert self.pool.leftovers() == []


def ending_of(scene: Scene) -> BaseException | None:
    try:
        scene.rewind()
    except BaseException as exc:
        return exc
    return None


@EVERY
def test_killed_before_every_call(tmp_path: Path, step: int) -> None:
    for number in range(step, CALLS_MAX, step):
        scene = Scene(tmp_path / str(number))
        scene.kill_at(call=number)
        ending = ending_of(scene)
        if ending is None:
            assert number > CALLS_MIN
            return
        assert _is_killed(ending), repr(ending)
        scene.revive()
        scene.check()
    pytest.fail("a rewind makes more calls than that")


@pytest.mark.parametrize("number", range(1, 5))
def test_killed_before_every_write(tmp_path: Path, number: int) -> None:
    scene = Scene(tmp_path)
    scene.kill_at(write=number)
    with pytest.raises(BaseException) as caught:
        scene.rewind()
    assert _is_killed(caught.value)
    scene.revive()
    left = half_written(scene.pool.blocked(scene.vm))
    assert left is not None
    assert left.point == scene.point.id[:16]
    assert left.safety == scene.lab.engine.points()[-1].id[:16]
    scene.check()


@EVERY
@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer lost"])
def test_every_call_fails(tmp_path: Path, step: int, *, after: bool) -> None:
    # A refusal that does not pass, or a connection that breaks behind the call.
    code = "UNREACHABLE" if after else "INTERNAL_ERROR"
    for number in range(step, CALLS_MAX, step):
        scene = Scene(tmp_path / str(number))
        scene.at_call(number, partial(scene.fail_next, code, after))
        with suppress(XbfsError):
            scene.rewind()
        if scene.calls < number:
            assert number > CALLS_MIN
            return
        scene.revive()
        scene.check()
    pytest.fail("a rewind makes more calls than that")


async def cancelled_at(scene: Scene, number: int) -> None:
    with trio.CancelScope() as scope:
        scene.at_call(number, lambda _method: scope.cancel())
        await scene.lab.rewinding(scene.vm, scene.point, safety=True, stop=True, start=True)


@EVERY
def test_cancelled_at_every_call(tmp_path: Path, step: int) -> None:
    for number in range(step, CALLS_MAX, step):
        scene = Scene(tmp_path / str(number))
        scene.lab.run(partial(cancelled_at, scene, number))
        if scene.calls < number:
            assert number > CALLS_MIN
            return
        scene.revive()
        scene.check()
    pytest.fail("a rewind makes more calls than that")


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_transfers_that_break_are_tried_three_times(tmp_path: Path, failures: int) -> None:
    scene = Scene(tmp_path)
    left = failures

    def break_off() -> None:
        nonlocal left
        if left:
            left -= 1
            raise TransferFailed("hung up")

    scene.lab.disks.before_write = break_off
    if failures < 3:
        scene.rewind()
        assert scene.contents == scene.wanted
    else:
        with pytest.raises(TransferFailed):
            scene.rewind()
        scene.revive()
        assert half_written(scene.pool.blocked(scene.vm)) is not None
        scene.check()


def test_the_ledger_says_it_before_the_first_write(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.kill_at(write=1)
    with pytest.raises(BaseException) as caught:
        scene.rewind()
    assert _is_killed(caught.value)
    lines = [json.loads(line) for path in (tmp_path / "runs").glob("*.jsonl") for line in path.read_text().splitlines()]
    noted = [line["about"] for line in lines if "rewind" in line.get("about", {})]
    assert noted == [{"rewind": scene.point.id, "safety": scene.lab.engine.points()[-1].id}]


def _is_killed(exc: BaseException) -> bool:
    """Whether it is the end that the test made, alone or within what a nursery made of it."""
    if isinstance(exc, BaseExceptionGroup):
        return all(_is_killed(inner) for inner in exc.exceptions)
    return isinstance(exc, KilledError)
