"""BitLocker: recognised, and opened with a password, a recovery password, a startup key file, or its clear key."""

from __future__ import annotations

from xbfs_engine.guestfs.volumes.bitlocker.header import BitLockerHeader, find_bitlocker
from xbfs_engine.guestfs.volumes.bitlocker.protectors import ways_in
from xbfs_engine.guestfs.volumes.bitlocker.unlock import unlock

__all__ = ["BitLockerHeader", "find_bitlocker", "unlock", "ways_in"]
