"""What every simulated call works on: the world, and the context of one call. The seam of all modules.

``World`` is built once by world.py; its parts guard themselves. A ``Context`` belongs to one call.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from . import calls, schema
from .clock import SimClock
from .db import Database
from .failures import Failure
from .faults import Faults
from .schema import NULL

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .schema import Ref, Value
    from .sessions import Session, Sessions
    from .tasks import Task, Tasks


@dataclass(frozen=True, slots=True)
class Release:
    """What differs between the versions of XAPI that are simulated."""

    name: str
    brand: str
    product_version: str
    api_minor: int
    xapi_version: str
    max_params: Mapping[str, int] = field(default_factory=dict)  # calls that took fewer parameters than published today
    missing: frozenset[str] = frozenset()  # calls that did not exist

    @property
    def has_ignore_vdis(self) -> bool:
        """Whether VM.snapshot takes disks to leave out."""
        return "VM.snapshot" not in self.max_params


@dataclass(slots=True)
class HostNode:
    """A simulated host: where it listens, and its certificate."""

    ref: Ref
    name: str
    address: str
    certificate_pem: str
    certificate_file: Path  # certificate and private key, as /etc/xensource/xapi-ssl.pem
    fingerprint_sha256: str  # colon hex of the DER certificate
    subject: str  # its first DNS name
    port: int = 0
    offline: bool = False  # connections end at once


class Done(NamedTuple):
    """A call from outside that has ended: its first argument, and "Success" or the error's code."""

    method: str
    argument: str
    user: str
    originator: str
    status: str


class Storage(Protocol):
    """What the core needs of storage; everything else goes through calls (VDI.snapshot, VDI.destroy)."""

    def start(self) -> None:
        """Start servers and timers; addresses of hosts are known by now."""

    def close(self) -> None:
        """Stop them."""

    def plug_vbd(self, vbd: Ref) -> None:
        """Attach and activate the VDI of a VBD; the caller sets currently_attached. Raises Failure."""

    def unplug_vbd(self, vbd: Ref) -> None:
        """The reverse. Raises Failure."""

    def import_file(self, vdi: Ref, path: Path) -> None:
        """Fill a fresh VDI with a raw image, sparsely and untracked."""

    def guest_write(self, vdi: Ref, offset: int, data: bytes) -> None:
        """Write as the guest would; tracked by CBT."""

    def read(self, vdi: Ref, offset: int, length: int) -> bytes:
        """The bytes of a VDI."""

    def crash_host(self, host: Ref) -> None:
        """Power loss of a host: logs of VDIs attached there stay inconsistent."""

    def coalesce(self) -> None:
        """Merge now whatever may be merged."""


class World:
    """One simulated pool."""

    storage: Storage
    sessions: Sessions
    tasks: Tasks
    vtpm_contents: dict[Ref, str]  # the state of VTPMs, which no field of XAPI shows
    screens: dict[str, str]  # unix sockets of RFB servers by uuid of the VM; "" is any other's

    def __init__(self, state_dir: Path, release: Release, time_scale: float = 1.0) -> None:
        self.state_dir = state_dir
        self.release = release
        self.clock = SimClock(time_scale)
        self.db = Database()
        self.faults = Faults()
        self.nodes: dict[Ref, HostNode] = {}
        self.pool: Ref = NULL
        self.vtpm_contents = {}
        self.screens = {}
        self.journal: deque[Done] = deque(maxlen=100_000)

    @property
    def master(self) -> Ref:
        """The host that answers for the pool."""
        return self.db.text(self.pool, "master")

    def enter(self, session: Ref, host: Ref) -> Context:
        """The context of a caller with a session, at a host. Raises Failure SESSION_INVALID."""
        found = self.sessions.use(session)
        return Context(self, host, found.role, found)

    def internal(self, host: Ref | None = None) -> Context:
        """The context of the pool's own doings."""
        return Context(self, host or self.master, "root")

    def alert(self, name: str, cls: str, obj: Ref, body: str = "", priority: int = 3) -> None:
        """Make a ``message`` about an object; ``cls`` as in message.cls ("VDI")."""
        uuid = self.db.text(obj, "uuid")
        self.db.create(
            "message", name=name, priority=priority, cls=cls, obj_uuid=uuid, timestamp=self.clock.now(), body=body
        )


@dataclass(slots=True)
class Context:
    """Who calls, where, and on behalf of which task."""

    world: World
    host: Ref
    role: str
    session: Session | None = None
    task: Task | None = None

    @property
    def db(self) -> Database:
        """The objects."""
        return self.world.db

    def invoke(self, method: str, *args: Value) -> Value:
        """Another call on the same behalf, roles unasked; faults strike it too. Raises Failure."""
        return calls.invoke(self, method, args)

    def ref(self, method: str, *args: Value) -> Ref:
        """``invoke`` of a call that returns a reference or a string."""
        result = self.invoke(method, *args)
        assert isinstance(result, str)
        return result

    def on(self, host: Ref) -> Context:
        """The same caller at another host."""
        return replace(self, host=host)

    def require(self, role: str, permission: str) -> None:
        """Raises Failure RBAC_PERMISSION_DENIED unless the caller has the role."""
        if not schema.allows(self.role, role):
            raise Failure("RBAC_PERMISSION_DENIED", permission, "No permission in user session")
