"""A real server of RFB: the picture of QEMU's is the one that QEMU itself writes to a file."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

import numpy as np

from tests.support.qemu_guest import Guest, file_disk
from xbfs.instant.boottest.rfb import screen_of
from xbfs.instant.boottest.screen import colours, pixels_of

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs.instant.boottest.screen import Pixels

GRAPHICS = bytes.fromhex("b81300cd10b800a08ec031ffb9ffff89f8aae2fbebfe")
"""mov ax,13h; int 10h; es = a000h; 65535 times: stosb of the offset; jmp $: 320 by 200 doubled pixels, all colours."""


class Connection:
    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rb")
        self.send = connection.sendall

    def read(self, length: int) -> bytes:
        return self._file.read(length)


def picture_at(path: Path) -> Pixels:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(path))
        return screen_of(Connection(connection))


def test_the_picture_is_qemus_own(tmp_path: Path) -> None:
    disk, screen, dump = tmp_path / "disk", tmp_path / "vnc", tmp_path / "dump.ppm"
    disk.write_bytes((GRAPHICS.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0"))
    with Guest(file_disk(disk), tmp_path / "guest", screen=screen) as guest:
        end = time.monotonic() + 60
        while not screen.exists() or colours(picture_at(screen)) < 200:
            assert time.monotonic() < end
            time.sleep(0.2)
        guest.qmp("stop")
        guest.qmp("screendump", filename=str(dump))
        found = picture_at(screen)
    assert found.shape == (400, 640, 3)
    assert np.array_equal(found, pixels_of(dump.read_bytes()))
