"""The rule by which a booted point is judged, from what was observed. Pure. docs/boot-test.md tells it in words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, NamedTuple

from xbfs_engine.catalog.boottests import Signal, Verdict
from xbfs_engine.core.limits import KIB, MIB

SETTLE_S: Final = 8.0
"""A text that says that nothing goes on has to stay the last word that long: a loader may try its next choice."""
CALM_S: Final = 20.0
"""How long a system has to show the same screen, without using its disks or processor much, to count as started."""
CALM_CPU: Final = 0.6
"""Of one processor: under emulation an idle system takes up to half of one."""
WRITTEN_BYTES: Final = 64 * KIB
"""Written by a system that has mounted its root. A loader writes at most a sector or two (GRUB's grubenv)."""
LOADED_BYTES: Final = 4 * MIB
"""Read when more than a loader ran: kernels alone are larger."""
RESETS_MAX: Final = 3
_SHOWN: Final = 200
_STOPPED: Final = frozenset({"paused", "suspended"})
"""Power states of XAPI that no test brings about."""

_FATAL: Final = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"No bootable device", "the firmware found no bootable device"),
        (r"No bootable option or device was found", "the firmware found no bootable device"),
        (r"UEFI Interactive Shell v", "the firmware found nothing to boot and went to its shell"),
        (r"(?i)missing operating system|operating system not found", "the boot sector found no system"),
        (
            r"BOOTMGR is missing|NTLDR is missing|A disk read error occurred",
            "the boot sector of Windows found no loader",
        ),
        (r"grub rescue>", "GRUB does not find its files"),
        (r"No DEFAULT or UI configuration directive found", "SYSLINUX does not find its configuration"),
        (r"Kernel panic - not syncing", "the kernel panicked"),
        (r"(?m)^\(initramfs\)|Dropping to a shell!|dracut:/#", "the initial RAM disk does not find the root"),
        (r"You are in (?:emergency|rescue) mode|Give root password for maintenance", "the system is in emergency mode"),
    )
)
_LOGIN: Final = re.compile(r"(?m)^[^\n]{0,200}\blogin: *$")


@dataclass(slots=True)
class Observed:
    """What has been seen until now. ``fatal_s``: for how long the console's fatal text is its last word;
    ``screen_colours`` 0 is no screen; ``still_s`` the same screen; ``quiet_s`` nothing read or written; ``cpu`` of one
    processor in the last seconds, None if nobody knows. ``knows_use``: what was read and written is known, and of now.
    ``is_on_pool``: no console, no word of a panic."""

    elapsed_s: float = 0.0
    console: str = ""
    fatal_s: float = 0.0
    status: str = "running"
    read_bytes: int = 0
    written_bytes: int = 0
    screen_colours: int = 0
    still_s: float = 0.0
    quiet_s: float = 0.0
    cpu: float | None = None
    resets: int = 0
    has_panicked: bool = False
    has_shut_down: bool = False
    agent_answered: bool = False
    knows_use: bool = True
    is_on_pool: bool = False


class Judgement(NamedTuple):
    """A verdict and what decided; ``on_console``: a text there did."""

    verdict: Verdict
    reason: str
    on_console: bool = False


def fatal_text(console: str) -> str | None:
    """What the console says that means that nothing goes on."""
    return next((reason for pattern, reason in _FATAL if pattern.search(console)), None)


def judge(seen: Observed, marker: str | None) -> Judgement | None:
    """The verdict if there can be one already. The first rule that holds decides."""
    if marker is not None and marker in seen.console:
        return Judgement(Verdict.BOOTED, f"the console shows {marker!r}", on_console=True)
    fatal = fatal_text(seen.console)
    if fatal is not None and seen.fatal_s >= SETTLE_S:
        return Judgement(Verdict.FAILED, fatal, on_console=True)
    if seen.has_panicked:
        return Judgement(Verdict.FAILED, "the guest told that it panicked")
    if seen.resets >= RESETS_MAX:
        return Judgement(Verdict.FAILED, f"the guest was reset {seen.resets} times" + (f": {fatal}" if fatal else ""))
    if seen.status == "io-error":
        return Judgement(
            Verdict.UNCLEAR,
            "a disk could not be read or written: see `xbfs verify`, and whether the local disk is full",
        )
    if seen.is_on_pool and seen.status in _STOPPED:
        return Judgement(Verdict.UNCLEAR, f"the VM is {seen.status}: it crashed, or somebody did that")
    if seen.has_shut_down:
        return Judgement(Verdict.FAILED, f"the guest switched itself off after {seen.elapsed_s:.0f} s")
    if marker is None and fatal is None:
        return _started(seen)
    return None


