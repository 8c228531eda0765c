"""Key slots: the repository's master keys, each copy wrapped under one secret. Pure; ``store.repository`` keeps them.

Owns the record under ``keys/<slot id>`` and the way from a secret to the keys in it. A slot's fields are public but
bound to what is sealed; what is sealed also says which repository, which signer of configs and which config the slot
vouches for.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.constant_time import bytes_eq
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from xbfs_engine.codec import wire
from xbfs_engine.codec.envelope import nonce
from xbfs_engine.codec.keys import REPOSITORY_ID_SIZE, Role
from xbfs_engine.core.errors import FormatTooNew, KeySlotDamaged, UsageError, WireError
from xbfs_engine.core.limits import GIB, KIB, MIB

if TYPE_CHECKING:
    from xbfs_engine.codec.wire import Record, Value

VERSION: Final = 1
SALT_SIZE: Final = 16
MASTER_KEY_SIZE: Final = 32
DIGEST_SIZE: Final = 32
GENERATION_MAX: Final = 99_999_999
"""Config generations have eight digits in their blob's name."""

SLOT_ID_DIGITS: Final = 16
SLOT_SIZE_MAX: Final = 4 * KIB
LABEL_MAX: Final = 64
TIME_NS_MAX: Final = 2**63 - 1

_ALGORITHM: Final = "argon2id"
_SEALED_MAX: Final = 512
"""A slot seals some 250 bytes; anything larger is not ours."""
_CONTEXT: Final = b"xbfs key slot v1\0"


class SlotKind(StrEnum):
    """What opens a slot."""

    PASSPHRASE = "passphrase"  # noqa: S105 - a name
    RECOVERY = "recovery"


