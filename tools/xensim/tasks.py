"""Tasks: what asynchronous calls and transfers report to. Any thread may call it."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from . import calls, rpc
from .failures import DropConnection, Failure
from .schema import NULL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .context import Context, World
    from .schema import Ref, Value

# xen-api: finished tasks are dropped after 65 minutes, pending ones after 24 hours, and only so many are kept.
FINISHED_S: Final = 65 * 60.0
PENDING_S: Final = 86400.0
MOST_KEPT: Final = 200
MOST_PENDING: Final = 1000


class Task:
    """The handle of one task; a task that somebody destroyed takes no reports."""

    def __init__(self, world: World, ref: Ref, session: Ref) -> None:
        self._world = world
        self.ref = ref
        self.session = session
        self.started = world.clock.monotonic()
        self.ended: float | None = None
        self._cancel = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked the task to stop."""
        return self._cancel.is_set()

    def check(self) -> None:
        """Raises Failure TASK_CANCELLED if somebody asked the task to stop."""
        if self.cancelled:
            raise Failure("TASK_CANCELLED", self.ref)

    def progress(self, fraction: float) -> None:
        """Report how much is done, 0 to 1."""
        self._report(progress=fraction)

    def cancel(self) -> None:
        """Ask the task to stop."""
        self._cancel.set()
        self._report(status="cancelling")

    def succeed(self, result: str = "") -> None:
        """The work is done; ``result`` as XAPI writes it."""
        self._finish(status="success", progress=1.0, result=result)

    def fail(self, failure: Failure) -> None:
        """The work failed."""
        status = "cancelled" if failure.code == "TASK_CANCELLED" else "failure"
        self._finish(status=status, progress=1.0, error_info=failure.description)

    def end(self, status: str) -> None:
        """Somebody declares it over: success, failure or cancelled."""
        self._finish(status=status)

    def _finish(self, **fields: Value) -> None:
        if self.ended is None:
            self.ended = self._world.clock.monotonic()
            self._report(finished=self._world.clock.now(), allowed_operations=[], **fields)

    def _report(self, **fields: Value) -> None:
        db = self._world.db
        with db.lock:
            if db.exists(self.ref):
                db.set(self.ref, **fields)


class Tasks:
    """All tasks of the pool."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._tasks: dict[Ref, Task] = {}

    def create(self, ctx: Context, label: str, description: str = "", parent: Ref = NULL) -> Task:
        """A new pending task. Raises Failure TOO_MANY_PENDING_TASKS."""
        with self._world.db.lock:
            self._drop_old()
            if sum(task.ended is None for task in self._tasks.values()) >= MOST_PENDING:
                raise Failure("TOO_MANY_PENDING_TASKS")
            ref = ctx.db.create(
                "task",
                name_label=label,
                name_description=description,
                allowed_operations=["cancel"],
                created=self._world.clock.now(),
                status="pending",
                resident_on=ctx.host,
                type="<none/>",
                subtask_of=parent,
            )
            task = self._tasks[ref] = Task(self._world, ref, ctx.session.ref if ctx.session else NULL)
            return task

    def get(self, ref: Ref) -> Task:
        """The handle. Raises Failure HANDLE_INVALID."""
        with self._world.db.lock:
            return self._tasks[self._world.db.check("task", ref)]

    def destroy(self, ref: Ref) -> None:
        """Forget a task, whether it runs or not. Raises Failure HANDLE_INVALID."""
        with self._world.db.lock:
            self.get(ref)
            del self._tasks[ref]
            self._world.db.destroy(ref)

    def pending_of(self, session: Ref) -> bool:
        """Whether a session has a task that runs."""
        return any(task.ended is None and task.session == session for task in self._tasks.values())

    def start(self, ctx: Context, method: str, args: Sequence[Value]) -> Ref:
        """``Async.method``: runs in a thread; returns the task's reference. Raises Failure for unknown calls."""
        found, _ = calls.prepare(ctx, method, args)
        if not found.asynchronous:
            raise Failure("MESSAGE_METHOD_UNKNOWN", f"Async.{method}")
        task = self.create(ctx, f"Async.{method}")
        name = f"task {method}"
        threading.Thread(target=self._run, args=(ctx, task, method, args), name=name, daemon=True).start()
        return task.ref

    def _run(self, ctx: Context, task: Task, method: str, args: Sequence[Value]) -> None:
        try:
            result = calls.execute(replace(ctx, task=task), method, args)
            task.succeed(rpc.fragment(result))
        except Failure as failure:
            task.fail(failure)
        except DropConnection:
            task.fail(Failure("INTERNAL_ERROR", "the connection of a task was dropped"))
        except Exception as exc:
            task.fail(Failure("INTERNAL_ERROR", repr(exc)))
            raise

    def _drop_old(self) -> None:
        now = self._world.clock.monotonic()
        for ref, task in list(self._tasks.items()):
            if now - (task.ended or task.started) > (FINISHED_S if task.ended else PENDING_S):
                self.destroy(ref)
        finished = sorted((task for task in self._tasks.values() if task.ended), key=lambda task: task.ended or 0.0)
        for task in finished[: max(0, len(self._tasks) - MOST_KEPT)]:
            self.destroy(task.ref)
