"""Every on-disk record of store and catalog, mutated: only XbfsError, and memory in proportion to the input."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.runtime import SeededRandom
from tools import make_vectors as made
from xbfs_engine.catalog.node import Node
from xbfs_engine.catalog.restore_point import open_manifest, seal_manifest
from xbfs_engine.codec import wire
from xbfs_engine.codec.compress import Encoding
from xbfs_engine.codec.envelope import HEADER_SIZE, ObjectKind, open_header, open_object, seal_object
from xbfs_engine.core.errors import XbfsError
from xbfs_engine.core.ids import BlobHash, PointId
from xbfs_engine.core.limits import MIB
from xbfs_engine.storage.memory import MemoryStorage
from xbfs_engine.store.index_blob import decode_index
from xbfs_engine.store.index_run import Run, encode_run, run_of
from xbfs_engine.store.metadata import metadata_body, metadata_chunk
from xbfs_engine.store.pack import decode_directory, open_pack_bytes
from xbfs_engine.store.packer import PackWriter
from xbfs_engine.store.reader import open_chunk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VECTORS = made.deterministic()
KEYS = made.fixed_keys()
OBJECTS = made.randomised()
PACK = BlobHash(b"p" * 32)
POINT = PointId("0" * 64)
MEMORY_MAX = 4 * MIB


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """``valid`` with some bytes overwritten, cut, doubled or appended."""
    data = bytearray(valid)
    for at, value in draw(st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=8)), max_size=4)):
        at %= len(data)
        data[at : at + len(value)] = value
    cut = draw(st.integers(-40, len(data)))
    if cut < 0:
        return bytes(data) + draw(st.binary(max_size=-cut))
    return bytes(data[:cut]) if draw(st.booleans()) else bytes(data)


def survives(decode: Callable[[], object]) -> None:
    """Run a decoder: it succeeds or raises XbfsError, and never holds much memory."""
    tracemalloc.start()
    try:
        decode()
    except XbfsError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY_MAX


@given(plain=mutated(VECTORS["directory"]), end=st.sampled_from([HEADER_SIZE, 1672, 1 << 40]))
@example(plain=b"\xff" * 8, end=1672)
@example(plain=b"\xff\xff\0\0\0\0\0\0", end=1672)
def test_directories(plain: bytes, end: int) -> None:
    survives(lambda: decode_directory(plain, end, "fuzz"))


@given(payload=mutated(VECTORS["index_payload"]))
@example(payload=b"\1\0\0\0\xff\xff\xff\xff")
@example(payload=b"\1\0\0\0\0\0\0\0")
def test_index_payloads(payload: bytes) -> None:
    survives(lambda: run_of([PACK], decode_index(payload, "fuzz")))


@given(plaintext=mutated(VECTORS["leaf_plaintext"]) | mutated(VECTORS["inner_plaintext"]), level=st.integers(0, 8))
def test_nodes(plaintext: bytes, level: int) -> None:
    def walk() -> None:
        node = Node(plaintext, level, PACK)
        listed = node.to_list()
        assert [node.child(slot) for slot in range(len(listed))] == listed
        assert sum(child is not None for child in listed) == node.count > 0
        assert all(len(child.id) == len(child.pack) == 32 for child in listed if child is not None)

    survives(walk)


@given(body=mutated(VECTORS["leaf_body"]), hints=mutated(VECTORS["leaf_hints"]))
def test_nodes_with_their_length_right(body: bytes, hints: bytes) -> None:
    survives(lambda: Node(metadata_chunk(body, hints), 0, PACK).to_list())


@given(plaintext=st.binary(max_size=40))
def test_metadata_chunks(plaintext: bytes) -> None:
    survives(lambda: metadata_body(plaintext))


@settings(max_examples=60)
@given(header=mutated(OBJECTS["header"]))
@example(header=OBJECTS["header"][:16] + bytes(32) + OBJECTS["header"][48:])
@example(header=OBJECTS["header"][:16] + b"\1" + bytes(31) + OBJECTS["header"][48:])
@example(header=OBJECTS["header"][:16] + b"\xff" * 32 + OBJECTS["header"][48:])
def test_headers(header: bytes) -> None:
    """Also the points of low order, with which X25519 has no shared secret (RFC 7748, section 6.1)."""
    survives(lambda: open_header(KEYS, header, ObjectKind.DATA_PACK, "fuzz"))


@settings(max_examples=60)
@given(blob=mutated(OBJECTS["data_pack"]))
def test_whole_packs(blob: bytes) -> None:
    def read() -> None:
        pack = open_pack_bytes(KEYS, ObjectKind.DATA_PACK, PACK, blob)
        for ordinal in range(len(pack.directory)):
            start = pack.directory.offsets[ordinal]
            sealed = blob[start : start + pack.directory.stored[ordinal]]
            open_chunk(pack, ordinal, sealed, KEYS.chunk_id, zstandard.ZstdDecompressor())

    survives(read)


@settings(max_examples=60)
@given(name=st.sampled_from(["index_blob", "manifest_blob"]), data=st.data())
def test_whole_objects(name: str, data: st.DataObject) -> None:
    blob = data.draw(mutated(OBJECTS[name]))
    kind = ObjectKind.INDEX if name == "index_blob" else ObjectKind.MANIFEST
    survives(lambda: open_object(KEYS, kind, blob, "fuzz"))


@settings(max_examples=60)
@given(body=mutated(VECTORS["manifest_body"]))
def test_manifest_bodies_that_are_signed(body: bytes) -> None:
    """As a writer with a bug, or from another release, would seal them."""
    assert KEYS.signing_private is not None
    signer = Ed25519PrivateKey.from_private_bytes(KEYS.signing_private)
    signature = signer.sign(b"xbfs manifest v1\0" + KEYS.repository_id + body)
    payload = wire.encode({"version": 1, "body": body, "signature": signature})
    blob = seal_object(KEYS, ObjectKind.MANIFEST, payload, bytes(32))
    survives(lambda: open_manifest(KEYS, POINT, blob))


@given(point_text=st.text(max_size=30), extra=st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3))
def test_manifests_round_trip(point_text: str, extra: dict[str, int]) -> None:
    from dataclasses import replace

    point = replace(made.point(), vm_name=point_text, vm=dict(extra))
    blob = seal_manifest(KEYS, SeededRandom(1), point)
    assert open_manifest(KEYS, POINT, blob) == replace(point, id=POINT)


@settings(max_examples=60)
@given(
    payload=st.binary(min_size=1, max_size=60) | mutated(zstandard.ZstdCompressor().compress(b"x" * 65536)),
    raw=st.sampled_from([0, 1, 60, 65536, 1 << 20]),
    encoding=st.integers(0, 255),
)
@example(payload=zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * (1 << 24)), raw=65536, encoding=1)
@example(payload=zstandard.ZstdCompressor().compress(bytes(1 << 26)), raw=65536, encoding=1)
def test_stored_forms(payload: bytes, raw: int, encoding: int) -> None:
    """Chunks that authenticate, with whatever a directory may say of them."""
    if not payload:
        return
    storage = MemoryStorage()
    writer = PackWriter(storage, KEYS, SeededRandom(1), ObjectKind.DATA_PACK, target_bytes=MIB)
    writer.add(bytes(32), payload, raw, encoding)  # type: ignore[arg-type]  # what a later release may write
    sealed = writer.seal()
    assert sealed is not None
    blob = next(storage.get(info.name) for info in storage.list_blobs(""))

    def read() -> None:
        pack = open_pack_bytes(KEYS, ObjectKind.DATA_PACK, sealed.pack, blob)
        chunk = blob[HEADER_SIZE : HEADER_SIZE + pack.directory.stored[0]]
        open_chunk(pack, 0, chunk, lambda _: bytes(32), zstandard.ZstdDecompressor())

    survives(read)


def test_encodings_that_are_not_known_are_told_as_such() -> None:
    with pytest.raises(XbfsError, match="encoding 2"):
        Encoding.known(2, "fuzz")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("runs") / "x.run"
    return path


_RUN = b"".join(bytes(part) for part in encode_run(run_of([PACK], made.indexed())))


@given(data=mutated(_RUN) | st.binary(max_size=100))
@example(data=b"")
@example(data=_RUN[:8] + b"\xff" * 24 + _RUN[32:])
def test_run_files(run_file: Path, data: bytes) -> None:
    """A damaged run is refused or knows less; never another place."""
    run_file.unlink(missing_ok=True)
    run_file.write_bytes(data)
    truth = {pack.ids[32 * n : 32 * n + 32]: (pack.pack, n) for pack in made.indexed() for n in range(len(pack))}
    ids = [*truth, bytes(32), b"\xff" * 32]

    def look_up() -> None:
        words = np.frombuffer(b"".join(ids), dtype="<u8").reshape(-1, 4)
        found: list[object] = [None] * len(ids)
        Run(run_file).lookup(words[:, 0], words[:, 1], found)  # type: ignore[arg-type]  # filled with placements
        assert all(place in (None, truth.get(chunk_id)) for chunk_id, place in zip(ids, found, strict=True))

    survives(look_up)
