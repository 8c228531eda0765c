"""How overlays are made and opened again: which files must be there, and what a crash may have left.

Keeps no state. The files' lock sees to it that an overlay is open once; what is done to it then is ``overlay``'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs.view.overlay.files import existing_files, header_content, make_files
from xbfs.view.overlay.header import FILE_BYTES, IDENTITY_BYTES_MAX, Header, decode
from xbfs.view.overlay.overlay import Overlay
from xbfs.view.overlay.recent import RecentMarks, boot_id
from xbfs.view.overlay.state import store
from xbfs_engine.core.errors import BlobNotFound, IntegrityError, OverlayMismatch, TargetExists, UsageError
from xbfs_engine.core.limits import DISK_SIZE_MAX

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs.view.base import RandomAccess
    from xbfs.view.overlay.files import StateFiles


def create_overlay(directory: Path, base: RandomAccess, *, identity: bytes) -> Overlay:
    """A new overlay over ``base`` in ``directory``, which is made if its parent is there; durable when this returns.

    ``identity`` says which disk ``base`` is: at most 432 bytes that only the caller understands. Raises TargetExists
    if there is an overlay, OverlayInUse, UsageError, StorageFull, StorageError.
    """
    files = make_files(directory)
    try:
        return begin(files, base, RecentMarks(files.recent, boot_id()), identity=identity)
    except BaseException:
        files.close()
        raise


def open_overlay(directory: Path, base: RandomAccess, *, identity: bytes) -> Overlay:
    """The overlay in ``directory``, as its last flush left it or younger; reads the whole map. If nothing but its
    process died since, it is as that left it.

    Raises BlobNotFound if there is none, OverlayInUse, OverlayMismatch if it lies over another disk, FormatTooNew,
    IntegrityError, StorageError.
    """
    files = existing_files(directory)
    try:
        return resume(files, base, RecentMarks(files.recent, boot_id()), identity=identity)
    except BaseException:
        files.close()
        raise


def read_header(directory: Path) -> Header:
    """What the overlay in ``directory`` lies over; it may be open. Raises as ``open_overlay`` otherwise."""
    header = decode(header_content(directory, FILE_BYTES))
    if header is None:
        raise BlobNotFound(f"{directory}: the overlay was never finished", hint="create it again")
    return header


def begin(files: StateFiles, base: RandomAccess, recent: RecentMarks, *, identity: bytes) -> Overlay:
    """A new overlay in empty ``files``, durable when this returns. Raises TargetExists, UsageError, StorageError."""
    if len(identity) > IDENTITY_BYTES_MAX:
        raise UsageError(f"an identity of {len(identity)} bytes: at most {IDENTITY_BYTES_MAX} fit the header")
    size = base.size_bytes
    if size > DISK_SIZE_MAX:
        raise UsageError(f"a disk of {size} bytes: at most {DISK_SIZE_MAX} can be written to")
    # A creation that was cut short has left the header blank, and nobody had the time to flush anything.
    if files.header.read_at(0, FILE_BYTES).strip(b"\0") or files.map.size():
        raise TargetExists("there is an overlay already", hint="open it, or choose another directory")
    files.data.truncate(size)
    files.data.sync()
    header = Header(identity, base_size=size, base_limit=size, size=size)
    store(files.header, header)
    overlay = Overlay(files, base, header, recent)
    overlay.settle()
    return overlay


def resume(files: StateFiles, base: RandomAccess, recent: RecentMarks, *, identity: bytes) -> Overlay:
    """The overlay in ``files`` as its last flush left it, or younger. Ends what a crash cut short.

    Raises BlobNotFound, OverlayMismatch, FormatTooNew, IntegrityError, StorageError.
    """
    header = decode(files.header.read_at(0, FILE_BYTES))
    if header is None:
        if files.map.size():
            raise IntegrityError("the overlay's header is blank", hint="bring the file back from a copy")
        raise BlobNotFound("the overlay was never finished", hint="create it again")
    if header.identity != identity or header.base_size != base.size_bytes:
        made_for = header.identity.decode(errors="replace")
        raise OverlayMismatch(f"the overlay was made for {made_for!r} of {header.base_size} bytes")
    length = files.data.size()
    if length < header.size:
        hint = "the data file was cut: bring it back from a copy, or begin a new overlay"
        raise IntegrityError(f"the overlay has {length} of {header.size} bytes", hint=hint)
    overlay = Overlay(files, base, header, recent)
    # One copy may be torn or older: the next change must not meet a good one beside a bad one.
    store(files.header, header)
    overlay.settle()
    return overlay
