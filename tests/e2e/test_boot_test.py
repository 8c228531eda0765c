"""`xbfs test` through the real command line: guests that boot, do not, or hang; kill -9; what is kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.instant_lab import Lab
from tests.support.micro_guest import BOOTED, micro_disk
from xbfs.instant.qemu import PROGRAM

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/fuse").exists() or not Path(f"/usr/bin/{PROGRAM}").exists(),
    reason="needs root, /dev/fuse and QEMU",
)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    made.good("init")
    try:
        yield made
    finally:
        made.clean()


def back_up(lab: Lab, name: str, data: bytes, size: int = 4 * MIB) -> None:
    image = lab.directory / f"{name}.raw"
    with image.open("wb") as file:
        file.write(data)
        file.truncate(size)
    lab.good("backup", "image", image, "--vm", name, "-q")


def boot_sector(code: bytes) -> bytes:
    return code.ljust(510, b"\0") + b"\x55\xaa"


def sessions(lab: Lab) -> list[str]:
    return [each["name"] for each in lab.good("boot", "list", "--json").json["sessions"]]


def test_a_disk_without_a_system_fails_and_the_result_is_kept(lab: Lab) -> None:
    back_up(lab, "empty", b"")
    assert lab.run("show", "empty@latest", "--screenshot", lab.directory / "none").code == 2
    screen = lab.directory / "screen.png"
    done = lab.run("test", "empty@latest", "--accel", "tcg", "--screenshot", screen, "--json")
    assert done.code == 109, done.err
    (test,) = done.json["tests"]
    assert (test["verdict"], test["accelerator"], test["firmware"]) == ("failed", "tcg", "bios")
    assert "bootable" in test["reason"]
    assert screen.read_bytes().startswith(b"\x89PNG")
    again = lab.directory / "again.png"
    (kept,) = lab.good("show", "empty@latest", "--screenshot", again, "--json").json["tests"]
    assert again.read_bytes() == screen.read_bytes()
    assert kept == test
    assert sessions(lab) == []
    assert lab.good("check", "--json").json["healthy"]


def test_a_loader_that_hangs_fails_at_the_deadline_and_is_as_it_was(lab: Lab) -> None:
    back_up(lab, "hung", boot_sector(b"\xeb\xfe"))
    done = lab.run("test", "--vm", "hung", "--accel", "tcg", "--deadline", "6", "--json")
    assert done.code == 109, done.err
    assert "hung in its loader" in done.json["tests"][0]["reason"]


def test_kill_9_leaves_a_session_that_the_next_test_throws_away(lab: Lab) -> None:
    back_up(lab, "hung", boot_sector(b"\xeb\xfe"))
    with lab.started("test", "hung@latest", "--accel", "tcg", "-q") as process:
        end = time.monotonic() + 60
        while not (machines := qemus(lab)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        while any(Path(f"/proc/{pid}/fd").exists() and qemus(lab) for pid in machines):
            assert time.monotonic() < end
            time.sleep(0.05)
    (left,) = sessions(lab)
    assert left.startswith("test-")
    done = lab.run("test", "hung@latest", "--accel", "tcg", "--deadline", "2")
    assert f"session {left} of a test that was killed is thrown away" in done.out.decode()
    assert sessions(lab) == []


def test_what_can_not_be_asked_for(lab: Lab) -> None:
    for words in (["--policy", "gold"], ["--pool", "prod", "x@latest"], [], ["x@latest", "--vm", "x"]):
        done = lab.run("test", *words, "--accel", "tcg", "--json")
        assert (done.code, json.loads(done.out)["error"]["class"]) == (2, "UsageError"), words


def test_a_guest_that_boots(lab: Lab) -> None:
    lab.good("backup", "image", micro_disk(), "--vm", "micro", "-q")
    words = ("--accel", "tcg", "--memory", "384", "--firmware", "bios")
    done = lab.run("test", "micro@latest", *words, "--marker", BOOTED, "--json")
    assert done.code == 0, done.err
    (test,) = done.json["tests"]
    assert test["verdict"] == "booted"
    assert test["marker_ms"] is not None
    assert BOOTED in test["console"]
    assert sessions(lab) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("panic", "reason"), [(0, "the kernel panicked"), (1, r"was reset [3-9] times: the kernel panicked")]
)
def test_a_kernel_that_panics_fails(lab: Lab, panic: int, reason: str) -> None:
    disk = lab.directory / "panics.raw"
    shutil.copyfile(micro_disk(), disk)
    config = lab.directory / "syslinux.cfg"
    words = f"rdinit=/none root=/dev/none panic={panic} console=ttyS0"
    config.write_text(f"SERIAL 0\nDEFAULT l\nTIMEOUT 1\nLABEL l\n KERNEL /vmlinuz\n APPEND {words}\n")
    subprocess.run(["mcopy", "-o", "-i", f"{disk}@@{MIB}", str(config), "::/syslinux.cfg"], check=True)
    lab.good("backup", "image", disk, "--vm", "panics", "-q")
    done = lab.run("test", "panics@latest", "--accel", "tcg", "--firmware", "bios", "--json")
    assert done.code == 109, done.err
    assert re.search(reason, done.json["tests"][0]["reason"])


@pytest.mark.slow
def test_a_guest_that_boots_by_uefi_beside_one_that_does_not(lab: Lab) -> None:
    lab.good("backup", "image", micro_disk(), "--vm", "micro", "-q")
    back_up(lab, "empty", b"")
    words = ("--vm", "micro", "--vm", "empty", "--parallel", "2", "--marker", BOOTED, "--accel", "tcg", "--json")
    done = lab.run("test", *words)
    assert done.code == 109, done.err
    assert [(test["verdict"], test["firmware"]) for test in done.json["tests"]] == [
        ("booted", "uefi"),
        ("failed", "bios"),
    ]


def qemus(lab: Lab) -> list[int]:
    """Machines that have a disk of this lab's open."""
    mark = str(lab.directory)
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"xbfs-boot-test" not in (process / "cmdline").read_bytes():
                continue
            if any(str(entry.readlink()).startswith(mark) for entry in (process / "fd").iterdir()):
                found.append(int(process.name))
        except OSError:
            continue
    return found
