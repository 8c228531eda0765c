"""Images of XFS that were in use when they were copied: what we show is what the kernel's own replay brings."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.support import xfs_images
from tests.support.guest_sources import FileSource
from tests.support.guest_tree import first_difference, kernel_facts, reader_facts
from tests.support.xfs_golden import hidden
from tests.support.xfs_images import pattern
from xbfs_engine.guestfs.base import VolumeState
from xbfs_engine.guestfs.xfs.geometry import parse_superblock
from xbfs_engine.guestfs.xfs.log import Log
from xbfs_engine.guestfs.xfs.reader import open_xfs

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(bool(xfs_images.why_not()), reason=xfs_images.why_not())

SMALL_LOG = ("--unsupported", "-b", "size=1024", "-d", "agcount=1", "-m", "reflink=0,rmapbt=0", "-l", "size=3m")


def compare_with_replay_by_the_kernel(image: Path, point: Path) -> str:
    """Compares everything, and returns the reason our reader gives."""
    replayed = image.with_name("replayed")
    shutil.copy(image, replayed)
    with xfs_images.mounted(replayed, point):
        pass  # replays
    with xfs_images.mounted(replayed, point, "ro") as root:
        kernels = kernel_facts(root, hidden=hidden)
    with FileSource(image) as source:
        volume = open_xfs(source)
        assert volume.info.state is VolumeState.REPLAYED
        assert first_difference(reader_facts(volume), kernels) == ""
        return volume.info.reason


def test_five_hundred_synced_files_in_a_copy_of_a_mounted_image(tmp_path: Path) -> None:
    image, copy, point = tmp_path / "image", tmp_path / "copy", tmp_path / "mount"
    xfs_images.make(image)
    with xfs_images.mounted(image, point) as root:
        for number in range(500):
            with (root / f"file{number}").open("wb") as file:
                file.write(pattern(number))
                file.flush()
                os.fsync(file.fileno())
        shutil.copy(image, copy)
    with FileSource(copy) as source:
        volume = open_xfs(source)
        assert volume.info.state is VolumeState.REPLAYED
        found = {entry.name: volume.read(entry.node, 0, 1000) for entry in volume.list(volume.root)}
    assert found == {b"file%d" % number: pattern(number) for number in range(500)}


@pytest.mark.parametrize(
    ("options", "log_buffers"),
    [((), "logbsize=256k"), (SMALL_LOG, "logbsize=32k"), (("-i", "nrext64=1", "-m", "rmapbt=1"), "logbsize=64k")],
    ids=["large records", "a log that goes round", "64-bit counters"],
)
def test_random_lives_that_stop_at_once(options: tuple[str, ...], log_buffers: str, tmp_path: Path) -> None:
    image, point = tmp_path / "image", tmp_path / "mount"
    xfs_images.make(image, *options)
    reflink = "reflink=0" not in " ".join(options)
    for round_ in range(3):
        with xfs_images.mounted(image, point, log_buffers) as root:
            (root / f"round{round_}").mkdir()
            xfs_images.churn(root / f"round{round_}", round_, 1500 if options == SMALL_LOG else 700, reflink=reflink)
            xfs_images.stop(root, flush_log=bool(round_ % 2))
        # The next round's mount goes on from the log as it is, as after any crash.
        compare_with_replay_by_the_kernel(image, point)
    if options == SMALL_LOG:
        with FileSource(image) as source:
            last = Log(source, parse_superblock(source.read_at(0, 4096))).last
        assert last is not None
        assert last.lsn >> 32 > 1


def test_everything_there_is_just_before_a_crash(tmp_path: Path) -> None:
    image, point = tmp_path / "image", tmp_path / "mount"
    xfs_images.make(image, "-b", "size=1024", "-m", "rmapbt=1", "-n", "size=8192")
    with xfs_images.mounted(image, point) as root:
        xfs_images.populate(root, many=800, deep=800)
        os.sync()
        for name in ("dir40", "dir300", "dir800"):
            for path in list((root / name).iterdir())[::3]:
                path.unlink()
        shutil.rmtree(root / "xattrs")
        xfs_images.stop(root, flush_log=True)
    assert "transactions" in compare_with_replay_by_the_kernel(image, point)
