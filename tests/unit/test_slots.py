"""Key slots and recovery codes: what opens, what is refused, and what a forged slot can not demand."""

from __future__ import annotations

import base64
from dataclasses import replace

import msgpack
import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from tests.support.runtime import START_NS, SeededRandom
from xbfs_engine.codec import slots, wire
from xbfs_engine.codec.keys import Role
from xbfs_engine.codec.recovery import format_code, looks_like_code, parse_code
from xbfs_engine.codec.slots import (
    SLOT_SIZE_MAX,
    KdfParameters,
    Slot,
    SlotContents,
    SlotKind,
    StoredSlot,
    decode_slot,
    passphrase_secret,
    seal_slot,
)
from xbfs_engine.core.errors import FormatTooNew, KeySlotDamaged, UsageError, WrongPassphrase

TINY = KdfParameters(iterations=1, lanes=1, memory_kib=8)
SLOT = Slot("0123456789abcdef", SlotKind.PASSPHRASE, Role.OWNER, "office", START_NS, TINY, b"s" * 16)
CONTENTS = SlotContents(b"r" * 16, b"O" * 32, b"N" * 32, b"p" * 32, 1, b"d" * 32)
NODE_CONTENTS = replace(CONTENTS, owner_key=None)
SECRET = b"correct horse"
STORED = seal_slot(SLOT, SECRET, CONTENTS)
BLOB = STORED.encode()

CODE_SECRET = SeededRandom(3).token(20)
CODE = format_code(CODE_SECRET)
ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def test_a_slot_comes_back_with_its_secret_and_with_no_other():
    stored = decode_slot(BLOB, SLOT.slot_id)
    assert stored == STORED
    assert stored.open(SECRET) == CONTENTS
    assert stored.open(b"wrong horse") is None
    assert stored.open(b"") is None


def test_a_node_slot_holds_no_owner_key():
    stored = seal_slot(replace(SLOT, role=Role.NODE), SECRET, NODE_CONTENTS)
    assert stored.open(SECRET) == NODE_CONTENTS


def test_the_layout_opens_by_hand():
    fields = msgpack.unpackb(BLOB)
    checksum = fields.pop("checksum")
    assert checksum == blake3(msgpack.packb(dict(sorted(fields.items())))).digest()
    sealed = fields.pop("sealed")
    kdf = fields["kdf"]
    derived = Argon2id(
        salt=kdf["salt"], length=64, iterations=kdf["iterations"], lanes=kdf["lanes"], memory_cost=kdf["memory_kib"]
    ).derive(SECRET)
    assert sealed[:32] == derived[32:]
    plain = AESGCM(derived[:32]).decrypt(bytes(12), sealed[32:], b"xbfs key slot v1\0" + msgpack.packb(fields))
    assert msgpack.unpackb(plain) == {
        "config_digest": b"d" * 32,
        "generation": 1,
        "node_key": b"N" * 32,
        "owner_key": b"O" * 32,
        "repository_id": b"r" * 16,
        "config_public": b"p" * 32,
    }


def test_every_byte_counts():
    """A changed slot is found damaged, or too new, without its secret."""
    for at in range(len(BLOB)):
        changed = bytearray(BLOB)
        changed[at] ^= 0x01
        with pytest.raises((KeySlotDamaged, FormatTooNew)):
            decode_slot(bytes(changed), SLOT.slot_id)


def test_every_truncation_is_damage():
    for size in range(len(BLOB)):
        with pytest.raises(KeySlotDamaged):
            decode_slot(BLOB[:size], SLOT.slot_id)


@pytest.mark.parametrize(
    "change",
    [
        {"label": "home"},
        {"created_ns": START_NS + 1},
        {"role": Role.NODE},
        {"kind": SlotKind.RECOVERY},
        {"slot_id": "f" * 16},
    ],
)
def test_public_fields_are_bound_to_the_keys(change):
    with pytest.raises(KeySlotDamaged, match="does not authenticate"):
        replace(STORED, slot=replace(SLOT, **change)).open(SECRET)


