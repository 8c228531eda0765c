"""The one tree of errors.

A class is a condition; its message gives the facts (what, where, which value); ``hint`` says what to do next.
``exit_code`` and ``retryable`` belong to the class. Only the command line exits; only ``xbfs.fuse.errnos`` maps to
errno. Numbers are never reused; ``docs/errors.md`` lists them and a test compares the two.

XbfsError 1
|-- UsageError 2
|-- RepositoryError 10
|   |-- NotARepository 11        |-- RepositoryExists 12      |-- FormatTooNew 13
|   |-- ConfigDamaged 14         |-- PointNotFound 15         |-- PointAmbiguous 16
|   |-- NoBasePoint 17           `-- RepositoryRolledBack 18
|-- IntegrityError 20
|   |-- ChunkCorrupt 21          |-- PackCorrupt 22           |-- MapCorrupt 23
|   |-- ManifestCorrupt 24       |-- IndexCorrupt 25          |-- BlobLost 26
|   |-- WireError 27             `-- DamageFound 28
|-- StorageError 30
|   |-- StorageUnavailable 31 *  |-- StorageFull 32           |-- BlobNotFound 33
|   |-- BlobExists 34            |-- StorageTimeout 35 *      |-- StorageDenied 36
|   |-- TargetExists 37          `-- TargetUnwritable 38
|-- SourceError 40
|   |-- SourceUnreadable 41      |-- SourceChanged 42         |-- BitmapInvalid 43
|   |-- DiskShrunk 44            |-- VmNotReady 45            `-- RunIncomplete 46
|-- KeyError_ 50
|   |-- WrongPassphrase 51       |-- KeySlotDamaged 52        |-- KeySlotNotFound 53
|   |-- LastKeySlot 54           |-- KeyNotHeld 55            `-- PassphraseMissing 56
|-- MountError 60
|   |-- FuseMissing 61           |-- MountPointNotEmpty 62    |-- MountPointInside 63
|   |-- MountPointInvalid 64     |-- NotMounted 65            |-- ImageUnsupported 66
|   `-- MountFailed 67
|-- PoolError 80
|   |-- PoolUnknown 81           |-- PoolExists 82            |-- PoolUnreachable 83 *
|   |-- LoginRefused 84          |-- CertificateRejected 85   |-- CredentialsUnsafe 86
|   |-- XapiFailure 87           |-- TransferFailed 88 *      `-- ObjectNotFound 89
`-- Cancelled 130
(* retryable)
"""

from __future__ import annotations

from typing import ClassVar


class XbfsError(Exception):
    """Anything XBFS reports to its user.

    ``message`` states facts; ``hint`` is the next action or empty.
    """

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint


class UsageError(XbfsError):
    """The command was called with arguments that do not make sense together."""

    exit_code = 2


class RepositoryError(XbfsError):
    """The repository as a whole can not be used as asked."""

    exit_code = 10


class NotARepository(RepositoryError):
    """No repository config at this place."""

    exit_code = 11
    default_hint = "check the path given with -r or XBFS_REPOSITORY, or create one with `xbfs init`"


class RepositoryExists(RepositoryError):
    """`init` on a place that already holds something."""

    exit_code = 12
    default_hint = "choose an empty directory"


class FormatTooNew(RepositoryError):
    """A record carries a version this program does not know."""

    exit_code = 13
    default_hint = "upgrade xbfs on this machine; the repository was written by a newer release"


class ConfigDamaged(RepositoryError):
    """The config can not be decoded or its signature does not hold."""

    exit_code = 14
    default_hint = "restore the file under config/ from a copy of the repository; data and keys are untouched"


class PointNotFound(RepositoryError):
    """No restore point matches."""

    exit_code = 15
    default_hint = "list the points with `xbfs points`"


class PointAmbiguous(RepositoryError):
    """An id prefix matches several restore points."""

    exit_code = 16
    default_hint = "give more characters of the id"


