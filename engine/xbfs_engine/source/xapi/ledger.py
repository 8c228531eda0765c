"""The ledger: durable notes of every object a run makes on a pool, written before the object is made.

One file a run in a directory a pool, below the node's state directory. A run holds a lock (flock) on its file for as
long as it lives, so that nobody has to guess whether it died. Whoever ends a run shortens its file to what is still
there, or removes it. Files are created, judged, shortened and removed under a lock on the directory: any number of
processes may use one. A RunLedger may be used by many tasks; its methods run in threads, one after the other.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import trio

from xbfs_engine.core.errors import BlobNotFound, StorageError
from xbfs_engine.core.limits import MIB
from xbfs_engine.source.xapi import ledger_record as lines
from xbfs_engine.source.xapi.ledger_record import Item, Keep, Kind, RunRecord
from xbfs_engine.source.xapi.markers import RUN_DIGITS, Marker, is_run
from xbfs_engine.storage.files import make_directories, remove, storage_error, write_new, write_replace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from xbfs_engine.core.runtime import RandomSource, Runtime

__all__ = ["Item", "Keep", "Kind", "Ledgers", "RunLedger", "RunState", "state_directory"]

LEDGER_SIZE_MAX: Final = 16 * MIB
"""A run of a thousand VMs with ten disks each notes some 8 MiB."""

T = TypeVar("T")

_SUFFIX: Final = ".jsonl"
_TURN_SUFFIX: Final = ".turn"
_TURN_DIGITS: Final = 32


def state_directory(environment: Mapping[str, str]) -> Path:
    """XBFS_STATE, or xbfs below XDG_STATE_HOME or ~/.local/state: what must not be lost while anything is on a pool."""
    chosen = environment.get("XBFS_STATE")
    if chosen:
        return Path(chosen).absolute()
    return Path(environment.get("XDG_STATE_HOME") or Path.home() / ".local/state", "xbfs").absolute()


class RunState(NamedTuple):
    """A run that has a ledger. ``live``: some process holds it."""

    record: RunRecord
    live: bool


class Ledgers:
    """The ledgers of one pool on this node. ``directory``: theirs alone; made when first needed."""

    def __init__(self, directory: Path, runtime: Runtime) -> None:
        self._directory = directory
        self._runtime = runtime

    @classmethod
    def of_pool(cls, pool: str, environment: Mapping[str, str], runtime: Runtime) -> Ledgers:
        """Where the ledgers of a configured pool are by default."""
        return cls(state_directory(environment) / "pools" / pool / "runs", runtime)

    @asynccontextmanager
    async def begin(self, node: str) -> AsyncIterator[RunLedger]:
        """The ledger of a new run of this process; the run lives until the context is left. Raises StorageError."""
        with trio.CancelScope(shield=True):
            ledger = await trio.to_thread.run_sync(self._begin, node)
        try:
            yield ledger
        finally:
            await self._leave(ledger)

    @asynccontextmanager
    async def claim(self, node: str) -> AsyncIterator[Mapping[str, RunLedger]]:
        """The ledgers of dead runs of ``node``, by run, held like those of live ones until left. Raises StorageError.

        For a sweep: two of them never work on the same leftovers.
        """
        with trio.CancelScope(shield=True):
            ledgers = await trio.to_thread.run_sync(self._claim, node)
        try:
            yield ledgers
        finally:
            for ledger in ledgers.values():
                await self._leave(ledger)

    def now_ns(self) -> int:
        """The time by the clock that the ledgers' times are of."""
        return self._runtime.clock.now_ns()

    @property
    def random(self) -> RandomSource:
        """Where the ids of runs come from."""
        return self._runtime.random

    async def runs(self) -> list[RunState]:
        """All runs that have a ledger; those this process began or claimed are live too. Raises StorageError."""
        return await trio.to_thread.run_sync(self._runs)

    @asynccontextmanager
    async def turn(self, vm_uuid: str) -> AsyncIterator[bool]:
        """Whether this is the only run on this node that backs up the VM, until left: two would take each other's base.

        Raises StorageError.
        """
        # The uuid comes from the pool, and may be any text.
        name = hashlib.sha256(vm_uuid.encode(errors="surrogatepass")).hexdigest()[:_TURN_DIGITS]
        held = await trio.to_thread.run_sync(self._take_turn, self._directory / (name + _TURN_SUFFIX))
        try:
            yield held is not None
        finally:
            if held is not None:
                os.close(held)

    def _take_turn(self, path: Path) -> int | None:
        make_directories(self._directory)
        # Never removed: whoever opened it just before would hold a file that nobody else can see.
        os.close(_open(path, os.O_RDWR | os.O_CREAT))
        return _hold(path)

    async def _leave(self, ledger: RunLedger) -> None:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._end, ledger)

    def _begin(self, node: str) -> RunLedger:
        run = self._runtime.random.token(RUN_DIGITS // 2).hex()
        with self._locked():
            keeps = [item.keep for path in self._files() for item in _read(path).items.values() if item.keep]
            record = RunRecord(run, node, self._runtime.clock.now_ns())
            path = self._directory / (run + _SUFFIX)
            write_new(path, [lines.encode([lines.begin(record)])])
            held = _hold(path)
            assert held is not None
            return RunLedger(path, held, record, self._runtime, max((keep.kept_ns for keep in keeps), default=0))

    def _claim(self, node: str) -> dict[str, RunLedger]:
        found: dict[str, RunLedger] = {}
        with self._locked():
            for path in self._files():
                held = _hold(path)
                if held is None:
                    continue
                record = _read(path)
                if record.node == node and record.readable:
                    found[record.run] = RunLedger(path, held, record, self._runtime, 0)
                else:
                    os.close(held)
        return found

    def _runs(self) -> list[RunState]:
        found = []
        with self._locked():
            for path in self._files():
                held = _hold(path)
                if held is not None:
                    os.close(held)
                found.append(RunState(_read(path), held is None))
        return found

    def _end(self, ledger: RunLedger) -> None:
        try:
            with self._locked():
                ledger.shorten()
        finally:
            ledger.close()

    def _files(self) -> list[Path]:
        try:
            return [path for path in sorted(self._directory.iterdir()) if path.suffix == _SUFFIX and is_run(path.stem)]
        except OSError as exc:
            raise storage_error(exc, f"read {self._directory}") from exc

    @contextmanager
    def _locked(self) -> Iterator[None]:
        make_directories(self._directory)
        descriptor = _open(self._directory / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class RunLedger:
    """The ledger of one run. Every method is durable when it returns, and raises StorageError."""

    def __init__(self, path: Path, held: int, record: RunRecord, runtime: Runtime, kept_ns: int) -> None:
        self._path = path
        self._held = held
        self._record = record
        self._runtime = runtime
        self._kept_ns = kept_ns
        self._lock = threading.Lock()
        # What a crash tore must not swallow the next line.
        self._torn = True
        self._changed = False

    @property
    def run(self) -> str:
        """The run's id."""
        return self._record.run

    @property
    def node(self) -> str:
        """The node it runs on."""
        return self._record.node

    @property
    def items(self) -> list[Item]:
        """What is, or may be, still on the pool."""
        return list(self._record.items.values())

    def item(self, number: int) -> Item:
        """The item as it is now."""
        return self._record.items[number]

    def marker(self, item: Item, *, uuid: str = "", slot: str = "") -> Marker:
        """The marker for an item's object; ``uuid``: the object's own, once it is known.

        ``slot``: whose base it is, or shall become (``keep``).
        """
        made = datetime.fromtimestamp(self._runtime.clock.now_ns() // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        slot = item.keep.slot if item.keep else slot
        return Marker(self.run, self.node, item.number, item.kind.value, item.vm_uuid, made, uuid, slot)

    async def intend(self, kind: Kind, *, vm_uuid: str = "", uuid: str = "", **about: str) -> Item:
        """Note an object before it is made; ``uuid``: where that is known already. ``about``: see ``Kind``."""

        def write() -> Item:
            item = Item(self._record.last_number + 1, kind, self._runtime.clock.now_ns(), vm_uuid, about)
            self._append(lines.intend(item), *([lines.made(item.number, uuid)] if uuid else []))
            return self._record.items[item.number]

        return await self._run(write)

    async def made(self, item: Item, uuid: str) -> Item:
        """The object was made, and has this uuid."""
        return await self._change(item, partial(lines.made, item.number, uuid))

    async def keep(self, item: Item, slot: str, *, with_data: bool = False) -> Item:
        """Before the restore point is committed: from then on this VDI is the base of ``slot`` (``markers.slot_of``).

        Until ``confirm`` it is one of two candidates, of which a sweep takes none away.
        """

        def event() -> dict[str, object]:
            # Newer than every other base, whatever became of the clock.
            self._kept_ns = max(self._runtime.clock.now_ns(), self._kept_ns + 1)
            return lines.kept(item.number, Keep(slot, self._kept_ns, confirmed=False, with_data=with_data))

        return await self._change(item, event)

    async def confirm(self, item: Item) -> Item:
        """The restore point of a kept VDI is durable: earlier bases of its slot are waste."""

        def event() -> dict[str, object]:
            keep = self._record.items[item.number].keep
            assert keep is not None
            return lines.kept(item.number, replace(keep, confirmed=True))

        return await self._change(item, event)

    async def gone(self, item: Item) -> None:
        """The object is gone, was never made, or belongs to somebody else from now on."""
        await self._run(lambda: self._append(lines.gone(item.number)))

    def shorten(self) -> None:
        """Leave only what is still there; nothing: no file. For Ledgers, under the directory's lock."""
        with self._lock:
            if not self._record.items:
                try:
                    remove(self._path)
                except BlobNotFound:
                    return
            elif self._changed:
                write_replace(self._path, [lines.compact(self._record)])

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self._held)
        self._held = -1

    async def _change(self, item: Item, event: Callable[[], dict[str, object]]) -> Item:
        def write() -> Item:
            self._append(event())
            return self._record.items[item.number]

        return await self._run(write)

    async def _run(self, write: Callable[[], T]) -> T:
        def locked() -> T:
            with self._lock:
                return write()

        return await trio.to_thread.run_sync(locked)

    def _append(self, *events: dict[str, object]) -> None:
        """Durable before it counts. A torn line, of ours or of the process before, ends at the next newline."""
        data = (b"\n" if self._torn else b"") + lines.encode(events)
        self._torn = self._changed = True
        try:
            if os.fstat(self._held).st_size + len(data) > LEDGER_SIZE_MAX:
                raise StorageError(f"{self._path} would get too long", hint="back up fewer VMs in one run")
            os.lseek(self._held, 0, os.SEEK_END)
            while data:
                data = data[os.write(self._held, data) :]
            os.fdatasync(self._held)
        except OSError as exc:
            raise storage_error(exc, f"write {self._path}") from exc
        self._torn = False
        for event in events:
            self._record.apply(event)


def _read(path: Path) -> RunRecord:
    descriptor = _open(path, os.O_RDONLY)
    with os.fdopen(descriptor, "rb") as file:
        try:
            content = file.read(LEDGER_SIZE_MAX + 1)
        except OSError as exc:
            raise storage_error(exc, f"read {path}") from exc
    if len(content) > LEDGER_SIZE_MAX:
        raise StorageError(f"{path} is no ledger: it has more than {LEDGER_SIZE_MAX} bytes", hint="move it away")
    return lines.decode(path.stem, content)


def _hold(path: Path) -> int | None:
    """The file, open and locked; None if another holds it."""
    descriptor = _open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise storage_error(exc, f"open {path}") from exc
