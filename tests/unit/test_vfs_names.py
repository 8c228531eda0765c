"""Names in the tree: safe, deterministic, never ambiguous, never changed."""

from __future__ import annotations

import random  # noqa: TID251 - seeded

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.points import SECOND_NS, disk, point, with_id
from xbfs.vfs import inodes
from xbfs.vfs.names import free_name, safe_component
from xbfs.vfs.points import Points
from xbfs.vfs.times import SECONDS_MAX, parse_time, time_name
from xbfs_engine.catalog.catalog import DamagedPoint
from xbfs_engine.core.errors import ManifestCorrupt
from xbfs_engine.core.ids import PointId

HOSTILE = st.text(st.characters(exclude_categories=()), max_size=400)


@given(HOSTILE)
def test_any_name_becomes_one_safe_component(name: str) -> None:
    safe = safe_component(name)
    assert 1 <= len(safe.encode()) <= 200
    assert safe not in {".", ".."}
    assert not set(safe) & set("/\0\n\x7f\u202e")
    assert safe_component(name) == safe
    assert safe_component(safe) == safe


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("web server 1", "web server 1"),
        ("Zoë 🐟", "Zoë 🐟"),
        ("a/b", "a_b"),
        ("", "_"),
        (".", "_."),
        ("..", "_.."),
        ("../../etc", ".._.._etc"),
        ("tab\there", "tab_here"),
        ("\u202egpj.exe", "_gpj.exe"),
        ("\udcff", "_"),
    ],
)
def test_names(name: str, safe: str) -> None:
    assert safe_component(name) == safe


def test_long_names_stay_apart() -> None:
    first, second = safe_component("é" * 150), safe_component("é" * 151)
    assert first != second
    assert first.startswith("é" * 90)


@given(st.lists(HOSTILE, max_size=6), HOSTILE, HOSTILE)
def test_a_free_name_is_free_and_fits(taken: list[str], wanted: str, identity: str) -> None:
    safe = safe_component(wanted)
    used = {*map(safe_component, taken), safe}
    name = free_name(safe, identity, used)
    assert name not in used
    assert len(name.encode()) <= 255
    used.add(name)
    assert free_name(safe, identity, used) not in used


@given(st.integers(0, SECONDS_MAX))
def test_times_come_back(seconds: int) -> None:
    assert parse_time(time_name(seconds)) == seconds


@given(st.text(max_size=80))
def test_any_text_is_a_time_or_none(text: str) -> None:
    seconds = parse_time(text)
    assert seconds is None or 0 <= seconds <= SECONDS_MAX


def names(points: Points) -> dict[str, list[str]]:
    return {name: list(vm.points) for name, vm in points.vms.items()}


def test_the_first_of_two_vms_of_one_name_keeps_it() -> None:
    old = point("web", uuid="aaaaaaaa-1", time_ns=10 * SECOND_NS)
    new = point("web", uuid="bbbbbbbb-2", time_ns=20 * SECOND_NS)
    expected = {"web": ["1970-01-01T000010Z"], "web~bbbbbbbb": ["1970-01-01T000020Z"]}
    assert names(Points([old, new])) == names(Points([new, old])) == expected


def test_names_that_look_alike_when_made_safe_are_kept_apart() -> None:
    shown = Points([point("a/b", uuid="one"), point("a_b", uuid="two"), point("a_b~two", uuid="three")])
    assert len(shown.vms) == 3
    assert {vm.key[0] for vm in shown.vms.values()} == {"one", "two", "three"}


def test_a_renamed_vm_has_the_points_of_each_name() -> None:
    before = point("old", uuid="u", time_ns=10 * SECOND_NS)
    after = point("new", uuid="u", time_ns=20 * SECOND_NS)
    assert names(Points([before, after])) == {"old": ["1970-01-01T000010Z"], "new": ["1970-01-01T000020Z"]}
    assert list(Points([before, after]).at(30)) == ["new"]


def test_two_points_in_one_second_the_first_committed_keeps_the_plain_name() -> None:
    first = point(time_ns=10 * SECOND_NS + 900, committed_ns=11 * SECOND_NS)
    second = point(time_ns=10 * SECOND_NS + 100, committed_ns=12 * SECOND_NS)
    shown = Points([second, first])
    assert shown.by_id[first.id].name == "1970-01-01T000010Z"
    assert shown.by_id[second.id].name == f"1970-01-01T000010Z~{second.id[:8]}"
    assert shown.vms["vm"].latest.point is first


