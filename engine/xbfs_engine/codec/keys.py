"""The keys of an opened repository: who can read, write, list and sign. Pure; key slots live in ``slots``.

- chunk-id key: keyed hashes of chunks and nodes; one for the life of the repository, else nothing would deduplicate.
- per epoch: a data pair and a metadata pair (X25519 for HPKE). A *node* lacks the data private key.
- signing pair (Ed25519) of whoever writes manifests.
- config pair (Ed25519) of whoever writes the config. A *node* lacks the private key: it can not name public keys that
  others would seal to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

from blake3 import blake3

from xbfs_engine.core.errors import FormatTooNew, KeyNotHeld

if TYPE_CHECKING:
    from collections.abc import Callable

    from xbfs_engine.codec.compress import Buffer

REPOSITORY_ID_SIZE = 16


class Role(StrEnum):
    """What a key slot unwraps."""

    OWNER = "owner"
    NODE = "node"


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An X25519 pair as raw 32-byte strings; ``private`` is None where the role does not hold it."""

    public: bytes
    private: bytes | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Epoch:
    """The encryption pairs of one key epoch, numbered from 1."""

    number: int
    data: KeyPair
    metadata: KeyPair


@dataclass(frozen=True)
class KeySet:
    """All keys one role holds. Immutable; any thread may use it."""

    repository_id: bytes
    role: Role
    chunk_id_key: bytes = field(repr=False)
    epochs: tuple[Epoch, ...]
    signing_public: bytes
    signing_private: bytes | None = field(repr=False)
    config_public: bytes
    config_private: bytes | None = field(repr=False)

    @property
    def current(self) -> Epoch:
        """The epoch new objects are sealed to."""
        return self.epochs[-1]

    def pair(self, epoch: int, *, data: bool) -> KeyPair:
        """The data or metadata pair of an epoch. Raises FormatTooNew for an epoch the config does not have."""
        for candidate in self.epochs:
            if candidate.number == epoch:
                return candidate.data if data else candidate.metadata
        raise FormatTooNew(
            f"an object is sealed to key epoch {epoch}, which the config does not list",
            hint="the config may be an older copy: compare it with another copy of the repository",
        )

    def private(self, epoch: int, *, data: bool) -> bytes:
        """A private key. Raises KeyNotHeld where the role lacks it."""
        key = self.pair(epoch, data=data).private
        if key is None:
            raise KeyNotHeld(f"the role {self.role.value} does not hold the private key for stored data")
        return key

    @cached_property
    def chunk_id(self) -> Callable[[Buffer], bytes]:
        """The function from a chunk's plaintext to its 32-byte id: BLAKE3 keyed with the chunk-id key."""
        key = self.chunk_id_key

        def compute(plaintext: Buffer) -> bytes:
            return blake3(plaintext, key=key).digest()

        return compute

    @cached_property
    def node_id(self) -> Callable[[Buffer], bytes]:
        """The same for block map nodes, under a key derived for them: a guest can not forge a node by its chunks."""
        key = blake3(self.chunk_id_key, derive_key_context="xbfs 2026-11 metadata id key").digest()

        def compute(plaintext: Buffer) -> bytes:
            return blake3(plaintext, key=key).digest()

        return compute
