"""Volumes damaged on purpose, with the checksums that belong to them: impossible sizes, cycles, cut off, cut short."""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING

import pytest

from tests.support import guest_golden, guest_walk, xfs_golden, xfs_seal
from tests.support.guest_places import BtrfsPlaces, ExtPlaces, exfat_sets, ntfs_attribute, seal_exfat
from tests.support.guest_tree import content, node_of
from xbfs_engine.core.errors import GuestDamaged, GuestError
from xbfs_engine.guestfs.base import Kind, NodeStat
from xbfs_engine.guestfs.explorer.btrfs import open_btrfs
from xbfs_engine.guestfs.explorer.exfat import open_exfat
from xbfs_engine.guestfs.explorer.ext import open_ext
from xbfs_engine.guestfs.explorer.fat import open_fat
from xbfs_engine.guestfs.explorer.ntfs import open_ntfs
from xbfs_engine.guestfs.xfs.reader import open_xfs

if TYPE_CHECKING:
    from xbfs_engine.guestfs.base import GuestFilesystem, NodeId

SIZES = (1 << 63, (1 << 64) - 1)
READ_BYTES_MAX = 64 << 20


def refuses_size(volume: GuestFilesystem, node: NodeId) -> None:
    for call in (lambda: volume.stat(node), lambda: volume.read(node, 0, 10), lambda: list(volume.extents(node))):
        with pytest.raises(GuestDamaged):
            call()


@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_no_file_has_in_ext4(size: int) -> None:
    source = guest_golden.image("ext4")
    volume = open_ext(source)
    node = node_of(volume, "files/of4096")
    ExtPlaces(source).set_size(volume.stat(node).inode, size)
    refuses_size(open_ext(source), node)


@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_no_file_has_in_xfs(size: int) -> None:
    source = xfs_golden.image("v5")
    node = node_of(open_xfs(source), "files/of4096")
    xfs_seal.change_inode(source, node, 56, struct.pack(">Q", size))
    refuses_size(open_xfs(source), node)


@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_no_file_has_in_btrfs(size: int) -> None:
    source = guest_golden.image("btrfs")
    volume = open_btrfs(source)
    node = node_of(volume, "files/of4096")
    # btrfs_inode_item: generation, transid, size.
    BtrfsPlaces(source).change_item((volume.stat(node).inode, 1, 0), 16, struct.pack("<Q", size))
    refuses_size(open_btrfs(source), node)


@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_no_file_has_in_ntfs(size: int) -> None:
    source = guest_golden.image("ntfs")
    volume = open_ntfs(source)
    node = node_of(volume, "files/of5000")
    source.write_at(ntfs_attribute(source, volume.stat(node).inode, 0x80) + 48, struct.pack("<Q", size))
    refuses_size(open_ntfs(source), node)


@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_no_file_has_in_exfat(size: int) -> None:
    source = guest_golden.image("exfat")
    node = node_of(open_exfat(source), "of4096")
    at = exfat_sets(source)["of4096"]
    source.write_at(at + 32 + 24, struct.pack("<Q", size))
    seal_exfat(source, at)
    refuses_size(open_exfat(source), node)


def test_what_a_file_claims_beyond_the_volume_is_a_hole_or_refused() -> None:
    """As sparse files do: the claim alone costs nothing, and no reader gives fewer bytes than it said."""
    source = guest_golden.image("ext4")
    volume = open_ext(source)
    node = node_of(volume, "files/of4096")
    ExtPlaces(source).set_size(volume.stat(node).inode, 1 << 62)
    volume = open_ext(source)
    source.bytes_read = 0
    assert volume.read(node, (1 << 62) - 5, 100) == bytes(5)
    assert [extent.is_data for extent in volume.extents(node)] == [True, False]
    assert source.bytes_read < READ_BYTES_MAX
    for name, place in (("fat", None), ("exfat", 32 + 8)):
        source = guest_golden.image(name)
        node = node_of(guest_golden.NAMES[name](source), "of4096")
        if place is None:
            index = int.from_bytes(node[4:], "big")
            root = struct.unpack("<H", source.read_at(14, 2))[0] + 2 * struct.unpack("<H", source.read_at(22, 2))[0]
            source.write_at(root * 512 + 32 * index + 28, struct.pack("<I", 0xFFFF_FFFF))
        else:
            at = exfat_sets(source)["of4096"]
            source.write_at(at + place, struct.pack("<Q", 1 << 50))
            source.write_at(at + 32 + 24, struct.pack("<Q", 1 << 50))
            seal_exfat(source, at)
        volume = guest_golden.NAMES[name](source)
        # Those two have no holes.
        with pytest.raises(GuestDamaged):
            volume.read(node, 1 << 30, 10)


