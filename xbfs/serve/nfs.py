"""The live mount by NFS: one nfs-ganesha for all sessions; a client mounts the directory of one.

Owns ganesha's configuration, its state and which start of it this is. What each setting is for, and what has to run
on the machine beside it: docs/adr/0009-exports.md. Event-loop thread only.
"""

from __future__ import annotations

import ipaddress
import struct
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import trio

from xbfs.serve.child import STATE_HINT, Program, answers, check_free, keep_running
from xbfs_engine.core.errors import ExportFailed, StorageError
from xbfs_engine.core.runtime import Clock, SystemClock
from xbfs_engine.storage.files import make_directories, write_changed, write_replace

if TYPE_CHECKING:
    from pathlib import Path

ROOT: Final = "/xbfs"
"""What clients see the live mount as, by NFSv3 and NFSv4."""
_FSID: Final = (0x58424653, 1)
"""Part of every file handle ("XBFS"): the same after each start, whatever device number the mount has then."""
_NULL: Final = struct.pack(">11I", 0x80000028, 0x58424653, 0, 2, 100003, 3, 0, 0, 0, 0, 0)
"""One fragment of 40 bytes (RFC 5531 §11): a call of procedure 0 of NFSv3 (RFC 1813 §3.3.0), no credentials."""
_PACKAGES: Final = "nfs-ganesha nfs-ganesha-vfs rpcbind"
_TAKEN: Final = "another NFS server has it: stop nfs-kernel-server, or the live server of the other repository"
_LOG: Final = "ganesha.log"
_REREAD: Final = b"Reread exports complete"
"""What ganesha 4.3 logs when it has done what SIGHUP asks for (reread_exports in support/exports.c)."""
_REREAD_S: Final = 5.0
"""It is told within 1 s (``keep_running``); one that just starts reads all anyway."""
_POLL_S: Final = 0.05
_LOG_READ_BYTES: Final = 1 << 20
_UNQUOTABLE: Final = frozenset('"\\\n\r')


@dataclass(frozen=True, slots=True)
class NfsExport:
    """What is exported. ``clients``: addresses and networks that may mount it, with root's rights; nobody else may.

    ``address``: of this machine, what clients are told. Where there is IPv6 ganesha listens at all other addresses
    too: ``clients`` alone keeps others out. ``mount_port``: of the MOUNT protocol of NFSv3.
    """

    directory: Path
    state: Path
    address: str
    port: int = 2049
    clients: tuple[str, ...] = ()
    mount_port: int = 20048


@dataclass(frozen=True, slots=True)
class NfsPlace:
    """Where clients find the live mount."""

    address: str
    port: int
    mount_port: int

    def path(self, session: str) -> str:
        """What a client mounts for one session."""
        return f"{ROOT}/{session}"

    def uri(self, session: str, file: str) -> str:
        """Of one disk, for QEMU and libnfs; they ask rpcbind for the ports."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"nfs://{host}{quote(self.path(session))}/{quote(file)}"


async def serve_nfs(
    export: NfsExport, *, task_status: trio.TaskStatus[NfsPlace] = trio.TASK_STATUS_IGNORED, clock: Clock | None = None
) -> None:
    """Export until cancelled; started with the place once clients can mount. Raises ExportFailed before that."""
    settings, log = _configure(export), export.state / _LOG

    def arguments() -> tuple[str, ...]:
        for port in (export.port, export.mount_port):
            check_free(export.address, port, _TAKEN)
        start = _next_start(export.state / "start", clock or SystemClock())
        files = ("-f", str(settings), "-L", "/dev/stderr", "-p", str(export.state / "ganesha.pid"))
        return ("-F", *files, "-N", "NIV_EVENT", "-E", str(start))

    program = Program("ganesha.nfsd", arguments, _PACKAGES, export.directory, log, _hint, settings)
    place = NfsPlace(export.address, export.port, export.mount_port)
    is_ready = partial(answers, export.address, export.port, say=_NULL)
    await keep_running(program, is_ready, started=lambda: task_status.started(place))


async def change_clients(export: NfsExport) -> None:
    """Have a server that was started for the same export, but for its clients, serve these. It goes on meanwhile.

    Raises ExportFailed.
    """
    log, before = export.state / _LOG, 0
    with suppress(OSError):  # without its log nobody knows when it has: then it gets all the time it may need
        before = log.stat().st_size
    _configure(export)
    with trio.move_on_after(_REREAD_S):
        while _REREAD not in _since(log, before):  # noqa: ASYNC110 - it tells nobody
            await trio.sleep(_POLL_S)


def _since(log: Path, size_bytes: int) -> bytes:
    """What a log got since it had that size, nothing if it can not be read."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(size_bytes)
        return file.read(_LOG_READ_BYTES)
    return b""