def test_a_slot_whose_keys_are_not_those_of_its_role_is_refused():
    key, commitment = slots._derive(SLOT, SECRET)
    sealed = AESGCM(key).encrypt(bytes(12), slots._encode_contents(NODE_CONTENTS), slots._bound(SLOT))
    with pytest.raises(KeySlotDamaged, match="says owner but holds the keys of node"):
        StoredSlot(SLOT, commitment + sealed).open(SECRET)


def test_a_slot_under_another_name_is_refused():
    with pytest.raises(KeySlotDamaged, match="copy of key slot 0123456789abcdef"):
        decode_slot(BLOB, "f" * 16)


def altered(**changes: object) -> bytes:
    fields = msgpack.unpackb(BLOB)
    for key, value in changes.items():
        if isinstance(value, dict):
            fields[key] = fields[key] | value
        else:
            fields[key] = value
    del fields["checksum"]
    return wire.encode(fields | {"checksum": blake3(wire.encode(fields)).digest()})


@pytest.mark.parametrize(
    "kdf",
    [
        {"memory_kib": 100 << 20},
        {"memory_kib": (1 << 20) + 1},
        {"memory_kib": 7},
        {"memory_kib": 0},
        {"memory_kib": -1},
        {"iterations": 65},
        {"iterations": 0},
        {"lanes": 17},
        {"lanes": 0},
        {"lanes": 16, "memory_kib": 127},
        {"salt": b"short"},
        {"more": 1},
    ],
)
def test_a_forged_slot_can_not_demand_what_is_out_of_bounds(kdf):
    with pytest.raises(KeySlotDamaged):
        decode_slot(altered(kdf=kdf), SLOT.slot_id)


def test_the_bounds_themselves_are_allowed():
    largest = {"memory_kib": 1 << 20, "iterations": 64, "lanes": 16}
    assert decode_slot(altered(kdf=largest), SLOT.slot_id).slot.kdf == KdfParameters(64, 16, 1 << 20)


def test_memory_the_machine_does_not_have_is_told(monkeypatch):
    def no_memory(self, key_material):
        raise MemoryError

    class Starved:
        def __init__(self, **costs: object) -> None: ...

        derive = no_memory

    monkeypatch.setattr("xbfs_engine.codec.slots.Argon2id", Starved)
    with pytest.raises(KeySlotDamaged, match="8 KiB of memory"):
        STORED.open(SECRET)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"version": 2}, FormatTooNew),
        ({"kind": "fido2"}, FormatTooNew),
        ({"role": "auditor"}, FormatTooNew),
        ({"kdf": {"algorithm": "argon3"}}, FormatTooNew),
        ({"label": "x" * 65}, KeySlotDamaged),
        ({"label": "\x1b[2J"}, KeySlotDamaged),
        ({"slot_id": "\x1b[2J"}, KeySlotDamaged),
        ({"created_ns": -1}, KeySlotDamaged),
        ({"sealed": bytes(513)}, KeySlotDamaged),
        ({"sealed": "text"}, KeySlotDamaged),
        ({"more": 1}, KeySlotDamaged),
    ],
)
def test_fields_out_of_place_are_refused(change, error):
    with pytest.raises(error):
        decode_slot(altered(**change), SLOT.slot_id)


def test_a_huge_slot_is_refused_by_its_size():
    with pytest.raises(KeySlotDamaged, match="allowed"):
        decode_slot(bytes(SLOT_SIZE_MAX + 1), SLOT.slot_id)


@pytest.mark.parametrize("sealed", [b"", b"c" * 31, b"c" * 32])
def test_a_slot_without_keys_does_not_open(sealed: bytes):
    assert replace(STORED, sealed=sealed).open(SECRET) is None


