"""The screen of a machine as its RFB server shows it (RFC 6143): one picture, of a server that nobody trusts.

Blocking, over any stream; keeps no state beside the connection. Raises InstantError for whatever is no RFB.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from xbfs_engine.core.errors import InstantError
from xbfs_engine.core.limits import KIB, MIB

if TYPE_CHECKING:
    from xbfs.instant.boottest.screen import Pixels

_SIDE_MAX: Final = 8192
_PIXELS_MAX: Final = 9 * MIB
"""3840 by 2160 and some: a picture takes 27 MiB, and as much again while it is compared."""
_TEXT_MAX: Final = 64 * KIB
_MESSAGES_MAX: Final = 256
_TRAFFIC_MAX: Final = 4
"""How many times the size of a screen may come until it is whole."""

_VERSION: Final = b"RFB 003.008\n"
_OLD_VERSION: Final = b"RFB 003.003\n"
_NO_SECURITY: Final = 1
_RAW: Final = 0
_NEW_SIZE: Final = -223
"""Pseudo-encoding: the screen has another size now (7.8.2)."""
_FORMAT: Final = struct.pack(">BBBBHHHBBB3x", 32, 24, 0, 1, 255, 255, 255, 16, 8, 0)
"""32 bits a pixel, little-endian: blue, green, red, nothing."""


class Stream(Protocol):
    """A connection. Both may raise whatever they like."""

    def read(self, length: int) -> bytes:
        """So many bytes; fewer at the end."""
        ...

    def send(self, data: bytes) -> None:
        """All of it."""
        ...


def screen_of(stream: Stream) -> Pixels:
    """A whole picture of the screen. Raises InstantError, and what the stream raises."""
    picture = _Picture(stream)
    picture.begin()
    return picture.take()


class _Picture:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._pixels: Pixels = np.zeros((0, 0, 3), np.uint8)
        self._seen = np.zeros((0, 0), np.bool_)
        self._came = 0

    def begin(self) -> None:
        """The handshakes (7.1 to 7.3)."""
        version = self._read(12)
        if version[:4] != b"RFB " or version[7:8] != b"." or version[11:] != b"\n" or version[4:7] < b"003":
            raise InstantError("the screen does not speak RFB")
        is_old = version < b"RFB 003.007\n"
        self._stream.send(_OLD_VERSION if is_old else _VERSION if version >= _VERSION else version)
        if is_old:
            (kind,) = self._numbers(">I")
            kinds = bytes([kind]) if kind < 256 else b""
        else:
            kinds = self._read(self._numbers(">B")[0])
        if _NO_SECURITY not in kinds:
            raise InstantError("the screen wants a password, or does not let us in")
        if not is_old:
            self._stream.send(bytes([_NO_SECURITY]))
        if version >= _VERSION and self._numbers(">I") != (0,):
            raise InstantError("the screen does not let us in")
        self._stream.send(b"\1")  # others may look too
        width, height, _, name = self._numbers(">HH16sI")
        self._resize(width, height)
        self._skip(name)
        self._stream.send(b"\0\0\0\0" + _FORMAT)
        self._stream.send(struct.pack(">BxHii", 2, 2, _RAW, _NEW_SIZE))

    def take(self) -> Pixels:
        """Ask until all of it was sent once, in a size that stays."""
        self._ask()
        for _ in range(_MESSAGES_MAX):
            if self._message():
                self._ask()
            elif self._seen.all():
                return self._pixels
        raise InstantError("the screen never comes as a whole")

    def _ask(self) -> None:
        height, width = self._seen.shape
        self._stream.send(struct.pack(">BBHHHH", 3, 0, 0, 0, width, height))

    def _message(self) -> bool:
        """One message of the server (7.6); whether the size is another."""
        match self._numbers(">B")[0]:
            case 0:
                (count,) = self._numbers(">xH")
                return any([self._rectangle() for _ in range(count)])
            case 1:
                self._skip(self._numbers(">x2xH")[0] * 6)
            case 2:
                pass
            case 3:
                self._skip(self._numbers(">3xI")[0])
            case other:
                raise InstantError(f"the screen sends message {other}, which nobody asked for")
        return False

    def _rectangle(self) -> bool:
        x, y, width, height, encoding = self._numbers(">HHHHi")
        if encoding == _NEW_SIZE:
            self._resize(width, height)
            return True
        rows, columns = self._seen.shape
        if encoding != _RAW or x + width > columns or y + height > rows:
            raise InstantError("the screen sends what it does not have, or in an encoding that nobody asked for")
        self._came += width * height
        if self._came > _TRAFFIC_MAX * self._seen.size:
            raise InstantError("the screen sends more than it has")
        data = np.frombuffer(self._read(4 * width * height), np.uint8).reshape(height, width, 4)
        self._pixels[y : y + height, x : x + width] = data[:, :, 2::-1]
        self._seen[y : y + height, x : x + width] = True
        return False

    def _resize(self, width: int, height: int) -> None:
        if not (0 < width <= _SIDE_MAX and 0 < height <= _SIDE_MAX and width * height <= _PIXELS_MAX):
            raise InstantError(f"the screen says it has {width} by {height} pixels")
        self._pixels = np.zeros((height, width, 3), np.uint8)
        self._seen = np.zeros((height, width), np.bool_)
        self._came = 0

    def _numbers(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self._read(struct.calcsize(layout)))

    def _skip(self, length: int) -> None:
        if length > _TEXT_MAX * 6:
            raise InstantError(f"the screen says {length} bytes that nobody wants")
        self._read(length)

    def _read(self, length: int) -> bytes:
        data = self._stream.read(length)
        if len(data) < length:
            raise InstantError("the screen has broken off")
        return data
