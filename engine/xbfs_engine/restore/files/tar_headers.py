"""Headers of pax archives (POSIX.1-2001) as GNU tar and libarchive read them. Pure.

What pax has no words for is told as GNU tar does: attributes as ``SCHILY.xattr.*``, ACLs as text in ``SCHILY.acl.*``,
files with holes as GNU sparse files 1.0 (info tar, "PAX Format, Version 1.0").
"""

from __future__ import annotations

import struct
import tarfile
from typing import TYPE_CHECKING, Final

from xbfs_engine.guestfs import acl
from xbfs_engine.guestfs.base import Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.guestfs.base import FileExtent
    from xbfs_engine.restore.files.records import Account, Meta

BLOCK: Final = 512
DEVICE_MAX: Final = (1 << 21) - 1
"""Seven octal digits."""
_TYPES: Final = {
    Kind.FILE: tarfile.REGTYPE,
    Kind.DIRECTORY: tarfile.DIRTYPE,
    Kind.SYMLINK: tarfile.SYMTYPE,
    Kind.FIFO: tarfile.FIFOTYPE,
    Kind.CHARACTER_DEVICE: tarfile.CHRTYPE,
    Kind.BLOCK_DEVICE: tarfile.BLKTYPE,
}
_TIME_MAX: Final = 8**11
_ACLS: Final = {acl.ACCESS_NAME: "SCHILY.acl.access", acl.DEFAULT_NAME: "SCHILY.acl.default"}
_ACL_ENTRY: Final = struct.Struct("<HHI")
_ACL_TAGS: Final = {0x01: "user", 0x02: "user", 0x04: "group", 0x08: "group", 0x10: "mask", 0x20: "other"}


def member(name: bytes, meta: Meta, owner: tuple[int, int], account: Account) -> tarfile.TarInfo:
    """What an archive says of a file; attributes that it can not hold are told as lost."""
    info = tarfile.TarInfo(_text(name))
    info.type = _TYPES[meta.kind]
    info.mode = meta.mode
    info.uid, info.gid = owner
    info.size = meta.size_bytes if meta.kind is Kind.FILE else 0
    info.devmajor, info.devminor = meta.device
    headers: dict[str, str] = {}
    seconds, rest_ns = divmod(meta.mtime_ns, 10**9)
    if rest_ns or not 0 <= seconds < _TIME_MAX:
        headers["mtime"] = _time(meta.mtime_ns)
    else:
        info.mtime = seconds
    if meta.atime_ns != meta.mtime_ns:
        headers["atime"] = _time(meta.atime_ns)
    for xattr in meta.xattrs:
        if xattr.name in _ACLS:
            text = _acl(xattr.value)
            if text:
                headers[_ACLS[xattr.name]] = text
                continue
        else:
            try:
                headers[f"SCHILY.xattr.{_keyword(xattr.name)}"] = _text(xattr.value)
                continue
            except UnicodeDecodeError:
                pass
        account.lose("attributes or ACLs that an archive can not hold", meta.path)
    info.pax_headers = headers
    return info


def encoded(info: tarfile.TarInfo) -> bytes:
    """The header blocks."""
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def can_be_sparse(extents: Sequence[FileExtent]) -> bool:
    """Whether each part but the last ends with a block: GNU tar begins a block for each one."""
    return all(extent.offset % BLOCK == 0 for extent in extents)


def sparse(info: tarfile.TarInfo, extents: Sequence[FileExtent]) -> bytes:
    """Make it a file with holes, if it `can_be_sparse`; returns the map that comes before its data."""
    data = [(extent.offset, extent.length) for extent in extents if extent.is_data]
    places = data if data and sum(data[-1]) == info.size else [*data, (info.size, 0)]
    numbers = [len(places), *(number for place in places for number in place)]
    described = padded(b"".join(b"%d\n" % number for number in numbers))
    folder, _, last = info.name.rpartition("/")
    substitute = f"{folder}/GNUSparseFile.0/{last}" if folder else f"GNUSparseFile.0/{last}"
    # Of the two names, readers take the later one.
    info.pax_headers = {
        **info.pax_headers,
        "path": substitute,
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": info.name,
        "GNU.sparse.realsize": str(info.size),
    }
    info.name = substitute
    info.size = len(described) + sum(length for _, length in data)
    return described


def padded(data: bytes) -> bytes:
    """With zeros up to whole blocks."""
    return data + bytes(-len(data) % BLOCK)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _keyword(name: bytes) -> str:
    """The name of an attribute; keywords end with ``=``, which GNU tar writes so. Raises UnicodeDecodeError."""
    return name.decode().replace("%", "%25").replace("=", "%3D")


def _time(time_ns: int) -> str:
    sign = "-" if time_ns < 0 else ""
    return f"{sign}{abs(time_ns) // 10**9}.{abs(time_ns) % 10**9:09}"


def _acl(value: bytes) -> str:
    """The ACL as text with numbers for names (acl(5), "SHORT TEXT FORM"); empty if it is none."""
    if len(value) % _ACL_ENTRY.size != 4:
        return ""
    entries = []
    for tag, permissions, number in _ACL_ENTRY.iter_unpack(value[4:]):
        if tag not in _ACL_TAGS:
            return ""
        who = str(number) if tag in (acl.TAG_USER, acl.TAG_GROUP) else ""
        rights = "".join(letter if permissions & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1)))
        entries.append(f"{_ACL_TAGS[tag]}:{who}:{rights}")
    return ",".join(entries)
