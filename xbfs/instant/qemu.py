"""QEMU as a locked-up child: a machine without a network, whose console, control and disks are inherited descriptors.

Owns the process and its channels; knows nothing of verdicts. Nothing lies in the file system. QEMU runs as nobody if
we are root, in its own sandbox, and ends with the process that started it. Event-loop thread only: the kernel ends a
child with the *thread* that made it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Final, Self

import trio

from xbfs_engine.core.errors import InstantError
from xbfs_engine.guestfs.worker.kernel import prctl

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

PROGRAM: Final = "qemu-system-x86_64"
SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_OVMF: Final = Path("/usr/share/OVMF")
CODE: Final = _OVMF / "OVMF_CODE_4M.fd"
VARIABLES: Final = _OVMF / "OVMF_VARS_4M.fd"
NOBODY: Final = 65534
"""User and group of nobody (Debian policy 9.2.2)."""
_PR_SET_PDEATHSIG: Final = 1
"""Linux uapi/linux/prctl.h."""
_ERRORS_MAX: Final = 4096
_ANSWER_MAX: Final = 1 << 20
_ANSWER_S: Final = 30.0
"""QEMU answers at once, but under emulation on a busy machine its main loop may wait for a lock of the guest's."""
_KEPT_BYTES: Final = 256 << 10
_RECEIVE_BYTES: Final = 16 << 10
_EVENTS_MAX: Final = 256
_IDE_MAX: Final = 4
_SET: Final = "/dev/fdset/{}"
_AGENT_S: Final = 5.0
_ESCAPE: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_a-z])")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Machine:
    """What is booted. ``disks``: files of raw disks, in the guest's order; written to. ``bus``: ide or virtio.
    ``words``: SMBIOS family, which a test's guest may read."""

    disks: tuple[Path, ...]
    firmware: str
    accelerator: str
    memory_mib: int
    bus: str = "ide"
    words: str = ""


