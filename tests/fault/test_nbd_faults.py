"""NBD connections that fail in every way a host's can: what is read is right, or a typed error says what happened."""

from __future__ import annotations

import threading
import time
from itertools import count
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.engine import pattern
from tests.support.nbd_certificates import HOST_NAME, identity
from tests.support.nbd_poor import PoorServer, Request
from tests.support.nbd_reading import SHORT, always, opened, read_reads, steps
from tests.support.nbd_servers import free_port, target
from xbfs_engine.core.errors import (
    CertificateRejected,
    PoolUnreachable,
    SourceChanged,
    SourceUnreadable,
    TransferFailed,
    XapiFailure,
    XbfsError,
)
from xbfs_engine.source.nbd import HostBudget, NbdConnection, NbdDisk, NbdTarget, open_nbd_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractAsyncContextManager

MIB = 1 << 20
SIZE = 21 * MIB + 1536
DISK = pattern(7, SIZE)
SECRET = "/6d3a?session_id=OpaqueRef:secret"
NAMES = {SECRET: DISK}


async def check(*targets: NbdTarget, connections: int = 2, step: int = 4 * MIB, announce: bool = True) -> None:
    with trio.fail_after(20):
        async with opened(SIZE, *targets, connections=connections) as source:
            found = await read_reads(source, steps(SIZE, step), announce=announce)
    assert b"".join(found[read] for read in sorted(found)) == DISK


def once(how: str, at: int) -> Callable[[Request], str | None]:
    """A fault of the ``at``-th read only."""
    numbers = count()
    return lambda _: how if next(numbers) == at else None


@pytest.mark.parametrize("tls", [False, True])
async def test_a_server_as_poor_as_a_host(*, tls: bool) -> None:
    server = identity(HOST_NAME) if tls else None
    with PoorServer(NAMES, server) as poor:
        await check(target(poor.port, server, name=SECRET), connections=3)
        assert set(poor.names) == {SECRET}
        assert all(length <= 4 * MIB for _, length in poor.requests)
        assert sum(length for _, length in poor.requests) == SIZE


async def test_it_says_good_bye() -> None:
    with PoorServer(NAMES) as poor:
        await check(target(poor.port, name=SECRET), connections=1)
        poor.wait_until(lambda: not poor.open)
        assert poor.goodbyes == poor.accepted == 1


@pytest.mark.parametrize("announce", [False, True])
@pytest.mark.parametrize("how", ["error", "cut", "hang", "garbage"])
@pytest.mark.parametrize("at", [0, 5])
async def test_one_read_that_fails(how: str, at: int, *, announce: bool) -> None:
    with PoorServer(NAMES) as poor:
        poor.fault = once(how, at)
        timeouts = SHORT._replace(message_s=0.3)
        source = always(target(poor.port, name=SECRET))
        async with open_nbd_disk(source, HostBudget(), connections=2, size_bytes=SIZE, timeouts=timeouts) as disk:
            found = await read_reads(disk, steps(SIZE), announce=announce)
        assert b"".join(found[read] for read in sorted(found)) == DISK
        assert poor.accepted <= 3


@pytest.mark.parametrize("how", ["error", "cut", "garbage"])
async def test_a_place_that_can_never_be_read(how: str) -> None:
    bad = 9 * MIB
    with PoorServer(NAMES) as poor:
        poor.fault = lambda request: how if request.offset <= bad < request.offset + request.length else None
        with pytest.raises(TransferFailed) as caught:
            await check(target(poor.port, name=SECRET))
        assert sum(1 for offset, length in poor.requests if offset <= bad < offset + length) == 5
    text = str(caught.value)
    assert "host1" in text
    assert "secret" not in text
    if how == "error":
        assert f"offset {8 * MIB}: EIO" in text


async def test_every_connection_breaks_again_and_again() -> None:
    with PoorServer(NAMES) as poor:
        numbers = count(1)
        poor.fault = lambda _: "cut" if next(numbers) % 4 == 0 else None
        await check(target(poor.port, name=SECRET), step=MIB)
        assert poor.accepted > 5


