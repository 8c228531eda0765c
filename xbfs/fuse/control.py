"""The control socket of a mount: on it its owner gives keys of guests' encrypted volumes.

A mount that can have none is served all the same.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from xbfs.control import place, wire
from xbfs.control.server import ControlServer
from xbfs_engine.core.errors import MountError
from xbfs_engine.core.log import Logger
from xbfs_engine.guestfs.volumes.records import VolumeKey

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AsyncExitStack

    from xbfs.vfs.filesystem import FileSystem

_log = Logger("xbfs.mount")


async def take_keys(filesystem: FileSystem) -> None:
    """Take keys until cancelled; the mount's status says where."""

    async def unlock(arguments: Mapping[str, object], _: AsyncExitStack) -> list[str]:
        key = wire.unlock_of(arguments)
        return await filesystem.unlock(key.point, VolumeKey(key.secret, key.volume))

    server: ControlServer | None = None
    try:
        server = ControlServer(place.socket_path(place.make_directory(os.environ)), {wire.UNLOCK: unlock})
        await server.listen()
        filesystem.report.control = str(server.path)
        await server.serve()
    except (MountError, RuntimeError) as exc:  # RuntimeError: the user has no home
        _log.warning("this mount takes no keys of encrypted volumes", problem=str(exc))
    finally:
        filesystem.report.control = None
        if server is not None:
            server.close()