def test_ids_that_begin_alike_are_kept_apart() -> None:
    made = [with_id(point(), "ab" * 8 + f"{number:048x}") for number in range(3)]
    assert len({shown.name for shown in Points(made).by_id.values()}) == 3


def test_what_was_named_keeps_its_name_while_mounted() -> None:
    late = point("web", uuid="late", time_ns=20 * SECOND_NS)
    before = Points([late])
    early = point("web", uuid="early", time_ns=10 * SECOND_NS)
    twin = point("web", uuid="late", time_ns=20 * SECOND_NS, committed_ns=1)
    after = Points([early, late, twin], before=before)
    assert after.by_id[late.id].path == before.by_id[late.id].path == "vms/web/1970-01-01T000020Z"
    assert after.by_id[early.id].path == "vms/web~early/1970-01-01T000010Z"
    assert after.by_id[twin.id].name == f"1970-01-01T000020Z~{twin.id[:8]}"


@given(st.integers(0, 2**32))
def test_new_points_never_change_a_name_or_inode(seed: int) -> None:
    """A history in any order of times, seen at any moment by a fresh mount or a running one."""
    seeded = random.Random(seed)
    history = [
        point(
            seeded.choice(["a", "b", "a/b", "a_b"]),
            uuid=seeded.choice(["u1", "u2", "u3"]),
            time_ns=seeded.randrange(4) * SECOND_NS + seeded.randrange(3),
            committed_ns=100 * SECOND_NS + number,
            identity=f"{seed}/{number}",
        )
        for number in range(8)
    ]
    running = Points()
    before: dict[PointId, tuple[str, int]] = {}
    for number in range(1, len(history) + 1):
        known = seeded.sample(history[:number], number)
        running = Points(known, before=running)
        fresh = Points(known)
        after = {point_id: (shown.path, shown.owner) for point_id, shown in running.by_id.items()}
        assert {point_id: (shown.path, shown.owner) for point_id, shown in fresh.by_id.items()} == after
        assert len({path for path, _ in after.values()}) == number
        assert before.items() <= after.items()
        before = after


def test_at_shows_the_last_point_of_each_vm() -> None:
    points = [point(uuid="u", time_ns=seconds * SECOND_NS + 5) for seconds in (10, 20, 30)]
    other = point("other", uuid="v", time_ns=25 * SECOND_NS)
    shown = Points([*points, other])
    assert {vm: found.point for vm, found in shown.at(9).items()} == {}
    assert {vm: found.point for vm, found in shown.at(10).items()} == {"vm": points[0]}
    assert {vm: found.point for vm, found in shown.at(25).items()} == {"vm": points[1], "other": other}
    assert shown.times() == [10, 20, 25, 30]


def test_the_same_points_are_the_same() -> None:
    one, two = point(), point()
    broken = DamagedPoint(PointId("c" * 64), ManifestCorrupt("bad"))
    shown = Points([one], [broken])
    assert shown.same_as([one], [broken])
    assert not shown.same_as([one, two], [broken])
    assert not shown.same_as([one], [])


def test_owners_with_one_hash_get_neighbours() -> None:
    taken: dict[int, str] = {}
    first = inodes.Owners(taken).take("x")
    taken[first] = "x"
    assert inodes.Owners(taken).take("x") == first + 1
    assert inodes.Owners(range(first - 10, first + 5)).take("x") == first + 5


@given(st.integers(1, 2**46 - 1), st.integers(0, 254), st.integers(0, 15))
def test_inodes_say_what_they_are(owner: int, number: int, image_format: int) -> None:
    inode = inodes.make(owner, inodes.image_code(number, image_format))
    assert 0xFFFF < inode < 1 << 62
    assert inodes.split_time(inode) is None
    assert inodes.split(inode).owner == owner
    assert inodes.split_image(inodes.split(inode).code) == (number, image_format)


@given(st.integers(0, SECONDS_MAX), st.sampled_from([inodes.TIME_DIRECTORY, inodes.TIME_LINK]))
def test_inodes_of_times_hold_the_time(seconds: int, code: int) -> None:
    inode = inodes.time_inode(seconds, code)
    assert inode < 1 << 63
    assert inodes.split_time(inode) == (seconds, code)


def test_sizes_add_up() -> None:
    assert Points([point(disks=[disk(0, 100), disk(1, 200)]), point()]).size_bytes == 300
