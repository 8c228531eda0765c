"""Repositories for tests, made with the cheapest key derivation there is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.runtime import test_runtime
from xbfs_engine.catalog.restore_point import RestorePoint, RunRecord
from xbfs_engine.codec.slots import KdfParameters, Slot, SlotContents, SlotKind, seal_slot
from xbfs_engine.core.ids import PointId
from xbfs_engine.store.repository import CreatedRepository, Repository, create_repository, open_repository

if TYPE_CHECKING:
    from xbfs_engine.storage.memory import MemoryStorage

TINY = KdfParameters(iterations=1, lanes=1, memory_kib=8)
PASSPHRASE = "correct horse battery"
CONFIG = "config/00000001"
EMPTY_POINT = RestorePoint(PointId(""), "vm-1", "vm", 1, None, (), RunRecord("test", "node-1", 0, 0, 0, 0, 0), {})


def create(storage: MemoryStorage, seed: int = 1, passphrase: str = PASSPHRASE) -> CreatedRepository:
    return create_repository(storage, test_runtime(seed), passphrase=passphrase, label="office", kdf=TINY)


def reopen(storage: MemoryStorage, secret: str = PASSPHRASE) -> Repository:
    return open_repository(storage, test_runtime(99), secret)


def overwrite(storage: MemoryStorage, name: str, blob: bytes) -> None:
    storage.delete(name)
    storage.put(name, [blob])


def blobs(storage: MemoryStorage) -> dict[str, bytes]:
    return {info.name: storage.get(info.name) for info in storage.list_blobs("")}


def slot_of(repository: Repository, kind: SlotKind) -> str:
    return next(item.slot_id for item in repository.list_slots() if item.slot is not None and item.slot.kind is kind)


def plant(storage: MemoryStorage, slot_id: str, contents: SlotContents) -> None:
    """A key slot that PASSPHRASE opens, with contents of somebody's choice."""
    slot = Slot(slot_id, SlotKind.PASSPHRASE, contents.role, "planted", 1, TINY, b"s" * 16)
    storage.put(f"keys/{slot_id}", [seal_slot(slot, PASSPHRASE.encode(), contents).encode()])