class NoBasePoint(RepositoryError):
    """A delta was given but there is no earlier restore point it could belong to."""

    exit_code = 17
    default_hint = "run a full backup first: leave out --changed"


class RepositoryRolledBack(RepositoryError):
    """The config is older or other than what the key slot or this machine vouches for."""

    exit_code = 18
    default_hint = "somebody may have replaced the repository's config: compare with a copy before you use it"


class IntegrityError(XbfsError):
    """Stored bytes are not what was written."""

    exit_code = 20
    default_hint = "run `xbfs verify` to learn which restore points are hit"


class ChunkCorrupt(IntegrityError):
    """A chunk does not authenticate or its content does not have its id."""

    exit_code = 21


class PackCorrupt(IntegrityError):
    """A pack's header, footer or directory is damaged."""

    exit_code = 22


class MapCorrupt(IntegrityError):
    """A block map node is damaged or does not fit its place."""

    exit_code = 23


class ManifestCorrupt(IntegrityError):
    """A restore point's manifest is damaged or its signature does not hold."""

    exit_code = 24


class IndexCorrupt(IntegrityError):
    """An index blob is damaged."""

    exit_code = 25


class BlobLost(IntegrityError):
    """A blob that something refers to is not there."""

    exit_code = 26


class WireError(IntegrityError):
    """A record can not be decoded: truncated, oversized or not canonical."""

    exit_code = 27


class DamageFound(IntegrityError):
    """`check` or `verify` found damage; the report lists it."""

    exit_code = 28


class StorageError(XbfsError):
    """The storage failed."""

    exit_code = 30


class StorageUnavailable(StorageError):
    """The storage does not answer or answers with an error that may pass."""

    exit_code, retryable = 31, True


class StorageFull(StorageError):
    """No room left on the storage."""

    exit_code = 32
    default_hint = "free space on the repository's storage and run the backup again; nothing committed was lost"


class BlobNotFound(StorageError):
    """No blob of that name."""

    exit_code = 33


class BlobExists(StorageError):
    """A blob of that name is already there; blobs are write-once."""

    exit_code = 34


class StorageTimeout(StorageError):
    """The storage did not answer by the deadline."""

    exit_code, retryable = 35, True


class StorageDenied(StorageError):
    """The storage refused access."""

    exit_code = 36
    default_hint = "check owner and mode of the repository directory"


class TargetExists(StorageError):
    """The file to be written is already there."""

    exit_code = 37
    default_hint = "choose another name, or pass --overwrite"


class TargetUnwritable(StorageError):
    """The file to be written can not be written."""

    exit_code = 38


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


class KeyError_(XbfsError):
    """Keys: base class; never raised itself."""

    exit_code = 50


class WrongPassphrase(KeyError_):
    """No key slot opens with this secret."""

    exit_code = 51
    default_hint = "try again, or use the recovery code"


class KeySlotDamaged(KeyError_):
    """A key slot can not be decoded."""

    exit_code = 52
    default_hint = "use another key slot (`xbfs key list`), or the recovery code"


class KeySlotNotFound(KeyError_):
    """No key slot of that id, or none at all."""

    exit_code = 53
    default_hint = "list them with `xbfs key list`"


class LastKeySlot(KeyError_):
    """The last key slot that can read the data would be removed."""

    exit_code = 54
    default_hint = "add another key slot first"


class KeyNotHeld(KeyError_):
    """The opened role does not hold the key this needs."""

    exit_code = 55
    default_hint = "open the repository with an owner key slot"


class PassphraseMissing(KeyError_):
    """No passphrase was given and nobody can be asked."""

    exit_code = 56
    default_hint = "set XBFS_PASSPHRASE or XBFS_PASSPHRASE_FILE"


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


class Cancelled(XbfsError):
    """The user or a signal stopped the command; nothing half-done is visible."""

    exit_code = 130
