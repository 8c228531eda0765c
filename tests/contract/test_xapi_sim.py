"""Sessions, tasks and transfers against a simulated pool: two hosts, roles, events, early 200, redirects."""

from __future__ import annotations

import io
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.runtime import SeededRandom
from tests.support.xensim import BACKUP_USER, MIB, XenSim, default_world, running_sim
from xbfs_engine.core.errors import CertificateRejected, LoginRefused, TransferFailed, XapiFailure
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.source.xapi.config import Address, Credentials, PoolConfig
from xbfs_engine.source.xapi.http import export_metadata, export_raw, import_metadata, import_raw
from xbfs_engine.source.xapi.members import Member, members
from xbfs_engine.source.xapi.session import Pool, open_pool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path
    from typing import Literal

BACKUP = Credentials(BACKUP_USER["name"], BACKUP_USER["password"])
VIEWER = Credentials("viewer", "viewer-password")


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[XenSim]:
    srs = [
        *default_world()["srs"],
        {"name": "far", "type": "ext", "size": 64 * MIB, "hosts": ["beta"], "shared": False},
    ]
    with running_sim(default_world(srs=srs), tmp_path_factory.mktemp("sim")) as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_is_left(sim: XenSim) -> Iterator[None]:
    yield
    sim.clear()
    ours = [task for task in sim.dump("task")["task"] if task["name_label"].startswith("xbfs/")]
    assert not ours


def config(sim: XenSim, *, first: int = 0, pins: dict[str, str] | None = None) -> PoolConfig:
    host = sim.hosts[first]
    known = {other.address: other.fingerprint for other in sim.hosts} if pins is None else pins
    return PoolConfig("sim", (Address(host.address, host.port),), "backup", known, "xbfs/node")


def opened(
    sim: XenSim, credentials: Credentials = BACKUP, *, first: int = 0, pins: dict[str, str] | None = None
) -> AbstractAsyncContextManager[Pool]:
    return open_pool(config(sim, first=first, pins=pins), credentials, system_runtime(), retry_delays_s=(0.1, 0.5))


async def test_a_member_leads_to_the_master_which_tells_all_certificates(sim: XenSim) -> None:
    async with opened(sim, VIEWER, first=1) as pool:
        assert pool.master.host == sim.master.address
        found = await members(pool)
    assert found == [Member(host.name, host.address, host.fingerprint) for host in sim.hosts]


async def test_a_master_that_is_not_pinned(sim: XenSim) -> None:
    member = sim.hosts[1]
    with pytest.raises(CertificateRejected, match=sim.master.fingerprint):
        async with opened(sim, first=1, pins={member.address: member.fingerprint}):
            pass


async def test_wrong_password_and_too_little_role(sim: XenSim) -> None:
    with pytest.raises(LoginRefused):
        async with opened(sim, Credentials("backup", "wrong")):
            pass
    async with opened(sim, VIEWER) as pool:
        vm = await pool.call("VM.get_by_uuid", sim.vm("web")["uuid"])
        with pytest.raises(LoginRefused) as caught:
            await pool.run_task("VM.snapshot", vm, "no", [], timeout_s=20)
    assert "vm-power-admin" in caught.value.hint


async def test_a_snapshot_is_a_task_with_a_result(sim: XenSim) -> None:
    seen: list[float] = []
    async with opened(sim) as pool:
        vm = await pool.call("VM.get_by_uuid", sim.vm("web")["uuid"])
        snapshot = await pool.run_task("VM.snapshot", vm, "mine", [], timeout_s=20, progress=seen.append)
        record = (await pool.records("VM"))[snapshot]
        assert record["snapshot_of"] == vm
        for vbd in record["VBDs"]:  # type: ignore[union-attr]
            disk = await pool.call("VBD.get_record", vbd)
            if disk["type"] == "Disk":  # type: ignore[index,call-overload]
                await pool.call("VDI.destroy", disk["VDI"])  # type: ignore[index,call-overload]
        await pool.call("VM.destroy", snapshot)
    assert all(0 <= value <= 1 for value in seen)


async def test_a_task_that_fails_tells_why(sim: XenSim) -> None:
    async with opened(sim) as pool:
        vm = await pool.call("VM.get_by_uuid", sim.vm("web")["uuid"])
        sim.fault("VM.snapshot", "fail", code="SR_BACKEND_FAILURE_44", params=["", "no space", ""])
        with pytest.raises(XapiFailure, match="no room for a snapshot"):
            await pool.run_task("VM.snapshot", vm, "mine", [], timeout_s=20)


