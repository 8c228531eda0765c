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
|-- GuestError 90
|   |-- GuestDamaged 91          |-- GuestUnsupported 92      |-- GuestWrongKind 93
|   |-- GuestLocked 94           |-- GuestNotFound 95         `-- GuestReaderFailed 96
|-- InstantError 100
|   |-- SessionNotFound 101      |-- SessionExists 102      |-- SessionBusy 103
|   |-- LiveServerDown 104       |-- ExportFailed 105       |-- OverlayInUse 106
|   |-- OverlayMismatch 107      |-- CommitRefused 108      `-- BootTestFailed 109
`-- Cancelled 130
(* retryable)
"""

from __future__ import annotations

from xbfs_engine.core.errors.base import Cancelled, UsageError, XbfsError
from xbfs_engine.core.errors.guest import (
    GuestDamaged,
    GuestError,
    GuestLocked,
    GuestNotFound,
    GuestReaderFailed,
    GuestUnsupported,
    GuestWrongKind,
)
from xbfs_engine.core.errors.instant import (
    BootTestFailed,
    CommitRefused,
    ExportFailed,
    InstantError,
    LiveServerDown,
    OverlayInUse,
    OverlayMismatch,
    SessionBusy,
    SessionExists,
    SessionNotFound,
)
from xbfs_engine.core.errors.outside import (
    BitmapInvalid,
    CertificateRejected,
    CredentialsUnsafe,
    DiskShrunk,
    FuseMissing,
    ImageUnsupported,
    LoginRefused,
    MountError,
    MountFailed,
    MountPointInside,
    MountPointInvalid,
    MountPointNotEmpty,
    NotMounted,
    ObjectNotFound,
    PoolError,
    PoolExists,
    PoolUnknown,
    PoolUnreachable,
    RunIncomplete,
    SourceChanged,
    SourceError,
    SourceUnreadable,
    TransferFailed,
    VmNotReady,
    XapiFailure,
)
from xbfs_engine.core.errors.stored import (
    BlobExists,
    BlobLost,
    BlobNotFound,
    ChunkCorrupt,
    ConfigDamaged,
    DamageFound,
    FormatTooNew,
    IndexCorrupt,
    IntegrityError,
    KeyError_,
    KeyNotHeld,
    KeySlotDamaged,
    KeySlotNotFound,
    LastKeySlot,
    ManifestCorrupt,
    MapCorrupt,
    NoBasePoint,
    NotARepository,
    PackCorrupt,
    PassphraseMissing,
    PointAmbiguous,
    PointNotFound,
    RepositoryError,
    RepositoryExists,
    RepositoryRolledBack,
    StorageDenied,
    StorageError,
    StorageFull,
    StorageTimeout,
    StorageUnavailable,
    TargetExists,
    TargetUnwritable,
    WireError,
    WrongPassphrase,
)

__all__ = [
    "BitmapInvalid",
    "BlobExists",
    "BlobLost",
    "BlobNotFound",
    "BootTestFailed",
    "Cancelled",
    "CertificateRejected",
    "ChunkCorrupt",
    "CommitRefused",
    "ConfigDamaged",
    "CredentialsUnsafe",
    "DamageFound",
    "DiskShrunk",
    "ExportFailed",
    "FormatTooNew",
    "FuseMissing",
    "GuestDamaged",
    "GuestError",
    "GuestLocked",
    "GuestNotFound",
    "GuestReaderFailed",
    "GuestUnsupported",
    "GuestWrongKind",
    "ImageUnsupported",
    "IndexCorrupt",
    "InstantError",
    "IntegrityError",
    "KeyError_",
    "KeyNotHeld",
    "KeySlotDamaged",
    "KeySlotNotFound",
    "LastKeySlot",
    "LiveServerDown",
    "LoginRefused",
    "ManifestCorrupt",
    "MapCorrupt",
    "MountError",
    "MountFailed",
    "MountPointInside",
    "MountPointInvalid",
    "MountPointNotEmpty",
    "NoBasePoint",
    "NotARepository",
    "NotMounted",
    "ObjectNotFound",
    "OverlayInUse",
    "OverlayMismatch",
    "PackCorrupt",
    "PassphraseMissing",
    "PointAmbiguous",
    "PointNotFound",
    "PoolError",
    "PoolExists",
    "PoolUnknown",
    "PoolUnreachable",
    "RepositoryError",
    "RepositoryExists",
    "RepositoryRolledBack",
    "RunIncomplete",
    "SessionBusy",
    "SessionExists",
    "SessionNotFound",
    "SourceChanged",
    "SourceError",
    "SourceUnreadable",
    "StorageDenied",
    "StorageError",
    "StorageFull",
    "StorageTimeout",
    "StorageUnavailable",
    "TargetExists",
    "TargetUnwritable",
    "TransferFailed",
    "UsageError",
    "VmNotReady",
    "WireError",
    "WrongPassphrase",
    "XapiFailure",
    "XbfsError",
]
