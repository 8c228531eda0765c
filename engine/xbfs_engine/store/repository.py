"""A repository: made once, opened with a secret, and the key slots through which it is opened.

Owns the blobs ``config/<generation>`` and ``keys/<slot id>`` and decides which of them are believed; what they hold is
``codec.config``'s and ``codec.slots``'s. Never prints or asks. A Repository does not change; any thread may use it.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.codec.config import CONFIG_SIZE_MAX, Parameters, decode_config, new_keys, open_keys, sign_config
from xbfs_engine.codec.keys import KeySet, Role
from xbfs_engine.codec.recovery import CODE_SECRET_SIZE, format_code, looks_like_code, parse_code
from xbfs_engine.codec.slots import (
    MASTER_KEY_SIZE,
    SALT_SIZE,
    SLOT_ID_DIGITS,
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
from xbfs_engine.core.errors import (
    BlobExists,
    BlobNotFound,
    ConfigDamaged,
    FormatTooNew,
    KeyNotHeld,
    KeySlotDamaged,
    KeySlotNotFound,
    LastKeySlot,
    NotARepository,
    RepositoryExists,
    StorageError,
    UsageError,
    WrongPassphrase,
    XbfsError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.codec.config import SignedConfig
    from xbfs_engine.core.runtime import Runtime
    from xbfs_engine.storage.base import BlobInfo, Storage

CONFIGS: Final = "config/"
SLOTS: Final = "keys/"
SLOTS_MAX: Final = 64
"""Each slot tried costs a third of a second: more would let a forger of slots stall every command."""

DEFAULT_PARAMETERS: Final = Parameters.default()
DEFAULT_KDF: Final = KdfParameters.default()

_CONFIG_NAME = re.compile(re.escape(CONFIGS) + r"([0-9]{8})")
_SLOT_NAME = re.compile(re.escape(SLOTS) + rf"([0-9a-f]{{{SLOT_ID_DIGITS}}})")


class ListedSlot(NamedTuple):
    """A key slot as listed: ``slot`` with its public fields, or None and the ``problem`` why it can not be read."""

    slot_id: str
    slot: Slot | None
    problem: XbfsError | None


@dataclass(frozen=True, slots=True)
class AddedRecovery:
    """A new recovery slot and the code that opens it: shown once, kept nowhere."""

    slot: Slot
    code: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class CreatedRepository:
    """A new repository and the recovery code of its second key slot: shown once, kept nowhere."""

    repository: Repository
    recovery_code: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Repository:
    """An opened repository: where it is, its parameters, and the keys that the opening slot's role holds."""

    storage: Storage
    runtime: Runtime
    keys: KeySet
    parameters: Parameters
    _contents: SlotContents = field(repr=False)

    @property
    def id(self) -> str:
        """32 lower-case hex digits."""
        return self.keys.repository_id.hex()

    def add_slot(self, passphrase: str, *, role: Role, label: str, kdf: KdfParameters = DEFAULT_KDF) -> Slot:
        """Add a key slot that a passphrase opens.

        Raises KeyNotHeld if a node would add an owner slot, UsageError for an empty passphrase or a bad label.
        """
        secret = passphrase_secret(passphrase)
        if not secret:
            raise UsageError("the passphrase is empty", hint="choose a long one; the recovery code is its spare")
        return self._add(secret, SlotKind.PASSPHRASE, role, label, kdf)

    def add_recovery_slot(self, *, role: Role, label: str, kdf: KdfParameters = DEFAULT_KDF) -> AddedRecovery:
        """Add a key slot that a new recovery code opens. Raises KeyNotHeld, UsageError like ``add_slot``."""
        secret = self.runtime.random.token(CODE_SECRET_SIZE)
        return AddedRecovery(self._add(secret, SlotKind.RECOVERY, role, label, kdf), format_code(secret))

    def list_slots(self) -> list[ListedSlot]:
        """All key slots, oldest first, damaged ones at the end. Public fields are what the storage says."""
        listed = _read_slots(self.storage)
        slots = sorted((stored.slot for stored in listed.intact), key=lambda slot: (slot.created_ns, slot.slot_id))
        return [ListedSlot(slot.slot_id, slot, None) for slot in slots] + [
            ListedSlot(slot_id, None, problem) for slot_id, problem in listed.unreadable.items()
        ]

    def remove_slot(self, slot_id: str) -> None:
        """Delete a key slot. Whoever copied it and knows its secret keeps the keys it wraps.

        Raises KeySlotNotFound, and LastKeySlot if no readable owner slot would be left.
        """
        listed = self.list_slots()
        removed = next((item for item in listed if item.slot_id == slot_id), None)
        if removed is None:
            raise KeySlotNotFound(f"{self.storage.location()} has no key slot {slot_id[:SLOT_ID_DIGITS]!r}")
        owners = [item for item in listed if item.slot is not None and item.slot.role is Role.OWNER]
        is_node = removed.slot is not None and removed.slot.role is Role.NODE
        if not is_node and not [item for item in owners if item is not removed]:
            raise LastKeySlot(f"key slot {slot_id} is the last that can read the data")
        self.storage.delete(SLOTS + slot_id)

    def _add(self, secret: bytes, kind: SlotKind, role: Role, label: str, kdf: KdfParameters) -> Slot:
        if role is Role.OWNER and self.keys.role is not Role.OWNER:
            raise KeyNotHeld("a node can not add an owner's key slot: it does not hold the keys to wrap in it")
        contents = self._contents if role is Role.OWNER else replace(self._contents, owner_key=None)
        random = self.runtime.random
        slot_id = random.token(SLOT_ID_DIGITS // 2).hex()
        slot = Slot(slot_id, kind, role, label, self.runtime.clock.now_ns(), kdf, random.token(SALT_SIZE))
        self.storage.put(SLOTS + slot_id, [seal_slot(slot, secret, contents).encode()])
        return slot


def create_repository(
    storage: Storage,
    runtime: Runtime,
    *,
    passphrase: str,
    label: str,
    parameters: Parameters = DEFAULT_PARAMETERS,
    kdf: KdfParameters = DEFAULT_KDF,
) -> CreatedRepository:
    """Make a repository on an empty storage, with a passphrase slot and a recovery slot, both the owner's.

    The put of the config is the commit: a crash before leaves key slots that open nothing, and a hint to remove them.
    Raises RepositoryExists if the storage holds anything, UsageError, StorageError.
    """
    _refuse_used(storage)
    keys = new_keys(runtime.random)
    owner_key, node_key = (runtime.random.token(MASTER_KEY_SIZE) for _ in range(2))
    config = sign_config(
        keys,
        parameters,
        owner_key=owner_key,
        node_key=node_key,
        generation=1,
        created_ns=runtime.clock.now_ns(),
        random=runtime.random,
    )
    contents = SlotContents(keys.repository_id, owner_key, node_key, keys.config_public, 1, config.digest)
    repository = Repository(storage, runtime, keys, parameters, contents)
    slot = repository.add_slot(passphrase, role=Role.OWNER, label=label, kdf=kdf)
    recovery = repository.add_recovery_slot(role=Role.OWNER, label="recovery code", kdf=kdf)
    _commit(storage, config.encode(), [slot, recovery.slot])
    return CreatedRepository(repository, recovery.code)


def open_repository(storage: Storage, runtime: Runtime, secret: str) -> Repository:
    """Open a repository with a passphrase or a recovery code.

    Raises NotARepository, FormatTooNew and ConfigDamaged before any secret is tried; then RepositoryRolledBack if a
    slot that opens has seen a later or another config; ConfigDamaged or KeySlotDamaged, the first met, if slots open
    but none fits the config; else WrongPassphrase, KeySlotNotFound, or KeySlotDamaged and FormatTooNew if no slot can
    be read; StorageError.
    """
    generation, signed = _read_config(storage)
    slots = _read_slots(storage)
    tries, mistyped = _tries(slots.intact, secret)
    problem: XbfsError | None = None
    for stored, key in tries:
        try:
            contents = stored.open(key)
            if contents is None:
                continue
            config = signed.verify(contents, generation)
            keys = open_keys(config, contents)
        except (KeySlotDamaged, ConfigDamaged) as exc:
            # Perhaps a slot of another repository with the same secret. What RepositoryRolledBack tells is certain,
            # and an older slot, which can not know it, must not overrule it.
            problem = problem or exc
        else:
            current = replace(contents, generation=generation, config_digest=signed.digest)
            return Repository(storage, runtime, keys, config.parameters, current)
    raise problem or _why_locked(slots, mistyped, storage.location())


class _Slots(NamedTuple):
    intact: list[StoredSlot]
    unreadable: dict[str, XbfsError]


def _read_config(storage: Storage) -> tuple[int, SignedConfig]:
    """The config of the highest generation, and that generation."""
    named = ((_CONFIG_NAME.fullmatch(info.name), info) for info in storage.list_blobs(CONFIGS))
    newest = max(((int(match[1]), info) for match, info in named if match), default=None)
    if newest is None:
        if any(True for _ in storage.list_blobs(SLOTS)):
            raise NotARepository(
                f"{storage.location()} holds key slots but no config",
                hint="if `xbfs init` was interrupted here, run it again and follow its advice; else the config was "
                "lost: restore config/ from a copy of the repository and delete nothing",
            )
        raise NotARepository(f"{storage.location()} holds no repository")
    generation, info = newest
    if info.size_bytes > CONFIG_SIZE_MAX:
        raise ConfigDamaged(f"{info.name} has {info.size_bytes} bytes, more than the {CONFIG_SIZE_MAX} allowed")
    return generation, decode_config(storage.read(info.name, 0, info.size_bytes), info.name)


def _read_slots(storage: Storage) -> _Slots:
    """All key slots. Raises KeySlotDamaged if there are too many to be ours."""
    named = ((_SLOT_NAME.fullmatch(info.name), info) for info in storage.list_blobs(SLOTS))
    found = list(islice(((match[1], info) for match, info in named if match), SLOTS_MAX + 1))
    if len(found) > SLOTS_MAX:
        raise KeySlotDamaged(
            f"{storage.location()} holds more than {SLOTS_MAX} key slots",
            hint="somebody may have planted some: compare keys/ with a copy of the repository and remove the others",
        )
    slots = _Slots([], {})
    for slot_id, info in sorted(found):
        try:
            slots.intact.append(_read_slot(storage, slot_id, info))
        except (KeySlotDamaged, FormatTooNew) as exc:
            slots.unreadable[slot_id] = exc
        except BlobNotFound:
            continue  # removed since it was listed
    return slots


def _read_slot(storage: Storage, slot_id: str, info: BlobInfo) -> StoredSlot:
    if info.size_bytes > SLOT_SIZE_MAX:
        raise KeySlotDamaged(f"key slot {slot_id} has {info.size_bytes} bytes, more than the {SLOT_SIZE_MAX} allowed")
    return decode_slot(storage.read(info.name, 0, info.size_bytes), slot_id)


def _tries(slots: Sequence[StoredSlot], secret: str) -> tuple[list[tuple[StoredSlot, bytes]], WrongPassphrase | None]:
    """The slots to try, each with what the secret is to it; and how it is no recovery code though it looks like one."""
    tries = [(stored, passphrase_secret(secret)) for stored in slots if stored.slot.kind is SlotKind.PASSPHRASE]
    if not looks_like_code(secret):
        return tries, None
    try:
        code = parse_code(secret)
    except WrongPassphrase as exc:
        return tries, exc
    return tries + [(stored, code) for stored in slots if stored.slot.kind is SlotKind.RECOVERY], None


def _why_locked(slots: _Slots, mistyped: WrongPassphrase | None, where: str) -> XbfsError:
    """Why no slot opens."""
    unreadable = list(slots.unreadable.values())
    count = len(slots.intact) + len(unreadable)
    if not count:
        return KeySlotNotFound(
            f"{where} has no key slots", hint="restore keys/ from a copy of the repository, or from an exported slot"
        )
    if mistyped is not None:
        return mistyped
    problems = f"{len(unreadable)} of {count} can not be read: {'; '.join(exc.message for exc in unreadable)}"
    if not slots.intact:
        damaged = any(isinstance(exc, KeySlotDamaged) for exc in unreadable)
        return (KeySlotDamaged if damaged else FormatTooNew)(f"no key slot of {where} opens; {problems}")
    message = f"none of the {len(slots.intact)} readable key slots of {where} opens with this secret"
    if not unreadable:
        return WrongPassphrase(message)
    advice = "; ".join(dict.fromkeys(exc.hint for exc in unreadable))
    return WrongPassphrase(
        f"{message}; {problems}",
        hint=f"try again; if the secret is right, its key slot may be among the {len(unreadable)} that can not be "
        f"read: {advice}",
    )


def _refuse_used(storage: Storage) -> None:
    """Raise RepositoryExists, with the way out, unless the storage is empty."""
    where = storage.location()
    first = next(iter(storage.list_blobs("")), None)
    if first is None:
        return
    if any(True for _ in storage.list_blobs(CONFIGS)):
        raise RepositoryExists(f"{where} holds a repository already")
    if all(info.name.startswith(SLOTS) for info in storage.list_blobs("")):
        raise RepositoryExists(
            f"{where} holds key slots but nothing else: an earlier `xbfs init` was interrupted",
            hint=f"nothing was stored yet: delete {SLOTS} there and run `xbfs init` again",
        )
    raise RepositoryExists(
        f"{where} holds {first.name} but no config",
        hint="choose an empty directory; if this was a repository, restore config/ from a copy and delete nothing",
    )


def _commit(storage: Storage, blob: bytes, slots: Sequence[Slot]) -> None:
    """Put the first config. Raises RepositoryExists, and takes the new slots back, if somebody else was faster."""
    name = f"{CONFIGS}{1:08d}"
    try:
        storage.put(name, [blob])
    except BlobExists as exc:
        if storage.size(name) == len(blob) and storage.read(name, 0, len(blob)) == blob:
            return  # our own put, repeated after its answer was lost
        for slot in slots:
            with suppress(StorageError):
                storage.delete(SLOTS + slot.slot_id)
        raise RepositoryExists(f"{storage.location()} became a repository while this one was being made") from exc
