"""The manifest: one signed record per restore point. Format only; putting and listing is in ``catalog``.

The blob is a sealed object (kind manifest) whose payload is {version, body, signature}; the body is itself a canonical
record. The point's id is the hash of the blob, so it names exactly this state. docs/format.md, "Manifest".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from xbfs_engine.catalog.blockmap import MapRoot
from xbfs_engine.catalog.mibmap import MibMap
from xbfs_engine.codec import wire
from xbfs_engine.codec.envelope import KEY_SIZE, ObjectKind, open_object, seal_object
from xbfs_engine.core.errors import IntegrityError, KeyNotHeld, ManifestCorrupt
from xbfs_engine.core.ids import ID_SIZE, BlobHash, ChunkRef, PointId
from xbfs_engine.core.limits import (
    CHUNK_SIZE_DEFAULT,
    CHUNK_SIZE_MAX,
    DISK_SIZE_MAX,
    DISKS_PER_POINT_MAX,
    MAP_LEVEL_MAX,
    MIB,
    OBJECT_SIZE_MAX,
)

if TYPE_CHECKING:
    from xbfs_engine.codec.keys import KeySet
    from xbfs_engine.core.runtime import RandomSource

VERSION = 1
_CONTEXT = b"xbfs manifest v1\0"
TIME_NS_MAX = 1 << 63


@dataclass(frozen=True, slots=True)
class ReadStatistics:
    """What reading one disk cost, in bytes of the disk. ``source_bytes`` = zero + unchanged + duplicate + new."""

    source_bytes: int
    zero_bytes: int
    unchanged_bytes: int
    duplicate_bytes: int
    new_bytes: int

    @classmethod
    def take(cls, record: wire.Record) -> ReadStatistics:
        """Decode; raises WireError."""
        found = cls(*(record.integer(name) for name in cls.__slots__))
        record.done()
        return found

    def to_record(self) -> dict[str, wire.Value]:
        """Field name to value."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """One disk of a restore point.

    ``number``: the VBD's userdevice. ``data_map``: which MiBs hold data: sizes of synthetic formats follow from it
    without reading the block map. ``method``: ``full`` or ``cbt``; ``reason``: why it was read like that.
    """

    number: int
    name: str
    vdi_uuid: str
    size_bytes: int
    chunk_size: int
    root: MapRoot | None
    data_map: MibMap
    method: str
    reason: str
    statistics: ReadStatistics

    @property
    def chunks(self) -> int:
        """Chunks the disk has, the last one maybe short."""
        return -(-self.size_bytes // self.chunk_size)

    @property
    def data_bytes(self) -> int:
        """Bytes in MiBs that hold any data: an upper bound of what is allocated, exact to 1 MiB."""
        return min(self.data_map.mibs * MIB, self.size_bytes)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What the run that made a point did as a whole."""

    program: str
    node: str
    started_ns: int
    elapsed_ms: int
    stored_bytes: int
    metadata_bytes: int
    packs: int


@dataclass(frozen=True, slots=True)
class RestorePoint:
    """The state of one VM at one time. ``vm``: what else is known of the VM, as captured."""

    id: PointId
    vm_uuid: str
    vm_name: str
    time_ns: int
    parent: PointId | None
    disks: tuple[DiskRecord, ...]
    run: RunRecord
    vm: dict[str, wire.Value]

    def disk(self, number: int) -> DiskRecord | None:
        """The disk of that number."""
        return next((disk for disk in self.disks if disk.number == number), None)


def seal_manifest(keys: KeySet, random: RandomSource, point: RestorePoint) -> bytes:
    """The manifest blob of a point; ``point.id`` is ignored. Raises KeyNotHeld."""
    if keys.signing_private is None:
        raise KeyNotHeld("this role can not sign restore points")
    body = wire.encode(
        {
            "vm_uuid": point.vm_uuid,
            "vm_name": point.vm_name,
            "time_ns": point.time_ns,
            "parent": bytes.fromhex(point.parent) if point.parent else None,
            "disks": [_disk_to_record(disk) for disk in point.disks],
            "run": {name: getattr(point.run, name) for name in RunRecord.__slots__},
            "vm": point.vm,
        }
    )
    signature = Ed25519PrivateKey.from_private_bytes(keys.signing_private).sign(_CONTEXT + keys.repository_id + body)
    payload = wire.encode({"version": VERSION, "body": body, "signature": signature})
    return seal_object(keys, ObjectKind.MANIFEST, payload, random.token(KEY_SIZE))


