"""The CBT logs of all VDIs: links between them, rotation at snapshots, and the changes between two VDIs (SM, VDI.py).

Any thread may call it; one lock guards all logs.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from ..failures import Failure
from .cbtlog import NO_UUID, CbtLog, bitmap_bytes, combine, highest_bit_first

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def backend_failure(number: int, reason: str) -> Failure:
    """An error of the storage manager as XAPI passes it on: parameters "", reason, ""."""
    return Failure(f"SR_BACKEND_FAILURE_{number}", "", reason, "")


class Tracking:
    """Logs by the uuid of their VDI; ``place`` gives the path of a log."""

    def __init__(self, place: Callable[[str], Path]) -> None:
        self._place = place
        self._lock = threading.RLock()
        self._logs: dict[str, CbtLog] = {}

    def tracked(self, uuid: str) -> bool:
        """Whether the VDI has a log."""
        with self._lock:
            return uuid in self._logs

    def log(self, uuid: str) -> CbtLog | None:
        """The log of a VDI."""
        with self._lock:
            return self._logs.get(uuid)

    def enable(self, uuid: str, size_bytes: int, *, attached: bool) -> None:
        """Begin a new chain of logs. An attached disk has a log that is inconsistent until it is detached."""
        with self._lock:
            if uuid not in self._logs:
                self._logs[uuid] = log = CbtLog.create(self._place(uuid), size_bytes)
                log.update(consistent=not attached)

    def disable(self, uuid: str) -> None:
        """Drop the log: the chain ends at its parent."""
        with self._lock:
            log = self._logs.pop(uuid, None)
            if log is not None:
                header = log.header()
                self._link(header.parent, child=NO_UUID)
                self._link(header.child, parent=NO_UUID)
                log.remove()

    def mark(self, uuid: str, offset_bytes: int, length_bytes: int) -> None:
        """A write to a VDI."""
        with self._lock:
            if log := self._logs.get(uuid):
                log.mark(offset_bytes, length_bytes)

    def rotate(self, uuid: str, snapshot: str) -> None:
        """A snapshot takes the log along by renaming it; the VDI gets an empty one whose parent it is."""
        with self._lock:
            log = self._logs.pop(uuid, None)
            if log is None:
                return
            header = log.header()
            log.rename(self._place(snapshot))
            log.update(consistent=True, child=uuid)
            self._logs[snapshot] = log
            self._link(header.parent, child=snapshot)
            self._logs[uuid] = fresh = CbtLog.create(self._place(uuid), header.size_bytes, parent=snapshot)
            fresh.update(consistent=header.consistent)

    def resize(self, uuid: str, size_bytes: int) -> None:
        """A VDI grew; nothing of the new part is marked."""
        with self._lock:
            if log := self._logs.get(uuid):
                log.resize(size_bytes)

    def remove(self, uuid: str) -> None:
        """A VDI goes: its child inherits the bits, so that the chain still tells all changes."""
        with self._lock:
            log = self._logs.pop(uuid, None)
            if log is None:
                return
            header = log.header()
            if child := self._logs.get(header.child):
                child.merge(log)
            self._link(header.child, parent=header.parent)
            self._link(header.parent, child=header.child)
            log.remove()

    def activate(self, uuid: str) -> bool:
        """A disk is attached for writing; False if its log was left inconsistent and is therefore gone now."""
        with self._lock:
            log = self._logs.get(uuid)
            if log is None:
                return True
            if not log.header().consistent:
                self.disable(uuid)
                return False
            log.update(consistent=False)
            return True

    def deactivate(self, uuid: str) -> None:
        """A disk is detached in good order."""
        with self._lock:
            if log := self._logs.get(uuid):
                log.update(consistent=True)

    def changes(self, source: str, target: str) -> bytes:
        """The bitmap of the blocks written between two VDIs, highest bit first. Raises Failure as SM does."""
        with self._lock:
            if source == target:
                raise _no_changes("Source and target VDI are same")
            log = self._logs.get(source)
            if log is None:
                raise _no_changes("Source VDI has no CBT log")
            size_bytes, merged, uuid = log.header().size_bytes, b"", source
            while uuid != target:
                uuid = log.header().child
                log = self._logs.get(uuid)
                if log is None:
                    raise _no_changes("Source and target VDI are unrelated")
                header, bitmap = log.header(), log.bitmap()
                if header.size_bytes < size_bytes or len(bitmap) != bitmap_bytes(header.size_bytes):
                    raise backend_failure(
                        459, "CBT metadata is inconsistent [opterr=Source and target VDI sizes differ]"
                    )
                size_bytes, merged = header.size_bytes, combine(bitmap, merged)
            return highest_bit_first(merged)

    def _link(self, uuid: str, *, parent: str | None = None, child: str | None = None) -> None:
        if log := self._logs.get(uuid):
            log.update(parent=parent, child=child)


def _no_changes(reason: str) -> Failure:
    return backend_failure(460, f"Failed to calculate changed blocks for given VDIs. [opterr={reason}]")