def test_a_directory_that_claims_more_than_the_volume_is_refused_at_once() -> None:
    source = guest_golden.image("ext4")
    volume = open_ext(source)
    node = node_of(volume, "dir400")
    ExtPlaces(source).set_size(volume.stat(node).inode, 1 << 40)
    source.bytes_read = 0
    with pytest.raises(GuestDamaged, match="claims"):
        list(open_ext(source).list(node))
    assert source.bytes_read < READ_BYTES_MAX


def test_an_extent_tree_whose_branches_are_all_the_same_is_refused_in_time() -> None:
    """Five levels of blocks that name the next one as often as they can would be 84^5 leaves."""
    source = guest_golden.image("ext4")
    places = ExtPlaces(source)
    volume = open_ext(source)
    node = node_of(volume, "files/of1000003")
    inode = places.inode(volume.stat(node).inode)
    spare = volume.info.size_bytes // places.block - 6
    room = places.block // 12 - 1
    for level in range(5):
        entries = struct.pack("<IIHH", 0, spare + level + 1, 0, 0)
        header = struct.pack("<HHHHI", 0xF30A, room, room, 4 - level, 0)
        source.write_at((spare + level) * places.block, (header + entries * room).ljust(places.block, b"\0"))
    root = struct.pack("<HHHHI", 0xF30A, 4, 4, 5, 0) + struct.pack("<IIHH", 0, spare, 0, 0) * 4
    source.write_at(inode + 0x28, root)
    source.bytes_read = 0
    with pytest.raises(GuestDamaged):
        open_ext(source).read(node, 0, 100)
    assert source.bytes_read < READ_BYTES_MAX


