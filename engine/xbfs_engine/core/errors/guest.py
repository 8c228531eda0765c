"""What can be wrong with a guest's volumes and files. It concerns one of them, never the repository."""

from __future__ import annotations

from xbfs_engine.core.errors.base import XbfsError


class GuestError(XbfsError):
    """A guest's files can not be read or written as asked."""

    exit_code = 90


class GuestDamaged(GuestError):
    """The guest's filesystem contradicts itself or its checksums; the message names the block, inode or field."""

    exit_code = 91
    default_hint = "check the filesystem inside the guest, or take the file from an earlier restore point"


class GuestUnsupported(GuestError):
    """What is asked for is stored in a way that is not read here; the message names the feature."""

    exit_code = 92
    default_hint = "export the disk and read it with the guest's own system"


class GuestWrongKind(GuestError):
    """The node is not of the kind the call needs: a listing of a file, bytes of a directory, a target of no symlink."""

    exit_code = 93


class GuestLocked(GuestError):
    """The volume or file is encrypted, and no key that was given opens it."""

    exit_code = 94
    default_hint = "give its key: `xbfs unlock` for a mount, XBFS_UNLOCK_FILE for a command"


class GuestNotFound(GuestError):
    """The restore point has no such volume, or the volume no such file."""

    exit_code = 95


class GuestReaderFailed(GuestError):
    """The process that reads the volume was ended twice over a request (it crashed, hung or broke its rules), is busy
    with others for too long, or does not start."""

    exit_code = 96
    default_hint = "the volume may be damaged or hostile; other volumes and restore points are not concerned"
