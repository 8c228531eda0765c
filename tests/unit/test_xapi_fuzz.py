"""Mutated answers of hosts, over real sockets: XML-RPC and HTTP heads end in a value or a typed error, never else."""

from __future__ import annotations

import socket
import xmlrpc.client
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.xapi_fake import http_200
from xbfs_engine.core.errors import PoolError
from xbfs_engine.source.xapi import transport, wire
from xbfs_engine.source.xapi.config import Address
from xbfs_engine.source.xapi.transport import Link, Refused
from xbfs_engine.source.xapi.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

HOST = Address("192.0.2.1")
RECORD = {"uuid": "u", "size": "12", "flag": True, "at": xmlrpc.client.DateTime("20260920T21:00:03Z"), "l": ["a", 1.5]}
GOOD = (
    xmlrpc.client.dumps(({"Status": "Success", "Value": {"OpaqueRef:1": RECORD}},), methodresponse=True).encode(),
    xmlrpc.client.dumps(({"Status": "Failure", "ErrorDescription": ["X", "y"]},), methodresponse=True).encode(),
    xmlrpc.client.dumps(xmlrpc.client.Fault(1, "x"), methodresponse=True).encode(),
)
TAGS = [b"<value>", b"</value>", b"<struct>", b"<array><data>", b"</member>", b"<nil/>", b"<i8>x</i8>", b"&amp;", b"<"]
TAGS += [
    b"<boolean>7</boolean>",
    b"<double>nan</double>",
    b"<dateTime.iso8601>x</dateTime.iso8601>",
    b"\x00",
    b"<fault>",
]
HEADS = (
    b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nbody",
    b"HTTP/1.0 302 Found\r\nLocation: https://192.0.2.2/export\r\n\r\n",
    b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 3\r\n\r\nabc",
)


@st.composite
def mutated(draw: st.DrawFn, originals: tuple[bytes, ...], pieces: list[bytes]) -> bytes:
    """An answer with a few stretches replaced, repeated or cut."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(start + draw(st.integers(0, 40)), len(data))
        data[start:end] = draw(st.sampled_from([*pieces, bytes(data[start:end]) * 2]) | st.binary(max_size=8))
    return bytes(data)


@contextmanager
def answering(module: ModuleType, answer: bytes) -> Iterator[None]:
    """Connections of ``module`` lead to a host that sends ``answer`` and nothing else."""
    ours, theirs = socket.socketpair()
    with theirs, ours, pytest.MonkeyPatch.context() as patch:
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        patch.setattr(module, "connect", lambda *_, **__: ours)
        yield


def call(answer: bytes) -> object:
    link = Link(HOST, {})
    with answering(transport, answer):
        try:
            return link.call("VM.get_all_records", ["session"], timeout_s=5)
        finally:
            link.close()


def test_the_originals_are_understood() -> None:
    value = call(http_200(GOOD[0]))
    assert isinstance(value, dict)
    assert list(value) == ["OpaqueRef:1"]
    with pytest.raises(Refused):
        call(http_200(GOOD[1]))
    with pytest.raises(PoolError):
        call(http_200(GOOD[2]))


@given(mutated(GOOD, TAGS))
@settings(max_examples=300)
def test_bodies(body: bytes) -> None:
    with suppress(PoolError, Refused):
        call(http_200(body))


@given(mutated(tuple(map(http_200, GOOD)), [b"\r\n", b": ", b"content-length: 9\r\n", b"HTTP/1.1 100 \r\n"]))
@settings(max_examples=150)
def test_answers(answer: bytes) -> None:
    with suppress(PoolError, Refused):
        call(answer)


@given(mutated(HEADS, [b"\r\n", b"\r\n\r\n", b":", b"HTTP/1.1 ", b" ", b"999"]))
@example(b"HTTP/1.1 \xc2\xb2\xc2\xb20 OK\r\n\r\n")
@settings(max_examples=300)
def test_heads_of_transfers(answer: bytes) -> None:
    stream = Wire(HOST, {}, timeout_s=5)
    with answering(wire, answer):
        try:
            head = stream.request("GET", "/export_raw_vdi?vdi=1", [("Cookie", "session_id=x")])
        except PoolError:
            return
        finally:
            if answer.find(b"\r\n\r\n") < 0:
                stream.abort()
        assert 0 <= head.status <= 999
        rest = memoryview(bytearray(len(answer)))
        assert bytes(rest[: stream.read_into(rest)]) == answer.partition(b"\r\n\r\n")[2]
        stream.abort()
