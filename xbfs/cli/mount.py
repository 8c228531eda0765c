"""mount and umount."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from xbfs.cli.context import cache_directory, catalog_of, index_of, repository_of, storage_of
from xbfs.cli.volume_keys import given_keys
from xbfs.fuse import mountpoint
from xbfs_engine.core.errors import NotMounted

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.output import Output

LOG_NAME = "mount.log"


def mount(arguments: argparse.Namespace, output: Output) -> None:
    """Mount; in the foreground until the mount is gone."""
    directory = Path(arguments.directory)
    # Whatever is wrong here is said before anybody types a passphrase.
    mountpoint.check_installed()
    path = mountpoint.prepare(directory, storage_of(arguments).location())
    from functools import partial

    from xbfs.fuse.mount import DataPlaneKind, MountOptions, MountServer
    from xbfs.instant.client import places
    from xbfs.vfs.filesystem import ViewOptions
    from xbfs.vfs.guests.attributes import Ownership
    from xbfs.vfs.guests.views import GuestOptions, LinkTargets

    repository = repository_of(arguments)
    catalog, index = catalog_of(repository, output), index_of(repository)
    log_file = cache_directory(repository) / LOG_NAME if arguments.background else None
    options = MountOptions(
        view=ViewOptions(
            cache_bytes=arguments.cache_size,
            deadline_s=arguments.deadline,
            guests=GuestOptions(
                ownership=Ownership(arguments.ownership) if arguments.ownership else None,
                links=LinkTargets(arguments.links),
                keys=tuple(given_keys()),
            ),
            sessions=partial(places, repository),
        ),
        allow_other=arguments.allow_other,
        log_file=log_file,
        data_plane=DataPlaneKind(arguments.data_plane),
    )
    output.result({"mount_point": str(path), "background": arguments.background})
    server = MountServer(repository, catalog, directory, options, index)
    if log_file is None:
        server.serve(lambda: output.say_now(f"mounted on {path}; Ctrl-C or `xbfs umount {path}` ends it"))
        return
    pid = server.serve_in_background()
    output.result({"pid": pid, "log_file": str(log_file)})
    output.say(f"mounted on {path}; process {pid} serves it and logs to {log_file}")


def umount(arguments: argparse.Namespace, output: Output) -> None:
    """Unmount."""
    directory = Path(arguments.directory)
    try:
        mountpoint.umount(directory)
    except NotMounted as exc:
        raise NotMounted(exc.message, hint=f"`findmnt -t {mountpoint.FILESYSTEM}` lists what is mounted") from exc
    output.result({"mount_point": str(directory)})
    output.say(f"unmounted {directory}")
