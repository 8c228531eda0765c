"""Inode numbers: the same at every mount, found again without a table of all files. Pure.

A number is ``owner << 16 | code``. The owner is a hash of what a VM, a point or a damaged manifest is; the code says
which of its files. The few fixed directories have small numbers without an owner; ``at/<time>`` carries its seconds.
So a file handle kept by an NFS client over a restart leads to its file again. Numbers of guests' files are made
otherwise (``guests.places``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from blake3 import blake3

from xbfs.vfs.times import SECONDS_MAX

if TYPE_CHECKING:
    from collections.abc import Container

CODE_BITS: Final = 16
OWNER_BITS: Final = 46
TIME_TAG: Final = 1 << (OWNER_BITS + CODE_BITS)
"""Marks the numbers of ``at/<time>``. All numbers stay below 2^63: some programs take them for signed."""

ROOT: Final = 1
VMS: Final = 2
BY_ID: Final = 3
AT: Final = 4
META: Final = 5
STATUS: Final = 6
METRICS: Final = 7
LIVE: Final = 8

VM_DIRECTORY: Final = 0
VM_LATEST: Final = 1

POINT_DIRECTORY: Final = 0
POINT_VM: Final = 1
POINT_REPORT: Final = 2
POINT_DISKS: Final = 3
POINT_BY_ID: Final = 4
POINT_AT: Final = 5
POINT_FILES: Final = 6
POINT_ROOT: Final = 7
_IMAGES: Final = 256
_FORMATS_MAX: Final = 16

SESSION_LINK: Final = 8
"""Behind the codes of points: told from them also if a session's hash is a point's."""

DAMAGE_TEXT: Final = 0

TIME_DIRECTORY: Final = 0
TIME_LINK: Final = 1


class Parts(NamedTuple):
    """What an inode number says. ``owner`` is 0 for the fixed ones, whose number is the code."""

    owner: int
    code: int


def make(owner: int, code: int) -> int:
    """The number of one file of an owner."""
    return owner << CODE_BITS | code


def split(inode: int) -> Parts:
    """Owner and code."""
    return Parts(inode >> CODE_BITS, inode & (1 << CODE_BITS) - 1)


def session_link(name: str) -> int:
    """The number of the link to a session of that name."""
    return make(Owners(()).take(f"session {name}"), SESSION_LINK)


def time_inode(seconds: int, code: int) -> int:
    """The number of ``at/<time>`` or of a link to it."""
    return TIME_TAG | make(seconds, code)


def split_time(inode: int) -> Parts | None:
    """Seconds and code of an inode of ``at/``, else None."""
    seconds, code = split(inode ^ TIME_TAG)
    return Parts(seconds, code) if seconds <= SECONDS_MAX and code in (TIME_DIRECTORY, TIME_LINK) else None


def image_code(disk_number: int, image_format: int) -> int:
    """The code of an image of a disk (0 to 254) in a format (0 to 15)."""
    return _IMAGES + disk_number * _FORMATS_MAX + image_format


def split_image(code: int) -> tuple[int, int] | None:
    """Disk number and format, or None if the code is not an image's."""
    return divmod(code - _IMAGES, _FORMATS_MAX) if code >= _IMAGES else None


class Owners:
    """Hands out owners. Two identities with one hash (one chance in a million at 10,000 points) get neighbours."""

    def __init__(self, taken: Container[int]) -> None:
        self._taken = taken

    def take(self, identity: str) -> int:
        """The owner of an identity; the caller enters it into ``taken``."""
        digest = blake3(identity.encode(errors="surrogatepass")).digest()
        owner = int.from_bytes(digest[:8], "big") % (1 << OWNER_BITS)
        while owner == 0 or owner in self._taken:
            owner = (owner + 1) % (1 << OWNER_BITS)
        return owner
