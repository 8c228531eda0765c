"""A simulated XenServer pool in a process of its own, and what only a test may do to it."""

from __future__ import annotations

import base64
import json
import select
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.cli import COMMAND, TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
GIB = 1 << 30
READY_S = 30.0
CONTROL_S = 60.0
SLEEPY = 0.02  # delays of the pool last a fiftieth of theirs
BACKUP_USER = {"name": "backup", "password": "backup-password", "role": "vm-power-admin"}


class XenSimError(Exception):
    """The simulator refused a control operation or did not start."""


@dataclass(frozen=True)
class SimHost:
    """A host as its simulator announces it; ``fingerprint`` is the SHA-256 of its certificate, colon hex."""

    name: str
    address: str
    port: int
    fingerprint: str
    uuid: str

    @property
    def url(self) -> str:
        return f"https://{self.address}:{self.port}"


class XenSim:
    """A running simulator: where its hosts are, and the control operations. One thread at a time."""

    def __init__(self, ready: Mapping[str, Any]) -> None:
        self.hosts = [SimHost(**host) for host in ready["hosts"]]
        self.root_password = str(ready["root_password"])
        self.pid = int(ready["pid"])
        self.control_path = str(ready["control"])
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(CONTROL_S)
        self._socket.connect(self.control_path)
        self._lines = self._socket.makefile("rwb")

    @property
    def master(self) -> SimHost:
        """The first host: master unless ``set_master`` said otherwise."""
        return self.hosts[0]

    def do(self, op: str, **request: Any) -> Any:
        """Any control operation by name; raises XenSimError."""
        self._lines.write(json.dumps({"op": op, **request}).encode() + b"\n")
        self._lines.flush()
        line = self._lines.readline()
        if not line:
            raise XenSimError("the simulator is gone")
        answer = json.loads(line)
        if not answer["ok"]:
            raise XenSimError(answer["error"])
        return answer["result"]

    def call(self, method: str, *args: Any) -> Any:
        """A call as the pool itself; an object may be given as ``uuid:CLASS:UUID``."""
        return self.do("call", method=method, args=args)

    def fault(self, point: str, effect: str, **more: Any) -> int:
        """Set a fault (tools/xensim/faults.py has the fields and effects); returns its number."""
        return int(self.do("fault", point=point, effect=effect, **more))

    def clear(self, number: int | None = None) -> None:
        """Take back one fault or all, and let go what they hold."""
        self.do("clear", number=number)

    def wait_fault(self, number: int, *, hits: int = 1, timeout_s: float = 20.0) -> None:
        """Wait until a fault has struck; raises XenSimError if it does not in time."""
        if not self.do("wait_fault", number=number, hits=hits, timeout_s=timeout_s):
            raise XenSimError(f"fault {number} did not strike in {timeout_s} s")

    def advance(self, seconds: float) -> None:
        """Skip time."""
        self.do("advance", seconds=seconds)

    def guest_write(self, vdi: str, offset: int, data: bytes) -> None:
        """Write to a VDI (by uuid) as its guest."""
        self.do("guest_write", vdi=vdi, offset=offset, data=base64.b64encode(data).decode())

    def guest_write_file(self, vdi: str, path: Path, extents: Iterable[tuple[int, int]] = ()) -> None:
        """Copy extents (offset, length) of a file, or all of it, to the same places of a VDI, as its guest."""
        self.do("guest_write_file", vdi=vdi, path=str(path), extents=[list(extent) for extent in extents])

    def read(self, vdi: str, offset: int, length: int) -> bytes:
        """Bytes of a VDI (by uuid)."""
        return base64.b64decode(self.do("read", vdi=vdi, offset=offset, length=length))

    def read_file(self, vdi: str, path: Path) -> None:
        """All bytes of a VDI into a (sparse) file."""
        self.do("read_file", vdi=vdi, path=str(path))

    def dump(self, *classes: str) -> dict[str, list[dict[str, Any]]]:
        """Records by class, with uuids instead of references; without arguments all classes where things leak."""
        return dict(self.do("dump", **({"classes": classes} if classes else {})))

    def journal(self, since: int = 0) -> list[dict[str, str]]:
        """Calls and transfers that have ended: method, argument, user, originator, status."""
        return list(self.do("journal", since=since))

    def vm(self, name: str) -> dict[str, Any]:
        """The record of the VM (no snapshot, no template) with a name."""
        (found,) = [
            vm
            for vm in self.dump("VM")["VM"]
            if vm["name_label"] == name and not vm["is_a_snapshot"] | vm["is_a_template"]
        ]
        return found

    def disks(self, name: str) -> list[str]:
        """The uuids of the VDIs of a VM's disks, by their position."""
        uuid = self.vm(name)["uuid"]
        vbds = [vbd for vbd in self.dump("VBD")["VBD"] if vbd["VM"] == uuid and vbd["type"] == "Disk"]
        return [vbd["VDI"] for vbd in sorted(vbds, key=lambda vbd: int(vbd["userdevice"]))]

    def close(self) -> None:
        """Hang up; the process goes on."""
        self._lines.close()
        self._socket.close()


