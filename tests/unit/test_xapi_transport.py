"""One XML-RPC connection against hosts that answer with anything but what they should."""

from __future__ import annotations

import threading
import time
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from tests.support.xapi_fake import Raw, fake_hosts, http_200, refuse
from xbfs_engine.core.errors import CertificateRejected, PoolError, PoolUnreachable
from xbfs_engine.source.xapi import transport
from xbfs_engine.source.xapi.transport import CallBroken, Link, Refused

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.xapi_fake import FakeHost
    from xbfs_engine.source.xapi.config import Address

STRUCT = b"<methodResponse><params><param><value><struct>%s</struct></value></param></params></methodResponse>"
MEMBER = b"<member><name>%s</name><value>%s</value></member>"
SUCCESS = MEMBER % (b"Status", b"Success")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[FakeHost]:
    with fake_hosts(tmp_path) as hosts:
        yield hosts[0]


@pytest.fixture
def link(host: FakeHost) -> Iterator[Link]:
    made = Link(host.address, {host.address.host: host.fingerprint})
    yield made
    made.close()


def good(value: bytes) -> Raw:
    return Raw(http_200(STRUCT % (SUCCESS + MEMBER % (b"Value", value))))


def deep(levels: int) -> bytes:
    return b"<array><data><value>" * levels + b"x" + b"</value></data></array>" * levels


@pytest.mark.parametrize(
    "answer",
    [
        http_200(b""),
        http_200(b"<html><body>It works!</body></html>"),
        http_200(b"\x00\xff" * 100),
        http_200(b"<methodResponse><params>"),
        http_200(STRUCT % b"")[:-30],
        http_200(STRUCT % b""),
        http_200(STRUCT % SUCCESS),
        http_200(STRUCT % (MEMBER % (b"Status", b"Failure"))),
        http_200(STRUCT % (MEMBER % (b"Status", b"Failure") + MEMBER % (b"ErrorDescription", b"x"))),
        http_200(STRUCT % (SUCCESS + MEMBER % (b"Value", b"<int>" + b"9" * 5000 + b"</int>"))),
        http_200(STRUCT % (SUCCESS + MEMBER % (b"Value", b"<dateTime.iso8601>yesterday</dateTime.iso8601>"))),
        http_200(STRUCT % (SUCCESS + MEMBER % (b"Value", b"<base64>AAAA</base64>"))),
        http_200(STRUCT % (SUCCESS + MEMBER % (b"Value", deep(10_000)))),
        http_200(
            b'<!DOCTYPE x [<!ENTITY a "' + b"a" * 100 + b'">]>' + STRUCT % (SUCCESS + MEMBER % (b"Value", b"&a;"))
        ),
        http_200(b"<methodResponse><fault><value>no struct</value></fault></methodResponse>"),
        http_200(
            b"<methodResponse><fault><value><struct>"
            + MEMBER % (b"faultCode", b"<int>1</int>")
            + MEMBER % (b"faultString", b"unexpected")
            + b"</struct></value></fault></methodResponse>"
        ),
        b"HTTP/1.1 302 Found\r\nlocation: https://127.0.0.2/\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n",
    ],
)
def test_what_is_no_answer_of_xapi_is_a_typed_error(host: FakeHost, link: Link, answer: bytes) -> None:
    host.methods["VM.get_all"] = lambda *_: Raw(answer)
    with pytest.raises(PoolError):
        link.call("VM.get_all", ["s"], timeout_s=5)
    # The next call starts afresh.
    host.methods["VM.get_all"] = lambda *_: good(b"fine")
    assert link.call("VM.get_all", ["s"], timeout_s=5) == "fine"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 1000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n<methodResponse>",
        b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 503 Service Unavailable\r\n\r\n<html>",
    ],
)
def test_a_connection_that_breaks_leaves_the_outcome_open(host: FakeHost, link: Link, answer: bytes) -> None:
    host.methods["VM.start"] = lambda *_: Raw(answer)
    with pytest.raises((CallBroken, PoolError)) as caught:
        link.call("VM.start", ["s"], timeout_s=5)
    if b"1000" not in answer:
        assert isinstance(caught.value, CallBroken)
    assert len(host.named("VM.start")) == 1


