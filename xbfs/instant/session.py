"""The record of an instant recovery, and where its parts lie. Pure.

A session is a directory of its own: ``session.json`` (this record), ``overlays/<number>`` (what was written, one
overlay a disk) and ``tree`` (the names that the live mount shows; see ``xbfs.vfs.live``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.errors import FormatTooNew, IntegrityError
from xbfs_engine.core.ids import PointId

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

RECORD: Final = "session.json"
OVERLAYS: Final = "overlays"
"""A session's directory of overlays."""
TREE: Final = "tree"
_VERSION: Final = 1


class Export(StrEnum):
    """How a hypervisor gets at the disks: files of the live mount, NBD, or an NFS share."""

    FILE = "file"
    NBD = "nbd"
    NFS = "nfs"


class DiskFormat(StrEnum):
    """What the bytes of a live disk are: the guest's disk itself, or a dynamic VHD of it (what an SR wants)."""

    RAW = "raw"
    VHD = "vhd"


_EXPORTS: Final = frozenset(Export)
_FORMATS: Final = frozenset(DiskFormat)


@dataclass(frozen=True, slots=True)
class SessionDisk:
    """One disk. ``number`` is its number in the restore point; ``path`` its name below the session's directory in the
    live mount when the session begins (``0.raw``, or ``<SR uuid>/<VDI uuid>.vhd``): the host may rename it later."""

    number: int
    format: DiskFormat
    path: str

    @property
    def key(self) -> str:
        """The name of the disk's overlay within the session; never changes."""
        return str(self.number)

    def identity(self, repository_id: str, point: PointId) -> bytes:
        """What the overlay's header says it lies over."""
        return f"{repository_id} {point} {self.number} {self.format}".encode()


@dataclass(frozen=True, slots=True)
class Session:
    """One instant recovery. ``clients``: addresses or networks that may reach an export (NFS); none is this machine
    alone. ``hydrate_bytes_s``: how fast the restore point is copied to local files in the background; 0 is as fast
    as can be, None not at all. ``passthrough``: what was copied is given to the kernel, where it allows that."""

    name: str
    point: PointId
    vm_name: str
    created_ns: int
    export: Export
    disks: tuple[SessionDisk, ...]
    clients: tuple[str, ...] = ()
    hydrate_bytes_s: int | None = None
    passthrough: bool = False

    def to_record(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "version": _VERSION,
            "name": self.name,
            "point": self.point,
            "vm_name": self.vm_name,
            "created_ns": self.created_ns,
            "export": self.export.value,
            "disks": [{"number": disk.number, "format": disk.format.value, "path": disk.path} for disk in self.disks],
            "clients": list(self.clients),
            "hydrate_bytes_s": self.hydrate_bytes_s,
            "passthrough": self.passthrough,
        }


def session_of(record: object) -> Session:
    """A session from what ``to_record`` gave. Raises FormatTooNew, IntegrityError."""
    match record:
        case {"version": int() as version} if version > _VERSION:
            raise FormatTooNew(f"the session was made by a newer release (record version {version})")
        case {
            "name": str() as name,
            "point": str() as point,
            "vm_name": str() as vm_name,
            "created_ns": int() as created_ns,
            "export": str() as export,
            "disks": list() as disks,
            "clients": list() as clients,
            "hydrate_bytes_s": int() | None as hydrate,
            **rest,
        } if export in _EXPORTS and all(isinstance(client, str) for client in clients):
            found = tuple(_disk_of(disk) for disk in disks)
            passes = rest.get("passthrough") is True  # older records do not have it
            return Session(
                name, PointId(point), vm_name, created_ns, Export(export), found, tuple(clients), hydrate, passes
            )
        case _:
            raise IntegrityError("the session's record is not understood", hint=f"see {RECORD} in its directory")


def overlay_directory(session: Path, disk: SessionDisk) -> Path:
    """Where the overlay of a disk lies in the session's directory."""
    return session / OVERLAYS / disk.key


def _disk_of(record: Mapping[str, object]) -> SessionDisk:
    match record:
        case {"number": int() as number, "format": str() as kind, "path": str() as path} if kind in _FORMATS:
            return SessionDisk(number, DiskFormat(kind), path)
        case _:
            raise IntegrityError("a disk in the session's record is not understood")
