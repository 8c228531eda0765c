"""All volumes of a restore point: from disks through partitions, arrays, encryption and volume groups.

Owns which of these is looked for where, and in which order. Nothing is assembled across restore points: only the
disks that are given count. One volume that can not be read never hides the others.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import XbfsError
from xbfs_engine.formats.partitions import SECTOR_SIZE_4KN, PartitionTable, read_partitions
from xbfs_engine.guestfs.volumes.encrypted import attempt
from xbfs_engine.guestfs.volumes.lvm.group import VolumeGroup
from xbfs_engine.guestfs.volumes.lvm.label import PvLabel, read_metadata
from xbfs_engine.guestfs.volumes.lvm.metadata import VgMetadata, parse_metadata
from xbfs_engine.guestfs.volumes.md import MdMember, md_v0_start
from xbfs_engine.guestfs.volumes.probe import UNKNOWN, Probe, probe
from xbfs_engine.guestfs.volumes.raid import assemble_array
from xbfs_engine.guestfs.volumes.records import Disk, Volume, VolumeKey, Volumes, VolumeStatus
from xbfs_engine.guestfs.volumes.signature import Signature
from xbfs_engine.guestfs.volumes.sources import Missing, Slice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.formats.partitions import Partition
    from xbfs_engine.formats.source import BlockSource
    from xbfs_engine.guestfs.volumes.bitlocker import BitLockerHeader
    from xbfs_engine.guestfs.volumes.luks import LuksHeader

_VOLUMES_MAX: Final = 4096
"""More are not looked at: no VM has so many, and each costs reads."""

_DEPTH_MAX: Final = 8
"""Containers in containers; an encrypted volume in a group on an array has three."""

_PROBED_MAX: Final = 16
_NOTHING: Final = Probe(Signature(UNKNOWN))
_NO_FILES: Final = {
    "swap": "swap space has no files",
    "swsuspend": "swap space has no files",
    "jbd": "it is the journal of another filesystem",
    UNKNOWN: "nothing that is known is on it",
}
_CLOSED: Final = frozenset({"bcache", "stratis", "vdo", "DM_verity_hash", "storage_spaces", "zfs_member", "VMFS"})
_IN_FIRST_SECTOR: Final = frozenset({"xfs", "ntfs", "exfat", "vfat", "refs", "BitLocker", "crypto_LUKS"})
"""Kinds whose mark no partition table could have left where it is."""

_PARTITION_TYPES: Final = {
    "21686148-6449-6e6f-744e-656564454649": "space for the boot loader GRUB",
    "e3c9e316-0b5c-4db8-817d-f92df00215ae": "space reserved by Windows",
    "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3": "metadata of Windows dynamic disks",
    "af9b60a0-1431-4f62-bc68-3311714a69ad": "part of a Windows dynamic disk",
    "e75caf8f-f680-4cee-afa3-b001e56efc2d": "part of Windows Storage Spaces",
    "9e1a2d38-c612-4316-aa26-8b49521e5a8b": "space for a PowerPC boot loader",
    "0x42": "part of a Windows dynamic disk",
    "0x41": "space for a PowerPC boot loader",
}


def find_volumes(disks: Sequence[Disk], keys: Sequence[VolumeKey] = ()) -> Volumes:
    """Every volume on the disks of one restore point. Raises only what a source raises that a retry may mend.

    What ``keys`` open is looked into. A locked volume costs as much time and memory for each key as cryptsetup's
    parameters say, up to a minute and 4 GiB. The sources share caches: they serve one thread at a time.
    """
    scan = _Scan(keys)
    for disk in disks:
        scan.disk(disk)
    while scan.assemble_arrays() or scan.assemble_groups():
        pass
    return scan.result()


@dataclass(frozen=True, slots=True)
class _Device:
    """Something that may hold something."""

    name: str
    source: BlockSource
    place: str
    within: tuple[str, ...] = ()
    note: str = ""
    partition: Partition | None = None
    crypt_uuid: str = ""


class _Member(NamedTuple):
    superblock: MdMember
    device: _Device


class _Physical(NamedTuple):
    label: PvLabel
    device: _Device
    row: int


def _passable(error: XbfsError) -> str:
    """The error in words, unless trying again may help: then it is no property of the volume, and raised."""
    if error.retryable:
        raise error
    return error.message


class _Scan:
    """The state of one search."""

    def __init__(self, keys: Sequence[VolumeKey]) -> None:
        self._keys = keys
        self._rows: list[Volume] = []
        self._notes: list[str] = []
        self._names: set[str] = set()
        self._is_cut = False
        self._arrays: dict[str, list[_Member]] = {}
        self._arrays_done: set[str] = set()
        self._physical: list[_Physical] = []
        self._group_of: dict[str, str] = {}
        self._groups_done: set[str] = set()
        self._metadata_read: dict[int, list[VgMetadata]] = {}

    def result(self) -> Volumes:
        """All that was found."""
        for physical in self._physical:
            group = self._group_of.get(physical.label.uuid)
            words = f"it is a physical volume of volume group {group}" if group else "no volume group knows it"
            row = self._rows[physical.row]
            self._rows[physical.row] = replace(row, reason="; ".join(filter(None, (words, row.reason))))
        if self._is_cut:
            self._notes.append(f"only the first {_VOLUMES_MAX} volumes are listed")
        return Volumes(tuple(self._rows), tuple(self._notes))

    def disk(self, disk: Disk) -> None:
        """Look at a whole disk."""
        self._partitionable(_Device(disk.name, disk.source, f"disk {disk.name}"))

    def _partitionable(self, device: _Device) -> None:
        try:
            found = probe(device.source)
            table = read_partitions(device.source)
            if table is not None and table.kind == "dos" and not _any_known(device.source, table):
                other = read_partitions(device.source, SECTOR_SIZE_4KN)
                if other is not None and _any_known(device.source, other):
                    table = other
        except XbfsError as error:
            self._row(device, _NOTHING, VolumeStatus.UNREADABLE, _passable(error))
            return
        if table is None or not _counts(table, found):
            self._look(device, found)
            return
        self._notes += [f"{device.place}: {note}" for note in table.notes]
        if found.signature.kind == "iso9660":
            self._look(device, found)
        elif not table.partitions:
            self._row(device, found, VolumeStatus.OTHER, "its partition table is empty")
        for partition in table.partitions:
            self._partition(device, partition)

    def _partition(self, device: _Device, partition: Partition) -> None:
        place = f"{device.place}, partition {partition.number}, at byte {partition.start_bytes}"
        name = f"{device.name}p{partition.number}"
        start = partition.start_bytes if partition.size_bytes else 0
        source = Slice(device.source, start, partition.size_bytes)
        inner = _Device(name, source, place, device.within, partition.problem, partition)
        if partition.size_bytes:
            self._look(inner)
        else:
            self._row(inner, _NOTHING, VolumeStatus.UNREADABLE, partition.problem)

    def _look(self, device: _Device, found: Probe | None = None) -> None:
        """List a device, or take it apart."""
        if len(self._rows) >= _VOLUMES_MAX:
            self._is_cut = True
            return
        try:
            if len(device.within) > _DEPTH_MAX:
                self._row(device, _NOTHING, VolumeStatus.UNREADABLE, "it lies in too many containers")
                return
            found = found or probe(device.source)
        except XbfsError as error:
            self._row(device, _NOTHING, VolumeStatus.UNREADABLE, _passable(error))
            return
        kind = found.signature.kind
        encrypted = found.luks or found.bitlocker
        if encrypted is not None:
            self._unlock(device, found, encrypted)
        elif found.md is not None:
            self._arrays.setdefault(found.md.array_uuid, []).append(_Member(found.md, device))
            self._row(device, found, VolumeStatus.PART, f"it is a member of array {_array_name(found.md)}")
        elif found.lvm is not None:
            self._physical.append(_Physical(found.lvm, device, len(self._rows)))
            self._row(device, found, VolumeStatus.PART, "")
        elif kind in _CLOSED:
            self._row(device, found, VolumeStatus.UNREADABLE, f"{kind} is not read here")
        elif kind in _NO_FILES:
            partition = device.partition
            purpose = _PARTITION_TYPES.get(partition.type_id, "") if partition and kind == UNKNOWN else ""
            self._row(device, found, VolumeStatus.OTHER, f"it is {purpose}" if purpose else _NO_FILES[kind])
        else:
            claimed, size = found.signature.size_bytes, device.source.size_bytes
            words = f"it claims {claimed} bytes on a device of {size}" if claimed > size else ""
            self._row(device, found, VolumeStatus.FILESYSTEM, words)

    def _row(self, device: _Device, found: Probe, status: VolumeStatus, reason: str) -> None:
        if len(self._rows) >= _VOLUMES_MAX:
            self._is_cut = True
            return
        name = device.name
        number = 2
        while name in self._names:
            name = f"{device.name}~{number}"
            number += 1
        self._names.add(name)
        signature = found.signature
        words = "; ".join(dict.fromkeys(part for part in (reason, signature.note, device.note) if part))
        readable = status in (VolumeStatus.FILESYSTEM, VolumeStatus.OTHER)
        partition = device.partition
        self._rows.append(
            Volume(
                name, signature.kind, signature.label, signature.uuid, device.source.size_bytes, device.place,
                device.within, status, words, device.source if readable else None,
                partition.uuid if partition else "", partition.name if partition else "",
                partition.start_bytes if partition else 0, device.crypt_uuid,
            )
        )  # fmt: skip

    def _unlock(self, device: _Device, found: Probe, header: LuksHeader | BitLockerHeader) -> None:
        """Look into an encrypted device, or list it as locked."""
        names = ("", device.name, header.uuid)
        secrets = [key.secret for key in self._keys if key.volume in names or key.volume.lower() == header.uuid]
        plain, status, words = attempt(device.source, header, secrets)
        if plain is None:
            self._row(device, found, status, words)
            return
        within = (*device.within, found.signature.kind)
        note = "; ".join(filter(None, (device.note, words)))
        self._look(replace(device, source=plain, within=within, note=note, crypt_uuid=header.uuid))

    def assemble_arrays(self) -> bool:
        """Put together each array that was not yet; whether there was one."""
        waiting = [identity for identity in self._arrays if identity not in self._arrays_done]
        for identity in waiting:
            self._arrays_done.add(identity)
            members = self._arrays[identity]
            first = members[0]
            name = _array_name(first.superblock)
            place = f"array {name} on {', '.join(member.device.name for member in members)}"
            within = (*max((member.device.within for member in members), key=len), "linux_raid_member")
            try:
                array = assemble_array([(member.superblock, member.device.source) for member in members])
            except XbfsError as error:
                reason = _passable(error)
                nothing = _Device(name, Missing(first.superblock.used_bytes, reason), place, within)
                self._row(nothing, _NOTHING, VolumeStatus.UNREADABLE, reason)
                continue
            self._partitionable(_Device(name, array.source, place, within, "; ".join(array.notes)))
        return bool(waiting)

    def assemble_groups(self) -> bool:
        """Put together each volume group that was not yet; whether there was one."""
        newest: dict[str, VgMetadata] = {}
        for index, physical in enumerate(self._physical):
            for metadata in self._metadata(index, physical):
                known = newest.get(metadata.uuid)
                if known is None or known.sequence < metadata.sequence:
                    newest[metadata.uuid] = metadata
        waiting = [metadata for identity, metadata in newest.items() if identity not in self._groups_done]
        for metadata in waiting:
            self._groups_done.add(metadata.uuid)
            self._group(metadata)
        return bool(waiting)

    def _metadata(self, index: int, physical: _Physical) -> list[VgMetadata]:
        """What a physical volume says of its group; each is read once."""
        if index not in self._metadata_read:
            found = self._metadata_read[index] = []
            try:
                for text in read_metadata(physical.device.source, physical.label):
                    if text.problem:
                        self._notes.append(f"{physical.device.name}: {text.problem}")
                    else:
                        found.append(parse_metadata(text.text))
            except XbfsError as error:
                self._notes.append(f"{physical.device.name}: {_passable(error)}")
        return self._metadata_read[index]

    def _group(self, metadata: VgMetadata) -> None:
        times = Counter(physical.label.uuid for physical in self._physical)
        wanted = {part.uuid for part in metadata.physical.values()}
        there: dict[str, BlockSource] = {}
        within: tuple[str, ...] = ()
        for physical in self._physical:
            identity = physical.label.uuid
            if identity not in wanted:
                continue
            self._group_of[identity] = metadata.name
            if times[identity] > 1:
                note = f"{physical.device.name} is one of {times[identity]} physical volumes {identity}: none is used"
                self._notes.append(note)
                continue
            there[identity] = physical.device.source
            within = max(within, physical.device.within, key=len)
        for missing in sorted(wanted - there.keys()):
            self._notes.append(f"volume group {metadata.name}: physical volume {missing} is missing")
        try:
            volumes = VolumeGroup(metadata, there).volumes()
        except XbfsError as error:
            self._notes.append(f"volume group {metadata.name}: {_passable(error)}")
            return
        for volume in volumes:
            place = f"logical volume {volume.name} of volume group {metadata.name}"
            name = f"{metadata.name}-{volume.name}"
            source = volume.source or Missing(volume.size_bytes, volume.reason)
            device = _Device(name, source, place, (*within, "LVM2_member"), volume.reason)
            if volume.source is not None:
                self._look(device)
            elif volume.is_pool:
                self._row(device, Probe(Signature("LVM2_thin_pool")), VolumeStatus.PART, volume.reason)
            else:
                self._row(device, _NOTHING, VolumeStatus.UNREADABLE, volume.reason)


def _any_known(source: BlockSource, table: PartitionTable) -> bool:
    """Whether something known lies where a table says that its partitions are."""
    for partition in table.partitions[:_PROBED_MAX]:
        if partition.size_bytes:
            part = Slice(source, partition.start_bytes, partition.size_bytes)
            if probe(part).signature.kind != UNKNOWN:
                return True
    return False


def _counts(table: PartitionTable, found: Probe) -> bool:
    """Whether a disk is its partitions, rather than what the mark of a whole-disk volume says."""
    kind = found.signature.kind
    if found.md is not None:
        # Only a superblock of version 0.90 can be both that of the disk and that of its last partition.
        ends = {p.start_bytes + md_v0_start(p.size_bytes) for p in table.partitions}
        return found.md.version == "0.90" and found.md.superblock_start in ends
    if kind == UNKNOWN:
        return True
    if not table.partitions or kind in _IN_FIRST_SECTOR:
        return False
    return not table.is_backup


def _array_name(member: MdMember) -> str:
    """As Linux names arrays: by number, else by what follows the name of the host they were made on."""
    name = re.sub(r"[^A-Za-z0-9_.+-]", "_", member.name.rpartition(":")[2])
    if name.isascii() and name.isdigit():
        return f"md{name}"
    return f"md-{name or member.array_uuid[:8]}"
