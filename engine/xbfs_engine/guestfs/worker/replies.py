"""What the caller of a worker checks before it believes an answer.

Every function takes a value from `frames.unpack` and raises `BadMessage` for anything but a sound answer to the very
question: whoever has taken over a worker can tell lies about the guest's files, and nothing else. All are pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from xbfs_engine.guestfs.base import (
    NODE_ID_MAX,
    DirEntry,
    FileExtent,
    NodeId,
    NodeStat,
    VolumeInfo,
    VolumeState,
    Xattr,
)
from xbfs_engine.guestfs.guest import (
    PAGE_ENTRIES_MAX,
    XATTRS_BYTES_MAX,
    XATTRS_MAX,
    ExtentPage,
    GuestMount,
    GuestTree,
    Listed,
    Page,
    VolumeRow,
    VolumeRows,
)
from xbfs_engine.guestfs.volumes import VolumeStatus
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
from xbfs_engine.guestfs.worker.frames import BadMessage

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from xbfs_engine.core.errors import GuestError

_MOUNTS_MAX: Final = 4096
_WITHIN_MAX: Final = 64
_PATH_BYTES_MAX: Final = 4096
"""Linux limits.h PATH_MAX."""
_VOLUME_NAME_BYTES_MAX: Final = 240
"""``<name>.json`` is a file name."""

_STATES: Final = {state.value: state for state in VolumeState}
_STATUSES: Final = {status.value: status for status in VolumeStatus}

_T = TypeVar("_T")


def error(value: object) -> GuestError:
    """What a request raises."""
    name, message, hint = _fields(value, 3)
    known = ERRORS.get(_text(name))
    if known is None:
        raise BadMessage("an error of an unknown class")
    return known(_text(message), hint=_text(hint))


def volumes(value: object) -> VolumeRows:
    """Rows with names that are unique and fit for a directory."""
    rows, notes = _fields(value, 2)
    found = tuple(_row(row) for row in _list(rows, ROWS_MAX))
    if len({row.name for row in found}) != len(found):
        raise BadMessage("two volumes of one name")
    return VolumeRows(found, _texts(notes, ROWS_MAX))


def _row(value: object) -> VolumeRow:
    (
        name, kind, label, uuid, size_bytes, place, within, status, reason,
        part_uuid, part_label, part_start_bytes, crypt_uuid,
    ) = _fields(value, len(VolumeRow._fields))  # fmt: skip
    encoded = _text(name).encode()
    if not is_name(encoded) or len(encoded) > _VOLUME_NAME_BYTES_MAX:
        raise BadMessage("a volume with a name that is none")
    return VolumeRow(
        _text(name), _text(kind), _text(label), _text(uuid), number(size_bytes), _text(place),
        _texts(within, _WITHIN_MAX), _member(_STATUSES, status), _text(reason), _text(part_uuid),
        _text(part_label), number(part_start_bytes), _text(crypt_uuid),
    )  # fmt: skip


def tree(value: object, names: Collection[str]) -> GuestTree:
    """Mounts on clean paths, of volumes named in ``names``."""
    kind, mounts, notes = _fields(value, 3)
    if kind not in ("", "unix", "windows"):
        raise BadMessage("a tree of an unknown kind")
    found = tuple(_mount(mount, names) for mount in _list(mounts, _MOUNTS_MAX))
    if len({mount.path for mount in found}) != len(found):
        raise BadMessage("two mounts on one path")
    if found and (not kind or (kind == "unix") != (found[0].path == b"/")):
        raise BadMessage("a tree without its root")
    return GuestTree(_text(kind), found, _texts(notes, ROWS_MAX))


def _mount(value: object, names: Collection[str]) -> GuestMount:
    path, volume, node, over, source = _fields(value, 5)
    path_bytes = _bytes(path, _PATH_BYTES_MAX)
    parts = path_bytes.split(b"/")
    if path_bytes != b"/" and (parts[0] or len(parts) < 2 or not all(is_name(part) for part in parts[1:])):
        raise BadMessage("a mount on a path that is none")
    if over is not None:
        over_volume, over_node = _fields(over, 2)
        over = (_volume(over_volume, names), node_id(over_node))
    return GuestMount(path_bytes, _volume(volume, names), node_id(node), over, _text(source))


def _volume(value: object, names: Collection[str]) -> str:
    name = _text(value)
    if name not in names:
        raise BadMessage("a volume that is not there")
    return name


def info(value: object) -> VolumeInfo:
    """What a filesystem says about itself."""
    kind, label, uuid, size_bytes, state, reason = _fields(value, 6)
    return VolumeInfo(
        _text(kind), _text(label), _text(uuid), number(size_bytes), _member(_STATES, state), _text(reason)
    )


def node_id(value: object) -> NodeId:
    """Names a file."""
    if type(value) is not bytes or not 0 < len(value) <= NODE_ID_MAX:
        raise BadMessage("a node without an id")
    return NodeId(value)


def stat(value: object) -> NodeStat:
    """Metadata."""
    if type(value) is not bytes or len(value) != STAT.size:
        raise BadMessage("metadata of another length")
    return _stat(value, 0)


def _stat(record: bytes, at: int) -> NodeStat:
    (
        inode, kind, mode, uid, gid, nlink, size_bytes, allocated_bytes,
        mtime_s, mtime_ns, atime_s, atime_ns, ctime_s, ctime_ns, btime_s, btime_ns, major, minor,
    ) = STAT.unpack_from(record, at)  # fmt: skip
    if (
        not inode
        or kind >= len(KINDS) - 1
        or mode > 0o7777
        or size_bytes > SIZE_MAX
        or allocated_bytes > SIZE_MAX
        or mtime_ns >= NS
    ):
        raise BadMessage("metadata out of range")
    return NodeStat(
        inode, KINDS[kind], mode, uid, gid, nlink, size_bytes, allocated_bytes, mtime_s * NS + mtime_ns,
        _time(atime_s, atime_ns), _time(ctime_s, ctime_ns), _time(btime_s, btime_ns), major, minor,
    )  # fmt: skip


def _time(seconds: int, ns: int) -> int | None:
    if ns < NS:
        return seconds * NS + ns
    if (seconds, ns) != NO_TIME:
        raise BadMessage("a time out of range")
    return None


def _listed(row: object) -> Listed:
    if type(row) is not tuple or len(row) != 3:
        raise BadMessage("an entry of another form")
    name, node, fields = row
    if type(name) is not bytes or not is_name(name):
        raise BadMessage("an entry with a name that is none")
    if type(fields) is not bytes or len(fields) not in (ENTRY.size, ENTRY.size + STAT.size):
        raise BadMessage("an entry of another length")
    cookie, kind = ENTRY.unpack_from(fields)
    if not 0 < cookie <= SIZE_MAX or kind >= len(KINDS):
        raise BadMessage("an entry out of range")
    entry = DirEntry(name, node_id(node), KINDS[kind], cookie)
    return Listed(entry, _stat(fields, ENTRY.size) if len(fields) > ENTRY.size else None)


def found(value: object, name: bytes) -> Listed | None:
    """The answer to a lookup of ``name``."""
    if value is None:
        return None
    listed = _listed(value)
    if listed.entry.name != name:
        raise BadMessage("another entry than was looked up")
    return listed


def page(value: object, cookie: int) -> Page:
    """Entries after ``cookie``."""
    rows, is_last = _fields(value, 2)
    entries = tuple([_listed(row) for row in _list(rows, PAGE_ENTRIES_MAX)])
    for listed in entries:
        if listed.entry.cookie <= cookie:
            raise BadMessage("a listing that goes back")
        cookie = listed.entry.cookie
    return Page(entries, _last(is_last, entries))


def extents(value: object, offset: int) -> ExtentPage:
    """Extents from the one that holds ``offset``."""
    rows, is_last = _fields(value, 2)
    found: list[FileExtent] = []
    for row in _list(rows, PAGE_ENTRIES_MAX):
        start, length, is_data = _fields(row, 3)
        extent = FileExtent(number(start), number(length), _flag(is_data))
        end = found[-1].offset + found[-1].length if found else min(offset, extent.offset)
        if not extent.length or extent.offset != end or extent.offset + extent.length > SIZE_MAX:
            raise BadMessage("extents with gaps")
        found.append(extent)
    return ExtentPage(tuple(found), _last(is_last, found))


def content(value: object, length: int) -> bytes:
    """At most ``length`` bytes."""
    return _bytes(value, length)


def link(value: object) -> bytes:
    """A symlink's target."""
    return _bytes(value, LINK_BYTES_MAX)


