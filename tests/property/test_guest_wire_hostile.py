"""Damaged disks never make an honest worker break the rules: whatever readers say of them passes the checks."""

from __future__ import annotations

from functools import partial
from random import Random  # noqa: TID251 - seeded
from typing import TYPE_CHECKING, TypeVar

import pytest

from tests.support import guest_golden, xfs_golden
from tests.support.guest_sources import CHUNK
from xbfs_engine.core.errors import GuestError
from xbfs_engine.guestfs.guest import VolumeRows
from xbfs_engine.guestfs.reading import GuestReading
from xbfs_engine.guestfs.volumes import Disk
from xbfs_engine.guestfs.worker import replies, server
from xbfs_engine.guestfs.worker.forms import CONTENT, DONE, REFUSED
from xbfs_engine.guestfs.worker.frames import HEADER_BYTES, unpack

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.guest_sources import SparseSource

T = TypeVar("T")

IMAGES = {name: partial(guest_golden.image, name) for name in guest_golden.NAMES} | {
    name: partial(xfs_golden.image, name) for name in ("v4", "v5", "dirty")
}
NODES_MAX = 60


class Checked:
    """Questions to a guest as over the wire; an error as an answer is None."""

    def __init__(self, guest: GuestReading) -> None:
        self._guest = guest
        self.refused = 0

    def ask(self, kind: str, decode: Callable[[object], T], node: bytes = b"", *, length: int = 0) -> T | None:
        frame, *content = server._answer(self._guest, (kind, "0", node, 0, length, b"name"))
        status, answer = replies.answer(unpack(frame[HEADER_BYTES:]))
        if status == REFUSED:
            assert isinstance(replies.error(answer), GuestError)
            self.refused += 1
            return None
        if status == CONTENT:
            assert answer == len(content[0])
            return decode(content[0])
        assert status == DONE
        return decode(answer)


def damage(image: SparseSource, chance: Random) -> None:
    """Some bytes of what is stored, most of them near the beginning, where filesystems describe themselves."""
    stored = sorted(image.chunks)
    for _ in range(chance.choice([1, 5, 50, 500])):
        chunk = stored[min(int(chance.expovariate(6 / len(stored))), len(stored) - 1)]
        image.write_at(chunk * CHUNK + chance.randrange(CHUNK), chance.choice([b"\0", b"\xff", chance.randbytes(1)]))


def walk(checked: Checked) -> None:
    assert isinstance(checked.ask("volumes", replies.volumes), VolumeRows)
    checked.ask("tree", lambda value: replies.tree(value, {"0"}))
    checked.ask("info", replies.info)
    root = checked.ask("root", replies.node_id)
    todo = [] if root is None else [root]
    for node in todo:
        checked.ask("stat", replies.stat, node)
        checked.ask("lookup", lambda value: replies.found(value, b"name"), node)
        checked.ask("read", lambda value: replies.content(value, 5000), node, length=5000)
        checked.ask("extents", lambda value: replies.extents(value, 0), node)
        checked.ask("readlink", replies.link, node)
        checked.ask("xattrs", replies.xattrs, node)
        page = checked.ask("list", lambda value: replies.page(value, 0), node)
        if page is not None:
            todo += [entry.node for entry, _ in page.entries[: NODES_MAX - len(todo)]]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", IMAGES)
def test_what_readers_say_of_a_damaged_disk_keeps_the_rules(name: str, seed: int) -> None:
    image = IMAGES[name]()
    damage(image, Random(f"{name} {seed}"))
    walk(Checked(GuestReading([Disk("0", image)])))
