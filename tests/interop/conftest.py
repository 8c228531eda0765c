"""Fixtures of the interoperability tests, and which of them can run here."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.vhd_files import DISKS, PAIRS, Written

if TYPE_CHECKING:
    from collections.abc import Iterator

# vhd-util is part of XenServer, not of Debian: where there is none, its tests are not collected.
collect_ignore = [] if os.environ.get("XBFS_VHD_UTIL") or shutil.which("vhd-util") else ["test_vhd_blktap.py"]


@pytest.fixture
def memory_dir() -> Iterator[Path]:
    """A directory on tmpfs: files of 2 TiB with a few bytes of data."""
    with tempfile.TemporaryDirectory(prefix="xbfs-vhd-", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture(params=PAIRS, ids=" of ".join)
def written(request: pytest.FixtureRequest, memory_dir: Path) -> Written:
    kind, disk = request.param
    return Written(memory_dir, kind, DISKS[disk]())
