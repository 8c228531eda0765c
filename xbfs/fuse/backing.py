"""Files that the kernel reads and writes instead of asking: registered with the FUSE device by number. Root's only.

Numbers and records: Linux, include/uapi/linux/fuse.h, since 6.9. Any thread may call it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from contextlib import suppress
from typing import Final

_MAP: Final = struct.Struct("=iIQ")
"""fuse_backing_map: a descriptor, flags, nothing."""
_NUMBER: Final = struct.Struct("=I")
_OPEN: Final = 1 << 30 | _MAP.size << 16 | 229 << 8 | 1
_CLOSE: Final = 1 << 30 | _NUMBER.size << 16 | 229 << 8 | 2
"""FUSE_DEV_IOC_BACKING_OPEN and FUSE_DEV_IOC_BACKING_CLOSE: _IOW(229, …)."""


class DeviceBackings:
    """Of one mount, whose ``device`` it does not own."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._lock = threading.Lock()

    def open(self, fd: int) -> int:
        """The number of the file of a descriptor, which may be closed then. Raises OSError: EPERM for who is not root,
        EINVAL and ENOTTY from a kernel that can not do it, ELOOP for files of a stacked file system."""
        with self._lock:
            # A buffer that can be changed makes it tell what the call returned.
            if self._device < 0:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            number: int = fcntl.ioctl(self._device, _OPEN, bytearray(_MAP.pack(fd, 0, 0)))
            return number

    def close(self, number: int) -> None:
        """Nothing that is opened from now on is answered with it."""
        with self._lock, suppress(OSError, ValueError):  # the mount is gone, and all numbers with it
            fcntl.ioctl(self._device, _CLOSE, _NUMBER.pack(number))

    def leave(self) -> None:
        """The device is about to be closed."""
        with self._lock:
            self._device = -1
