"""Wire records: canonical form, bounds, and every refusal of the getters."""

from __future__ import annotations

import tracemalloc

import msgpack
import pytest

from xbfs_engine.codec.wire import DEPTH_MAX, VALUES_MAX, Record, decode, encode
from xbfs_engine.core.errors import FormatTooNew, WireError


def test_equal_records_have_equal_bytes_whatever_the_order_of_insertion():
    one = encode({"b": 1, "a": {"z": None, "y": [True, b"x", "t"]}})
    other = encode({"a": {"y": [True, b"x", "t"], "z": None}, "b": 1})
    assert one == other
    assert msgpack.unpackb(one) == {"a": {"y": [True, b"x", "t"], "z": None}, "b": 1}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0",
        b"\x91\x01",
        b"\x81\xa1a",  # truncated
        b"\x81\xa1a\x01\x00",  # trailing byte
        b"\x82\xa1b\x01\xa1a\x01",  # keys not sorted
        b"\x82\xa1a\x01\xa1a\x01",  # a key twice
        b"\x81\xa1a\xcc\x01",  # not the shortest integer
        b"\x81\xd9\x01a\x01",  # not the shortest text
        b"\xde\x00\x01\xa1a\x01",  # not the shortest map
        b"\x81\xa1a\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00",  # float
        b"\x81\xa1a\xd4\x01\x00",  # extension
        b"\x81\xa1a\xc7\x00\x05",  # empty extension
        b"\x81\xa1a\xd6\xff\x00\x00\x00\x00",  # timestamp
        b"\x81\x01\x01",  # integer key
        b"\x81\xc4\x01a\x01",  # binary key
        b"\x81\xa1a\x81\xc4\x01a\x01",  # binary key further in
        b"\x81\xa1a\xa1\xff",  # not UTF-8
        b"\xdf\xff\xff\xff\xff",  # four billion fields
        b"\x81\xa1a\xdd\xff\xff\xff\xff",  # a list of four billion
        b"\x81\xa1a\xc6\xff\xff\xff\xff",  # four GiB of bytes
        b"\x81\xa1a" + b"\x91" * 100_000,
        b"\x81\xa1a" * (DEPTH_MAX + 2) + b"\x01",
    ],
)
def test_what_is_not_canonical_is_refused(data: bytes):
    with pytest.raises(WireError):
        decode(data, "it")


def test_a_record_larger_than_allowed_is_not_even_looked_at():
    with pytest.raises(WireError, match=r"it has 5 bytes.* 4 allowed"):
        decode(b"\x81\xa2ab\x01", "it", size_max=4)


def test_a_small_record_can_not_unfold_into_much_memory():
    """What a writer without keys can seal to the public key is decoded before its signature is checked."""
    many = 1 << 20
    for item in (b"\x80", b"\x90", b"\xc0", b"\xa2ab"):
        data = b"\x81\xa1a\xdd" + many.to_bytes(4, "big") + item * many
        tracemalloc.start()
        with pytest.raises(WireError):
            decode(data, "it")
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 4 * len(data)


def test_as_many_values_as_allowed_are_decoded():
    at_most = encode({"k": [None] * (VALUES_MAX - 3)})
    decode(at_most, "it")
    with pytest.raises(WireError):
        decode(encode({"k": [None] * (VALUES_MAX - 2)}), "it")


def test_getters_take_what_fits():
    record = decode(
        encode({"i": 5, "t": True, "r": b"ab", "s": "x", "m": {"k": 1}, "l": [{"k": 2}], "n": None, "p": {"any": [1]}}),
        "it",
    )
    assert record.integer("i", 5, 5) == 5
    assert record.boolean("t") is True
    assert record.raw("r", 2) == b"ab"
    assert record.text("s", 1) == "x"
    assert record.record("m").integer("k") == 1
    assert [item.integer("k") for item in record.records("l", 1)] == [2]
    assert not record.optional("n")
    assert not record.optional("absent")
    assert record.mapping("p") == {"any": [1]}
    record.done()


@pytest.mark.parametrize(
    ("value", "take"),
    [
        (True, lambda record: record.integer("k")),
        (-1, lambda record: record.integer("k")),
        (8, lambda record: record.integer("k", 0, 7)),
        ("1", lambda record: record.integer("k")),
        (1, lambda record: record.boolean("k")),
        (b"abc", lambda record: record.raw("k", 2)),
        (b"abc", lambda record: record.raw("k", size_max=2)),
        ("abc", lambda record: record.raw("k")),
        ("abc", lambda record: record.text("k", 2)),
        (b"abc", lambda record: record.text("k")),
        ([], lambda record: record.record("k")),
        ({}, lambda record: record.records("k", 1)),
        ([{}, {}], lambda record: record.records("k", 1)),
        ([1], lambda record: record.records("k", 1)),
        ([], lambda record: record.mapping("k")),
        (1, lambda record: record.integer("other")),
        (1, lambda record: record.done()),
    ],
)
def test_getters_refuse_what_does_not_fit(value, take):
    with pytest.raises(WireError, match=r"^it"):
        take(Record({"k": value}, "it"))


def test_a_later_version_is_too_new_and_a_version_that_is_none_is_damage():
    with pytest.raises(FormatTooNew, match="version 2"):
        Record({"version": 2}, "it").version(1)
    for value in (0, -1, "1", None, 1 << 20):
        with pytest.raises(WireError):
            Record({"version": value}, "it").version(1)


def test_field_names_from_the_storage_do_not_flood_or_steer_the_terminal():
    with pytest.raises(WireError) as caught:
        decode(encode({f"\x1b[2J{'x' * 5000}{number}": 1 for number in range(100)}), "it").done()
    assert len(caught.value.message) < 1000
    assert caught.value.message.isprintable()