def _started(seen: Observed) -> Judgement | None:
    if _LOGIN.search(seen.console):
        return Judgement(Verdict.BOOTED, "the console shows a login prompt", on_console=True)
    if seen.agent_answered:
        return Judgement(Verdict.BOOTED, "the guest agent answers")
    if (
        seen.written_bytes >= WRITTEN_BYTES
        and seen.read_bytes >= LOADED_BYTES
        and seen.screen_colours > 1
        and min(seen.still_s, seen.quiet_s) >= CALM_S
        and seen.cpu is not None
        and seen.cpu <= CALM_CPU
    ):
        return Judgement(
            Verdict.BOOTED,
            f"the system loaded, wrote {seen.written_bytes} bytes to its disks, shows a screen and is calm",
        )
    return None


def at_deadline(seen: Observed, marker: str | None) -> Judgement:
    """The verdict when the time is over."""
    fatal = fatal_text(seen.console)
    within = f"within {seen.elapsed_s:.0f} s"
    if fatal is not None:
        return Judgement(Verdict.FAILED, fatal, on_console=True)
    if seen.knows_use and seen.written_bytes < WRITTEN_BYTES and seen.read_bytes < LOADED_BYTES:
        return Judgement(Verdict.FAILED, f"hung in its loader: {seen.read_bytes} bytes were read {within}")
    if marker is not None:
        return Judgement(Verdict.FAILED, f"the console did not show {marker!r} {within}")
    return Judgement(
        Verdict.UNCLEAR,
        f"something runs, but neither a login prompt nor an agent nor a calm system that writes was seen {within}",
    )


def signals(seen: Observed, marker: str | None) -> tuple[Signal, ...]:
    """Each signal's reading, for the record."""
    fatal = fatal_text(seen.console)
    wrote, loaded = seen.written_bytes >= WRITTEN_BYTES, seen.read_bytes >= LOADED_BYTES
    lines = [line for line in seen.console.splitlines() if line.strip()]
    console = fatal or (lines[-1].strip()[:_SHOWN] if lines else "nothing")
    has_login = _LOGIN.search(seen.console) is not None
    found = [
        Signal("reads", "for" if loaded else "against", f"{seen.read_bytes} bytes"),
        Signal("writes", "for" if wrote else "", f"{seen.written_bytes} bytes"),
        Signal("screen", "for" if seen.screen_colours > 1 else "", f"{seen.screen_colours} colours"),
        Signal("still", "for" if seen.still_s >= CALM_S else "", f"the same screen for {seen.still_s:.0f} s"),
        Signal("agent", "for" if seen.agent_answered else "", "answered" if seen.agent_answered else "silent"),
        Signal("resets", "against" if seen.resets >= RESETS_MAX else "", str(seen.resets)),
        Signal("machine", "against" if seen.has_shut_down else "", seen.status),
    ]
    if not seen.is_on_pool:
        is_calm = seen.cpu is not None and seen.cpu <= CALM_CPU
        used = "not known" if seen.cpu is None else f"{100 * seen.cpu:.0f} % of one"
        found = [
            Signal("console", "against" if fatal else "for" if has_login else "", console),
            *found,
            Signal("processor", "for" if is_calm else "", used),
            Signal("panic", "against" if seen.has_panicked else "", "told" if seen.has_panicked else "none told"),
        ]
    if marker is not None:
        has_marker = marker in seen.console
        found.insert(0, Signal("marker", "for" if has_marker else "against", "seen" if has_marker else "not seen"))
    return tuple(found)
