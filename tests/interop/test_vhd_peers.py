"""Our VHDs as others read them, and others' VHDs as our parser reads them.

Peers: qemu-img (vpc driver), libvhdi (vhdiinfo and the Python binding), and blktap's own vhd-util where one is
installed or named by XBFS_VHD_UTIL (it is part of XenServer, not of Debian). qemu overlooks much that XenServer
refuses, so tests/support/vhd_rules.py repeats blktap's rules for machines without vhd-util.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import CHUNK, UUID16, VHD_BLOCK, MemoryDisk, dynamic_vhd, fixed_vhd, write_sparse
from tests.support.vhd_rules import RuleReader
from xbfs_engine.core.limits import GIB, MIB
from xbfs_engine.formats.vhd_records import VHD_SIZE_MAX, VhdType, geometry, parse_vhd_footer, parse_vhd_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xbfs.view.synthetic import SyntheticImage

pyvhdi = pytest.importorskip("pyvhdi")

VHD_UTIL = os.environ.get("XBFS_VHD_UTIL") or shutil.which("vhd-util")
TIMEOUT_S = 120

DISKS: dict[str, Callable[[], MemoryDisk]] = {
    "0 bytes": lambda: MemoryDisk(0, {}),
    "1 byte": lambda: MemoryDisk.full(1),
    "all zeros": lambda: MemoryDisk(GIB, {}),
    "sparse": lambda: MemoryDisk.holding(100 * MIB, (0, 5, 96, 700, 1599)),
    "sparse, odd size": lambda: MemoryDisk.holding(100 * MIB + 7 * 512 + 13, (31, 32, 33, 1600)),
    "full": lambda: MemoryDisk.full(24 * MIB),
    "full, odd size": lambda: MemoryDisk.full(9 * MIB - CHUNK - 1),
    "batmap rounded down": lambda: MemoryDisk.holding(4097 * VHD_BLOCK, (7, 4096 * 32 + 31)),
    "above 127 GiB": lambda: MemoryDisk.holding(300 * GIB, (0, 1_234_567, 300 * 16384 - 1)),
    "2040 GiB": lambda: MemoryDisk.holding(VHD_SIZE_MAX, (0, 16_711_680, 33_423_359)),
}
KINDS: dict[str, Callable[[MemoryDisk], SyntheticImage]] = {"dynamic": dynamic_vhd, "fixed": fixed_vhd}


class Written:
    """One disk written as a VHD and as the raw virtual disk that readers shall find in it."""

    def __init__(self, directory: Path, kind: str, disk: MemoryDisk) -> None:
        self.kind = kind
        self.disk = disk
        self.virtual_size = max(-(-disk.size_bytes // VHD_BLOCK), 1) * VHD_BLOCK
        self.vhd = directory / f"{kind}.vhd"
        self.raw = directory / "expected.raw"
        write_sparse(KINDS[kind](disk), self.vhd)
        write_sparse(disk, self.raw)
        os.truncate(self.raw, self.virtual_size)

    def places(self) -> Iterator[tuple[int, int]]:
        """Ranges that cover all data, its surroundings and the end of the disk."""
        for extent in self.disk.extents(0, self.disk.size_bytes):
            if extent.is_data:
                start = max(extent.offset - 4096, 0)
                yield start, extent.length + 8192
        yield self.virtual_size - VHD_BLOCK, VHD_BLOCK

    def expected(self, offset: int, length: int) -> bytes:
        length = max(min(length, self.virtual_size - offset), 0)
        return self.disk.read_at(offset, length).ljust(length, b"\0")


@pytest.fixture
def memory_dir() -> Iterator[Path]:
    """A directory on tmpfs: files of 2 TiB with a few bytes of data."""
    with tempfile.TemporaryDirectory(prefix="xbfs-vhd-", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture(params=[(kind, disk) for kind in KINDS for disk in DISKS], ids=" of ".join)
def written(request: pytest.FixtureRequest, memory_dir: Path) -> Written:
    kind, disk = request.param
    return Written(memory_dir, kind, DISKS[disk]())


def run(*command: str | Path) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert finished.returncode == 0, f"{command}: {finished.stdout}{finished.stderr}"
    return finished.stdout


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed (qemu-utils)")
def test_qemu_sees_the_exact_size_and_the_same_bytes(written: Written) -> None:
    info = json.loads(run("qemu-img", "info", "-f", "vpc", "--output=json", written.vhd))
    assert info["virtual-size"] == written.virtual_size
    run("qemu-img", "compare", "-f", "vpc", "-F", "raw", written.vhd, written.raw)


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed (qemu-utils)")
def test_qemu_converts_back_to_the_disk(written: Written) -> None:
    if written.virtual_size > GIB:
        pytest.skip("converting walks the whole virtual disk; compare covers large ones")
    target = written.vhd.with_suffix(".converted")
    run("qemu-img", "convert", "-f", "vpc", "-O", "raw", written.vhd, target)
    assert target.stat().st_size == written.virtual_size
    run("cmp", target, written.raw)


def test_libvhdi_reads_the_same_bytes(written: Written) -> None:
    vhd = pyvhdi.file()
    vhd.open(str(written.vhd))
    try:
        assert vhd.get_media_size() == written.virtual_size
        for offset, length in written.places():
            expected = written.expected(offset, length)
            assert vhd.read_buffer_at_offset(len(expected), offset) == expected, offset
    finally:
        vhd.close()


@pytest.mark.skipif(not shutil.which("vhdiinfo"), reason="vhdiinfo is not installed (libvhdi-utils)")
def test_vhdiinfo_names_kind_size_and_identity(written: Written) -> None:
    facts = dict(line.strip("\t ").split(":", 1) for line in run("vhdiinfo", written.vhd).splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    assert facts["Disk type"] == written.kind.capitalize()
    assert f"{written.virtual_size} bytes" in facts["Media size"]
    assert facts["Identifier"].replace("-", "") == UUID16.hex()


def test_the_rules_hold_in_the_file(written: Written) -> None:
    with written.vhd.open("rb") as file:

        def read(offset: int, length: int) -> bytes:
            return os.pread(file.fileno(), length, offset)

        reader = RuleReader(read, written.vhd.stat().st_size)
        for offset, length in written.places():
            assert reader.disk(offset, length) == written.expected(offset, length)


@pytest.mark.skipif(VHD_UTIL is None, reason="vhd-util is not installed (XenServer's blktap); set XBFS_VHD_UTIL")
def test_vhd_util_calls_it_valid_and_reads_the_same_bytes(written: Written) -> None:
    assert VHD_UTIL is not None
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


@pytest.mark.skipif(VHD_UTIL is None, reason="vhd-util is not installed (XenServer's blktap); set XBFS_VHD_UTIL")
def test_a_child_made_by_vhd_util_is_valid_on_our_parent(memory_dir: Path) -> None:
    assert VHD_UTIL is not None
    written = Written(memory_dir, "dynamic", DISKS["sparse, odd size"]())
    child = memory_dir / "child.vhd"
    run(VHD_UTIL, "snapshot", "-n", child, "-p", written.vhd)
    assert "is valid" in run(VHD_UTIL, "check", "-n", child, "-p")
    with child.open("rb") as file:
        footer = parse_vhd_footer(file.read(512))
        header = parse_vhd_header(file.read(1024), footer)
    assert footer.disk_type == VhdType.DIFFERENCING
    assert header.parent_uuid16 == UUID16


@pytest.mark.skipif(VHD_UTIL is None, reason="vhd-util is not installed (XenServer's blktap); set XBFS_VHD_UTIL")
@pytest.mark.parametrize("size_mib", [2, 100, 8192, 8208, 2040 * 1024])
def test_our_empty_disk_is_vhd_utils_empty_disk(memory_dir: Path, size_mib: int) -> None:
    """Byte for byte, but for what must differ: time stamp and uuid, hence the footer's checksum.

    Not at 8194 MiB and the like: there vhd-util writes its footer over the batmap's second sector.
    """
    assert VHD_UTIL is not None
    theirs, ours = memory_dir / "theirs.vhd", memory_dir / "ours.vhd"
    run(VHD_UTIL, "create", "-n", theirs, "-s", str(size_mib))
    write_sparse(dynamic_vhd(MemoryDisk(size_mib * MIB, {})), ours)

    def without_identity(image: bytes) -> bytes:
        footer = bytearray(image[:512])
        footer[24:28], footer[64:84] = bytes(4), bytes(20)
        return bytes(footer) + image[512:-512] + bytes(footer)

    assert without_identity(ours.read_bytes()) == without_identity(theirs.read_bytes())


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed (qemu-utils)")
@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
@pytest.mark.parametrize("size_mib", [1, 3, 100, 5000])
def test_our_parser_reads_qemus_footers(memory_dir: Path, subformat: str, size_mib: int) -> None:
    """Without force_size qemu rounds up to a geometry: two programs then agree on it."""
    path = memory_dir / "qemu.vhd"
    run("qemu-img", "create", "-q", "-f", "vpc", "-o", f"subformat={subformat}", path, f"{size_mib}M")
    with path.open("rb") as file:
        file.seek(-512, os.SEEK_END)
        raw = file.read()
        footer = parse_vhd_footer(raw)
        assert footer.creator == b"qemu"
        assert footer.size_bytes >= size_mib * MIB
        assert geometry(footer.size_bytes) == int.from_bytes(raw[56:60], "big")
        if footer.disk_type == VhdType.DYNAMIC:
            file.seek(512)
            header = parse_vhd_header(file.read(1024), footer)
            assert header.entries * header.block_size >= footer.size_bytes
