"""NTFS. A node is a file reference (record and sequence number), for a named stream with a digest of its name.

Links, fifos and sockets of Windows, of its Linux subsystem and of Interix are shown as what they are. What is kept
outside the volume (deduplicated, in the cloud, in an archive) or encrypted is refused when read. A file's named
streams are attributes if they fit; ``file:stream`` finds any of them, though it is not listed.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from fs_explorer.entry import EntryType
from fs_explorer.errors import CorruptDataError, UnsupportedFormatError
from fs_explorer.filesystems.ntfs import (
    AT_DATA,
    AT_FILE_NAME,
    AT_INDEX_ROOT,
    AT_LOGGED_UTILITY_STREAM,
    AT_STANDARD_INFORMATION,
    ATTR_COMPRESSED,
    ATTR_ENCRYPTED,
    ATTR_SPARSE,
    FILE_ATTRIBUTE_ENCRYPTED,
    FILE_ATTRIBUTE_READONLY,
    FILE_ATTRIBUTE_REPARSE_POINT,
    FILE_ATTRIBUTE_SYSTEM,
    FILE_NAME_INDEX_PRESENT,
    FILETIME_UNIX,
    NS_DOS,
    REC_DIRECTORY,
    REC_IN_USE,
    ROOT_RECNO,
    TAG_MOUNT_POINT,
    TAG_SYMLINK,
    TAG_WOF,
    convert_target,
    parse_file_name,
)
from fs_explorer.io.view import BufferRA
from fs_explorer.tree import Node

from xbfs_engine.core.errors import GuestDamaged, GuestWrongKind
from xbfs_engine.guestfs.base import XATTR_BYTES_MAX, DirEntry, Kind, NodeId, NodeStat, VolumeInfo, VolumeState, Xattr
from xbfs_engine.guestfs.explorer.library import VolumeBytes, encrypted, guarded, make_context
from xbfs_engine.guestfs.explorer.ntfs_tree import CheckedTree, Descriptors, Reparse
from xbfs_engine.guestfs.explorer.volume import ExplorerVolume, Found, Opened, wtf8

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fs_explorer.filesystems.ntfs import _Attr, _File, _FileName

    from xbfs_engine.formats.source import BlockSource

_TAG_LX_SYMLINK: Final = 0xA000_001D
_TAG_AF_UNIX: Final = 0x8000_0023
_TAG_LX_FIFO: Final = 0x8000_0024
"""MS-FSCC 2.1.2.1."""

_INTERIX_BYTES_MAX: Final = 4096 + 8
_STANDARD_INFORMATION: Final = struct.Struct("<QQQQI")
_STREAM_PREFIX: Final = b"user.ads."
_XATTR_NAME_BYTES_MAX: Final = 255
_PACKED_STREAM: Final = "WofCompressedData"
_REFERENCE_BYTES: Final = 8
_NUMBER_MASK: Final = (1 << 48) - 1


def open_ntfs(source: BlockSource) -> NtfsVolume:
    """Opens the volume. GuestDamaged, GuestUnsupported: it can not be read as a whole."""
    context = make_context()
    with guarded():
        volume = VolumeBytes(source, context.cache)
        tree = CheckedTree(volume, context)
        tree._file(ROOT_RECNO)
        reason = tree.dirty_reason()
        sectors, sector_bytes = struct.unpack("<Q", volume.read_exact(0x28, 8))[0], tree.sector_size
        return NtfsVolume(
            tree,
            VolumeInfo(
                type="ntfs",
                label=tree.volume_label() or "",
                uuid=f"{tree.serial:016X}",
                size_bytes=sectors * sector_bytes,
                state=VolumeState.DIRTY if reason else VolumeState.CLEAN,
                reason=reason,
            ),
        )


class _What(NamedTuple):
    """What a file is beyond its attributes."""

    kind: Kind
    link: bytes = b""
    """Of a symlink: the path it leads to, with slashes and without a drive."""
    target: bytes = b""
    """Of a symlink of Windows: the path as it is stored."""
    device: tuple[int, int] = (0, 0)


class NtfsVolume(ExplorerVolume):
    """An NTFS without its metadata files."""

    def __init__(self, tree: CheckedTree, info: VolumeInfo) -> None:
        super().__init__(info, _id(ROOT_RECNO, tree._file(ROOT_RECNO).seq))
        self._tree = tree
        self._descriptors = Descriptors(tree)

    def lookup(self, node: NodeId, name: bytes) -> DirEntry | None:
        """The entry of that exact name; ``file:stream`` is a file's named stream."""
        entry = super().lookup(node, name)
        if entry is not None or b":" not in name:
            return entry
        base, _, stream = name.partition(b":")
        entry = super().lookup(node, base)
        if entry is None:
            return None
        with guarded():
            if not any(wtf8(attr.name) == stream for attr in _streams(self._file(entry.node))):
                return None
        return entry._replace(name=name, node=NodeId(entry.node + _digest(stream)), kind=Kind.FILE)

    def _entries(self, node: NodeId) -> Iterator[Found]:
        file = self._directory(node)
        for reference, name in self._tree._walk_index(file):
            number = reference & _NUMBER_MASK
            if name.namespace != NS_DOS and not self._tree._hidden(file.recno, number, name.name):
                yield Found(wtf8(name.name), _id(number, reference >> 48), _kind_of_name(name))

    def _find(self, node: NodeId, name: bytes) -> Found | None:
        file = self._directory(node)
        hit = self._tree._search(file, name.decode("utf-8", "surrogatepass"))
        # The search also finds names that differ in case only.
        if (
            hit is None
            or wtf8(hit[1].name) != name
            or self._tree._hidden(file.recno, hit[0] & _NUMBER_MASK, hit[1].name)
        ):
            return None
        return Found(name, _id(hit[0] & _NUMBER_MASK, hit[0] >> 48), _kind_of_name(hit[1]))

    def _stat(self, node: NodeId) -> NodeStat:
        file = self._file(node)
        information = file.find(AT_STANDARD_INFORMATION)
        if information is None or len(information.value) < _STANDARD_INFORMATION.size:
            raise CorruptDataError(f"ntfs: record {file.recno} has no times")
        made, written, changed, read, attributes = _STANDARD_INFORMATION.unpack_from(information.value)
        stream = self._stream(file, node)
        what = self._what(file, attributes) if stream is None else _What(Kind.FILE)
        size, allocated = 0, 0
        if what.kind is Kind.FILE:
            data = file.find(AT_DATA) if stream is None else stream
            size, allocated = (data.size, self._allocated(file, data)) if data is not None else (0, 0)
        elif what.kind is Kind.SYMLINK:
            size = len(what.link)
        names = [parse_file_name(attr.value) for attr in file.attrs if attr.type == AT_FILE_NAME and attr.resident]
        directory = what.kind is Kind.DIRECTORY
        return NodeStat(
            inode=file.recno | int.from_bytes(node[_REFERENCE_BYTES:][:2], "big") << 48,
            kind=what.kind,
            mode=0o755 if directory else 0o777 if what.kind is Kind.SYMLINK else _file_mode(attributes),
            uid=0,
            gid=0,
            nlink=1 if directory or stream else max(1, sum(name.namespace != NS_DOS for name in names)),
            size_bytes=size,
            allocated_bytes=allocated,
            mtime_ns=_ns(written),
            atime_ns=_ns(read),
            ctime_ns=_ns(changed),
            btime_ns=_ns(made),
            rdev_major=what.device[0],
            rdev_minor=what.device[1],
        )

    def _allocated(self, file: _File, data: _Attr) -> int:
        packed = file.find(AT_DATA, _PACKED_STREAM)
        if packed is not None and data.name != _PACKED_STREAM:
            data = packed
        if data.resident:
            return 0
        compressed = data.comp_size is not None and data.flags & (ATTR_COMPRESSED | ATTR_SPARSE)
        return data.comp_size or 0 if compressed else data.alloc_size

    def _open(self, node: NodeId) -> Opened:
        file = self._file(node)
        stream = self._stream(file, node)
        if stream is not None:
            _refuse_encrypted(file, stream)
            return Opened(self._tree._attr_ra(stream), self._tree.data_ranges(stream))
        if self._what(file, _attributes(file)).kind is not Kind.FILE:
            raise GuestWrongKind(f"record {file.recno} is no file")
        data = file.find(AT_DATA)
        reparse = self._tree.reparse(file)
        if data is None or not data.size:
            return Opened(BufferRA(b""), None)
        _refuse_encrypted(file, data)
        if reparse is not None and reparse.tag != TAG_WOF:
            raise UnsupportedFormatError(
                None, f"the content of record {file.recno} is kept elsewhere (tag {reparse.tag:#x})"
            )
        packed = reparse is not None
        if packed:
            self._tree.check_compressed_file(file)
        opened = self._tree.open_file(Node("", EntryType.FILE, ref=(file.recno, file.seq)))
        return Opened(opened, None if packed else self._tree.data_ranges(data))  # type: ignore[arg-type]

    def _readlink(self, node: NodeId) -> bytes:
        file = self._file(node)
        what = self._what(file, _attributes(file))
        if what.kind is not Kind.SYMLINK:
            raise GuestWrongKind(f"record {file.recno} is no symlink")
        return what.link

    def _xattrs(self, node: NodeId) -> Iterator[Xattr]:
        if len(node) > _REFERENCE_BYTES:
            return
        file = self._file(node)
        attributes = _attributes(file)
        yield Xattr(b"user.ntfs.attrib", b"0x%08x" % attributes)
        descriptor = self._descriptors.of(file)
        if descriptor:
            yield Xattr(b"user.ntfs.acl", descriptor)
        reparse = self._tree.reparse(file)
        if reparse is not None:
            yield Xattr(b"user.ntfs.reparse", struct.pack("<IHH", reparse.tag, len(reparse.data), 0) + reparse.data)
        target = self._what(file, attributes).target
        if target:
            yield Xattr(b"user.ntfs.target", target)
        elsewhere = []
        for attr in _streams(file):
            name = _STREAM_PREFIX + wtf8(attr.name)
            large = attr.size > XATTR_BYTES_MAX or len(name) > _XATTR_NAME_BYTES_MAX
            if large or attr.flags & ATTR_ENCRYPTED:
                elsewhere.append(wtf8(attr.name))
            else:
                yield Xattr(name, self._tree._attr_bytes(attr, XATTR_BYTES_MAX))
        if elsewhere:
            yield Xattr(b"user.ntfs.streams", b"\0".join(elsewhere)[:XATTR_BYTES_MAX])

    def _file(self, node: NodeId) -> _File:
        number, sequence = int.from_bytes(node[:6], "big"), int.from_bytes(node[6:8], "big")
        if self._tree._record(number).base:
            raise CorruptDataError(f"ntfs: record {number} is a part of another")
        file = self._tree._file(number)
        if not file.flags & REC_IN_USE or (sequence and file.seq and sequence != file.seq):
            raise CorruptDataError(f"ntfs: record {number} is no longer what its directory entry says")
        return file

    def _directory(self, node: NodeId) -> _File:
        file = self._file(node)
        if len(node) > _REFERENCE_BYTES or not _is_directory(file):
            raise GuestWrongKind(f"record {file.recno} is no directory")
        return file

    def _stream(self, file: _File, node: NodeId) -> _Attr | None:
        """The named stream that a node is, or None if it is the file itself."""
        wanted = node[_REFERENCE_BYTES:]
        if not wanted:
            return None
        for attr in _streams(file):
            if _digest(wtf8(attr.name)) == wanted:
                return attr
        raise GuestDamaged(f"ntfs: record {file.recno} has no such stream")

    def _what(self, file: _File, attributes: int) -> _What:
        reparse = self._tree.reparse(file)
        if reparse is not None:
            if reparse.tag in (TAG_SYMLINK, TAG_MOUNT_POINT):
                return _windows_link(reparse)
            if reparse.tag == _TAG_LX_SYMLINK:
                # A version, then the path.
                return _What(Kind.SYMLINK, reparse.data[4:])
            if reparse.tag in (_TAG_AF_UNIX, _TAG_LX_FIFO):
                return _What(Kind.SOCKET if reparse.tag == _TAG_AF_UNIX else Kind.FIFO)
        if _is_directory(file):
            return _What(Kind.DIRECTORY)
        data = file.find(AT_DATA)
        if (
            reparse is None
            and data is not None
            and attributes & FILE_ATTRIBUTE_SYSTEM
            and not data.flags & ATTR_ENCRYPTED
        ):
            return self._interix(data)
        return _What(Kind.FILE)

    def _interix(self, data: _Attr) -> _What:
        """Links and devices as Interix stored them, and ntfs-3g does: a magic number, then the path or the numbers."""
        if not 8 <= data.size <= _INTERIX_BYTES_MAX:
            return _What(Kind.FILE)
        raw = self._tree._attr_ra(data).read_at(0, data.size)
        if raw.startswith(b"IntxLNK\1") and not len(raw) % 2:
            return _What(Kind.SYMLINK, wtf8(raw[8:].decode("utf-16-le", "surrogatepass")))
        kind = {b"IntxCHR\0": Kind.CHARACTER_DEVICE, b"IntxBLK\0": Kind.BLOCK_DEVICE}.get(raw[:8])
        if kind is not None and len(raw) == 24:
            return _What(kind, device=struct.unpack_from("<QQ", raw, 8))
        return _What(Kind.FILE)


