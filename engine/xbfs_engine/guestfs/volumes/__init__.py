"""The volumes of a restore point: what lies on its disks, put together and opened, before any filesystem is read.

``find_volumes`` is the way in. Partition tables are `formats.partitions`; here are LVM2, Linux software RAID, LUKS,
BitLocker and the recognition of what a volume holds. All of it is pure, over BlockSources; images are hostile.
"""

from __future__ import annotations

from xbfs_engine.guestfs.volumes.records import Disk, Volume, VolumeKey, Volumes, VolumeStatus
from xbfs_engine.guestfs.volumes.scan import find_volumes

__all__ = ["Disk", "Volume", "VolumeKey", "VolumeStatus", "Volumes", "find_volumes"]
