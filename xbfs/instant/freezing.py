"""The server's part of a commit: a session's disks as they are at one moment, shown for as long as somebody asks.

``freeze`` shows ``<live>/.frozen/<session>/<number>.raw``, the guest's disk, and ``<number>.changed``, which of its
bytes are not the restore point's; also of disks that are VHDs, unless a host has made snapshots of them. It ends with
the connection that asked for it: a command that is killed leaves no frozen disk behind. Event-loop thread only.
"""

from __future__ import annotations

import os
import struct
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from xbfs.control import wire
from xbfs.instant.session import TREE, DiskFormat
from xbfs.instant.vhd_disk import VhdDisk
from xbfs.vfs.live.frozen import NAME
from xbfs.vfs.live.stubs import stub_keys
from xbfs.view.overlay import freeze_all
from xbfs.view.synthetic import SyntheticImage
from xbfs_engine.core.errors import CommitRefused, SessionBusy, SessionNotFound
from xbfs_engine.core.limits import CHUNK_SIZE_DEFAULT
from xbfs_engine.formats.segments import Literal
from xbfs_engine.ingest.planner import chunk_runs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from xbfs.control.server import Handler
    from xbfs.instant.bases import Bases
    from xbfs.instant.served import Served
    from xbfs.instant.session import Session
    from xbfs.vfs.live.tree import LiveTree
    from xbfs.view.base import RandomAccess
    from xbfs.view.overlay import FrozenOverlay
    from xbfs_engine.core.runtime import Clock
    from xbfs_engine.formats.segments import Segment
    from xbfs_engine.source.base import Extent

    _Disk = FrozenOverlay | VhdDisk

EXTENT: Final = struct.Struct("<QQ")
"""Offset and length in bytes: the records of a ``.changed`` file, ascending, disjoint, of whole chunks of the smallest
size that a repository may have, but for the disk's end. Both ends are of one machine and release."""


class _Frozen(NamedTuple):
    """A session that is frozen; ``ending`` is held by who ends it."""

    name: str
    disks: tuple[FrozenOverlay, ...]
    ending: trio.Lock


class Freezing:
    """What is frozen of the sessions ``served``, over ``bases``. ``changing`` is held by whoever begins or ends one."""

    def __init__(
        self, tree: LiveTree, served: Mapping[str, Served], bases: Bases, changing: trio.Lock, clock: Clock
    ) -> None:
        self.handlers: dict[str, Handler] = {"freeze": self._on_freeze, "frozen": self._on_frozen}
        self._tree = tree
        self._served = served
        self._bases = bases
        self._changing = changing
        self._clock = clock
        self._frozen: dict[str, _Frozen] = {}

    async def let_go(self, name: str, *, force: bool) -> None:
        """Have a session not frozen: its disks are about to be closed. Raises SessionBusy unless ``force``."""
        frozen = self._frozen.get(name)
        if frozen is None:
            return
        if not force:
            raise SessionBusy(f"session {name} is being committed", hint="wait until the commit has ended")
        await self._thaw(frozen)

    async def _on_freeze(self, arguments: Mapping[str, object], undone: AsyncExitStack) -> object:
        """Show the disks of a session as they are now, until the connection ends; where, and when that was."""
        name = _name(arguments)
        async with self._changing:
            served = self._served.get(name)
            if served is None:
                raise SessionNotFound(f"session {name} is not served", hint="`xbfs boot list` says why")
            if name in self._frozen:
                raise SessionBusy(f"session {name} is being committed", hint="wait until that commit has ended")
            self._tree.settle()  # also ends what the kernel was given, if nobody uses it any more
            disks = await trio.to_thread.run_sync(freeze_all, list(served.overlays.values()))
            # Later than all that is in the disks.
            time_ns = self._clock.now_ns()
            frozen = self._frozen[name] = _Frozen(name, tuple(disks), trio.Lock())
            undone.push_async_callback(self._thaw, frozen)
            images = await trio.to_thread.run_sync(self._images, served, dict(zip(served.overlays, disks, strict=True)))
            self._tree.show_images(name, images)
            shown = served.shown.parent / NAME.decode() / name
            return {"directory": str(shown), "time_ns": time_ns}

    async def _on_frozen(self, arguments: Mapping[str, object], _: AsyncExitStack) -> object:
        """Whether the frozen disks of a session can still be read; raises why not."""
        name = _name(arguments)
        frozen = self._frozen.get(name)
        if frozen is None:
            raise SessionNotFound(f"session {name} is not frozen any more", hint="it was discarded meanwhile")
        for disk in frozen.disks:
            await trio.to_thread.run_sync(partial(disk.read_at, 0, 0))
        return None

    def _images(self, served: Served, frozen: Mapping[str, FrozenOverlay]) -> dict[str, RandomAccess]:
        """The files that are shown of frozen disks, by name. In a thread; raises CommitRefused, IntegrityError."""
        session = served.session
        # Now that they are frozen: snapshots that are made from here on are none of these disks'.
        _refuse_snapshots(session, served.directory / TREE)
        images: dict[str, RandomAccess] = {}
        for disk in session.disks:
            image: _Disk = frozen[disk.key]
            if disk.format is DiskFormat.VHD:
                base = self._bases.of(session)[disk.key]
                record = self._bases.point(session.point).disk(disk.number)
                assert record is not None, "it was there when the session was opened"
                image = VhdDisk(image, image.changed_extents, base, record.size_bytes)
            images[f"{disk.key}.raw"] = image
            images[f"{disk.key}.changed"] = SyntheticImage(_Content(_changed(image)), image)
        return images

    async def _thaw(self, frozen: _Frozen) -> None:
        """Once; who asks again waits for that."""
        async with frozen.ending:
            if self._frozen.get(frozen.name) is not frozen:
                return
            self._tree.hide_images(frozen.name)
            await trio.to_thread.run_sync(_close, frozen.disks)
            del self._frozen[frozen.name]


