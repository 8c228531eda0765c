#!/usr/bin/env python3
"""Writes docs/vectors/format.json and tests/golden/repository-v1: bytes of the repository format that may not change.

What is deterministic is computed anew from fixed keys; what is not (HPKE draws a fresh key for each object) is kept as
it stands, and made only where it is missing. Run it when a change of these bytes is meant, or for a new version.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import trio

from xbfs_engine.catalog.blockmap import MapRoot
from xbfs_engine.catalog.boottests import BootTest, Signal, Verdict, seal_boot_test
from xbfs_engine.catalog.catalog import Catalog
from xbfs_engine.catalog.fileindex.records import (
    DiskReads,
    FileIndex,
    IndexMount,
    IndexTree,
    Problem,
    SegmentRef,
    VolumeIndex,
)
from xbfs_engine.catalog.fileindex.root import seal_file_index
from xbfs_engine.catalog.fileindex.segment import Entry, encode_segment
from xbfs_engine.catalog.mibmap import MibMap
from xbfs_engine.catalog.node import SAME_PACK, encode_node, node_plaintext
from xbfs_engine.catalog.restore_point import DiskRecord, ReadStatistics, RestorePoint, RunRecord, seal_manifest
from xbfs_engine.codec import wire
from xbfs_engine.codec.compress import Compressor, Encoding
from xbfs_engine.codec.config import Parameters, new_keys, sign_config
from xbfs_engine.codec.envelope import ObjectKind, make_header, open_object
from xbfs_engine.codec.keys import Role
from xbfs_engine.codec.recovery import format_code
from xbfs_engine.codec.slots import KdfParameters, Slot, SlotContents, SlotKind, seal_slot
from xbfs_engine.core.ids import BlobHash, ChunkRef, PointId
from xbfs_engine.core.limits import KIB, LEAF_FANOUT, MIB, NODE_FANOUT
from xbfs_engine.core.runtime import Runtime
from xbfs_engine.guestfs.base import Kind
from xbfs_engine.ingest.backup import BackupRequest, BackupRun, DiskJob
from xbfs_engine.source.image import ImageSource
from xbfs_engine.storage.local import LocalStorage
from xbfs_engine.storage.memory import MemoryStorage
from xbfs_engine.store.index import ChunkIndex
from xbfs_engine.store.index_blob import PREFIX, put_index
from xbfs_engine.store.metadata import metadata_body
from xbfs_engine.store.pack import FOOTER, FOOTER_MAGIC, NO_BASE, RECORD, encode_directory, pack_name
from xbfs_engine.store.packer import PackWriter, SealedPack
from xbfs_engine.store.repository import create_repository

if TYPE_CHECKING:
    from xbfs_engine.codec.keys import KeySet

Json: TypeAlias = "str | int | list[Json] | dict[str, Json] | None"

ROOT = Path(__file__).parents[1]
VECTORS = ROOT / "docs" / "vectors" / "format.json"
REPOSITORY = ROOT / "tests" / "golden" / "repository-v1"
EXPECTED = REPOSITORY.with_suffix(".json")
PASSPHRASE = "golden passphrase"  # not a secret: it opens a repository of test data
NOW_NS = 1_790_000_000_123_456_789
KDF = KdfParameters(iterations=1, lanes=1, memory_kib=64)
PARAMETERS = Parameters(64 * KIB, LEAF_FANOUT, NODE_FANOUT, 1 * MIB, 3)


class CountingRandom:
    """ "Random" bytes anybody can compute: SHAKE-128 of the seed and a counter."""

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self._count = 0

    def token(self, size_bytes: int) -> bytes:
        """The next bytes."""
        self._count += 1
        return filler(f"{self._seed} {self._count}", size_bytes)


class FixedClock:
    """Time stands still."""

    def now_ns(self) -> int:
        """Always the same."""
        return NOW_NS

    def monotonic_s(self) -> float:
        """No time passes."""
        return 0.0


def filler(seed: str, size_bytes: int) -> bytes:
    """Bytes that look random: SHAKE-128 of ``seed``."""
    return hashlib.shake_128(seed.encode()).digest(size_bytes)


def fixed_keys() -> KeySet:
    """An owner's keys, drawn from CountingRandom("keys")."""
    return new_keys(CountingRandom("keys"))


def _ref(name: str, ordinal: int, *, same: bool = False) -> ChunkRef:
    return ChunkRef(filler(f"id {name}", 32), SAME_PACK if same else BlobHash(filler("pack A", 32)), ordinal)


