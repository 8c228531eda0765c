"""The Storage protocol: named write-once blobs.

Calls block and are made from worker threads (ADR 0001): a batch of reads, decryption and decoding then costs one
hand-over to a thread, not one per read. Every backend guarantees:

- **Thread safety**: any thread may call any method at any time.
- **Atomic visibility**: a blob is either absent or complete; a reader never sees part of one, whatever is killed.
- **Durability**: when ``put`` returns, the blob survives a power cut.
- **Read after write**: a ``get``, ``size`` or ``list_blobs`` that starts after ``put`` returned sees the blob.
- **Write-once**: ``put`` of an existing name raises BlobExists and leaves the old bytes. Correctness never depends
  on this: names are unique or hashes of the content.
- **Errors**: only StorageError and its subclasses. Retrying is the caller's decision (``retryable``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typing_extensions import Buffer


class BlobInfo(NamedTuple):
    """A blob as listed."""

    name: str
    size_bytes: int


class Storage(Protocol):
    """Named write-once blobs; names are lower-case ASCII words separated by "/" (see ``check_name``)."""

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Write the concatenation of ``parts`` as a new blob, durably and atomically.

        Raises BlobExists, StorageFull, StorageDenied, StorageUnavailable.
        """
        ...

    def get(self, name: str) -> bytes:
        """All bytes of a blob. Raises BlobNotFound, StorageDenied, StorageUnavailable."""
        ...

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``.

        A blob that ends before ``offset + length`` raises StorageError: short reads are never returned.
        """
        ...

    def size(self, name: str) -> int:
        """Size of a blob in bytes. Raises BlobNotFound."""
        ...

    def list_blobs(self, prefix: str) -> Iterator[BlobInfo]:
        """All blobs whose name starts with ``prefix`` (which ends with "/" or is empty), in no particular order."""
        ...

    def delete(self, name: str) -> None:
        """Remove a blob. Raises BlobNotFound, StorageDenied."""
        ...

    def location(self) -> str:
        """Where this is, for people: a path or URL without secrets."""
        ...
