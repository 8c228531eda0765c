r"""A Windows guest's drives: which volume has which letter.

The registry of the system tells: ``MountedDevices`` holds a value ``\DosDevices\C:`` for each letter, whose data names
a partition, on MBR disks by the disk's signature and the partition's start, on GPT disks by the partition's GUID with
``DMIO:ID:`` before it. Volumes mounted in folders stay what the filesystem shows: links.
"""

from __future__ import annotations

import re
import struct
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import XbfsError
from xbfs_engine.guestfs.base import READ_BYTES_MAX, Kind
from xbfs_engine.guestfs.guest import GuestMount, GuestTree
from xbfs_engine.guestfs.tree.hive import Hive
from xbfs_engine.guestfs.tree.roots import VOLUMES_MAX
from xbfs_engine.guestfs.tree.spots import Spot, entries, kind_of, passable, words
from xbfs_engine.guestfs.volumes import VolumeStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from xbfs_engine.guestfs.guest import Guest, VolumeRow

_KINDS: Final = frozenset({"ntfs", "vfat", "exfat"})
_HIVE: Final = ("Windows", "System32", "config", "SYSTEM")
_NAMES_MAX: Final = 1 << 14
"""Names of a directory that are compared without regard to case."""

_LETTER: Final = re.compile(r"\\DosDevices\\([A-Za-z]):")
_VOLUME: Final = re.compile(r"\\\?\?\\Volume\{[0-9A-Fa-f-]{36}\}")
_BY_GUID: Final = b"DMIO:ID:"
_BY_START: Final = struct.Struct("<IQ")
_LETTERS: Final = "CDEFGHIJKLMNOPQRSTUVWXYZ"
_SERVICE_LABELS: Final = frozenset({"system reserved", "recovery", "winre", "windows re tools", "system-reserviert"})
_SERVICE_PARTS: Final = frozenset({"efi system partition", "microsoft reserved partition"})
"""Volumes of the system that get no letter; Windows' setup calls them so."""


@dataclass(slots=True)
class System:
    """A volume with Windows on it, and what its registry tells."""

    row: VolumeRow
    letters: dict[str, str] = field(default_factory=dict)
    """Letter to the name of the volume."""
    known: set[str] = field(default_factory=set)
    """Names of the volumes that this Windows has seen, with letters or without."""
    notes: list[str] = field(default_factory=list)


def find_systems(guest: Guest, rows: Sequence[VolumeRow]) -> list[System]:
    """The volumes with Windows on them, in their order."""
    found = []
    able = [row for row in rows if row.status is VolumeStatus.FILESYSTEM and row.kind == "ntfs"]
    for row in able[:VOLUMES_MAX]:
        system = System(row)
        try:
            place = Spot(row.name, guest.root(row.name))
            kind = Kind.DIRECTORY
            for name in _HIVE:
                below = _without_case(guest, place, name.encode()) if kind is Kind.DIRECTORY else None
                if below is None:
                    break
                place, kind = below
            else:
                if kind in (Kind.FILE, Kind.UNKNOWN):
                    found.append(system)
                    _read_letters(guest, place, rows, system)
        except XbfsError as error:
            problem = passable(error)
            system.notes.append(f"the registry of Windows on volume {row.name} can not be read: {problem}")
    return found


def windows_tree(guest: Guest, rows: Sequence[VolumeRow], system: System) -> GuestTree:
    """The drives of a Windows. Raises only what may pass when it is tried again."""
    notes = list(system.notes)
    by_name = {row.name: row for row in rows}
    sources = {letter: rf"\DosDevices\{letter}:" for letter in system.letters}
    letters = dict(system.letters)
    missing = [row for row in rows if row.name not in letters.values() and _gets_letter(row, system)]
    # The system itself first: it is C: unless the registry says that another volume is.
    for row in sorted(missing, key=lambda row: row.name != system.row.name):
        first = 0 if row.name == system.row.name else 1
        letter = next((letter for letter in _LETTERS[first:] if letter not in letters), None)
        if letter is None:
            notes.append(f"no letter is left for volume {row.name}")
            continue
        letters[letter], sources[letter] = row.name, "by order"
        notes.append(f"no letter is told for volume {row.name}: it is shown as {letter}:")
    mounts = []
    for letter, name in sorted(letters.items()):
        row = by_name[name]
        if row.status is not VolumeStatus.FILESYSTEM:
            notes.append(f"{letter}: is volume {name}, which can not be read: {words(row.reason) or row.status.value}")
            continue
        try:
            root = guest.root(name)
        except XbfsError as error:
            notes.append(f"{letter}: is volume {name}, which can not be read: {passable(error)}")
            continue
        mounts.append(GuestMount(f"/{letter}:".encode(), name, root, None, sources[letter]))
    return GuestTree("windows", tuple(mounts), tuple(notes))


def _gets_letter(row: VolumeRow, system: System) -> bool:
    """Whether a volume without a letter gets one: not if Windows knows it and gave it none."""
    if row.name == system.row.name:
        return True
    is_service = row.label.casefold() in _SERVICE_LABELS or row.part_label.casefold() in _SERVICE_PARTS
    return (
        row.status is VolumeStatus.FILESYSTEM and row.kind in _KINDS and row.name not in system.known and not is_service
    )


def _read_letters(guest: Guest, place: Spot, rows: Sequence[VolumeRow], system: System) -> None:
    size = guest.stat(*place).size_bytes

    def read(offset: int, length: int) -> bytes:
        assert length <= READ_BYTES_MAX
        return guest.read(*place, offset, length)

    hive = Hive(read, size)
    if hive.is_dirty:
        system.notes.append("Windows was writing its registry; letters that were given last may be missing")
    key = hive.find(["MountedDevices"])
    if key is None:
        system.notes.append("the registry has no MountedDevices")
        return
    for value in hive.values(key):
        letter = _LETTER.fullmatch(value.name)
        if letter is None and not _VOLUME.fullmatch(value.name):
            continue
        names = [row.name for row in _named(rows, value.data)]
        system.known.update(names)
        if letter is None or not names:
            continue
        # Copies of a disk have one signature: the system's own is meant, else the first.
        name = system.row.name if system.row.name in names else names[0]
        if name in system.letters.values():
            system.notes.append(f"volume {name} is also {letter[1].upper()}:")
            continue
        system.letters[letter[1].upper()] = name


def _named(rows: Iterable[VolumeRow], data: bytes) -> list[VolumeRow]:
    """The volumes that a value of MountedDevices names; none for drives that are no partitions."""
    if len(data) == len(_BY_GUID) + 16 and data.startswith(_BY_GUID):
        wanted = str(uuid.UUID(bytes_le=data[len(_BY_GUID) :]))
        return [row for row in rows if row.part_uuid.lower() == wanted]
    if len(data) == _BY_START.size:
        signature, start = _BY_START.unpack(data)
        disk = re.compile(rf"{signature:08x}-[0-9a-f]{{2}}")
        return [row for row in rows if row.part_start_bytes == start and disk.fullmatch(row.part_uuid)]
    return []


def _without_case(guest: Guest, place: Spot, name: bytes) -> tuple[Spot, Kind] | None:
    """An entry as Windows finds it."""
    listed = guest.lookup(*place, name)
    if listed is None:
        wanted = name.lower()
        every = entries(guest, place, _NAMES_MAX)
        listed = next((other for other in every if other.entry.name.lower() == wanted), None)
    return None if listed is None else (Spot(place.volume, listed.entry.node), kind_of(listed))
