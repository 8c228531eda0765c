"""The tree as a pure function of restore points: every inode can be found from nothing, nothing needs storage."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.support.points import SECOND_NS, disk, point
from xbfs.vfs import inodes
from xbfs.vfs.images import ImageFormat, image_size
from xbfs.vfs.points import Points
from xbfs.vfs.tree import Kind, Tree
from xbfs_engine.catalog.catalog import DamagedPoint
from xbfs_engine.core.errors import ManifestCorrupt
from xbfs_engine.core.ids import PointId
from xbfs_engine.core.limits import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

BROKEN = DamagedPoint(PointId("d" * 64), ManifestCorrupt("restore point dddd: its signature does not hold"))


def tree_of(points: Points) -> Tree:
    tree = Tree(lambda: b"{}", lambda: b"xbfs 1\n")
    tree.points = points
    return tree


def sample() -> Points:
    return Points(
        [
            point("web", uuid="u", time_ns=10 * SECOND_NS, disks=[disk(3), disk(0, 5000 * GIB, b"\0" * 640000)]),
            point("web", uuid="u", time_ns=20 * SECOND_NS, disks=[disk(0, 0)]),
            point("db", uuid="v", time_ns=15 * SECOND_NS),
        ],
        [BROKEN],
    )


def walk(tree: Tree, directory: int = inodes.ROOT, path: str = "") -> Iterator[tuple[str, int]]:
    for name, inode in tree.entries(directory) or ():
        yield f"{path}{name}", inode
        if tree.entries(inode) is not None:
            yield from walk(tree, inode, f"{path}{name}/")


def resolve(tree: Tree, path: str) -> int:
    inode = inodes.ROOT
    for name in path.split("/"):
        found = tree.lookup(inode, name)
        assert found is not None, path
        inode = found.inode
    return inode


def test_everything_listed_is_found_by_name_and_has_attributes() -> None:
    tree = tree_of(sample())
    listed = list(walk(tree))
    assert len(listed) == len(dict(listed)) > 30
    for path, inode in listed:
        assert resolve(tree, path) == inode
        attributes = tree.attributes(inode)
        assert attributes is not None, path
        assert attributes.inode == inode
        assert (attributes.kind is Kind.DIRECTORY) == (tree.entries(inode) is not None)
        assert (attributes.kind is Kind.LINK) == (tree.target(inode) is not None)


def test_dot_and_dot_dot_of_every_inode_from_nothing() -> None:
    """After a restart an NFS client may ask for any of them first."""
    points = sample()
    for path, inode in walk(tree_of(points)):
        tree = tree_of(points)
        here = tree.lookup(inode, ".")
        assert here is not None
        assert here.inode == inode
        above = tree.lookup(inode, "..")
        assert above is not None, path
        assert above.kind is Kind.DIRECTORY
        if not path.startswith("at/"):  # those are links that several directories show
            assert inode in dict(tree.entries(above.inode) or ()).values(), path


def test_links_lead_to_directories_of_the_tree() -> None:
    tree = tree_of(sample())
    for path, inode in walk(tree):
        target = tree.target(inode)
        if target is not None:
            parts = path.split("/")[:-1]
            for part in target.split("/"):
                parts = parts[:-1] if part == ".." else [*parts, part]
            found = tree.attributes(resolve(tree, "/".join(parts)))
            assert found is not None
            assert found.kind is Kind.DIRECTORY


def test_only_what_may_change_is_unsettled() -> None:
    tree = tree_of(sample())
    changing = set()
    for path, inode in walk(tree):
        attributes = tree.attributes(inode)
        assert attributes is not None
        if not attributes.settled:
            changing.add(path)
    growing = {"vms", "by-id", "at", "live", ".xbfs", "vms/web", "vms/db", "vms/web/latest", "vms/db/latest"}
    live = {".xbfs/status.json", ".xbfs/metrics"}
    live |= {path for path, _ in walk(tree) if path.endswith("/report.json")}
    assert changing == growing | live | {f"at/1970-01-01T0000{second}Z" for second in (10, 15, 20)}


def test_a_disk_too_big_for_a_vhd_shows_the_reason() -> None:
    tree = tree_of(sample())
    disks = resolve(tree, "vms/web/1970-01-01T000010Z/disks")
    assert [name for name, _ in tree.entries(disks) or ()] == ["0.raw", "0.vhd.unavailable.txt", "3.raw", "3.vhd"]
    text = tree.text(resolve(tree, "vms/web/1970-01-01T000010Z/disks/0.vhd.unavailable.txt"))
    assert text is not None
    assert b"2040 GiB" in text
    assert tree.lookup(disks, "0.vhd") is None
    assert tree.lookup(disks, "1.raw") is None


def test_a_damaged_manifest_has_a_file_with_its_reason() -> None:
    tree = tree_of(sample())
    text = tree.text(resolve(tree, f"by-id/{BROKEN.id}.error.txt"))
    assert text is not None
    assert text.decode().splitlines() == [BROKEN.problem.message, BROKEN.problem.hint]
    assert tree.lookup(inodes.BY_ID, BROKEN.id) is None


@pytest.mark.parametrize(
    "inode",
    [
        0,
        9,
        255,
        inodes.make(12345, 0),
        (1 << 62) - 1,
        inodes.time_inode(5, 7),
        (1 << 64) - 1,
        inodes.make((1 << 46) - 1, 0xFFFF),
    ],
)
def test_numbers_of_nothing_are_nothing(inode: int) -> None:
    tree = tree_of(sample())
    for answer in (tree.entries(inode), tree.target(inode), tree.text(inode), tree.image(inode)):
        assert answer is None
    assert tree.attributes(inode) is None
    assert tree.lookup(inode, "x") is None
    assert tree.lookup(inode, ".") is None
    assert tree.lookup(inode, "..") is None
    assert tree.extended(inode) == {}


def test_codes_that_an_owner_does_not_have_are_nothing() -> None:
    points = sample()
    tree = tree_of(points)
    valid = {inode for _, inode in walk(tree)}
    for owner in points.owners:
        for code in range(600):
            inode = inodes.make(owner, code)
            assert (tree.attributes(inode) is not None) == (inode in valid), (owner, code)


def test_texts_are_the_same_every_time() -> None:
    made = point("web", disks=[disk(0)])
    made.vm.update({"record": b"\0\xff", "nested": {"list": [1, None, "x"]}, "archive": bytes(5000)})
    tree = tree_of(Points([made]))
    for name in ("vm.json", "report.json"):
        inode = resolve(tree, f"vms/web/1970-01-01T001640Z/{name}")
        text = tree.text(inode)
        attributes = tree.attributes(inode)
        assert text is not None
        assert attributes is not None
        assert attributes.size_bytes == len(text)
        assert json.loads(text)["id"] == made.id
    assert json.loads(tree.text(resolve(tree, "vms/web/1970-01-01T001640Z/vm.json")) or b"")["vm"] == {
        "record": "AP8=",
        "nested": {"list": [1, None, "x"]},
        "archive": {"size_bytes": 5000},
    }


@pytest.mark.parametrize(
    ("size", "mibs", "blocks"),
    [(0, [], 0), (1, [0], 1), (5 * MIB, [1, 4], 2), (4 * MIB, [2, 3], 1), (7 * MIB + 1, [0, 7], 2), (8 * MIB, [], 0)],
)
def test_sizes_follow_from_the_manifest(size: int, mibs: list[int], blocks: int) -> None:
    bits = np.zeros(8 * -(-size // (8 * MIB)), np.bool_)
    bits[mibs] = True
    record = disk(0, size, np.packbits(bits).tobytes())
    assert image_size(record, ImageFormat.RAW) == (size, min(len(mibs) * MIB, size))
    vhd_size, allocated = image_size(record, ImageFormat.VHD)
    assert vhd_size > blocks * 2 * MIB
    assert vhd_size - allocated == max(blocks * 2 * MIB - record.data_bytes, 0)
