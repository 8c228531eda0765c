"""The log of XFS: what is shown when it can be replayed, when it can not, and when a change was under way."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from tests.support import xfs_golden, xfs_log
from tests.support.guest_tree import first_difference, node_of, reader_facts
from tests.support.xfs_images import pattern
from xbfs_engine.core.errors import GuestUnsupported
from xbfs_engine.guestfs.base import VolumeState
from xbfs_engine.guestfs.xfs import overlay, replay
from xbfs_engine.guestfs.xfs.geometry import parse_superblock
from xbfs_engine.guestfs.xfs.log import Log
from xbfs_engine.guestfs.xfs.reader import open_xfs

if TYPE_CHECKING:
    from tests.support.guest_sources import SparseSource
    from xbfs_engine.guestfs.base import NodeId
    from xbfs_engine.guestfs.xfs.log import Record
    from xbfs_engine.guestfs.xfs.reader import XfsReader

CLEAN = open_xfs(xfs_golden.image("v5"))
REMAP, REMAP_DONE, ATTRIBUTE, EXCHANGE = 0x1244, 0x1245, 0x1246, 0x1248


def log_of(source: SparseSource) -> Log:
    return Log(source, parse_superblock(source.read_at(0, 512)))


def records_of(source: SparseSource) -> list[Record]:
    return [record for record, _ in log_of(source).records()]


def damage(source: SparseSource, record: Record) -> None:
    at = xfs_log.log_place(source) + (record.sector + record.header_sectors) * 512 + 20
    source.write_at(at, bytes([source.read_at(at, 1)[0] ^ 1]))


def synced(volume: XfsReader) -> int:
    """How many of the files that were synced are there with their content, counted from the first."""
    folder = volume.lookup(volume.root, b"synced")
    if folder is None:
        return 0
    for number in range(500):
        entry = volume.lookup(folder.node, b"file%d" % number)
        if entry is None or volume.read(entry.node, 0, 1000) != pattern(number):
            return number
    return 500


def test_all_that_was_synced_appears() -> None:
    source = xfs_golden.image("dirty")
    pristine = source.copy()
    volume = open_xfs(source)
    assert volume.info.state is VolumeState.REPLAYED
    assert "replayed in memory" in volume.info.reason
    assert synced(volume) == 500
    assert [volume.lookup(volume.root, name) for name in (b"renamed-from", b"deleted")] == [None, None]
    assert volume.lookup(volume.root, b"renamed-to") is not None
    assert source.chunks == pristine.chunks


def test_it_is_what_the_kernels_replay_gives() -> None:
    assert first_difference(reader_facts(open_xfs(xfs_golden.image("dirty"))), xfs_golden.facts("dirty")) == ""


def test_a_torn_record_at_the_head_is_where_the_log_ends() -> None:
    source = xfs_golden.image("dirty")
    records = records_of(source)
    damage(source, records[-5])
    assert records_of(source) == records[:-5]
    volume = open_xfs(source)
    assert volume.info.state is VolumeState.REPLAYED
    assert 490 <= synced(volume) < 500


def test_a_hole_before_the_head_is_where_the_log_ends() -> None:
    source = xfs_golden.image("dirty")
    records = records_of(source)
    lost = records[-4]
    source.write_at(xfs_log.log_place(source) + lost.sector * 512, bytes(lost.sectors * 512))
    assert records_of(source) == records[:-4]


def test_damage_further_back_leaves_the_volume_dirty_and_says_so() -> None:
    source = xfs_golden.image("dirty")
    lost = records_of(source)[40]
    damage(source, lost)
    info = open_xfs(source).info
    assert info.state is VolumeState.DIRTY
    assert f"the record at sector {lost.sector}" in info.reason


def test_a_log_without_any_record_leaves_the_volume_dirty() -> None:
    source = xfs_golden.image("dirty")
    start, sectors = xfs_log.log_place(source), log_of(source).sectors
    for sector in range(sectors):
        source.write_at(start + sector * 512, b"\0\0\0\1")
    info = open_xfs(source).info
    assert (info.state, "no sound record" in info.reason) == (VolumeState.DIRTY, True)


@pytest.mark.parametrize(("module", "limit"), [(replay, "PENDING_BYTES_MAX"), (overlay, "_BYTES_MAX")])
def test_what_would_take_too_much_memory_is_not_replayed(
    module: object, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, limit, 100_000)
    volume = open_xfs(xfs_golden.image("dirty"))
    assert volume.info.state is VolumeState.DIRTY
    assert "MiB" in volume.info.reason
    assert synced(volume) == 0


def node_at(path: str) -> NodeId:
    return node_of(CLEAN, path)


def inode_of(path: str) -> int:
    return CLEAN.stat(node_at(path)).inode


def remap(number: int, inode: int) -> bytes:
    return struct.pack("<HHIQ", REMAP, 0, 1, number) + struct.pack("<3Q2I", inode, 50, 0, 1, 0)


def opened_with(*items: list[bytes]) -> XfsReader:
    source = xfs_golden.image("v5")
    xfs_log.append(source, xfs_log.transaction(items))
    return open_xfs(source)


def test_a_file_whose_change_was_under_way_is_refused_and_no_other() -> None:
    changed, other = node_at("files/clone"), node_at("files/of4096")
    volume = opened_with([remap(77, inode_of("files/clone"))])
    assert volume.info.state is VolumeState.REPLAYED
    assert "1 files were under way" in volume.info.reason
    assert volume.stat(changed) == CLEAN.stat(changed)
    for call in (lambda: volume.read(changed, 0, 1), lambda: list(volume.extents(changed))):
        with pytest.raises(GuestUnsupported, match="under way"):
            call()
    assert volume.read(other, 0, 5000) == pattern(4096)


def test_a_change_that_was_done_refuses_nothing() -> None:
    done = struct.pack("<HHIQ", REMAP_DONE, 0, 0, 77)
    volume = opened_with([remap(77, inode_of("files/clone"))], [done])
    assert len(volume.read(node_at("files/clone"), 0, 5000)) == 5000


def test_attributes_and_exchanges_under_way_are_refused_but_not_back_references() -> None:
    def attribute(operation: int, path: str) -> bytes:
        return struct.pack("<HHIQQIIII", ATTRIBUTE, 0, 0, 5, inode_of(path), operation, 0, 0, 0)

    exchange = struct.pack("<HHIQQQ", EXCHANGE, 0, 0, 6, inode_of("files/of1"), inode_of("files/of511")) + bytes(64)
    volume = opened_with([attribute(1, "xattrs/few")], [exchange])
    for call in (
        lambda: list(volume.xattrs(node_at("xattrs/few"))),
        lambda: volume.read(node_at("files/of1"), 0, 1),
        lambda: volume.read(node_at("files/of511"), 0, 1),
    ):
        with pytest.raises(GuestUnsupported, match="under way"):
            call()
    volume = opened_with([attribute(4, "xattrs/few")])
    assert len(list(volume.xattrs(node_at("xattrs/few")))) == 4


def test_items_that_are_not_known_leave_the_volume_dirty() -> None:
    info = opened_with([struct.pack("<HHII", 0x1300, 0, 0, 0)]).info
    assert (info.state, "0x1300" in info.reason) == (VolumeState.DIRTY, True)


def test_a_transaction_without_its_end_changes_nothing() -> None:
    source = xfs_golden.image("v5")
    xfs_log.append(source, xfs_log.transaction([[remap(77, inode_of("files/clone"))]])[:-1])
    volume = open_xfs(source)
    assert volume.info.state is VolumeState.REPLAYED
    assert len(volume.read(node_at("files/clone"), 0, 10)) == 10
