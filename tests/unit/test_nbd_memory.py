"""Memory of reading over NBD does not grow with the disk, the connections, or the number of reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RSS_MAX_MIB = 56
"""Measured 46: the ring of 32, two buffers of 4 of the readers, records of TLS, and the server in the same process."""
ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, trio
from pathlib import Path
from tests.support.nbd_certificates import HOST_NAME, identity
from tests.support.nbd_poor import PoorServer
from tests.support.nbd_reading import opened
from tests.support.nbd_servers import target
from functools import partial
import threading

SIZE = 256 << 20

def peak_mib():
    # Not getrusage: that remembers the process which started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10

async def main():
    server = identity(HOST_NAME)
    disk = bytes(SIZE)
    with PoorServer({"": disk}, server) as poor:
        async with opened(SIZE, target(poor.port, server), connections=1) as source:
            await trio.to_thread.run_sync(source.read_into, 0, memoryview(bytearray(512)))
        before = peak_mib()
        for step in (64 << 10, 4 << 20):
            async with opened(SIZE, target(poor.port, server), connections=4) as source:
                reads = [(offset, step) for offset in range(0, SIZE, step)]
                source.read_ahead(iter(reads))
                rest, lock = iter(reads), threading.Lock()
                def work():
                    buffer = memoryview(bytearray(step))
                    while True:
                        with lock:
                            read = next(rest, None)
                        if read is None:
                            return
                        source.read_into(read[0], buffer)
                async with trio.open_nursery() as nursery:
                    for _ in range(2):
                        nursery.start_soon(trio.to_thread.run_sync, work)
        print(json.dumps(peak_mib() - before))

trio.run(main)
"""


def test_memory_is_bounded() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}/engine:{ROOT}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) <= RSS_MAX_MIB
