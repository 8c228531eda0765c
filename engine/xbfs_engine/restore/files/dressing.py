"""Gives a file of the target what the guest's has beside its content: owner, attributes, ACLs, mode, times.

What the target can not hold is told as a loss, never left out without a word, and rights never become wider by it. One
thread.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Final

from xbfs_engine.guestfs import acl
from xbfs_engine.guestfs.base import Kind

if TYPE_CHECKING:
    from xbfs_engine.guestfs.base import Xattr
    from xbfs_engine.restore.files.records import Account, Meta

_NAMESPACES: Final = frozenset((b"user", b"trusted", b"security", b"system"))
_CAPABILITY: Final = b"security.capability"
_ACL_NAMES: Final = (acl.ACCESS_NAME, acl.DEFAULT_NAME)
_ACL_ENTRY: Final = struct.Struct("<HHI")
_GROUP_OBJ, _MASK = 0x04, 0x10
_PRIVILEGES: Final = 0o6000
_SECONDS_SAFE: Final = range(1 << 31)
"""Every filesystem holds these; of other times it is looked whether they came out right."""


class Dresser:
    """``with_owner``: numbers of user and group are set, which only root may do."""

    def __init__(self, account: Account, *, with_owner: bool) -> None:
        self._account = account
        self._with_owner = with_owner

    def dress(self, file: int | str | bytes, meta: Meta, *, is_link: bool = False, strip_acl: bool = False) -> None:
        """``file``: a descriptor or a path; of a symlink (``is_link``) a path. ``strip_acl``: it may have an ACL that
        is not the guest's. Raises OSError only if mode or ACL can not be made as narrow as they should be.
        """
        # A change of the owner takes away capabilities and suid, one of the mode the right to set attributes.
        owned = self._own(file, meta, is_link=is_link)
        if strip_acl and not is_link:
            self.strip(file)
        mode = meta.mode
        for xattr in meta.xattrs:
            if not self._set(file, xattr, meta, owned=owned, is_link=is_link) and xattr.name == acl.ACCESS_NAME:
                mode = _narrowed(mode, xattr.value)
        if not is_link:
            if not owned and mode & _PRIVILEGES:
                mode &= ~_PRIVILEGES
                self._account.lose("suid and sgid, which go with the owner", meta.path)
            os.chmod(file, mode)  # noqa: PTH101 - or a descriptor
        self._time(file, meta, is_link=is_link)

    def _own(self, file: int | str | bytes, meta: Meta, *, is_link: bool) -> bool:
        """Whether the file now has the guest's owner."""
        if not self._with_owner or meta.owner is None:
            return False
        try:
            os.chown(file, *meta.owner, follow_symlinks=not is_link)
        except (OSError, OverflowError) as exc:
            self._account.lose(f"owners: {_reason(exc)}", meta.path)
            return False
        return True

    def _set(self, file: int | str | bytes, xattr: Xattr, meta: Meta, *, owned: bool, is_link: bool) -> bool:
        if xattr.name == _CAPABILITY and not owned:
            self._account.lose("capabilities, which go with the owner", meta.path)
            return False
        try:
            os.setxattr(file, xattr.name, xattr.value, follow_symlinks=not is_link)
        except OSError as exc:
            self._account.lose(f"{_what(xattr.name)}: {_reason(exc)}", meta.path)
            return False
        return True

    def strip(self, file: int | str | bytes) -> None:
        """Take away what a default ACL of the directory gave it."""
        for name in _ACL_NAMES:
            try:
                os.removexattr(file, name)
            except OSError as exc:
                if exc.errno not in (errno.ENODATA, errno.EOPNOTSUPP, errno.EINVAL, errno.EACCES):
                    raise

    def _time(self, file: int | str | bytes, meta: Meta, *, is_link: bool) -> None:
        try:
            os.utime(file, ns=(meta.atime_ns, meta.mtime_ns), follow_symlinks=not is_link)
        except (OSError, OverflowError) as exc:
            self._account.lose(f"times: {_reason(exc)}", meta.path)
            return
        if meta.mtime_ns // 10**9 not in _SECONDS_SAFE:
            found = os.stat(file, follow_symlinks=not is_link)  # noqa: PTH116 - or a descriptor
            if found.st_mtime_ns // 10**9 != meta.mtime_ns // 10**9:
                self._account.lose("times outside of what the target holds", meta.path)


def has_default_acl(directory: int) -> bool:
    """Whether what is made in the directory gets an ACL."""
    try:
        os.getxattr(directory, acl.DEFAULT_NAME)
    except OSError:
        return False
    return True


def _narrowed(mode: int, value: bytes) -> int:
    """The mode without the ACL: its group bits are the ACL's mask, which the owning group need not have all of."""
    group, mask = 0, 0o7
    if len(value) % _ACL_ENTRY.size != 4:
        return mode & ~0o070
    for tag, permissions, _ in _ACL_ENTRY.iter_unpack(value[4:]):
        if tag == _GROUP_OBJ:
            group = permissions & 0o7
        elif tag == _MASK:
            mask = permissions & 0o7
    return mode & ~0o070 | (group & mask & mode >> 3) << 3


def _what(name: bytes) -> str:
    if name in _ACL_NAMES:
        return "POSIX ACLs"
    namespace = name.partition(b".")[0]
    return f"attributes {namespace.decode()}.*" if namespace in _NAMESPACES else "attributes of unknown kind"


def _reason(exc: Exception) -> str:
    return (exc.strerror or str(exc)) if isinstance(exc, OSError) else str(exc)


NODES: Final = {
    Kind.FIFO: 0o010000,
    Kind.CHARACTER_DEVICE: 0o020000,
    Kind.BLOCK_DEVICE: 0o060000,
}
"""Types of files that mknod(2) makes."""
