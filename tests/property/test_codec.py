"""Hostile bytes into every decoder of the codec: only XbfsError comes out, and what was written comes back."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.repositories import CONFIG, PASSPHRASE, blobs, create, overwrite, reopen
from tests.support.runtime import SeededRandom
from xbfs_engine.codec import slots, wire
from xbfs_engine.codec.compress import Compressor, Encoding, decompress
from xbfs_engine.codec.config import SignedConfig, decode_config, open_keys
from xbfs_engine.codec.envelope import ObjectKind, open_object, seal_object
from xbfs_engine.codec.recovery import format_code, looks_like_code, parse_code
from xbfs_engine.codec.slots import Slot, SlotContents, decode_slot, seal_slot
from xbfs_engine.core.errors import XbfsError
from xbfs_engine.storage.memory import MemoryStorage

STORAGE = MemoryStorage()
REPOSITORY = create(STORAGE).repository
KEYS, CONTENTS = REPOSITORY.keys, REPOSITORY._contents
BLOBS = blobs(STORAGE)
SLOT_ID, SLOT_BLOB = next((name[5:], blob) for name, blob in BLOBS.items() if name.startswith("keys/"))
SLOT = decode_slot(SLOT_BLOB, SLOT_ID).slot
OBJECT = seal_object(KEYS, ObjectKind.MANIFEST, b"payload " * 40, b"k" * 32)

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=20) | st.text(max_size=20)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
records = st.dictionaries(st.text(max_size=8), values, max_size=6)


@st.composite
def mutations(draw: st.DrawFn, blob: bytes) -> bytes:
    """``blob`` with a few bytes changed, cut out, inserted or repeated."""
    data = bytearray(blob)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = draw(st.integers(at, min(len(data), at + 8)))
        data[at:end] = draw(st.binary(max_size=8))
    return bytes(data)


def field_changes(blob: bytes) -> st.SearchStrategy[bytes]:
    """The record ``blob``, well-formed, with fields of any type in place of its own or added."""
    fields = msgpack.unpackb(blob)
    names = st.sampled_from(sorted(fields)) | st.text(max_size=8)
    return st.dictionaries(names, values, min_size=1, max_size=3).map(lambda changes: wire.encode(fields | changes))


def affordable(blob: bytes) -> bool:
    """Whether ``blob`` is no key slot, or one that asks for less than a MiB and a moment: we test thousands."""
    with suppress(XbfsError):
        kdf = decode_slot(blob, SLOT_ID).slot.kdf
        return kdf.iterations * kdf.memory_kib <= 1024
    return True


@settings(max_examples=50)
@given(records)
def test_records_come_back(record: dict[str, wire.Value]):
    data = wire.encode(record)
    assert msgpack.unpackb(data) == record
    decoded = wire.decode(data, "it")
    for key, value in record.items():
        if isinstance(value, dict):
            assert decoded.mapping(key) == value
        elif isinstance(value, bool):
            assert decoded.boolean(key) is value
        elif isinstance(value, int):
            assert decoded.integer(key, -(2**63), 2**64) == value
        elif isinstance(value, bytes):
            assert decoded.raw(key) == value
        elif isinstance(value, str):
            assert decoded.text(key) == value
        elif value is None:
            assert not decoded.optional(key)
        else:
            decoded._take(key)
    decoded.done()


@given(st.binary(max_size=200) | records.map(wire.encode).flatmap(mutations))
@example(b"\x81\xc4\x01a\x01")
@example(b"\x81\xa1a\xdd\x7f\xff\xff\xff")
def test_what_decodes_is_canonical_and_all_else_is_an_xbfs_error(data: bytes):
    try:
        wire.decode(data, "it")
    except XbfsError:
        return
    assert wire.encode(msgpack.unpackb(data)) == data


@settings(max_examples=50)
@given(records, st.sampled_from(["version", "a", "b"]))
def test_getters_give_values_of_their_type_or_an_xbfs_error(record: dict[str, wire.Value], key: str):
    takers = [
        lambda taken: taken.version(1),
        lambda taken: taken.integer(key),
        lambda taken: taken.boolean(key),
        lambda taken: taken.raw(key, 3),
        lambda taken: taken.text(key, 3),
        lambda taken: taken.optional(key),
        lambda taken: taken.record(key).done(),
        lambda taken: [item.done() for item in taken.records(key, 2)],
        lambda taken: taken.mapping(key),
        lambda taken: taken.done(),
    ]
    for take in takers:
        try:
            take(wire.decode(wire.encode(record), "it"))
        except XbfsError as exc:
            assert exc.message.isprintable()  # noqa: PT017 - either is fine


@given(st.binary(max_size=600) | mutations(SLOT_BLOB) | field_changes(SLOT_BLOB))
def test_hostile_slots_give_only_xbfs_errors(blob: bytes):
    with suppress(XbfsError):
        stored = decode_slot(blob, SLOT_ID)
        if affordable(blob):
            assert stored.open(PASSPHRASE.encode()) in (None, CONTENTS)


@given(
    st.binary(max_size=400)
    | mutations(slots._encode_contents(CONTENTS))
    | field_changes(slots._encode_contents(CONTENTS))
)
def test_hostile_contents_of_a_slot_give_only_xbfs_errors(plain: bytes):
    """Of somebody who knows the secret."""
    with suppress(XbfsError):
        assert isinstance(slots._decode_contents(plain, "it"), SlotContents)


@given(st.binary(max_size=600) | mutations(BLOBS[CONFIG]) | field_changes(BLOBS[CONFIG]))
def test_hostile_configs_give_only_xbfs_errors(blob: bytes):
    try:
        config = decode_config(blob, "it").verify(CONTENTS, 1)
    except XbfsError:
        return
    assert blob == BLOBS[CONFIG]
    assert open_keys(config, CONTENTS) == KEYS


@given(
    field_changes(msgpack.unpackb(BLOBS[CONFIG])["body"]) | mutations(msgpack.unpackb(BLOBS[CONFIG])["body"]),
)
def test_hostile_config_bodies_with_a_good_signature_give_only_xbfs_errors(body: bytes):
    """Of somebody who holds the config key, like a stolen owner."""
    assert KEYS.config_private is not None
    signature = Ed25519PrivateKey.from_private_bytes(KEYS.config_private).sign(b"xbfs config v1\0" + body)
    signed = SignedConfig(body, signature)
    vouched = replace(CONTENTS, config_digest=signed.digest)
    with suppress(XbfsError):
        assert open_keys(signed.verify(vouched, 1), vouched).repository_id == KEYS.repository_id


@given(st.binary(max_size=600) | mutations(OBJECT), st.sampled_from(ObjectKind))
def test_hostile_objects_give_only_xbfs_errors(blob: bytes, kind: ObjectKind):
    try:
        open_object(KEYS, kind, blob, "it")
    except XbfsError:
        return
    assert blob == OBJECT
    assert kind is ObjectKind.MANIFEST


@given(st.binary(max_size=3000), st.integers(1, 19))
def test_chunks_come_back_and_hostile_frames_give_only_xbfs_errors(plain: bytes, level: int):
    encoding, stored = Compressor(level).encode(plain)
    assert decompress(encoding, stored, len(plain), "it") == plain
    with suppress(XbfsError):
        assert len(decompress(Encoding.ZSTD, plain, 64, "it")) == 64


@given(st.binary(min_size=20, max_size=20), st.text(max_size=60))
def test_recovery_codes_come_back_and_other_text_gives_only_xbfs_errors(secret: bytes, text: str):
    assert parse_code(format_code(secret)) == secret
    try:
        parsed = parse_code(text)
    except XbfsError:
        return
    assert looks_like_code(text)
    assert format_code(parsed).replace("-", "")


@given(st.binary(max_size=40), st.text(max_size=64).filter(str.isprintable))
def test_slots_come_back(secret: bytes, label: str):
    slot = Slot(SLOT_ID, SLOT.kind, SLOT.role, label, 1, SLOT.kdf, SeededRandom(len(secret)).token(16))
    stored = decode_slot(seal_slot(slot, secret, CONTENTS).encode(), SLOT_ID)
    assert stored.slot == slot
    assert stored.open(secret) == CONTENTS


@settings(max_examples=50)
@given(st.data())
def test_a_repository_with_a_mutated_blob_opens_as_it_was_or_gives_an_xbfs_error(data: st.DataObject):
    storage = MemoryStorage()
    for name, blob in BLOBS.items():
        storage.put(name, [blob])
    name = data.draw(st.sampled_from(sorted(BLOBS)))
    blob = data.draw(mutations(BLOBS[name]).filter(affordable))
    overwrite(storage, name, blob)
    try:
        opened = reopen(storage)
    except XbfsError:
        return
    assert opened.keys == KEYS
