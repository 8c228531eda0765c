"""Boot tests in QEMU on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from xbfs.cli.boot_test_ground import Ground
from xbfs.instant import client
from xbfs.instant.boottest.choose import accelerator_that_works, firmware_of, runs_under
from xbfs.instant.boottest.run import examine
from xbfs.instant.qemu import Machine, check_installed
from xbfs.instant.session import DiskFormat, Export, Session, SessionDisk
from xbfs_engine.core.errors import InstantError, UsageError

if TYPE_CHECKING:
    import argparse
    from contextlib import ExitStack

    from xbfs.cli.boot_test_ground import Trial
    from xbfs_engine.catalog.restore_point import RestorePoint

AUTO: Final = "auto"
MEMORY_MIB: Final = 1024
BUS: Final = "ide"


def accelerator_of(arguments: argparse.Namespace) -> str:
    """ "kvm" or "tcg". Raises UsageError for wishes about a pool, InstantError if what is wanted does not work."""
    check_installed()
    if arguments.host is not None or arguments.server is not None:
        raise UsageError("--host and --server are about a pool", hint="name it with --pool POOL, or leave them out")
    if arguments.accel in (None, AUTO):
        return accelerator_that_works()
    if arguments.accel == "kvm" and not runs_under("kvm"):
        raise InstantError("a boot under KVM does not work on this machine", hint="use --accel tcg, which is slow")
    return str(arguments.accel)


@dataclass(frozen=True, slots=True)
class Here(Ground):
    """Disks as local files."""

    accelerator: str

    def prepare(self, point: RestorePoint, sessions: ExitStack) -> Trial:
        """A session whose disks are files, and the machine over them."""
        name, clock = self.session_name(point), self.repository.runtime.clock
        disks = tuple(SessionDisk(disk.number, DiskFormat.RAW, f"{disk.number}.raw") for disk in point.disks)
        plan = Session(name, point.id, point.vm_name, clock.now_ns(), Export.FILE, disks)
        running = client.begin(self.repository, self.catalog, self.index, plan)
        arguments = self.arguments
        if not arguments.keep:
            sessions.callback(client.discard, self.repository, name, force=True)
        files = []
        for disk in sorted(point.disks, key=lambda disk: disk.number):
            file = running.places[str(disk.number)].file
            if file is None:
                raise InstantError(f"disk {disk.number} of session {name} is not there")
            files.append(file)
        firmware = arguments.firmware
        if firmware in (None, AUTO):
            firmware = firmware_of(point, files[0])
        memory_mib, bus = arguments.memory or MEMORY_MIB, arguments.bus or BUS
        machine = Machine(tuple(files), firmware, self.accelerator, memory_mib, bus)
        return partial(examine, self.examination(point, self.accelerator, firmware), machine, clock)
