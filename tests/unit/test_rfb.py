"""The screen by RFB: servers of every version, screens that change their size, and what lies."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xbfs.instant.boottest.rfb import screen_of
from xbfs_engine.core.errors import InstantError

if TYPE_CHECKING:
    from xbfs.instant.boottest.screen import Pixels


class Script:
    """A server that says what it has to say whatever it is told."""

    def __init__(self, said: bytes) -> None:
        self._said = said
        self.heard = b""

    def read(self, length: int) -> bytes:
        found, self._said = self._said[:length], self._said[length:]
        return found

    def send(self, data: bytes) -> None:
        self.heard += data


def rectangle(picture: Pixels, x: int = 0, y: int = 0) -> bytes:
    height, width, _ = picture.shape
    padded = np.zeros((height, width, 4), np.uint8)
    padded[:, :, :3] = picture[:, :, ::-1]
    return struct.pack(">HHHHi", x, y, width, height, 0) + padded.tobytes()


def update(*rectangles: bytes) -> bytes:
    return struct.pack(">BxH", 0, len(rectangles)) + b"".join(rectangles)


def new_size(width: int, height: int) -> bytes:
    return struct.pack(">HHHHi", 0, 0, width, height, -223)


def server_init(width: int, height: int, name: bytes = b"web") -> bytes:
    return struct.pack(">HH16xI", width, height, len(name)) + name


MODERN = b"RFB 003.008\n" + b"\2\2\1" + b"\0\0\0\0"
HELLOS = {
    "3.8": MODERN,
    "3.7": b"RFB 003.007\n" + b"\1\1",
    "3.3": b"RFB 003.003\n" + b"\0\0\0\1",
    "an odd one": b"RFB 003.889\n" + b"\1\1" + b"\0\0\0\0",
}
PICTURE = np.random.default_rng(1).integers(0, 256, (6, 10, 3), dtype=np.uint8)


@pytest.mark.parametrize("hello", HELLOS.values(), ids=HELLOS)
def test_a_picture_comes_whole_from_every_version(hello: bytes) -> None:
    script = Script(hello + server_init(10, 6) + update(rectangle(PICTURE)))
    assert np.array_equal(screen_of(script), PICTURE)
    assert script.heard[:12] == (hello[:12] if hello[8:11] != b"889" else b"RFB 003.008\n")
    assert script.heard.endswith(struct.pack(">BBHHHH", 3, 0, 0, 0, 10, 6)), "all of it is asked for"


def test_it_is_put_together_from_parts_between_other_messages() -> None:
    noise = b"\2" + struct.pack(">BxHH", 1, 0, 2) + bytes(12) + struct.pack(">B3xI", 3, 5) + b"clip!"
    said = (
        update(rectangle(PICTURE[:4]), rectangle(PICTURE[4:, :7], 0, 4))
        + noise
        + update(rectangle(PICTURE[4:, 7:], 7, 4))
    )
    assert np.array_equal(screen_of(Script(MODERN + server_init(10, 6) + said)), PICTURE)


def test_a_screen_that_changes_its_size_is_asked_for_again() -> None:
    said = update(rectangle(np.zeros((3, 4, 3), np.uint8)), new_size(10, 6)) + update(rectangle(PICTURE))
    script = Script(MODERN + server_init(4, 3) + said)
    assert np.array_equal(screen_of(script), PICTURE)
    assert script.heard.count(b"\3\0\0\0\0\0\0\x0a\0\6") == 1


LIES = {
    "no RFB": b"HTTP/1.1 200 OK\r\n",
    "an older one than there is": b"RFB 002.000\n",
    "a password": b"RFB 003.008\n\1\2",
    "nobody is let in": b"RFB 003.008\n\0\0\0\0\4gone",
    "a refusal": b"RFB 003.008\n\1\1\0\0\0\1" + server_init(10, 6) + update(rectangle(PICTURE)),
    "an old password": b"RFB 003.003\n\0\0\0\2",
    "no pixels": MODERN + server_init(0, 6),
    "too many": MODERN + server_init(8192, 8192),
    "too wide": MODERN + server_init(8193, 1),
    "too high": MODERN + server_init(1, 8193),
    "below": MODERN + server_init(10, 6) + update(rectangle(PICTURE, 0, 1)),
    "a long name": MODERN + struct.pack(">HH16xI", 10, 6, 0xFFFFFFFF),
    "outside": MODERN + server_init(10, 6) + update(rectangle(PICTURE, 1, 0)),
    "another encoding": MODERN + server_init(10, 6) + update(struct.pack(">HHHHi", 0, 0, 10, 6, 7)),
    "an unknown message": MODERN + server_init(10, 6) + b"\x96",
    "much clipboard": MODERN + server_init(10, 6) + struct.pack(">B3xI", 3, 0x7FFFFFFF),
    "the same for ever": MODERN + server_init(10, 6) + update(*[rectangle(PICTURE[:5])] * 60),
    "nothing for ever": MODERN + server_init(10, 6) + b"\2" * 1000,
    "broken off": MODERN + server_init(10, 6) + update(rectangle(PICTURE))[:-1],
    "a size for ever": MODERN + server_init(10, 6) + update(new_size(9, 9)) * 1000,
}


WHY = {
    "no RFB": "does not speak RFB",
    "an older one than there is": "does not speak RFB",
    "a password": "password",
    "nobody is let in": "does not let us in",
    "a refusal": "does not let us in",
    "an old password": "password",
    "no pixels": "0 by 6",
    "too many": "8192 by 8192",
    "too wide": "8193 by 1",
    "too high": "1 by 8193",
    "a long name": "bytes that nobody wants",
    "outside": "does not have",
    "below": "does not have",
    "another encoding": "nobody asked for",
    "an unknown message": "message 150",
    "much clipboard": "bytes that nobody wants",
    "the same for ever": "more than it has",
    "nothing for ever": "never comes as a whole",
    "broken off": "broken off",
    "a size for ever": "never comes as a whole",
}


@pytest.mark.parametrize("name", WHY)
def test_a_lie_is_told_for_what_it_is(name: str) -> None:
    more = b"" if name == "broken off" else bytes(99_999)
    with pytest.raises(InstantError, match=WHY[name]):
        screen_of(Script(LIES[name] + more))


def test_a_screen_may_be_drawn_several_times_and_again_in_a_new_size() -> None:
    part = rectangle(PICTURE[:5])
    small = update(*[rectangle(np.zeros((2, 4, 3), np.uint8))] * 5, new_size(10, 6))
    said = small + update(part, part, part) + update(rectangle(PICTURE))
    assert np.array_equal(screen_of(Script(MODERN + server_init(4, 3) + said)), PICTURE)


def test_what_the_client_says() -> None:
    script = Script(MODERN + server_init(10, 6) + update(rectangle(PICTURE)))
    screen_of(script)
    told = script.heard[12:]
    assert told[:2] == b"\1\1", "no security; shared"
    assert told[2:22] == b"\0\0\0\0" + struct.pack(">BBBBHHHBBB3x", 32, 24, 0, 1, 255, 255, 255, 16, 8, 0)
    assert told[22:34] == struct.pack(">BxHii", 2, 2, 0, -223)


@settings(max_examples=200)
@given(said=st.binary(max_size=300), start=st.sampled_from([b"", MODERN, MODERN + server_init(3, 2), *HELLOS.values()]))
def test_whatever_comes_is_a_picture_or_a_typed_error(said: bytes, start: bytes) -> None:
    try:
        found = screen_of(Script(start + said))
    except InstantError:
        return
    assert found.shape[2] == 3
