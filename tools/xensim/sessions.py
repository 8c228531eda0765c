"""Users, roles and sessions of the pool. Any thread may call it."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

from . import schema
from .failures import Failure
from .schema import NULL

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .context import World
    from .schema import Ref

# xen-api: session limits per originator of root, per named user, and for root without originator; idle time in seconds.
PER_ORIGINATOR: Final = 500
PER_USER: Final = 500
WITHOUT_ORIGINATOR: Final = 400
INACTIVE_S: Final = 86400.0
WRONG_PASSWORD_S: Final = 5.0


@dataclass(eq=False, slots=True)
class Session:
    """A session: ``role`` is "root" for the local superuser, who may do what dom0 may."""

    ref: Ref
    user: str
    role: str
    originator: str
    used: float  # the simulated second of its last use


@dataclass(frozen=True, slots=True)
class User:
    """Somebody who may log in; no role: known to the directory, but not allowed in."""

    name: str
    password: str
    role: str | None


class Sessions:
    """All sessions of the pool."""

    def __init__(self, world: World, users: Mapping[str, User], subjects: Mapping[str, Ref]) -> None:
        self._world = world
        self._users = users
        self._subjects = subjects
        self._sessions: dict[Ref, Session] = {}

    def login(self, name: str, password: str, originator: str) -> Ref:
        """A new session. Raises Failure after the pause that XAPI makes for a wrong password."""
        world = self._world
        user = self._users.get(name)
        if user is None or not hmac.compare_digest(user.password.encode(), password.encode()):
            world.clock.sleep(WRONG_PASSWORD_S)
            raise Failure("SESSION_AUTHENTICATION_FAILED", name, "Authentication failure")
        if user.role is None:
            raise Failure("SESSION_AUTHORIZATION_FAILED", name, "No role in the pool")
        with world.db.lock:
            ref = world.db.create(
                "session",
                this_host=world.master,
                pool=True,
                last_active=world.clock.now(),
                is_local_superuser=user.role == "root",
                auth_user_name=name,
                subject=self._subjects.get(name, NULL),
                rbac_permissions=_permissions(user.role) if user.role != "root" else [],
                originator=originator,
            )
            self._sessions[ref] = Session(ref, name, user.role, originator, world.clock.monotonic())
            self._limit(self._sessions[ref])
        return ref

    def use(self, ref: Ref) -> Session:
        """The session, marked as used. Raises Failure SESSION_INVALID."""
        with self._world.db.lock:
            now = self._world.clock.monotonic()
            session = self._sessions.get(ref)
            if session and now - session.used > INACTIVE_S and not self._busy(ref):
                self.end(ref)
                session = None
            if session is None:
                raise Failure("SESSION_INVALID", ref)
            session.used = now
            return session

    def end(self, ref: Ref) -> None:
        """Log out."""
        with self._world.db.lock:
            if self._sessions.pop(ref, None):
                self._world.db.destroy(ref)

    def end_all(self) -> None:
        """All sessions expire, as after a restart of the toolstack."""
        with self._world.db.lock:
            for ref in list(self._sessions):
                self.end(ref)

    def _limit(self, newest: Session) -> None:
        """Drop the longest unused sessions of the group the newest belongs to."""
        group, most = _group(newest)
        members = [session for session in self._sessions.values() if _group(session)[0] == group]
        members.sort(key=lambda session: session.used)
        for session in members[: max(0, len(members) - most)]:
            self.end(session.ref)

    def _busy(self, ref: Ref) -> bool:
        return self._world.tasks.pending_of(ref)


@cache
def _permissions(role: str) -> list[str]:
    """The names of all calls a role may make, as XAPI gives them to a session of a directory user."""
    return [
        f"{cls}.{name}".lower()
        for cls, known in schema.classes().items()
        for name, message in known.messages.items()
        if schema.allows(role, message.role)
    ]


def _group(session: Session) -> tuple[tuple[str, str], int]:
    if session.role != "root":
        return ("user", session.user), PER_USER
    if session.originator:
        return ("originator", session.originator), PER_ORIGINATOR
    return ("root", ""), WITHOUT_ORIGINATOR
