"""What a disk costs by NBD: nbdkit on a mounted file against other servers of the same disk, in interleaved rounds.

    python tools/bench_instant_exports.py FILE [--also NAME=SOCKET:EXPORT] [--rounds 3]

FILE is a disk in a live mount (or any file); it is written to. ``qemu-nbd`` serves the same file; ``--also`` is a
server that runs already. The functions are for ``bench_instant`` as well.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from xbfs.serve.certificates import make_certificates
from xbfs_engine.core.runtime import SystemClock

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS: Final = 2
SPAN: Final = "64m"
LOADS: Final = {
    "4k read qd1": ("--rw=randread", "--bs=4k", "--iodepth=1"),
    "4k read qd8": ("--rw=randread", "--bs=4k", "--iodepth=8"),
    "4k write qd1": ("--rw=randwrite", "--bs=4k", "--iodepth=1"),
    "4k write qd8, flush each 32": ("--rw=randwrite", "--bs=4k", "--iodepth=8", "--fsync=32"),
    "1m read qd4": ("--rw=read", "--bs=1m", "--iodepth=4"),
    "1m write qd4": ("--rw=write", "--bs=1m", "--iodepth=4"),
}
"""By name, what fio does."""


@dataclass(frozen=True, slots=True)
class Figure:
    """Of one load on one server."""

    iops: float
    mb_s: float


def nbd_figure(uri: str, load: tuple[str, ...]) -> Figure:
    """Of a disk at a URI without TLS, by fio's client."""
    return _fio("--ioengine=nbd", f"--uri={uri}", *load)


def file_figure(file: Path, load: tuple[str, ...]) -> Figure:
    """Of a file, past the kernel's cache where it allows that."""
    return _fio("--ioengine=libaio", "--direct=1", f"--filename={file}", *load)


def _fio(*arguments: str) -> Figure:
    common = ("--name=x", "--output-format=json", f"--size={SPAN}", "--time_based", f"--runtime={SECONDS}")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["fio", *common, *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=120
        )
    (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    side = job["read"] if job["read"]["total_ios"] else job["write"]
    return Figure(side["iops"], side["bw_bytes"] / 1e6)


def copy_figure(uri: str, size_bytes: int, request_bytes: int, depth: int) -> Figure:
    """Of reading all of a disk in order, by nbdcopy, which knows TLS (fio's client does not)."""
    tuned = ("--connections=1", "--no-extents", f"--request-size={request_bytes}", f"--requests={depth}")
    begin = time.perf_counter()
    subprocess.run(["nbdcopy", *tuned, uri, "null:"], capture_output=True, check=True, timeout=120)
    seconds = time.perf_counter() - begin
    return Figure(size_bytes / request_bytes / seconds, size_bytes / 1e6 / seconds)


@contextmanager
def server(*command: str, ready: Path) -> Iterator[None]:
    """A server that makes a socket; its CPU seconds are among those of our children when it has ended."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 10
        while not ready.exists():
            assert process.poll() is None, command
            assert time.monotonic() < end, command
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def servers(file: Path, folder: Path, also: dict[str, str]) -> Iterator[dict[str, str]]:
    """nbdkit and qemu-nbd on ``file``, and others: URIs by name."""
    kit, qemu = folder / "kit.sock", folder / "qemu.sock"
    name = quote(file.name)
    with (
        server("nbdkit", "-f", "-U", str(kit), "file", f"dir={file.parent}", ready=kit),
        server("qemu-nbd", "-t", "-e", "8", "-f", "raw", "-k", str(qemu), "-x", file.name, str(file), ready=qemu),
    ):
        yield {
            "nbdkit": f"nbd+unix:///{name}?socket={kit}",
            "qemu-nbd": f"nbd+unix:///{name}?socket={qemu}",
            **{
                key: f"nbd+unix:///{where.partition(':')[2]}?socket={where.partition(':')[0]}"
                for key, where in also.items()
            },
        }


def compare(file: Path, also: dict[str, str], rounds: int) -> list[str]:
    """Lines of a table: medians by load and server."""
    with tempfile.TemporaryDirectory() as name, servers(file, Path(name), also) as uris:
        lines = [f"{'':28}" + "".join(f"{key:>18}" for key in ("file", *uris))]
        for load, options in LOADS.items():
            figures: dict[str, list[Figure]] = {}
            for _ in range(rounds):
                figures.setdefault("file", []).append(file_figure(file, options))
                for key, uri in uris.items():
                    figures.setdefault(key, []).append(nbd_figure(uri, options))
            cells = [
                f"{statistics.median(one.mb_s for one in found):13.0f} MB/s"
                if load.startswith("1m")
                else f"{statistics.median(one.iops for one in found):13.0f} IOPS"
                for found in figures.values()
            ]
            lines.append(f"{load:28}" + "".join(cells))
    return lines


def compare_tls(file: Path, rounds: int) -> list[str]:
    """Lines of a table: nbdkit with and without TLS, by nbdcopy."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make_certificates(folder, ["127.0.0.1"], SystemClock())
        plain, tls = folder / "plain.sock", folder / "tls.sock"
        security = ("--tls=require", f"--tls-certificates={made.server}", "--tls-verify-peer")
        uris = {
            "plain": f"nbd+unix:///{quote(file.name)}?socket={plain}",
            "TLS": f"nbds+unix://127.0.0.1/{quote(file.name)}?socket={tls}&tls-certificates={made.client}",
        }
        lines = [f"{'':28}" + "".join(f"{key:>18}" for key in uris)]
        with (
            server("nbdkit", "-f", "-U", str(plain), "file", f"dir={file.parent}", ready=plain),
            server("nbdkit", "-f", "-U", str(tls), *security, "file", f"dir={file.parent}", ready=tls),
        ):
            for request_bytes, depth in ((4096, 1), (4096, 8), (1 << 18, 8)):
                figures: dict[str, list[float]] = {key: [] for key in uris}
                for _ in range(rounds):
                    for key, uri in uris.items():
                        figures[key].append(copy_figure(uri, file.stat().st_size, request_bytes, depth).mb_s)
                cells = (f"{statistics.median(found):13.0f} MB/s" for found in figures.values())
                lines.append(f"{f'{request_bytes >> 10}k read in order qd{depth}':28}" + "".join(cells))
    return lines


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--also", action="append", default=[], metavar="NAME=SOCKET:EXPORT")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    also = dict(word.split("=", 1) for word in arguments.also)
    sys.stdout.write("\n".join(compare(arguments.file, also, arguments.rounds)) + "\n\n")
    lines = compare_tls(arguments.file, arguments.rounds)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines.append(f"CPU of servers and clients: {spent.ru_utime + spent.ru_stime:.0f} s")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