def changed_of(content: bytes) -> list[Extent]:
    """The extents in a ``.changed`` file."""
    return [(offset, length) for offset, length in EXTENT.iter_unpack(content)]


def _changed(disk: _Disk) -> bytes:
    """The content of a ``.changed`` file. May block."""
    extents = ((region.offset, region.length) for region in disk.changed_extents())
    packed = bytearray()
    for first, end in chunk_runs(extents, disk.size_bytes, CHUNK_SIZE_DEFAULT):
        start, stop = first * CHUNK_SIZE_DEFAULT, min(end * CHUNK_SIZE_DEFAULT, disk.size_bytes)
        packed += EXTENT.pack(start, stop - start)
    return bytes(packed)


class _Content(NamedTuple):
    """A layout of nothing but bytes."""

    data: bytes

    @property
    def size_bytes(self) -> int:
        """All of them."""
        return len(self.data)

    def segments(self, offset: int, length: int) -> Iterator[Segment]:
        """Those of a range, clipped at the end."""
        found = self.data[offset : offset + length]
        if found:
            yield Literal(found)


def _refuse_snapshots(session: Session, tree: Path) -> None:
    """A host that makes a snapshot renames the VHD, and puts another beside it that holds what is written since."""
    wanted = {disk.key: disk.path for disk in session.disks if disk.format is DiskFormat.VHD}
    if not wanted:
        return
    places = stub_keys(tree)
    names = [
        os.path.relpath(os.path.join(directory, file), tree)  # noqa: PTH118 - of many files
        for directory, _, files in os.walk(tree)
        for file in files
    ]
    foreign = sorted(name for name in names if name.endswith(".vhd") and name not in wanted.values())
    moved = sorted(path for key, path in wanted.items() if places.get(key) != [path])
    if moved or foreign:
        raise CommitRefused(
            f"a host has made snapshots of disks of session {session.name}: {(moved or foreign)[0]} "
            + ("is not the disk that the session began with" if moved else "lies beside them"),
            hint="delete the VM's snapshots in XenServer, wait until they have coalesced, then run again",
        )


def _close(disks: tuple[FrozenOverlay, ...]) -> None:
    """In a thread: waits for who reads."""
    with ExitStack() as all_of_them:
        for disk in disks:
            all_of_them.callback(disk.close)


def _name(arguments: Mapping[str, object]) -> str:
    name = arguments.get("name")
    if not isinstance(name, str):
        raise wire.not_understood()
    return name