async def test_a_task_nobody_waits_for_is_cancelled(sim: XenSim) -> None:
    async with opened(sim) as pool:
        vm = await pool.call("VM.get_by_uuid", sim.vm("db")["uuid"])
        sim.fault("VM.snapshot", "delay", seconds=50)  # a second of ours
        with trio.move_on_after(0.3) as scope:
            await pool.run_task("VM.snapshot", vm, "mine", [], timeout_s=20)
        assert scope.cancelled_caught
    assert not [vm for vm in sim.dump("VM")["VM"] if vm["name_label"] == "mine"]


async def test_a_session_that_expired_is_renewed(sim: XenSim) -> None:
    async with opened(sim) as pool:
        assert await pool.call("VM.get_all")
        sim.do("expire_sessions")
        assert await pool.call("VM.get_all")


@pytest.mark.parametrize("old_is_down", [False, True])
async def test_another_host_becomes_master(sim: XenSim, old_is_down: bool) -> None:
    old, new = sim.hosts
    async with opened(sim) as pool:
        assert pool.master.host == old.address
        sim.do("set_master", host=new.name)
        sim.do("offline", host=old.name, value=old_is_down)
        try:
            vm = await pool.call("VM.get_by_uuid", sim.vm("web")["uuid"])
            await pool.call("VM.add_tags", vm, "moved")
            await pool.call("VM.remove_tags", vm, "moved")
            assert pool.master.host == new.address
        finally:
            sim.do("offline", host=old.name, value=False)
            sim.do("set_master", host=old.name)


async def test_reads_outlive_a_broken_connection(sim: XenSim) -> None:
    async with opened(sim) as pool:
        sim.fault("VM.get_all", "drop_after")
        assert await pool.call("VM.get_all")


def fill(sim: XenSim, vm: str, disk: int) -> tuple[str, bytes]:
    """A disk with data and holes."""
    uuid = sim.disks(vm)[disk]
    seeded = SeededRandom(disk + 7)
    for offset, length in ((0, 70_000), (3 * MIB + 512, 4096), (4 * MIB - 512, 512)):
        sim.guest_write(uuid, offset, seeded.token(length))
    return uuid, content(sim, uuid)


def content(sim: XenSim, uuid: str) -> bytes:
    size_bytes = int(next(vdi["virtual_size"] for vdi in sim.dump("VDI")["VDI"] if vdi["uuid"] == uuid))
    return b"".join(sim.read(uuid, offset, MIB) for offset in range(0, size_bytes, MIB))


async def read(pool: Pool, vdi: str, kind: Literal["raw", "vhd"], *, size_bytes: int | None = None) -> bytes:
    async with export_raw(pool, vdi, format=kind, timeout_s=20) as stream:
        buffer = bytearray(64 * MIB)
        count = await trio.to_thread.run_sync(stream.readinto, memoryview(buffer))
        await stream.finish(size_bytes=size_bytes)
        return bytes(buffer[:count])


async def test_disks_are_read_raw_and_as_vhd(sim: XenSim, tmp_path: Path) -> None:
    uuid, expected = fill(sim, "db", 0)
    async with opened(sim) as pool:
        vdi = str(await pool.call("VDI.get_by_uuid", uuid))
        assert await read(pool, vdi, "raw", size_bytes=len(expected)) == expected
        (tmp_path / "disk.vhd").write_bytes(await read(pool, vdi, "vhd"))
    assert (await trio.to_thread.run_sync(_as_qemu_reads, tmp_path / "disk.vhd"))[: len(expected)] == expected


def _as_qemu_reads(image: Path) -> bytes:
    options = f"driver=vpc,file.filename={image},force_size_calc=current_size"
    raw = image.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", "--image-opts", options, raw], check=True, capture_output=True)
    return raw.read_bytes()


@pytest.mark.parametrize("effect", ["close", "error_text"])
@pytest.mark.parametrize("after", [0, 3 * MIB])
async def test_a_host_that_fails_after_it_said_200(sim: XenSim, effect: str, after: int) -> None:
    uuid, _ = fill(sim, "db", 0)
    async with opened(sim) as pool:
        vdi = str(await pool.call("VDI.get_by_uuid", uuid))
        sim.fault("export.body", effect, params=[str(after)])
        with pytest.raises((XapiFailure, TransferFailed)) as caught:
            await read(pool, vdi, "raw", size_bytes=4 * MIB)
    assert isinstance(caught.value, XapiFailure)
    assert caught.value.code == "VDI_IO_ERROR"


