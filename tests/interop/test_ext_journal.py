"""The journal's replay against e2fsprogs: debugfs writes it, e2fsck recovers a copy, all blocks are compared."""

from __future__ import annotations

import shutil
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support import linux_images
from tests.support.guest_sources import FileSource, SparseSource
from xbfs_engine.guestfs.base import VolumeState
from xbfs_engine.guestfs.ext.layout import journal_runs, read_superblock
from xbfs_engine.guestfs.ext.log import MAGIC
from xbfs_engine.guestfs.ext.replay import replay

if TYPE_CHECKING:
    from pathlib import Path

MISSING = [tool for tool in ("mkfs.ext4", "debugfs", "e2fsck") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")

BLOCK = 1024
TARGET = 9000
FORMATS = {
    "version 3, 64 bit": (("-O", "64bit,metadata_csum"), "jo -c -v 3"),
    "version 2, 64 bit": (("-O", "64bit,metadata_csum"), "jo -c -v 2"),
    "version 2, 32 bit": (("-O", "^64bit,metadata_csum"), "jo -c -v 2"),
    "no checksums, 64 bit": (("-O", "64bit,^metadata_csum"), "jo"),
    "no checksums, 32 bit": (("-O", "^64bit,^metadata_csum"), "jo"),
    "indirect blocks": (("-O", "^64bit,^metadata_csum,^extents"), "jo"),
}
TRANSACTIONS = (
    # An escaped block among others, blocks written again, revoked, and written after that.
    "jw -b 9000 escaped",
    "jw -b 9001,9002,9003,9004 four",
    "jw -r 9001,9004",
    "jw -b 9002 one",
    "jw -b 9001 one",
    "jw -r 9003",
)


def made(folder: Path, name: str) -> Path:
    options, opening = FORMATS[name]
    image = folder / "image"
    linux_images.make(image, "ext4", "-b", str(BLOCK), "-J", "size=1", *options, size_bytes=16 << 20)
    (folder / "escaped").write_bytes(struct.pack(">I", MAGIC) + b"E" * (BLOCK - 4))
    (folder / "four").write_bytes(b"4" * BLOCK * 4)
    (folder / "one").write_bytes(b"1" * BLOCK)
    script = folder / "script"
    script.write_text("\n".join([opening, *TRANSACTIONS, "jc", "quit"]) + "\n")
    subprocess.run(["debugfs", "-w", "-f", str(script), str(image)], check=True, capture_output=True, cwd=folder)
    return image


def recovered(image: Path) -> SparseSource:
    """What e2fsck makes of a copy."""
    copy = image.with_name("recovered")
    shutil.copyfile(image, copy)
    # 1: errors were corrected.
    assert subprocess.run(["e2fsck", "-fy", "-E", "journal_only", str(copy)], capture_output=True).returncode in (0, 1)
    return SparseSource.of_file(copy)


@pytest.mark.parametrize("name", FORMATS)
def test_every_block_is_as_after_recovery(name: str, tmp_path: Path) -> None:
    image = made(tmp_path, name)
    theirs = recovered(image)
    with FileSource(image) as source:
        result = replay(source)
        assert (result.state, result.transactions, result.blocks) == (VolumeState.REPLAYED, len(TRANSACTIONS), 3)
        sb = read_superblock(source)
        journal = {
            block for run in journal_runs(source, sb) for block in range(run.physical, run.physical + run.blocks)
        }
        for block in range(sb.blocks):
            # Recovery itself changes the superblocks of the filesystem and of the journal.
            if block != 1 and block not in journal:
                ours = result.source.read_at(block * BLOCK, BLOCK)
                assert ours == theirs.read_at(block * BLOCK, BLOCK), block
        assert result.source.read_at(TARGET * BLOCK, 4) == struct.pack(">I", MAGIC)
        # Reads that begin and end within blocks.
        assert result.source.read_at(TARGET * BLOCK + 2, 2000) == theirs.read_at(TARGET * BLOCK + 2, 2000)


@pytest.mark.parametrize(("kind", "transaction", "shown"), [(1, 2, 1), (2, 4, 3), (5, 3, 2), ("data", 2, 1)])
def test_damage_ends_the_replay_before_its_transaction(
    kind: int | str, transaction: int, shown: int, tmp_path: Path
) -> None:
    image = made(tmp_path, "version 3, 64 bit")
    source = SparseSource.of_file(image)
    runs = journal_runs(source, read_superblock(source))
    for run in runs:
        for block in range(run.physical, run.physical + run.blocks):
            head = struct.unpack(">III", source.read_at(block * BLOCK, 12))
            if head == (MAGIC, 1 if kind == "data" else kind, transaction):
                place = (block + (kind == "data")) * BLOCK + 300
                source.write_at(place, bytes([source.read_at(place, 1)[0] ^ 1]))
    result = replay(source)
    assert (result.state, result.transactions) == (VolumeState.DIRTY, shown)
    assert f"transaction {transaction}" in result.reason


def test_a_journal_elsewhere_is_said_to_be_missing(tmp_path: Path) -> None:
    image = made(tmp_path, "no checksums, 32 bit")
    source = SparseSource.of_file(image)
    # s_journal_inum, s_journal_dev.
    source.write_at(1024 + 0xE0, struct.pack("<II", 0, 0x801))
    result = replay(source)
    assert (result.state, result.blocks) == (VolumeState.DIRTY, 0)
    assert "another device" in result.reason