def nodes() -> dict[str, bytes]:
    """A leaf with chunks 0, 1 and 63, and an inner node with children 5 and 255, one in its own pack."""
    leaf: list[ChunkRef | None] = [None] * LEAF_FANOUT
    leaf[0], leaf[1], leaf[63] = _ref("0", 0), _ref("1", 1)._replace(pack=BlobHash(filler("pack B", 32))), _ref("63", 2)
    inner: list[ChunkRef | None] = [None] * NODE_FANOUT
    inner[5], inner[255] = _ref("5", 7), _ref("255", 0xFFFE, same=True)
    found: dict[str, bytes] = {}
    for name, level, children in (("leaf", 0, leaf), ("inner", 1, inner)):
        found[f"{name}_body"], found[f"{name}_hints"] = encode_node(level, children)
        found[f"{name}_plaintext"] = node_plaintext(level, children)
        found[f"{name}_id"] = fixed_keys().node_id(metadata_body(found[f"{name}_plaintext"]))
    return found


def directory() -> bytes:
    """A pack's directory with a compressed and a raw chunk."""
    records = np.zeros(2, dtype=RECORD)
    for number, (stored, raw, encoding) in enumerate([(1016, 65536, Encoding.ZSTD), (528, 512, Encoding.RAW)]):
        records[number] = (np.void(filler(f"id {number}", 32)), stored, raw, encoding, np.void(bytes(3)), NO_BASE)
    return encode_directory(records)


def point() -> RestorePoint:
    """A point with an empty disk and one with a map."""
    root = MapRoot(ChunkRef(filler("root", 32), BlobHash(filler("pack M", 32)), 3), 1)
    disks = (
        DiskRecord(0, "system", "vdi-0", 100 * MIB + 512, 65536, root, MibMap(bytes([0x80] + [0] * 12)), "cbt",
                   "bitmap", ReadStatistics(196608, 65536, 0, 65536, 65536)),
        DiskRecord(1, "empty", "vdi-1", 0, 65536, None, MibMap(b""), "full", "first backup",
                   ReadStatistics(0, 0, 0, 0, 0)),
    )  # fmt: skip
    run = RunRecord("xbfs 0.1.0", "node-1", NOW_NS, 1234, 66000, 900, 2)
    parent = PointId(filler("parent", 32).hex())
    return RestorePoint(PointId(""), "vm-uuid", "web-01", NOW_NS, parent, disks, run, {"tags": ["a", 1, None, True]})


def wires() -> dict[str, bytes]:
    """Records that show each type and each length class."""
    return {
        "wire_types": wire.encode({"b": b"\1\2", "a": "ä", "n": None, "t": True, "f": False, "l": [], "m": {}}),
        "wire_integers": wire.encode({"i": [0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, -1, -32, -33]}),
        "wire_lengths": wire.encode({"s": ["x" * 31, "x" * 32, b"x" * 255, b"x" * 256], "l": [0] * 16}),
    }


def secrets(keys: KeySet) -> dict[str, bytes]:
    """Config, key slots and what they are made of."""
    random = CountingRandom("config")
    owner_key, node_key = filler("owner key", 32), filler("node key", 32)
    config = sign_config(
        keys, PARAMETERS, owner_key=owner_key, node_key=node_key, generation=1, created_ns=NOW_NS, random=random
    )
    found = {"config": config.encode(), "config_digest": config.digest}
    for role, kind, name in (
        (Role.OWNER, SlotKind.PASSPHRASE, "slot_owner"),
        (Role.NODE, SlotKind.RECOVERY, "slot_node"),
    ):
        held = owner_key if role is Role.OWNER else None
        contents = SlotContents(keys.repository_id, held, node_key, keys.config_public, 1, config.digest)
        slot = Slot(filler(name, 8).hex(), kind, role, "office", NOW_NS, KDF, filler("salt", 16))
        found[name] = seal_slot(slot, slot_secret(kind), contents).encode()
    return found


def slot_secret(kind: SlotKind) -> bytes:
    """The secret of the slots of ``secrets``."""
    return PASSPHRASE.encode() if kind is SlotKind.PASSPHRASE else filler("recovery", 20)


