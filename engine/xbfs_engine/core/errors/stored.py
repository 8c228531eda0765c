"""Errors of repositories: as a whole, of their bytes, of the storage under them, of their keys."""

from __future__ import annotations

from xbfs_engine.core.errors.base import XbfsError


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
