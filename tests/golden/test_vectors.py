"""The bytes of the repository format: what version 1 wrote, every later program reads, and writes the same."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import zstandard
from blake3 import blake3

from tests.support.engine import Engine
from tests.support.runtime import test_runtime
from tools import make_vectors as made
from xbfs_engine.catalog.boottests import open_boot_test
from xbfs_engine.catalog.fileindex.root import open_file_index
from xbfs_engine.catalog.fileindex.segment import Segment
from xbfs_engine.catalog.node import SAME_PACK, Node
from xbfs_engine.catalog.restore_point import open_manifest
from xbfs_engine.codec import wire
from xbfs_engine.codec.config import decode_config, open_keys
from xbfs_engine.codec.envelope import HEADER_SIZE, ObjectKind, open_header, open_object
from xbfs_engine.codec.recovery import format_code, parse_code
from xbfs_engine.codec.slots import SlotKind, decode_slot
from xbfs_engine.core.ids import BlobHash, PointId
from xbfs_engine.maintain.verify import verify
from xbfs_engine.storage.local import LocalStorage
from xbfs_engine.store.index_blob import decode_index
from xbfs_engine.store.metadata import metadata_body, metadata_hints
from xbfs_engine.store.pack import FOOTER, blob_hash, decode_directory, open_pack_bytes
from xbfs_engine.store.reader import open_chunk
from xbfs_engine.store.repository import open_repository

if TYPE_CHECKING:
    from pathlib import Path

STORED: dict[str, str] = json.loads(made.VECTORS.read_text(encoding="utf-8"))
COMPUTED = made.deterministic()
KEYS = made.fixed_keys()
DOCUMENT = (made.ROOT / "docs" / "format.md").read_text(encoding="utf-8")


def pinned(name: str) -> bytes:
    """A vector that is computed anew."""
    return bytes.fromhex(STORED[name])


def kept(name: str) -> bytes:
    """A vector that was written once."""
    return base64.b64decode(STORED[name], validate=True)


def test_every_vector_is_here() -> None:
    assert STORED.keys() == COMPUTED.keys() | made.randomised().keys()


@pytest.mark.parametrize("name", COMPUTED)
def test_the_bytes_written_are_those_of_the_vector(name: str) -> None:
    assert COMPUTED[name] == pinned(name)


def test_the_format_document_prints_every_vector() -> None:
    printed = dict(re.findall(r"^\| `(\w+)` \| (\d+ \| `[0-9a-f]{16}`) \|$", DOCUMENT, re.MULTILINE))
    blobs = {name: pinned(name) if name in COMPUTED else kept(name) for name in STORED}
    assert printed == {name: f"{len(blob)} | `{blake3(blob).hexdigest()[:16]}`" for name, blob in blobs.items()}


def test_the_format_document_spells_out_the_leaf() -> None:
    """The worked example is the vector, byte for byte."""
    example = re.search(r"<!-- leaf_body -->\n```\n(.*?)```", DOCUMENT, re.DOTALL)
    assert example is not None
    digits = "".join(line.split("  ")[0] for line in example[1].splitlines())
    assert bytes.fromhex(digits) == pinned("leaf_body")


def test_ids_are_keyed_blake3() -> None:
    """Against the definition in the document, not against our own helper."""
    key = pinned("chunk_id_key")
    assert pinned("chunk_id_of_empty") == blake3(b"", key=key).digest()
    node_key = blake3(key, derive_key_context="xbfs 2026-11 metadata id key").digest()
    assert pinned("node_id_of_empty") == blake3(b"", key=node_key).digest()
    assert pinned("leaf_id") == blake3(pinned("leaf_body"), key=node_key).digest()


def test_nodes_decode_to_what_was_encoded() -> None:
    pack = BlobHash(b"p" * 32)
    for name, level in (("leaf", 0), ("inner", 1)):
        plaintext = pinned(f"{name}_plaintext")
        assert bytes(metadata_body(plaintext)) == pinned(f"{name}_body")
        assert bytes(metadata_hints(plaintext)) == pinned(f"{name}_hints")
        children = dict(Node(plaintext, level, pack).children())
        if level == 0:
            assert sorted(children) == [0, 1, 63]
            assert children[63] == (made.filler("id 63", 32), made.filler("pack A", 32), 2)
            assert children[1].pack == made.filler("pack B", 32)
        else:
            assert children[5].ordinal == 7
            assert children[255] == (made.filler("id 255", 32), pack, 0xFFFE)
            assert SAME_PACK in pinned("inner_hints")


def test_the_directory_decodes_to_what_was_encoded() -> None:
    found = decode_directory(pinned("directory"), HEADER_SIZE + 1016 + 528, "vector")
    assert [list(each) for each in (found.offsets, found.stored, found.raw)] == [[128, 1144], [1016, 528], [65536, 512]]
    assert (list(found.encodings), found.id_at(1)) == ([1, 0], made.filler("id 1", 32))
    assert FOOTER.unpack(pinned("footer")) == (120, 0, b"XBFSEND\0")


def test_the_index_decodes_to_what_was_encoded() -> None:
    for payload in (pinned("index_payload"), open_object(KEYS, ObjectKind.INDEX, kept("index_blob"), "vector")):
        found = decode_index(payload, "vector")
        assert [(p.kind, p.pack, p.size_bytes, p.ids) for p in found] == [
            (p.kind, p.pack, p.size_bytes, p.ids) for p in made.indexed()
        ]


def test_the_kept_header_opens() -> None:
    opened = open_header(KEYS, kept("header"), ObjectKind.DATA_PACK, "vector")
    assert kept("header")[:16] == pinned("header_prefix")
    assert kept("header")[96:] == pinned("header_commitment")
    sealed = opened.aead.encrypt(bytes(12), b"x", None)
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    assert AESGCM(made.filler("object key", 32)).decrypt(bytes(12), sealed, None) == b"x"


def test_the_kept_packs_open() -> None:
    wanted = {"data_pack": made.data_chunks(), "metadata_pack": [pinned("leaf_plaintext")]}
    kinds = {"data_pack": ObjectKind.DATA_PACK, "metadata_pack": ObjectKind.METADATA_PACK}
    for name, plaintexts in wanted.items():
        blob = kept(name)
        pack = open_pack_bytes(KEYS, kinds[name], blob_hash(blob), blob)
        compute = KEYS.chunk_id if name == "data_pack" else lambda plain: KEYS.node_id(metadata_body(plain))
        directory = pack.directory
        for ordinal, plaintext in enumerate(plaintexts):
            start = directory.offsets[ordinal]
            sealed = blob[start : start + directory.stored[ordinal]]
            assert open_chunk(pack, ordinal, sealed, compute, zstandard.ZstdDecompressor()) == plaintext


def test_the_kept_manifest_opens() -> None:
    blob = kept("manifest_blob")
    point_id = PointId(blob_hash(blob).hex())
    assert open_manifest(KEYS, point_id, blob) == replace(made.point(), id=point_id)
    signed = wire.decode(open_object(KEYS, ObjectKind.MANIFEST, blob, "vector"), "vector")
    signed.version(1)
    assert signed.raw("body") == pinned("manifest_body")
    assert signed.raw("signature", 64) == pinned("manifest_signature")


def test_the_segment_decodes_to_what_was_encoded() -> None:
    segment = Segment(pinned("file_segment_body"))
    assert [segment.entry(number) for number in range(len(segment))] == made.entries()


def test_the_kept_file_index_opens() -> None:
    index = made.file_index()
    blob = kept("file_index_blob")
    assert open_file_index(KEYS, index.point, blob) == index
    signed = wire.decode(open_object(KEYS, ObjectKind.FILE_INDEX, blob, "vector"), "vector")
    signed.version(1)
    assert signed.raw("body") == pinned("file_index_body")
    assert signed.raw("signature", 64) == pinned("file_index_signature")


def test_the_kept_boot_test_opens() -> None:
    result = made.boot_test()
    blob = kept("boot_test_blob")
    assert open_boot_test(KEYS, result.point, blob) == result
    signed = wire.decode(open_object(KEYS, ObjectKind.BOOT_TEST, blob, "vector"), "vector")
    signed.version(1)
    assert signed.raw("body") == pinned("boot_test_body")
    assert signed.raw("signature", 64) == pinned("boot_test_signature")


def test_wire_records_decode_to_what_was_encoded() -> None:
    types = wire.decode(pinned("wire_types"), "vector")
    assert (types.raw("b"), types.text("a"), types.boolean("t"), types.boolean("f")) == (b"\1\2", "ä", True, False)
    assert not types.optional("n")
    assert (types.records("l", 1), types.mapping("m")) == ([], {})
    types.done()


def test_config_and_slots_open() -> None:
    signed = decode_config(pinned("config"), "vector")
    assert signed.digest == pinned("config_digest")
    for name, kind in (("slot_owner", SlotKind.PASSPHRASE), ("slot_node", SlotKind.RECOVERY)):
        contents = decode_slot(pinned(name), made.filler(name, 8).hex()).open(made.slot_secret(kind))
        assert contents is not None
        keys = open_keys(signed.verify(contents, 1), contents)
        assert keys.chunk_id_key == KEYS.chunk_id_key
        assert (keys.current.data.private is not None) == (name == "slot_owner")
    assert decode_slot(pinned("slot_owner"), made.filler("slot_owner", 8).hex()).open(b"other") is None


def test_the_recovery_code_is_read_and_written_alike() -> None:
    assert parse_code(pinned("recovery_code").decode()) == made.filler("recovery", 20)
    assert format_code(made.filler("recovery", 20)).encode() == pinned("recovery_code")


@pytest.mark.parametrize("secret", ["passphrase", "recovery_code"])
def test_the_kept_repository_opens_verifies_and_reads_back(tmp_path: Path, secret: str) -> None:
    """Written once, by the release that fixed version 1 of the format."""
    expected = json.loads(made.EXPECTED.read_text(encoding="utf-8"))
    copy = tmp_path / "repository"
    shutil.copytree(made.REPOSITORY, copy)
    storage = LocalStorage(copy)
    engine = Engine.of(open_repository(storage, test_runtime(1), expected[secret]), tmp_path / "cache")
    points = engine.points()
    assert [point.id for point in points] == [point["id"] for point in expected["points"]]
    for point, wanted, contents in zip(points, expected["points"], made.contents(), strict=True):
        for disk in point.disks:
            data = engine.read(disk)
            assert data == contents[disk.number]
            assert hashlib.sha256(data).hexdigest() == wanted["sha256"][str(disk.number)]
    report = verify(engine.repository)
    assert (report.damages, report.notes) == (0, 0)
    next_point = engine.backup(made.contents()[0][0], vm_uuid="vm-golden", new_chain=True)
    assert next_point.disks[0].statistics.new_bytes == 0, "and is deduplicated against"
