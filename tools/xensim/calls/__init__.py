"""The calls of XAPI: registry, look-up, roles, parameters. Modules of this package register theirs with ``call``.

An implementation is ``def snapshot(ctx, vdi, driver_params=None)``: parameters arrive checked and converted to the
published types (int, bool, float, datetime, list, dict), references unchecked. Getters and plain setters of every class
come from generic.py, ``Async.`` of every implementation comes from tasks.py.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, NamedTuple

from .. import schema
from ..failures import Failure
from ..schema import Parameter
from . import generic, wire

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..context import Context
    from ..schema import Value


class Call(NamedTuple):
    """One call: ``run(ctx, *arguments)``; ``role`` is the least that may make it."""

    method: str
    role: str
    run: Callable[..., Value | None]
    params: tuple[Parameter, ...]
    result: str
    session: bool  # called with one
    asynchronous: bool


_CALLS: dict[str, Call] = {}
_GENERIC: dict[str, Call] = {}


def call(
    method: str, *, role: str, session: bool = True
) -> Callable[[Callable[..., Value | None]], Callable[..., Value | None]]:
    """Register an implementation; what is not published gets its parameters from the signature, untyped.

    ``session=False`` marks what is called without a session (its published first parameter is not one).
    """

    def register(run: Callable[..., Value | None]) -> Callable[..., Value | None]:
        published = schema.message(method)
        if published:
            params, result = published.params, published.result
        else:
            names = list(inspect.signature(run).parameters.values())[1:]
            params = tuple(Parameter(name.name, "any", name.default is name.empty) for name in names)
            result = "any"
        assert method not in _CALLS, method
        _CALLS[method] = Call(method, role, run, params, result, session, asynchronous=session)
        return run

    return register


def load() -> None:
    """Import every module of this package, so that all calls are registered."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def registered() -> dict[str, Call]:
    """All implementations by name."""
    return dict(_CALLS)


def find(method: str) -> Call | None:
    """The implementation of ``Class.name``, registered or generic."""
    found = _CALLS.get(method) or _GENERIC.get(method)
    if found is None and (plain := generic.find(method)):
        found = _GENERIC[method] = Call(*plain, session=True, asynchronous=False)
    return found


def prepare(ctx: Context, method: str, args: Sequence[Value]) -> tuple[Call, list[Value]]:
    """The implementation of a call from outside and its arguments, converted. Raises Failure."""
    release = ctx.world.release
    found = find(method)
    if found is None or method in release.missing:
        raise Failure("MESSAGE_METHOD_UNKNOWN", method)
    most = release.max_params.get(method, len(found.params))
    least = sum(param.required for param in found.params)
    if not least <= len(args) <= most:
        raise Failure("MESSAGE_PARAMETER_COUNT_MISMATCH", method, str(most), str(len(args)))
    pairs = zip(found.params, args, strict=False)
    return found, [wire.convert(param.type, value, param.name) for param, value in pairs]


def execute(ctx: Context, method: str, args: Sequence[Value]) -> Value:
    """A call from outside: existence, parameters, role, then ``invoke``. Raises Failure."""
    found, converted = prepare(ctx, method, args)
    ctx.require(found.role, method.lower())
    return invoke(ctx, method, converted)


def invoke(ctx: Context, method: str, args: Sequence[Value]) -> Value:
    """Run a call with converted arguments; faults strike here. Void results are the empty string. Raises Failure."""
    found = find(method)
    assert found, method
    first = args[0] if args and isinstance(args[0], str) else ""
    fault = ctx.world.faults.take(method, first)
    if fault:
        if fault.effect == "kill_session" and ctx.session:
            ctx.world.sessions.end(ctx.session.ref)
            raise Failure("SESSION_INVALID", ctx.session.ref)
        fault.before(ctx.world.clock)
    result = found.run(ctx, *args)
    if fault:
        fault.after()
    return "" if result is None else result
