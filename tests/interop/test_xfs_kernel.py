"""Our reader against the kernel's: fresh images of several geometries, every fact of every path the same."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support import xfs_images
from tests.support.guest_sources import FileSource
from tests.support.guest_tree import first_difference, kernel_facts, reader_facts
from tests.support.xfs_golden import hidden
from xbfs_engine.guestfs.xfs.reader import open_xfs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from xbfs_engine.guestfs.base import NodeId
    from xbfs_engine.guestfs.xfs.reader import XfsReader

pytestmark = pytest.mark.skipif(bool(xfs_images.why_not()), reason=xfs_images.why_not())

GEOMETRIES = {
    "small blocks, large directory blocks": ("-b", "size=1024", "-n", "size=8192", "-m", "rmapbt=1"),
    "64-bit extent counters": ("-i", "nrext64=1,size=2048", "-n", "size=65536"),
    "old times": ("-b", "size=2048", "-m", "reflink=0,bigtime=0,finobt=0", "-i", "size=1024,sparse=0"),
    "4096-byte sectors": ("-m", "bigtime=0,rmapbt=1", "-s", "size=4096", "-d", "agcount=3"),
    "64 KiB blocks": ("-b", "size=65536"),
}


@contextmanager
def compared(image: Path, point: Path) -> Iterator[XfsReader]:
    with xfs_images.mounted(image, point, "ro") as root:
        kernels = kernel_facts(root, hidden=hidden)
    with FileSource(image) as source:
        volume = open_xfs(source)
        assert first_difference(reader_facts(volume), kernels) == ""
        yield volume


@pytest.mark.parametrize("name", GEOMETRIES)
def test_everything_is_as_the_kernel_sees_it(name: str, tmp_path: Path) -> None:
    options = GEOMETRIES[name]
    image, point = tmp_path / "image", tmp_path / "mount"
    xfs_images.make(image, *options)
    with xfs_images.mounted(image, point) as root:
        joined = " ".join(options)
        xfs_images.populate(root, bigtime="bigtime=0" not in joined, reflink="reflink=0" not in joined, many=1500)
    with compared(image, point):
        pass


def test_birth_times_are_the_kernels(tmp_path: Path) -> None:
    image, point = tmp_path / "image", tmp_path / "mount"
    xfs_images.make(image)
    with xfs_images.mounted(image, point) as root:
        for number in range(20):
            (root / str(number)).mkdir()
        births = {str(number): xfs_images.birth_ns(root / str(number)) for number in range(20)}
    with FileSource(image) as source:
        volume = open_xfs(source)
        assert {e.name.decode(): volume.stat(e.node).btime_ns for e in volume.list(volume.root)} == births


@pytest.mark.slow
def test_a_hundred_thousand_names(tmp_path: Path) -> None:
    image, point = tmp_path / "image", tmp_path / "mount"
    xfs_images.make(image, "-i", "maxpct=50", size_bytes=1 << 30)
    with xfs_images.mounted(image, point) as root:
        (root / "many").mkdir()
        for number in range(100_000):
            (root / "many" / f"name of entry {number}").touch()
        for number in range(0, 100_000, 3):
            (root / "many" / f"name of entry {number}").unlink()
    with compared(image, point) as volume:
        many = volume.lookup(volume.root, b"many")
        assert many is not None
        entries = list(volume.list(many.node))
        assert len(entries) == 66_666
        assert [volume.lookup(many.node, entry.name) for entry in entries[::9]] == entries[::9]
        assert [*_paged(volume, many.node)] == entries


def _paged(volume: XfsReader, node: NodeId) -> Iterator[tuple[object, ...]]:
    """The listing in pages of 1000, each resumed by cookie."""
    cookie = 0
    while page := [entry for entry, _ in zip(volume.list(node, cookie), range(1000), strict=False)]:
        yield from page
        cookie = page[-1].cookie
