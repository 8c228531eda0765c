"""What a tree of files looks like, told by the kernel and by a reader of ours in the same words."""

from __future__ import annotations

import errno
import hashlib
import os
import stat as modes
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from xbfs_engine.guestfs.base import READ_BYTES_MAX, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xbfs_engine.guestfs.base import GuestFilesystem, NodeId

KINDS = {
    modes.S_IFREG: Kind.FILE,
    modes.S_IFDIR: Kind.DIRECTORY,
    modes.S_IFLNK: Kind.SYMLINK,
    modes.S_IFBLK: Kind.BLOCK_DEVICE,
    modes.S_IFCHR: Kind.CHARACTER_DEVICE,
    modes.S_IFIFO: Kind.FIFO,
    modes.S_IFSOCK: Kind.SOCKET,
}
PLAIN_HASH_MAX = 64 << 20
"""Larger files are compared by their data extents only."""

Extents = tuple[tuple[int, int, bool], ...]


class Facts(NamedTuple):
    """Everything of one node that a restore must bring back."""

    kind: str
    inode: int
    mode: int
    owner: tuple[int, int]
    nlink: int
    size: int
    allocated: int
    times: tuple[int, int, int]
    device: tuple[int, int]
    xattrs: dict[str, str]
    target: str
    extents: Extents
    content: str


def kernel_facts(root: Path, *, hidden: Callable[[bytes], bool] = lambda _: False) -> dict[str, Facts]:
    """Of each path below a mounted filesystem; ``hidden`` xattrs are left out."""
    found: dict[str, Facts] = {}
    waiting = [root]
    while waiting:
        path = waiting.pop()
        facts = _kernel_node(path, hidden)
        found[str(path.relative_to(root))] = facts
        if facts.kind == "d":
            waiting += path.iterdir()
    return found


def reader_facts(filesystem: GuestFilesystem) -> dict[str, Facts]:
    """Of each path of a reader; the same keys."""
    found: dict[str, Facts] = {}
    waiting = [(Path(), filesystem.root)]
    while waiting:
        path, node = waiting.pop()
        facts = reader_node(filesystem, node)
        found[str(path)] = facts
        if facts.kind == "d":
            for entry in filesystem.list(node):
                assert entry.kind.value in (filesystem.stat(entry.node).kind.value, "?")
                waiting.append((path / os.fsdecode(entry.name), entry.node))
    return found


def reader_node(filesystem: GuestFilesystem, node: NodeId) -> Facts:
    stat = filesystem.stat(node)
    is_file = stat.kind is Kind.FILE
    extents = tuple((e.offset, e.length, e.is_data) for e in filesystem.extents(node)) if is_file else ()
    return Facts(
        kind=stat.kind.value,
        inode=stat.inode,
        mode=stat.mode,
        owner=(stat.uid, stat.gid),
        nlink=stat.nlink,
        size=stat.size_bytes,
        allocated=stat.allocated_bytes,
        times=(stat.atime_ns or 0, stat.mtime_ns, stat.ctime_ns or 0),
        device=(stat.rdev_major, stat.rdev_minor),
        xattrs={os.fsdecode(x.name): short(x.value) for x in filesystem.xattrs(node)},
        target=os.fsdecode(filesystem.readlink(node)) if stat.kind is Kind.SYMLINK else "",
        extents=extents,
        content=digest(extents, lambda at, n: filesystem.read(node, at, n)) if is_file else "",
    )


def _kernel_node(path: Path, hidden: Callable[[bytes], bool]) -> Facts:
    stat = path.lstat()
    kind = KINDS[modes.S_IFMT(stat.st_mode)]
    extents: Extents = ()
    content = ""
    if kind is Kind.FILE:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOATIME)
        try:
            extents = tuple(_kernel_extents(descriptor, stat.st_size))
            content = digest(extents, lambda at, n: os.pread(descriptor, n, at))
        finally:
            os.close(descriptor)
    names = [name for name in os.listxattr(path, follow_symlinks=False) if not hidden(os.fsencode(name))]
    return Facts(
        kind=kind.value,
        inode=stat.st_ino,
        mode=modes.S_IMODE(stat.st_mode),
        owner=(stat.st_uid, stat.st_gid),
        nlink=stat.st_nlink,
        size=stat.st_size,
        allocated=stat.st_blocks * 512,
        times=(stat.st_atime_ns, stat.st_mtime_ns, stat.st_ctime_ns),
        device=(os.major(stat.st_rdev), os.minor(stat.st_rdev)),
        xattrs={name: short(os.getxattr(path, name, follow_symlinks=False)) for name in names},
        target=str(path.readlink()) if kind is Kind.SYMLINK else "",
        extents=extents,
        content=content,
    )


def _kernel_extents(descriptor: int, size: int) -> Iterator[tuple[int, int, bool]]:
    at = 0
    while at < size:
        try:
            data = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                raise
            data = size
        if data > at:
            yield at, data - at, False
        if data == size:
            return
        at = os.lseek(descriptor, data, os.SEEK_HOLE)
        yield data, at - data, True


def digest(extents: Extents, read: Callable[[int, int], bytes]) -> str:
    """Hash of the whole content, or of the data with its places if the file is large and sparse."""
    size = extents[-1][0] + extents[-1][1] if extents else 0
    hasher = hashlib.sha256()
    is_sparse = size > PLAIN_HASH_MAX
    pieces = [(at, length) for at, length, is_data in extents if is_data] if is_sparse else [(0, size)]
    for at, length in pieces:
        hasher.update(at.to_bytes(8, "big") * is_sparse)
        while length:
            # Odd pieces, so that reads begin and end anywhere in a block.
            data = read(at, min(length, READ_BYTES_MAX - 777))
            assert data
            hasher.update(data)
            at, length = at + len(data), length - len(data)
    return hasher.hexdigest()


def short(value: bytes) -> str:
    return value.hex() if len(value) <= 64 else f"{len(value)}:{hashlib.sha256(value).hexdigest()}"


def first_difference(ours: dict[str, Facts], kernels: dict[str, Facts]) -> str:
    """Empty if they are equal, else what differs first, for a message that can be read."""
    if only := sorted(set(ours) ^ set(kernels)):
        return f"{len(only)} paths are only on one side, such as {only[0]!r} (ours: {only[0] in ours})"
    for path, theirs in kernels.items():
        for field, mine, other in zip(Facts._fields, ours[path], theirs, strict=True):
            if mine != other:
                return f"{path!r}: {field} is {mine!r}, the kernel says {other!r}"
    return ""


def node_of(filesystem: GuestFilesystem, path: str) -> NodeId:
    """What a path names; each part must be there."""
    node = filesystem.root
    for name in path.split("/"):
        entry = filesystem.lookup(node, os.fsencode(name))
        assert entry is not None, path
        node = entry.node
    return node


def content(filesystem: GuestFilesystem, node: NodeId) -> bytes:
    """All of a file, read in odd pieces."""
    size = filesystem.stat(node).size_bytes
    return b"".join(filesystem.read(node, at, 70_001) for at in range(0, size, 70_001))
