"""The picture of a pool, and which VMs and disks of it are backed up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fake_xapi import GIB, FakeXapi
from xbfs_engine.core.errors import ObjectNotFound, PoolError, XbfsError
from xbfs_engine.source.xapi.inventory import Chain, Inventory, Nbd, records_if_known, take_inventory
from xbfs_engine.source.xapi.selection import disks_of, one_vm, select_vms


@pytest.fixture
def xapi() -> FakeXapi:
    return FakeXapi()


async def test_srs_and_hosts(xapi: FakeXapi) -> None:
    thin = xapi.add_sr("lvm", sm_config={"allocation": "thin"})
    unplugged = xapi.db.create("SR", name_label="lost", type="hba", physical_size=-1)
    found = await take_inventory(xapi)
    nfs, lvm, iso = (found.srs[ref] for ref in (xapi.sr, xapi.lvm, xapi.iso))
    assert (nfs.thick, nfs.tracks_changes, nfs.takes_snapshots) == (False, True, True)
    assert (lvm.thick, lvm.size_bytes, lvm.used_bytes) == (True, 1000 * GIB, 100 * GIB)
    assert not found.srs[thin].thick
    assert not iso.tracks_changes
    assert nfs.hosts == (xapi.host,)
    assert found.srs[unplugged].hosts == ()
    assert found.hosts[xapi.host].version == "8.3.0"
    assert found.pool_name == "lab"
    assert (found.nbd, found.nbd_hosts) == (Nbd.TLS, {xapi.host})
    assert found.sr_by_uuid(nfs.uuid) == nfs
    assert found.sr_by_uuid("?") is None


async def test_what_an_sr_can_may_be_told_by_its_operations_alone(xapi: FakeXapi) -> None:
    new = xapi.add_sr("exotic", allowed_operations=["vdi_enable_cbt", "vdi_snapshot"])
    sr = (await take_inventory(xapi)).srs[new]
    assert sr.tracks_changes
    assert sr.takes_snapshots


@pytest.mark.parametrize(
    ("purposes", "nbd"),
    [([], Nbd.NONE), (["nbd"], Nbd.TLS), (["insecure_nbd"], Nbd.INSECURE), (["nbd", "insecure_nbd"], Nbd.BOTH)],
)
async def test_nbd_purposes(xapi: FakeXapi, purposes: list[str], nbd: Nbd) -> None:
    xapi.db.set(xapi.network, purpose=[])
    for purpose in purposes:
        xapi.db.create("network", name_label=purpose, purpose=[purpose, "else"])
    assert (await take_inventory(xapi)).nbd is nbd


def chain(xapi: FakeXapi, *managed: bool) -> list[str]:
    """VHDs from the root to the last child."""
    refs: list[str] = []
    for is_managed in managed:
        config = {"vdi_type": "vhd"} | ({"vhd-parent": xapi.uuid(refs[-1])} if refs else {})
        refs.append(xapi.vdi(managed=is_managed, sm_config=config))
    return refs


async def test_chains(xapi: FakeXapi) -> None:
    healthy = chain(xapi, False, True)
    backlog = chain(xapi, False, False, False, True)
    sibling = xapi.vdi(sm_config={"vhd-parent": xapi.uuid(backlog[1])})
    alone = xapi.vdi()
    found = await take_inventory(xapi)
    assert found.chain(found.vdis[healthy[1]]) == Chain(2, ())
    assert found.chain(found.vdis[alone]) == Chain(1, ())
    # backlog[1] has two children now: only the root waits.
    assert found.chain(found.vdis[backlog[3]]) == Chain(4, (xapi.uuid(backlog[0]),))
    assert found.chain(found.vdis[sibling]).depth == 3
    assert [vdi.ref for vdi in found.pending(found.srs[xapi.sr])] == [backlog[0]]
    assert found.pending(found.srs[xapi.lvm]) == []


async def test_chain_that_loops_ends(xapi: FakeXapi) -> None:
    one, two = xapi.vdi(), xapi.vdi()
    xapi.db.set(one, sm_config={"vhd-parent": xapi.uuid(two)})
    xapi.db.set(two, sm_config={"vhd-parent": xapi.uuid(one)})
    found = await take_inventory(xapi)
    assert found.chain(found.vdis[one]).depth == 2


async def test_objects_that_went_meanwhile_are_not_there(xapi: FakeXapi) -> None:
    vm = xapi.vm("web")
    vdi = xapi.vdi()
    xapi.vbd(vm, vdi)
    xapi.db.destroy(vdi)
    found = await take_inventory(xapi)
    (disk,) = disks_of(found, found.vms[vm])
    assert disk.left_out == "no disk in the drive"


async def test_fields_that_old_releases_lack_have_defaults(xapi: FakeXapi) -> None:
    vm, vdi = xapi.vm("web"), xapi.vdi(cbt_enabled=True)
    xapi.vbd(vm, vdi)
    old = Without(xapi, {"VDI": ["cbt_enabled", "on_boot", "tags"], "network": ["purpose"], "pool": ["restrictions"]})
    found = await take_inventory(old)
    assert not found.vdis[vdi].cbt_enabled
    assert found.nbd is Nbd.NONE
    assert found.restrictions == {}
    xapi.faults["VTPM.get_all_records"] = ["MESSAGE_METHOD_UNKNOWN", "HOST_OFFLINE"]
    assert await records_if_known(xapi, "VTPM") == {}
    with pytest.raises(PoolError):
        await records_if_known(xapi, "VTPM")


class Without:
    """A pool whose records lack fields, or hold other values in them."""

    def __init__(self, xapi: FakeXapi, missing: dict[str, list[str]], wrong: dict[tuple[str, str], Any] | None = None):
        self._xapi = xapi
        self._missing = missing
        self._wrong = wrong or {}
        self.name, self.originator = xapi.name, xapi.originator
        self.call, self.run_task = xapi.call, xapi.run_task

    async def records(self, cls: str) -> dict[str, dict[str, Any]]:
        found = await self._xapi.records(cls)
        for record in found.values():
            for field in self._missing.get(cls, []):
                record.pop(field)
            record.update({name: value for (owner, name), value in self._wrong.items() if owner == cls})
        return found


FIELDS = [
    *(("VM", name) for name in ("uuid", "name_label", "is_a_snapshot", "snapshot_of", "tags", "blocked_operations")),
    *(("VDI", name) for name in ("uuid", "virtual_size", "SR", "sm_config", "managed", "on_boot", "snapshot_of")),
    *(("VBD", name) for name in ("VM", "VDI", "userdevice", "empty", "currently_attached")),
    *(("SR", name) for name in ("type", "physical_size", "sm_config", "allowed_operations")),
    *(
        ("network", "purpose"),
        ("PIF", "IP"),
        ("host", "software_version"),
        ("pool", "restrictions"),
        ("SM", "features"),
    ),
]
VALUES = st.recursive(
    st.text(max_size=8) | st.integers() | st.booleans() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
async def test_hostile_records_give_typed_errors_only(wrong: dict[tuple[str, str], Any]) -> None:
    xapi = FakeXapi()
    vm, parent = xapi.vm("web"), xapi.vdi(managed=False)
    xapi.vbd(vm, xapi.vdi(sm_config={"vhd-parent": xapi.uuid(parent)}))
    try:
        found = await take_inventory(Without(xapi, {}, wrong))
        for machine in found.vms.values():
            disks_of(found, machine)
        for vdi in found.vdis.values():
            found.chain(vdi)
        select_vms(found, ["*"])
    except XbfsError:
        pass


async def test_a_host_must_have_one_pool(xapi: FakeXapi) -> None:
    xapi.db.create("pool", name_label="second")
    with pytest.raises(PoolError, match="2 pools"):
        await take_inventory(xapi)


@pytest.fixture
async def pool(xapi: FakeXapi) -> Inventory:
    xapi.vm("web1", tags=["daily"], uuid="00000000-0000-0000-0000-000000000001")
    xapi.vm("web2", tags=["daily", "xo:no-bak"])
    xapi.vm("web3", tags=["xo:no-bak=replicated"])
    xapi.vm("twin", uuid="00000000-0000-0000-0000-000000000002")
    xapi.vm("twin", uuid="00000000-0000-0000-0000-000000000003")
    xapi.vm("a[1]*", uuid="00000000-0000-0000-0000-000000000004")
    xapi.vm("web1", is_a_template=True)
    xapi.vm("web1", is_a_snapshot=True)
    return await take_inventory(xapi)


def names(pool: Inventory, *patterns: str) -> list[str]:
    return [vm.name for vm in select_vms(pool, patterns).vms]


async def test_vms_by_name_uuid_tag_and_glob(pool: Inventory) -> None:
    assert names(pool, "web1") == ["web1"]
    assert names(pool, "00000000-0000-0000-0000-000000000002") == ["twin"]
    assert names(pool, "tag:daily") == ["web1"]
    assert names(pool, "*") == ["a[1]*", "twin", "twin", "web1"]
    assert names(pool, "w?b1", "web1") == ["web1"]
    assert names(pool, "a[1]*") == ["a[1]*"]
    assert names(pool, "a[1]?") == ["a[1]*"]
    assert one_vm(pool, "web1").tags == ("daily",)


async def test_what_is_not_to_be_backed_up_is_named(pool: Inventory) -> None:
    selection = select_vms(pool, ["web*"])
    assert [vm.name for vm in selection.vms] == ["web1"]
    assert [(skipped.vm.name, skipped.reason) for skipped in selection.skipped] == [
        ("web2", "tagged xo:no-bak"),
        ("web3", "tagged xo:no-bak=replicated"),
    ]


@pytest.mark.parametrize("pattern", ["nothing", "tag:none", "none*", "dom0", "", "tag:"])
async def test_patterns_that_match_nothing(pool: Inventory, pattern: str) -> None:
    with pytest.raises(ObjectNotFound, match="no VM"):
        select_vms(pool, ["web1", pattern])


async def test_a_name_of_several_vms_is_refused_with_their_uuids(pool: Inventory) -> None:
    with pytest.raises(ObjectNotFound, match="2 VMs") as caught:
        select_vms(pool, ["twin"])
    assert "000000000002, 00000000" in caught.value.hint
    with pytest.raises(ObjectNotFound):
        one_vm(pool, "twin")
    with pytest.raises(ObjectNotFound):
        one_vm(pool, "tw*")


async def test_disks_and_why_not(xapi: FakeXapi) -> None:
    vm = xapi.vm("web")
    bare = xapi.add_sr("bare")
    xapi.vbd(vm, xapi.vdi(), 0)
    xapi.vbd(vm, xapi.vdi(SR=xapi.iso), 3, type="CD")
    xapi.vbd(vm, NULL_DISK, 4, empty=True, type="CD")
    for number, fields in enumerate(
        [
            {"sharable": True},
            {"on_boot": "reset"},
            {"sm_config": {"type": "raw"}},
            {"SR": bare},
            {"name_label": "[NOBAK] swap"},
            {},
        ],
        start=5,
    ):
        xapi.vbd(vm, xapi.vdi(**fields), number)
    xapi.vbd(vm, xapi.vdi(), "autodetect")
    found = await take_inventory(xapi)
    disks = disks_of(found, found.vms[vm], exclude=[10])
    assert [(disk.vbd.position, disk.left_out is None, disk.fails_snapshot) for disk in disks] == [
        ("0", True, False),
        ("3", False, False),
        ("4", False, False),
        ("5", False, True),
        ("6", False, True),
        ("7", False, True),
        ("8", False, True),
        ("9", False, False),
        ("10", False, False),
        ("autodetect", False, False),
    ]
    reasons = [disk.left_out for disk in disks]
    assert reasons[1:] == [
        "a CD drive",
        "a CD drive",
        "shared between VMs: it can not be snapshotted",
        "reset at every boot: it can not be snapshotted",
        "raw: the SR can not snapshot it",
        "SR bare takes no snapshots",
        "[NOBAK] in its name",
        "excluded on request",
        "its position autodetect is no number",
    ]
    with pytest.raises(ObjectNotFound, match="no disk 77"):
        disks_of(found, found.vms[vm], exclude=[77])


NULL_DISK = "OpaqueRef:NULL"
