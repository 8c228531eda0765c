"""Partition tables made by sfdisk, fdisk and sgdisk, and what they say of them, against ours."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.volume_images import BytesSource, by_name, scan
from xbfs_engine.formats.partitions import PartitionTable, read_partitions

if TYPE_CHECKING:
    from pathlib import Path

for tool in ("fdisk", "sfdisk", "sgdisk", "mkfs.ext4"):
    if shutil.which(tool, path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
        pytest.skip(f"{tool} is not installed", allow_module_level=True)

MIB = 1 << 20
GPT = """label: gpt
start=2048,size=2048,name=böot
start=6144,size=4096
start=4096,size=2048,type=E3C9E316-0B5C-4DB8-817D-F92DF00215AE
"""
LOGICAL = """label: dos
start=2048,size=2048,type=83,bootable
start=4096,size=20480,type=5
start=4160,size=2000,type=83
start=8192,size=4096,type=82
start=14336,size=8192,type=8e
start=26624,size=2048,type=7
"""


def run(*command: str | Path, given: str = "") -> str:
    done = subprocess.run(
        [*map(str, command)], input=given, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    return path


def ours(path: Path, sector_bytes: int = 512) -> PartitionTable:
    table = read_partitions(BytesSource(path.read_bytes()), sector_bytes)
    assert table is not None
    return table


def theirs(path: Path) -> set[tuple[int, int, int, str]]:
    """(number, start, size, UUID if the table has them) of each partition that is not extended."""
    table = json.loads(run("sfdisk", "--json", path))["partitiontable"]
    return {
        (
            int(part["node"].removeprefix(str(path)).removeprefix("p")),
            part["start"] * 512,
            part["size"] * 512,
            part.get("uuid", "").lower(),
        )
        for part in table["partitions"]
        if part["type"] not in ("5", "f")
    }


def make_4kn(path: Path, label: str) -> set[tuple[int, int, int]]:
    """A table of a disk with sectors of 4 KiB: (number, start, size) of its partitions, as fdisk lists them."""
    new = "n\np\n" if label == "o" else "n\n"
    script = f"{label}\n{new}\n\n+4M\n{new}\n\n+2M\nw\n"
    run("fdisk", "-b", "4096", "-w", "always", path, given=script)
    listed = run("fdisk", "-b", "4096", "-l", "-o", "Device,Start,Sectors", path)
    rows = [line.split() for line in listed.splitlines() if line.startswith(str(path))]
    return {(int(row[0][len(str(path)) :]), int(row[1]) * 4096, int(row[2]) * 4096) for row in rows}


def comparable(table: PartitionTable) -> set[tuple[int, int, int, str]]:
    is_gpt = table.kind == "gpt"
    return {(p.number, p.start_bytes, p.size_bytes, p.uuid if is_gpt else "") for p in table.partitions}


@pytest.mark.parametrize("script", [GPT, LOGICAL], ids=["gpt", "dos"])
def test_sfdisk_says_the_same(disk: Path, script: str):
    run("sfdisk", "-q", disk, given=script)
    table = ours(disk)
    assert comparable(table) == theirs(disk)
    assert len(table.partitions) >= 3
    assert not table.notes


@pytest.mark.parametrize("label", ["g", "o"])
def test_fdisk_says_the_same_of_sectors_of_4_kib(disk: Path, label: str):
    listed = make_4kn(disk, label)
    table = ours(disk, 4096)
    assert len(listed) == 2
    assert {(part.number, part.start_bytes, part.size_bytes) for part in table.partitions} == listed
    assert table.sector_bytes == 4096


def test_names_and_types_of_a_gpt(disk: Path):
    run("sfdisk", "-q", disk, given=GPT)
    by_number = {part.number: part for part in ours(disk).partitions}
    assert by_number[1].name == "böot"
    assert by_number[3].type_id == "e3c9e316-0b5c-4db8-817d-f92df00215ae"


@pytest.mark.parametrize("sector_bytes", [512, 4096])
def test_the_backup_alone_is_enough(disk: Path, sector_bytes: int):
    if sector_bytes == 512:
        run("sfdisk", "-q", disk, given=GPT)
    else:
        make_4kn(disk, "g")
    whole = ours(disk)
    with disk.open("r+b") as file:
        file.write(bytes(34 * sector_bytes))
    table = ours(disk)
    assert table.partitions == whole.partitions
    assert table.is_backup
    assert "backup" in table.notes[0]


def test_a_hybrid_mbr_gives_way_to_its_gpt(disk: Path):
    run("sfdisk", "-q", disk, given=GPT)
    run("sgdisk", "--hybrid", "1:2", disk)
    table = ours(disk)
    assert table.kind == "gpt"
    assert len(table.partitions) == 3


def test_an_old_gpt_under_a_new_mbr_is_not_used(disk: Path):
    run("sfdisk", "-q", disk, given=GPT)
    whole = disk.read_bytes()
    run("sfdisk", "-q", "--wipe", "always", disk, given=LOGICAL)
    with disk.open("r+b") as file:
        file.seek(512)
        file.write(whole[512 : 34 * 512])
    assert ours(disk).kind == "dos"


def test_a_partition_beyond_the_end_of_the_disk_is_cut_and_says_so(disk: Path):
    run("sfdisk", "-q", disk, given=LOGICAL)
    with disk.open("r+b") as file:
        file.truncate(9 * MIB)
    table = ours(disk)
    problems = {part.number: part.problem for part in table.partitions}
    assert not problems[5]
    assert "ends at byte" in problems[7]
    assert "beyond the disk's end" in problems[3]
    cut = next(part for part in table.partitions if part.number == 7)
    assert cut.start_bytes + cut.size_bytes == 9 * MIB


def test_what_is_on_a_disk_with_sectors_of_4_kib_is_found(disk: Path):
    """An MBR does not say its sector size: what lies on the partitions does."""
    make_4kn(disk, "o")
    run("mkfs.ext4", "-q", "-L", "here", "-E", f"offset={MIB}", disk, "4M")
    found = by_name(scan({0: disk.read_bytes()}))
    assert (found["0p1"].kind, found["0p1"].label, found["0p1"].size_bytes) == ("ext4", "here", 4 * MIB)
