"""Sealed objects: only the right keys, of the right kind and repository, open them, and only unchanged."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.support.runtime import SeededRandom
from xbfs_engine.codec.config import new_keys
from xbfs_engine.codec.envelope import (
    HEADER_SIZE,
    ObjectKind,
    make_header,
    nonce,
    open_header,
    open_object,
    seal_object,
)
from xbfs_engine.codec.keys import Epoch, KeyPair, Role
from xbfs_engine.core.errors import FormatTooNew, IntegrityError, KeyNotHeld, XbfsError

KEYS = new_keys(SeededRandom(1))
NODE = replace(
    KEYS,
    role=Role.NODE,
    epochs=tuple(replace(epoch, data=replace(epoch.data, private=None)) for epoch in KEYS.epochs),
)
OBJECT_KEY = bytes(range(32))
PAYLOAD = b"the payload of an object " * 20


@pytest.mark.parametrize("kind", list(ObjectKind))
@pytest.mark.parametrize("payload", [b"", b"x", PAYLOAD, SeededRandom(5).token(5000)])
def test_an_object_comes_back(kind: ObjectKind, payload: bytes):
    blob = seal_object(KEYS, kind, payload, OBJECT_KEY)
    assert open_object(KEYS, kind, blob, "it") == payload
    assert len(payload) < 10 or payload[:10] not in blob


def test_the_header_is_128_bytes_whose_key_is_sealed_afresh():
    one, other = (make_header(KEYS, ObjectKind.DATA_PACK, OBJECT_KEY) for _ in range(2))
    assert len(one) == len(other) == HEADER_SIZE
    assert one != other
    assert OBJECT_KEY not in one
    sealed = AESGCM(OBJECT_KEY).encrypt(nonce(3), b"chunk", one)
    opened = open_header(KEYS, one, ObjectKind.DATA_PACK, "it")
    assert opened.epoch == 1
    assert opened.aead.decrypt(nonce(3), sealed, one) == b"chunk"


def test_a_node_opens_metadata_but_not_data():
    data = make_header(NODE, ObjectKind.DATA_PACK, OBJECT_KEY)
    metadata = make_header(NODE, ObjectKind.METADATA_PACK, OBJECT_KEY)
    assert open_header(NODE, metadata, ObjectKind.METADATA_PACK, "it").kind is ObjectKind.METADATA_PACK
    with pytest.raises(KeyNotHeld):
        open_header(NODE, data, ObjectKind.DATA_PACK, "it")
    assert open_header(KEYS, data, ObjectKind.DATA_PACK, "it").kind is ObjectKind.DATA_PACK


def test_relabelling_data_as_metadata_does_not_let_a_node_in():
    header = bytearray(make_header(NODE, ObjectKind.DATA_PACK, OBJECT_KEY))
    header[9] = ObjectKind.METADATA_PACK
    with pytest.raises(IntegrityError, match="does not open"):
        open_header(NODE, bytes(header), ObjectKind.METADATA_PACK, "it")


@pytest.mark.parametrize("kind", [kind for kind in ObjectKind if kind is not ObjectKind.INDEX])
def test_one_kind_does_not_pass_for_another(kind: ObjectKind):
    blob = seal_object(KEYS, kind, PAYLOAD, OBJECT_KEY)
    with pytest.raises(IntegrityError, match="kind"):
        open_object(KEYS, ObjectKind.INDEX, blob, "it")


def test_another_repository_does_not_open_it_even_with_the_same_pairs():
    blob = seal_object(KEYS, ObjectKind.MANIFEST, PAYLOAD, OBJECT_KEY)
    for other in (new_keys(SeededRandom(2)), replace(KEYS, repository_id=bytes(16))):
        with pytest.raises(IntegrityError, match="does not open"):
            open_object(other, ObjectKind.MANIFEST, blob, "it")


def test_every_byte_counts():
    blob = seal_object(KEYS, ObjectKind.MANIFEST, b"x" * 40, OBJECT_KEY)
    for at in range(len(blob)):
        changed = bytearray(blob)
        changed[at] ^= 0x55
        with pytest.raises((IntegrityError, FormatTooNew)):
            open_object(KEYS, ObjectKind.MANIFEST, bytes(changed), "it")


def test_every_truncation_and_any_addition_is_noticed():
    blob = seal_object(KEYS, ObjectKind.MANIFEST, b"x" * 40, OBJECT_KEY)
    for size in range(len(blob)):
        with pytest.raises(IntegrityError):
            open_object(KEYS, ObjectKind.MANIFEST, blob[:size], "it")
    with pytest.raises(IntegrityError):
        open_object(KEYS, ObjectKind.MANIFEST, blob + b"\0", "it")


def test_another_version_or_suite_is_too_new():
    blob = seal_object(KEYS, ObjectKind.MANIFEST, b"x", OBJECT_KEY)
    for at, value in ((8, 2), (10, 2)):
        changed = bytearray(blob)
        changed[at] = value
        with pytest.raises(FormatTooNew):
            open_object(KEYS, ObjectKind.MANIFEST, bytes(changed), "it")


def test_objects_of_an_earlier_epoch_stay_readable_and_an_unknown_epoch_is_told():
    pairs = new_keys(SeededRandom(9)).current
    rotated = replace(KEYS, epochs=(*KEYS.epochs, Epoch(2, pairs.data, pairs.metadata)))
    old, new = (seal_object(keys, ObjectKind.MANIFEST, PAYLOAD, OBJECT_KEY) for keys in (KEYS, rotated))
    assert open_object(rotated, ObjectKind.MANIFEST, old, "it") == PAYLOAD
    assert open_object(rotated, ObjectKind.MANIFEST, new, "it") == PAYLOAD
    with pytest.raises(FormatTooNew, match="epoch 2"):
        open_object(KEYS, ObjectKind.MANIFEST, new, "it")


@pytest.mark.parametrize("plain", [b"", b"\0\0\0\0\1\0\0", b"\0\0\0\0\xff\xff\xff\xff", b"\1\0\0\0\1\0\0\0junk"])
def test_a_writer_with_keys_can_still_only_cause_a_typed_error(plain: bytes):
    header = make_header(KEYS, ObjectKind.MANIFEST, OBJECT_KEY)
    with pytest.raises(IntegrityError):
        open_object(KEYS, ObjectKind.MANIFEST, header + AESGCM(OBJECT_KEY).encrypt(nonce(0), plain, header), "it")


def test_a_header_whose_commitment_is_to_another_key_is_refused():
    header = make_header(KEYS, ObjectKind.MANIFEST, OBJECT_KEY)
    other = make_header(KEYS, ObjectKind.MANIFEST, bytes(32))
    with pytest.raises(IntegrityError, match="commitment"):
        open_header(KEYS, header[:-32] + other[-32:], ObjectKind.MANIFEST, "it")


def test_errors_do_not_tell_keys():
    blob = seal_object(KEYS, ObjectKind.DATA_PACK, PAYLOAD, OBJECT_KEY)
    other = replace(KEYS, repository_id=bytes(16))
    with pytest.raises(XbfsError) as caught:
        open_object(other, ObjectKind.DATA_PACK, blob, "it")
    assert KEYS.private(1, data=True).hex() not in repr(caught.value) + caught.value.hint
    assert repr(KEYS.private(1, data=True)) not in repr(caught.value) + caught.value.hint
    assert KeyPair(b"p" * 32, b"secret" * 5).__repr__().count("secret") == 0
