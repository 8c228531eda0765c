"""Which volume a guest means by ``UUID=…``, /dev/disk/by-label/…, /dev/mapper/vg-lv, /dev/xvda1 and so on.

Only names that the volumes themselves carry, or that follow from the order of the disks, can be told. Pure but for the
records it is made of.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.guestfs.tree.fstab import unescape_udev
from xbfs_engine.guestfs.volumes import VolumeStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from xbfs_engine.guestfs.guest import VolumeRow

_TAG: Final = re.compile(r"(UUID|LABEL|PARTUUID|PARTLABEL)=(.*)", re.DOTALL)
_BY: Final = re.compile(r"/dev/disk/by-(uuid|label|partuuid|partlabel)/(.+)", re.DOTALL)
_BY_ID: Final = re.compile(r"/dev/disk/by-id/(?:dm-name|md-name)-(.+)", re.DOTALL)
_NUMBERED: Final = re.compile(r"/dev/(?:xvd|hd)([a-z]{1,3})(\d*)")
_LETTERED: Final = re.compile(r"/dev/[sv]d([a-z]{1,3})(\d*)")
_COUNTED: Final = re.compile(r"/dev/(?:nvme(\d+)n1|mmcblk(\d+))(?:p(\d+))?")
_ARRAY: Final = re.compile(r"/dev/md/?(\d+)(p\d+)?")
_NAMED_ARRAY: Final = re.compile(r"/dev/md/([^/]+)")
_MAPPED: Final = re.compile(r"/dev/mapper/([^/]+)")
_LOGICAL: Final = re.compile(r"/dev/([A-Za-z0-9+_.-]+)/([A-Za-z0-9+_.-]+)")
_REMOVABLE: Final = re.compile(r"/dev/(?:sr|scd|fd|cdrom|cdrw|dvd|floppy)[\w-]*")
_WHOLE_OR_PART: Final = re.compile(r"(\d+)(?:p\d+)?(?:~\d+)?")
_ARRAY_NAME: Final = re.compile(r"md[^p]*(?:~\d+)?", re.DOTALL)
_LUKS: Final = re.compile(r"luks-([0-9a-fA-F-]{36})")
_DEPTH_MAX: Final = 4
_NO_VOLUME_GROUPS: Final = frozenset({"disk", "mapper", "md", "block", "char", "vx", "loop", "input"})


class Match(NamedTuple):
    """The volumes of a name; more than one if it is not unique. ``problem`` says why there is none."""

    rows: tuple[VolumeRow, ...]
    problem: str = ""


class Devices:
    """The volumes of a guest by the names that it gives them; ``crypttab`` as `parse_crypttab` gives it."""

    def __init__(self, rows: Sequence[VolumeRow], crypttab: Mapping[str, bytes] | None = None) -> None:
        self._rows = rows
        self._crypttab = crypttab or {}
        disks = (match[1] for row in rows if (match := _WHOLE_OR_PART.fullmatch(row.name)))
        self._disks = sorted({int(number) for number in disks})

    def find(self, source: bytes) -> Match:
        """Volumes with files come first, then they are in the order of the search."""
        rows, problem = self._find(source, 0)
        if not rows:
            return Match((), problem or "it is not among the disks of this restore point")
        return Match(tuple(sorted(rows, key=lambda row: row.status is not VolumeStatus.FILESYSTEM)))

    def _find(self, source: bytes, depth: int) -> Match:
        text = source.decode("utf-8", "replace")
        if match := _TAG.fullmatch(text):
            return self._tagged(match[1], match[2].strip("\"'"))
        if match := _BY.fullmatch(unescape_udev(source).decode("utf-8", "replace")):
            return self._tagged(match[1].upper(), match[2])
        if match := _BY_ID.fullmatch(text):
            found = self._mapped(match[1], depth)
            return found if found.rows else self._named(_array_name(match[1]))
        if match := _NUMBERED.fullmatch(text):
            return self._disk(_number(match[1]), match[2])
        if (match := _LETTERED.fullmatch(text)) or (match := _COUNTED.fullmatch(text)):
            return self._ordered(match)
        if match := _ARRAY.fullmatch(text):
            return self._array(f"md{match[1]}", match[2] or "")
        if match := _NAMED_ARRAY.fullmatch(text):
            return self._array(_array_name(match[1]), "")
        if match := _MAPPED.fullmatch(text):
            return self._mapped(match[1], depth)
        if (match := _LOGICAL.fullmatch(text)) and match[1] not in _NO_VOLUME_GROUPS:
            return self._logical(match[1], match[2])
        if _REMOVABLE.fullmatch(text):
            return Match((), "it is a removable drive")
        if text.startswith("/dev/"):
            return Match((), "this name does not tell which volume it is")
        return Match((), "it is no volume")

    def _where(self, test: Callable[[VolumeRow], bool]) -> Match:
        return Match(tuple(row for row in self._rows if test(row)))

    def _named(self, name: str) -> Match:
        return self._where(lambda row: row.name == name)

    def _tagged(self, tag: str, value: str) -> Match:
        if not value:
            return Match((), "it has no value")
        folded = value.casefold()
        if tag == "UUID":
            return self._where(lambda row: row.uuid.casefold() == folded)
        if tag == "PARTUUID":
            return self._where(lambda row: row.part_uuid.casefold() == folded)
        if tag == "LABEL":
            return self._where(lambda row: row.label == value)
        return self._where(lambda row: row.part_label == value)

    def _ordered(self, match: re.Match[str]) -> Match:
        """Names that count the disks there are."""
        if match.re is _LETTERED:
            index, part = _number(match[1]), match[2]
        else:
            index, part = int(match[1] or match[2]), match[3] or ""
        return self._disk(self._disks[index], part) if index < len(self._disks) else Match(())

    def _disk(self, number: int, part: str) -> Match:
        """A partition or the whole of a disk; ``xvda`` is the VM's disk 0, ``xvdb`` its disk 1 …"""
        return self._named(f"{number}p{part}" if part else str(number))

    def _array(self, name: str, part: str) -> Match:
        found = self._named(name + part)
        arrays = [row for row in self._rows if "linux_raid_member" in row.within and _ARRAY_NAME.fullmatch(row.name)]
        if not found.rows and not part and len(arrays) == 1:
            # Its number was given at a boot, and may be another one at the next.
            return Match(tuple(arrays))
        return found

    def _mapped(self, name: str, depth: int) -> Match:
        if match := _LUKS.fullmatch(name):
            return self._encrypted(match[1])
        if name in self._crypttab:
            if depth == _DEPTH_MAX:
                return Match((), "crypttab leads back to it")
            source = self._crypttab[name]
            text = source.decode("utf-8", "replace")
            tagged = re.fullmatch(r"(?:UUID=|/dev/disk/by-uuid/)(.+)", text)
            return self._encrypted(tagged[1].strip("\"'")) if tagged else self._find(source, depth + 1)
        # Device mapper doubles the dashes of both names and puts one between them.
        parts = name.replace("--", "\0").split("-")
        if len(parts) != 2:
            return Match(())
        group, volume = (part.replace("\0", "-") for part in parts)
        return self._logical(group, volume)

    def _encrypted(self, uuid: str) -> Match:
        """What is in an encrypted volume, else that volume itself."""
        folded = uuid.casefold()
        found = self._where(lambda row: row.crypt_uuid.casefold() == folded)
        return found if found.rows else self._where(lambda row: row.uuid.casefold() == folded)

    def _logical(self, group: str, volume: str) -> Match:
        wanted = f"logical volume {volume} of volume group {group}"
        return self._where(lambda row: row.place == wanted)


def _array_name(name: str) -> str:
    """As the search for volumes names arrays."""
    plain = re.sub(r"[^A-Za-z0-9_.+-]", "_", name.rpartition(":")[2])
    return f"md{plain}" if plain.isascii() and plain.isdigit() else f"md-{plain}"


def _number(letters: str) -> int:
    """``a`` 0, ``z`` 25, ``aa`` 26."""
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - ord("a") + 1
    return number - 1