def test_a_right_commitment_without_keys_is_damage():
    with pytest.raises(KeySlotDamaged):
        replace(STORED, sealed=STORED.sealed[:32]).open(SECRET)


@pytest.mark.parametrize("label", ["x" * 65, "two\nlines", "\udcff"])
def test_labels_that_can_not_be_shown_are_refused(label: str):
    with pytest.raises(UsageError):
        seal_slot(replace(SLOT, label=label), SECRET, CONTENTS)


def test_the_default_cost_is_the_second_recommendation_of_rfc_9106():
    assert KdfParameters.default() == KdfParameters(iterations=3, lanes=4, memory_kib=65536)


def test_a_passphrase_is_the_same_however_its_accents_were_typed():
    assert passphrase_secret("p\u00e4ss") == passphrase_secret("pa\u0308ss") == "päss".encode()
    with pytest.raises(UsageError) as caught:
        passphrase_secret("hunter2\udcff")
    assert "hunter2" not in repr(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_slots_do_not_show_their_keys():
    shown = repr(CONTENTS) + repr(STORED) + repr(decode_slot(BLOB, SLOT.slot_id))
    assert "OOOO" not in shown
    assert "NNNN" not in shown
    assert repr(STORED.sealed) not in shown


def test_a_recovery_code_is_crockfords_base32_of_its_secret():
    rfc4648 = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
    peer = base64.b32encode(CODE_SECRET).decode().translate(str.maketrans(rfc4648, ALPHABET))
    groups = CODE.split("-")
    assert [len(group) for group in groups] == [4] * 9
    assert "".join(groups[:8]) == peer
    assert parse_code(CODE) == CODE_SECRET


@pytest.mark.parametrize("secret", [bytes(20), b"\xff" * 20, bytes(19) + b"\1", b"\x80" + bytes(19)])
def test_extreme_recovery_codes_come_back(secret: bytes):
    assert parse_code(format_code(secret)) == secret


@pytest.mark.parametrize(
    "typed",
    [
        CODE.lower(),
        CODE.replace("-", ""),
        CODE.replace("-", " "),
        f"  {CODE}\n",
        CODE.replace("0", "O").replace("1", "I"),
        CODE.replace("0", "o").replace("1", "l"),
        "\t".join(CODE),
    ],
)
def test_a_recovery_code_is_read_as_people_write(typed: str):
    assert parse_code(typed) == CODE_SECRET


def test_every_wrong_character_of_a_recovery_code_is_a_typing_error():
    compact = CODE.replace("-", "")
    for at, right in enumerate(compact):
        for wrong in ALPHABET:
            if wrong != right:
                with pytest.raises(WrongPassphrase, match="typing error"):
                    parse_code(compact[:at] + wrong + compact[at + 1 :])


def test_every_two_swapped_characters_of_a_recovery_code_are_a_typing_error():
    compact = CODE.replace("-", "")
    swapped = 0
    for at in range(len(compact) - 1):
        if compact[at] != compact[at + 1]:
            swapped += 1
            with pytest.raises(WrongPassphrase, match="typing error"):
                parse_code(compact[:at] + compact[at + 1] + compact[at] + compact[at + 2 :])
    assert swapped > 20


@pytest.mark.parametrize("text", ["", "hunter2", CODE[:-1], CODE + "0", CODE.replace(CODE[0], "U"), "\u0661" * 36])
def test_what_is_no_recovery_code_is_told(text: str):
    assert not looks_like_code(text)
    with pytest.raises(WrongPassphrase, match="not a recovery code"):
        parse_code(text)


def test_errors_about_recovery_codes_do_not_tell_them():
    for typed in (CODE[:-1], CODE[:-1] + ("0" if CODE[-1] != "0" else "1")):
        with pytest.raises(WrongPassphrase) as caught:
            parse_code(typed)
        assert CODE[:4] not in repr(caught.value) + caught.value.hint