def indexed() -> list[SealedPack]:
    """A data pack of two chunks and a metadata pack of one."""
    ids = [filler(f"id {number}", 32) for number in range(3)]
    return [
        SealedPack(ObjectKind.DATA_PACK, BlobHash(filler("pack A", 32)), 1816, ids[0] + ids[1]),
        SealedPack(ObjectKind.METADATA_PACK, BlobHash(filler("pack M", 32)), 500, ids[2]),
    ]


def entries() -> list[Entry]:
    """Three entries below ``var``: a directory, a file in it from before 1970, and a name whose metadata is lost."""
    return [
        Entry(b"var/log", Kind.DIRECTORY, 4096, 1_700_000_000_000_000_001, 12, 1_700_000_001_000_000_002),
        Entry(b"var/log/syslog", Kind.FILE, 70_000, -1, 13, None),
        Entry(b"var/\xff", Kind.UNKNOWN, 0, 0, 0, None),
    ]


def file_index() -> FileIndex:
    """An index of two volumes, one of which is locked."""
    reads = (DiskReads(0, 100 * MIB + 512, 65536, ((0, 2), (16, 1))),)
    segment = SegmentRef(_ref("segment", 7), 3, b"var/log")
    problem = Problem(b"var/\xff", "its metadata can not be read")
    volumes = (
        VolumeIndex("0p1", "ext4", "root", "u-1", 64 * MIB, "filesystem", "", "replayed", "it was mounted", b"\2", True,
                    3, (problem,), 0, (segment,), reads),
        VolumeIndex("0p2", "crypto_LUKS", "", "u-2", 32 * MIB, "locked", "no key opens it", "", "", b"", True, 0,
                    (), 0, (), reads),
    )  # fmt: skip
    tree = IndexTree("unix", (IndexMount(b"/", "0p1", b"\2", b"", "UUID=u-1"),), ("no /home",))
    return FileIndex(PointId(filler("point", 32).hex()), "xbfs 0.1.0", NOW_NS, ("a note",), tree, volumes, reads)


def boot_test() -> BootTest:
    """The result of a boot test that went well."""
    return BootTest(
        PointId(filler("point", 32).hex()), NOW_NS, Verdict.BOOTED, "a login prompt on the console",
        (Signal("console", "for", "a login prompt"), Signal("reset", "", "0 resets")), 31_000, 900, 30_500,
        "tcg", "bios", "xbfs 0.1.0", "node-1", "web login: ", b"\x89PNG\r\n\x1a\n",
    )  # fmt: skip


def index_blob(keys: KeySet) -> bytes:
    """An index blob that lists ``indexed``."""
    storage = MemoryStorage()
    name = put_index(storage, keys, CountingRandom("index"), indexed())
    return storage.get(PREFIX + name.hex())


def deterministic() -> dict[str, bytes]:
    """Every vector that can be computed anew, by name."""
    keys = fixed_keys()
    manifest = seal_manifest(keys, CountingRandom("manifest"), point())
    signed = wire.decode(open_object(keys, ObjectKind.MANIFEST, manifest, "manifest"), "manifest")
    files = wire.decode(
        open_object(keys, ObjectKind.FILE_INDEX, seal_file_index(keys, CountingRandom("files"), file_index()), "files"),
        "files",
    )
    sealed_test = seal_boot_test(keys, CountingRandom("tests"), boot_test())
    tested = wire.decode(open_object(keys, ObjectKind.BOOT_TEST, sealed_test, "tests"), "tests")
    return {
        "repository_id": keys.repository_id,
        "chunk_id_key": keys.chunk_id_key,
        "data_private": keys.private(1, data=True),
        "metadata_private": keys.private(1, data=False),
        "signing_public": keys.signing_public,
        "config_public": keys.config_public,
        "chunk_id_of_empty": keys.chunk_id(b""),
        "chunk_id_of_64k": keys.chunk_id(filler("chunk", 65536)),
        "node_id_of_empty": keys.node_id(b""),
        "header_prefix": make_header(keys, ObjectKind.DATA_PACK, filler("object key", 32))[:16],
        "header_commitment": make_header(keys, ObjectKind.DATA_PACK, filler("object key", 32))[96:],
        **nodes(),
        "directory": directory(),
        "footer": FOOTER.pack(120, 0, FOOTER_MAGIC),
        "index_payload": open_object(keys, ObjectKind.INDEX, index_blob(keys), "index"),
        "manifest_body": signed.raw("body"),
        "manifest_signature": signed.raw("signature"),
        "file_segment_body": encode_segment(entries()),
        "file_index_body": files.raw("body"),
        "file_index_signature": files.raw("signature"),
        "boot_test_body": tested.raw("body"),
        "boot_test_signature": tested.raw("signature"),
        **wires(),
        **secrets(keys),
        "recovery_code": format_code(filler("recovery", 20)).encode(),
    }


