"""Linux software RAID put together: RAID 0, 1, 10 and linear, as far as its members allow.

Owns which members are trusted and how an array's bytes lie on them; superblocks are `md`. What Linux would not start
is refused with the reason: RAID 0 and linear with a member missing, RAID 10 with both copies of something missing.
Layouts: md(4); zones of RAID 0 and copies of RAID 10 as Linux ``drivers/md/raid0.c`` and ``raid10.c`` place them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported
from xbfs_engine.guestfs.volumes.md import ROLE_NONE, MdMember
from xbfs_engine.guestfs.volumes.sources import Chain, Copies, Derived, Except, Slice, Stripes, read_first

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.formats.source import BlockSource

_EVENTS_BEHIND_MAX: Final = 1
"""A member this far behind is up to date but for a superblock that was not written any more (mdadm's margin)."""

_CHUNK_MIN: Final = 4096
_CHUNK_MAX: Final = 1 << 30
_RAID0_ORIGINAL: Final = 1
_RAID0_ALTERNATE: Final = 2
_OFFSET_COPIES: Final = 1 << 16

LEVELS: Final = {-1: "linear", 0: "raid0", 1: "raid1", 4: "raid4", 5: "raid5", 6: "raid6", 10: "raid10"}


class MdArray(NamedTuple):
    """An array made of its members."""

    source: BlockSource
    notes: tuple[str, ...]
    """Sentences on what is not as it should be, though all data are there."""


class _Slot(NamedTuple):
    member: MdMember
    source: BlockSource
    """The whole member, but for its bad blocks."""


def assemble_array(found: Sequence[tuple[MdMember, BlockSource]]) -> MdArray:
    """The array of members that carry one UUID. GuestDamaged or GuestUnsupported if it can not be."""
    newest = max((member for member, _ in found), key=lambda member: member.events)
    level = LEVELS.get(newest.level, f"level {newest.level}")
    if newest.is_reshaping:
        raise GuestUnsupported(f"the {level} array was being reshaped")
    if newest.level not in (-1, 0, 1, 10):
        raise GuestUnsupported(f"{level} is not read here")
    if not 0 < newest.raid_disks < ROLE_NONE:
        raise GuestDamaged(f"the {level} array claims {newest.raid_disks} members")
    slots, notes = _slots(newest, found)
    if newest.level == 1:
        source = _raid1(newest, slots)
    elif newest.level == 10:
        source = _raid10(newest, slots)
    else:
        present = _all_present(level, newest, slots)
        source = _linear(newest, present) if newest.level == -1 else _raid0(newest, present)
    if len(slots) < newest.raid_disks:
        notes.append(f"{len(slots)} of {newest.raid_disks} members are there")
    return MdArray(source, tuple(notes))


def _slots(newest: MdMember, found: Sequence[tuple[MdMember, BlockSource]]) -> tuple[dict[int, _Slot], list[str]]:
    """Members that hold valid data, by place; the newest says which those are."""
    slots: dict[int, _Slot] = {}
    notes = []
    for member, source in sorted(found, key=lambda pair: -pair[0].events):
        role = newest.roles[member.number] if member.number < len(newest.roles) else ROLE_NONE
        if role >= newest.raid_disks:
            continue
        problem = member.problem
        if (member.level, member.layout, member.raid_disks, member.chunk_bytes) != (
            newest.level, newest.layout, newest.raid_disks, newest.chunk_bytes,
        ):  # fmt: skip
            problem = "it describes another array than the newest member does"
        elif newest.events - member.events > _EVENTS_BEHIND_MAX:
            problem = f"it is out of date, at event {member.events} of {newest.events}"
        elif not member.is_complete:
            problem = "it was being rebuilt"
        elif role in slots:
            raise GuestDamaged(f"two members claim place {role} of the array")
        if problem:
            notes.append(f"the member for place {role} is not used: {problem}")
            continue
        if member.bad:
            source = Except(source, member.bad, f"bad block of the member for place {role}")
        slots[role] = _Slot(member, source)
    return dict(sorted(slots.items())), notes


def _all_present(level: str, newest: MdMember, slots: dict[int, _Slot]) -> list[_Slot]:
    missing = [str(role) for role in range(newest.raid_disks) if role not in slots]
    if missing:
        raise GuestDamaged(f"{level} needs all {newest.raid_disks} members; missing: place {', '.join(missing[:8])}")
    return list(slots.values())


def _chunk(newest: MdMember) -> int:
    if not _CHUNK_MIN <= newest.chunk_bytes <= _CHUNK_MAX or newest.chunk_bytes % _CHUNK_MIN:
        raise GuestDamaged(f"the array claims chunks of {newest.chunk_bytes} bytes")
    return newest.chunk_bytes


def _raid1(newest: MdMember, slots: dict[int, _Slot]) -> BlockSource:
    if not slots:
        raise GuestDamaged("no member of the array holds valid data")
    copies = [Slice(slot.source, slot.member.data_start, newest.used_bytes) for slot in slots.values()]
    return Copies(copies) if len(copies) > 1 else copies[0]


def _linear(newest: MdMember, slots: list[_Slot]) -> BlockSource:
    chunk = _chunk(newest) if newest.chunk_bytes else 1
    return Chain([Slice(s.source, s.member.data_start, s.member.data_bytes // chunk * chunk) for s in slots])


def _raid0(newest: MdMember, slots: list[_Slot]) -> BlockSource:
    """Stripes over all members to the end of the smallest, then over those that have more, and so on."""
    chunk = _chunk(newest)
    sizes = [slot.member.data_bytes // chunk * chunk for slot in slots]
    ends = sorted(set(sizes))
    if len(ends) > 1 and newest.layout not in (_RAID0_ORIGINAL, _RAID0_ALTERNATE):
        raise GuestUnsupported("the members of the raid0 array differ in size, and it does not say how they are used")
    zones: list[BlockSource] = []
    start = done = 0
    for end in ends:
        parts = [
            Slice(slot.source, slot.member.data_start + start, end - start)
            for slot, size in zip(slots, sizes, strict=True)
            if size >= end
        ]
        first = done // chunk % len(parts) if newest.layout == _RAID0_ORIGINAL else 0
        zones.append(Stripes(parts, chunk, first))
        done += (end - start) * len(parts)
        start = end
    return Chain(zones) if len(zones) > 1 else zones[0]


def _raid10(newest: MdMember, slots: dict[int, _Slot]) -> BlockSource:
    near, far = newest.layout & 0xFF, newest.layout >> 8 & 0xFF
    if newest.layout >> 17 or not near or not far or min(near, far) > 1 or near * far > newest.raid_disks:
        raise GuestUnsupported(f"layout {newest.layout:#x} of the raid10 array is not known here")
    members: list[BlockSource | None] = [None] * newest.raid_disks
    for role, slot in slots.items():
        members[role] = Slice(slot.source, slot.member.data_start, newest.used_bytes)
    return Raid10(members, newest.used_bytes, _chunk(newest), near, far, bool(newest.layout & _OFFSET_COPIES))


class Raid10(Derived):
    """Chunks dealt out ``near`` times to members next to each other; ``far`` times over, on other parts of them.

    ``members`` are of ``member_bytes`` each, None where missing; GuestDamaged if some chunk has no copy.
    """

    def __init__(
        self,
        members: Sequence[BlockSource | None],
        member_bytes: int,
        chunk_bytes: int,
        near: int,
        far: int,
        is_offset: bool,
    ) -> None:
        self._members = members
        self._chunk_bytes = chunk_bytes
        self._near = near
        self._far = far
        self._is_offset = is_offset
        rows = member_bytes // chunk_bytes // far
        chunks = rows * len(members) // near
        used_rows = -(-chunks * near * far // len(members))
        self._far_chunks = 1 if is_offset else used_rows // far
        super().__init__(used_rows // far * len(members) // near * chunk_bytes)
        for chunk in range(len(members)):
            if not self._places(chunk, 0):
                raise GuestDamaged("members of the raid10 array are missing that hold all copies of some data")

    def _places(self, chunk: int, inside: int) -> list[tuple[BlockSource, int]]:
        """Where the copies of a chunk lie, as far as they are there."""
        count = len(self._members)
        places: list[tuple[BlockSource, int]] = []
        for copy in range(self._near):
            row, first = divmod(chunk * self._near + copy, count)
            if self._is_offset:
                row *= self._far
            for turn in range(self._far):
                source = self._members[(first + turn * self._near) % count]
                if source is not None:
                    places.append((source, (row + turn * self._far_chunks) * self._chunk_bytes + inside))
        return places

    def _read(self, offset: int, length: int) -> bytes:
        pieces = []
        while length:
            chunk, inside = divmod(offset, self._chunk_bytes)
            take = min(length, self._chunk_bytes - inside)
            pieces.append(read_first(self._places(chunk, inside), take))
            offset += take
            length -= take
        return b"".join(pieces)
