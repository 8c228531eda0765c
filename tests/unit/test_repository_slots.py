"""Key slots of a repository: listed, added, removed, what roles may do, and that secrets stay secret."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from tests.support.repositories import CONFIG, PASSPHRASE, TINY, blobs, create, overwrite, reopen, slot_of
from tests.support.runtime import FixedClock, test_runtime
from xbfs_engine.codec.envelope import ObjectKind, make_header, open_header
from xbfs_engine.codec.keys import Role
from xbfs_engine.codec.slots import SlotKind
from xbfs_engine.core.errors import (
    KeyNotHeld,
    KeySlotDamaged,
    KeySlotNotFound,
    LastKeySlot,
    WrongPassphrase,
    XbfsError,
)
from xbfs_engine.storage.memory import MemoryStorage
from xbfs_engine.store.repository import CreatedRepository, create_repository


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


@pytest.fixture
def made(storage: MemoryStorage) -> CreatedRepository:
    return create(storage)


def test_slots_are_listed_oldest_first_with_who_made_them_for_what():
    storage, runtime = MemoryStorage(), replace(test_runtime(1), clock=FixedClock(step_ns=10))
    repository = create_repository(storage, runtime, passphrase=PASSPHRASE, label="office", kdf=TINY).repository
    node = repository.add_slot("node", role=Role.NODE, label="node-1", kdf=TINY)
    listed = [item.slot for item in repository.list_slots()]
    assert [(slot.kind, slot.role, slot.label) for slot in listed if slot] == [
        (SlotKind.PASSPHRASE, Role.OWNER, "office"),
        (SlotKind.RECOVERY, Role.OWNER, "recovery code"),
        (SlotKind.PASSPHRASE, Role.NODE, "node-1"),
    ]
    assert listed[-1] == node


def test_damaged_slots_are_listed_with_their_reason_and_can_be_removed(storage, made):
    slot_id = slot_of(made.repository, SlotKind.PASSPHRASE)
    overwrite(storage, f"keys/{slot_id}", b"junk")
    listed = made.repository.list_slots()
    assert len(listed) == 2
    assert (listed[-1].slot_id, listed[-1].slot) == (slot_id, None)
    assert isinstance(listed[-1].problem, KeySlotDamaged)
    made.repository.remove_slot(slot_id)
    assert len(made.repository.list_slots()) == 1


def test_a_node_writes_and_lists_but_reads_no_data(storage, made):
    made.repository.add_slot("node", role=Role.NODE, label="node-1", kdf=TINY)
    node = reopen(storage, "node")
    assert node.keys.role is Role.NODE
    assert node.keys.chunk_id(b"x") == made.repository.keys.chunk_id(b"x")
    data, metadata = (
        make_header(node.keys, kind, b"k" * 32) for kind in (ObjectKind.DATA_PACK, ObjectKind.METADATA_PACK)
    )
    open_header(node.keys, metadata, ObjectKind.METADATA_PACK, "it")
    with pytest.raises(KeyNotHeld):
        open_header(node.keys, data, ObjectKind.DATA_PACK, "it")
    open_header(reopen(storage).keys, data, ObjectKind.DATA_PACK, "it")


def test_a_node_can_not_make_an_owner(storage, made):
    made.repository.add_slot("node", role=Role.NODE, label="node-1", kdf=TINY)
    node = reopen(storage, "node")
    before = blobs(storage)
    with pytest.raises(KeyNotHeld):
        node.add_slot("more", role=Role.OWNER, label="x", kdf=TINY)
    with pytest.raises(KeyNotHeld):
        node.add_recovery_slot(role=Role.OWNER, label="x", kdf=TINY)
    assert blobs(storage) == before
    assert node._contents.owner_key is None


def test_slots_can_be_added_and_removed_without_touching_data(storage, made):
    config = storage.get(CONFIG)
    added = made.repository.add_slot("second", role=Role.OWNER, label="second", kdf=TINY)
    recovery = made.repository.add_recovery_slot(role=Role.OWNER, label="safe", kdf=TINY)
    assert reopen(storage, "second").keys == reopen(storage, recovery.code).keys == made.repository.keys
    made.repository.remove_slot(added.slot_id)
    with pytest.raises(WrongPassphrase):
        reopen(storage, "second")
    assert storage.get(CONFIG) == config


def test_the_last_owner_slot_stays(storage, made):
    repository = made.repository
    node = repository.add_slot("node", role=Role.NODE, label="node-1", kdf=TINY)
    first, last = slot_of(repository, SlotKind.RECOVERY), slot_of(repository, SlotKind.PASSPHRASE)
    repository.remove_slot(first)
    with pytest.raises(LastKeySlot):
        repository.remove_slot(last)
    overwrite(storage, f"keys/{node.slot_id}", b"junk")
    repository.remove_slot(node.slot_id)
    other = repository.add_slot("node", role=Role.NODE, label="node-2", kdf=TINY)
    overwrite(storage, f"keys/{last}", b"junk")
    repository.remove_slot(other.slot_id)
    with pytest.raises(LastKeySlot):
        repository.remove_slot(last)


@pytest.mark.parametrize("slot_id", ["0123456789abcdef", "", "../config/00000001", "x" * 300])
def test_removing_what_is_not_there_is_told(made, slot_id):
    with pytest.raises(KeySlotNotFound):
        made.repository.remove_slot(slot_id)


def test_secrets_are_in_no_repr_error_log_or_public_blob(storage, made, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    repository, keys = made.repository, made.repository.keys
    added = repository.add_recovery_slot(role=Role.OWNER, label="safe", kdf=TINY)
    errors = []
    for secret in (PASSPHRASE + "!", made.recovery_code[:-1] + "0", "ZZZZ" * 9):
        with pytest.raises(XbfsError) as caught:
            reopen(storage, secret)
        errors += [repr(caught.value), caught.value.hint]
    overwrite(storage, CONFIG, storage.get(CONFIG)[:-1] + b"\0")
    with pytest.raises(XbfsError) as caught:
        reopen(storage)
    errors += [repr(caught.value), caught.value.hint]
    output = capfd.readouterr()
    objects = (made, repository, repository.list_slots(), added, repository._contents)
    stored = [blob.hex() for blob in blobs(storage).values()]
    shown = "".join([*errors, *map(repr, objects), *stored, caplog.text, output.out, output.err])
    contents = repository._contents
    raw = [contents.owner_key, contents.node_key, keys.chunk_id_key, keys.signing_private]
    raw += [keys.private(1, data=True), keys.private(1, data=False)]
    for secret_bytes in raw:
        assert secret_bytes is not None
        assert secret_bytes.hex() not in shown
        assert repr(secret_bytes)[2:-1] not in shown
    for text in (PASSPHRASE, made.recovery_code, added.code):
        assert text not in shown
        assert text.replace("-", "") not in shown