def _windows_link(reparse: Reparse) -> _What:
    """MS-FSCC 2.1.2.4 and 2.1.2.5: two names; the first is where it leads, the other how it is shown."""
    symlink = reparse.tag == TAG_SYMLINK
    head = 12 if symlink else 8
    if len(reparse.data) < head:
        raise CorruptDataError("ntfs: a link ends within its head")
    at, length = struct.unpack_from("<HH", reparse.data)
    relative = symlink and bool(reparse.data[8] & 1)
    raw = reparse.data[head:][at : at + length]
    if len(raw) < length:
        raise CorruptDataError("ntfs: a link ends within its path")
    target = raw.decode("utf-16-le", "surrogatepass").rstrip("\0")
    return _What(Kind.SYMLINK, wtf8(convert_target(target, relative)), wtf8(target))


def _kind_of_name(name: _FileName) -> Kind:
    # Both may be something else, which only the file itself tells.
    if name.flags & FILE_ATTRIBUTE_REPARSE_POINT:
        return Kind.UNKNOWN
    if name.flags & FILE_NAME_INDEX_PRESENT:
        return Kind.DIRECTORY
    return Kind.UNKNOWN if name.flags & FILE_ATTRIBUTE_SYSTEM else Kind.FILE


def _is_directory(file: _File) -> bool:
    return bool(file.flags & REC_DIRECTORY) or file.find(AT_INDEX_ROOT, "$I30") is not None


