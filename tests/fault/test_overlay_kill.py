"""A process that is killed while it writes an overlay: all that it acknowledged is there, and it opens.

The kernel lives on, so this tests what the model of power cuts can not: real files, the lock, a real process.
"""

from __future__ import annotations

import os
import random  # noqa: TID251 - seeded
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import CHUNK, MemoryDisk
from xbfs.view.overlay import open_overlay

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs.view.overlay import Overlay

UNITS = 64
THREADS = 3
BASE = MemoryDisk.full(4 * CHUNK)
SIZE = BASE.size_bytes
WRITER = """
import os, random, struct, sys, threading
from contextlib import suppress
from pathlib import Path
from tests.support.disks import CHUNK, MemoryDisk
from xbfs.view.overlay import create_overlay, freeze_all, open_overlay
from xbfs_engine.core.errors import SessionBusy
from xbfs_engine.core.runtime import SystemClock

place, seed, deeds = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split()
base = MemoryDisk.full(4 * CHUNK)
overlay = open_overlay(place, base, identity=b"") if place.exists() else create_overlay(place, base, identity=b"")
deeds_of = {
    "flush": overlay.flush,
    "freeze": lambda: freeze_all([overlay])[0].close(),
    "grow": lambda: overlay.resize(4 * CHUNK + 4096 * chance.randrange(20)),
    "hydrate": lambda: overlay.hydrate(rate_bytes_s=None, clock=SystemClock(), stop=threading.Event()),
}
chance = random.Random(seed)

def write(own, done):
    mine = random.Random(seed * 100 + own)
    while True:
        unit = mine.randrange(64 // 3) * 3 + own
        number = done[unit] = done.get(unit, 0) + 1
        # Every other change of a unit is a discard, whole or not.
        if number % 2 == 0:
            overlay.discard(unit * 4096, mine.choice((512, 4096)))
        elif mine.random() < 0.5:
            overlay.write_at(unit * 4096, [struct.pack("<Q", number).ljust(512, b"s")])
        else:
            overlay.write_at(unit * 4096, [struct.pack("<Q", number).ljust(512, b"s") * 8])
        os.write(1, struct.pack("<QQ", unit, number))

started = [dict(zip(range(own, 64, 3), map(int, sys.argv[4].split(",")[own::3]))) for own in range(3)]
for own, done in enumerate(started):
    threading.Thread(target=write, args=(own, done), daemon=True).start()
while True:
    with suppress(SessionBusy):
        deeds_of[chance.choice(deeds)]() if deeds else threading.Event().wait()
"""


def shown(overlay: Overlay, unit: int) -> int | None:
    """The number of the change that wrote a unit's first sector; 0 if it is zeros, None if it is the base's."""
    sector = overlay.read_at(unit * 4096, 512)
    if sector.endswith(b"s" * 504):
        return int(struct.unpack_from("<Q", sector)[0])
    return 0 if not any(sector) else None


@pytest.mark.parametrize("deeds", ["", "flush", "flush freeze grow", "hydrate flush"])
def test_what_was_acknowledged_survives_a_kill(tmp_path: Path, deeds: str) -> None:
    chance = random.Random(5)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    done = [0] * UNITS
    for life in range(1, 6):
        command = [sys.executable, "-c", WRITER, tmp_path / "o", str(life), deeds, ",".join(map(str, done))]
        writer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        told = writer.stdout.read(16 * chance.randrange(1, 400))
        writer.kill()
        with writer:
            told += writer.stdout.read()
        assert writer.returncode == -9
        for unit, number in struct.iter_unpack("<QQ", told[: len(told) // 16 * 16]):
            assert number == done[unit] + 1
            done[unit] = number
        with open_overlay(tmp_path / "o", BASE, identity=b"") as overlay:
            underway = 0
            for unit in range(UNITS):
                found, last = shown(overlay, unit), done[unit]
                if found != (None if last == 0 else last * (last % 2)):
                    # One change of each thread may have been made and not told of.
                    underway += 1
                    assert found == (last + 1) * ((last + 1) % 2), (unit, found, last)
                    done[unit] = last + 1
            assert underway <= THREADS
            assert overlay.read_at(SIZE, 1 << 20) == bytes(overlay.size_bytes - SIZE)
