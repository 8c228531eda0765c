"""A guest in QEMU without acceleration (/dev/kvm may be there and not work), its serial console, and QMP."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

_QEMU = "qemu-system-x86_64"
_FIRMWARE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
BOOT_S = 180
"""How long a boot may take: 119 s were seen on a machine with a load of 50."""


class Guest:
    """A running machine. ``blockdev``: QEMU's options of its only disk, without a node name; ``objects``: what they
    refer to. ``words``: what the guest should do. ``prefix``: a command that runs QEMU, such as nsenter. ``screen``:
    the unix socket where it is drawn by RFB."""

    def __init__(
        self,
        blockdev: Mapping[str, object],
        scratch: Path,
        *,
        words: str = "",
        uefi: bool = False,
        objects: Sequence[str] = (),
        prefix: Sequence[str] = (),
        screen: Path | None = None,
    ) -> None:
        if shutil.which(_QEMU) is None:
            pytest.skip(f"{_QEMU} is not installed")
        scratch.mkdir(parents=True, exist_ok=True)
        self._console, self._errors = scratch / "console", scratch / "qemu.err"
        self._socket = scratch / "qmp"
        self._socket.unlink(missing_ok=True)
        self._console.write_bytes(b"")
        command = [
            *prefix,
            _QEMU,
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-M",
            "q35",
            "-m",
            "384",
            "-nodefaults",
            "-no-reboot",
        ]
        drawn = ["-display", "none"] if screen is None else ["-vga", "std", "-vnc", f"unix:{screen}"]
        command += [*drawn, "-net", "none", "-serial", f"file:{self._console}"]
        command += ["-qmp", f"unix:{self._socket},server=on,wait=off", "-smbios", f"type=1,family={words}"]
        if uefi:
            command += ["-drive", f"if=pflash,format=raw,readonly=on,file={_FIRMWARE}"]
        for one in objects:
            command += ["-object", one]
        command += ["-blockdev", json.dumps({**blockdev, "node-name": "disk"})]
        command += ["-device", "virtio-blk-pci,drive=disk,werror=stop,rerror=stop"]
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """kill -9, and wait."""
        self.process.kill()
        self.process.wait()

    def console(self) -> str:
        """All that was printed so far."""
        return self._console.read_text(errors="replace")

    def wait_for(self, text: str, *, count: int = 1, timeout_s: float = BOOT_S) -> str:
        """Wait until the console shows ``text`` so many times; returns all it shows."""
        end = time.monotonic() + timeout_s
        while (shown := self.console()).count(text) < count:
            ended = self.process.poll()
            # What it printed last may have come between the two looks.
            if ended is not None and self.console().count(text) < count:
                raise AssertionError(f"QEMU ended with {ended}: {self._errors.read_text()}\n{shown[-2000:]}")
            if time.monotonic() > end:
                raise AssertionError(f"no {text!r} in {timeout_s} s: {self._errors.read_text()}\n{shown[-2000:]}")
            time.sleep(0.05)
        return shown

    def wait(self, *, timeout_s: float = BOOT_S) -> str:
        """Wait until the guest has powered itself off; returns its console."""
        ended = self.process.wait(timeout_s)
        assert ended == 0, self._errors.read_text()
        return self.console()

    def qmp(self, command: str, **arguments: object) -> Any:
        """One QMP command on a connection of its own; its return value."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(self._socket))
            with connection.makefile("rw") as lines:
                lines.readline()
                for request in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                    lines.write(json.dumps(request) + "\n")
                    lines.flush()
                    while not {"return", "error"} & (answer := json.loads(lines.readline())).keys():
                        pass
        assert "return" in answer, answer
        return answer["return"]


def file_disk(path: Path, *, driver: str = "raw", cache_direct: bool = False) -> dict[str, object]:
    """A disk in a file; ``driver``: raw or vpc."""
    file = {"driver": "file", "filename": str(path), "cache": {"direct": cache_direct}}
    return {"driver": driver, "file": file, "discard": "unmap"}
