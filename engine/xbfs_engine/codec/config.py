"""The repository's config: its parameters, its public keys by epoch, and its private keys sealed per role. Pure.

Owns the record under ``config/<generation>``. It is signed, and believed only if the signature holds with the key that
the *key slot* brings and whose private half only owners hold: neither whoever can write to the storage nor a node can
swap a public key that backups are sealed to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from xbfs_engine.codec import wire
from xbfs_engine.codec.keys import REPOSITORY_ID_SIZE, Epoch, KeyPair, KeySet, Role
from xbfs_engine.codec.slots import GENERATION_MAX, TIME_NS_MAX
from xbfs_engine.core.errors import ConfigDamaged, FormatTooNew, RepositoryRolledBack, UsageError, WireError
from xbfs_engine.core.limits import (
    CHUNK_SIZE_DEFAULT,
    CHUNK_SIZE_MAX,
    KIB,
    LEAF_FANOUT,
    MIB,
    NODE_FANOUT,
    PACK_SIZE_MAX,
    PACK_SIZE_TARGET,
)

if TYPE_CHECKING:
    from xbfs_engine.codec.slots import SlotContents
    from xbfs_engine.codec.wire import Record, Value
    from xbfs_engine.core.runtime import RandomSource

VERSION: Final = 1
KEY_SIZE: Final = 32
SIGNATURE_SIZE: Final = 64
EPOCHS_MAX: Final = 1000
CONFIG_SIZE_MAX: Final = 512 * KIB
"""Holds EPOCHS_MAX epochs, each of less than 300 bytes with its sealed keys."""

_SIGNED: Final = b"xbfs config v1\0"
_SEALED: Final = b"xbfs keyring v1\0"
_NONCE_SIZE: Final = 12
_EXCHANGED: Final = (
    "the config or the key slot was damaged or exchanged: restore config/ and keys/ from a copy of the repository, and "
    "do not back up to it before"
)
_CHUNK_SIZE_MIN: Final = 64 * KIB
_PACK_TARGET_MIN: Final = 1 * MIB
_PACK_TARGET_MAX: Final = PACK_SIZE_MAX // 2
"""A pack outgrows its target by a chunk and its directory."""
_LEVEL_DEFAULT: Final = 1
"""zstd is most of the CPU of a full backup: on a guest of 4.3 GB level 3 took a sixth more in all for 2 % of space."""
_LEVEL_MAX: Final = 19
"""zstd levels above need hundreds of MiB for each compressor."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """What is fixed when a repository is made. Sizes in bytes; ``compression_level`` is zstd's.

    Raises UsageError for values this program can not work with.
    """

    chunk_size: int
    leaf_fanout: int
    node_fanout: int
    pack_size_target: int
    compression_level: int

    def __post_init__(self) -> None:
        size = self.chunk_size
        if not _CHUNK_SIZE_MIN <= size <= CHUNK_SIZE_MAX or size & (size - 1):
            raise UsageError(f"chunk size {size}: allowed are powers of two from {_CHUNK_SIZE_MIN} to {CHUNK_SIZE_MAX}")
        if (self.leaf_fanout, self.node_fanout) != (LEAF_FANOUT, NODE_FANOUT):
            raise UsageError(
                f"block map fan-out {self.leaf_fanout}/{self.node_fanout}: allowed is {LEAF_FANOUT}/{NODE_FANOUT}"
            )
        if not _PACK_TARGET_MIN <= self.pack_size_target <= _PACK_TARGET_MAX:
            raise UsageError(
                f"pack size target {self.pack_size_target}: allowed are {_PACK_TARGET_MIN} to {_PACK_TARGET_MAX}"
            )
        if not 1 <= self.compression_level <= _LEVEL_MAX:
            raise UsageError(f"compression level {self.compression_level}: allowed are 1 to {_LEVEL_MAX}")

    @classmethod
    def default(cls) -> Parameters:
        """64 KiB chunks, fan-out 64/256, packs of 32 MiB, zstd 1."""
        return cls(CHUNK_SIZE_DEFAULT, LEAF_FANOUT, NODE_FANOUT, PACK_SIZE_TARGET, _LEVEL_DEFAULT)


class PublicEpoch(NamedTuple):
    """The public keys of one key epoch."""

    number: int
    data_public: bytes
    metadata_public: bytes


@dataclass(frozen=True, slots=True)
class Config:
    """A config whose signature held. ``keyring_owner`` and ``keyring_node`` are sealed private keys."""

    repository_id: bytes
    generation: int
    created_ns: int
    parameters: Parameters
    epochs: tuple[PublicEpoch, ...]
    signing_public: bytes
    config_public: bytes
    keyring_owner: bytes = field(repr=False)
    keyring_node: bytes = field(repr=False)


class SignedConfig(NamedTuple):
    """A config as stored; nothing in it is believed before ``verify``."""

    body: bytes
    signature: bytes

    def encode(self) -> bytes:
        """The blob's bytes."""
        return wire.encode({"version": VERSION, "body": self.body, "signature": self.signature})

    @property
    def digest(self) -> bytes:
        """32 bytes: BLAKE3 of the body, as key slots carry it."""
        return blake3(self.body).digest()

    def verify(self, contents: SlotContents, generation: int) -> Config:
        """Check the config against what an opened key slot vouches for; ``generation`` is from its blob's name.

        Raises ConfigDamaged, also where slot and config are of different repositories; RepositoryRolledBack where they
        are of one and the slot has seen a later or another config; FormatTooNew.
        """
        what = f"config {generation}"
        try:
            Ed25519PublicKey.from_public_bytes(contents.config_public).verify(self.signature, _SIGNED + self.body)
        except (InvalidSignature, ValueError) as exc:
            raise ConfigDamaged(
                f"{what} is not signed with the key that the key slot vouches for", hint=_EXCHANGED
            ) from exc
        config = _decode_body(self.body, what)
        if config.repository_id != contents.repository_id or config.config_public != contents.config_public:
            raise ConfigDamaged(f"{what} belongs to another repository than the key slot", hint=_EXCHANGED)
        if config.generation != generation:
            raise RepositoryRolledBack(f"{what} holds generation {config.generation}: a copy under another name")
        if generation < contents.generation:
            raise RepositoryRolledBack(f"{what} is the newest, but the key slot has seen {contents.generation}")
        if generation == contents.generation and self.digest != contents.config_digest:
            raise RepositoryRolledBack(f"{what} is not the one that the key slot has seen")
        return config


