"""A guest as a whole: volumes, pages of listings, and errors that stay with one volume."""

from __future__ import annotations

import pytest

from tests.support import guest_golden, xfs_golden
from tests.support.volume_images import BytesSource, golden_disks
from xbfs_engine.core.errors import GuestError, GuestNotFound
from xbfs_engine.guestfs import reading
from xbfs_engine.guestfs.base import Kind
from xbfs_engine.guestfs.reading import GuestReading
from xbfs_engine.guestfs.volumes import Disk, VolumeStatus


def guest_of_all() -> GuestReading:
    """One guest with a disk of each kind, and one of which a volume group is only a part."""
    disks = [Disk(str(number), guest_golden.image(name)) for number, name in enumerate(guest_golden.NAMES)]
    disks += [Disk("8", xfs_golden.image("v5")), Disk("9", BytesSource(golden_disks("lvm")[0]))]
    return GuestReading(disks)


def test_every_filesystem_of_a_guest_opens_and_lists_and_the_others_say_why_not() -> None:
    guest = guest_of_all()
    opened = set()
    for row in guest.volumes().rows:
        if row.status is not VolumeStatus.FILESYSTEM:
            with pytest.raises(GuestError, match=row.kind):
                guest.info(row.name)
            continue
        root = guest.root(row.name)
        opened.add(guest.info(row.name).type)
        page = guest.list(row.name, root)
        assert page.is_last
        for entry, stat in page.entries:
            found = guest.lookup(row.name, root, entry.name)
            assert found is not None
            assert found.entry.node == entry.node
            assert found.stat == stat
            assert stat is None or stat.kind is not Kind.UNKNOWN
        assert guest.lookup(row.name, root, b"no such name") is None
    assert opened == {"ext3", "ext4", "xfs", "btrfs", "ntfs", "vfat", "exfat"}


@pytest.mark.parametrize(("volume", "name"), [("0", b"dir400"), ("3", b"dir300"), ("4", b"many"), ("6", b"many")])
def test_a_long_directory_comes_in_pages_without_loss(
    volume: str, name: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = guest_of_all()
    folder = guest.lookup(volume, guest.root(volume), name)
    assert folder is not None
    whole = guest.list(volume, folder.entry.node).entries
    monkeypatch.setattr(reading, "PAGE_ENTRIES_MAX", 50)
    pages = [guest.list(volume, folder.entry.node)]
    while not pages[-1].is_last:
        pages.append(guest.list(volume, folder.entry.node, pages[-1].entries[-1].entry.cookie))
        assert len(pages[-1].entries) <= 50
    assert len(pages) > len(whole) // 50
    assert tuple(found for page in pages for found in page.entries) == whole


def test_an_unknown_volume_is_told_with_those_there_are() -> None:
    with pytest.raises(GuestNotFound, match="nowhere") as caught:
        guest_of_all().stat("nowhere", b"1")  # type: ignore[arg-type]
    assert "vg0-linear" in caught.value.hint
