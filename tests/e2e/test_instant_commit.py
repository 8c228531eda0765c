"""What a guest wrote while it ran from a restore point becomes a restore point, and its files are seen in the mount."""

from __future__ import annotations

import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.instant_lab import VM, blockdev, lab
from tests.support.micro_guest import ROOT_OFFSET, micro_disk
from tests.support.qemu_guest import Guest


@pytest.mark.slow
def test_what_a_guest_wrote_becomes_a_restore_point() -> None:
    with lab(micro_disk()) as made, TemporaryDirectory(prefix="xbfs-") as directory:
        folder = Path(directory)
        disk, objects = blockdev(made.boot("--name", "one", "--export", "nbd"), "unix")
        with Guest(disk, folder, words="write=something off", objects=objects) as guest:
            assert "XBFS-WRITTEN something" in guest.wait()
        before = set(made.points())
        made.good("boot", "commit", "one")
        assert len(set(made.points()) - before) == 1
        mount = folder / "mnt"
        mount.mkdir()
        made.good("mount", mount, "--background")
        try:
            point = mount / "vms" / VM / "latest"
            expected = "written by the guest: something\n"
            assert debugfs(point / "disks" / "0.raw", "cat /written/something") == expected
            assert (point / "files" / "0p2" / "written" / "something").read_text() == expected
        finally:
            made.good("umount", mount)
        made.good("verify")
        made.good("boot", "discard", "one")
        assert made.sessions() == []


def debugfs(image: Path, request: str) -> str:
    command = ["debugfs", "-R", request, f"{image}?offset={ROOT_OFFSET}"]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout
