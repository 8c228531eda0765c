"""Writes files of a guest as a tar archive: to a stream, or to a file that appears when it is complete.

A stream can not take back what was written: if a file turns out to be unreadable in its midst, the stream ends there,
without the mark of its end, so that whoever reads it knows. One thread at a time.
"""

from __future__ import annotations

import os
import tarfile
from typing import TYPE_CHECKING, Final, Protocol

from xbfs_engine.core.errors import StorageFull, TargetUnwritable
from xbfs_engine.guestfs.base import Kind
from xbfs_engine.restore.files import tar_headers
from xbfs_engine.restore.files.records import Made, Place
from xbfs_engine.storage.files import storage_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.core.errors import XbfsError
    from xbfs_engine.guestfs.base import FileExtent
    from xbfs_engine.restore.files.records import Account, Meta, Writing
    from xbfs_engine.storage.files import AtomicOutput

_RECORD: Final = 20 * tar_headers.BLOCK
"""Archives end with a whole record, of the size that tar(1) takes by default."""
_GATHERED_BYTES: Final = 256 << 10
_NOWHERE: Final = (0, 0)


class Output(Protocol):
    """Where an archive goes."""

    def write(self, data: bytes | bytearray) -> None:
        """The next bytes, all of them."""
        ...

    def rewind(self, position: int) -> bool:
        """Forget all behind ``position``; False if that can not be."""
        ...

    def finish(self) -> None:
        """It is complete."""
        ...


class TarTarget:
    """``owner``: user and group of files that have none; ``with_owner``: the others keep theirs."""

    fatal: tuple[type[XbfsError], ...] = (StorageFull, TargetUnwritable)
    wants_extents = True

    def __init__(self, output: Output, account: Account, *, owner: tuple[int, int], with_owner: bool) -> None:
        self.account = account
        self.top = Place()
        self._output = output
        self._owner = owner
        self._with_owner = with_owner
        self._gathered = bytearray()
        self._written = 0

    @property
    def position(self) -> int:
        """Bytes of the archive so far."""
        return self._written + len(self._gathered)

    def enter(self, place: Place) -> None:
        """A directory."""
        assert place.meta is not None
        self.append(tar_headers.encoded(self._member(place.path, place.meta)))

    def leave(self, place: Place) -> None:
        """Nothing is to be said of a directory's end."""

    def create(self, above: Place, name: bytes, meta: Meta, extents: Sequence[FileExtent] | None) -> Writing:
        """Begin a file."""
        return _Member(self, above.of(name), self._member(above.of(name), meta), extents)

    def link(self, above: Place, name: bytes, meta: Meta, first: Made) -> None:
        """One more name."""
        info = self._member(above.of(name), meta)
        info.type, info.size = tarfile.LNKTYPE, 0
        info.linkname = first.path.decode("utf-8", "surrogateescape")
        self.append(tar_headers.encoded(info))

    def node(self, above: Place, name: bytes, meta: Meta, target: bytes) -> Made | None:
        """A symlink, FIFO or device."""
        if meta.kind is Kind.UNKNOWN or max(meta.device) > tar_headers.DEVICE_MAX:
            self.account.lose("files of a kind or number that an archive can not hold", meta.path)
            return None
        info = self._member(above.of(name), meta)
        info.linkname = target.decode("utf-8", "surrogateescape")
        self.append(tar_headers.encoded(info))
        return Made(above.of(name), _NOWHERE)

    def finish(self) -> None:
        """The mark of the end: two empty blocks."""
        self.append(bytes(2 * tar_headers.BLOCK))
        self.append(bytes(-self.position % _RECORD))
        self._flush()
        self._output.finish()

    def append(self, data: bytes) -> None:
        """The next bytes of the archive."""
        self._gathered += data
        if len(self._gathered) >= _GATHERED_BYTES:
            self._flush()

    def take_back(self, position: int) -> bool:
        """Forget what was written behind ``position``, if that can be."""
        if position >= self._written:
            del self._gathered[position - self._written :]
            return True
        if not self._output.rewind(position):
            return False
        self._gathered.clear()
        self._written = position
        return True

    def _member(self, path: bytes, meta: Meta) -> tarfile.TarInfo:
        owner = meta.owner if self._with_owner and meta.owner is not None else self._owner
        return tar_headers.member(path, meta, owner, self.account)

    def _flush(self) -> None:
        data, self._gathered = self._gathered, bytearray()
        self._output.write(data)
        self._written += len(data)


class _Member:
    """A file in the archive."""

    def __init__(
        self, target: TarTarget, path: bytes, info: tarfile.TarInfo, extents: Sequence[FileExtent] | None
    ) -> None:
        self._target = target
        self._path = path
        self._start = target.position
        self._size = info.size
        self._end = 0
        self._is_sparse = extents is not None and tar_headers.can_be_sparse(extents)
        described = tar_headers.sparse(info, extents) if extents is not None and self._is_sparse else b""
        target.append(tar_headers.encoded(info))
        target.append(described)

    def write(self, offset: int, data: bytes) -> None:
        """The next piece."""
        self._fill(offset)
        self._target.append(data)
        self._end = offset + len(data)

    def commit(self) -> Made:
        """Fill its last block."""
        self._fill(self._size)
        self._target.append(bytes(-self._target.position % tar_headers.BLOCK))
        return Made(self._path, _NOWHERE)

    def _fill(self, offset: int) -> None:
        """Zeros up to there, unless the header has told of them."""
        while not self._is_sparse and self._end < offset:
            length = min(offset - self._end, _GATHERED_BYTES)
            self._target.append(bytes(length))
            self._end += length

    def abandon(self) -> None:
        """Take it back. Raises TargetUnwritable if that can not be: then the archive ends here."""
        if not self._target.take_back(self._start):
            raise TargetUnwritable(
                f"the archive ends within {os.fsdecode(self._path)!r}, which can not be read to its end",
                hint="write the archive to a file: that leaves out only what can not be read",
            )


class StreamOutput:
    """An open descriptor: a pipe, or a file at its position."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, data: bytes | bytearray) -> None:
        """Raises TargetUnwritable (also when the reader has gone), StorageFull."""
        with memoryview(data) as view:
            written = 0
            while written < len(view):
                written += self._write(view[written:])

    def _write(self, view: memoryview) -> int:
        try:
            return os.write(self._fd, view)
        except BrokenPipeError as exc:
            raise TargetUnwritable("the program that reads the archive has gone", hint="see why it ended") from exc
        except OSError as exc:
            error = storage_error(exc, "write the archive")
            kind = StorageFull if isinstance(error, StorageFull) else TargetUnwritable
            raise kind(error.message, hint="free space there, or choose another place") from exc

    def rewind(self, position: int) -> bool:
        """What was written is gone."""
        return False

    def finish(self) -> None:
        """Whoever opened the descriptor closes it."""


class FileOutput:
    """A file under a temporary name, which gets its own at the end."""

    def __init__(self, output: AtomicOutput) -> None:
        self._output = output
        self._position = 0

    def write(self, data: bytes | bytearray) -> None:
        """Raises TargetUnwritable, StorageFull."""
        self._output.write_at(self._position, data)
        self._position += len(data)

    def rewind(self, position: int) -> bool:
        """Cut it."""
        self._output.set_size(position)
        self._position = position
        return True

    def finish(self) -> None:
        """Make it durable and visible. Raises TargetExists, TargetUnwritable, StorageFull."""
        self._output.commit()
