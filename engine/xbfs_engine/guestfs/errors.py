"""What can be wrong with a guest's filesystem. All of it concerns one volume or one file, never the repository."""

from __future__ import annotations

from xbfs_engine.core.errors import SourceError


class GuestDamaged(SourceError):
    """The guest's filesystem contradicts itself or its checksums; the message names the block, inode or field."""

    default_hint = "check the filesystem inside the guest, or take the file from an earlier restore point"


class GuestUnsupported(SourceError):
    """What is asked for is stored in a way that is not read here; the message names the feature."""

    default_hint = "export the disk and read it with the guest's own system"


class GuestWrongKind(SourceError):
    """The node is not of the kind the call needs: a listing of a file, bytes of a directory, a target of no symlink."""