def _attributes(file: _File) -> int:
    information = file.find(AT_STANDARD_INFORMATION)
    if information is None or len(information.value) < _STANDARD_INFORMATION.size:
        return 0
    return int(_STANDARD_INFORMATION.unpack_from(information.value)[4])


def _refuse_encrypted(file: _File, data: _Attr) -> None:
    whole = not data.name and (
        _attributes(file) & FILE_ATTRIBUTE_ENCRYPTED or file.find(AT_LOGGED_UTILITY_STREAM, "$EFS") is not None
    )
    if data.flags & ATTR_ENCRYPTED or whole:
        raise encrypted(f"record {file.recno} is encrypted by EFS")


def _streams(file: _File) -> Iterator[_Attr]:
    for attr in file.attrs:
        if attr.type == AT_DATA and attr.name not in ("", _PACKED_STREAM) and not attr.start_vcn:
            yield attr


def _file_mode(attributes: int) -> int:
    return 0o444 if attributes & FILE_ATTRIBUTE_READONLY else 0o644


def _ns(filetime: int) -> int:
    """From 100 ns since 1601."""
    return (filetime - FILETIME_UNIX) * 100


def _digest(stream: bytes) -> bytes:
    return hashlib.blake2b(stream, digest_size=8).digest()


def _id(number: int, sequence: int) -> NodeId:
    return NodeId(number.to_bytes(6, "big") + sequence.to_bytes(2, "big"))
