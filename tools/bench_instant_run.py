"""What an instant recovery costs: how soon a VM runs from a restore point, and how fast its disk is by every export,
against a local qcow2 overlay on the plain file and nbdkit's cow filter on it, in turn.

    tools/bench_instant [--rounds 3]      # as root: drops the kernel's caches; NFS is in a network of its own

Every round starts every disk afresh, nothing written, and does the same to each with QEMU's block layer (qemu-img
bench, cache=writeback, as a VM has it by default). Every session has a live server of its own, with nothing decoded
in memory; the kernel's caches are dropped before the boots and the cold reads, later loads find what those before
left. Ratios are medians of ratios within a round. Scratch data goes to
--work, by default on a real disk, so that a flush is one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bench_instant_disks import ROOT, Contender, Load, NbdkitCow, Place, Plain, Qcow2, Session, drop_caches
from benchlib import machine, median, table, verdict

from tests.support.micro_guest import BOOTED
from tests.support.nfs_network import private_network
from tests.support.qemu_guest import Guest

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTENDERS: list[Contender] = [
    Qcow2(),
    Plain(),
    NbdkitCow(),
    Session("file"),
    Session("file", is_hydrated=True),
    Session("file", is_passed=True),
    Session("nbd", "unix"),
    Session("nfs"),
]
"""Without NBD by TLS: qemu-img bench takes no credentials. docs/adr/0009-exports.md has its figures."""
BOOTING: list[Contender] = [
    Qcow2(),
    Session("file"),
    Session("nbd", "unix"),
    Session("nfs"),
    Session("nbd", "tls"),
    Session("file", format="vhd"),
]
LOADS = [
    Load("cold read", 2_000, depth=1),
    Load("read", 16_000),
    Load("write, flush/32", 4_000, write=True, flush_every=32),
    Load("write", 16_000, write=True),
    Load("read written", 16_000),
    Load("sequential write", 256, size=1 << 20, step=1 << 20, write=True),
    Load("sequential read", 256, size=1 << 20, step=1 << 20),
]
DISK_BYTES = 512 << 20

Figures = dict[str, dict[str, list[float]]]
"""By what was measured, then by contender: a figure a round."""


def measure(contender: Contender, place: Place, rate: Figures, cpu_us: Figures) -> None:
    """All loads on one fresh disk."""
    with contender.opened(place) as disk:
        rate["ready s"][contender.name].append(disk.ready_s)
        for load in LOADS:
            if load.name.startswith("cold"):
                drop_caches()
            before = disk.cpu_s()
            rate[load.name][contender.name].append(load.run(disk))
            cpu_us[load.name][contender.name].append((disk.cpu_s() - before) / load.count * 1e6)


def boot(contender: Contender, place: Place, scratch: Path, took: Figures) -> None:
    """From the command to the first output and to a mounted root with the right bytes."""
    drop_caches()
    started = time.perf_counter()
    with contender.opened(place) as disk:
        took["registered"][contender.name].append(disk.ready_s)
        with Guest(disk.blockdev, scratch, objects=disk.objects) as guest:
            guest.wait_for("SYSLINUX")
            took["first output"][contender.name].append(time.perf_counter() - started)
            guest.wait_for(BOOTED)
            took["up"][contender.name].append(time.perf_counter() - started)


@contextmanager
def backed_up(work: Path, image: Path) -> Iterator[Place]:
    """A repository with one point of an image, and no server when it is over."""
    work.mkdir()
    place = Place(work, image)
    place.xbfs("init")
    place.xbfs("backup", "image", image, "--vm", "guest")
    try:
        yield place
    finally:
        place.end_servers()


def ratios(figures: dict[str, list[float]], name: str, to: str) -> float:
    """The median of a contender's figures over another's, round by round."""
    return median([ours / theirs for ours, theirs in zip(figures[name], figures[to], strict=True)])


def report_rates(rate: Figures, cpu_us: Figures) -> list[list[str]]:
    """The tables of disks; returns the rows of targets."""
    base = Qcow2.name
    names = list(rate["ready s"])
    for load in LOADS:
        rows = []
        for name in names:
            figures = rate[load.name]
            value, unit = median(figures[name]), "IOPS"
            if load.size > 4096:
                value, unit = value * load.size / 1e6, "MB/s"
            share = ratios(figures, name, base)
            rows.append([name, f"{value:,.0f} {unit}", f"{share:.2f}", f"{median(cpu_us[load.name][name]):.0f}"])
        table([load.name, "median", "/ qcow2", "server CPU us/op"], rows)
    rows = [
        verdict(f"{wanted}, {name} / qcow2", ratios(rate[wanted], name, base), limit, at_least=True)
        for wanted, limit in (("read", 0.5), ("cold read", 0.5), ("read written", 0.5), ("write, flush/32", 1.0))
        for name in names
        if name.startswith("ours")
    ]
    for name in names:
        if name.startswith("ours: file"):
            rows.append(verdict(f"write, {name}, IOPS", median(rate["write"][name]), 20_000, at_least=True))
    return rows


def report_boots(took: Figures) -> list[list[str]]:
    """The table of boots; returns the rows of targets."""
    names = list(took["up"])
    rows = [[name, *(f"{median(took[what][name]):.1f}" for what in took)] for name in names]
    table(["boot of the micro guest, s", *took], rows)
    return [
        verdict(f"registered, {name}", median(took["registered"][name]), 5, at_least=False, unit=" s")
        for name in names
        if name.startswith("ours")
    ]


def main() -> None:
    """Parse arguments, prepare, measure in turn, report."""
    parser = argparse.ArgumentParser(
        prog="tools/bench_instant", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("/var/tmp"), help="where scratch data goes")
    parser.add_argument("--only", action="append", help="contenders whose name has this, beside qcow2")
    parser.add_argument("--section", choices=["boots", "disks"], action="append")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("bench_instant: root is needed, to drop the kernel's caches and for NFS")
    sections = options.section or ["boots", "disks"]

    def wanted(all_of: list[Contender]) -> list[Contender]:
        words = options.only or [""]
        return [
            one
            for one in all_of
            if (not one.is_ours and not options.only) or any(word in one.name for word in words) or one is all_of[0]
        ]

    print(machine())
    targets: list[list[str]] = []
    make_images = [sys.executable, str(ROOT / "tools/make_images")]
    with private_network(), tempfile.TemporaryDirectory(dir=options.work, prefix="xbfs-instant-") as folder:
        work = Path(folder)
        if "boots" in sections:
            done = subprocess.run([*make_images, "micro"], capture_output=True, text=True, check=True)
            took: Figures = defaultdict(lambda: defaultdict(list))
            with backed_up(work / "boots", Path(done.stdout.strip())) as place:
                for number in range(options.rounds):
                    print(f"boots, round {number + 1}/{options.rounds}", file=sys.stderr)
                    for one in wanted(BOOTING):
                        boot(one, place, work / "guest", took)
            targets += report_boots(took)
        if "disks" in sections:
            image = work / "image.raw"
            size = ["--size", str(DISK_BYTES), "--data", str(DISK_BYTES)]
            subprocess.run([*make_images, "sparse", image, *size], check=True)
            rate: Figures = defaultdict(lambda: defaultdict(list))
            cpu_us: Figures = defaultdict(lambda: defaultdict(list))
            with backed_up(work / "disks", image) as place:
                for number in range(options.rounds):
                    print(f"disks, round {number + 1}/{options.rounds}", file=sys.stderr)
                    for one in wanted(CONTENDERS):
                        measure(one, place, rate, cpu_us)
            targets += report_rates(rate, cpu_us)
    table(["target", "measured", "wanted", ""], targets)


if __name__ == "__main__":
    main()
