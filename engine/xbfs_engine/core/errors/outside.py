"""Errors of what a repository is filled from and shown to: sources, mounts, pools."""

from __future__ import annotations

from xbfs_engine.core.errors.base import XbfsError


class SourceError(XbfsError):
    """The source failed."""

    exit_code = 40


class SourceUnreadable(SourceError):
    """The source can not be opened or read."""

    exit_code = 41


class SourceChanged(SourceError):
    """The source changed its size while it was read."""

    exit_code = 42
    default_hint = "back up a snapshot or a stopped disk; no restore point was made"


class BitmapInvalid(SourceError):
    """A changed-block file does not describe this disk."""

    exit_code = 43
    default_hint = "give the bitmap exactly as XAPI returns it, or JSON extents [[offset, length], ...]"


class DiskShrunk(SourceError):
    """The disk is smaller than in the restore point it continues."""

    exit_code = 44
    default_hint = "if the disk was replaced, start over with --new-chain"


class VmNotReady(SourceError):
    """The VM can not be backed up, restored or rewound in its present state; nothing was begun."""

    exit_code = 45


class RunIncomplete(SourceError):
    """Some of the VMs that were asked for have no new restore point; the others have."""

    exit_code = 46
    default_hint = "see what is said of each VM above; run the command again for those that failed"


class MountError(XbfsError):
    """Mounting or serving failed."""

    exit_code = 60


class FuseMissing(MountError):
    """libfuse, pyfuse3 or /dev/fuse is missing."""

    exit_code = 61
    default_hint = "install fuse3 and xbfs[fuse]; inside a container pass /dev/fuse"


class MountPointNotEmpty(MountError):
    """The mount point holds files or is already mounted on."""

    exit_code = 62
    default_hint = "choose an empty directory"


class MountPointInside(MountError):
    """The mount point lies inside the repository, or the repository inside it."""

    exit_code = 63
    default_hint = "choose a directory outside the repository"


class MountPointInvalid(MountError):
    """The mount point is not a directory one can use."""

    exit_code = 64
    default_hint = "create the directory first"


class NotMounted(MountError):
    """No XBFS mount at this directory."""

    exit_code = 65


class ImageUnsupported(MountError):
    """A disk can not be shown in this image format."""

    exit_code = 66
    default_hint = "use the raw image"


class MountFailed(MountError):
    """The kernel or fusermount3 refused the mount, or the server did not come up."""

    exit_code = 67


class PoolError(XbfsError):
    """A XenServer pool can not be used as asked."""

    exit_code = 80


class PoolUnknown(PoolError):
    """No pool of this name is configured."""

    exit_code = 81
    default_hint = "list them with `xbfs pool list`, add one with `xbfs pool add`"


class PoolExists(PoolError):
    """`pool add` with a name that is taken."""

    exit_code = 82
    default_hint = "choose another name, or remove the old one with `xbfs pool remove`"


class PoolUnreachable(PoolError):
    """No host of the pool answers, or the connection broke."""

    exit_code, retryable = 83, True
    default_hint = "are the hosts up, and is port 443 reachable from here?"


class LoginRefused(PoolError):
    """Wrong user or password, or the user's role does not allow the call."""

    exit_code = 84
    default_hint = "check user and password of the pool, and that the user's role is vm-power-admin or more"


class CertificateRejected(PoolError):
    """A host shows another certificate than the pinned one, or none is pinned for it."""

    exit_code = 85
    default_hint = "if the host's certificate was renewed, pin it anew with `xbfs pool trust`"


class CredentialsUnsafe(PoolError):
    """The credentials file can be read by others, is not ours, or can not be decoded."""

    exit_code = 86


class XapiFailure(PoolError):
    """XAPI refused a call. ``code`` and ``params`` are what it answered (datamodel, errors)."""

    exit_code = 87

    def __init__(self, message: str, *, code: str, params: tuple[str, ...] = (), hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.params = params


class TransferFailed(PoolError):
    """A transfer of disk data from or to a host broke off."""

    exit_code, retryable = 88, True


class ObjectNotFound(PoolError):
    """No VM, SR, network or disk on the pool matches, or several do."""

    exit_code = 89
