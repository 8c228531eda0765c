"""Numbers of guests' files: stable, shared by hardlinks only, given back; and what `root/` and clashing names show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from tests.support.guests_here import GuestHere
from tests.support.points import point
from xbfs.vfs.guests.door import Door, DoorShut
from xbfs.vfs.guests.places import Directory, Node, Places, Top, View, VolumeView, trail
from xbfs.vfs.guests.point import PointGuest, Spot
from xbfs_engine.guestfs.base import Kind, NodeId
from xbfs_engine.guestfs.guest import GuestMount, GuestTree, VolumeRow, VolumeRows
from xbfs_engine.guestfs.volumes.records import VolumeStatus

if TYPE_CHECKING:
    from xbfs.vfs.guests.source import KeyedGuest


POINT = point("vm")


def guest(rows: tuple[VolumeRow, ...] = (), tree: GuestTree | None = None) -> PointGuest:
    here = GuestHere([])
    here._rows = VolumeRows(rows, ())
    here._tree = tree
    return PointGuest(POINT, "vms/vm/x", lambda: cast("KeyedGuest", here))


def row(name: str, status: VolumeStatus = VolumeStatus.FILESYSTEM) -> VolumeRow:
    return VolumeRow(name, "ext4", "", "", 1, "", (), status, "")


def node(number: int) -> NodeId:
    return NodeId(number.to_bytes(8, "big"))


def test_files_share_a_number_and_directories_and_links_do_not() -> None:
    def numbers() -> list[int]:
        places, owner = Places(), guest()
        top, volume = owner.top(View.FILES, 5), owner.view(View.FILES, "0p1")
        root = places.node(volume, NodeId(b""), Kind.DIRECTORY, top, b"0p1")
        one = places.node(volume, node(1), Kind.DIRECTORY, root, b"one")
        two = places.node(volume, node(2), Kind.DIRECTORY, root, b"two")
        found = [places.node(volume, node(7), kind, parent, b"x").inode for kind in Kind for parent in (one, two)]
        found.append(places.node(owner.view(View.ROOT, "0p1"), node(7), Kind.FILE, one, b"x").inode)
        found.append(places.text(volume).inode)
        return found

    first = numbers()
    assert first == numbers()
    by_kind = dict(zip(Kind, zip(first[::2], first[1::2], strict=False), strict=False))
    for kind, (here, there) in by_kind.items():
        assert (here == there) == (kind not in (Kind.DIRECTORY, Kind.SYMLINK))
    assert all(number >> 61 == 3 for number in first)


def test_collisions_go_on_to_the_next_number(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = SimpleNamespace(digest=lambda length=32: b"\1" * length)
    monkeypatch.setattr("xbfs.vfs.guests.places.blake3", lambda data: fixed)
    places, owner = Places(), guest()
    top = owner.top(View.FILES, 5)
    volume = VolumeView(owner, View.FILES, "v")
    entered = []
    for number in range(5):
        place = places.node(volume, node(number), Kind.FILE, top, b"x")
        places.enter(place)
        entered.append(place)
    assert len({place.inode for place in entered}) == 5
    assert places.node(volume, node(3), Kind.FILE, top, b"x") is entered[3]


def test_what_the_kernel_forgets_is_given_back() -> None:
    places, owner = Places(), guest()
    place = places.node(owner.view(View.ROOT, "v"), node(1), Kind.FILE, owner.top(View.ROOT, 5), b"x")
    assert places.get(place.inode) is None
    for _ in range(3):
        places.enter(place)
    places.forget(place.inode, 2)
    assert places.get(place.inode) is place
    places.forget(place.inode, 1)
    assert len(places) == 0
    places.forget(place.inode, 1)


def test_the_way_down_begins_below_the_topmost_directory() -> None:
    places, owner = Places(), guest()
    for view, parts in ((View.FILES, 3), (View.ROOT, 3)):
        at: Directory = owner.top(view, 5)
        if view is View.FILES:
            at = places.node(owner.view(view, "v"), NodeId(b""), Kind.DIRECTORY, at, b"v")
        for number in range(1, parts + 1):
            at = places.node(owner.view(view, "v"), node(number), Kind.DIRECTORY, at, b"%d" % number)
        assert [there.name for there in trail(at)] == [b"1", b"2", b"3"]
        assert isinstance(at, Node)
    assert trail(Top(5, owner, View.ROOT)) == []


def test_a_volume_called_like_a_text_hides_nothing() -> None:
    names = guest((row("a"), row("a.json"), row("a~", VolumeStatus.OTHER))).names()
    assert set(names.directories) == {b"a", b"a.json"}
    assert len(names.texts) == 3
    assert not set(names.texts) & set(names.directories)
    assert {found.name for found in names.texts.values()} == {"a", "a.json", "a~"}


def test_root_is_put_together_from_mounts() -> None:
    mounts = (
        GuestMount(b"/", "r", node(2), None, "x"),
        GuestMount(b"/home", "h", node(3), ("r", node(9)), "y"),
        GuestMount(b"/data", "d", node(4), None, "z"),
    )
    owner = guest((row("r"), row("h"), row("d")), GuestTree("unix", mounts, ("a note",)))
    root = owner.root_view()
    assert root.top == Spot("r", node(2))
    assert owner._crossed(Spot("r", node(9))) == Spot("h", node(3))
    assert owner._crossed(Spot("h", node(9))) is None
    assert root.more == {b"data": Spot("d", node(4))}
    assert root.notes == ("a note",)


def test_a_door_lets_few_in_and_wakes_who_was_turned_back() -> None:
    door = Door(1)
    woken: list[int] = []

    def inside() -> str:
        with pytest.raises(DoorShut) as shut:
            door.through(lambda: None)
        shut.value.park(lambda: woken.append(1))
        shut.value.park(lambda: woken.append(2))
        assert woken == []
        return "done"

    assert door.through(inside) == "done"
    assert woken == [1, 2]
    door.park(lambda: woken.append(3))
    assert woken[-1] == 3
