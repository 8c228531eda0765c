"""Index runs: immutable sorted files of the local cache that answer "where is this chunk?".

A run holds, sorted, the first 8 bytes of each id, the next 8, and the place; a bucket directory over the leading bits
makes a look-up one or two memory reads. Files are memory-mapped, so the heap stays small whatever the repository holds.
A run is a cache: it can be deleted at any time and is rebuilt from the index blobs it names.

A wrong place would lose data: a backup would refer to a chunk that is not there. So the head and the pack table carry a
checksum that is verified when a run is opened, and an entry's second word is masked with a mix of its place: once any
bit of an entry has flipped, the entry matches no id. Damage costs deduplication; nothing has to be read in advance.

The 16 bytes of a keyed 256-bit hash identify a chunk: nobody without the key can search for a collision, and among
10^9 chunks a chance collision has a probability of about 10^-21. Every read checks the whole id.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xbfs_engine.core.errors import IndexCorrupt
from xbfs_engine.core.ids import ID_SIZE, BlobHash, Placement
from xbfs_engine.store.pack import blob_hash

if TYPE_CHECKING:
    from collections.abc import Container, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from xbfs_engine.store.packer import SealedPack

MAGIC = b"XBFSRUN3"
HEAD = struct.Struct("<8sIIQII")
"""Magic, sources, packs, entries, bucket bits, zero; then BLAKE3 of these, the sources and the pack table."""
CHECKED_HEAD_SIZE = HEAD.size + 32
ENTRIES_PER_BUCKET = 8
BUCKET_BITS_MAX = 27
PROBES_MAX = 1024
"""Entries looked at in one bucket. It holds about six; only a damaged directory shows more."""
assert HEAD.size == 32


@dataclass(frozen=True, slots=True)
class RunData:
    """The content of a run in memory. ``high`` is sorted; ``place`` is pack number << 16 | ordinal."""

    sources: tuple[BlobHash, ...]
    packs: NDArray[np.void]
    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    place: NDArray[np.uint64]


def run_of(sources: Sequence[BlobHash], packs: Sequence[SealedPack]) -> RunData:
    """Sort the ids of ``packs`` into a run that stands for the index blobs ``sources``."""
    ids = np.frombuffer(b"".join(pack.ids for pack in packs), dtype="<u8").reshape(-1, ID_SIZE // 8)
    counts = [len(pack) for pack in packs]
    numbers = np.repeat(np.arange(len(packs), dtype=np.uint64), counts)
    ordinals = np.concatenate([np.arange(count, dtype=np.uint64) for count in counts]) if counts else numbers
    table = np.frombuffer(b"".join(pack.pack for pack in packs), dtype="V32")
    return _sorted(tuple(sources), table, ids[:, 0], ids[:, 1], (numbers << np.uint64(16)) | ordinals)


def merged(runs: Sequence[RunData]) -> RunData:
    """One run with the content of several."""
    offsets = np.cumsum([0] + [len(run.packs) for run in runs[:-1]])
    places = [run.place + (np.uint64(offset) << np.uint64(16)) for run, offset in zip(runs, offsets, strict=True)]
    sources = tuple(source for run in runs for source in run.sources)
    return _sorted(
        sources,
        np.concatenate([run.packs for run in runs]),
        np.concatenate([run.high for run in runs]),
        np.concatenate([run.low for run in runs]),
        np.concatenate(places),
    )


def _sorted(
    sources: tuple[BlobHash, ...],
    packs: NDArray[np.void],
    high: NDArray[np.uint64],
    low: NDArray[np.uint64],
    place: NDArray[np.uint64],
) -> RunData:
    order = np.argsort(high, kind="stable")
    return RunData(sources, packs, high[order], low[order], place[order])


def encode_run(run: RunData) -> list[bytes | memoryview]:
    """The parts of a run file."""
    bits = min(BUCKET_BITS_MAX, max(1, (len(run.high) // ENTRIES_PER_BUCKET).bit_length()))
    buckets = np.searchsorted(
        run.high, np.arange(0, 1 << bits, dtype=np.uint64) << np.uint64(64 - bits), side="left"
    ).astype(np.uint64)
    head = HEAD.pack(MAGIC, len(run.sources), len(run.packs), len(run.high), bits, 0)
    names = [b"".join(run.sources), run.packs.tobytes()]
    tables = (np.append(buckets, np.uint64(len(run.high))), run.high, run.low ^ _mask(run.place), run.place)
    return [
        head,
        blob_hash(head, *names),
        *names,
        *(np.ascontiguousarray(t).data.cast("B") for t in tables),
    ]


def _mask(place: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A word that any change of ``place`` changes: the finaliser of splitmix64, a bijection."""
    mixed = (place ^ (place >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def run_file_name(sources: Sequence[BlobHash]) -> str:
    """The name of the file that stands for these index blobs, in whatever order."""
    return blob_hash(*sorted(sources)).hex()[:32] + ".run"


class Run:
    """A run file, memory-mapped. Any thread may look up; ``keep`` is called before the run is shared."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            raw = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # a plain array: its slices cost far less
        except (OSError, ValueError) as exc:
            raise IndexCorrupt(f"index cache file {path.name} can not be mapped") from exc
        if len(raw) < CHECKED_HEAD_SIZE:
            raise IndexCorrupt(f"index cache file {path.name} is truncated")
        head = raw[: HEAD.size].tobytes()
        magic, sources, packs, entries, bits, _ = HEAD.unpack(head)
        sizes = [
            sources * ID_SIZE,
            packs * ID_SIZE,
            ((1 << min(bits, 62)) + 1) * 8,
            entries * 8,
            entries * 8,
            entries * 8,
        ]
        if magic != MAGIC or not 1 <= bits <= BUCKET_BITS_MAX or CHECKED_HEAD_SIZE + sum(sizes) != len(raw):
            raise IndexCorrupt(f"index cache file {path.name} does not have the size its head says")
        parts = np.split(raw, np.cumsum([CHECKED_HEAD_SIZE, *sizes]))[1:7]
        hashes = parts[0].tobytes()
        if blob_hash(head, hashes, parts[1].data) != raw[HEAD.size : CHECKED_HEAD_SIZE].tobytes():
            raise IndexCorrupt(f"index cache file {path.name} is damaged")
        self.sources = tuple(BlobHash(hashes[at : at + ID_SIZE]) for at in range(0, len(hashes), ID_SIZE))
        self._packs = parts[1].view("V32")
        self._buckets, self._high, self._low, self._place = (part.view("<u8") for part in parts[2:])
        self._shift = np.uint64(64 - bits)
        self._there = np.ones(packs, dtype=np.bool_)

    def __len__(self) -> int:
        return len(self._high)

    def data(self) -> RunData:
        """The whole content, for merging. A damaged entry stays one that matches no id."""
        return RunData(self.sources, self._packs, self._high, self._low ^ _mask(self._place), self._place)

    def keep(self, present: Container[BlobHash]) -> list[BlobHash]:
        """Answer from now on only with packs that are ``present``; returns those that are not."""
        names = [BlobHash(self._packs[number].tobytes()) for number in range(len(self._packs))]
        self._there = np.array([name in present for name in names], dtype=np.bool_)
        return [name for name, there in zip(names, self._there, strict=True) if not there]

    def lookup(self, high: NDArray[np.uint64], low: NDArray[np.uint64], found: list[Placement | None]) -> None:
        """Fill ``found`` where this run knows (high[i], low[i]); entries already filled are left alone."""
        buckets = (high >> self._shift).astype(np.int64)
        entries = np.uint64(len(self._high))
        at = np.minimum(self._buckets[buckets], entries).astype(np.int64)
        end = np.minimum(self._buckets[buckets + 1], entries).astype(np.int64)
        width = min(int((end - at).max(initial=0)), PROBES_MAX)
        if width <= 0:
            return
        probes = at[:, None] + np.arange(width)
        inside = probes < end[:, None]
        same = self._high[np.where(inside, probes, 0)] == high[:, None]
        numbers, columns = np.nonzero(same & inside)
        hits = probes[numbers, columns]
        places = self._place[hits]
        true = self._low[hits] == low[numbers] ^ _mask(places)
        true[true] = self._there[places[true] >> np.uint64(16)]
        for number, place in zip(numbers[true].tolist(), places[true].tolist(), strict=True):
            if found[number] is None:
                found[number] = Placement(BlobHash(self._packs[place >> 16].tobytes()), place & 0xFFFF)
