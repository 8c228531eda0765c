"""Take and open file handles as an NFS server does (open_by_handle_at(2)); needs root.

file_handle.py take PATH | read MOUNT HANDLE OFFSET LENGTH | list MOUNT HANDLE
"""

from __future__ import annotations

import ctypes
import os
import sys

_BYTES = 128


class _Handle(ctypes.Structure):
    _fields_ = (("handle_bytes", ctypes.c_uint), ("handle_type", ctypes.c_int), ("data", ctypes.c_ubyte * _BYTES))


_libc = ctypes.CDLL(None, use_errno=True)


def take(path: str) -> str:
    handle = _Handle(handle_bytes=_BYTES)
    mount_id = ctypes.c_int()
    if _libc.name_to_handle_at(-100, path.encode(), ctypes.byref(handle), ctypes.byref(mount_id), 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    return f"{handle.handle_type}:{bytes(handle.data[: handle.handle_bytes]).hex()}"


def opened(mount: str, text: str) -> int:
    kind, data = text.split(":")
    raw = bytes.fromhex(data)
    handle = _Handle(len(raw), int(kind), (ctypes.c_ubyte * _BYTES)(*raw))
    root = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)
    fd = _libc.open_by_handle_at(root, ctypes.byref(handle), os.O_RDONLY)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), text)
    return int(fd)


def main() -> str:
    verb, path, *rest = sys.argv[1:]
    if verb == "take":
        return take(path)
    fd = opened(path, rest[0])
    if verb == "list":
        return " ".join(sorted(os.listdir(fd)))  # noqa: PTH208 - a Path has no descriptor
    return os.pread(fd, int(rest[2]), int(rest[1])).hex()


if __name__ == "__main__":
    sys.stdout.write(main() + "\n")
