"""The rule of boot tests, and what it is judged from: consoles, screens, firmware."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.support.points import disk, point
from xbfs.instant.boottest.choose import BIOS, UEFI, firmware_of, runs_under
from xbfs.instant.boottest.screen import PNG_MAX, colours, is_same, pixels_of, png
from xbfs.instant.boottest.verdict import CALM_S, SETTLE_S, Observed, at_deadline, judge, signals
from xbfs.instant.qemu import Console
from xbfs_engine.catalog.boottests import Verdict
from xbfs_engine.core.errors import InstantError

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
LOADED = Observed(elapsed_s=60, console="Linux version 6.1\n", read_bytes=90 * MIB, screen_colours=3)


def verdict_of(seen: Observed, marker: str | None = None) -> Verdict | None:
    found = judge(seen, marker)
    return None if found is None else found.verdict


def test_a_login_prompt_is_a_system_that_runs() -> None:
    assert verdict_of(replace(LOADED, console="Debian GNU/Linux 12 web ttyS0\n\nweb login: ")) is Verdict.BOOTED
    assert verdict_of(replace(LOADED, console="last login: never\nmore")) is None


def test_a_marker_is_the_only_proof_if_one_is_wanted() -> None:
    assert verdict_of(replace(LOADED, console="web login: "), "READY") is None
    assert verdict_of(replace(LOADED, agent_answered=True), "READY") is None
    assert verdict_of(replace(LOADED, console="app: READY now"), "READY") is Verdict.BOOTED
    assert at_deadline(LOADED, "READY").verdict is Verdict.FAILED


def test_an_agent_that_answers_is_a_system_that_runs() -> None:
    assert verdict_of(replace(LOADED, agent_answered=True)) is Verdict.BOOTED


@pytest.mark.parametrize(
    "console",
    [
        "Booting from Hard Disk...\nNo bootable device.\n",
        "error: no such partition.\nEntering rescue mode...\ngrub rescue> ",
        "[    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)",
        "ALERT!  UUID=1 does not exist.  Dropping to a shell!\n(initramfs) ",
        "You are in emergency mode. After logging in",
        "BOOTMGR is missing",
        "BdsDxe: No bootable option or device was found.",
    ],
)
def test_a_fatal_text_fails_once_it_is_the_last_word(console: str) -> None:
    seen = replace(LOADED, console=console)
    assert verdict_of(seen) is None
    assert verdict_of(replace(seen, fatal_s=SETTLE_S)) is Verdict.FAILED
    assert verdict_of(replace(seen, fatal_s=SETTLE_S), "READY") is Verdict.FAILED
    assert at_deadline(seen, None).verdict is Verdict.FAILED
    assert next(each for each in signals(seen, None) if each.name == "console").speaks == "against"


def test_a_calm_system_that_wrote_runs_and_each_part_of_that_is_needed() -> None:
    calm = replace(LOADED, written_bytes=MIB, still_s=CALM_S, quiet_s=CALM_S, cpu=0.2)
    assert verdict_of(calm) is Verdict.BOOTED
    for less in (
        {"written_bytes": 512},
        {"screen_colours": 1},
        {"still_s": 1.0},
        {"quiet_s": 1.0},
        {"cpu": 0.99},
        {"cpu": None},
        {"read_bytes": 1000},
    ):
        assert verdict_of(replace(calm, **less)) is None, less
    assert at_deadline(replace(calm, still_s=1.0), None).verdict is Verdict.UNCLEAR


def test_what_a_machine_tells_of_itself() -> None:
    assert verdict_of(replace(LOADED, has_panicked=True)) is Verdict.FAILED
    assert verdict_of(replace(LOADED, resets=2)) is None
    assert verdict_of(replace(LOADED, resets=3)) is Verdict.FAILED
    assert verdict_of(replace(LOADED, has_shut_down=True)) is Verdict.FAILED
    assert verdict_of(replace(LOADED, status="io-error")) is Verdict.UNCLEAR


def test_a_loader_that_hangs_fails_at_the_deadline() -> None:
    hung = Observed(elapsed_s=300, console="Loading", read_bytes=40_000, screen_colours=2, still_s=290)
    assert verdict_of(hung) is None
    assert at_deadline(hung, None).verdict is Verdict.FAILED
    assert "loader" in at_deadline(hung, None).reason


def test_consoles_are_read_without_escapes_and_bounded() -> None:
    console = Console()
    console.add(b"\x1bc\x1b[2J\x1b[01;01HNo boot\x1b[1mable device\x00\r\n")
    assert "No bootable device\n" in console.text
    for _ in range(100):
        console.add(b"x" * 16384)
    console.add(b"the end")
    assert len(console.text) <= 1 << 18
    assert console.text.endswith("the end")


def pixmap(pixels: np.ndarray) -> bytes:
    height, width, _ = pixels.shape
    return b"P6\n%d %d\n255\n" % (width, height) + pixels.astype(np.uint8).tobytes()


def test_screens_are_compared_with_tolerance_for_a_cursor() -> None:
    blank = np.zeros((400, 720, 3), dtype=np.uint8)
    cursor = blank.copy()
    cursor[384:386, 8:16] = 170
    text = blank.copy()
    text[:, ::3] = 170
    one, two, three = (pixels_of(pixmap(each)) for each in (blank, cursor, text))
    assert [colours(each) for each in (one, two, three)] == [1, 2, 2]
    assert is_same(one, two)
    assert not is_same(one, three)
    assert not is_same(None, one)
    assert not is_same(one, pixels_of(pixmap(blank[:200])))


@pytest.mark.parametrize(
    "bad", [b"", b"P6\n", b"P5\n1 1\n255\nx", b"P6\n2 2\n255\nxxx", b"P6\n99999 99999\n255\n", b"P6\n0 0\n255\n"]
)
def test_what_is_no_pixmap_is_refused(bad: bytes) -> None:
    with pytest.raises(InstantError):
        pixels_of(bad)


def test_screens_become_png_and_large_ones_smaller() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)
    small = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    encoded = png(small)
    assert encoded[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", encoded[16:24]) == (3, 2)
    length = struct.unpack(">I", encoded[33:37])[0]
    rows = zlib.decompress(encoded[41 : 41 + length])
    assert rows == b"".join(b"\0" + row.tobytes() for row in small)
    assert len(png(noise)) <= PNG_MAX


def test_firmware_is_what_the_record_says_else_what_the_disk_looks_like(tmp_path: Path) -> None:
    empty = tmp_path / "disk"
    empty.write_bytes(bytes(MIB))
    plain = point(disks=[disk()])
    assert firmware_of(plain, empty) == BIOS
    for said in (UEFI, BIOS):
        recorded = replace(plain, vm={"record": {"vm": {"HVM_boot_params": {"firmware": said, "order": "cd"}}}})
        assert firmware_of(recorded, empty) == said


def test_the_probe_runs_to_its_end_under_emulation() -> None:
    assert runs_under("tcg")
    assert not runs_under("no-such-accelerator")