def new_keys(random: RandomSource) -> KeySet:
    """All keys of a new repository, at epoch 1."""
    signing, config = random.token(KEY_SIZE), random.token(KEY_SIZE)
    return KeySet(
        repository_id=random.token(REPOSITORY_ID_SIZE),
        role=Role.OWNER,
        chunk_id_key=random.token(KEY_SIZE),
        epochs=(Epoch(1, _pair(random.token(KEY_SIZE)), _pair(random.token(KEY_SIZE))),),
        signing_public=_signer(signing),
        signing_private=signing,
        config_public=_signer(config),
        config_private=config,
    )


def sign_config(
    keys: KeySet,
    parameters: Parameters,
    *,
    owner_key: bytes,
    node_key: bytes,
    generation: int,
    created_ns: int,
    random: RandomSource,
) -> SignedConfig:
    """The config of a repository with these keys, which must be an owner's; master keys are 32 bytes."""
    assert keys.config_private is not None
    assert keys.signing_private is not None
    owner: dict[str, Value] = {"config": keys.config_private, "data": _privates(keys, data=True)}
    node: dict[str, Value] = {
        "chunk_id_key": keys.chunk_id_key,
        "metadata": _privates(keys, data=False),
        "signing": keys.signing_private,
    }

    def seal(master: bytes, section: Role, ring: dict[str, Value]) -> bytes:
        fresh = random.token(_NONCE_SIZE)
        return fresh + AESGCM(master).encrypt(fresh, wire.encode(ring), _bound(keys.repository_id, generation, section))

    body = wire.encode(
        {
            "repository_id": keys.repository_id,
            "generation": generation,
            "created_ns": created_ns,
            "parameters": {
                "chunk_size": parameters.chunk_size,
                "leaf_fanout": parameters.leaf_fanout,
                "node_fanout": parameters.node_fanout,
                "pack_size_target": parameters.pack_size_target,
                "compression_level": parameters.compression_level,
            },
            "epochs": [
                {"number": epoch.number, "data_public": epoch.data.public, "metadata_public": epoch.metadata.public}
                for epoch in keys.epochs
            ],
            "signing_public": keys.signing_public,
            "config_public": keys.config_public,
            "keyring": {"owner": seal(owner_key, Role.OWNER, owner), "node": seal(node_key, Role.NODE, node)},
        }
    )
    signature = Ed25519PrivateKey.from_private_bytes(keys.config_private).sign(_SIGNED + body)
    return SignedConfig(body, signature)


def decode_config(blob: bytes, what: str) -> SignedConfig:
    """The parts of a config blob; its version is checked first and needs no key. Raises ConfigDamaged, FormatTooNew."""
    try:
        record = wire.decode(blob, what, size_max=CONFIG_SIZE_MAX)
        record.version(VERSION)
        signed = SignedConfig(record.raw("body"), record.raw("signature", SIGNATURE_SIZE))
        record.done()
    except WireError as exc:
        raise ConfigDamaged(f"{what} is damaged: {exc.message}") from exc
    return signed


