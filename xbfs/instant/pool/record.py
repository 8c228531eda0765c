"""What a session has on a pool: ``pool.json`` in its directory, the one owner of all that is made there.

It is durable before the first call that makes something, and says enough to find everything whatever became of the
answers: the SR has a uuid that we choose, its PBDs hang on it, and the VM has a name that no other has until its uuid
is known. So a crash between any two calls leaves nothing that `xbfs boot discard` would not find. Not a run's ledger:
a sweep of backups never takes the VM of a session. One task writes a Journal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import trio

from xbfs_engine.core.errors import FormatTooNew, IntegrityError
from xbfs_engine.storage.files import storage_error, write_replace

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from xbfs_engine.source.xapi.values import XapiValue

RECORD: Final = "pool.json"
SESSION_KEY: Final = "xbfs:session"
"""In other_config: the uuid of the session's SR. No run's marker (``xbfs_engine.source.xapi.markers``)."""

_VERSION: Final = 1
_RECORD_MAX: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Copy:
    """A disk of a halted VM on its way to another SR. ``vdi_uuid``: of the new VDI, empty until known. ``vbd``: fields
    of the VBD that is made again for it. ``complete``: it holds all, and the old VBD may be gone."""

    vdi_uuid: str = ""
    vbd: Mapping[str, XapiValue] = field(default_factory=dict)
    complete: bool = False


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """``vdis``: uuid by number of the disk. ``working_name``: of the VM until it is complete. ``vm_uuid``: empty until
    known. ``copies``: by number of the disk."""

    pool: str
    pool_uuid: str
    sr_uuid: str
    vdis: Mapping[int, str]
    working_name: str
    vm_uuid: str = ""
    copies: Mapping[int, Copy] = field(default_factory=dict)

    def to_record(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "version": _VERSION,
            "pool": self.pool,
            "pool_uuid": self.pool_uuid,
            "sr_uuid": self.sr_uuid,
            "vdis": {str(number): uuid for number, uuid in self.vdis.items()},
            "working_name": self.working_name,
            "vm_uuid": self.vm_uuid,
            "copies": {
                str(number): {"vdi_uuid": copy.vdi_uuid, "vbd": dict(copy.vbd), "complete": copy.complete}
                for number, copy in self.copies.items()
            },
        }


class Journal:
    """The record and its file in the directory of a session."""

    def __init__(self, session: Path, record: PoolRecord) -> None:
        self._path = session / RECORD
        self.record = record

    @classmethod
    def begin(cls, session: Path, record: PoolRecord) -> Journal:
        """Durably. Raises StorageError."""
        journal = cls(session, record)
        journal._write(record)
        return journal

    @classmethod
    def of(cls, session: Path) -> Journal | None:
        """That of a session; None if it has nothing on a pool. Raises StorageError, IntegrityError, FormatTooNew."""
        path = session / RECORD
        try:
            with path.open("rb") as file:
                found = json.loads(file.read(_RECORD_MAX))
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise storage_error(exc, f"read {path}") from exc
        except (ValueError, RecursionError) as exc:
            raise IntegrityError(f"{path} is not JSON", hint="bring it back from a copy") from exc
        return cls(session, record_of(found))

    async def note_vm(self, uuid: str) -> None:
        """The VM's uuid; empty: it is gone again. Raises StorageError."""
        await self._change(replace(self.record, vm_uuid=uuid))

    async def note_copy(self, number: int, copy: Copy | None) -> None:
        """A disk's copy as it is now; None: it is none any more. Raises StorageError."""
        copies = {key: value for key, value in self.record.copies.items() if key != number}
        await self._change(replace(self.record, copies=copies if copy is None else copies | {number: copy}))

    async def _change(self, record: PoolRecord) -> None:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._write, record)
        self.record = record

    def _write(self, record: PoolRecord) -> None:
        write_replace(self._path, [json.dumps(record.to_record(), indent=1).encode()])


def record_of(found: object) -> PoolRecord:
    """A record from what ``to_record`` gave. Raises FormatTooNew, IntegrityError."""
    match found:
        case {"version": int() as version} if version > _VERSION:
            raise FormatTooNew(f"{RECORD} was made by a newer release (record version {version})")
        case {
            "pool": str() as pool,
            "pool_uuid": str() as pool_uuid,
            "sr_uuid": str() as sr_uuid,
            "vdis": dict() as vdis,
            "working_name": str() as working_name,
            "vm_uuid": str() as vm_uuid,
            "copies": dict() as copies,
        } if sr_uuid and working_name and all(_is_number(key) for key in (*vdis, *copies)):
            return PoolRecord(
                pool,
                pool_uuid,
                sr_uuid,
                {int(key): str(uuid) for key, uuid in vdis.items()},
                working_name,
                vm_uuid,
                {int(key): _copy_of(copy) for key, copy in copies.items()},
            )
        case _:
            raise IntegrityError(f"{RECORD} of the session is not understood", hint="bring it back from a copy")


def _copy_of(found: object) -> Copy:
    match found:
        case {"vdi_uuid": str() as uuid, "vbd": dict() as vbd, "complete": bool() as complete}:
            return Copy(uuid, vbd, complete)
        case _:
            raise IntegrityError(f"a copy in {RECORD} of the session is not understood")


def _is_number(key: object) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 5
