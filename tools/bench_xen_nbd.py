"""Section "nbd" of bench_xen: our NBD client against nbdcopy, both throwing away what nbdkit serves from memory.

Run with arguments it is the client that is measured: it reads as a backup does, announced and from two threads.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchlib import Cost, median, run, table, verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xbfs_engine.source.nbd import NbdDisk, NbdTarget

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
STEP = 4 * MIB
BLOCK = 64 << 10
"""Scattered reads take every second one, as a delta may look."""
READERS = 2
CONNECTIONS = (1, 4)
"""One, as a host serves it best; four, which is what nbdcopy takes by itself."""


@contextmanager
def _server(disk: Path, pki: Path | None) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    tls = ["--tls=require", f"--tls-certificates={pki}"] if pki else []
    command = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), *tls, "file", str(disk)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait()


def _certificate(pki: Path) -> None:
    """Signed by itself, for the address too: nbdcopy knows the server by nothing else."""
    pki.mkdir()
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(pki / "server-key.pem"), "-out", str(pki / "server-cert.pem")]
    subprocess.run([*command, *files], check=True, capture_output=True)
    (pki / "ca-cert.pem").write_bytes((pki / "server-cert.pem").read_bytes())


def measure(work: Path, rounds: int, size_mib: int) -> list[list[str]]:
    """All tools in turn, ``rounds`` times; returns the targets."""
    _certificate(work / "pki")
    disk = work / "disk.raw"
    with disk.open("wb") as file, Path("/dev/urandom").open("rb") as noise:
        for _ in range(size_mib):
            file.write(noise.read(MIB))
    costs: dict[str, list[Cost]] = defaultdict(list)
    scattered: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        print(f"nbd: round {number + 1}/{rounds}", file=sys.stderr)
        for kind in ("tls", "plain"):
            pki = work / "pki" if kind == "tls" else None
            with _server(disk, pki) as port:
                for connections in CONNECTIONS:
                    for tool, command in _commands(port, pki, connections, size_mib):
                        costs[f"{tool}, {kind}, {connections}"].append(_cost(command, work / "figures"))
                command = [*_own(port, pki, max(CONNECTIONS), size_mib), "scattered"]
                scattered[kind].append(_cost(command, work / "figures").cpu_s / (size_mib * MIB // (2 * BLOCK)))
    rows = _report(costs, size_mib)
    told = "; ".join(f"{kind}: {median(each) * 1e6:.0f} us" for kind, each in scattered.items())
    print(f"xbfs, CPU per scattered block of 64 KiB, {max(CONNECTIONS)} connections: {told}", end="\n\n")
    return rows


def _cost(command: list[str], figures: Path) -> Cost:
    """Our client says itself what it took from connecting to the last byte; for nbdcopy it is the whole process."""
    cost = run(command, env={"PYTHONPATH": str(ROOT / "engine"), "OPENBLAS_NUM_THREADS": "1"}, stdout=figures)
    said = figures.read_text().split()
    return Cost(float(said[0]), float(said[1]), cost.peak_mib) if said else cost


def _commands(port: int, pki: Path | None, connections: int, size_mib: int) -> Iterator[tuple[str, list[str]]]:
    query = f"?tls-certificates={pki}" if pki else ""
    source = f"{'nbds' if pki else 'nbd'}://127.0.0.1:{port}/{query}"
    yield "xbfs", _own(port, pki, connections, size_mib)
    yield "nbdcopy", ["nbdcopy", f"--connections={connections}", source, "null:"]


def _own(port: int, pki: Path | None, connections: int, size_mib: int) -> list[str]:
    certificate = str(pki / "ca-cert.pem") if pki else ""
    return [str(ROOT / ".venv/bin/python"), __file__, str(port), certificate, str(connections), str(size_mib)]


def _report(costs: dict[str, list[Cost]], size_mib: int) -> list[list[str]]:
    def speed(name: str) -> float:
        return median([size_mib * MIB / 1e6 / cost.wall_s for cost in costs[name]])

    def ratio(case: str) -> float:
        pairs = zip(costs[f"nbdcopy, {case}"], costs[f"xbfs, {case}"], strict=True)
        return median([theirs.wall_s / ours.wall_s for theirs, ours in pairs])

    def cpu_ratio(case: str) -> float:
        pairs = zip(costs[f"nbdcopy, {case}"], costs[f"xbfs, {case}"], strict=True)
        return median([ours.cpu_s / theirs.cpu_s for theirs, ours in pairs])

    rows = [
        [
            name,
            f"{speed(name):.0f}",
            f"{median([c.cpu_s for c in done]):.2f}",
            f"{median([c.peak_mib for c in done]):.0f}",
        ]
        for name, done in sorted(costs.items())
    ]
    table(["tool, transport, connections", "MB/s", "CPU s", "peak MiB"], rows)
    cases = [f"{kind}, {connections}" for kind in ("tls", "plain") for connections in CONNECTIONS]
    print("CPU, ours / nbdcopy:", "; ".join(f"{case}: {cpu_ratio(case):.2f}" for case in cases), end="\n\n")
    limits = {"tls": 0.9, "plain": 0.6}
    return [
        verdict(f"NBD MB/s, {case}: ours / nbdcopy", ratio(case), limits[case.split(",")[0]], at_least=True)
        for case in cases
    ]


def _read(disk: NbdDisk, size_bytes: int, *, scattered: bool) -> list[threading.Thread]:
    """Threads that read all of the disk in order, as the workers of a backup take their segments; or only blocks."""
    reads = [(offset, min(STEP, size_bytes - offset)) for offset in range(0, size_bytes, STEP)]
    if scattered:
        reads = [(offset, BLOCK) for offset in range(0, size_bytes, 2 * BLOCK)]
    disk.read_ahead(iter(reads))
    rest, lock = iter(reads), threading.Lock()

    def work() -> None:
        buffer = memoryview(bytearray(STEP))
        while True:
            with lock:
                read = next(rest, None)
            if read is None:
                return
            disk.read_into(read[0], buffer[: read[1]])

    threads = [threading.Thread(target=work) for _ in range(READERS)]
    for thread in threads:
        thread.start()
    return threads


async def _client(port: int, certificate: str, connections: int, size_bytes: int, *, scattered: bool) -> None:
    import trio

    from xbfs_engine.source.nbd import HostBudget, NbdTarget, TlsPolicy, open_nbd_disk

    wall, cpu = time.perf_counter(), time.process_time()
    tls = TlsPolicy(Path(certificate).read_text(), "localhost") if certificate else None  # noqa: ASYNC240

    async def targets() -> Sequence[NbdTarget]:
        return [NbdTarget("127.0.0.1", port, "", tls, "server")]

    async with open_nbd_disk(targets, HostBudget(), connections=connections, size_bytes=size_bytes) as disk:
        for thread in _read(disk, size_bytes, scattered=scattered):
            await trio.to_thread.run_sync(thread.join)
    print(time.perf_counter() - wall, time.process_time() - cpu)


if __name__ == "__main__":
    import trio

    trio.run(
        partial(
            _client,
            int(sys.argv[1]),
            sys.argv[2],
            int(sys.argv[3]),
            int(sys.argv[4]) * MIB,
            scattered=sys.argv[5:] == ["scattered"],
        )
    )
