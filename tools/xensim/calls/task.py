"""task.*: tasks of clients' own making, cancelling, forgetting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..failures import Failure
from . import call

if TYPE_CHECKING:
    from ..context import Context
    from ..schema import Ref

_ENDED: Final = frozenset({"success", "failure", "cancelled"})


@call("task.create", role="read-only")
def create(ctx: Context, label: str, description: str) -> Ref:
    """A pending task that a transfer will report to."""
    return ctx.world.tasks.create(ctx, label, description).ref


@call("task.destroy", role="read-only")
def destroy(ctx: Context, task: Ref) -> None:
    """Forget a task."""
    ctx.world.tasks.destroy(task)


@call("task.cancel", role="read-only")
def cancel(ctx: Context, task: Ref) -> None:
    """Ask a task to stop; it does when it next looks."""
    handle = ctx.world.tasks.get(task)
    if handle.ended is not None:
        raise Failure("OPERATION_NOT_ALLOWED", "the task has ended")
    handle.cancel()


@call("task.set_status", role="read-only")
def set_status(ctx: Context, task: Ref, value: str) -> None:
    """Let a client end its own task."""
    handle = ctx.world.tasks.get(task)
    if value in _ENDED:
        handle.end(value)
    else:
        ctx.db.set(task, status=value)