def open_manifest(keys: KeySet, point_id: PointId, blob: bytes) -> RestorePoint:
    """Decode and check a manifest blob. Raises ManifestCorrupt, FormatTooNew."""
    what = f"restore point {point_id[:12]}"
    try:
        envelope = wire.decode(open_object(keys, ObjectKind.MANIFEST, blob, what), what, size_max=OBJECT_SIZE_MAX)
        envelope.version(VERSION)
        body = envelope.raw("body", size_max=OBJECT_SIZE_MAX)
        signature = envelope.raw("signature", 64)
        envelope.done()
        Ed25519PublicKey.from_public_bytes(keys.signing_public).verify(signature, _CONTEXT + keys.repository_id + body)
        return _point_from_record(point_id, wire.decode(body, what, size_max=OBJECT_SIZE_MAX))
    except InvalidSignature as exc:
        raise ManifestCorrupt(f"{what}: its signature does not hold") from exc
    except IntegrityError as exc:
        raise ManifestCorrupt(exc.message) from exc


def _disk_to_record(disk: DiskRecord) -> dict[str, wire.Value]:
    root: dict[str, wire.Value] | None = None
    if disk.root is not None:
        ref = disk.root.ref
        root = {"id": ref.id, "pack": ref.pack, "ordinal": ref.ordinal, "level": disk.root.level}
    return {
        "number": disk.number,
        "name": disk.name,
        "vdi_uuid": disk.vdi_uuid,
        "size_bytes": disk.size_bytes,
        "chunk_size": disk.chunk_size,
        "root": root,
        "data_map": disk.data_map.bits(),
        "method": disk.method,
        "reason": disk.reason,
        "statistics": disk.statistics.to_record(),
    }


def _disk_from_record(record: wire.Record) -> DiskRecord:
    size = record.integer("size_bytes", 0, DISK_SIZE_MAX)
    root: MapRoot | None = None
    if record.optional("root"):
        raw = record.record("root")
        ref = ChunkRef(raw.raw("id", ID_SIZE), BlobHash(raw.raw("pack", ID_SIZE)), raw.integer("ordinal", 0, 0xFFFF))
        root = MapRoot(ref, raw.integer("level", 0, MAP_LEVEL_MAX))
        raw.done()
    disk = DiskRecord(
        number=record.integer("number", 0, DISKS_PER_POINT_MAX - 1),
        name=record.text("name"),
        vdi_uuid=record.text("vdi_uuid", 64),
        size_bytes=size,
        chunk_size=record.integer("chunk_size", CHUNK_SIZE_DEFAULT, CHUNK_SIZE_MAX),
        root=root,
        data_map=MibMap(record.raw("data_map", data_map_size(size))),
        method=record.text("method", 64),
        reason=record.text("reason"),
        statistics=ReadStatistics.take(record.record("statistics")),
    )
    record.done()
    return disk


def data_map_size(disk_size_bytes: int) -> int:
    """Bytes of the data map of a disk: a bit a MiB."""
    return -(-disk_size_bytes // (8 * MIB))


def _point_from_record(point_id: PointId, record: wire.Record) -> RestorePoint:
    parent = PointId(record.raw("parent", ID_SIZE).hex()) if record.optional("parent") else None
    disks = tuple(_disk_from_record(disk) for disk in record.records("disks", DISKS_PER_POINT_MAX))
    run = record.record("run")
    point = RestorePoint(
        id=point_id,
        vm_uuid=record.text("vm_uuid", 64),
        vm_name=record.text("vm_name"),
        time_ns=record.integer("time_ns", 0, TIME_NS_MAX),
        parent=parent,
        disks=disks,
        run=RunRecord(
            program=run.text("program", 64),
            node=run.text("node", 256),
            started_ns=run.integer("started_ns", 0, TIME_NS_MAX),
            elapsed_ms=run.integer("elapsed_ms"),
            stored_bytes=run.integer("stored_bytes"),
            metadata_bytes=run.integer("metadata_bytes"),
            packs=run.integer("packs"),
        ),
        vm=record.mapping("vm"),
    )
    run.done()
    record.done()
    return point
