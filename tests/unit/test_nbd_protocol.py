"""What a server may say: right answers are understood, everything else is TransferFailed."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbfs_engine.core.errors import TransferFailed
from xbfs_engine.source.nbd import protocol


def test_bytes_as_the_protocol_has_them() -> None:
    """Written out by hand from doc/proto.md."""
    flags = protocol.CLIENT_FLAGS
    assert flags == bytes.fromhex("00000001")
    assert protocol.option(protocol.OPTION_STARTTLS) == b"IHAVEOPT" + bytes.fromhex("00000005 00000000")
    assert protocol.option(protocol.OPTION_EXPORT_NAME, b"ab") == b"IHAVEOPT" + bytes.fromhex("00000001 00000002 6162")
    assert protocol.read_request(7, 0x200, 0x400) == bytes.fromhex(
        "25609513 0000 0000 0000000000000007 0000000000000200 00000400"
    )
    assert protocol.disconnect_request() == bytes.fromhex("25609513 0000 0002") + bytes(20)
    assert protocol.reply(bytes.fromhex("67446698 00000005 0000000000000007")) == (5, 7)
    assert protocol.export_size(bytes.fromhex("0000000000100000 0003") + bytes(124)) == 1 << 20
    assert protocol.option_reply(bytes.fromhex("0003e889045565a9 00000005 00000001 00000000"), 5) == (1, 0)
    protocol.check_greeting(b"NBDMAGICIHAVEOPT\x00\x01")
    protocol.check_greeting(b"NBDMAGICIHAVEOPT\x00\x03")


@pytest.mark.parametrize(
    "data",
    [b"", b"HTTP/1.1 400 Bad R", b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x01", b"NBDMAGICIHAVEOPT\x00\x00"],
)
def test_other_greetings(data: bytes) -> None:
    with pytest.raises(TransferFailed):
        protocol.check_greeting(data)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">QIII", 0x3E889045565A9, 6, 1, 0),
        struct.pack(">QIII", 0x3E889045565A8, 5, 1, 0),
        struct.pack(">QIII", 0x3E889045565A9, 5, 1 << 31, 1 << 31),
        b"",
    ],
)
def test_other_answers_to_an_option(data: bytes) -> None:
    with pytest.raises(TransferFailed):
        protocol.option_reply(data, 5)


@pytest.mark.parametrize("data", [struct.pack(">QH", 1 << 63, 3), struct.pack(">QH", 512, 0), b"short"])
def test_other_disks(data: bytes) -> None:
    with pytest.raises(TransferFailed):
        protocol.export_size(data)


@given(st.binary(max_size=200))
def test_noise(data: bytes) -> None:
    for decode in (
        protocol.check_greeting,
        protocol.reply,
        protocol.export_size,
        lambda raw: protocol.option_reply(raw, 5),
    ):
        with suppress(TransferFailed):
            decode(data)
