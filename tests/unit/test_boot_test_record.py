"""Results of boot tests in a repository: put, listed, read, checked; what is forged or damaged is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.repositories import EMPTY_POINT, create, overwrite
from xbfs_engine.catalog.boottests import (
    CONSOLE_MAX,
    KEPT,
    SCREENSHOT_MAX,
    BootTest,
    Signal,
    Verdict,
    boot_tests_of,
    listed_tests,
    open_boot_test,
    put_boot_test,
    read_boot_test,
    seal_boot_test,
)
from xbfs_engine.catalog.catalog import Catalog
from xbfs_engine.codec import wire
from xbfs_engine.codec.envelope import ObjectKind, open_object, seal_object
from xbfs_engine.core.errors import IntegrityError, KeyNotHeld, XbfsError
from xbfs_engine.core.ids import PointId
from xbfs_engine.maintain.check import check
from xbfs_engine.maintain.report import Kind
from xbfs_engine.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from xbfs_engine.store.repository import Repository

POINT = PointId("ab" * 32)


def result(made_ns: int = 1000, **changes: object) -> BootTest:
    signals = (Signal("console", "for", "a login prompt"), Signal("writes", "", "0 bytes"))
    test = BootTest(
        POINT, made_ns, Verdict.BOOTED, "a login prompt", signals, 9000, 300, None, "tcg", "bios", "xbfs", "n", "x", b""
    )
    return replace(test, **changes)  # type: ignore[arg-type]


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


@pytest.fixture
def repository(storage: MemoryStorage) -> Repository:
    return create(storage).repository


def test_what_is_put_is_read(repository: Repository) -> None:
    results = [result(time_ns, verdict=verdict) for time_ns, verdict in enumerate(Verdict)]
    for each in results:
        put_boot_test(repository, each)
    assert boot_tests_of(repository, POINT) == results
    assert boot_tests_of(repository, PointId("cd" * 32)) == []
    assert {each.point for each in listed_tests(repository.storage)} == {POINT}


def test_two_at_one_moment_are_both_kept(repository: Repository) -> None:
    put_boot_test(repository, result(reason="a"))
    put_boot_test(repository, result(reason="b"))
    assert [each.reason for each in boot_tests_of(repository, POINT)] == ["a", "b"]


def test_the_oldest_go(repository: Repository) -> None:
    for made_ns in range(KEPT + 3):
        put_boot_test(repository, result(made_ns))
    assert [each.made_ns for each in boot_tests_of(repository, POINT)] == list(range(3, KEPT + 3))


def test_what_a_guest_says_is_cut_to_what_can_be_read(repository: Repository) -> None:
    loud = result(
        reason="r" * 5000,
        console="\udc80" + "c" * (CONSOLE_MAX + 5),
        screenshot=bytes(SCREENSHOT_MAX + 1),
        signals=tuple(Signal(str(number), "", "s" * 5000) for number in range(100)),
    )
    put_boot_test(repository, loud)
    (found,) = boot_tests_of(repository, POINT)
    assert (len(found.reason), len(found.console), found.screenshot) == (1024, CONSOLE_MAX, b"")


def test_a_result_can_not_be_hung_under_another_point(repository: Repository) -> None:
    blob = seal_boot_test(repository.keys, repository.runtime.random, result())
    with pytest.raises(IntegrityError, match="another restore point"):
        open_boot_test(repository.keys, PointId("cd" * 32), blob)


def test_a_forged_one_is_refused(repository: Repository) -> None:
    """Whoever knows the public keys can seal, but not sign."""
    blob = seal_boot_test(repository.keys, repository.runtime.random, result(verdict=Verdict.FAILED))
    honest = wire.decode(open_object(repository.keys, ObjectKind.BOOT_TEST, blob, "x"), "x")
    body = honest.raw("body").replace(b"failed", b"booted")
    payload = wire.encode({"version": 1, "body": body, "signature": honest.raw("signature")})
    forged = seal_object(repository.keys, ObjectKind.BOOT_TEST, payload, b"k" * 32)
    with pytest.raises(IntegrityError, match="signature"):
        open_boot_test(repository.keys, POINT, forged)


def test_a_role_without_the_signing_key_can_not_put(repository: Repository) -> None:
    repository = replace(repository, keys=replace(repository.keys, signing_private=None))
    with pytest.raises(KeyNotHeld):
        put_boot_test(repository, result())
    assert listed_tests(repository.storage) == []


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 2000), value=st.integers(1, 255))
def test_a_changed_byte_is_refused(position: int, value: int) -> None:
    repository = create(MemoryStorage()).repository
    blob = bytearray(seal_boot_test(repository.keys, repository.runtime.random, result()))
    blob[position % len(blob)] ^= value
    with pytest.raises(XbfsError):
        open_boot_test(repository.keys, POINT, bytes(blob))


def test_check_knows_results_and_tells_damaged_and_useless_ones(storage: MemoryStorage, repository: Repository) -> None:
    catalog = Catalog(repository)
    point = catalog.commit(EMPTY_POINT)
    put_boot_test(repository, result(point=point.id))
    assert check(repository).healthy
    assert not [each for each in check(repository).findings if each.kind is Kind.BOOT_TEST]
    put_boot_test(repository, result())
    (note,) = [each for each in check(repository).findings if each.kind is Kind.BOOT_TEST]
    assert "no restore point" in note.message
    (listed,) = listed_tests(storage, point.id)
    overwrite(storage, listed.name, b"nonsense")
    report = check(repository)
    assert (report.damages, report.points_hit) == (1, ())
    assert boot_tests_of(repository, point.id) == []
    with pytest.raises(IntegrityError):
        read_boot_test(repository, listed._replace(size_bytes=8))
