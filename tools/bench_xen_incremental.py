"""Section "incremental" of bench_xen: what a backup of changed blocks costs beside its data, on the simulated pool.

One VM with one real disk: a full backup, then rounds of 1 % new bytes in 64 KiB blocks scattered over it. Twice: with
the pool's delays all but off, and with the delays that the simulator assumes of a real one, for nobody measured those.
Run with arguments it is `xbfs` as it is measured: the command line in this process, with a clock at every step.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_xen_nbd import MIB, ROOT
from benchlib import median, run, table
from demo_story import Pool

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

IMAGE = ROOT / ".cache" / "images" / "small" / "gen1.raw"
BLOCK = 64 << 10
CHANGED = 0.01
SCALES = {"delays off": 0.001, "assumed delays": 1.0}
"""What the simulator's delays are multiplied with (tools/xensim/README.md)."""

START, DATA, COMMIT, END = "start, log in, sweep, choose", "DATA", "COMMIT", "log out, end"
NAMES = {
    "keeping it from being migrated": "block migration, check CBT",
    "taking a snapshot": "snapshot, mark it",
    "asking for changed blocks": "changed blocks",
    "recording the VM": "record the VM",
    "waiting to read": "ask for NBD, open base point",
    DATA: "read, hash, compress, store",
    COMMIT: "store index, block map, point",
    "letting go of the snapshot": "data_destroy, old base, tidy up",
}
"""What follows each step that the run tells, as the table calls it."""

WORK = (NAMES[DATA], NAMES[COMMIT])

Phase = tuple[str, float, float]
"""Name, wall seconds, CPU seconds of xbfs."""


def measure(work: Path, rounds: int, size_mib: int) -> list[list[str]]:
    """Full and incremental backups under both delays. No targets: what is wanted is the number."""
    image = _image(work, size_mib)
    for name, scale in SCALES.items():
        folder = work / f"scale-{scale}"
        folder.mkdir()
        _report(name, image, *_backups(folder, image, scale, rounds))
        shutil.rmtree(folder)
    return []


def _image(work: Path, size_mib: int) -> Path:
    """A guest's disk, or one of noise if tools/make_images did not run."""
    if IMAGE.exists():
        return IMAGE
    made = work / "noise.raw"
    with made.open("wb") as file:
        for _ in range(size_mib):
            file.write(os.urandom(MIB))
    return made


def _backups(folder: Path, image: Path, scale: float, rounds: int) -> tuple[list[Phase], list[list[Phase]]]:
    places = ("repository", "cache", "config", "state")
    environment = {f"XBFS_{place.upper()}": str(folder / place) for place in places}
    environment |= {"XBFS_PASSPHRASE": "benchmark", "PYTHONPATH": f"{ROOT / 'engine'}:{ROOT}"}
    with _pool(folder, image, scale) as pool:
        host = pool.hosts[0]
        secret = folder / "password"
        secret.touch(0o600)
        secret.write_text(pool.password)
        url = f"https://{host['address']}:{host['port']}"
        words = ["pool", "add", "lab", url, "--password-file", str(secret), "--fingerprint", host["fingerprint"]]
        _xbfs(folder, environment, words)
        _xbfs(folder, environment, ["init"])
        backup = ["backup", "vm", "web", "--pool", "lab"]
        full = _xbfs(folder, environment, backup)
        increments = []
        for number in range(rounds):
            print(f"incremental, time scale {scale:g}: round {number + 1}/{rounds}", file=sys.stderr)
            _guest_writes(pool, folder / "guest.raw", image.stat().st_size, seed=number)
            increments.append(_xbfs(folder, environment, backup))
    return full, increments


def _guest_writes(pool: Pool, file: Path, size_bytes: int, *, seed: int) -> None:
    """New bytes in a hundredth of all 64 KiB blocks, here and there."""
    blocks = size_bytes // BLOCK
    extents = [
        (number * BLOCK, BLOCK) for number in sorted(random.Random(seed).sample(range(blocks), _changed(blocks)))
    ]
    with file.open("wb") as out:
        out.truncate(size_bytes)
        for offset, length in extents:
            os.pwrite(out.fileno(), os.urandom(length), offset)
    pool.do("guest_write_file", vdi=pool.disk("web"), path=str(file), extents=extents)


def _changed(blocks: int) -> int:
    return max(1, round(blocks * CHANGED))