@dataclass(frozen=True, slots=True)
class KdfParameters:
    """What one guess of a secret costs (Argon2id, RFC 9106).

    Raises UsageError outside the bounds, which keep a forged slot from demanding more than a machine can give.
    """

    iterations: int
    lanes: int
    memory_kib: int

    def __post_init__(self) -> None:
        if not (1 <= self.iterations <= 64 and 1 <= self.lanes <= 16):
            raise UsageError(f"Argon2id with {self.iterations} iterations, {self.lanes} lanes: allowed are 64 and 16")
        if not 8 * self.lanes <= self.memory_kib <= GIB // KIB:
            raise UsageError(f"Argon2id with {self.memory_kib} KiB: allowed are 8 KiB per lane to 1 GiB")

    @classmethod
    def default(cls) -> KdfParameters:
        """RFC 9106, section 4, second recommendation: 3 passes over 64 MiB in 4 lanes; about 0.3 s."""
        return cls(iterations=3, lanes=4, memory_kib=64 * MIB // KIB)


@dataclass(frozen=True, slots=True)
class SlotContents:
    """What a slot unwraps: master keys, and what the slot vouches for.

    ``owner_key`` is None in a node's slot. ``config_public`` is the Ed25519 key that configs are signed with.
    ``config_digest`` is the digest of the config body at ``generation``, the newest when the slot was made.
    """

    repository_id: bytes
    owner_key: bytes | None = field(repr=False)
    node_key: bytes = field(repr=False)
    config_public: bytes
    generation: int
    config_digest: bytes

    @property
    def role(self) -> Role:
        """The role these keys give."""
        return Role.NODE if self.owner_key is None else Role.OWNER


@dataclass(frozen=True, slots=True)
class Slot:
    """The public fields of a key slot; not to be believed before the slot was opened."""

    slot_id: str
    kind: SlotKind
    role: Role
    label: str
    created_ns: int
    kdf: KdfParameters
    salt: bytes


@dataclass(frozen=True, slots=True)
class StoredSlot:
    """A slot as stored: public fields and sealed keys."""

    slot: Slot
    sealed: bytes = field(repr=False)

    def encode(self) -> bytes:
        """The blob's bytes."""
        return wire.encode(self._fields() | {"checksum": self.checksum()})

    def checksum(self) -> bytes:
        """BLAKE3 of the record without it: tells damage from a wrong passphrase, and without any."""
        return blake3(wire.encode(self._fields())).digest()

    def _fields(self) -> dict[str, Value]:
        return _public(self.slot) | {"sealed": self.sealed}

    def open(self, secret: bytes) -> SlotContents | None:
        """The keys, or None if ``secret`` is not this slot's. Takes the time and memory that its parameters ask for.

        Raises KeySlotDamaged where the secret is right but the slot was changed.
        """
        name = f"key slot {self.slot.slot_id}"
        key, commitment = _derive(self.slot, secret)
        if not bytes_eq(commitment, self.sealed[:DIGEST_SIZE]):
            return None
        try:
            plain = AESGCM(key).decrypt(nonce(0), self.sealed[DIGEST_SIZE:], _bound(self.slot))
        except InvalidTag as exc:
            raise KeySlotDamaged(f"{name} does not authenticate: its bytes were changed") from exc
        contents = _decode_contents(plain, name)
        if contents.role is not self.slot.role:
            raise KeySlotDamaged(f"{name} says {self.slot.role.value} but holds the keys of {contents.role.value}")
        return contents


def passphrase_secret(passphrase: str) -> bytes:
    """The secret of a passphrase: UTF-8 of its NFC form, so that it can be typed on any keyboard (RFC 8265).

    Raises UsageError if it is no valid text.
    """
    try:
        return unicodedata.normalize("NFC", passphrase).encode()
    except UnicodeEncodeError:
        raise UsageError("the passphrase is not valid UTF-8 text") from None


def seal_slot(slot: Slot, secret: bytes, contents: SlotContents) -> StoredSlot:
    """Wrap ``contents`` under ``secret``. The salt must be fresh: key and nonce then serve for this slot only.

    Raises UsageError for a label that is too long or not printable.
    """
    assert contents.role is slot.role
    if not _is_label(slot.label):
        raise UsageError(f"the label of a key slot has at most {LABEL_MAX} printable characters")
    key, commitment = _derive(slot, secret)
    return StoredSlot(slot, commitment + AESGCM(key).encrypt(nonce(0), _encode_contents(contents), _bound(slot)))


def decode_slot(blob: bytes, slot_id: str) -> StoredSlot:
    """The slot stored as ``keys/<slot_id>``. Raises KeySlotDamaged, FormatTooNew."""
    name = f"key slot {slot_id}"
    try:
        record = wire.decode(blob, name, size_max=SLOT_SIZE_MAX)
        record.version(VERSION)
        checksum = record.raw("checksum", DIGEST_SIZE)
        stored = _take_slot(record, name)
        record.done()
    except (WireError, UsageError) as exc:
        raise KeySlotDamaged(f"{name} is damaged: {exc.message}") from exc
    if stored.checksum() != checksum:
        raise KeySlotDamaged(f"{name} is damaged: its checksum does not fit")
    if stored.slot.slot_id != slot_id:
        raise KeySlotDamaged(f"{name} is a copy of key slot {stored.slot.slot_id}")
    return stored


def _take_slot(record: Record, name: str) -> StoredSlot:
    slot_id = record.text("slot_id", SLOT_ID_DIGITS)
    kind, role = record.text("kind", 32), record.text("role", 32)
    label = record.text("label", LABEL_MAX)
    if not slot_id.isalnum() or not _is_label(label):
        raise WireError(f"{name}: an unprintable id or label")
    created_ns = record.integer("created_ns", high=TIME_NS_MAX)
    kdf = record.record("kdf")
    algorithm = kdf.text("algorithm", 32)
    if kind not in set(SlotKind) or role not in set(Role) or algorithm != _ALGORITHM:
        raise FormatTooNew(f"{name} is of a kind this program does not know: {kind!r}, {role!r}, {algorithm!r}")
    parameters = KdfParameters(kdf.integer("iterations"), kdf.integer("lanes"), kdf.integer("memory_kib"))
    slot = Slot(slot_id, SlotKind(kind), Role(role), label, created_ns, parameters, kdf.raw("salt", SALT_SIZE))
    kdf.done()
    return StoredSlot(slot, record.raw("sealed", size_max=_SEALED_MAX))


def _public(slot: Slot) -> dict[str, Value]:
    kdf: dict[str, Value] = {
        "algorithm": _ALGORITHM,
        "salt": slot.salt,
        "iterations": slot.kdf.iterations,
        "lanes": slot.kdf.lanes,
        "memory_kib": slot.kdf.memory_kib,
    }
    return {
        "version": VERSION,
        "slot_id": slot.slot_id,
        "kind": slot.kind.value,
        "role": slot.role.value,
        "label": slot.label,
        "created_ns": slot.created_ns,
        "kdf": kdf,
    }


def _bound(slot: Slot) -> bytes:
    """What the sealed keys are bound to: every public field."""
    return _CONTEXT + wire.encode(_public(slot))


def _derive(slot: Slot, secret: bytes) -> tuple[bytes, bytes]:
    """Key and commitment. AES-GCM alone does not commit: a forged slot could open under many guesses at once and
    tell an onlooker which of them the user knows (partitioning oracle, Len et al., USENIX Security 2021)."""
    kdf = slot.kdf
    argon2 = Argon2id(
        salt=slot.salt,
        length=MASTER_KEY_SIZE + DIGEST_SIZE,
        iterations=kdf.iterations,
        lanes=kdf.lanes,
        memory_cost=kdf.memory_kib,
    )
    try:
        derived = argon2.derive(secret)
    except MemoryError:
        raise KeySlotDamaged(
            f"key slot {slot.slot_id} asks for {kdf.memory_kib} KiB of memory, which this machine does not have free",
            hint="free memory, or use another key slot",
        ) from None
    return derived[:MASTER_KEY_SIZE], derived[MASTER_KEY_SIZE:]


def _encode_contents(contents: SlotContents) -> bytes:
    return wire.encode(
        {
            "repository_id": contents.repository_id,
            "owner_key": contents.owner_key,
            "node_key": contents.node_key,
            "config_public": contents.config_public,
            "generation": contents.generation,
            "config_digest": contents.config_digest,
        }
    )


def _decode_contents(plain: bytes, name: str) -> SlotContents:
    try:
        record = wire.decode(plain, name, size_max=_SEALED_MAX)
        contents = SlotContents(
            repository_id=record.raw("repository_id", REPOSITORY_ID_SIZE),
            owner_key=record.raw("owner_key", MASTER_KEY_SIZE) if record.optional("owner_key") else None,
            node_key=record.raw("node_key", MASTER_KEY_SIZE),
            config_public=record.raw("config_public", 32),
            generation=record.integer("generation", 1, GENERATION_MAX),
            config_digest=record.raw("config_digest", DIGEST_SIZE),
        )
        record.done()
    except WireError as exc:
        raise KeySlotDamaged(f"{name} is damaged inside: {exc.message}") from exc
    return contents


def _is_label(label: str) -> bool:
    return len(label) <= LABEL_MAX and label.isprintable()
