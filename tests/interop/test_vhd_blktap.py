"""Our VHDs as XenServer's own vhd-util reads them, and its VHDs as our parser reads them.

Collected only where vhd-util is installed or named by XBFS_VHD_UTIL; elsewhere tests/support/vhd_rules.py repeats
blktap's rules.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import UUID16, MemoryDisk, dynamic_vhd, write_sparse
from tests.support.vhd_files import DISKS, TIMEOUT_S, Written, run
from xbfs_engine.core.limits import MIB
from xbfs_engine.formats.vhd_records import VhdType, parse_vhd_footer, parse_vhd_header

if TYPE_CHECKING:
    from pathlib import Path

VHD_UTIL = os.environ.get("XBFS_VHD_UTIL") or shutil.which("vhd-util") or "vhd-util"


def test_vhd_util_calls_it_valid_and_reads_the_same_bytes(written: Written) -> None:
    # -B: without it the search for overlapping blocks is quadratic.
    verdict = run(VHD_UTIL, "check", "-B", "-n", written.vhd)
    assert run(VHD_UTIL, "query", "-v", "-n", written.vhd).strip() == str(written.virtual_size // MIB)
    if written.kind == "fixed":
        return  # check exits 0 but says nothing, and read is for dynamic disks
    assert "is valid" in verdict
    target = written.vhd.with_suffix(".read")
    for offset, length in list(written.places())[:20]:
        first, count = offset // 512, -(-length // 512)
        expected = written.expected(first * 512, count * 512)
        with target.open("wb") as out:
            command = [VHD_UTIL, "read", "-n", str(written.vhd), "-r", str(first), "-c", str(len(expected) // 512)]
            subprocess.run(command, stdout=out, timeout=TIMEOUT_S, check=True)
        assert target.read_bytes() == expected, offset


def test_a_child_made_by_vhd_util_is_valid_on_our_parent(memory_dir: Path) -> None:
    written = Written(memory_dir, "dynamic", DISKS["sparse, odd size"]())
    child = memory_dir / "child.vhd"
    run(VHD_UTIL, "snapshot", "-n", child, "-p", written.vhd)
    assert "is valid" in run(VHD_UTIL, "check", "-n", child, "-p")
    with child.open("rb") as file:
        footer = parse_vhd_footer(file.read(512))
        header = parse_vhd_header(file.read(1024), footer)
    assert footer.disk_type == VhdType.DIFFERENCING
    assert header.parent_uuid16 == UUID16


@pytest.mark.parametrize("size_mib", [2, 100, 8192, 8208, 2040 * 1024])
def test_our_empty_disk_is_vhd_utils_empty_disk(memory_dir: Path, size_mib: int) -> None:
    """Byte for byte, but for what must differ: time stamp and uuid, hence the footer's checksum.

    Not at 8194 MiB and the like: there vhd-util writes its footer over the batmap's second sector.
    """
    theirs, ours = memory_dir / "theirs.vhd", memory_dir / "ours.vhd"
    run(VHD_UTIL, "create", "-n", theirs, "-s", str(size_mib))
    write_sparse(dynamic_vhd(MemoryDisk(size_mib * MIB, {})), ours)

    def without_identity(image: bytes) -> bytes:
        footer = bytearray(image[:512])
        footer[24:28], footer[64:84] = bytes(4), bytes(20)
        return bytes(footer) + image[512:-512] + bytes(footer)

    assert without_identity(ours.read_bytes()) == without_identity(theirs.read_bytes())