def test_a_map_of_blocks_that_names_itself_is_refused_in_time() -> None:
    source = guest_golden.image("ext3-dirty")
    places = ExtPlaces(source)
    volume = open_ext(source)
    node = node_of(volume, "new/000")
    # The journal has the newest copy of the inode; without it the place on the disk counts.
    flags = struct.unpack("<I", source.read_at(1024 + 0x60, 4))[0]
    source.write_at(1024 + 0x60, struct.pack("<I", flags & ~4))
    inode = places.inode(volume.stat(node).inode)
    spare = volume.info.size_bytes // places.block - 2
    source.write_at(spare * places.block, struct.pack("<I", spare) * (places.block // 4))
    source.write_at(inode, struct.pack("<H", 0o100644) + source.read_at(inode + 2, 2))
    source.write_at(inode + 26, struct.pack("<H", 1))
    places.set_size(volume.stat(node).inode, 1 << 34)
    source.write_at(inode + 0x28, struct.pack("<15I", *[spare] * 15))
    source.bytes_read = 0
    with pytest.raises(GuestDamaged):
        open_ext(source).read(node, 1 << 20, 100)
    assert source.bytes_read < READ_BYTES_MAX


def comes_back(volume: GuestFilesystem, path: str, *names: bytes) -> None:
    """The names lead to where the walk has been: with the same ids each time, so that whoever walks can tell."""
    node = node_of(volume, path)
    seen = []
    for name in names * 4:
        entry = volume.lookup(node, name)
        assert entry is not None
        node = entry.node
        seen.append(node)
    assert len(set(seen)) == len(names)
    assert volume.stat(node).kind is Kind.DIRECTORY


def test_a_directory_that_holds_its_own_parent_in_ext4() -> None:
    source = guest_golden.image("ext4")
    places = ExtPlaces(source)
    volume = open_ext(source)
    names = volume.stat(node_of(volume, "names")).inode
    places.change_entry(names, b"deep", volume.stat(volume.root).inode)
    volume = open_ext(source)
    assert node_of(volume, "names/deep") == volume.root
    comes_back(volume, "names/deep", b"names", b"deep")
    guest_walk.walk(open_ext, source, nodes=300, read_bytes_max=READ_BYTES_MAX)


def test_a_directory_that_holds_its_own_parent_in_xfs() -> None:
    source = xfs_golden.image("v5")
    volume = open_xfs(source)
    names, root = node_of(volume, "names"), volume.root
    deep = node_of(volume, "names/deep")
    for offset, length, place in xfs_seal.metadata(source, 1024, 512):
        data = source.read_at(offset, length)
        if data[:4] in (b"XDB3", b"XDD3") and data[40:48] == names and deep + b"\4deep" in data:
            source.write_at(offset, xfs_seal.sealed(data.replace(deep + b"\4deep", root + b"\4deep"), place))
    assert node_of(open_xfs(source), "names/deep") == root
    comes_back(open_xfs(source), "names/deep", b"names", b"deep")
    guest_walk.walk(open_xfs, source, nodes=300, read_bytes_max=READ_BYTES_MAX)


def test_a_directory_that_holds_itself_in_fat() -> None:
    source = guest_golden.image("fat")
    volume = open_fat(source)
    # The id of what is in a directory begins with the directory's first cluster.
    many = int.from_bytes(node_of(volume, "many/deeper")[:4], "big")
    (at,) = (
        n * 4096 + data.index(b"DEEPER     \x10") for n, data in source.chunks.items() if b"DEEPER     \x10" in data
    )
    source.write_at(at + 26, struct.pack("<H", many))
    comes_back(open_fat(source), "many/deeper", b"deeper")
    guest_walk.walk(open_fat, source, nodes=300, read_bytes_max=READ_BYTES_MAX)


def test_a_subvolume_reached_again_from_below_in_btrfs() -> None:
    """An entry that says it is a subvolume shows nothing unless that subvolume says that it lies there."""
    source = guest_golden.image("btrfs")
    volume = open_btrfs(source)
    names = volume.stat(node_of(volume, "names")).inode
    BtrfsPlaces(source).change_entries(names, b"deep", struct.pack("<QBQ", 5, 132, (1 << 64) - 1))
    volume = open_btrfs(source)
    deep = node_of(volume, "names/deep")
    assert list(volume.list(deep)) == []
    guest_walk.walk(open_btrfs, source, nodes=300, read_bytes_max=READ_BYTES_MAX)


def said(volume: GuestFilesystem) -> dict[str, tuple[NodeStat, str]]:
    """Of each path that can be read: its metadata and, unless it is large, its content."""
    found: dict[str, tuple[NodeStat, str]] = {}
    waiting = [("", volume.root)]
    while waiting:
        path, node = waiting.pop()
        try:
            stat = volume.stat(node)
            small = stat.kind is Kind.FILE and stat.size_bytes < 2 << 20
            found[path] = (stat, hashlib.sha256(content(volume, node)).hexdigest() if small else "")
            if stat.kind is Kind.DIRECTORY:
                waiting += [(f"{path}/{entry.name!r}", entry.node) for entry in volume.list(node)]
        except GuestError:
            continue
    return found


@pytest.mark.parametrize("name", guest_golden.NAMES)
def test_of_a_volume_that_was_cut_off_all_is_right_or_refused(name: str) -> None:
    whole = guest_golden.opened(name)
    known = said(whole)
    source = guest_golden.image(name)
    size = source.size_bytes
    read = 0
    for cut in (size // 3, size * 2 // 3, size - 4096, size - 512):
        source.size_bytes = cut
        try:
            volume = guest_golden.NAMES[name](source)
        except GuestError:
            continue
        ours = said(volume)
        if volume.info.state is whole.info.state:
            assert ours.items() <= known.items()
        read += len(ours)
    assert read > len(known)


@pytest.mark.parametrize("name", guest_golden.NAMES)
def test_what_lies_behind_the_end_of_the_filesystem_changes_nothing(name: str) -> None:
    source = guest_golden.image(name)
    source.write_at(source.size_bytes, b"\xa5" * 1300)
    source.size_bytes += 1300
    volume = guest_golden.NAMES[name](source)
    assert volume.info == guest_golden.opened(name).info
    assert said(volume) == said(guest_golden.opened(name))
