"""Which layout an image format has over a disk of a restore point: from the manifest, not the block map. Pure."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from xbfs_engine.core.limits import MIB
from xbfs_engine.formats.raw import RawLayout
from xbfs_engine.formats.vhd import VhdDynamicLayout, VhdFixedLayout, vhd_block_count, vhd_timestamp_s, vhd_uuid
from xbfs_engine.formats.vhd_records import BLOCK_SIZE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xbfs_engine.catalog.restore_point import DiskRecord, RestorePoint
    from xbfs_engine.formats.segments import Layout

_MIB_PER_BLOCK = BLOCK_SIZE // MIB


class ImageFormat(StrEnum):
    """Formats a disk can be exported in."""

    RAW = "raw"
    VHD = "vhd"
    VHD_FIXED = "vhd-fixed"


def allocated_blocks(disk: DiskRecord) -> NDArray[np.bool_]:
    """Which VHD blocks of 2 MiB hold data, by the manifest's data map."""
    blocks = vhd_block_count(disk.size_bytes)
    mibs = np.unpackbits(np.frombuffer(disk.data_map.bits(), dtype=np.uint8))
    padded = np.zeros(blocks * _MIB_PER_BLOCK, dtype=np.bool_)
    padded[: len(mibs)] = mibs[: len(padded)]
    found: NDArray[np.bool_] = padded.reshape(-1, _MIB_PER_BLOCK).max(axis=1)
    return found


def image_layout(point: RestorePoint, disk: DiskRecord, image_format: ImageFormat) -> Layout:
    """The layout of one disk's image. Raises ImageUnsupported for a VHD above 2040 GiB."""
    if image_format is ImageFormat.RAW:
        return RawLayout(disk.size_bytes)
    uuid16 = vhd_uuid(point.id, disk.number)
    timestamp_s = vhd_timestamp_s(point.time_ns // 1_000_000_000)
    if image_format is ImageFormat.VHD_FIXED:
        return VhdFixedLayout(disk.size_bytes, uuid16=uuid16, timestamp_s=timestamp_s)
    return VhdDynamicLayout(disk.size_bytes, allocated_blocks(disk), uuid16=uuid16, timestamp_s=timestamp_s)
