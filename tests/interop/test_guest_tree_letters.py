"""Drives of a Windows guest on real disks: tables of sfdisk, NTFS written by ntfs-3g, a registry written by hivex."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from typing import TYPE_CHECKING

import pytest

from tests.support.guest_sources import SparseSource
from tests.support.registry_hives import mounted_devices, peer_write, why_no_peer
from tests.support.windows_images import make_ntfs, mounted_ntfs, why_not
from xbfs_engine.core.runtime import SystemClock
from xbfs_engine.guestfs.reading import GuestReading
from xbfs_engine.guestfs.volumes import Disk
from xbfs_engine.guestfs.worker.client import GuestWorkers

if TYPE_CHECKING:
    from pathlib import Path

REASON = why_not("mkntfs", "ntfs-3g", "sfdisk") or why_no_peer()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

MIB = 1 << 20


@pytest.mark.parametrize("label", ["gpt", "dos"])
def test_letters_of_real_partitions(tmp_path: Path, label: str) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, 40 * MIB)
    table = f"label: {label}\nsize=12M\nsize=12M\nsize=12M\n"
    subprocess.run(["sfdisk", "--quiet", disk], input=table.encode(), check=True)
    told = json.loads(subprocess.run(["sfdisk", "--json", disk], capture_output=True, check=True).stdout)
    partitions = told["partitiontable"]["partitions"]

    def ident(number: int) -> bytes:
        if label == "gpt":
            return b"DMIO:ID:" + uuid.UUID(partitions[number - 1]["uuid"]).bytes_le
        start = partitions[number - 1]["start"] * 512
        return int(told["partitiontable"]["id"], 16).to_bytes(4, "little") + start.to_bytes(8, "little")

    hive = tmp_path / "hive"
    letters = {"名": b"", "\\DosDevices\\C:": ident(2), "\\DosDevices\\E:": ident(1), "\\DosDevices\\F:": ident(3)}
    peer_write(hive, mounted_devices(letters))
    for number, entry in enumerate(partitions, 1):
        image = tmp_path / "image"
        make_ntfs(image, size_bytes=entry["size"] * 512)
        with mounted_ntfs(image, tmp_path / "point") as point:
            (point / f"volume{number}").write_text("here")
            if number == 2:
                config = point / "Windows" / "system32" / "Config"
                config.mkdir(parents=True)
                shutil.copyfile(hive, config / "SYSTEM")
        with disk.open("r+b") as file:
            file.seek(entry["start"] * 512)
            file.write(image.read_bytes())
    guest = GuestReading([Disk("0", SparseSource.of_file(disk))])
    tree = guest.tree()
    assert tree.kind == "windows"
    assert tree.notes == ()
    assert {mount.path: mount.volume for mount in tree.mounts} == {b"/C:": "0p2", b"/E:": "0p1", b"/F:": "0p3"}
    with GuestWorkers(SystemClock()) as workers:
        assert workers.open("test", [Disk("0", SparseSource.of_file(disk))]).tree() == tree
    for mount in tree.mounts:
        assert guest.lookup(mount.volume, mount.node, f"volume{mount.volume[-1]}".encode()) is not None
