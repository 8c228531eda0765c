"""The signed config: only what the key slot vouches for is believed."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.support.runtime import START_NS, SeededRandom
from xbfs_engine.codec import wire
from xbfs_engine.codec.config import (
    CONFIG_SIZE_MAX,
    Parameters,
    SignedConfig,
    decode_config,
    new_keys,
    open_keys,
    sign_config,
)
from xbfs_engine.codec.keys import Epoch, KeySet, Role
from xbfs_engine.codec.slots import SlotContents
from xbfs_engine.core.errors import ConfigDamaged, FormatTooNew, RepositoryRolledBack, UsageError, XbfsError

KEYS = new_keys(SeededRandom(1))
OWNER_KEY, NODE_KEY = b"O" * 32, b"N" * 32


def config_of(keys: KeySet, generation: int = 1, seed: int = 5) -> SignedConfig:
    return sign_config(
        keys,
        Parameters.default(),
        owner_key=OWNER_KEY,
        node_key=NODE_KEY,
        generation=generation,
        created_ns=START_NS,
        random=SeededRandom(seed),
    )


SIGNED = config_of(KEYS)
CONTENTS = SlotContents(KEYS.repository_id, OWNER_KEY, NODE_KEY, KEYS.config_public, 1, SIGNED.digest)
NODE_CONTENTS = replace(CONTENTS, owner_key=None)


def rotated() -> KeySet:
    pairs = new_keys(SeededRandom(2)).current
    return replace(KEYS, epochs=(*KEYS.epochs, Epoch(2, pairs.data, pairs.metadata)))


def resigned(change, *, generation: int = 1, private: bytes | None = None) -> SignedConfig:
    """What somebody with a signing key, the owner's if none is given, makes of the config."""
    body = msgpack.unpackb(SIGNED.body)
    body["generation"] = generation
    change(body)
    encoded = wire.encode(body)
    key = Ed25519PrivateKey.from_private_bytes(private or KEYS.config_private)
    return SignedConfig(encoded, key.sign(b"xbfs config v1\0" + encoded))


def vouched(signed: SignedConfig, generation: int = 1) -> SlotContents:
    return replace(CONTENTS, generation=generation, config_digest=signed.digest)


def test_an_owner_gets_all_keys_back():
    signed = decode_config(SIGNED.encode(), "it")
    config = signed.verify(CONTENTS, 1)
    assert config.parameters == Parameters.default()
    assert config.created_ns == START_NS
    assert open_keys(config, CONTENTS) == KEYS


def test_a_node_gets_all_but_the_data_keys():
    keys = open_keys(SIGNED.verify(NODE_CONTENTS, 1), NODE_CONTENTS)
    assert keys.role is Role.NODE
    assert keys.current.data.private is None
    assert keys.current.data.public == KEYS.current.data.public
    assert keys.current.metadata == KEYS.current.metadata
    assert (keys.chunk_id_key, keys.signing_private) == (KEYS.chunk_id_key, KEYS.signing_private)
    assert (keys.config_public, keys.config_private) == (KEYS.config_public, None)


def test_the_config_key_is_sealed_for_owners_alone():
    body, rings = msgpack.unpackb(SIGNED.body), {}
    for section, master in (("owner", OWNER_KEY), ("node", NODE_KEY)):
        sealed = body["keyring"][section]
        bound = b"xbfs keyring v1\0" + KEYS.repository_id + b"\0\0\0\1" + section.encode()
        rings[section] = AESGCM(master).decrypt(sealed[:12], sealed[12:], bound)
    assert set(msgpack.unpackb(rings["owner"])) == {"config", "data"}
    assert set(msgpack.unpackb(rings["node"])) == {"chunk_id_key", "metadata", "signing"}
    assert KEYS.config_private in rings["owner"]
    assert KEYS.config_private not in rings["node"]


def test_private_keys_are_nowhere_in_the_clear():
    blob, epoch = SIGNED.encode(), KEYS.current
    secrets = (KEYS.chunk_id_key, KEYS.signing_private, KEYS.config_private, epoch.data.private, epoch.metadata.private)
    for secret in secrets:
        assert secret is not None
        assert secret not in blob


def test_every_epoch_comes_back():
    keys = rotated()
    signed = config_of(keys, generation=2)
    assert open_keys(signed.verify(CONTENTS, 2), CONTENTS) == keys


