"""Guests read in workers: the same answers as in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support import guest_golden, xfs_golden
from tests.support.volume_images import BytesSource, golden_disks
from xbfs_engine.core.errors import GuestError
from xbfs_engine.core.runtime import SystemClock
from xbfs_engine.guestfs.reading import GuestReading
from xbfs_engine.guestfs.volumes import Disk
from xbfs_engine.guestfs.worker.client import GuestWorkers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xbfs_engine.guestfs.guest import Guest


@pytest.fixture(scope="module")
def workers() -> Iterator[GuestWorkers]:
    with GuestWorkers(SystemClock()) as made:
        yield made


def all_disks() -> list[Disk]:
    disks = [Disk(str(number), guest_golden.image(name)) for number, name in enumerate(guest_golden.NAMES)]
    disks += [Disk(f"x{name}", xfs_golden.image(name)) for name in ("v4", "v5", "dirty")]
    return [*disks, *(Disk(f"l{number}", BytesSource(data)) for number, data in golden_disks("lvm").items())]


def said(call: Callable[[], object]) -> object:
    """What a call gives or raises."""
    try:
        return call()
    except GuestError as error:
        return type(error), error.message, error.hint


def everything(guest: Guest) -> dict[tuple[str, bytes], object]:
    """All answers on all files of a guest."""
    answers: dict[tuple[str, bytes], object] = {("volumes", b""): guest.volumes(), ("tree", b""): guest.tree()}
    for row in guest.volumes().rows:
        name = row.name
        answers[name, b""] = said(lambda name=name: (guest.info(name), guest.root(name)))  # type: ignore[misc]
        if isinstance(answers[name, b""], tuple) and len(answers[name, b""]) == 2:  # type: ignore[arg-type]
            todo = [(guest.root(name), b"/")]
            for node, path in todo:
                page = said(lambda name=name, node=node: guest.list(name, node))  # type: ignore[misc]
                for call in (guest.stat, guest.extents, guest.readlink, guest.xattrs):
                    answers[name + call.__name__, path] = said(lambda: call(name, node))  # type: ignore[operator]  # noqa: B023
                answers[name + "read", path] = said(lambda: guest.read(name, node, 1000, 100_000))  # noqa: B023
                answers[name + "list", path] = page
                if hasattr(page, "entries"):
                    todo += [(listed.entry.node, path + listed.entry.name + b"/") for listed in page.entries]
    return answers


def test_every_answer_is_the_same_as_without_a_worker(workers: GuestWorkers) -> None:
    disks = all_disks()
    expected = everything(GuestReading(disks))
    assert len(expected) > 10_000
    assert everything(workers.open("all", disks)) == expected
