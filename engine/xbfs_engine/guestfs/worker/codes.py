"""How a worker codes its answers for `frames.pack`.

All functions are pure, and raise GuestDamaged for what a reader should not have given: so a damaged volume never looks
like a worker that breaks the rules.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import GuestDamaged
from xbfs_engine.guestfs.base import NAME_BYTES_MAX
from xbfs_engine.guestfs.guest import Listed
from xbfs_engine.guestfs.worker.forms import (
    CONTROL,
    ENTRY,
    ERRORS,
    KINDS,
    LINK_BYTES_MAX,
    NO_TIME,
    NS,
    ROWS_MAX,
    SIZE_MAX,
    STAT,
    TEXT_MAX,
    is_name,
    is_xattr,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.core.errors import GuestError
    from xbfs_engine.guestfs.base import NodeStat, VolumeInfo, Xattr
    from xbfs_engine.guestfs.guest import GuestTree, Page, VolumeRows

_KIND_NUMBERS: Final = {kind: number for number, kind in enumerate(KINDS)}


def clean(text: str) -> str:
    """A sentence or label without what a terminal would act upon, of bounded length."""
    return CONTROL.sub("\ufffd", text[:TEXT_MAX])


def code_error(error: GuestError) -> tuple[str, str, str]:
    """Class, message and hint. A class of which the caller does not know is damage to it."""
    name = type(error).__name__
    return name if name in ERRORS else GuestDamaged.__name__, clean(error.message), clean(error.hint)


def code_volumes(volumes: VolumeRows) -> object:
    """All rows and notes."""
    rows = [
        (
            row.name, clean(row.kind), clean(row.label), clean(row.uuid), row.size_bytes, clean(row.place),
            [clean(kind) for kind in row.within], row.status.value, clean(row.reason), clean(row.part_uuid),
            clean(row.part_label), row.part_start_bytes, clean(row.crypt_uuid),
        )
        for row in volumes.rows
    ]  # fmt: skip
    return rows, [clean(note) for note in volumes.notes[:ROWS_MAX]]


def code_tree(tree: GuestTree) -> object:
    """All mounts and notes."""
    mounts = [tuple(mount._replace(source=clean(mount.source))) for mount in tree.mounts]
    return tree.kind, mounts, [clean(note) for note in tree.notes[:ROWS_MAX]]


def code_info(info: VolumeInfo) -> object:
    """What a filesystem says about itself."""
    size_bytes = _size(info.size_bytes)
    return clean(info.type), clean(info.label), clean(info.uuid), size_bytes, info.state.value, clean(info.reason)


def code_stat(stat: NodeStat) -> bytes:
    """Metadata."""
    mtime = divmod(stat.mtime_ns, NS)
    atime = NO_TIME if stat.atime_ns is None else divmod(stat.atime_ns, NS)
    ctime = NO_TIME if stat.ctime_ns is None else divmod(stat.ctime_ns, NS)
    btime = NO_TIME if stat.btime_ns is None else divmod(stat.btime_ns, NS)
    try:
        return STAT.pack(
            stat.inode, _KIND_NUMBERS[stat.kind], stat.mode, stat.uid, stat.gid, stat.nlink, _size(stat.size_bytes),
            _size(stat.allocated_bytes), *mtime, *atime, *ctime, *btime, stat.rdev_major, stat.rdev_minor,
        )  # fmt: skip
    except struct.error as error:
        raise GuestDamaged(f"inode {stat.inode} has a field that is out of range: {error}") from error


def code_listed(listed: Listed | None) -> object:
    """An entry, with the metadata of what it names."""
    return None if listed is None else _code_listed(listed)


def code_page(page: Page) -> object:
    """A part of a listing. An entry whose metadata makes no sense has none."""
    rows = []
    for listed in page.entries:
        try:
            rows.append(_code_listed(listed))
        except GuestDamaged:
            rows.append(_code_listed(Listed(listed.entry, None)))
    return rows, page.is_last


def code_xattrs(xattrs: Sequence[Xattr]) -> object:
    """All attributes."""
    for name, value in xattrs:
        if not is_xattr(name, value):
            raise GuestDamaged(f"an attribute {name[:NAME_BYTES_MAX]!r} of {len(value)} bytes")
    return xattrs


def code_link(target: bytes) -> bytes:
    """A symlink's target."""
    if len(target) > LINK_BYTES_MAX:
        raise GuestDamaged(f"a symlink of {len(target)} bytes")
    return target


def _code_listed(listed: Listed) -> tuple[bytes, bytes, bytes]:
    (name, node, kind, cookie), stat = listed
    if not is_name(name):
        raise GuestDamaged(f"a directory has an entry named {name[:NAME_BYTES_MAX]!r}")
    fields = ENTRY.pack(cookie, _KIND_NUMBERS[kind])
    return name, node, fields if stat is None else fields + code_stat(stat)


def _size(size_bytes: int) -> int:
    if not 0 <= size_bytes <= SIZE_MAX:
        raise GuestDamaged(f"a size of {size_bytes} bytes")
    return size_bytes
