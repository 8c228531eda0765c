"""Who else has a file open: openings of this process and of others, maps without a descriptor, and nobody."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import MemoryDisk
from xbfs.view.overlay import create_overlay, open_overlay
from xbfs.view.overlay.leases import has_others, has_writers
from xbfs_engine.core.errors import OverlayInUse

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 20
HOLD = "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR); print(flush=True); sys.stdin.read()"


def test_openings_and_maps_are_seen_for_as_long_as_they_are_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    fd = os.open(path, os.O_RDWR)
    assert has_writers(path)
    assert not has_others(fd)
    reader = os.open(path, os.O_RDONLY)
    assert has_others(fd)
    os.close(reader)
    assert not has_others(fd)

    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    writer = os.open(path, os.O_RDWR)
    memory = libc.mmap(None, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, writer, 0)
    os.close(writer)
    assert has_others(fd)
    os.close(fd)
    assert has_writers(path)
    libc.munmap(memory, SIZE)
    assert not has_writers(path)


def test_an_overlay_is_not_opened_while_a_program_writes_to_it(tmp_path: Path) -> None:
    base = MemoryDisk.holding(SIZE, [0])
    create_overlay(tmp_path / "overlay", base, identity=b"test").close()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "overlay/data")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(OverlayInUse, match="still writes"):
            open_overlay(tmp_path / "overlay", base, identity=b"test")
        holder.kill()
    open_overlay(tmp_path / "overlay", base, identity=b"test").close()
