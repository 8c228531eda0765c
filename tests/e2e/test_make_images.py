"""tools/make_images as a user runs it, its disks read by sfdisk, e2fsck and debugfs."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

MAKE_IMAGES = Path(__file__).parents[2] / "tools" / "make_images"
BLOCK = 65536
PARTITION = 1 << 20


def make_images(*arguments: str | Path) -> str:
    done = subprocess.run([sys.executable, MAKE_IMAGES, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def debugfs(image: Path, request: str) -> bytes:
    command = ["debugfs", "-R", request, f"{image}?offset={PARTITION}"]
    return subprocess.run(command, capture_output=True, check=True).stdout


def differing_blocks(old: bytes, new: bytes) -> set[int]:
    assert len(old) == len(new)
    return {at // BLOCK for at in range(0, len(new), BLOCK) if old[at : at + BLOCK] != new[at : at + BLOCK]}


def marked_blocks(text: str) -> set[int]:
    bits = "".join(f"{byte:08b}" for byte in base64.b64decode(text, validate=True))
    return {n for n, bit in enumerate(bits) if bit == "1"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("images")
    assert make_images("tiny", "--cache", cache).strip() == str(cache / "tiny")
    return cache / "tiny"


def test_the_disk_is_small_and_has_one_linux_root_partition(tiny: Path):
    table = json.loads(subprocess.run(["sfdisk", "--json", tiny / "gen1.raw"], capture_output=True, check=True).stdout)
    assert (tiny / "gen1.raw").stat().st_size <= 64 << 20
    assert table["partitiontable"]["label"] == "gpt"
    (partition,) = table["partitiontable"]["partitions"]
    assert partition["start"] * 512 == PARTITION
    assert partition["type"] == "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"


@pytest.mark.parametrize("generation", ["gen1.raw", "gen2.raw"])
def test_e2fsck_finds_nothing_to_mend(tiny: Path, generation: str):
    place = f"{tiny / generation}?offset={PARTITION}"
    done = subprocess.run(["e2fsck", "-fn", place], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_bitmap_and_the_extents_are_exactly_what_differs(tiny: Path):
    old, new = (tiny / "gen1.raw").read_bytes(), (tiny / "gen2.raw").read_bytes()
    changed = differing_blocks(old, new)
    bitmap = (tiny / "gen2.cbt").read_text()
    assert 0 < len(changed) < len(new) // BLOCK // 2
    assert marked_blocks(bitmap) == changed
    assert len(base64.b64decode(bitmap)) == -(-len(new) // BLOCK // 8)
    extents = json.loads((tiny / "gen2.extents.json").read_text())
    assert {n for offset, length in extents for n in range(offset // BLOCK, -(-(offset + length) // BLOCK))} == changed
    assert all(a + b < c for (a, b), (c, _) in itertools.pairwise(extents)), "neighbours are merged"


def test_the_second_generation_is_a_day_in_the_life_of_the_first(tiny: Path, tmp_path: Path):
    log = "/var/log/app/access.log"
    before, after = (debugfs(tiny / name, f"cat {log}") for name in ("gen1.raw", "gen2.raw"))
    assert after.startswith(before)
    assert len(after) > len(before) > 0
    counts = []
    for name in ("gen1.raw", "gen2.raw"):
        (tmp_path / name).write_bytes(debugfs(tiny / name, "cat /var/lib/app/app.db"))
        database = sqlite3.connect(tmp_path / name)
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        counts.append(database.execute("SELECT count(*) FROM history").fetchone()[0])
        database.close()
    assert counts[0] == 0 < counts[1]


def test_the_manifest_tells_size_and_digest_of_every_file(tiny: Path):
    files = json.loads((tiny / "manifest.json").read_text())["files"]
    assert set(files) == {path.name for path in tiny.iterdir()} - {"manifest.json"}
    for name, facts in files.items():
        data = (tiny / name).read_bytes()
        assert (facts["size_bytes"], facts["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_two_runs_make_the_same_bytes_and_a_third_makes_nothing(tiny: Path, tmp_path: Path):
    make_images("tiny", "--cache", tmp_path)
    manifests = [json.loads((place / "manifest.json").read_text()) for place in (tiny, tmp_path / "tiny")]
    digests = [{name: facts["sha256"] for name, facts in manifest["files"].items()} for manifest in manifests]
    assert digests[0] == digests[1]
    assert "there already" in make_images("tiny", "--cache", tmp_path)


def test_a_sparse_disk_mutates_where_its_bitmap_says(tmp_path: Path):
    base, changed, cbt = (tmp_path / name for name in ("base.raw", "changed.raw", "changed.cbt"))
    make_images("sparse", "--size", "256MiB", "--data", "4MiB", "--seed", "5", base)
    assert base.stat().st_size == 256 << 20
    assert base.stat().st_blocks * 512 < 5 << 20
    assert len(differing_blocks(bytes(256 << 20), base.read_bytes())) == 64
    make_images("mutate", base, "--fraction", "0.25", "--seed", "6", "--out", changed, "--cbt", cbt)
    differing = differing_blocks(base.read_bytes(), changed.read_bytes())
    assert len(differing) == 16
    assert marked_blocks(cbt.read_text()) == differing
    make_images("mutate", base, "--fraction", "0.25", "--seed", "6", "--cbt", cbt)
    assert base.read_bytes() == changed.read_bytes()


def test_a_disk_beyond_any_file_is_refused_with_a_reason(tmp_path: Path):
    command = [sys.executable, MAKE_IMAGES, "sparse", "--size", "9000000TiB", "--data", "1MiB", tmp_path / "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "make_images: error:" in done.stderr
    assert "Traceback" not in done.stderr
