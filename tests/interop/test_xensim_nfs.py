"""SRs of type nfs of the simulated pool on the live mount by nfs-ganesha: what SM and tapdisk do to an export."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
import pyvhdi

from tests.support.disks import VHD_BLOCK, MemoryDisk, dynamic_vhd
from tests.support.export_lab import Exported
from tests.support.live_mounts import SESSION
from tests.support.nfs_network import needs_ganesha, needs_libnfs, private_network
from tests.support.vhd_files import run
from tests.support.vhd_rules import check_footer
from tests.support.xensim import MIB, XenSimError, default_world, running_sim
from tests.support.xensim_api import ended, logged_in, refused, vm_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.xensim import XenSim

pytestmark = [needs_ganesha, needs_libnfs]

SIZE = 8 * MIB
DISK = MemoryDisk.holding(SIZE, (0, 1, 70))
PLAIN = DISK.read_at(0, SIZE)
IMAGE = dynamic_vhd(DISK)
MOST = 5
"""Disks of an SR."""
SRS = {str(uuid4()): sorted(str(uuid4()) for _ in range(MOST)) for _ in range(12)}
"""One for each test: disks by SR."""
_CLONE_FS = 0x200


class Lab:
    """A live mount with one SR of prepared disks, and a pool that may reach it."""

    def __init__(self, server: Exported, sim: XenSim, sr: str, vdis: list[str]) -> None:
        self.server, self.sim, self.sr, self.vdis = server, sim, sr, vdis

    @property
    def directory(self) -> Path:
        return self.server.directory / self.sr

    def file(self, vdi: str) -> Path:
        return self.directory / f"{vdi}.vhd"

    def introduce(self, api, **config: str) -> tuple[str, list[str]]:
        sr = api.SR.introduce(self.sr, "instant", "", "nfs", "user", True, {})
        for key in ("gc", "leaf-coalesce", "coalesce"):
            api.SR.add_to_other_config(sr, key, "false")
        where = {"server": self.server.nfs.address, "serverpath": self.server.nfs.path(SESSION)}
        hosts = api.host.get_all()
        return sr, [api.PBD.create({"host": host, "SR": sr, "device_config": where | config}) for host in hosts]

    def forget(self, api, sr: str) -> None:
        for pbd in api.SR.get_PBDs(sr):
            api.PBD.unplug(pbd)
            api.PBD.destroy(pbd)
        api.SR.forget(sr)

    @contextmanager
    def plugged(self, **config: str) -> Iterator:
        with logged_in(self.sim) as api:
            sr, pbds = self.introduce(api, **config)
            for pbd in pbds:
                api.PBD.plug(pbd)
            api.SR.scan(sr)
            try:
                yield api, sr
            finally:
                with suppress(Exception):
                    api.VM.hard_shutdown(vm_of(api, "db"))
                self.forget(api, sr)

    def give(self, api, *vdis: str) -> str:
        """Starts the halted VM with these disks of the SR; returns it."""
        vm = vm_of(api, "db")
        for vbd in api.VM.get_VBDs(vm):
            api.VBD.destroy(vbd)
        for vdi in vdis:
            ref = api.VDI.get_by_uuid(vdi)
            record = {"VM": vm, "VDI": ref, "userdevice": "autodetect", "bootable": True, "mode": "RW", "type": "Disk"}
            more = {"unpluggable": True, "empty": False, "other_config": {}}
            api.VBD.create(record | more | {"qos_algorithm_type": "", "qos_algorithm_params": {}})
        api.VM.start(vm, False, False)
        return vm

    def plain(self, path: Path, folder: Path) -> bytes:
        """The disk in a VHD as qemu reads it."""
        run("qemu-img", "convert", "-f", "vpc", "-O", "raw", path, folder / "plain")
        return (folder / "plain").read_bytes()


def child(path: Path, parent: Path) -> bytes:
    """The disk in a differencing VHD as libvhdi reads it."""
    vhd, below = pyvhdi.file(), pyvhdi.file()
    vhd.open(str(path))
    below.open(str(parent))
    assert vhd.get_parent_filename() == parent.name
    assert vhd.get_parent_identifier() == below.get_identifier()
    vhd.set_parent(below)
    return vhd.read_buffer_at_offset(SIZE, 0)


@pytest.fixture(scope="module")
def network() -> Iterator[str]:
    with private_network() as address:
        yield address
        # pytest's watchdog thread shares our working directory; setns takes us back only if nobody does.
        assert ctypes.CDLL(None).unshare(_CLONE_FS) == 0


@pytest.fixture(scope="module")
def server(network: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    exported = Exported(tmp_path_factory.mktemp("nfs"), "nfs", network, "2049", "20048", f"{network}/32")
    for sr, vdis in SRS.items():
        for vdi in vdis:
            exported.disk(f"{sr}/{vdi}.vhd", vdi, IMAGE.size_bytes)
    with exported:
        yield exported


@pytest.fixture
def lab(server: Exported, tmp_path: Path) -> Iterator[Lab]:
    sr, vdis = SRS.popitem()
    with running_sim(default_world(), tmp_path / "sim") as sim:
        lab = Lab(server, sim, sr, vdis)
        for vdi in vdis:
            with lab.file(vdi).open("r+b") as file:
                file.write(IMAGE.read_at(0, IMAGE.size_bytes))
        yield lab


@pytest.mark.parametrize("version", ["3", "4"])
def test_an_introduced_sr_is_plugged_scanned_and_forgotten(lab: Lab, version: str) -> None:
    before = {path.name: path.read_bytes() for path in lab.directory.iterdir()}
    with lab.plugged(nfsversion=version) as (api, sr):
        records = [api.VDI.get_record(vdi) for vdi in api.SR.get_VDIs(sr)]
        assert sorted(one["uuid"] for one in records) == lab.vdis
        assert {one["virtual_size"] for one in records} == {str(SIZE)}
        assert {one["location"] == one["uuid"] and one["managed"] for one in records} == {True}
        sizes = api.SR.get_record(sr)
        assert 0 < int(sizes["physical_utilisation"]) < int(sizes["physical_size"])
        assert lab.sim.read(lab.vdis[0], 0, SIZE) == PLAIN
        with refused("SR_HAS_PBD"):
            api.SR.forget(sr)
    assert not [one for one in lab.sim.dump("SR")["SR"] if one["uuid"] == lab.sr]
    assert not [one for one in lab.sim.dump("VDI")["VDI"] if one["uuid"] in lab.vdis]
    assert {path.name: path.read_bytes() for path in lab.directory.iterdir()} == before


def test_one_bad_file_fails_the_whole_scan(lab: Lab) -> None:
    spoils = {
        "footer": (-512 + 40, b"\1"),
        "copy": (40, b"\1"),
        "header": (512 + 28, b"\1"),
        "table": (1536, b"\0\0\0\1"),
    }
    with lab.plugged() as (api, sr):
        for place, data in spoils.values():
            with lab.file(lab.vdis[2]).open("r+b") as file:
                file.seek(place, 2 if place < 0 else 0)
                good = file.read(len(data))
                file.seek(-len(data), 1)
                file.write(data)
                file.flush()
                with refused("SR_BACKEND_FAILURE_40"):
                    api.SR.scan(sr)
                file.seek(-len(data), 1)
                file.write(good)
        api.SR.scan(sr)
        assert len(api.SR.get_VDIs(sr)) == MOST


def test_a_guest_writes_as_tapdisk_does(lab: Lab, tmp_path: Path) -> None:
    vdi, expected = lab.vdis[0], bytearray(PLAIN)
    with lab.plugged() as (api, sr):
        vm = lab.give(api, vdi)
        length = lab.file(vdi).stat().st_size
        for offset, data in (
            (4096, b"a" * 4096),
            (512, b"b" * 512),
            (SIZE - 1024, b"c" * 512),
            (2 * VHD_BLOCK - MIB, b"d" * MIB + b"e"),
            (SIZE - VHD_BLOCK, b"f" * VHD_BLOCK),
        ):
            lab.sim.guest_write(vdi, offset, data)
            expected[offset : offset + len(data)] = data
        assert lab.sim.read(vdi, 0, SIZE) == expected
        grown = lab.file(vdi).stat().st_size
        assert (grown - length) % (4104 * 512) == 0
        assert grown > length
        api.SR.scan(sr)
        with refused("VDI_IN_USE"):
            api.PBD.unplug(api.SR.get_PBDs(sr)[0])
        api.VM.hard_shutdown(vm)
        assert lab.sim.read(vdi, 0, SIZE) == expected
        with lab.file(vdi).open("rb") as file:
            first = file.read(512)
            file.seek(-512, 2)
            assert file.read() == first
            check_footer(first)
    assert lab.plain(lab.file(vdi), tmp_path) == expected


def test_a_snapshot_leaves_a_hidden_parent_and_children(lab: Lab, tmp_path: Path) -> None:
    vdi, expected = lab.vdis[0], bytearray(PLAIN)
    with lab.plugged() as (api, sr):
        vm = lab.give(api, vdi)
        lab.sim.guest_write(vdi, 0, b"before")
        expected[:6] = b"before"
        frozen = bytes(expected)
        snapshot = api.VM.snapshot(vm, "one", [])
        lab.sim.guest_write(vdi, 2 * VHD_BLOCK - 3, b"after")
        expected[2 * VHD_BLOCK - 3 : 2 * VHD_BLOCK + 2] = b"after"
        api.VM.hard_shutdown(vm)
        api.SR.scan(sr)
        (taken,) = [api.VDI.get_uuid(api.VBD.get_VDI(vbd)) for vbd in api.VM.get_VBDs(snapshot)]
        assert lab.sim.read(vdi, 0, SIZE) == expected
        assert lab.sim.read(taken, 0, SIZE) == frozen
        parent = api.VDI.get_sm_config(api.VDI.get_by_uuid(vdi))["vhd-parent"]
        assert not api.VDI.get_managed(api.VDI.get_by_uuid(parent))
        assert lab.file(parent).read_bytes()[85] == 1
        assert f"{vdi} {parent}\n" in (lab.directory / "filelog.txt").read_text()
        assert lab.plain(lab.file(parent), tmp_path) == frozen
        assert child(lab.file(vdi), lab.file(parent)) == expected
        assert child(lab.file(taken), lab.file(parent)) == frozen
        api.VM.destroy(snapshot)
        api.VDI.destroy(api.VDI.get_by_uuid(taken))
        assert not lab.file(taken).exists()


def test_disks_of_a_running_vm_move_away(lab: Lab) -> None:
    with lab.plugged() as (api, sr):
        vm = lab.give(api, *lab.vdis[:4])
        (target,) = api.SR.get_by_name_label("nfs")
        lab.sim.guest_write(lab.vdis[0], 5 * MIB, b"written")
        expected = PLAIN[: 5 * MIB] + b"written" + PLAIN[5 * MIB + 7 :]
        refs = [api.VDI.get_by_uuid(vdi) for vdi in lab.vdis[:4]]
        hold = lab.sim.fault("VDI.create", "hold", times=4)
        tasks = [api.Async.VDI.pool_migrate(ref, target, {}) for ref in refs[:3]]
        lab.sim.wait_fault(hold, hits=3)
        with refused("TOO_MANY_STORAGE_MIGRATES", "3"):
            api.VDI.pool_migrate(refs[3], target, {})
        lab.sim.clear(hold)
        assert [ended(api, task)["status"] for task in tasks] == ["success"] * 3
        api.VDI.pool_migrate(refs[3], target, {})
        moved = [api.VBD.get_VDI(vbd) for vbd in api.VM.get_VBDs(vm)]
        assert {api.VDI.get_SR(ref) for ref in moved} == {target}
        assert sorted(lab.sim.read(api.VDI.get_uuid(ref), 0, SIZE) for ref in moved) == sorted([expected] + [PLAIN] * 3)
        assert [path.name for path in lab.directory.iterdir()] == [f"{lab.vdis[4]}.vhd"]
        for pbd in api.SR.get_PBDs(sr):
            api.PBD.unplug(pbd)
        assert api.VM.get_power_state(vm) == "Running"


def test_a_disk_that_moves_keeps_what_is_written_meanwhile(lab: Lab) -> None:
    with lab.plugged() as (api, _):
        vm = lab.give(api, lab.vdis[0])
        (target,) = api.SR.get_by_name_label("nfs")
        source, others = api.VDI.get_by_uuid(lab.vdis[0]), set(api.SR.get_VDIs(target))
        lab.sim.fault("storage.copy", "fail", nth=2, code="VDI_COPY_FAILED")
        with refused("VDI_COPY_FAILED"):
            api.VDI.pool_migrate(source, target, {})
        assert set(api.SR.get_VDIs(target)) == others
        assert lab.sim.read(lab.vdis[0], 0, SIZE) == PLAIN

        hold = lab.sim.fault("storage.copy", "hold")
        task = api.Async.VDI.pool_migrate(source, target, {})
        lab.sim.wait_fault(hold)
        expected = bytearray(PLAIN)
        for offset in (100, 3 * VHD_BLOCK - 2, SIZE - 5):
            lab.sim.guest_write(lab.vdis[0], offset, b"later")
            expected[offset : offset + 5] = b"later"
        lab.sim.clear(hold)
        assert ended(api, task)["status"] == "success"
        (vbd,) = api.VM.get_VBDs(vm)
        assert lab.sim.read(api.VDI.get_uuid(api.VBD.get_VDI(vbd)), 0, SIZE) == expected
        assert not lab.file(lab.vdis[0]).exists()


def test_raw_files_are_disks_and_hidden_leaves_are_not(lab: Lab) -> None:
    raw = str(uuid4())
    (lab.directory / f"{raw}.raw").write_bytes(PLAIN)
    with lab.plugged() as (api, sr):
        assert {api.VDI.get_uuid(vdi) for vdi in api.SR.get_VDIs(sr)} == {raw, *lab.vdis}
        vm = lab.give(api, raw)
        lab.sim.guest_write(raw, 512, b"r" * 512)
        assert (lab.directory / f"{raw}.raw").read_bytes() == PLAIN[:512] + b"r" * 512 + PLAIN[1024:]
        with refused("UNIMPLEMENTED_IN_SM_BACKEND"):
            api.VM.snapshot(vm, "one", [])
        with lab.file(lab.vdis[0]).open("r+b") as file:
            foot = bytearray(file.read(512))
            foot[85], foot[64:68] = 1, bytes(4)
            foot[64:68] = (~sum(foot) & 0xFFFFFFFF).to_bytes(4, "big")
            for place, whence in ((0, 0), (-512, 2)):
                file.seek(place, whence)
                file.write(foot)
        api.SR.scan(sr)
        assert {api.VDI.get_uuid(vdi) for vdi in api.SR.get_VDIs(sr)} == {raw, *lab.vdis[1:]}
        assert lab.file(lab.vdis[0]).exists()


def test_a_halted_vms_disk_is_copied_and_destroyed(lab: Lab) -> None:
    with lab.plugged() as (api, _):
        (target,) = api.SR.get_by_name_label("nfs")
        source = api.VDI.get_by_uuid(lab.vdis[1])
        copy = api.VDI.copy(source, target)
        assert lab.sim.read(api.VDI.get_uuid(copy), 0, SIZE) == PLAIN
        api.VDI.destroy(source)
        assert not lab.file(lab.vdis[1]).exists()


def test_a_server_that_is_gone(lab: Lab) -> None:
    with logged_in(lab.sim) as api:
        sr, pbds = lab.introduce(api)
        api.SR.add_to_other_config(sr, "nfs-timeout", "10")
        api.PBD.plug(pbds[0])
        api.SR.scan(sr)
        lab.server.stop()
        try:
            with refused("SR_BACKEND_FAILURE_12"):
                api.PBD.plug(pbds[1])
            with refused("SR_BACKEND_FAILURE_40"):
                api.SR.scan(sr)
            with pytest.raises(XenSimError, match="Errno 5"):
                lab.sim.guest_write(lab.vdis[0], 0, b"x")
            assert len(api.SR.get_VDIs(sr)) == MOST
            lab.forget(api, sr)
        finally:
            lab.server.start()
    with lab.plugged():
        lab.sim.guest_write(lab.vdis[0], 0, b"x")
        assert lab.sim.read(lab.vdis[0], 0, 2) == b"x" + PLAIN[1:2]


def test_a_directory_that_is_not_there(lab: Lab) -> None:
    with logged_in(lab.sim) as api:
        sr, pbds = lab.introduce(api, serverpath="/nowhere")
        with refused("SR_BACKEND_FAILURE_12"):
            api.PBD.plug(pbds[0])
        assert not api.PBD.get_currently_attached(pbds[0])
        lab.forget(api, sr)
