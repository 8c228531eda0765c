"""The root of a point's file index: a signed record of its volumes and their segments. Format only, no state.

The blob is a sealed object (kind file index) whose payload is {version, body, signature}, like a manifest: whoever
knows the repository's public keys could else plant an index. docs/format.md, "File index".
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from xbfs_engine.catalog.fileindex.records import (
    DiskReads,
    FileIndex,
    IndexMount,
    IndexTree,
    Problem,
    SegmentRef,
    VolumeIndex,
)
from xbfs_engine.catalog.fileindex.segment import ENTRIES_MAX, PATH_BYTES_MAX, order
from xbfs_engine.codec import wire
from xbfs_engine.codec.envelope import KEY_SIZE, ObjectKind, open_object, seal_object
from xbfs_engine.core.errors import IndexCorrupt, IntegrityError, KeyNotHeld
from xbfs_engine.core.ids import ID_SIZE, BlobHash, ChunkRef
from xbfs_engine.core.limits import (
    CHUNK_SIZE_DEFAULT,
    CHUNK_SIZE_MAX,
    DISK_SIZE_MAX,
    DISKS_PER_POINT_MAX,
    OBJECT_SIZE_MAX,
)
from xbfs_engine.guestfs.base import NAME_BYTES_MAX, NODE_ID_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from xbfs_engine.codec.keys import KeySet
    from xbfs_engine.core.ids import PointId
    from xbfs_engine.core.runtime import RandomSource

VERSION: Final = 1
_CONTEXT: Final = b"xbfs file index v1\0"

VOLUMES_MAX: Final = 512
MOUNTS_MAX: Final = 1024
NOTES_MAX: Final = 1000
"""Volumes, mounts, notes and problems together stay below the values a record may have (codec.wire)."""
PROBLEMS_MAX: Final = 100
"""Listed for one volume; the others are counted."""
TEXT_MAX: Final = 4096
SEGMENTS_BYTES_MAX: Final = 40 << 20
"""All references to segments of an index: some 300 million entries with paths of usual length."""
RANGES_MAX: Final = 20_000
"""Ranges of chunks read of one disk; with more, neighbours are joined."""

_RANGE: Final = struct.Struct("<QQ")
_PACKS_MAX: Final = 0x10000
_TIME_NS_MAX: Final = 1 << 63
_ENTRIES_TOTAL_MAX: Final = 1 << 40


def seal_file_index(keys: KeySet, random: RandomSource, index: FileIndex) -> bytes:
    """The blob of an index. Raises KeyNotHeld; IndexCorrupt for one that could not be read back."""
    if keys.signing_private is None:
        raise KeyNotHeld("this role can not sign file indexes")
    body = wire.encode(_to_record(index))
    signature = Ed25519PrivateKey.from_private_bytes(keys.signing_private).sign(_CONTEXT + keys.repository_id + body)
    payload = wire.encode({"version": VERSION, "body": body, "signature": signature})
    if len(payload) > OBJECT_SIZE_MAX:
        raise IndexCorrupt(f"the file index of {index.point[:12]} would have {len(payload)} bytes")
    return seal_object(keys, ObjectKind.FILE_INDEX, payload, random.token(KEY_SIZE))


def open_file_index(keys: KeySet, point: PointId, blob: bytes) -> FileIndex:
    """Decode and check a blob that lies under the name of ``point``. Raises IndexCorrupt, FormatTooNew."""
    what = f"file index of {point[:12]}"
    try:
        envelope = wire.decode(open_object(keys, ObjectKind.FILE_INDEX, blob, what), what, size_max=OBJECT_SIZE_MAX)
        envelope.version(VERSION)
        body = envelope.raw("body", size_max=OBJECT_SIZE_MAX)
        signature = envelope.raw("signature", 64)
        envelope.done()
        Ed25519PublicKey.from_public_bytes(keys.signing_public).verify(signature, _CONTEXT + keys.repository_id + body)
        return _from_record(point, wire.decode(body, what, size_max=OBJECT_SIZE_MAX), what)
    except InvalidSignature as exc:
        raise IndexCorrupt(f"{what}: its signature does not hold") from exc
    except IndexCorrupt:
        raise
    except IntegrityError as exc:
        raise IndexCorrupt(exc.message) from exc


def _to_record(index: FileIndex) -> dict[str, wire.Value]:
    packs: dict[bytes, int] = {}
    for volume in index.volumes:
        for segment in volume.segments:
            packs.setdefault(segment.ref.pack, len(packs))
    if len(packs) > _PACKS_MAX:
        raise IndexCorrupt(f"the file index of {index.point[:12]} would lie in {len(packs)} packs")
    return {
        "point": bytes.fromhex(index.point),
        "program": index.program[:64],
        "made_ns": index.made_ns,
        "notes": _texts(index.notes),
        "tree": {
            "kind": index.tree.kind,
            "notes": _texts(index.tree.notes),
            "mounts": [
                {
                    "path": mount.path,
                    "volume": _text(mount.volume),
                    "node": mount.node,
                    "inside": mount.inside,
                    "source": _text(mount.source),
                }
                for mount in index.tree.mounts[:MOUNTS_MAX]
            ],
        },
        "packs": b"".join(packs),
        "volumes": [_volume_to_record(volume, packs) for volume in index.volumes[:VOLUMES_MAX]],
        "reads": _reads_to_list(index.reads),
    }


def _text(text: str) -> str:
    """Texts from a guest may be long, or hold what is no UTF-8."""
    return text[:TEXT_MAX].encode(errors="replace").decode()


def _texts(notes: Sequence[str]) -> list[wire.Value]:
    return [{"text": _text(note)} for note in notes[:NOTES_MAX]]


def _volume_to_record(volume: VolumeIndex, packs: dict[bytes, int]) -> dict[str, wire.Value]:
    segments = volume.segments
    return {
        "name": _text(volume.name),
        "kind": _text(volume.kind),
        "label": _text(volume.label),
        "uuid": _text(volume.uuid),
        "size_bytes": volume.size_bytes,
        "status": volume.status,
        "reason": _text(volume.reason),
        "state": volume.state,
        "state_reason": _text(volume.state_reason),
        "root": volume.root,
        "settled": volume.settled,
        "entries": volume.entries,
        "problems": [{"path": problem.path, "message": _text(problem.message)} for problem in volume.problems],
        "problems_omitted": volume.problems_omitted,
        "segment_ids": b"".join(segment.ref.id for segment in segments),
        "segment_packs": np.array([packs[segment.ref.pack] for segment in segments], dtype="<u2").tobytes(),
        "segment_ordinals": np.array([segment.ref.ordinal for segment in segments], dtype="<u2").tobytes(),
        "segment_entries": np.array([segment.entries for segment in segments], dtype="<u2").tobytes(),
        "segment_firsts": b"\0".join(segment.first for segment in segments),
        "reads": _reads_to_list(volume.reads),
    }


def _reads_to_list(reads: Iterable[DiskReads]) -> list[wire.Value]:
    return [
        {
            "disk": read.disk,
            "size_bytes": read.size_bytes,
            "chunk_size": read.chunk_size,
            "ranges": b"".join(_RANGE.pack(first, count) for first, count in read.ranges),
        }
        for read in reads
    ]


def _from_record(point: PointId, record: wire.Record, what: str) -> FileIndex:
    if record.raw("point", ID_SIZE).hex() != point:
        raise IndexCorrupt(f"{what} is that of another restore point")
    tree = record.record("tree")
    mounts = tuple(_mount(mount) for mount in tree.records("mounts", MOUNTS_MAX))
    packs = record.raw("packs")
    index = FileIndex(
        point=point,
        program=record.text("program", 64),
        made_ns=record.integer("made_ns", 0, _TIME_NS_MAX),
        notes=_notes(record),
        tree=IndexTree(tree.text("kind", 64), mounts, _notes(tree)),
        volumes=tuple(_volume(volume, packs, what) for volume in record.records("volumes", VOLUMES_MAX)),
        reads=_reads(record),
    )
    tree.done()
    record.done()
    if len({volume.name for volume in index.volumes}) != len(index.volumes):
        raise IndexCorrupt(f"{what} has two volumes of one name")
    return index


def _notes(record: wire.Record) -> tuple[str, ...]:
    found = []
    for note in record.records("notes", NOTES_MAX):
        found.append(note.text("text"))
        note.done()
    return tuple(found)


def _mount(record: wire.Record) -> IndexMount:
    inside = record.raw("inside", size_max=PATH_BYTES_MAX) if record.optional("inside") else None
    mount = IndexMount(
        record.raw("path", size_max=PATH_BYTES_MAX),
        record.text("volume"),
        record.raw("node", size_max=NODE_ID_MAX),
        inside,
        record.text("source"),
    )
    record.done()
    return mount


def _volume(record: wire.Record, packs: bytes, what: str) -> VolumeIndex:
    volume = VolumeIndex(
        name=record.text("name"),
        kind=record.text("kind"),
        label=record.text("label"),
        uuid=record.text("uuid"),
        size_bytes=record.integer("size_bytes", 0, _TIME_NS_MAX),
        status=record.text("status", 64),
        reason=record.text("reason"),
        state=record.text("state", 64),
        state_reason=record.text("state_reason"),
        root=record.raw("root", size_max=NODE_ID_MAX),
        settled=record.boolean("settled"),
        entries=record.integer("entries", 0, _ENTRIES_TOTAL_MAX),
        problems=tuple(_problem(problem) for problem in record.records("problems", PROBLEMS_MAX)),
        problems_omitted=record.integer("problems_omitted", 0, _ENTRIES_TOTAL_MAX),
        segments=_segments(record, packs, what),
        reads=_reads(record),
    )
    record.done()
    if sum(segment.entries for segment in volume.segments) != volume.entries:
        raise IndexCorrupt(f"{what}: the segments of volume {volume.name} do not hold {volume.entries} entries")
    return volume


def _problem(record: wire.Record) -> Problem:
    problem = Problem(record.raw("path", size_max=PATH_BYTES_MAX + NAME_BYTES_MAX + 1), record.text("message"))
    record.done()
    return problem


def _segments(record: wire.Record, packs: bytes, what: str) -> tuple[SegmentRef, ...]:
    ids = record.raw("segment_ids")
    count = len(ids) // ID_SIZE
    columns = [
        np.frombuffer(record.raw(f"segment_{name}", 2 * count), dtype="<u2").tolist()
        for name in ("packs", "ordinals", "entries")
    ]
    firsts = record.raw("segment_firsts", size_max=SEGMENTS_BYTES_MAX)
    paths = firsts.split(b"\0") if firsts else []
    if len(ids) % ID_SIZE or len(paths) != count or len(packs) % ID_SIZE:
        raise IndexCorrupt(f"{what}: its lists of segments do not fit together")
    found: list[SegmentRef] = []
    for number, (pack, ordinal, entries, first) in enumerate(zip(*columns, paths, strict=True)):
        at, start = pack * ID_SIZE, number * ID_SIZE
        if at >= len(packs) or not 0 < entries <= ENTRIES_MAX:
            raise IndexCorrupt(f"{what}: a segment is in no pack or has {entries} entries")
        if found and order(first) <= order(found[-1].first):
            raise IndexCorrupt(f"{what}: its segments are not in order")
        ref = ChunkRef(ids[start : start + ID_SIZE], BlobHash(packs[at : at + ID_SIZE]), ordinal)
        found.append(SegmentRef(ref, entries, first))
    return tuple(found)


def _reads(record: wire.Record) -> tuple[DiskReads, ...]:
    return tuple(_disk_reads(reads) for reads in record.records("reads", DISKS_PER_POINT_MAX))


def _disk_reads(record: wire.Record) -> DiskReads:
    raw = record.raw("ranges", size_max=RANGES_MAX * _RANGE.size)
    if len(raw) % _RANGE.size:
        raise IndexCorrupt("a file index has a torn list of ranges")
    ranges = tuple(_RANGE.iter_unpack(raw))
    end = 0
    for first, count in ranges:
        if first < end or not 0 < count <= DISK_SIZE_MAX or first > DISK_SIZE_MAX:
            raise IndexCorrupt("a file index has ranges out of order")
        end = first + count
    reads = DiskReads(
        record.integer("disk", 0, DISKS_PER_POINT_MAX - 1),
        record.integer("size_bytes", 0, DISK_SIZE_MAX),
        record.integer("chunk_size", CHUNK_SIZE_DEFAULT, CHUNK_SIZE_MAX),
        ranges,
    )
    record.done()
    return reads