@contextmanager
def _pool(folder: Path, image: Path, scale: float) -> Iterator[Pool]:
    world = {
        "hosts": [{"name": "alpha"}, {"name": "beta"}],
        "networks": [{"name": "lan", "bridge": "xenbr0", "purpose": ["nbd"]}],
        "srs": [{"name": "nfs", "type": "nfs", "size": 64 << 30, "default": True}],
        "vms": [
            {
                "name": "web",
                "power_state": "Running",
                "disks": [{"name": "root", "sr": "nfs", "image": str(image)}],
                "vifs": [{"network": "lan"}],
            }
        ],
        "templates": [{"name": "Debian Bookworm 12", "default": True}],
    }
    document = folder / "world.json"
    document.write_text(json.dumps(world))
    state = folder / "pool"
    state.mkdir()
    command = [sys.executable, "-m", "tools.xensim", "--with-parent", "--world", str(document)]
    command += ["--state", str(state), "--time-scale", str(scale)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        pool = None
        try:
            pool = Pool(process)
            yield pool
        finally:
            if pool is not None:
                pool.close()
            process.stdin.close()
            process.wait(20)


def _xbfs(folder: Path, environment: dict[str, str], words: Sequence[str]) -> list[Phase]:
    """Run a command; its phases, of which the first begins and the last ends with the process."""
    clock = folder / "clock.json"
    started = time.monotonic()
    cost = run([sys.executable, __file__, str(clock), *words], env=environment)
    marks: list[tuple[str, float, float]] = json.loads(clock.read_text())
    marks = [(START, started, 0.0), *marks, ("", started + cost.wall_s, cost.cpu_s)]
    return [
        (NAMES.get(what, what), end[1] - begin[1], end[2] - begin[2])
        for begin, end in pairwise(marks)
        for what in [begin[0]]
    ]


def _report(name: str, image: Path, full: list[Phase], increments: list[list[Phase]]) -> None:
    def sums(phases: list[Phase], column: int) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for phase in phases:
            found[phase[0]] += float(phase[column])
        return found

    walls, cpus = ([sums(phases, column) for phases in increments] for column in (1, 2))
    full_wall, full_cpu = sums(full, 1), sums(full, 2)

    def row(label: str, phases: Sequence[str]) -> list[str]:
        figures = (full_wall, full_cpu)
        cells = [f"{sum(one[phase] for phase in phases):.2f}" for one in figures]
        cells += [f"{median([sum(one[phase] for phase in phases) for one in many]):.2f}" for many in (walls, cpus)]
        return [label, *cells]

    names = list(dict.fromkeys(phase[0] for phase in increments[0]))
    rows = [row(phase, [phase]) for phase in names]
    rows.append(row("all", names))
    changed = _changed(image.stat().st_size // BLOCK) * BLOCK / MIB
    print(f"{image.name}, {image.stat().st_size / MIB:.0f} MiB; {changed:.1f} MiB changed; {name}")
    table(["phase", "full: wall s", "CPU s", "incremental: wall s", "CPU s"], rows)
    shares = [
        median([sum(one[phase] for phase in names if phase not in WORK) / sum(one.values()) for one in many])
        for many in (walls, cpus)
    ]
    print(f"overhead of the incremental run (all but {' and '.join(WORK)}): ", end="")
    print(f"{shares[0]:.0%} of the wall time, {shares[1]:.0%} of the CPU time", end="\n\n")


def _measured(clock: Path, words: Sequence[str]) -> int:
    """The command line, with marks at the steps that it tells and around the pipeline."""
    from xbfs.cli import backup_vm
    from xbfs.cli.main import main
    from xbfs_engine.ingest import backup

    marks: list[tuple[str, float, float]] = []

    def mark(what: str) -> None:
        marks.append((what, time.monotonic(), time.process_time()))

    class Listener(backup_vm._Listener):
        def step(self, vm_name: str, what: str) -> None:
            mark(what)
            super().step(vm_name, what)

    pipeline, tell = getattr(backup, "run_pipeline"), backup_vm._tell  # noqa: B009 - imported there

    async def run_pipeline(*arguments: Any, **more: Any) -> None:  # noqa: ANN401 - passed on
        mark(DATA)
        await pipeline(*arguments, **more)
        mark(COMMIT)

    def told(*arguments: Any) -> None:  # noqa: ANN401 - passed on
        mark(END)
        tell(*arguments)

    setattr(backup_vm, "_Listener", Listener)  # noqa: B010 - on purpose: nothing is measured unless asked here
    setattr(backup, "run_pipeline", run_pipeline)  # noqa: B010
    setattr(backup_vm, "_tell", told)  # noqa: B010
    code = main(words)
    clock.write_text(json.dumps(marks))
    return code


if __name__ == "__main__":
    sys.exit(_measured(Path(sys.argv[1]), sys.argv[2:]))
