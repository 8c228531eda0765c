"""Memory of a run does not grow with the disk: 16 TiB, sparse, data scattered all over it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RSS_MAX_MIB = 200
"""Measured with two workers: 168 for the full run, 195 after an incremental one in the same process."""
ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, sys
from pathlib import Path
from tests.support.engine import CHEAP_KDF, CHUNK, Engine, MemorySource, pattern
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.storage.local import LocalStorage
from xbfs_engine.store.repository import create_repository

SIZE, COUNT = 16 << 40, int(sys.argv[2])
STEP = SIZE // COUNT // CHUNK * CHUNK

class Scattered(MemorySource):
    def __init__(self, salt):
        super().__init__(SIZE, {})
        self.salt = salt
    def data_extents(self):
        return ((number * STEP, CHUNK) for number in range(COUNT))
    def read_into(self, offset, view):
        # Most compresses to nothing, so that ordinals and dictionaries grow; some not at all, so that packs fill.
        view[:] = pattern(offset // STEP) if offset // STEP % 25 == 0 else bytes(len(view))
        view[100:116] = (offset ^ self.salt << 60).to_bytes(16, "little")

def peak_mib():
    # Not getrusage: that remembers the process which started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10

folder = Path(sys.argv[1])
found = {"start": peak_mib()}
storage = LocalStorage(folder / "repository")
created = create_repository(storage, system_runtime(), passphrase="x", label="", kdf=CHEAP_KDF)
engine = Engine.of(created.repository, folder / "cache")
point = engine.backup(Scattered(1))
found["full"] = peak_mib()
changed = [(number * STEP, CHUNK) for number in range(0, COUNT, 10)]
later = engine.backup(Scattered(2), changed=changed)
found["incremental"] = peak_mib()
found["new"] = [each.disks[0].statistics.new_bytes // CHUNK for each in (point, later)]
found["metadata_bytes"] = [each.run.metadata_bytes for each in (point, later)]
leaves = sum(1 for _ in engine.block_map(later.disks[0]).leaves())
found["leaves"], found["walk"] = leaves, peak_mib()
print(json.dumps(found))
"""


def measure(folder: Path, chunks: int) -> dict[str, int | list[int]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(chunks)],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}/engine:{ROOT}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int | list[int]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_a_run_over_16_tib_stays_within_its_memory(tmp_path: Path) -> None:
    found = measure(tmp_path, 150_000)
    assert found["new"] == [150_000, 15_000]
    assert found["leaves"] == 150_000
    for stage in ("full", "incremental", "walk"):
        assert found[stage] <= RSS_MAX_MIB, found  # type: ignore[operator]  # a number of MiB
