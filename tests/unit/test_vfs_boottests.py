"""Which results report.json tells of: within a bound of memory and of reads at a time, the newest ones first."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.boot_results import boot_test
from tests.support.engine import CHUNK, Engine, pattern
from xbfs.vfs.boottests import look_for_tests
from xbfs.vfs.points import Points
from xbfs_engine.catalog.boottests import put_boot_test
from xbfs_engine.core.ids import PointId
from xbfs_engine.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs.vfs.boottests import Reports
    from xbfs.vfs.points import ShownPoint

POINTS = 3
CONSOLE = 8000


class Examined:
    """A repository with points that have one boot test each, the last point the newest."""

    def __init__(self, folder: Path) -> None:
        self.storage = MemoryStorage()
        self.engine = Engine.fresh(folder, self.storage)
        self.ids: list[PointId] = []
        for number in range(POINTS):
            self.ids.append(PointId(self.engine.backup(pattern(number, CHUNK)).id))
            self.add(number, 1000 + number)
        self.repository = self.engine.repository
        self.shown: dict[PointId, ShownPoint] = Points(self.engine.points()).by_id

    def add(self, number: int, made_ns: int) -> None:
        put_boot_test(self.engine.repository, boot_test(self.ids[number], made_ns, console=str(number) * CONSOLE))

    def told(self, reports: Reports) -> list[tuple[int, int]]:
        """Of each point how many results are shown, and are not."""
        texts: list[dict[str, Any]] = [json.loads(reports[point_id].text) for point_id in self.ids]
        return [(len(text["tests"]), text["tests_not_shown"]) for text in texts]


@pytest.fixture
def tested(tmp_path: Path) -> Examined:
    return Examined(tmp_path)


def test_results_are_read_once_and_again_when_there_are_others(tested: Examined) -> None:
    first = look_for_tests(tested.repository, tested.shown, {})
    assert tested.told(first) == [(1, 0)] * POINTS
    assert json.loads(first[tested.ids[1]].text)["tests"][0]["console"] == "1" * CONSOLE
    again = look_for_tests(tested.repository, tested.shown, first)
    assert all(again[point_id] is first[point_id] for point_id in tested.ids)
    tested.add(0, 2000)
    other = look_for_tests(tested.repository, tested.shown, again)
    assert tested.told(other) == [(2, 0), (1, 0), (1, 0)]
    assert other[tested.ids[2]] is first[tested.ids[2]]


def test_what_is_not_read_yet_is_counted_and_comes_later(tested: Examined) -> None:
    reports: Reports = {}
    for shown in (1, 2, 3, 3):
        reports = look_for_tests(tested.repository, tested.shown, reports, reads_max=1)
        assert tested.told(reports) == [(0, 1)] * (POINTS - shown) + [(1, 0)] * shown


def test_the_newest_have_the_room_there_is_and_nothing_is_read_in_vain(tested: Examined) -> None:
    room = 2 * CONSOLE + 6000
    reports: Reports = {}
    for _ in range(2):
        reports = look_for_tests(tested.repository, tested.shown, reports, text_bytes_max=room)
        assert tested.told(reports) == [(0, 1), (1, 0), (1, 0)]
        assert sum(report.whole_bytes for report in reports.values() if report.is_whole) <= room
    for blob in list(tested.storage.list_blobs(f"tests/{tested.ids[0]}/")):
        tested.storage.delete(blob.name)
        tested.storage.put(blob.name, [bytes(blob.size_bytes)])  # would be told of as damaged
    assert look_for_tests(tested.repository, tested.shown, reports, text_bytes_max=room) == reports
    tested.add(0, 5000)  # now the newest: its results have the room first
    reports = look_for_tests(tested.repository, tested.shown, reports, text_bytes_max=room)
    assert tested.told(reports) == [(1, 1), (0, 1), (1, 0)]


def test_damaged_results_are_counted_and_those_of_unknown_points_are_nothing(tested: Examined) -> None:
    (blob,) = tested.storage.list_blobs(f"tests/{tested.ids[2]}/")
    tested.storage.delete(blob.name)
    tested.storage.put(blob.name, [b"garbage"])
    tested.storage.put(f"tests/{tested.ids[2]}/{'9' * 20}", [b"far"])
    known = {point_id: shown for point_id, shown in tested.shown.items() if point_id != tested.ids[0]}
    reports = look_for_tests(tested.repository, known, {})
    assert reports.keys() == set(tested.ids[1:])
    text = json.loads(reports[tested.ids[2]].text)
    assert (text["tests"], text["tests_not_shown"]) == ([], 2)