def test_every_byte_counts():
    blob = SIGNED.encode()
    outcomes = set()
    for at in range(len(blob)):
        changed = bytearray(blob)
        changed[at] ^= 0x03
        with pytest.raises((ConfigDamaged, FormatTooNew)) as caught:
            decode_config(bytes(changed), "it").verify(CONTENTS, 1)
        outcomes.add(caught.type)
    assert outcomes == {ConfigDamaged, FormatTooNew}


def test_every_truncation_is_damage():
    blob = SIGNED.encode()
    for size in range(len(blob)):
        with pytest.raises(ConfigDamaged):
            decode_config(blob[:size], "it")


def test_a_later_version_is_told_without_any_key():
    blob = wire.encode({"version": 2, "anything": "new"})
    with pytest.raises(FormatTooNew, match="version 2"):
        decode_config(blob, "it")


def test_a_huge_config_is_refused_by_its_size():
    with pytest.raises(ConfigDamaged, match="allowed"):
        decode_config(bytes(CONFIG_SIZE_MAX + 1), "it")


def swap_data_key(body) -> None:
    body["epochs"][0]["data_public"] = new_keys(SeededRandom(66)).current.data.public


def test_a_swapped_public_key_is_refused():
    body = msgpack.unpackb(SIGNED.body)
    swap_data_key(body)
    with pytest.raises(ConfigDamaged, match="not signed"):
        SignedConfig(wire.encode(body), SIGNED.signature).verify(CONTENTS, 1)


def test_a_swapped_public_key_signed_by_the_swapper_is_refused():
    def swap(body) -> None:
        swap_data_key(body)
        body["config_public"] = attacker.public_key().public_bytes_raw()

    attacker = Ed25519PrivateKey.from_private_bytes(b"a" * 32)
    signed = resigned(swap, generation=2, private=b"a" * 32)
    with pytest.raises(ConfigDamaged, match="not signed"):
        signed.verify(CONTENTS, 2)


@pytest.mark.parametrize("contents", [CONTENTS, NODE_CONTENTS], ids=["owner", "node"])
def test_a_config_that_a_stolen_node_signs_is_refused_by_every_slot(contents):
    """A node holds the key that signs manifests, and may call it the config key."""

    def swap(body) -> None:
        swap_data_key(body)
        body["config_public"] = KEYS.signing_public

    for change in (swap_data_key, swap, lambda body: None):
        signed = resigned(change, generation=2, private=KEYS.signing_private)
        with pytest.raises(ConfigDamaged, match="not signed"):
            signed.verify(contents, 2)
        with pytest.raises(ConfigDamaged, match="not signed"):
            signed.verify(replace(contents, generation=2, config_digest=signed.digest), 2)
    resigned(swap_data_key, generation=2).verify(contents, 2)


def test_a_public_key_that_is_not_that_of_the_keyring_is_refused():
    def swap(body) -> None:
        body["epochs"][0]["metadata_public"] = b"m" * 32

    for change, contents in ((swap, NODE_CONTENTS), (swap, CONTENTS), (swap_data_key, CONTENTS)):
        signed = resigned(change)
        with pytest.raises(ConfigDamaged, match="public key"):
            open_keys(signed.verify(replace(contents, config_digest=signed.digest), 1), contents)


def test_a_config_that_names_another_config_key_than_the_one_it_is_signed_with_is_refused():
    signed = resigned(lambda body: body.update(config_public=KEYS.signing_public))
    with pytest.raises(ConfigDamaged, match="another repository"):
        signed.verify(vouched(signed), 1)


def test_signing_keys_that_are_not_those_of_the_keyring_are_refused():
    good = SIGNED.verify(CONTENTS, 1)
    for contents in (CONTENTS, NODE_CONTENTS):
        with pytest.raises(ConfigDamaged, match="the signing key"):
            open_keys(replace(good, signing_public=b"x" * 32), contents)
    with pytest.raises(ConfigDamaged, match="the config key"):
        open_keys(replace(good, config_public=b"x" * 32), CONTENTS)


def test_an_older_config_is_refused():
    with pytest.raises(RepositoryRolledBack, match="has seen 2"):
        SIGNED.verify(replace(CONTENTS, generation=2), 1)


def test_a_newer_config_with_a_good_signature_is_accepted():
    signed = config_of(rotated(), generation=7)
    assert signed.verify(CONTENTS, 7).generation == 7


