"""The thread that writes: order, bounds, failures, and its end."""

from __future__ import annotations

import threading
from functools import partial
from time import sleep

import pytest

from xbfs_engine.core.errors import StorageFull, TargetUnwritable
from xbfs_engine.restore.files import feed as module
from xbfs_engine.restore.files.feed import WAITING_BYTES_MAX, Feed
from xbfs_engine.restore.files.records import Account


def _raise(error: Exception) -> None:
    raise error


def test_all_is_done_in_its_order() -> None:
    done: list[int] = []
    feed = Feed(Account(), (StorageFull,))
    for number in range(10_000):
        feed.put(b"/", partial(done.append, number))
        if number % 997 == 0:
            feed.drain()
            assert len(done) == number + 1
    feed.drain()
    assert feed.close()
    assert done == list(range(10_000))


def test_what_waits_is_bounded() -> None:
    feed = Feed(Account(), ())
    waiting, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal waiting
        sleep(0.0001)
        with lock:
            waiting -= 1

    for _ in range(300):
        with lock:
            waiting += 1
            most = max(most, waiting)
        feed.put(b"/", work, 1 << 20)
    feed.drain()
    feed.close()
    assert 2 <= most <= WAITING_BYTES_MAX // (1 << 20) + 2


def test_failures_are_told_and_the_rest_goes_on() -> None:
    account = Account()
    done: list[int] = []
    feed = Feed(account, (StorageFull,))
    feed.put(b"/a", partial(_raise, TargetUnwritable("no")))
    feed.put(b"/b", partial(done.append, 1))
    feed.drain()
    feed.close()
    assert done == [1]
    assert [(path, error.message) for path, error in account.failures] == [(b"/a", "no")]


@pytest.mark.parametrize("error", [StorageFull("full"), ValueError("a bug")])
def test_what_ends_all_is_raised_where_is_read(error: Exception) -> None:
    account = Account()
    done: list[int] = []
    feed = Feed(account, (StorageFull,))
    feed.put(b"/a", partial(_raise, error))
    for _ in range(40):
        try:
            feed.put(b"/b", partial(done.append, 1))
        except type(error):
            break
    with pytest.raises(type(error)):
        feed.drain()
    with pytest.raises(type(error)):
        feed.put(b"/c", partial(done.append, 1), WAITING_BYTES_MAX)
    assert feed.close()
    assert not done
    assert not account.failures


def test_closing_drops_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    go, started = threading.Event(), threading.Event()
    done: list[int] = []

    def hang() -> None:
        started.set()
        go.wait(20)

    feed = Feed(Account(), ())
    feed.put(b"/", hang, 1 << 20)
    assert started.wait(20)
    feed.put(b"/", partial(done.append, 1))
    monkeypatch.setattr(module, "ENDING_S", 0.05)
    assert not feed.close(), "it still writes"
    go.set()
    feed._thread.join(20)
    assert not done
