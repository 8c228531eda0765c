"""What the search for volumes takes and gives: disks, keys, and every volume with its source or the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from xbfs_engine.formats.source import BlockSource


class Disk(NamedTuple):
    """One disk of a restore point."""

    name: str
    """Its number in the VM: ``0``."""
    source: BlockSource


@dataclass(frozen=True, slots=True)
class VolumeKey:
    """A passphrase, or the content of a key file, for one volume or for any."""

    secret: bytes = field(repr=False)
    volume: str = ""
    """Name or UUID of the volume it is for; empty: it is tried on each locked one."""


class VolumeStatus(Enum):
    """What can be done with a volume."""

    FILESYSTEM = "filesystem"
    """``kind`` is a filesystem: a reader of guestfs may open ``source``."""
    PART = "part"
    """It is a piece of other volumes, which are listed themselves."""
    OTHER = "other"
    """It holds no files, or nothing that is known."""
    LOCKED = "locked"
    """Encrypted, and no key that was given opens it."""
    UNREADABLE = "unreadable"
    """It can not be put together, decrypted or read here."""


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume of a restore point. All volumes that exist are listed, each with what is wrong with it."""

    name: str
    """Unique, fit for a directory: ``0`` (a whole disk), ``0p1``, ``md0``, ``<group>-<volume>``."""
    kind: str
    """As ``blkid`` names it: ext4, ntfs, swap, LVM2_member, linux_raid_member, crypto_LUKS, BitLocker …, else
    ``unknown``. Of an unlocked volume, what is in it."""
    label: str
    uuid: str
    """As ``blkid`` writes it."""
    size_bytes: int
    """Of the device, whatever the filesystem on it claims."""
    place: str
    """Where it lies, in words."""
    within: tuple[str, ...]
    """Kinds of the containers around it, outermost first."""
    status: VolumeStatus
    reason: str
    """Why it is no filesystem, or what may be wrong with it although it is one; else empty."""
    source: BlockSource | None
    """What it holds, decrypted and put together; None unless it can be read."""
    part_uuid: str = ""
    """The PARTUUID as Linux shows it; empty unless it is a partition. MBR: the disk's signature, ``-``, number."""
    part_label: str = ""
    """What a GPT calls the partition."""
    part_start_bytes: int = 0
    """Where the partition begins on its disk; 0 if it is none."""
    crypt_uuid: str = ""
    """Of an unlocked volume, the UUID of what encrypts it."""


class Volumes(NamedTuple):
    """All volumes of a restore point: by disk and partition, then arrays, then logical volumes."""

    volumes: tuple[Volume, ...]
    notes: tuple[str, ...]
    """Sentences on partition tables, arrays and volume groups that are not as they should be."""
