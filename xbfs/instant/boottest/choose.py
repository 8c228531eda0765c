"""Which firmware a point wants, and which accelerator works here. Blocking."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Final

from xbfs.instant.qemu import PROGRAM, raw_node
from xbfs_engine.core.errors import XbfsError
from xbfs_engine.formats.partitions import read_partitions

if TYPE_CHECKING:
    from xbfs_engine.catalog.restore_point import RestorePoint

BIOS: Final = "bios"
UEFI: Final = "uefi"
_ESP: Final = {"c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "0xef"}
"""Types of EFI system partitions (UEFI 2.10, 5.3.3 and 5.2.2)."""
_PROBE_S: Final = 10.0
_PROBE_EXIT: Final = 0x2A << 1 | 1
"""What isa-debug-exit makes of the number that the probe writes."""
_PROBE: Final = (
    bytes.fromhex(
        "fa31c08ed88ec08ed0bc007c660f0116d87c0f20c00c010f22c066ea227c0000080066b810008ed88ec08ed0bc007c00009c6a08683a7c"
        "0000cf31c0bf00000100b9000c0000f3abc7050000010003100100c7050010010003200100c7050020010083000000b8000001000f22d8"
        "0f20e00c200f22e0b9800000c00f3280cc010f300f20c00d000000800f22c0ea947c00001800bc007c00006a1068007c00009c6a1868aa"
        "7c000048cfb02ae6f4f4ebf90f1f80000000000000000000000000ffff0000009acf00ffff00000092cf00ffff0000009aaf001f00b87c"
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)
"""A boot sector: protected mode and an interrupt return, long mode and an interrupt return, then 0x2a to port 0xf4.

A KVM that can not run unmodified guests was seen to open /dev/kvm, run the firmware and fail at such a return.
"""


class _Disk:
    """A file as a BlockSource."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.size_bytes = path.stat().st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Bytes of it."""
        with self._path.open("rb") as file:
            return os.pread(file.fileno(), length, offset)


def firmware_of(point: RestorePoint, first_disk: Path) -> str:
    """What the VM's record says; without one, UEFI for a GPT that has an EFI system partition."""
    said = recorded_firmware(point.vm)
    if said is not None:
        return said
    with suppress(XbfsError, OSError):
        table = read_partitions(_Disk(first_disk))
        if table is not None and table.kind == "gpt" and any(part.type_id in _ESP for part in table.partitions):
            return UEFI
    return BIOS


def accelerator_that_works() -> str:
    """kvm if a real boot under it works here, else tcg."""
    return "kvm" if Path("/dev/kvm").exists() and runs_under("kvm") else "tcg"


def runs_under(accelerator: str) -> bool:
    """Whether a boot sector that goes through the processor's modes comes to its end."""
    program = which(PROGRAM)
    if program is None:
        return False
    disk = os.memfd_create("probe")
    try:
        os.write(disk, _PROBE)
        done = subprocess.run(
            [
                *(program, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-sandbox", "on"),
                *("-accel", accelerator, "-cpu", "max", "-M", "pc", "-m", "16"),
                *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
                *(
                    "-add-fd",
                    f"fd={disk},set=1",
                    *raw_node("probe", "/dev/fdset/1", {}),
                    "-device",
                    "ide-hd,drive=probe",
                ),
            ],
            pass_fds=[disk],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_PROBE_S,
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError):
        return False
    finally:
        os.close(disk)
    return done.returncode == _PROBE_EXIT


def recorded_firmware(record: object) -> str | None:
    """Of HVM_boot_params, wherever the record of a VM keeps it."""
    match record:
        case {"HVM_boot_params": {"firmware": "uefi" | "bios" as firmware}}:
            return str(firmware)
        case dict():
            return next((found for value in record.values() if (found := recorded_firmware(value)) is not None), None)
        case _:
            return None
