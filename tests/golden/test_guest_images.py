"""Kept images of guests' filesystems, read as the kernel read them or as they were written."""

from __future__ import annotations

import hashlib
import os

import pytest

from tests.support import guest_golden
from tests.support.guest_tree import first_difference, reader_facts
from xbfs_engine.guestfs.base import GuestFilesystem, NodeId, VolumeState


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("ext4", VolumeState.CLEAN),
        ("ext4-dirty", VolumeState.REPLAYED),
        ("ext3-dirty", VolumeState.REPLAYED),
        ("btrfs", VolumeState.CLEAN),
    ],
)
def test_everything_is_as_the_kernel_saw_it(name: str, state: VolumeState) -> None:
    volume = guest_golden.opened(name)
    assert first_difference(reader_facts(volume), guest_golden.kernel_said(name)) == ""
    assert volume.info.state is state
    assert (volume.info.type, bool(volume.info.reason)) == (name.split("-")[0], state is not VolumeState.CLEAN)


@pytest.mark.parametrize(("name", "label"), [("ntfs", "golden"), ("fat", "GOLDEN"), ("exfat", "golden")])
def test_every_file_is_as_it_was_written(name: str, label: str) -> None:
    volume = guest_golden.opened(name)
    written = guest_golden.contents(name)
    assert len(written) > 100
    assert {path: digest(volume, path) for path in written} == written
    assert (volume.info.label, volume.info.state, volume.info.reason) == (label, VolumeState.CLEAN, "")


def digest(volume: GuestFilesystem, path: str) -> str:
    node: NodeId = volume.root
    for name in path.split("/"):
        entry = volume.lookup(node, os.fsencode(name))
        if entry is None:
            return "missing"
        node = entry.node
    size = volume.stat(node).size_bytes
    hasher = hashlib.sha256()
    for at in range(0, size, 100_000):
        hasher.update(volume.read(node, at, min(100_000, size - at)))
    return hasher.hexdigest()
