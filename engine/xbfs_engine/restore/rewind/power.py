"""Stopping and starting the VM that is rewound. Never hard: a guest that does not stop is its owner's matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import VmNotReady, XapiFailure
from xbfs_engine.source.xapi.failures import TASK_TIMEOUT

if TYPE_CHECKING:
    from xbfs_engine.source.xapi.inventory import Vm
    from xbfs_engine.source.xapi.patience import Patience
    from xbfs_engine.source.xapi.session import Xapi

HALTED: Final = "Halted"
RUNNING: Final = "Running"
STOP_S: Final = 600.0
"""How long a guest may take to shut down by default; Windows with updates takes minutes."""

_START_S: Final = 600.0


async def stop(xapi: Xapi, vm: Vm, *, timeout_s: float) -> None:
    """Shut the guest down cleanly and wait for it. Raises VmNotReady, PoolError."""
    try:
        await xapi.run_task("VM.clean_shutdown", vm.ref, timeout_s=timeout_s)
    except XapiFailure as exc:
        if await xapi.call("VM.get_power_state", vm.ref) == HALTED:
            return
        late = exc.code == TASK_TIMEOUT
        raise VmNotReady(
            f"{vm.name!r} did not shut down" + (f" within {timeout_s:g} s" if late else f": {exc.message}"),
            hint="shut it down yourself, then run the rewind again; it is never switched off hard",
        ) from exc


async def start(xapi: Xapi, patience: Patience, vm: Vm) -> None:
    """Start it. Raises PoolError."""
    await patience.get(
        lambda: xapi.run_task("VM.start", vm.ref, False, False, timeout_s=_START_S), "VM.start", repeatable=False
    )


def check_stoppable(vm: Vm, *, wanted: bool) -> None:
    """Raise VmNotReady unless the VM is halted, or runs and shall be stopped."""
    if vm.power_state == HALTED or (wanted and vm.power_state == RUNNING):
        return
    if vm.power_state == RUNNING:
        raise VmNotReady(f"{vm.name!r} runs", hint="shut it down, or pass --stop (and --start)")
    raise VmNotReady(
        f"{vm.name!r} is {vm.power_state.lower()}: its memory would not fit to its disks any more",
        hint="resume it and shut it down, or give up its state with `xe vm-reset-powerstate` or a hard shutdown",
    )
