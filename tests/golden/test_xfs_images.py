"""Kept XFS images read as the kernel read version 5, and as version 4 was written: every fact of every path."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from tests.support import xfs_golden
from tests.support.guest_tree import first_difference, reader_facts
from xbfs_engine.guestfs.base import VolumeState
from xbfs_engine.guestfs.xfs.reader import open_xfs

if TYPE_CHECKING:
    from tests.support.guest_tree import Facts


def test_version_5_is_what_the_kernel_saw() -> None:
    volume = open_xfs(xfs_golden.image("v5"))
    assert first_difference(reader_facts(volume), xfs_golden.facts("v5")) == ""
    assert volume.info == ("xfs", "golden", xfs_golden.V5_UUID, 48 << 20, VolumeState.CLEAN, "")


def test_version_4_is_what_was_written() -> None:
    volume = open_xfs(xfs_golden.image("v4"))
    assert (volume.info.label, volume.info.state) == ("golden4", VolumeState.CLEAN)
    ours = {path: _written(facts) for path, facts in reader_facts(volume).items() if path != "."}
    written = xfs_golden.v4_facts()
    assert ours.keys() == written.keys()
    for path, expected in written.items():
        # The size of a directory is the filesystem's own business.
        size = ours[path][3] if expected[3] is None else expected[3]
        assert ours[path] == (*expected[:3], size, *expected[4:])


def _written(facts: Facts) -> tuple[object, ...]:
    xattrs = {
        name: int(value.split(":")[0]) if ":" in value else len(value) // 2 for name, value in facts.xattrs.items()
    }
    content = facts.content or (hashlib.sha256().hexdigest() if facts.kind == "f" else "")
    return (facts.kind, facts.mode, facts.owner, facts.size, facts.target, facts.device, content, xattrs)