async def test_a_disk_that_is_not_there() -> None:
    with PoorServer({}) as poor:
        with pytest.raises(TransferFailed) as caught:
            await check(target(poor.port, name=SECRET), connections=1)
        assert poor.accepted == 5
    assert "hung up instead of opening" in str(caught.value)
    assert "secret" not in str(caught.value) + caught.value.hint


async def test_few_places_on_the_host() -> None:
    with PoorServer(NAMES, limit=1) as poor:
        await check(target(poor.port, name=SECRET), connections=4)


async def test_a_host_goes_away_and_another_takes_over() -> None:
    with PoorServer(NAMES) as first, PoorServer(NAMES) as second:
        asked = 0
        first.fault = lambda _: "cut"

        async def targets() -> Sequence[NbdTarget]:
            nonlocal asked
            asked += 1
            return [target(first.port if asked <= 2 else second.port, name=SECRET)]

        async with open_nbd_disk(targets, HostBudget(), connections=2, size_bytes=SIZE, timeouts=SHORT) as disk:
            found = await read_reads(disk, steps(SIZE))
        assert b"".join(found[read] for read in sorted(found)) == DISK
        assert (first.accepted, second.accepted) == (2, 2)


async def test_addresses_that_lead_nowhere_are_passed_over() -> None:
    with PoorServer(NAMES) as poor:
        good = target(poor.port, name=SECRET)
        bad = [
            good._replace(host="::1"),
            good._replace(port=free_port()),
            good._replace(host="no such host"),
            good._replace(host="a" * 70 + ".lab"),
            good._replace(port=1 << 20),
        ]
        await check(*bad, good)
        for each in bad:
            with pytest.raises(TransferFailed):
                await NbdConnection.open(each, timeouts=SHORT)


@pytest.mark.parametrize("how", ["hang", "garbage"])
async def test_a_server_that_does_not_greet(how: str) -> None:
    with PoorServer(NAMES) as poor:
        poor.greet = lambda: how
        with pytest.raises(TransferFailed, match="no NBD server" if how == "garbage" else "no answer"):
            await NbdConnection.open(target(poor.port), timeouts=SHORT._replace(connect_s=0.2))


@pytest.mark.parametrize("reason", [PoolUnreachable("gone"), XapiFailure("VDI is gone", code="HANDLE_INVALID")])
async def test_xapi_does_not_tell_where(reason: XbfsError) -> None:
    asked = 0

    async def targets() -> Sequence[NbdTarget]:
        nonlocal asked
        asked += 1
        raise reason

    with pytest.raises(type(reason)):
        async with open_nbd_disk(targets, HostBudget(), connections=1, size_bytes=SIZE, timeouts=SHORT):
            pass
    assert asked == (5 if reason.retryable else 1)


async def test_no_network_for_nbd() -> None:
    with pytest.raises(SourceUnreadable, match="no host offers"):
        async with opened(SIZE):
            pass


async def test_another_size_than_xapi_says() -> None:
    with PoorServer({"": DISK[:-512]}) as poor, pytest.raises(SourceChanged, match=f"{SIZE - 512} bytes"):
        await check(target(poor.port))


async def test_another_size_after_reconnecting() -> None:
    with PoorServer(dict(NAMES)) as poor:
        async with opened(SIZE, target(poor.port, name=SECRET), connections=1) as disk:
            poor.disks[SECRET] = DISK + bytes(512)
            poor.hang_up()
            with pytest.raises(SourceChanged):
                await read_reads(disk, steps(SIZE))


async def test_the_body_fails_by_itself_and_keeps_its_error() -> None:
    with PoorServer(NAMES) as poor, pytest.raises(ZeroDivisionError):
        async with opened(SIZE, target(poor.port, name=SECRET)):
            raise ZeroDivisionError