def open_keys(config: Config, contents: SlotContents) -> KeySet:
    """The keys that the role of an opened slot holds. Raises ConfigDamaged if a private key is not its public one's."""
    what = f"config {config.generation}"
    node = _open_ring(config.keyring_node, contents.node_key, config, Role.NODE)
    data: dict[int, bytes] = {}
    config_private: bytes | None = None
    try:
        chunk_id_key, signing = node.raw("chunk_id_key", KEY_SIZE), node.raw("signing", KEY_SIZE)
        metadata = _take_privates(node, "metadata")
        node.done()
        if contents.owner_key is not None:
            owner = _open_ring(config.keyring_owner, contents.owner_key, config, Role.OWNER)
            config_private, data = owner.raw("config", KEY_SIZE), _take_privates(owner, "data")
            owner.done()
    except WireError as exc:
        raise ConfigDamaged(f"{what} is damaged: {exc.message}") from exc
    epochs = tuple(
        Epoch(
            epoch.number,
            KeyPair(epoch.data_public, data.get(epoch.number)),
            KeyPair(epoch.metadata_public, metadata.get(epoch.number)),
        )
        for epoch in config.epochs
    )
    held = [epoch.metadata for epoch in epochs] + [epoch.data for epoch in epochs if contents.role is Role.OWNER]
    if any(pair.private is None or _pair(pair.private) != pair for pair in held):
        raise ConfigDamaged(f"{what}: a public key is not that of the private key in the keyring")
    if _signer(signing) != config.signing_public:
        raise ConfigDamaged(f"{what}: the signing key is not that of the keyring")
    if config_private is not None and _signer(config_private) != config.config_public:
        raise ConfigDamaged(f"{what}: the config key is not that of the keyring")
    return KeySet(
        repository_id=config.repository_id,
        role=contents.role,
        chunk_id_key=chunk_id_key,
        epochs=epochs,
        signing_public=config.signing_public,
        signing_private=signing,
        config_public=config.config_public,
        config_private=config_private,
    )


def _decode_body(body: bytes, what: str) -> Config:
    try:
        record = wire.decode(body, what, size_max=CONFIG_SIZE_MAX)
        ring = record.record("keyring")
        config = Config(
            repository_id=record.raw("repository_id", REPOSITORY_ID_SIZE),
            generation=record.integer("generation", 1, GENERATION_MAX),
            created_ns=record.integer("created_ns", high=TIME_NS_MAX),
            parameters=_take_parameters(record.record("parameters"), what),
            epochs=tuple(_take_epoch(item) for item in record.records("epochs", EPOCHS_MAX)),
            signing_public=record.raw("signing_public", KEY_SIZE),
            config_public=record.raw("config_public", KEY_SIZE),
            keyring_owner=ring.raw("owner"),
            keyring_node=ring.raw("node"),
        )
        ring.done()
        record.done()
    except WireError as exc:
        raise ConfigDamaged(f"{what} is damaged: {exc.message}") from exc
    if not config.epochs or [epoch.number for epoch in config.epochs] != list(range(1, len(config.epochs) + 1)):
        raise ConfigDamaged(f"{what}: its key epochs are not numbered from 1")
    return config


def _take_parameters(record: Record, what: str) -> Parameters:
    taken = [
        record.integer(name)
        for name in ("chunk_size", "leaf_fanout", "node_fanout", "pack_size_target", "compression_level")
    ]
    record.done()
    try:
        return Parameters(*taken)
    except UsageError as exc:
        raise FormatTooNew(f"{what}: {exc.message}") from exc


def _take_epoch(record: Record) -> PublicEpoch:
    epoch = PublicEpoch(
        record.integer("number"), record.raw("data_public", KEY_SIZE), record.raw("metadata_public", KEY_SIZE)
    )
    record.done()
    return epoch


def _open_ring(sealed: bytes, master: bytes, config: Config, section: Role) -> Record:
    what = f"config {config.generation}, keyring {section.value}"
    bound = _bound(config.repository_id, config.generation, section)
    try:
        plain = AESGCM(master).decrypt(sealed[:_NONCE_SIZE], sealed[_NONCE_SIZE:], bound)
    except (InvalidTag, ValueError) as exc:
        raise ConfigDamaged(f"{what} does not open with the key slot's keys") from exc
    return wire.decode(plain, what)


def _bound(repository_id: bytes, generation: int, section: Role) -> bytes:
    return _SEALED + repository_id + generation.to_bytes(4, "big") + section.value.encode()


def _privates(keys: KeySet, *, data: bool) -> list[Value]:
    return [{"number": epoch.number, "private": keys.private(epoch.number, data=data)} for epoch in keys.epochs]


def _take_privates(record: Record, key: str) -> dict[int, bytes]:
    privates = {}
    for item in record.records(key, EPOCHS_MAX):
        privates[item.integer("number")] = item.raw("private", KEY_SIZE)
        item.done()
    return privates


def _pair(private: bytes) -> KeyPair:
    return KeyPair(X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw(), private)


def _signer(private: bytes) -> bytes:
    """The Ed25519 public key of a private one."""
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
