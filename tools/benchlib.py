"""What the benchmarks share: whole-process timing, interleaved rounds, paired ratios and plain tables.

CPU seconds and ratios of runs made in turn are the figures to believe on a shared machine; single wall times are not.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Cost:
    """What a finished command cost: seconds, and the peak resident size of its largest process in MiB."""

    wall_s: float
    cpu_s: float
    peak_mib: float


def run(command: Sequence[str | Path], *, env: dict[str, str] | None = None, stdout: Path | None = None) -> Cost:
    """Run a command to its end, its descendants included in the CPU time; exits with its output if it fails."""
    log = Path(f"/tmp/bench-{os.getpid()}.log")
    target = stdout or log
    with target.open("wb") as out, log.open("ab") as err:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **(env or {})},
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    text = log.read_text(errors="replace")
    log.unlink()
    if process.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{text[-2000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def tree_bytes(path: Path) -> int:
    """Bytes of all files below ``path``, or of the file itself."""
    if path.is_file():
        return path.stat().st_size
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a head, columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
    print(flush=True)


def machine() -> str:
    """One line about where this ran."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    load = os.getloadavg()[0]
    return f"{len(os.sched_getaffinity(0))} cores ({model}), load {load:.1f} at the start"


def verdict(name: str, value: float, limit: float, *, at_least: bool, unit: str = "") -> list[str]:
    """A row of the table of targets."""
    met = value >= limit if at_least else value <= limit
    return [name, f"{value:.3g}{unit}", f"{'>=' if at_least else '<='} {limit:g}{unit}", "met" if met else "MISSED"]
