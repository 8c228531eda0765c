"""What a worker does: it takes the disks and keys it is told of, gives up its rights, and answers one request after
another until the socket ends. Runs in the worker only, in one thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from xbfs_engine.core.errors import GuestDamaged, GuestError, XbfsError
from xbfs_engine.guestfs.base import NodeId
from xbfs_engine.guestfs.reading import GuestReading
from xbfs_engine.guestfs.volumes import Disk, VolumeKey
from xbfs_engine.guestfs.worker.blocks import BlockCache, RemoteSource, StorageFailed
from xbfs_engine.guestfs.worker.codes import (
    code_error,
    code_info,
    code_link,
    code_listed,
    code_page,
    code_stat,
    code_tree,
    code_volumes,
    code_xattrs,
)
from xbfs_engine.guestfs.worker.confine import confine
from xbfs_engine.guestfs.worker.forms import CONTENT, DONE, REFUSED, STORAGE_FAILED
from xbfs_engine.guestfs.worker.frames import Closed, pack, receive

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

_ANSWERS: Final[dict[str, Callable[[GuestReading, str, NodeId, int, bytes], object]]] = {
    "volumes": lambda guest, volume, node, number, name: code_volumes(guest.volumes()),
    "tree": lambda guest, volume, node, number, name: code_tree(guest.tree()),
    "info": lambda guest, volume, node, number, name: code_info(guest.info(volume)),
    "root": lambda guest, volume, node, number, name: guest.root(volume),
    "lookup": lambda guest, volume, node, number, name: code_listed(guest.lookup(volume, node, name)),
    "list": lambda guest, volume, node, number, name: code_page(guest.list(volume, node, number)),
    "stat": lambda guest, volume, node, number, name: code_stat(guest.stat(volume, node)),
    "extents": lambda guest, volume, node, number, name: guest.extents(volume, node, number),
    "readlink": lambda guest, volume, node, number, name: code_link(guest.readlink(volume, node)),
    "xattrs": lambda guest, volume, node, number, name: code_xattrs(guest.xattrs(volume, node)),
}

_SENSELESS: Final = "the reader can not make sense of it: "
_NO_MEMORY: Final = (REFUSED, code_error(GuestDamaged(_SENSELESS + MemoryError.__name__)))
"""Made before memory runs out."""


def serve(control: socket.socket, blocks: socket.socket) -> None:
    """Answer requests until the other side is gone."""
    disks, keys, memory_bytes = cast("tuple[list[tuple[str, int]], list[tuple[bytes, str]], int]", receive(control))
    # Argon2, by which LUKS2 makes keys of passphrases, is computed in as many threads as its header says.
    confinement = confine(memory_bytes, with_threads=bool(keys))
    control.sendall(pack((confinement.in_force, confinement.missing)))
    cache = BlockCache(blocks)
    guest = GuestReading(
        [Disk(name, RemoteSource(cache, number, size)) for number, (name, size) in enumerate(disks)],
        [VolumeKey(secret, volume) for secret, volume in keys],
    )
    while True:
        try:
            request = receive(control)
        except Closed:
            return
        for part in _answer(guest, cast("tuple[str, str, bytes, int, int, bytes]", request)):
            control.sendall(part)


def _answer(guest: GuestReading, request: tuple[str, str, bytes, int, int, bytes]) -> tuple[bytes, ...]:
    """A reply to any request; what a reader trips over unforeseen is damage of what it read."""
    kind, volume, node, number, length, name = request
    try:
        if kind == "read":
            content = guest.read(volume, NodeId(node), number, length)
            return pack((CONTENT, len(content))), content
        return (pack((DONE, _ANSWERS[kind](guest, volume, NodeId(node), number, name))),)
    except StorageFailed as error:
        reply: tuple[int, object] = (STORAGE_FAILED, error.number)
    except GuestError as error:
        reply = (REFUSED, code_error(error))
    except XbfsError as error:
        reply = (REFUSED, code_error(GuestDamaged(error.message, hint=error.hint)))
    except MemoryError:
        reply = _NO_MEMORY
    except Exception as error:  # noqa: BLE001 - whatever it is, the next request may well be answered
        reply = (REFUSED, code_error(GuestDamaged(_SENSELESS + _named(error))))
    # Out here nothing is held any more that the failed reader had made.
    return (pack(reply),)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
