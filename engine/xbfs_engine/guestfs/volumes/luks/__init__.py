"""LUKS1 and LUKS2: recognised, and opened with a passphrase or the content of a key file."""

from __future__ import annotations

from xbfs_engine.guestfs.volumes.luks.header import LuksHeader, find_luks
from xbfs_engine.guestfs.volumes.luks.unlock import unlock

__all__ = ["LuksHeader", "find_luks", "unlock"]
