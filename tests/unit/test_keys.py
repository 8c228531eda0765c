"""Key sets: what a role holds, that ids are keyed hashes, and that secrets are not shown."""

from __future__ import annotations

from dataclasses import replace

import pytest
from blake3 import blake3

from tests.support.runtime import SeededRandom
from xbfs_engine.codec.config import new_keys
from xbfs_engine.codec.keys import Epoch, KeyPair, KeySet, Role
from xbfs_engine.core.errors import FormatTooNew, KeyNotHeld

OWNER = new_keys(SeededRandom(1))
SIGNERS = (OWNER.signing_private, OWNER.config_private)


def as_node(keys: KeySet) -> KeySet:
    epochs = tuple(replace(epoch, data=replace(epoch.data, private=None)) for epoch in keys.epochs)
    return replace(keys, role=Role.NODE, epochs=epochs, config_private=None)


def test_an_owner_holds_both_private_keys_and_a_node_only_that_of_metadata():
    epoch = OWNER.current
    assert OWNER.private(1, data=True) == epoch.data.private
    assert OWNER.private(1, data=False) == epoch.metadata.private
    node = as_node(OWNER)
    assert node.private(1, data=False) == epoch.metadata.private
    with pytest.raises(KeyNotHeld, match="node"):
        node.private(1, data=True)


def test_the_newest_epoch_is_written_and_older_ones_stay_readable():
    second = Epoch(2, KeyPair(b"d" * 32, b"D" * 32), KeyPair(b"m" * 32, b"M" * 32))
    keys = replace(OWNER, epochs=(*OWNER.epochs, second))
    assert keys.current is second
    assert keys.private(1, data=True) == OWNER.private(1, data=True)
    assert keys.private(2, data=True) == b"D" * 32
    with pytest.raises(FormatTooNew, match="epoch 3"):
        keys.private(3, data=True)


def test_ids_are_keyed_hashes_and_a_node_id_is_never_a_chunk_id():
    assert OWNER.chunk_id(b"data") == blake3(b"data", key=OWNER.chunk_id_key).digest()
    assert OWNER.chunk_id(memoryview(b"data")) == OWNER.chunk_id(b"data")
    assert OWNER.node_id(b"data") != OWNER.chunk_id(b"data")
    assert len(OWNER.node_id(b"data")) == 32
    other = new_keys(SeededRandom(2))
    assert other.chunk_id(b"data") != OWNER.chunk_id(b"data")
    assert other.node_id(b"data") != OWNER.node_id(b"data")


def test_new_keys_are_all_different():
    epoch = OWNER.current
    secrets = [OWNER.chunk_id_key, *SIGNERS, epoch.data.private, epoch.metadata.private]
    publics = [epoch.data.public, epoch.metadata.public, OWNER.signing_public, OWNER.config_public]
    assert len({*secrets, *publics}) == 9
    assert all(len(secret or b"") == 32 for secret in secrets)


def test_a_key_set_does_not_show_its_secrets():
    shown = repr(OWNER) + str(OWNER) + f"{OWNER!r:>1}"
    epoch = OWNER.current
    for secret in (OWNER.chunk_id_key, *SIGNERS, epoch.data.private, epoch.metadata.private):
        assert secret is not None
        assert repr(secret) not in shown
        assert repr(secret)[2:-1] not in shown
        assert secret.hex() not in shown
