"""Key slots of a repository: listed, added, removed, which opens, what roles may do, and that secrets stay secret."""

from __future__ import annotations

import logging
from dataclasses import replace

import msgpack
import pytest
from blake3 import blake3

from tests.support.repositories import (
    CONFIG,
    EMPTY_POINT,
    PASSPHRASE,
    TINY,
    blobs,
    create,
    overwrite,
    plant,
    reopen,
    slot_of,
)
from tests.support.runtime import FixedClock, test_runtime
from xbfs_engine.catalog.catalog import Catalog
from xbfs_engine.codec import wire
from xbfs_engine.codec.envelope import ObjectKind, make_header, open_header
from xbfs_engine.codec.keys import Role
from xbfs_engine.codec.slots import SlotKind
from xbfs_engine.core.errors import (
    ConfigDamaged,
    FormatTooNew,
    KeyNotHeld,
    KeySlotDamaged,
    KeySlotNotFound,
    LastKeySlot,
    RepositoryRolledBack,
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


def test_a_node_signs_restore_points_that_all_believe(storage, made):
    made.repository.add_slot("node", role=Role.NODE, label="node-1", kdf=TINY)
    committed = Catalog(reopen(storage, "node")).commit(EMPTY_POINT)
    seen = Catalog(reopen(storage))
    seen.refresh()
    assert seen.points() == [committed]


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
    raw = [contents.owner_key, contents.node_key, keys.chunk_id_key, keys.signing_private, keys.config_private]
    raw += [keys.private(1, data=True), keys.private(1, data=False)]
    for secret_bytes in raw:
        assert secret_bytes is not None
        assert secret_bytes.hex() not in shown
        assert repr(secret_bytes)[2:-1] not in shown
    for text in (PASSPHRASE, made.recovery_code, added.code):
        assert text not in shown
        assert text.replace("-", "") not in shown


def test_a_slot_of_another_repository_opens_nothing_here(storage, made):
    other = MemoryStorage()
    foreign = create(other, seed=2, passphrase="foreign").repository
    name = f"keys/{slot_of(foreign, SlotKind.PASSPHRASE)}"
    storage.put(name, [other.get(name)])
    with pytest.raises(ConfigDamaged, match="not signed"):
        reopen(storage, "foreign")
    assert reopen(storage).id == made.repository.id


@pytest.mark.parametrize("slot_id", ["0" * 16, "f" * 16], ids=["tried first", "tried last"])
def test_a_slot_of_another_repository_with_the_same_secret_does_not_lock_this_one(storage, made, slot_id):
    foreign = create(MemoryStorage(), seed=2).repository._contents
    same_signer = replace(made.repository._contents, repository_id=bytes(16))
    other_masters = replace(made.repository._contents, owner_key=b"O" * 32, node_key=b"N" * 32)
    for contents in (foreign, same_signer, other_masters):
        plant(storage, slot_id, contents)
        assert reopen(storage).keys == made.repository.keys
        storage.delete(f"keys/{slot_id}")


def test_if_no_slot_that_opens_fits_the_config_the_first_problem_is_told(storage, made):
    storage.delete(f"keys/{slot_of(made.repository, SlotKind.PASSPHRASE)}")
    plant(storage, "0" * 16, replace(made.repository._contents, repository_id=bytes(16)))
    plant(storage, "f" * 16, create(MemoryStorage(), seed=2).repository._contents)
    with pytest.raises(ConfigDamaged, match="belongs to another repository") as caught:
        reopen(storage)
    assert "restore config/ and keys/" in caught.value.hint


def test_a_slot_that_has_seen_a_later_config_is_not_overruled_by_the_next_that_opens(storage, made):
    plant(storage, "0" * 16, create(MemoryStorage(), seed=2).repository._contents)
    plant(storage, "0" * 15 + "1", replace(made.repository._contents, generation=2))
    with pytest.raises(RepositoryRolledBack, match="has seen 2"):
        reopen(storage)


def test_slots_that_can_not_be_read_are_told_when_no_other_opens(storage, made):
    later, damaged = (item.slot_id for item in made.repository.list_slots())
    made.repository.add_slot("another", role=Role.OWNER, label="another", kdf=TINY)
    fields = msgpack.unpackb(storage.get(f"keys/{later}"))
    overwrite(storage, f"keys/{later}", wire.encode(fields | {"version": 2}))
    with pytest.raises(WrongPassphrase, match=r"none of the 2 .* 1 of 3 can not be read: .*version 2") as caught:
        reopen(storage, "wrong")
    assert caught.value.hint.startswith("try again; ")
    assert "among the 1 " in caught.value.hint
    assert caught.value.hint.endswith(FormatTooNew.default_hint)
    overwrite(storage, f"keys/{damaged}", b"junk")
    with pytest.raises(
        WrongPassphrase, match=r"none of the 1 .* 2 of 3 can not be read: .*version 2.*damaged"
    ) as caught:
        reopen(storage, "wrong")
    assert KeySlotDamaged.default_hint in caught.value.hint
    assert reopen(storage, "another").id == made.repository.id


def test_if_no_slot_can_be_read_it_is_not_the_passphrase(storage, made):
    slots = [item.slot_id for item in made.repository.list_slots()]
    for slot_id in slots:
        fields = msgpack.unpackb(storage.get(f"keys/{slot_id}"))
        overwrite(storage, f"keys/{slot_id}", wire.encode(fields | {"version": 2}))
    with pytest.raises(FormatTooNew, match="2 of 2 can not be read"):
        reopen(storage)
    overwrite(storage, f"keys/{slots[0]}", b"junk")
    with pytest.raises(KeySlotDamaged, match="2 of 2 can not be read"):
        reopen(storage)


def test_a_changed_slot_that_is_the_secret_s_is_not_taken_for_a_wrong_passphrase(storage, made):
    slot_id = slot_of(made.repository, SlotKind.PASSPHRASE)
    fields = msgpack.unpackb(storage.get(f"keys/{slot_id}"))
    forged = fields | {"label": "home"}
    del forged["checksum"]
    forged["checksum"] = blake3(wire.encode(forged)).digest()
    overwrite(storage, f"keys/{slot_id}", wire.encode(forged))
    with pytest.raises(KeySlotDamaged, match=f"{slot_id} does not authenticate"):
        reopen(storage)
    with pytest.raises(WrongPassphrase, match="none of the 2"):
        reopen(storage, "wrong")


def test_a_flood_of_slots_is_refused_with_advice(storage, made):
    for number in range(63):
        storage.put(f"keys/{number:016x}", [b"x"])
    with pytest.raises(KeySlotDamaged, match="more than 64"):
        reopen(storage)


def test_a_slot_removed_between_listing_and_reading_is_skipped(storage, made):
    class Stale(MemoryStorage):
        def list_blobs(self, prefix):
            yield from super().list_blobs(prefix)
            if prefix == "keys/":
                yield from [info for info in gone if info.name not in self._blobs]

    gone = list(storage.list_blobs("keys/"))
    stale = Stale()
    created = create(stale, seed=3)
    assert reopen(stale).id == created.repository.id