def signalled_at(
    sim: XenSim, point: str, how: signal.Signals, words: Sequence[str], environment: Mapping[str, str]
) -> int:
    """A command of ours that gets a signal when the pool has done ``point`` and not answered yet; its exit code."""
    fault = sim.fault(point, "hold_after")
    with subprocess.Popen(
        [*COMMAND, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            sim.wait_fault(fault)
        finally:
            process.send_signal(how)
            if how is signal.SIGKILL:
                process.wait(TIMEOUT_S)
            sim.clear(fault)
        return process.wait(TIMEOUT_S)


@contextmanager
def running_sim(
    world: Mapping[str, Any], state: Path, *, release: str = "8.3", time_scale: float = SLEEPY
) -> Iterator[XenSim]:
    """A simulator of ``world`` with its files in ``state``; it ends with the block, and with this process."""
    state.mkdir(parents=True, exist_ok=True)
    (state / "world.json").write_text(json.dumps(world), encoding="utf-8")
    command = [
        *(sys.executable, "-m", "tools.xensim", "--with-parent"),
        *("--world", str(state / "world.json"), "--state", str(state)),
        *("--release", release, "--time-scale", str(time_scale)),
    ]
    with (state / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr)
    assert process.stdin
    assert process.stdout
    try:
        sim = XenSim(_ready(process, state))
        try:
            yield sim
        finally:
            sim.close()
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
    trace = (state / "stderr").read_text(encoding="utf-8", errors="replace")
    if trace:
        raise XenSimError(f"the simulator had trouble of its own:\n{trace}")


def _ready(process: subprocess.Popen[bytes], state: Path) -> dict[str, Any]:
    assert process.stdout
    readable, _, _ = select.select([process.stdout], [], [], READY_S)
    line = process.stdout.readline() if readable else b""
    if not line:
        process.kill()
        process.wait()
        trace = (state / "stderr").read_text(encoding="utf-8", errors="replace")
        raise XenSimError(f"the simulator did not start in {READY_S} s:\n{trace}")
    return dict(json.loads(line))


def default_world(**changes: Any) -> dict[str, Any]:
    """Two hosts, a thin and a thick SR, a VM with two disks that runs and one that is halted, a template."""
    world: dict[str, Any] = {
        "hosts": [{"name": "alpha"}, {"name": "beta"}],
        "users": [BACKUP_USER, {"name": "viewer", "password": "viewer-password", "role": "read-only"}],
        "networks": [
            {"name": "lan", "bridge": "xenbr0", "purpose": ["nbd"]},
            {"name": "lab", "bridge": "xenbr1", "internal": True},
        ],
        "srs": [
            {"name": "nfs", "type": "nfs", "size": 64 * GIB, "default": True},
            {"name": "lvm", "type": "lvmoiscsi", "size": 4 * GIB},
        ],
        "vms": [
            {
                "name": "web",
                "power_state": "Running",
                "tags": ["nightly"],
                "disks": [
                    {"name": "web-root", "sr": "nfs", "size": 8 * MIB},
                    {"name": "web-data", "sr": "nfs", "size": 6 * MIB},
                    {"cd": True, "bootable": False, "device": 3},
                ],
                "vifs": [{"network": "lan", "mac": "02:16:3e:00:00:01"}],
            },
            {
                "name": "db",
                "uefi": True,
                "NVRAM": {"EFI-variables": "Tm90IHJlYWwgdmFyaWFibGVz"},
                "bios_strings": {"bios-vendor": "Xen", "bios-version": "1"},
                "vtpm": "c3RhdGUgb2YgYSBUUE0=",
                "disks": [{"name": "db-root", "sr": "lvm", "size": 4 * MIB}],
                "vifs": [{"network": "lan"}, {"network": "lab"}],
            },
        ],
        "templates": [{"name": "Debian Bookworm 12", "default": True}],
    }
    return world | changes
