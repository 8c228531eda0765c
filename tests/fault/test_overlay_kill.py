"""A process that is killed while it writes an overlay: what it flushed is there, the rest is old or new, and it opens.

The kernel lives on, so this tests what the model of power cuts can not: real files, the lock, a real process. A unit
carries the number of the round that wrote it in each of its sectors.
"""

from __future__ import annotations

import os
import random  # noqa: TID251 - seeded
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from tests.support.disks import CHUNK, MemoryDisk
from xbfs.view.overlay import open_overlay

if TYPE_CHECKING:
    from pathlib import Path

UNITS = 64
SIZE = 4 * CHUNK
WRITER = """
import os, random, struct, sys, threading
from pathlib import Path
from tests.support.disks import CHUNK, MemoryDisk
from xbfs.view.overlay import create_overlay, open_overlay

place, seed = Path(sys.argv[1]), int(sys.argv[2])
base = MemoryDisk.full(4 * CHUNK)
overlay = open_overlay(place, base, identity=b"") if place.exists() else create_overlay(place, base, identity=b"")
chance = random.Random(seed)
number = seed * 1_000_000
output = threading.Lock()

def flusher():
    while True:
        seen = number
        overlay.flush()
        os.write(1, struct.pack("<Q", seen))

threading.Thread(target=flusher, daemon=True).start()
while True:
    # Round after round over all units, in any order; a round counts when all of it is acknowledged.
    for unit in chance.sample(range(64), 64):
        if chance.random() < 0.3:
            overlay.discard(unit * 4096, 4096)
        sector = struct.pack("<Q", number + 1).ljust(512, b"s")
        overlay.write_at(unit * 4096 + 512, [sector * 7])
        overlay.write_at(unit * 4096, [sector])
    if chance.random() < 0.1:
        overlay.resize(4 * CHUNK + 4096 * chance.randrange(20))
    number += 1
"""


def rounds(data: bytes) -> list[int]:
    """The rounds that the sectors of a unit carry; 0 for a sector of zeros, -1 for one of the base."""
    found = []
    for at in range(0, len(data), 512):
        sector = data[at : at + 512]
        if sector.endswith(b"s" * 504):
            found.append(struct.unpack_from("<Q", sector)[0])
        else:
            found.append(-1 if any(sector) else 0)
    return found


def test_flushed_rounds_survive_a_kill(tmp_path: Path) -> None:
    chance = random.Random(5)
    base = MemoryDisk.full(SIZE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    for life in range(1, 6):
        command = [sys.executable, "-c", WRITER, tmp_path / "o", str(life)]
        writer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        # Until a round of this life was flushed, however slow the machine is.
        told = writer.stdout.read(8)
        while int.from_bytes(told[-8:], "little") <= life * 1_000_000:
            told += writer.stdout.read(8)
            assert writer.poll() is None, "the writer ended by itself"
        time.sleep(chance.random() / 5)
        writer.kill()
        with writer:
            told += writer.stdout.read()
        assert writer.returncode == -9
        numbers = [number for (number,) in struct.iter_unpack("<Q", told[: len(told) // 8 * 8])]
        flushed = max(numbers)
        with open_overlay(tmp_path / "o", base, identity=b"") as overlay:
            assert overlay.size_bytes >= SIZE
            for unit in range(UNITS):
                data = overlay.read_at(unit * 4096, 4096)
                for number in rounds(data):
                    # Zeros are a discard of a round that was not flushed; the base is no more once anything was.
                    assert number == 0 or number >= flushed, (unit, rounds(data))
            assert overlay.read_at(SIZE, 1 << 20) == bytes(overlay.size_bytes - SIZE)
