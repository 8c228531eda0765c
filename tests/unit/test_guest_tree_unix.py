"""How a Unix guest's volumes come together: its root, and each kind of line of its fstab."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.fake_guest import SYSTEM, FakeBtrfsGuest, FakeGuest, FakeVolume, Shown, system, volume
from xbfs_engine.core.errors import GuestDamaged, StorageTimeout
from xbfs_engine.guestfs.volumes import VolumeStatus

if TYPE_CHECKING:
    from tests.support.fake_guest import Entry

ROOT_UUID = "0a0b0c0d-1111-2222-3333-444455556666"
HOME_UUID = "ffffffff-1111-2222-3333-444455556666"
ROOT_LINE = f"UUID={ROOT_UUID} / ext4 errors=remount-ro 0 1\n"
DIRECTORIES: dict[str, Entry] = {"home": {}, "boot": {}, "srv": {}, "mnt": {"a b": {}, "x": {}}, "opt": {}}


def shown(fstab: str, *others: FakeVolume, **more: Entry) -> Shown:
    """A guest whose first volume is its root."""
    tree = system(ROOT_LINE + fstab, **(DIRECTORIES | more))
    return Shown(FakeGuest(volume("0p1", tree, uuid=ROOT_UUID), *others))


HOME = volume("1p2", {"alice": {}}, uuid=HOME_UUID, label="my home", part_uuid="12345678-02", part_label="Home Part")


@pytest.mark.parametrize(
    "source",
    [
        f"UUID={HOME_UUID}",
        f'UUID="{HOME_UUID.upper()}"',
        "LABEL=my\\040home",
        'LABEL="my\\040home"',
        "PARTUUID=12345678-02",
        "PARTLABEL=Home\\040Part",
        f"/dev/disk/by-uuid/{HOME_UUID}",
        "/dev/disk/by-label/my\\x20home",
        "/dev/disk/by-partuuid/12345678-02",
        "/dev/disk/by-partlabel/Home\\x20Part",
        "/dev/xvdb2",
        "/dev/hdb2",
        "/dev/sdb2",
        "/dev/vdb2",
        "/dev/nvme1n1p2",
        "/dev/mmcblk1p2",
    ],
)
def test_a_partition_is_known_by_every_name_that_it_has(source: str) -> None:
    found = shown(f"{source}\t/home  auto\tdefaults\n", HOME)
    assert found.mounts == {"/": "0p1", "/home": "1p2"}
    assert found.notes == ""
    assert found.names("/home") == {"alice"}


@pytest.mark.parametrize(
    ("source", "name", "place"),
    [
        ("/dev/mapper/vg-home", "vg-home", "logical volume home of volume group vg"),
        ("/dev/vg/home", "vg-home", "logical volume home of volume group vg"),
        ("/dev/mapper/my--vg-my--home", "my-vg-my-home", "logical volume my-home of volume group my-vg"),
        ("/dev/my-vg/my-home", "my-vg-my-home", "logical volume my-home of volume group my-vg"),
        ("/dev/disk/by-id/dm-name-my--vg-home", "my-vg-home", "logical volume home of volume group my-vg"),
        ("/dev/md0", "md0", "array md0 on 0p1"),
        ("/dev/md/0", "md0", "array md0 on 0p1"),
        ("/dev/md0p1", "md0p1", "array md0 on 0p1, partition 1"),
        ("/dev/md/data", "md-data", "array md-data on 0p1"),
        ("/dev/disk/by-id/md-name-host:data", "md-data", "array md-data on 0p1"),
        ("/dev/xvdc", "2", "disk 2"),
        ("/dev/sdb", "2", "disk 2"),
        ("/dev/xvdaa1", "26p1", "disk 26"),
    ],
)
def test_volumes_in_groups_arrays_and_on_whole_disks_are_known_by_their_names(
    source: str, name: str, place: str
) -> None:
    found = shown(f"{source} /home ext4\n", volume(name, {"alice": {}}, place=place))
    assert found.mounts == {"/": "0p1", "/home": name}
    assert found.tree.mounts[1].source == source


def test_the_dash_between_group_and_volume_is_not_mistaken() -> None:
    one = volume("a-b-c", {"1": {}}, place="logical volume c of volume group a-b")
    two = volume("a-b-c~2", {"2": {}}, place="logical volume b-c of volume group a")
    found = shown("/dev/mapper/a-b--c /home ext4\n/dev/mapper/a--b-c /srv ext4\n", one, two)
    assert (found.mounts["/home"], found.mounts["/srv"]) == ("a-b-c~2", "a-b-c")


@pytest.mark.parametrize("source", ["/dev/md127", "/dev/md/elsewhere"])
def test_the_only_array_is_meant_whatever_its_number_was_at_the_last_boot(source: str) -> None:
    array = volume("md-host", {"alice": {}}, within=("linux_raid_member",))
    assert shown(f"{source} /home ext4\n", array).mounts["/home"] == "md-host"


@pytest.mark.parametrize(
    ("source", "crypttab"),
    [
        ("/dev/mapper/luks-99999999-1111-2222-3333-444455556666", ""),
        ("/dev/mapper/crypt", "crypt UUID=99999999-1111-2222-3333-444455556666 none luks\n"),
        ("/dev/mapper/crypt", "# c\ncrypt /dev/disk/by-uuid/99999999-1111-2222-3333-444455556666\n"),
        ("/dev/mapper/crypt", "crypt /dev/xvdb1 none luks\n"),
        ("/dev/disk/by-id/dm-name-crypt", "crypt PARTUUID=77777777-01 none luks\n"),
    ],
)
def test_what_was_unlocked_is_known_by_the_names_of_what_encrypts_it(source: str, crypttab: str) -> None:
    uuid = "99999999-1111-2222-3333-444455556666"
    open_ = volume("1p1", {"alice": {}}, crypt_uuid=uuid, part_uuid="77777777-01")
    locked = volume("1p1", uuid=uuid, status=VolumeStatus.LOCKED, reason="no key was given", part_uuid="77777777-01")
    etc: dict[str, Entry] = {"crypttab": crypttab.encode()}
    assert shown(f"{source} /home ext4\n", open_, etc=etc).mounts["/home"] == "1p1"
    without = shown(f"{source} /home ext4\n", locked, etc=etc)
    assert "/home" not in without.mounts
    assert "no key was given" in without.notes


def test_a_crypttab_that_leads_back_to_itself_ends() -> None:
    etc: dict[str, Entry] = {"crypttab": b"a /dev/mapper/b\nb /dev/mapper/a\n"}
    assert "crypttab" in shown("/dev/mapper/a /home ext4\n", etc=etc).notes


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("UUID=dead-beef /home ext4", "not among the disks"),
        ("UUID= /home ext4", "no value"),
        ("/dev/dm-3 /home ext4", "does not tell"),
        ("/dev/disk/by-id/scsi-36001-part1 /home ext4", "does not tell"),
        ("/dev/xvdz9 /home ext4", "not among"),
        ("/dev/sdq1 /home ext4", "not among"),
        ("/dev/mapper/no-such /home ext4", "not among"),
        ("/dev/sr0 /mnt/x iso9660 ro", "removable"),
        ("nas:/export /home nfs defaults", "network"),
        ("//nas/share /home cifs credentials=/x", "network"),
        ("host:/volume /home fuse.glusterfs", "network"),
        ("overlay /home overlay lowerdir=/a", "overlay is not shown"),
        ("/var/disk.img /home ext4 loop", "images in files"),
        (f"UUID={HOME_UUID} /home ext4 noauto,nofail", "not mounted when"),
        (f"UUID={HOME_UUID} /no/such/place ext4", "is not there"),
        (f"UUID={HOME_UUID} /etc/passwd ext4", "no directory"),
        ("/no/such /home none bind", "no such directory"),
    ],
)
def test_what_is_not_mounted_is_said(line: str, words: str) -> None:
    found = shown(line + "\n", HOME)
    assert found.mounts == {"/": "0p1"}
    assert words in found.notes
    assert line.split()[1] in found.notes


def test_nobody_is_told_of_what_holds_no_files() -> None:
    lines = (
        "tmpfs /tmp tmpfs\nproc /proc proc\nUUID=aaaa none swap sw\n/swapfile swap swap\n# UUID=x /y ext4\n\n garbage\n"
    )
    found = shown(lines)
    assert (found.mounts, found.notes) == ({"/": "0p1"}, "")


def test_mounts_come_parents_first_whatever_the_order_of_the_lines() -> None:
    boot = volume("0p3", {"efi": {}, "vmlinuz": b""}, uuid="b")
    efi = volume("0p2", {"EFI": {}}, kind="vfat", uuid="ABCD-EF01")
    found = shown("UUID=ABCD-EF01 /boot/efi vfat umask=0077\nUUID=b /boot ext4\n", efi, boot)
    assert [mount.path for mount in found.tree.mounts] == [b"/", b"/boot", b"/boot/efi"]
    assert found.names("/boot/efi") == {"EFI"}
    assert found.tree.mounts[2].over == ("0p3", found.guest.lookup("0p3", found.guest.root("0p3"), b"efi").entry.node)  # type: ignore[union-attr]


def test_a_mount_point_is_found_through_links_and_shown_where_they_lead() -> None:
    found = shown(
        f"UUID={HOME_UUID} /data/./new//x/ ext4\n", HOME, data="mnt", mnt={"new": "/opt/y/.."}, opt={"y": {}, "x": {}}
    )
    assert found.mounts == {"/": "0p1", "/opt/x": "1p2"}
    assert found.names("/opt/x") == {"alice"}


def test_a_name_with_a_space_and_one_that_is_no_text_are_mount_points() -> None:
    other = volume("2p1", {"there": {}}, uuid="two")
    lines = f"UUID={HOME_UUID} /mnt/a\\040b ext4\nUUID=two /mnt/\\377 ext4\n"
    found = shown(lines, HOME, other, mnt={"a b": {}, "\udcff": {}})
    assert {mount.path for mount in found.tree.mounts} == {b"/", b"/mnt/a b", b"/mnt/\xff"}


def test_a_directory_missing_from_the_root_is_added_and_can_be_mounted_below() -> None:
    data = volume("2p1", {"sub": {}}, uuid="d")
    found = shown(f"UUID=d /data ext4\nUUID={HOME_UUID} /data/sub ext4\n", HOME, data)
    assert found.mounts == {"/": "0p1", "/data": "2p1", "/data/sub": "1p2"}
    assert found.tree.mounts[1].over is None
    assert "data" in found.names("/")
    assert found.names("/data/sub") == {"alice"}
    assert found.directories() > 5


@pytest.mark.parametrize("name", ["\\000", "a" * 256, "link"])
def test_a_name_that_can_not_be_added_is_not(name: str) -> None:
    found = shown(f"UUID={HOME_UUID} /{name} ext4\n", HOME, link="nowhere")
    assert found.mounts == {"/": "0p1"}
    assert "not there" in found.notes


def test_of_two_lines_for_one_directory_the_last_counts() -> None:
    other = volume("2p1", {"last": {}}, uuid="two")
    found = shown(f"UUID={HOME_UUID} /home ext4\nUUID=two /home/ ext4\n", HOME, other)
    assert found.mounts["/home"] == "2p1"
    assert "last one counts" in found.notes


def test_two_paths_of_one_directory_show_one_mount() -> None:
    other = volume("2p1", {"last": {}}, uuid="two")
    found = shown(f"UUID={HOME_UUID} /home ext4\nUUID=two /link ext4\n", HOME, other, link="home")
    assert found.mounts == {"/": "0p1", "/home": "1p2"}
    assert "something else" in found.notes


def test_a_mount_does_not_hide_one_below_it() -> None:
    other = volume("2p1", {"x": {}}, uuid="two")
    found = shown(
        f"UUID={HOME_UUID} /mnt/x ext4\nUUID=two /opt/deep/link ext4\n", HOME, other, opt={"deep": {"link": "/mnt"}}
    )
    assert found.mounts == {"/": "0p1", "/mnt/x": "1p2"}
    assert "something else" in found.notes


def test_a_bind_mount_shows_a_directory_of_another_mount_that_comes_later() -> None:
    data = volume("2p1", {"www": {"index": b""}}, uuid="d")
    found = shown("/mnt/x/www /srv none bind\nUUID=d /mnt/x ext4 defaults 0 2\n", data)
    assert found.mounts["/srv"] == "2p1"
    assert found.names("/srv") == {"index"}


@pytest.mark.parametrize(
    "lines",
    [
        "/ /srv none bind\n",
        "/mnt /mnt/x none rbind\n",
        "/srv /opt none bind\n/opt /srv/deep none bind\n/mnt /opt/deep none bind\n/srv /mnt/x none bind\n",
        "/srv /mnt/x none bind\n/mnt /srv/deep none bind\n",
    ],
)
def test_a_tree_that_would_lead_back_into_itself_ends(lines: str) -> None:
    found = shown(lines, srv={"deep": {}}, mnt={"x": {}})
    assert found.directories() < 100
    assert "within itself" in found.notes


def test_an_automount_is_shown_though_it_is_noauto() -> None:
    assert "/home" in shown(f"UUID={HOME_UUID} /home ext4 noauto,x-systemd.automount\n", HOME).mounts


def test_mount_units_that_the_guest_starts_are_mounts() -> None:
    unit = f"[Unit]\nWhat=/x\n[Mount]\n# c\nWhat=UUID={HOME_UUID}\nWhere=/mnt/a\\x20b\nOptions=ro\n".encode()
    units: dict[str, Entry] = {
        "home.mount": unit,
        "srv.mount": b"[Mount]\nWhat=/dev/xvdb2\nWhere=/srv\n",
        "broken.mount": b"[Mount]\nWhat=/dev/xvdb2\n",
        "multi-user.target.wants": {"home.mount": "../home.mount", "broken.mount": "../broken.mount"},
    }
    found = shown("", HOME, etc={"systemd": {"system": units}})
    assert found.mounts == {"/": "0p1", "/mnt/a b": "1p2"}


def test_fstab_itself_may_be_behind_links() -> None:
    tree = dict(SYSTEM) | {"etc": "/config/etc", "home": {}}
    etc = {"fstab": "real", "real": f"{ROOT_LINE}UUID={HOME_UUID} /home ext4\n".encode(), "os-release": b""}
    found = Shown(FakeGuest(volume("0p1", tree | {"config": {"etc": etc}}, uuid=ROOT_UUID), HOME))
    assert found.mounts == {"/": "0p1", "/home": "1p2"}


def test_of_several_systems_that_whose_fstab_names_itself_is_the_root() -> None:
    foreign = volume("0p1", system(f"UUID={HOME_UUID} / ext4\n", home={}, lib={}), uuid="other")
    own = volume("1p1", system(ROOT_LINE), uuid=ROOT_UUID)
    found = Shown(FakeGuest(foreign, own))
    assert found.mounts == {"/": "1p1"}
    assert "other systems are on volumes 0p1" in found.notes


def test_of_a_root_and_its_copy_the_first_is_the_root_and_the_other_is_told() -> None:
    place = "logical volume {} of volume group vg"
    fstab = "/dev/mapper/vg-root / ext4\n"
    copy = volume("vg-before", system(fstab), uuid=ROOT_UUID, place=place.format("before"))
    own = volume("vg-root", system(fstab), uuid=ROOT_UUID, place=place.format("root"))
    found = Shown(FakeGuest(copy, own))
    assert found.mounts == {"/": "vg-root"}
    assert "vg-before" in found.notes
    by_uuid = [volume(name, system(ROOT_LINE), uuid=ROOT_UUID) for name in ("0p1", "1p1")]
    assert Shown(FakeGuest(*by_uuid)).mounts == {"/": "0p1"}


def test_without_fstab_the_most_complete_system_is_the_root() -> None:
    poor = volume("0p1", {"etc": {}, "usr": {}, "sbin": {"init": b""}})
    found = Shown(FakeGuest(poor, volume("0p2", SYSTEM)))
    assert found.mounts == {"/": "0p2"}
    assert "fstab" in found.notes


def test_several_volumes_of_one_name_are_told() -> None:
    found = shown(f"UUID={HOME_UUID} /home ext4\n", HOME, volume("2p1", {}, uuid=HOME_UUID))
    assert found.mounts["/home"] == "1p2"
    assert "1p2, 2p1" in found.notes


def test_a_volume_that_can_not_be_opened_is_told_and_hides_no_other() -> None:
    broken = volume("2p1", GuestDamaged("superblock is torn"), uuid="broken")
    found = shown(f"UUID=broken /srv ext4\nUUID={HOME_UUID} /home ext4\n", HOME, broken)
    assert found.mounts == {"/": "0p1", "/home": "1p2"}
    assert "superblock is torn" in found.notes


def test_an_fstab_that_can_not_be_read_is_told() -> None:
    for bad in (GuestDamaged("inode 12"), b"#" * ((1 << 20) + 1), "fstab"):
        found = Shown(FakeGuest(volume("0p1", system("", etc={"fstab": bad}))))
        assert found.mounts == {"/": "0p1"}
        assert "/etc/fstab can not be read" in found.notes


def test_storage_that_fails_is_no_property_of_the_guest() -> None:
    guest = FakeGuest(volume("0p1", system(ROOT_LINE), uuid=ROOT_UUID), volume("0p2", StorageTimeout("slow")))
    with pytest.raises(StorageTimeout):
        guest.tree()


def test_one_filesystem_without_a_system_is_the_root() -> None:
    swap = volume("0p2", kind="swap", status=VolumeStatus.OTHER)
    found = Shown(FakeGuest(volume("0p1", {"data": b""}, kind="ntfs"), swap))
    assert (found.tree.kind, found.mounts) == ("unix", {"/": "0p1"})
    assert "only filesystem" in found.notes


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (volume("0p2", {}), "no system"),
        (volume("0p2", kind="crypto_LUKS", status=VolumeStatus.LOCKED), "can not be looked into: 0p2"),
        (volume("0p2", GuestDamaged("torn")), "torn"),
    ],
)
def test_several_volumes_without_a_system_are_no_tree(other: FakeVolume, words: str) -> None:
    tree = FakeGuest(volume("0p1", {"data": b""}), other).tree()
    assert (tree.kind, tree.mounts) == ("", ())
    assert words in "\n".join(tree.notes)


def test_a_guest_without_volumes_has_no_tree() -> None:
    tree = FakeGuest().tree()
    assert (tree.kind, tree.mounts, len(tree.notes)) == ("", (), 1)


def btrfs(fstab: str, **more: Entry) -> dict[str, Entry]:
    return {
        "@": system(fstab, **(DIRECTORIES | {".snapshots": {}} | more)),
        "@home": {"alice": {}},
        "@old": dict(SYSTEM),
    }


def test_subvolumes_are_mounted_by_path() -> None:
    fstab = f"UUID={ROOT_UUID} / btrfs subvol=@\nUUID={ROOT_UUID} /home btrfs subvol=/@home,noatime\n"
    fstab += f"UUID={ROOT_UUID} /srv btrfs subvol=@none\n"
    found = Shown(FakeGuest(volume("0p1", btrfs(fstab), kind="btrfs", uuid=ROOT_UUID)))
    assert found.names("/home") == {"alice"}
    assert {mount.path for mount in found.tree.mounts} == {b"/", b"/home"}
    assert "no such subvolume" in found.notes
    assert "0p1 (@old)" in found.notes


def test_a_subvolume_mounted_where_it_lies_is_shown_once() -> None:
    tree = system(f"UUID={ROOT_UUID} / btrfs subvol=/\nUUID={ROOT_UUID} /home btrfs subvol=home\n", home={"alice": {}})
    found = Shown(FakeGuest(volume("0p1", tree, kind="btrfs", uuid=ROOT_UUID)))
    assert found.mounts == {"/": "0p1"}
    assert found.names("/home") == {"alice"}
    assert found.notes == ""


def test_the_whole_of_a_btrfs_is_not_shown_within_itself() -> None:
    fstab = f"UUID={ROOT_UUID} / btrfs subvol=@\nUUID={ROOT_UUID} /mnt/x btrfs subvolid=5\n"
    found = Shown(FakeGuest(volume("0p1", btrfs(fstab), kind="btrfs", uuid=ROOT_UUID)))
    assert found.directories() < 100
    assert "within itself" in found.notes


def test_the_default_subvolume_of_opensuse_is_its_root() -> None:
    line = f"UUID={ROOT_UUID} "
    fstab = f"{line}/ btrfs defaults\n{line}/.snapshots btrfs subvol=/@/.snapshots\n{line}/home btrfs subvolid=0x101\n"
    root = system(fstab, **(DIRECTORIES | {".snapshots": {}}))
    tree: dict[str, Entry] = {
        "@": {"home": {"alice": {}}, ".snapshots": {"1": {"snapshot": root}, "2": {"snapshot": {}}}}
    }
    numbers = {0: "@/.snapshots/1/snapshot", 257: "@/home"}
    found = Shown(FakeBtrfsGuest(numbers, volume("0p1", tree, kind="btrfs", uuid=ROOT_UUID)))
    assert found.names("/home") == {"alice"}
    assert "within itself" in found.notes
    assert found.directories() < 100