def test_an_older_config_under_a_newer_name_is_refused():
    with pytest.raises(RepositoryRolledBack, match="another name"):
        SIGNED.verify(CONTENTS, 9)


def test_another_config_of_the_same_generation_is_refused():
    other = config_of(KEYS, seed=6)
    assert other.body != SIGNED.body
    with pytest.raises(RepositoryRolledBack, match="not the one"):
        other.verify(CONTENTS, 1)


def test_a_config_of_another_repository_is_refused():
    other = new_keys(SeededRandom(2))
    with pytest.raises(ConfigDamaged):
        config_of(other).verify(CONTENTS, 1)
    same_signer = config_of(replace(KEYS, repository_id=bytes(16)))
    with pytest.raises(ConfigDamaged, match="another repository"):
        same_signer.verify(vouched(same_signer), 1)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("chunk_size", 32 << 10, FormatTooNew),
        ("chunk_size", 2 << 20, FormatTooNew),
        ("chunk_size", 65537, FormatTooNew),
        ("leaf_fanout", 128, FormatTooNew),
        ("node_fanout", 0, FormatTooNew),
        ("pack_size_target", 1, FormatTooNew),
        ("pack_size_target", 1 << 40, FormatTooNew),
        ("compression_level", 22, FormatTooNew),
        ("compression_level", 0, FormatTooNew),
        ("compression_level", -1, ConfigDamaged),
        ("chunk_size", "64k", ConfigDamaged),
        ("shape", 1, ConfigDamaged),
    ],
)
def test_signed_parameters_out_of_bounds_are_refused(field, value, error):
    def change(body) -> None:
        body["parameters"][field] = value

    signed = resigned(change)
    with pytest.raises(error):
        signed.verify(vouched(signed), 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("repository_id"),
        lambda body: body.update(more=1),
        lambda body: body["keyring"].update(more=b""),
        lambda body: body["epochs"].clear(),
        lambda body: body["epochs"].append(dict(body["epochs"][0])),
        lambda body: body["epochs"][0].update(number=2),
        lambda body: body["epochs"][0].update(data_public=b"short"),
        lambda body: body.update(epochs=[dict(body["epochs"][0], number=n) for n in range(1, 1002)]),
        lambda body: body.update(generation=0),
    ],
)
def test_signed_nonsense_is_damage(change):
    signed = resigned(change)
    with pytest.raises(ConfigDamaged):
        signed.verify(vouched(signed), 1)


@pytest.mark.parametrize("sealed", [b"", b"n" * 12, b"n" * 28, b"n" * 100])
@pytest.mark.parametrize("section", ["owner", "node"])
def test_a_keyring_that_does_not_open_is_damage(section: str, sealed: bytes):
    signed = resigned(lambda body: body["keyring"].update({section: sealed}))
    config = signed.verify(vouched(signed), 1)
    with pytest.raises(ConfigDamaged, match=section):
        open_keys(config, CONTENTS)


def test_keyrings_are_bound_to_their_section_and_generation():
    same = replace(CONTENTS, owner_key=NODE_KEY)

    def swap(body) -> None:
        body["keyring"]["owner"] = body["keyring"]["node"]

    signed = resigned(swap)
    with pytest.raises(ConfigDamaged, match="owner does not open"):
        open_keys(signed.verify(vouched(signed), 1), same)
    config = SIGNED.verify(CONTENTS, 1)
    for other in (replace(config, generation=2), replace(config, repository_id=bytes(16))):
        with pytest.raises(ConfigDamaged, match="does not open"):
            open_keys(other, CONTENTS)


@pytest.mark.parametrize(
    "values",
    [(1, 64, 256, 32 << 20, 3), (65536, 64, 255, 32 << 20, 3), (65536, 64, 256, 0, 3), (1 << 16, 64, 256, 1 << 25, 20)],
)
def test_parameters_this_program_can_not_work_with_are_refused_at_once(values):
    with pytest.raises(UsageError):
        Parameters(*values)


def test_secrets_are_in_no_repr_and_no_error():
    config = SIGNED.verify(CONTENTS, 1)
    with pytest.raises(XbfsError) as caught:
        open_keys(config, replace(CONTENTS, node_key=b"Z" * 32))
    shown = repr(config) + repr(caught.value) + caught.value.hint
    assert "ZZZZ" not in shown
    assert repr(config.keyring_owner) not in shown
    assert repr(config.keyring_node) not in shown