def test_long_answers_are_refused_in_bounded_memory(
    host: FakeHost, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "REPLY_BYTES_MAX", 1 << 20)
    endless = b"HTTP/1.1 200 OK\r\n\r\n" + STRUCT[:60] + b" " * (3 << 20)
    announced = b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n"
    for answer in (endless, announced):
        host.methods["VM.get_all"] = lambda *_, answer=answer: Raw(answer)
        tracemalloc.start()
        try:
            with pytest.raises(PoolError, match="longer than 1048576 bytes"):
                link.call("VM.get_all", ["s"], timeout_s=5)
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()


def test_a_host_that_says_nothing_is_left(host: FakeHost, link: Link) -> None:
    until = threading.Event()
    host.methods["VM.get_all"] = lambda *_: until.wait(10)
    before = time.monotonic()
    with pytest.raises(CallBroken, match="it took too long"):
        link.call("VM.get_all", ["s"], timeout_s=0.2)
    until.set()
    assert time.monotonic() - before < 3


def test_refusals_come_with_all_their_parameters(host: FakeHost, link: Link) -> None:
    host.methods["VM.start"] = refuse("VM_BAD_POWER_STATE", "OpaqueRef:1", "halted", "running")
    with pytest.raises(Refused) as caught:
        link.call("VM.start", ["s"], timeout_s=5)
    assert caught.value.description == ["VM_BAD_POWER_STATE", "OpaqueRef:1", "halted", "running"]
    assert host.connections == 1


def test_nobody_there(host: FakeHost) -> None:
    nobody = Link(host.address._replace(host="127.0.0.9"), {"127.0.0.9": host.fingerprint})
    with pytest.raises(PoolUnreachable) as caught:
        nobody.call("VM.start", ["s"], timeout_s=5)
    assert not isinstance(caught.value, CallBroken)


def test_nothing_is_sent_to_another_certificate(host: FakeHost) -> None:
    for pins in ({}, {host.address.host: ":".join(["00"] * 32)}, {"127.0.0.2": host.fingerprint}):
        with pytest.raises(CertificateRejected, match=host.fingerprint):
            Link(host.address, pins).call("session.login_with_password", ["root", "secret"], timeout_s=5)
    assert not host.received


def test_an_aborted_call_fails_at_once_and_closes_its_connection(host: FakeHost, link: Link) -> None:
    entered, until = threading.Event(), threading.Event()

    def wait(*_: object) -> str:
        entered.set()
        until.wait(10)
        return ""

    host.methods["VM.start"] = wait
    failures: list[Exception] = []

    def call() -> None:
        try:
            link.call("VM.start", ["s"], timeout_s=10)
        except PoolError as exc:
            failures.append(exc)

    thread = threading.Thread(target=call)
    thread.start()
    assert entered.wait(5)
    link.abort()
    thread.join(5)
    until.set()
    assert isinstance(failures[0], CallBroken)
    with pytest.raises(PoolUnreachable):
        link.call("VM.start", ["s"], timeout_s=1)
    assert len(host.named("VM.start")) == 1


def test_a_call_given_up_while_it_connects_is_never_sent(
    host: FakeHost, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, until, really = threading.Event(), threading.Event(), transport.connect
    made: list[ssl.SSLSocket] = []
    failures: list[Exception] = []

    def slow(address: Address, pins: dict[str, str], *, timeout_s: float) -> ssl.SSLSocket:
        entered.set()
        until.wait(10)
        made.append(really(address, pins, timeout_s=timeout_s))
        return made[0]

    def call() -> None:
        try:
            link.call("VM.start", ["s"], timeout_s=10)
        except PoolError as exc:
            failures.append(exc)

    monkeypatch.setattr(transport, "connect", slow)
    thread = threading.Thread(target=call)
    thread.start()
    assert entered.wait(5)
    link.abort()
    until.set()
    thread.join(5)
    assert isinstance(failures[0], PoolUnreachable)
    assert not isinstance(failures[0], CallBroken)
    assert made[0].fileno() == -1
    assert not host.received


def test_a_connection_the_host_closed_is_seen(host: FakeHost, link: Link) -> None:
    assert not link.is_stale()
    host.methods["VM.get_all"] = lambda *_: []
    assert link.call("VM.get_all", ["s"], timeout_s=5) == []
    assert not link.is_stale()
    host.methods["VM.get_all"] = lambda *_: good(b"last")
    assert link.call("VM.get_all", ["s"], timeout_s=5) == "last"
    deadline = time.monotonic() + 5
    while not link.is_stale() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert link.is_stale()