def _configure(export: NfsExport) -> Path:
    """Write the configuration; where it is. Raises ExportFailed."""
    recovery, settings = export.state / "recovery", export.state / "ganesha.conf"
    try:
        make_directories(recovery)
        write_changed(settings, _configuration(export, recovery).encode())
    except StorageError as exc:
        raise ExportFailed(f"the state of the NFS export can not be kept: {exc.message}", hint=STATE_HINT) from exc
    return settings


def _configuration(export: NfsExport, recovery: Path) -> str:
    if not _UNQUOTABLE.isdisjoint(f"{export.directory}{recovery}"):
        raise ExportFailed(f"{export.directory} can not be written into nfs-ganesha's configuration")
    try:
        address = ipaddress.ip_address(export.address)
        clients = [str(ipaddress.ip_network(client, strict=False)) for client in export.clients]
    except ValueError as exc:
        raise ExportFailed(f"{exc}", hint="give addresses, and networks as ADDRESS/BITS") from exc
    allowed = f"CLIENT {{ Clients = {', '.join(clients)}; Access_Type = RW; Squash = No_Root_Squash; }}"
    return f"""\
NFS_Core_Param {{
  Protocols = 3, 4;
  NFS_Port = {export.port};
  MNT_Port = {export.mount_port};
  Bind_addr = {address};
  mount_path_pseudo = true;
  Enable_NLM = false;
  Enable_RQUOTA = false;
  Enable_UDP = false;
  Clustered = false;
  Dbus_Name_Prefix = "xbfs";
}}
NFSv4 {{
  Graceless = true;
  Delegations = false;
  Only_Numeric_Owners = true;
  Minor_Versions = 0, 1, 2;
  RecoveryBackend = fs;
  RecoveryRoot = "{recovery}";
}}
NFS_KRB5 {{ Active_krb5 = false; }}
LOG {{ Format {{ EPOCH = false; HOSTNAME = false; PROGNAME = false; PID = false; THREAD_NAME = false;
  FILE_NAME = false; LINE_NUM = false; }} }}
VFS {{ symlink_support = false; }}
MDCACHE {{ FD_LWMark_Percent = 0; LRU_Run_Interval = 5; }}
EXPORT {{
  Export_Id = 1;
  Path = "{export.directory}";
  Pseudo = {ROOT};
  Access_Type = None;
  Protocols = 3, 4;
  Transports = TCP;
  SecType = sys;
  Disable_ACL = true;
  Attr_Expiration_Time = 0;
  Filesystem_Id = {_FSID[0]}.{_FSID[1]};
  FSAL {{ Name = VFS; fsid_type = None; }}
  {allowed if clients else ""}
}}
"""


def _next_start(kept: Path, clock: Clock) -> int:
    """The number of this start, ganesha's write verifier (RFC 1813 §3.3.7): never the same one twice.

    A client that sees another one sends again what it wrote and did not commit. Ganesha's own is the second of its
    start, the same for two starts within one. Raises ExportFailed.
    """
    try:
        last = int(kept.read_text())
    except (OSError, ValueError):
        last = 0
    start = max(last + 1, clock.now_ns() // 1_000_000_000)
    try:
        write_replace(kept, [str(start).encode()])
    except StorageError as exc:
        raise ExportFailed(f"the state of the NFS export can not be kept: {exc.message}", hint=STATE_HINT) from exc
    return start


def _hint(log: str) -> str:
    if "Cannot register" in log:
        return "NFSv3 needs rpcbind: apt install rpcbind; systemctl enable --now rpcbind"
    if "No IP address found" in log:
        return "nfs-ganesha needs a network interface that is up, beside the loopback"
    return ""
