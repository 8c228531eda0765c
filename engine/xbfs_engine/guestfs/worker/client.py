"""Guests read in sandboxed workers: the way in.

`GuestWorkers` owns the processes, one for each guest in use; `SandboxedGuest` is one restore point's guest, which a
worker serves as long as it behaves. It owns what is known of that guest here (volumes, roots, and which requests have
ended workers). Any thread may call either.

A request that ends its worker, by a crash, by no answer in time, or by an answer that breaks the rules, is tried once
more in a new one. Then it fails, and the same request fails at once from then on.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Final, Self, TypeVar

from xbfs_engine.core.errors import GuestReaderFailed
from xbfs_engine.core.log import Logger
from xbfs_engine.guestfs.base import NAME_BYTES_MAX, READ_BYTES_MAX
from xbfs_engine.guestfs.worker import replies
from xbfs_engine.guestfs.worker.launcher import ZygoteLauncher
from xbfs_engine.guestfs.worker.limits import Limits
from xbfs_engine.guestfs.worker.pool import WorkerPool
from xbfs_engine.guestfs.worker.process import STARTING, Request, WorkerLost, WorkerProcess
from xbfs_engine.guestfs.worker.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from xbfs_engine.core.runtime import Clock
    from xbfs_engine.guestfs.base import NodeId, NodeStat, VolumeInfo, Xattr
    from xbfs_engine.guestfs.guest import ExtentPage, GuestTree, Listed, Page, VolumeRows
    from xbfs_engine.guestfs.volumes import Disk, VolumeKey
    from xbfs_engine.guestfs.worker.confine import Confinement
    from xbfs_engine.guestfs.worker.launcher import Launcher

_log = Logger("xbfs.guestfs.worker")

_T = TypeVar("_T")

_REFUSED_MAX: Final = 1024
"""Requests that are remembered for having ended workers."""

_SEARCH: Final = ""
"""No volume has an empty name: it stands for the search for volumes."""


class GuestWorkers:
    """All workers of this process."""

    def __init__(
        self,
        clock: Clock,
        *,
        workers_max: int = 4,
        idle_s: float = 300.0,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        launcher: Launcher | None = None,
    ) -> None:
        self._clock = clock
        self._limits = limits
        self._launcher = launcher or ZygoteLauncher(limits.start_s)
        self._pool = WorkerPool(clock, workers_max, idle_s, limits.waiting_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, name: str, disks: Sequence[Disk], keys: Sequence[VolumeKey] = ()) -> SandboxedGuest:
        """The guest on ``disks``, all those of one restore point; ``name`` is for messages. Starts nothing yet.

        ``source.read_at`` of a disk is called by one thread at a time, never the caller's; it may block, and raise
        XbfsError, which the request that needed it raises.
        """
        return SandboxedGuest(name, disks, keys, self._clock, self._limits, self._launcher, self._pool)

    def close(self) -> None:
        """End all workers; requests fail from here on."""
        self._pool.close()
        self._launcher.close()

    @property
    def live(self) -> int:
        """Worker processes there are now."""
        return self._pool.live


class SandboxedGuest:
    """A Guest (guestfs.guest) whose readers run in a worker. Every method may also raise GuestReaderFailed."""

    def __init__(
        self, name: str, disks: Sequence[Disk], keys: Sequence[VolumeKey], clock: Clock, limits: Limits,
        launcher: Launcher, pool: WorkerPool,
    ) -> None:  # fmt: skip
        self._name = name
        self._disks = disks
        self._clock = clock
        self._limits = limits
        self._launcher = launcher
        self._pool = pool
        self._one_at_a_time = Lock()
        self._turns = Turns()
        self._is_closed = False
        self._confinement: Confinement | None = None
        # What follows is used in turns only.
        self._keys = tuple(keys)
        self._volumes: VolumeRows | None = None
        self._tree: GuestTree | None = None
        self._infos: dict[str, VolumeInfo] = {}
        self._roots: dict[str, NodeId] = {}
        self._refused: OrderedDict[tuple[str, str, bytes], str] = OrderedDict()
        self._ends: Counter[str] = Counter()

    @property
    def confinement(self) -> Confinement | None:
        """What the sandbox of the last worker is made of; None before the first one."""
        return self._confinement

    def give_keys(self, keys: Sequence[VolumeKey]) -> None:
        """Replace the keys, and forget what was opened. Waits for the requests before it."""
        with self._turn():
            self._pool.end(self)
            self._keys = tuple(keys)
            self._volumes = None
            self._tree = None
            self._infos.clear()
            self._roots.clear()
            self._refused.clear()
            self._ends.clear()

    def close(self) -> None:
        """End its worker, whatever it does; requests fail from here on."""
        self._is_closed = True
        self._pool.end(self)

    def volumes(self) -> VolumeRows:
        """What lies on the disks."""
        with self._turn():
            return self._find_volumes()

    def tree(self) -> GuestTree:
        """How the guest puts it together."""
        with self._turn():
            if self._tree is None:
                names = {row.name for row in self._find_volumes().rows}
                decode = partial(replies.tree, names=names)
                self._tree = self._ask(Request("tree", decode, self._limits.open_s))
            return self._tree

    def info(self, volume: str) -> VolumeInfo:
        """What a filesystem says about itself."""
        with self._turn():
            if volume not in self._infos:
                self._infos[volume] = self._ask(self._opening(volume))
            return self._infos[volume]

    def root(self, volume: str) -> NodeId:
        """The topmost directory of a filesystem."""
        with self._turn():
            if volume not in self._roots:
                self._roots[volume] = self._ask(Request("root", replies.node_id, self._limits.metadata_s, volume))
            return self._roots[volume]

    def lookup(self, volume: str, node: NodeId, name: bytes) -> Listed | None:
        """The entry of that exact name, or None."""
        if len(name) > NAME_BYTES_MAX:
            return None
        decode = partial(replies.found, name=name)
        return self._metadata("lookup", decode, volume, node, name=name)

    def list(self, volume: str, node: NodeId, cookie: int = 0) -> Page:
        """Entries from the start or after ``cookie``."""
        return self._metadata("list", partial(replies.page, cookie=cookie), volume, node, number=cookie)

    def stat(self, volume: str, node: NodeId) -> NodeStat:
        """Metadata."""
        return self._metadata("stat", replies.stat, volume, node)

    def read(self, volume: str, node: NodeId, offset: int, length: int) -> bytes:
        """Content of a file."""
        assert offset >= 0
        assert 0 <= length <= READ_BYTES_MAX
        decode = partial(replies.content, length=length)
        with self._turn():
            return self._ask(Request("read", decode, self._limits.read_s, volume, node, number=offset, length=length))

    def extents(self, volume: str, node: NodeId, offset: int = 0) -> ExtentPage:
        """Data and holes of a file."""
        return self._metadata("extents", partial(replies.extents, offset=offset), volume, node, number=offset)

    def readlink(self, volume: str, node: NodeId) -> bytes:
        """The target exactly as stored."""
        return self._metadata("readlink", replies.link, volume, node)

    def xattrs(self, volume: str, node: NodeId) -> Sequence[Xattr]:
        """All extended attributes."""
        return self._metadata("xattrs", replies.xattrs, volume, node)

    def _metadata(
        self,
        kind: str,
        decode: Callable[[object], _T],
        volume: str,
        node: NodeId,
        *,
        number: int = 0,
        name: bytes = b"",
    ) -> _T:
        request = Request(kind, decode, self._limits.metadata_s, volume, node, number=number, name=name)
        with self._turn():
            return self._ask(request)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._turns.take(self._limits.waiting_s):
            raise GuestReaderFailed(f"the reader of {self._name} is busy: waited for {self._limits.waiting_s:g} s")
        try:
            yield
        finally:
            self._turns.give()
            if self._is_closed:
                self._pool.end(self)

    def _find_volumes(self) -> VolumeRows:
        if self._volumes is None:
            self._volumes = self._ask(self._search())
        return self._volumes

    def _ask(self, request: Request[_T]) -> _T:
        """The answer of a worker, of a new one if the first one is lost."""
        self._refuse(request)
        lost = None
        for _ in range(2):
            if self._is_closed:
                raise GuestReaderFailed(f"the reader of {self._name} was closed")
            try:
                with self._pool.lend(self, self._start) as process:
                    return self._ask_worker(process, request)
            except WorkerLost as error:
                lost = error
                volume, kind, node = error.key
                _log.warning(
                    "guest_worker_lost",
                    guest=self._name,
                    volume=volume,
                    during=kind,
                    node=node.hex(),
                    reason=str(error),
                )
                self._ends[volume] += 1
        assert lost is not None
        if self._is_closed:
            raise GuestReaderFailed(f"the reader of {self._name} was closed") from lost
        if lost.key != STARTING:
            self._refused[lost.key] = str(lost)
            if len(self._refused) > _REFUSED_MAX:
                self._refused.popitem(last=False)
        raise GuestReaderFailed(f"the reader of {self._of(lost.key[0])} was ended twice: {lost}") from lost

    def _ask_worker(self, process: WorkerProcess, request: Request[_T]) -> _T:
        """The answer; a new worker first searches for the volumes and opens this one, with a deadline of its own."""
        if request.kind != "volumes" and _SEARCH not in process.opened:
            process.ask(self._search())
            process.opened.add(_SEARCH)
        if request.volume not in process.opened and request.kind not in ("volumes", "tree", "info"):
            process.ask(self._opening(request.volume))
        answer = process.ask(request)
        process.opened.add(request.volume)
        return answer

    def _search(self) -> Request[VolumeRows]:
        limit_s = self._limits.unlock_s if self._keys else self._limits.open_s
        return Request("volumes", replies.volumes, limit_s)

    def _opening(self, volume: str) -> Request[VolumeInfo]:
        return Request("info", replies.info, self._limits.open_s, volume)

    def _refuse(self, request: Request[_T]) -> None:
        """Fail at once if the request, or what comes before it, is known to end workers."""
        for key in (self._search().key, self._opening(request.volume).key, request.key):
            reason = self._refused.get(key)
            if reason is not None:
                raise GuestReaderFailed(f"the reader of {self._of(key[0])} was ended twice by it: {reason}")
        if self._ends[request.volume] > self._limits.ends_max:
            raise GuestReaderFailed(f"the reader of {self._of(request.volume)} was ended too often")

    def _of(self, volume: str) -> str:
        return f"volume {volume} of {self._name}" if volume else self._name

    def _start(self) -> WorkerProcess:
        process = WorkerProcess(
            self._launcher.launch(), self._clock, self._limits, self._disks, self._keys, self._one_at_a_time,
            self._pool.notice,
        )  # fmt: skip
        self._confinement = process.confinement
        return process
