"""Making and opening repositories over a storage that may be in anybody's hands."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.repositories import CONFIG, EMPTY_POINT, PASSPHRASE, TINY, blobs, create, overwrite, reopen, slot_of
from tests.support.runtime import test_runtime
from xbfs_engine.catalog.catalog import Catalog
from xbfs_engine.codec import wire
from xbfs_engine.codec.config import Parameters, SignedConfig, sign_config
from xbfs_engine.codec.keys import Role
from xbfs_engine.codec.slots import KdfParameters, SlotKind
from xbfs_engine.core.errors import (
    BlobExists,
    ConfigDamaged,
    FormatTooNew,
    IndexCorrupt,
    KeySlotDamaged,
    KeySlotNotFound,
    ManifestCorrupt,
    NotARepository,
    RepositoryExists,
    RepositoryRolledBack,
    StorageUnavailable,
    UsageError,
    WrongPassphrase,
)
from xbfs_engine.core.limits import OBJECT_SIZE_MAX
from xbfs_engine.storage.memory import MemoryStorage
from xbfs_engine.store.index_blob import get_index, put_index
from xbfs_engine.store.repository import CreatedRepository, create_repository


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


@pytest.fixture
def made(storage: MemoryStorage) -> CreatedRepository:
    return create(storage)


def next_config(storage: MemoryStorage, made: CreatedRepository, generation: int) -> bytes:
    """A later config of the same repository, as key rotation will write it."""
    contents = made.repository._contents
    assert contents.owner_key is not None
    signed = sign_config(
        made.repository.keys,
        made.repository.parameters,
        owner_key=contents.owner_key,
        node_key=contents.node_key,
        generation=generation,
        created_ns=1,
        random=test_runtime(generation).random,
    )
    storage.put(f"config/{generation:08d}", [signed.encode()])
    return signed.encode()


def test_a_new_repository_is_two_slots_and_a_config_and_opens_with_either_secret(storage, made):
    assert sorted(name.split("/")[0] for name in blobs(storage)) == ["config", "keys", "keys"]
    for secret in (PASSPHRASE, made.recovery_code, made.recovery_code.lower().replace("-", " ")):
        opened = reopen(storage, secret)
        assert opened.keys == made.repository.keys
        assert opened.id == made.repository.id == opened.keys.repository_id.hex()
        assert opened.parameters == Parameters.default()


def test_parameters_are_kept(storage):
    parameters = replace(Parameters.default(), chunk_size=1 << 20, compression_level=9)
    create_repository(storage, test_runtime(1), passphrase="x", label="", parameters=parameters, kdf=TINY)
    assert reopen(storage, "x").parameters == parameters


def test_the_default_costs_are_the_strong_ones(storage):
    repository = create_repository(storage, test_runtime(1), passphrase=PASSPHRASE, label="office").repository
    assert {item.slot.kdf for item in repository.list_slots() if item.slot} == {KdfParameters.default()}
    assert reopen(storage).keys == repository.keys


def test_a_place_in_use_is_refused_and_left_alone(storage, made):
    before = blobs(storage)
    with pytest.raises(RepositoryExists, match="already"):
        create(storage, seed=2)
    assert blobs(storage) == before


@pytest.mark.parametrize("name", ["data/ab/cd", "points/x", "someones/file"])
def test_anything_without_a_config_is_refused_with_advice_not_to_delete(storage, name):
    storage.put(name, [b"x"])
    with pytest.raises(RepositoryExists, match=name) as caught:
        create(storage)
    assert "delete nothing" in caught.value.hint


def test_a_lost_config_is_not_taken_for_an_interrupted_init(storage, made):
    storage.delete(CONFIG)
    storage.put("data/ab/cd", [b"x"])
    with pytest.raises(RepositoryExists) as caught:
        create(storage, seed=2)
    assert "restore config/" in caught.value.hint
    with pytest.raises(NotARepository, match="no config"):
        reopen(storage)


class CrashingStorage(MemoryStorage):
    """Fails the n-th put."""

    def __init__(self, puts: int) -> None:
        super().__init__()
        self.puts = puts

    def put(self, name, parts) -> None:
        if self.puts == 0:
            raise StorageUnavailable("gone")
        self.puts -= 1
        super().put(name, parts)


@pytest.mark.parametrize("puts", [0, 1, 2])
def test_an_interrupted_init_leaves_nothing_that_opens_and_says_what_to_do(puts):
    storage = CrashingStorage(puts)
    with pytest.raises(StorageUnavailable):
        create(storage)
    storage.puts = 100
    with pytest.raises(NotARepository):
        reopen(storage)
    if puts:
        with pytest.raises(RepositoryExists, match="interrupted") as caught:
            create(storage, seed=2)
        assert "delete keys/" in caught.value.hint
        for name in blobs(storage):
            assert name.startswith("keys/")
            storage.delete(name)
    create(storage, seed=2)
    reopen(storage)


def test_of_two_inits_at_once_one_wins_and_the_other_takes_its_slots_back():
    class Raced(MemoryStorage):
        def put(self, name, parts) -> None:
            if name == CONFIG and not racing:
                racing.append(True)
                for other, blob in winner.items():
                    super().put(other, [blob])
            super().put(name, parts)

    first = MemoryStorage()
    create(first)
    winner = blobs(first)
    racing: list[bool] = []
    storage = Raced()
    with pytest.raises(RepositoryExists, match="while"):
        create(storage, seed=2, passphrase="other")
    assert blobs(storage) == winner
    reopen(storage)


def test_a_config_put_that_was_repeated_by_the_storage_is_no_conflict():
    class Repeating(MemoryStorage):
        def put(self, name, parts) -> None:
            super().put(name, parts)
            if name == CONFIG:
                raise BlobExists("it was there: the first answer got lost")

    storage = Repeating()
    create(storage)
    reopen(storage)


@pytest.mark.parametrize(("passphrase", "label"), [("", "x"), ("\udcff", "x"), ("fine", "\n"), ("fine", "x" * 65)])
def test_bad_arguments_write_nothing(storage, passphrase, label):
    with pytest.raises(UsageError):
        create_repository(storage, test_runtime(1), passphrase=passphrase, label=label, kdf=TINY)
    assert not blobs(storage)


def test_an_empty_place_is_no_repository(storage):
    with pytest.raises(NotARepository):
        reopen(storage)


def test_other_names_under_config_and_keys_are_ignored(storage, made):
    for name in ("config/readme", "config/123", "config/00000002.old", "keys/readme", "keys/0123456789abcde"):
        storage.put(name, [b"x"])
    assert reopen(storage).id == made.repository.id
    assert len(made.repository.list_slots()) == 2


@pytest.mark.parametrize("secret", ["", "Correct horse battery", PASSPHRASE + " ", "\0"])
def test_a_wrong_passphrase_is_told(storage, made, secret):
    with pytest.raises(WrongPassphrase, match="none of the 2"):
        reopen(storage, secret)


def test_a_mistyped_recovery_code_is_told_from_a_wrong_one(storage, made):
    code = made.recovery_code
    with pytest.raises(WrongPassphrase, match="typing error"):
        reopen(storage, code[:-1] + ("0" if code[-1] != "0" else "1"))
    other = create(MemoryStorage(), seed=2).recovery_code
    with pytest.raises(WrongPassphrase, match="none of the 2"):
        reopen(storage, other)


def test_a_passphrase_that_looks_like_a_mistyped_code_still_opens(storage, made):
    passphrase = "ABCD-" * 9
    made.repository.add_slot(passphrase, role=Role.OWNER, label="odd", kdf=TINY)
    assert reopen(storage, passphrase).id == made.repository.id


def test_without_slots_there_is_nothing_to_open(storage, made):
    for item in made.repository.list_slots():
        storage.delete(f"keys/{item.slot_id}")
    with pytest.raises(KeySlotNotFound):
        reopen(storage)


def test_a_newer_repository_says_so_whatever_the_passphrase(storage, made):
    storage.put("config/00000002", [wire.encode({"version": 2, "more": {}})])
    with pytest.raises(FormatTooNew):
        reopen(storage, "wrong")
    assert FormatTooNew.default_hint.startswith("upgrade")


def test_a_flipped_byte_anywhere_in_the_config_is_refused(storage, made):
    blob = storage.get(CONFIG)
    for at in range(len(blob)):
        changed = bytearray(blob)
        changed[at] ^= 0x80
        overwrite(storage, CONFIG, bytes(changed))
        with pytest.raises((ConfigDamaged, FormatTooNew)):
            reopen(storage)


def test_a_flipped_byte_anywhere_in_a_slot_is_refused_and_another_slot_opens(storage, made):
    slot_id = slot_of(made.repository, SlotKind.PASSPHRASE)
    blob = storage.get(f"keys/{slot_id}")
    for at in range(len(blob)):
        changed = bytearray(blob)
        changed[at] ^= 0x80
        overwrite(storage, f"keys/{slot_id}", bytes(changed))
        with pytest.raises((KeySlotDamaged, FormatTooNew, WrongPassphrase)):
            reopen(storage)
        if at % 16 == 0:
            assert reopen(storage, made.recovery_code).id == made.repository.id


def test_a_truncated_config_or_slot_is_refused(storage, made):
    slot = f"keys/{slot_of(made.repository, SlotKind.PASSPHRASE)}"
    made.repository.remove_slot(slot_of(made.repository, SlotKind.RECOVERY))
    for name, error in ((slot, KeySlotDamaged), (CONFIG, ConfigDamaged)):
        blob = storage.get(name)
        for size in (0, 1, len(blob) // 2, len(blob) - 1):
            overwrite(storage, name, blob[:size])
            with pytest.raises(error):
                reopen(storage)
        overwrite(storage, name, blob)
    reopen(storage)


def test_blobs_of_absurd_size_are_refused_without_being_read(made):
    class Huge(MemoryStorage):
        def list_blobs(self, prefix):
            for info in super().list_blobs(prefix):
                yield info._replace(size_bytes=1 << 50) if info.name in huge else info

        def read(self, name, offset, length):
            assert length < 1 << 20
            return super().read(name, offset, length)

    storage = Huge()
    huge: set[str] = set()
    repository = create(storage).repository
    huge.update(f"keys/{item.slot_id}" for item in repository.list_slots())
    with pytest.raises(KeySlotDamaged, match=r"2 of 2 can not be read: .*allowed"):
        reopen(storage)
    huge.add(CONFIG)
    with pytest.raises(ConfigDamaged, match="allowed"):
        reopen(storage)


class Swollen(MemoryStorage):
    """Says that ``swollen`` has a size no index blob or manifest may have, and never gives its bytes."""

    swollen = ""

    def list_blobs(self, prefix):
        for info in super().list_blobs(prefix):
            yield info._replace(size_bytes=OBJECT_SIZE_MAX + 1) if info.name == self.swollen else info

    def size(self, name):
        return OBJECT_SIZE_MAX + 1 if name == self.swollen else super().size(name)

    def get(self, name):
        assert name != self.swollen, "the bytes of a blob that is too large were asked for"
        return super().get(name)


def test_a_huge_index_blob_is_refused_without_being_read():
    storage = Swollen()
    repository = create(storage).repository
    name = put_index(storage, repository.keys, repository.runtime.random, [])
    assert get_index(storage, repository.keys, name) == []
    storage.swollen = f"index/{name.hex()}"
    with pytest.raises(IndexCorrupt, match="allowed"):
        get_index(storage, repository.keys, name)


def test_a_huge_manifest_is_a_damaged_point_without_being_read():
    storage = Swollen()
    repository = create(storage).repository
    names = ["0" * 64, "f" * 64]
    for name in names:
        storage.put(f"points/{name}", [b"x"])
    storage.swollen = f"points/{names[0]}"
    catalog = Catalog(repository)
    catalog.refresh()
    huge, other = (damaged.problem for damaged in catalog.damaged())
    assert isinstance(huge, ManifestCorrupt)
    assert "allowed" in huge.message
    assert "bytes do not have its name" in other.message


def test_a_manifest_that_would_be_refused_for_its_size_is_not_put(storage, made, monkeypatch):
    monkeypatch.setattr("xbfs_engine.catalog.catalog.OBJECT_SIZE_MAX", 100)
    before = blobs(storage)
    with pytest.raises(ManifestCorrupt, match="100 allowed"):
        Catalog(made.repository).commit(EMPTY_POINT)
    assert blobs(storage) == before


@pytest.mark.parametrize("role", Role)
def test_a_config_that_a_stolen_node_signs_opens_with_no_slot(storage, made, role):
    made.repository.add_slot("thief", role=Role.NODE, label="stolen", kdf=TINY)
    made.repository.add_slot("victim", role=role, label="victim", kdf=TINY)
    thief = reopen(storage, "thief")
    assert thief.keys.config_private is None
    assert thief.keys.signing_private is not None
    body = msgpack.unpackb(msgpack.unpackb(storage.get(CONFIG))["body"])
    body["generation"] = 2
    body["epochs"][0]["data_public"] = b"e" * 32
    encoded = wire.encode(body)
    signature = Ed25519PrivateKey.from_private_bytes(thief.keys.signing_private).sign(b"xbfs config v1\0" + encoded)
    storage.put("config/00000002", [SignedConfig(encoded, signature).encode()])
    for secret in ("victim", "thief", PASSPHRASE):
        with pytest.raises(ConfigDamaged, match="not signed"):
            reopen(storage, secret)


def test_a_config_of_another_repository_is_refused(storage, made):
    other = MemoryStorage()
    create(other, seed=2)
    overwrite(storage, CONFIG, other.get(CONFIG))
    with pytest.raises(ConfigDamaged):
        reopen(storage)


def test_a_public_key_swapped_in_the_config_is_refused(storage, made):
    outer = msgpack.unpackb(storage.get(CONFIG))
    body = msgpack.unpackb(outer["body"])
    body["epochs"][0]["data_public"] = b"e" * 32
    overwrite(storage, CONFIG, wire.encode(outer | {"body": wire.encode(body)}))
    with pytest.raises(ConfigDamaged):
        reopen(storage)


def test_the_newest_config_counts_and_slots_made_since_refuse_an_older_one(storage, made):
    next_config(storage, made, 2)
    repository = reopen(storage)
    repository.add_slot("since", role=Role.OWNER, label="since", kdf=TINY)
    assert reopen(storage, "since").id == made.repository.id
    storage.delete("config/00000002")
    with pytest.raises(RepositoryRolledBack, match="has seen 2"):
        reopen(storage, "since")


def test_an_older_config_under_the_name_of_a_newer_is_refused(storage, made):
    storage.put("config/00000009", [storage.get(CONFIG)])
    with pytest.raises(RepositoryRolledBack, match="another name"):
        reopen(storage)


def test_another_config_of_the_generation_a_slot_has_seen_is_refused(storage, made):
    storage.delete(CONFIG)
    next_config(storage, made, 1)
    with pytest.raises(RepositoryRolledBack, match="not the one"):
        reopen(storage)


def test_a_damaged_newest_config_does_not_make_an_older_one_good(storage, made):
    blob = next_config(storage, made, 2)
    overwrite(storage, "config/00000002", blob[:-1])
    with pytest.raises(ConfigDamaged):
        reopen(storage)