async def create(pool: Pool, sr: str, size_bytes: int) -> tuple[str, str]:
    """A new disk: reference and uuid."""
    (place,) = [ref for ref, record in (await pool.records("SR")).items() if record["name_label"] == sr]
    record = {"name_label": "new", "name_description": "", "SR": place, "virtual_size": size_bytes, "type": "user"}
    rest = {"sharable": False, "read_only": False, "other_config": {}, "xenstore_data": {}, "sm_config": {}, "tags": []}
    ref = str(await pool.call("VDI.create", {**record, **rest}))
    return ref, str(await pool.call("VDI.get_uuid", ref))


@pytest.mark.parametrize("sr", ["nfs", "far"])
async def test_disks_are_written_wherever_they_are(sim: XenSim, sr: str) -> None:
    _, expected = fill(sim, "db", 0)
    async with opened(sim) as pool:
        ref, uuid = await create(pool, sr, len(expected))
        async with import_raw(pool, ref, format="raw", length=len(expected), timeout_s=20) as sink:
            await trio.to_thread.run_sync(sink.write, expected)
        assert content(sim, uuid) == expected
        async with import_raw(pool, ref, format="chunked", length=None, timeout_s=20) as sink:
            await trio.to_thread.run_sync(sink.write_at, MIB, b"x" * 65536)
            await trio.to_thread.run_sync(sink.write_at, 512, b"y" * 512)
        changed = bytearray(expected)
        changed[MIB : MIB + 65536], changed[512:1024] = b"x" * 65536, b"y" * 512
        assert content(sim, uuid) == changed
        # A disk that only the other host reaches is read there too.
        assert await read(pool, ref, "raw", size_bytes=len(expected)) == changed
        await pool.call("VDI.destroy", ref)


async def test_a_redirect_to_an_unpinned_host_is_refused(sim: XenSim) -> None:
    async with opened(sim, pins={sim.master.address: sim.master.fingerprint}) as pool:
        ref, _ = await create(pool, "far", 2 * MIB)
        with pytest.raises(CertificateRejected, match=sim.hosts[1].fingerprint):
            await read(pool, ref, "raw")
        with pytest.raises(CertificateRejected, match=sim.hosts[1].fingerprint):
            async with import_raw(pool, ref, format="raw", length=2 * MIB, timeout_s=20):
                pass
        await pool.call("VDI.destroy", ref)


async def test_a_vhd_goes_from_disk_to_disk(sim: XenSim) -> None:
    source, expected = fill(sim, "db", 0)
    async with opened(sim) as pool:
        image = await read(pool, str(await pool.call("VDI.get_by_uuid", source)), "vhd")
        ref, uuid = await create(pool, "nfs", len(expected))
        async with import_raw(pool, ref, format="vhd", length=len(image), timeout_s=20) as sink:
            await trio.to_thread.run_sync(sink.write, image)
        assert content(sim, uuid) == expected
        await pool.call("VDI.destroy", ref)


async def test_an_import_that_fails_late_fails(sim: XenSim) -> None:
    async with opened(sim) as pool:
        ref, _ = await create(pool, "nfs", 4 * MIB)
        sim.fault("import.body", "fail_late", params=[str(2 * MIB)])
        with pytest.raises(XapiFailure) as caught:
            async with import_raw(pool, ref, format="raw", length=4 * MIB, timeout_s=20) as sink:
                await trio.to_thread.run_sync(sink.write, bytes(4 * MIB))
        assert caught.value.code == "VDI_IO_ERROR"
        await pool.call("VDI.destroy", ref)


async def test_a_vm_comes_back_from_its_metadata(sim: XenSim) -> None:
    async with opened(sim) as pool:
        vm = str(await pool.call("VM.get_by_uuid", sim.vm("db")["uuid"]))
        archive = await export_metadata(pool, vm)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            assert tar.getnames() == ["ova.xml"]
        ref, uuid = await create(pool, "nfs", 4 * MIB)
        (made,) = await import_metadata(pool, archive, vdi_map={sim.disks("db")[0]: uuid}, restore=False)
        record = (await pool.records("VM"))[made]
        assert (record["name_label"], record["uuid"] != sim.vm("web")["uuid"]) == ("db", True)
        disks = [await pool.call("VBD.get_VDI", vbd) for vbd in record["VBDs"]]  # type: ignore[union-attr]
        assert disks == [ref]
        await pool.call("VM.destroy", made)
        await pool.call("VDI.destroy", ref)
