"""Marks that no flush has told of yet, outside the process: who opens the overlay after a SIGKILL goes on with them.

The kernel keeps what a killed process wrote, and the guest lives on: it must find all that was acknowledged. So each
mark is written down in a file that is never synced, after the bytes it tells of and before anybody is told that they
are written. It counts until the machine goes down; what a power cut leaves of it is of another boot, and nothing.
Any thread may call anything. Methods raise StorageError.
"""

from __future__ import annotations

import struct
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from xbfs_engine.core.errors import StorageError, StorageFull

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xbfs.view.overlay.files import StateFile

RECORDS: Final = 1 << 17
"""4 MiB. When half of them wait for a flush writers flush first: after 256 MiB of scattered units."""
BOOT_BYTES: Final = 16
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_RECORD: Final = struct.Struct("<16sQQ")
"""Boot, number of the record, then first unit, count and state in one: 42, 20 and 2 bits."""
_HEAD: Final = struct.Struct("<16sQQ")
"""Boot, number of the oldest record that counts, and whether marks were left out since ``begin``."""
_RECORDS_AT: Final = 4096
_FIELDS: Final = np.dtype([("boot", "V16"), ("number", "<u8"), ("what", "<u8")])
_COUNT_MAX: Final = 1 << 20
_NEVER: Final = (1 << 64) - 1


class Mark(NamedTuple):
    """Units [first, last) came to be in ``state``."""

    first: int
    last: int
    state: int


def boot_id() -> bytes:
    """What tells this run of the kernel from all others: proc(5), random(4). Raises StorageError."""
    try:
        return bytes.fromhex(_BOOT_ID.read_text().strip().replace("-", ""))
    except (OSError, ValueError) as exc:
        raise StorageError(f"{_BOOT_ID} can not be read: {exc}", hint="is /proc mounted?") from exc


class RecentMarks:
    """A ring of ``records`` in ``file``; ``boot`` is this run of the machine's.

    Until ``begin`` it only tells what another process left.
    """

    def __init__(self, file: StateFile, boot: bytes, *, records: int = RECORDS) -> None:
        assert len(boot) == BOOT_BYTES
        self._file = file
        self._boot = boot
        self._records = records
        self._lock = Lock()
        self._oldest = self._next = 1
        self._is_off = True
        self._is_partial = False

    @property
    def is_crowded(self) -> bool:
        """Whether there should be a flush before more are added."""
        return self._next - self._oldest >= self._records // 2

    @property
    def position(self) -> int:
        """Which record comes next."""
        return self._next

    @property
    def tells_all(self) -> bool:
        """Whether ``left`` and the map together are all that the last process knew."""
        head = self._head()
        return head is not None and head != (_NEVER, False) and not head[1]

    def left(self) -> list[Mark]:
        """What a process that was killed had not flushed, in order; nothing after a boot or a clean end."""
        head = self._head()
        if head is None:
            return []
        oldest = head[0]
        found = self._found()
        # Numbers, not places: of two that were added at once the later one may be there alone.
        found = found[(found["number"] >= oldest) & (found["number"] - oldest < self._records)]
        return [_unpacked(int(what)) for what in found[np.argsort(found["number"])]["what"]]

    def begin(self) -> None:
        """All that was left is in the map, durably: begin anew."""
        try:
            self._file.reserve(0, _RECORDS_AT + self._records * _RECORD.size)
        except StorageFull:
            # A guest that is told so a little early is better off than one whose disk can not be opened.
            self._file.truncate(0)
        numbers = self._found()["number"]
        self._next = int(numbers.max()) + 1 if numbers.size else 1
        self._is_off = self._is_partial = False
        try:
            self.forget(self._next)
        except StorageFull:
            self._is_off = True  # without a head nothing counts

    def add(self, first: int, last: int, state: int) -> None:
        """Units [first, last) are in ``state`` from now on; called after it was marked. What can not be written down is
        as volatile as without this file, and the head says that something is missing."""
        assert 0 < last - first <= _COUNT_MAX
        with self._lock:
            number = self._next
            # No room: a flush is under way, or soon to come.
            if self._is_off or number - self._oldest >= self._records:
                self._miss()
                return
            self._next = number + 1
        what = first << 22 | (last - first - 1) << 2 | state
        place = _RECORDS_AT + number % self._records * _RECORD.size
        try:
            self._file.write_at(place, [_RECORD.pack(self._boot, number, what)])
        except StorageError:
            # Not the writer's: the mark is made, so a second try of his would not come here again.
            with self._lock:
                self._miss()

    def forget(self, position: int) -> None:
        """What came before ``position`` is in the map, durably."""
        with self._lock:
            self._oldest = max(self._oldest, position)
            self._tell()

    def void(self) -> None:
        """Nobody knows what became of the bytes behind the marks: tell nothing of them, from now on."""
        with self._lock:
            self._is_off = True
            self._oldest = _NEVER
            self._file.write_at(0, [_HEAD.pack(self._boot, _NEVER, False)])

    def _miss(self) -> None:
        """A mark is not written down, for who has the lock."""
        self._is_partial = True
        self._tell()

    def _tell(self) -> None:
        """Write the head, for who has the lock."""
        if not self._is_off:
            self._file.write_at(0, [_HEAD.pack(self._boot, self._oldest, self._is_partial)])

    def _head(self) -> tuple[int, bool] | None:
        """The oldest record that counts, and whether some are missing; None if no process of this boot wrote any."""
        content = self._file.read_at(0, _HEAD.size)
        if len(content) < _HEAD.size:
            return None
        boot, oldest, is_partial = _HEAD.unpack(content)
        return (oldest, bool(is_partial)) if boot == self._boot else None

    def _found(self) -> NDArray[np.void]:
        """All records of this boot."""
        content = self._file.read_at(_RECORDS_AT, self._records * _RECORD.size)
        found: NDArray[np.void] = np.frombuffer(content, _FIELDS, count=len(content) // _RECORD.size)
        ours: NDArray[np.void] = found[found["boot"] == np.void(self._boot)]
        return ours


def _unpacked(what: int) -> Mark:
    first = what >> 22
    return Mark(first, first + (what >> 2) % _COUNT_MAX + 1, what & 3)
