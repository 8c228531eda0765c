"""What index blobs say: which packs they list and the ids these hold; and where else a chunk may be.

An IndexLists is filled by ``packs`` and then read, by one thread. Index blobs are decoded one at a time and at most
DECODED_MAX are kept.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from xbfs_engine.core.errors import BlobNotFound, FormatTooNew, IntegrityError, StorageError
from xbfs_engine.maintain.report import Kind
from xbfs_engine.store.index import ChunkIndex
from xbfs_engine.store.index_blob import PREFIX, get_index

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xbfs_engine.core.ids import BlobHash, Placement
    from xbfs_engine.maintain.findings import Findings
    from xbfs_engine.store.packer import SealedPack
    from xbfs_engine.store.repository import Repository

DECODED_MAX: Final = 4
"""Decoded index blobs that are kept: some 4 MiB each, never more than 64."""


class IndexLists:
    """The index blobs ``names`` of a repository. A context: leaving it removes temporary files."""

    def __init__(self, repository: Repository, names: Sequence[BlobHash], findings: Findings) -> None:
        self._repository = repository
        self._names = names
        self._findings = findings
        self._good: list[int] = []
        self._decoded: OrderedDict[int, dict[BlobHash, SealedPack]] = OrderedDict()
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._homes: ChunkIndex | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    def packs(self) -> Iterator[tuple[int, SealedPack]]:
        """Every pack of every index blob with that blob's number; damaged index blobs go to the findings."""
        for number, name in enumerate(self._names):
            try:
                packs = get_index(self._repository.storage, self._repository.keys, name)
            except BlobNotFound:
                continue  # removed since it was listed
            except (IntegrityError, FormatTooNew, StorageError) as exc:
                self._findings.damage(Kind.INDEX, PREFIX + name.hex(), "can not be read", exc.message)
                continue
            self._good.append(number)
            for pack in packs:
                yield number, pack

    def ids(self, number: int, pack: BlobHash) -> bytes:
        """The ids that index blob ``number``, which was good, says ``pack`` holds, by ordinal."""
        decoded = self._decoded.get(number)
        if decoded is None:
            packs = get_index(self._repository.storage, self._repository.keys, self._names[number])
            decoded = self._decoded[number] = {listed.pack: listed for listed in packs}
            if len(self._decoded) > DECODED_MAX:
                self._decoded.popitem(last=False)
        return decoded[pack].ids

    def lookup(self, ids: Sequence[bytes]) -> list[Placement | None]:
        """Where chunks are by the index. The first call sorts all good index blobs into a temporary directory.

        That takes 24 bytes of disk a chunk; it happens only where some reference does not fit.
        """
        if self._homes is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="xbfs-maintain-")
            storage, keys = self._repository.storage, self._repository.keys
            self._homes = ChunkIndex(storage, keys, Path(self._temporary.name))
            for number in self._good:
                self._homes.add(self._names[number], get_index(storage, keys, self._names[number]))
        return self._homes.lookup(ids)

    def locate(self, chunk_id: bytes) -> Placement | None:
        """One place: a Locator for readers."""
        return self.lookup([chunk_id])[0]
