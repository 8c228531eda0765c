"""Our VHDs as others read them, and others' VHDs as our parser reads them.

Peers: qemu-img (vpc driver) and libvhdi (vhdiinfo and the Python binding); blktap's vhd-util is in test_vhd_blktap.
qemu overlooks much that XenServer refuses, so tests/support/vhd_rules.py repeats blktap's rules.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
import pyvhdi

from tests.support.disks import UUID16
from tests.support.vhd_files import LARGE, PAIRS, Written, run
from tests.support.vhd_rules import RuleReader
from xbfs_engine.core.limits import MIB
from xbfs_engine.formats.vhd_records import VhdType, geometry, parse_vhd_footer, parse_vhd_header

if TYPE_CHECKING:
    from pathlib import Path


def test_qemu_sees_the_exact_size_and_the_same_bytes(written: Written) -> None:
    info = json.loads(run("qemu-img", "info", "-f", "vpc", "--output=json", written.vhd))
    assert info["virtual-size"] == written.virtual_size
    run("qemu-img", "compare", "-f", "vpc", "-F", "raw", written.vhd, written.raw)


@pytest.mark.parametrize("written", [pair for pair in PAIRS if pair[1] not in LARGE], ids=" of ".join, indirect=True)
def test_qemu_converts_back_to_the_disk(written: Written) -> None:
    """Not for the large ones: converting walks the whole virtual disk."""
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
