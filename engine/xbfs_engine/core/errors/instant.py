"""What can be wrong with instant recoveries: sessions, their overlays, what serves them, and boot tests."""

from __future__ import annotations

from xbfs_engine.core.errors.base import XbfsError


class InstantError(XbfsError):
    """An instant recovery can not go on as asked."""

    exit_code = 100


class SessionNotFound(InstantError):
    """There is no session of that name."""

    exit_code = 101
    default_hint = "`xbfs boot list` shows the sessions of this repository on this machine"


class SessionExists(InstantError):
    """There is a session of that name already."""

    exit_code = 102
    default_hint = "choose another --name, or discard the old session"


class SessionBusy(InstantError):
    """Somebody still uses the session's disks, or another command works on it; the message says who."""

    exit_code = 103
    default_hint = "stop the VM that runs from it first"


class LiveServerDown(InstantError):
    """The process that serves the sessions is not there, does not answer, or ended while it started."""

    exit_code = 104
    default_hint = "`xbfs boot serve` starts it in the foreground and shows what is wrong"


class ExportFailed(InstantError):
    """The program that exports the disks (nbdkit, nfs-ganesha) is missing, does not start or keeps ending."""

    exit_code = 105


class OverlayInUse(InstantError):
    """The overlay is open in another process."""

    exit_code = 106
    default_hint = "one process serves a session: see `xbfs boot list`"


class OverlayMismatch(InstantError):
    """The overlay was made for another disk than the one it is opened over."""

    exit_code = 107
    default_hint = "open the repository that the session was made from"


class CommitRefused(InstantError):
    """The session's disks can not become a restore point as they are; the message says why."""

    exit_code = 108


class BootTestFailed(InstantError):
    """The restore point was booted and did not show what a running system shows."""

    exit_code = 109
    default_hint = "look at the screenshot and the console's text in the result of the test"
