"""boot POINT: begin an instant recovery, and say where its disks are."""

from __future__ import annotations

import os
import re
import shlex
from typing import TYPE_CHECKING, Final

from xbfs.cli import text
from xbfs.cli.context import catalog_of, index_of, point_of, repository_of
from xbfs.fuse import mountpoint
from xbfs.instant import client
from xbfs.instant.session import DiskFormat, Export, Session, SessionDisk
from xbfs.instant.share import checked_clients
from xbfs_engine.core.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.output import Output
    from xbfs.instant.client import Running
    from xbfs_engine.catalog.restore_point import RestorePoint
    from xbfs_engine.core.runtime import Runtime

_NAME_PART_MAX: Final = 24
"""Characters of the VM's name in a session's: paths of sockets are short."""
_QEMU_FORMATS: Final = {DiskFormat.RAW: "raw", DiskFormat.VHD: "vpc"}


def boot(arguments: argparse.Namespace, output: Output) -> None:
    """Begin a session."""
    mountpoint.check_installed()  # said before anybody types a passphrase
    repository = repository_of(arguments)
    catalog, index = catalog_of(repository, output), index_of(repository)
    point = point_of(catalog, arguments.point)
    plan = plan_of(arguments, point, repository.runtime)
    began = client.begin(repository, catalog, index, plan)
    output.result({"session": session_record(began)})
    output.say(f"session {plan.name}: {plan.vm_name} as of {text.when(point.time_ns)}, {point.id[:12]}")
    for line in _place_lines(began, plan):
        output.say(line)
    output.say(f"`xbfs boot discard {plan.name}` ends it and throws away what was written")


def plan_of(arguments: argparse.Namespace, point: RestorePoint, runtime: Runtime) -> Session:
    """The session that is asked for. Raises UsageError."""
    export = Export(arguments.export or Export.FILE)
    default = DiskFormat.VHD if export is Export.NFS else DiskFormat.RAW
    disk_format = DiskFormat(arguments.format) if arguments.format else default
    if arguments.client and export is Export.FILE:
        raise UsageError("--client is for --export nbd and nfs", hint="leave it out, or choose an export")
    if export is Export.NBD and disk_format is DiskFormat.VHD:
        raise UsageError("a VHD grows as it is written to, and a disk on NBD can not", hint="leave --format vhd out")
    if export is Export.NFS:
        check_may_serve_nfs(hint="run it with sudo, or with --export nbd")
    if arguments.passthrough and (arguments.hydrate is None or disk_format is not DiskFormat.RAW):
        raise UsageError(
            "--passthrough is for raw disks that are copied to this machine", hint="add --hydrate, or leave it out"
        )
    there = [disk.number for disk in point.disks]
    wanted = sorted(set(arguments.disk or there))
    missing = [number for number in wanted if number not in there]
    if missing or not wanted:
        have = ", ".join(map(str, sorted(there))) or "none"
        raise UsageError(
            f"restore point {point.id[:12]} has no disk {missing[0] if missing else 0}", hint=f"has: {have}"
        )
    return Session(
        name=arguments.name or default_name(point.vm_name, runtime),
        point=point.id,
        vm_name=point.vm_name,
        created_ns=runtime.clock.now_ns(),
        export=export,
        disks=tuple(SessionDisk(number, disk_format, f"{number}.{disk_format}") for number in wanted),
        clients=checked_clients(arguments.client),
        hydrate_bytes_s=arguments.hydrate,
        passthrough=arguments.passthrough,
    )


def check_may_serve_nfs(hint: str = "run it with sudo") -> None:
    """Raises UsageError for who is not root."""
    if os.geteuid() != 0:
        raise UsageError("only root can serve NFS", hint=hint)


def default_name(vm_name: str, runtime: Runtime) -> str:
    """A name for a session of a VM that no other has."""
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", vm_name).strip("-")[:_NAME_PART_MAX] or "vm"
    return f"{readable}-{runtime.random.token(2).hex()}"


def session_record(running: Running) -> dict[str, object]:
    """A session for ``--json``."""
    session = running.session
    record: dict[str, object] = {} if session is None else session.to_record()
    disks = [
        {
            "number": int(key),
            "file": str(place.file) if place.file else None,
            "uri": place.uri,
            "local_uri": place.local_uri,
            "passthrough": place.is_passed,
        }
        for key, place in running.places.items()
    ]
    return record | {
        "name": running.name,
        "places": disks,
        "nfs": None if running.nfs is None else running.nfs._asdict(),
        "served": running.is_served,
        "in_use": running.is_busy,
        "read_bytes": running.read_bytes,
        "dirty_bytes": running.dirty_bytes,
        "hydrated": running.hydrated,
        "problem": None if running.problem is None else {"message": running.problem[0], "hint": running.problem[1]},
    }


def _place_lines(running: Running, plan: Session) -> list[str]:
    lines: list[str] = []
    drives: list[str] = []
    for disk in plan.disks:
        place = running.places[disk.key]
        lines.append(f"disk {disk.number}: {place.file}")
        if place.uri is not None:
            lines.append(f"  {plan.export.upper()}: {place.uri}")
        source = place.local_uri or str(place.file)
        # A comma in the name of a file is doubled in an option of QEMU.
        option = f"file={source.replace(',', ',,')},format={_QEMU_FORMATS[disk.format]}"
        drives.append(f"-drive {shlex.quote(option)}")
    if running.nfs is not None:
        share = running.nfs
        lines.append(f"mount it: mount -t nfs -o nfsvers=3,hard {share.address}:{shlex.quote(share.path)} DIR")
    lines.append(f"run it here: qemu-system-x86_64 -m 2048 {' '.join(drives)}")
    return lines