def xattrs(value: object) -> Sequence[Xattr]:
    """All attributes."""
    found = []
    size = 0
    for row in _list(value, XATTRS_MAX):
        name, data = _fields(row, 2)
        if type(name) is not bytes or type(data) is not bytes or not is_xattr(name, data):
            raise BadMessage("an attribute that is none")
        size += len(name) + len(data)
        found.append(Xattr(name, data))
    if size > XATTRS_BYTES_MAX:
        raise BadMessage("too many attributes")
    return found


def confinement(value: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a worker says of its sandbox when it starts."""
    in_force, missing = _fields(value, 2)
    return _texts(in_force, _WITHIN_MAX), _texts(missing, _WITHIN_MAX)


def answer(value: object) -> tuple[int, object]:
    """Status and what goes with it."""
    status, rest = _fields(value, 2)
    return number(status), rest


def _fields(value: object, count: int) -> tuple[object, ...]:
    if type(value) is not tuple or len(value) != count:
        raise BadMessage("a record of another form")
    return value


def _list(value: object, count_max: int) -> tuple[object, ...]:
    if type(value) is not tuple or len(value) > count_max:
        raise BadMessage("no list, or one that is too long")
    return value


def _text(value: object) -> str:
    if type(value) is not str or len(value) > TEXT_MAX or CONTROL.search(value):
        raise BadMessage("no text")
    return value


def _texts(value: object, count_max: int) -> tuple[str, ...]:
    return tuple(_text(item) for item in _list(value, count_max))


def _bytes(value: object, size_max: int) -> bytes:
    if type(value) is not bytes or len(value) > size_max:
        raise BadMessage("no bytes, or too many")
    return value


def number(value: object) -> int:
    """A size, offset or number, 0..2^63-1."""
    if type(value) is not int or not 0 <= value <= SIZE_MAX:
        raise BadMessage("a number out of range")
    return value


def _flag(value: object) -> bool:
    if type(value) is not bool:
        raise BadMessage("no flag")
    return value


def _last(value: object, entries: Sequence[object]) -> bool:
    is_last = _flag(value)
    if not is_last and not entries:
        raise BadMessage("an empty part of something longer")
    return is_last


def _member(table: dict[str, _T], value: object) -> _T:
    member = table.get(value) if type(value) is str else None
    if member is None:
        raise BadMessage("a word that is not known")
    return member