@pytest.mark.parametrize("announce", [False, True])
async def test_cancelled_while_threads_wait(*, announce: bool) -> None:
    with PoorServer(NAMES) as poor:
        poor.fault = lambda _: "hang"
        started = time.monotonic()
        with trio.move_on_after(0.3) as scope:
            async with opened(SIZE, target(poor.port, name=SECRET)) as disk:
                await read_reads(disk, steps(SIZE), announce=announce)
        assert scope.cancelled_caught
        assert time.monotonic() - started < 3


async def test_reads_after_the_end_fail_at_once() -> None:
    with PoorServer(NAMES) as poor:
        async with opened(SIZE, target(poor.port, name=SECRET)) as disk:
            pass
        with pytest.raises(TransferFailed, match="closed"):
            disk.read_into(0, memoryview(bytearray(512)))


async def test_a_thread_does_not_outwait_a_stuck_event_loop() -> None:
    """Nothing but the thread's own patience helps when the loop does not run."""
    with PoorServer(NAMES) as poor:
        impatient = SHORT._replace(connect_s=0.02, message_s=0.02)
        source = always(target(poor.port, name=SECRET))
        failures: list[BaseException] = []

        def read(disk: NbdDisk) -> None:
            try:
                disk.read_into(0, memoryview(bytearray(512)))
            except TransferFailed as exc:
                failures.append(exc)

        async with open_nbd_disk(source, HostBudget(), connections=1, size_bytes=SIZE, timeouts=impatient) as disk:
            thread = threading.Thread(target=read, args=(disk,))
            thread.start()
            thread.join(5)  # on purpose in the event loop's thread
            assert not thread.is_alive()
        assert "nothing of the disk arrived" in str(failures[0])


async def test_one_opening_at_a_time_and_eight_connections_per_host() -> None:
    with PoorServer(NAMES) as poor:
        poor.opening_s = 0.02
        budget = HostBudget()

        def disk(connections: int) -> AbstractAsyncContextManager[NbdDisk]:
            source = always(target(poor.port, name=SECRET))
            return open_nbd_disk(source, budget, connections=connections, size_bytes=SIZE, timeouts=SHORT)

        async with disk(7) as seven:
            async with disk(4) as four:
                await trio.to_thread.run_sync(poor.wait_until, lambda: len(poor.names) == 8)
                with trio.move_on_after(0.1) as scope:
                    async with disk(1):
                        pass
                assert scope.cancelled_caught
                assert await read_reads(four, [(0, SIZE)]) == {(0, SIZE): DISK}
            async with disk(1) as one:
                assert await read_reads(one, [(0, SIZE)]) == {(0, SIZE): DISK}
                assert await read_reads(seven, [(0, SIZE)]) == {(0, SIZE): DISK}
        assert (poor.accepted, poor.opening_most) == (9, 1)
        assert budget.free("host1") == 8


async def test_certificates_are_not_tried_again() -> None:
    with PoorServer(NAMES, identity(HOST_NAME)) as poor:
        with pytest.raises(CertificateRejected):
            await check(target(poor.port, identity(HOST_NAME, serial=2), name=SECRET), connections=1)
        assert poor.accepted == 1
        assert poor.names == []


@pytest.mark.parametrize("pem", ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "\0", "ü"])
async def test_what_xapi_gives_is_no_certificate(pem: str) -> None:
    wrong = identity(HOST_NAME)._replace(trusted=pem)
    with pytest.raises(CertificateRejected):
        await NbdConnection.open(target(1, wrong), timeouts=SHORT)


@pytest.mark.parametrize("subject", ["", ".", "..", "a\0b", "ü", "\n", "." * 300, "a" * 300])
async def test_what_xapi_gives_is_no_name(subject: str) -> None:
    good = identity(HOST_NAME)
    with PoorServer(NAMES, good) as poor, pytest.raises((CertificateRejected, TransferFailed)):
        await NbdConnection.open(target(poor.port, good, subject=subject), timeouts=SHORT)


def test_secrets_are_not_shown() -> None:
    assert "secret" not in repr(target(1, identity(HOST_NAME), name=SECRET))
    assert "secret" not in f"{target(1, name=SECRET)} {[target(1, name=SECRET)]}"