class Console:
    """What a guest wrote to its serial port: the first and the last of it."""

    def __init__(self) -> None:
        self._data = bytearray()
        self.total_bytes = 0

    def add(self, data: bytes) -> None:
        """More of it."""
        self._data += data
        self.total_bytes += len(data)
        if len(self._data) > _KEPT_BYTES:
            del self._data[: len(self._data) - _KEPT_BYTES // 2]

    @property
    def text(self) -> str:
        """What is kept, without what moves the cursor or colours."""
        return _plain(self._data.decode(errors="replace"))


class Qemu:
    """A machine that runs while the context is entered. Raises InstantError if it can not be started."""

    _control: trio.SocketStream
    _serial: trio.SocketStream
    _agent: trio.SocketStream
    _process: subprocess.Popen[bytes]

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.console = Console()
        self.events: list[str] = []
        self.agent_answered = False
        self._descriptors: list[int] = []
        self._screen = -1
        self._received = b""

    def __enter__(self) -> Self:
        program = check_installed()
        if self.machine.firmware == "uefi" and not (CODE.exists() and VARIABLES.exists()):
            raise InstantError(f"{CODE} and {VARIABLES.name} are needed for this guest", hint="apt install ovmf")
        try:
            self._start(program)
        except OSError as exc:
            self._close()
            raise InstantError(f"{PROGRAM} can not be started: {exc}") from exc
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._close()

    @property
    def status(self) -> int | None:
        """How the process ended, None while it runs."""
        return self._process.poll()

    @property
    def errors(self) -> str:
        """What QEMU said on standard error."""
        return os.pread(self._errors, _ERRORS_MAX, 0).decode(errors="replace").strip()

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU time used so far."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def serve(self) -> None:
        """Take what the guest says, until it ends. To be run in a task of its own."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            nursery.start_soon(self._ask_agent)

    async def connect(self) -> None:
        """Greet; before all other requests. Raises InstantError if QEMU does not run."""
        await self._receive()
        await self.ask("qmp_capabilities")

    async def ask(self, command: str, **arguments: object) -> object:
        """One QMP command's result. Raises InstantError if it is refused or QEMU has ended."""
        request = {"execute": command, "arguments": arguments} if arguments else {"execute": command}
        try:
            await self._control.send_all(json.dumps(request).encode() + b"\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise self._ended() from None
        while True:
            answer = await self._receive()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise InstantError(f"QEMU refused {command}: {answer['error']}")

    async def screen(self) -> bytes:
        """The screen as a portable pixmap (P6). Raises InstantError."""
        os.ftruncate(self._screen, 0)
        os.lseek(self._screen_writer, 0, os.SEEK_SET)
        await self.ask("screendump", filename=_SET.format(self._screen_set))
        return os.pread(self._screen, os.fstat(self._screen).st_size, 0)

    def _start(self, program: str) -> None:
        self._errors = self._keep(os.memfd_create("errors"))
        self._screen = self._keep(os.memfd_create("screen"))
        self._screen_writer = self._keep(os.open(f"/proc/self/fd/{self._screen}", os.O_WRONLY | os.O_CLOEXEC))
        self._screen_set = 1
        command = [program, "-S", *_fixed(self.machine), "-add-fd", f"fd={self._screen_writer},set={self._screen_set}"]
        passed = [self._screen_writer]
        for name in ("control", "serial", "agent"):
            ours, theirs = socket.socketpair()
            with theirs:
                setattr(self, f"_{name}", trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
                descriptor = self._keep(os.dup(theirs.fileno()))
            passed.append(descriptor)
            command += ["-chardev", f"socket,id={name},fd={descriptor}"]
        command += ["-mon", "chardev=control,mode=control", "-serial", "chardev:serial"]
        command += ["-device", "virtio-serial", "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
        for number, path in enumerate(self.machine.disks):
            descriptor = self._keep(os.open(path, os.O_RDWR | os.O_CLOEXEC))
            passed.append(descriptor)
            command += ["-add-fd", f"fd={descriptor},set={10 + number}", *_disk(self.machine, number)]
        if self.machine.firmware == "uefi":
            variables = self._keep(os.memfd_create("variables"))
            os.write(variables, VARIABLES.read_bytes())
            passed.append(variables)
            command += ["-add-fd", f"fd={variables},set=2", *_uefi()]
        nobody = NOBODY if os.geteuid() == 0 else None
        parent = os.getpid()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=passed,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
            cwd="/",
            preexec_fn=lambda: _end_with(parent),
            user=nobody,
            group=nobody,
            extra_groups=None if nobody is None else _kvm_group(self.machine),
        )
        for descriptor in passed:
            if descriptor != self._screen_writer:
                os.close(descriptor)
                self._descriptors.remove(descriptor)

    def _keep(self, descriptor: int) -> int:
        self._descriptors.append(descriptor)
        return descriptor

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())
        for name in ("_control", "_serial", "_agent"):
            stream = getattr(self, name, None)
            if stream is not None:
                stream.socket.close()

    async def _listen(self) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await self._serial.receive_some(_RECEIVE_BYTES):
                self.console.add(data)

    async def _ask_agent(self) -> None:
        """What nobody reads yet is dropped by QEMU, so it is asked again."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while not self.agent_answered:
                with trio.move_on_after(_AGENT_S):
                    await self._agent.send_all(b'{"execute": "guest-ping"}\n')
                    self.agent_answered = b'"return"' in await self._agent.receive_some(_RECEIVE_BYTES)
                await trio.sleep(_AGENT_S)

    async def _receive(self) -> dict[str, object]:
        """The next answer; events are kept by name."""
        while True:
            line, found, rest = self._received.partition(b"\n")
            if not found:
                await self._more()
                continue
            self._received = rest
            message = json.loads(line)
            if not isinstance(message, dict):
                raise InstantError("QEMU said what is no object")
            if "event" not in message:
                return message
            if len(self.events) < _EVENTS_MAX:
                self.events.append(str(message["event"]))

    async def _more(self) -> None:
        data = b""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            with trio.move_on_after(_ANSWER_S) as deadline:
                data = await self._control.receive_some(_RECEIVE_BYTES)
            if deadline.cancelled_caught:
                raise InstantError(f"QEMU does not answer within {_ANSWER_S:.0f} s")
        if not data or len(self._received) > _ANSWER_MAX:
            raise self._ended()
        self._received += data

    def _ended(self) -> InstantError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        return InstantError(f"QEMU ended with {self.status}: {self.errors or 'it did not say why'}")


def check_installed() -> str:
    """The path of QEMU. Raises InstantError."""
    program = which(PROGRAM)
    if program is None:
        raise InstantError(f"{PROGRAM} is not installed", hint="apt install qemu-system-x86")
    return program


def _fixed(machine: Machine) -> list[str]:
    """``graphics=off`` lets SeaBIOS, and what boots by its services, write to the serial port as well as the screen."""
    board = "pc,graphics=off" + (",pflash0=code,pflash1=variables" if machine.firmware == "uefi" else "")
    return [
        *("-nodefaults", "-no-user-config", "-name", "xbfs-boot-test", "-sandbox", SANDBOX),
        *("-accel", machine.accelerator, "-cpu", "max", "-M", board, "-m", str(machine.memory_mib)),
        *("-display", "none", "-vga", "std", "-nic", "none", "-device", "pvpanic"),
        *("-smbios", f"type=1,family={machine.words.replace(',', ',,')}"),
        *("-action", "panic=none,shutdown=pause", "-rtc", "base=utc"),
    ]


def _disk(machine: Machine, number: int) -> list[str]:
    ide = machine.bus == "ide" and number < _IDE_MAX
    device = f"ide-hd,bus=ide.{number // 2},unit={number % 2}" if ide else "virtio-blk-pci"
    options = f"drive=disk{number},id=device{number},bootindex={number + 1},werror=stop,rerror=stop"
    node = raw_node(f"disk{number}", _SET.format(10 + number), {"discard": "unmap"})
    return [*node, "-device", f"{device},{options}"]


def raw_node(name: str, file: str, options: Mapping[str, object]) -> list[str]:
    """A node over a file. It needs no lock: nobody else has it, and a lock could not be told from a hanging mount."""
    below = {"driver": "file", "filename": file, "locking": "off", **options}
    return ["-blockdev", json.dumps({"driver": "raw", "node-name": name, "file": below, **options})]


def _uefi() -> list[str]:
    """Nodes that ``_fixed`` names."""
    return [*raw_node("code", str(CODE), {"read-only": True}), *raw_node("variables", _SET.format(2), {})]


def _kvm_group(machine: Machine) -> list[int]:
    """Who may open /dev/kvm."""
    if machine.accelerator != "kvm":
        return []
    with suppress(OSError):
        return [Path("/dev/kvm").stat().st_gid]
    return []


def _end_with(parent: int) -> None:
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _plain(text: str) -> str:
    """Without escape sequences (ECMA-48 5.4) and other control characters."""
    return _CONTROL.sub("", _ESCAPE.sub("", text)).replace("\r", "\n")
