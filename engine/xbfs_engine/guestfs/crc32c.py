"""CRC-32C (Castagnoli), which XFS, ext4 and btrfs check their metadata with. Pure.

The one place that knows where it is computed: by google-crc32c, with the processor's own instruction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def crc32c(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """The checksum, 32 bit; ``start`` is that of the bytes before, as in ``zlib.crc32``."""
    found: int = google_crc32c.extend(start, data if isinstance(data, bytes) else bytes(data))
    return found


def crc32c_rows(rows: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """The checksum of each row of a matrix of bytes."""
    value = google_crc32c.value
    return np.array([value(row.tobytes()) for row in rows], np.uint32)
