"""The ring of recent marks: what is left of it for the next process, at its limits."""

from __future__ import annotations

import random  # noqa: TID251 - seeded
from typing import TYPE_CHECKING

import pytest

from tests.support.power import ModelFile, Power
from xbfs.view.overlay.recent import RecentMarks, boot_id
from xbfs_engine.core.errors import StorageFull

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

BOOT = b"b" * 16


def ring(file: ModelFile, *, boot: bytes = BOOT) -> RecentMarks:
    return RecentMarks(file, boot, records=8)


@pytest.fixture
def file() -> ModelFile:
    return ModelFile(Power())


def test_marks_come_back_in_order_however_often_the_ring_went_round(file: ModelFile) -> None:
    recent, chance = ring(file), random.Random(1)
    recent.begin()
    waiting: list[tuple[int, int, int]] = []
    for number in range(200):
        if len(waiting) == 8 or chance.random() < 0.1:
            recent.forget(recent.position)
            waiting.clear()
        mark = (number, number + 1 + chance.randrange(1 << 20), chance.randrange(4))
        recent.add(*mark)
        waiting.append(mark)
        assert ring(file).left() == waiting


def test_the_highest_unit_of_the_biggest_disk_fits(file: ModelFile) -> None:
    recent = ring(file)
    recent.begin()
    recent.add((1 << 41) - 1, 1 << 41, 3)
    assert ring(file).left() == [((1 << 41) - 1, 1 << 41, 3)]


def test_what_does_not_fit_is_not_told_and_what_was_told_stays(file: ModelFile) -> None:
    recent = ring(file)
    recent.begin()
    for number in range(20):
        assert recent.is_crowded == (number >= 4)
        recent.add(number, number + 1, 1)
    assert [mark.first for mark in ring(file).left()] == list(range(8))
    recent.forget(recent.position - 2)
    recent.add(20, 21, 2)
    assert [mark.first for mark in ring(file).left()] == [6, 7, 20]
    assert not ring(file).tells_all
    ring(file).begin()
    assert ring(file).tells_all


def test_whoever_goes_on_does_not_meet_older_marks_again(file: ModelFile) -> None:
    for life in range(20):
        recent = ring(file)
        assert len(recent.left()) == (life > 0)
        recent.begin()
        assert ring(file).left() == []
        recent.add(life, life + 1, 1)
        assert [mark.first for mark in ring(file).left()] == [life]
    assert ring(file).tells_all
    assert ring(file, boot=b"c" * 16).left() == []
    assert not ring(file, boot=b"c" * 16).tells_all


def test_nothing_is_told_after_a_loss(file: ModelFile) -> None:
    recent = ring(file)
    recent.begin()
    recent.add(0, 1, 1)
    recent.void()
    recent.add(1, 2, 1)
    recent.forget(1)
    assert ring(file).left() == []
    assert not ring(file).tells_all


def test_a_full_disk_keeps_no_room(file: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_offset: int, _length: int) -> None:
        raise StorageFull("full")

    monkeypatch.setattr(file, "reserve", full)
    recent = ring(file)
    recent.begin()
    recent.add(0, 1, 1)
    assert ring(file).left() == [(0, 1, 1)]


def test_a_mark_that_can_not_be_written_down_is_told_to_be_missing(
    file: ModelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    recent = ring(file)
    recent.begin()
    recent.add(0, 1, 1)
    write = file.write_at

    def full(offset: int, buffers: Sequence[Buffer]) -> None:
        if offset:
            raise StorageFull("full")
        write(offset, buffers)

    monkeypatch.setattr(file, "write_at", full)
    recent.add(1, 2, 1)
    assert ring(file).left() == [(0, 1, 1)]
    assert not ring(file).tells_all


def test_without_room_for_a_head_nothing_counts(file: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_offset: int, _buffers: Sequence[Buffer]) -> None:
        raise StorageFull("full")

    monkeypatch.setattr(file, "write_at", full)
    recent = ring(file)
    recent.begin()
    recent.add(0, 1, 1)
    recent.forget(recent.position)
    assert ring(file).left() == []
    assert not ring(file).tells_all


def test_the_machine_tells_one_boot_from_another() -> None:
    assert len(boot_id()) == 16
    assert boot_id() == boot_id() != bytes(16)