def data_chunks() -> list[bytes]:
    """The plaintexts in the vector ``data_pack``: one that compresses, one that does not, a short one."""
    return [b"XBFS" * 16384, filler("chunk", 4096), b"end"]


def randomised() -> dict[str, bytes]:
    """Fresh objects under the fixed keys. Each run gives others; all must open to the same."""
    keys, random, storage = fixed_keys(), CountingRandom("packs"), MemoryStorage()
    found = {"header": make_header(keys, ObjectKind.DATA_PACK, filler("object key", 32))}
    for kind, name in ((ObjectKind.DATA_PACK, "data_pack"), (ObjectKind.METADATA_PACK, "metadata_pack")):
        writer = PackWriter(storage, keys, random, kind, target_bytes=MIB)
        if kind is ObjectKind.DATA_PACK:
            for chunk in data_chunks():
                encoding, payload = Compressor(3).encode(chunk)
                writer.add(keys.chunk_id(chunk), payload, len(chunk), encoding)
        else:
            plaintext = nodes()["leaf_plaintext"]
            writer.add(nodes()["leaf_id"], plaintext, len(plaintext), Encoding.RAW)
        sealed = writer.seal()
        assert sealed is not None
        found[name] = storage.get(pack_name(kind, sealed.pack))
    found["index_blob"] = index_blob(keys)
    found["manifest_blob"] = seal_manifest(keys, random, point())
    found["file_index_blob"] = seal_file_index(keys, random, file_index())
    found["boot_test_blob"] = seal_boot_test(keys, random, boot_test())
    return found


def contents() -> list[dict[int, bytes]]:
    """Two disks, twice: what the points of the kept repository hold."""
    first = (b"one line of text that compresses\n" * 4000)[: 128 * KIB] + filler("noise", 30_000) + bytes(70_000)
    later = b"changed" + first[7 : 64 * KIB] + bytes(64 * KIB) + first[128 * KIB :] + b"grown"
    return [{0: first, 1: b"\1"}, {0: later, 1: bytes(4 * MIB) + b"far"}]


def write_repository(folder: Path, scratch: Path) -> None:
    """The kept repository: full backups of ``contents`` of VM "golden", and what a reader should find."""
    storage = LocalStorage(folder)
    created = create_repository(
        storage, Runtime(FixedClock(), CountingRandom("repository")), passphrase=PASSPHRASE, label="golden",
        parameters=PARAMETERS, kdf=KDF,
    )  # fmt: skip
    repository, catalog = created.repository, Catalog(created.repository)
    points: list[Json] = []
    for number, disks in enumerate(contents()):
        jobs = []
        for disk, data in disks.items():
            path = scratch / f"{number}-{disk}.raw"
            path.write_bytes(data)
            jobs.append(DiskJob(disk, f"disk {disk}", f"vdi-{disk}", ImageSource(path), None, "golden"))
        index = ChunkIndex(storage, repository.keys, scratch / "cache")
        request = BackupRequest("golden", "vm-golden", jobs, "node", "xbfs 0.1.0", {"note": "kept"}, threads=1)
        done = trio.run(BackupRun(repository, catalog, index, request, lambda _: None).run)
        hashes: dict[str, Json] = {str(disk): hashlib.sha256(data).hexdigest() for disk, data in disks.items()}
        points.append({"id": done.id, "sha256": hashes})
    expected: dict[str, Json] = {"passphrase": PASSPHRASE, "recovery_code": created.recovery_code, "points": points}
    EXPECTED.write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Write what is missing and what is deterministic."""
    known = json.loads(VECTORS.read_text(encoding="utf-8")) if VECTORS.exists() else {}
    fresh = {name: known.get(name) or base64.b64encode(blob).decode() for name, blob in randomised().items()}
    pinned = {name: blob.hex() for name, blob in deterministic().items()}
    VECTORS.write_text(json.dumps(pinned | fresh, indent=1) + "\n", encoding="utf-8")
    if not REPOSITORY.exists():
        with tempfile.TemporaryDirectory() as scratch:
            write_repository(REPOSITORY, Path(scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
