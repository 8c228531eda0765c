"""Which letters the drives of a Windows guest have, by its registry and without."""

from __future__ import annotations

import struct
import uuid
from typing import TYPE_CHECKING

import pytest

from tests.support.fake_guest import FakeGuest, FakeVolume, Shown, system, volume
from tests.support.registry_hives import Keys, build, mounted_devices
from xbfs_engine.core.errors import GuestDamaged, StorageTimeout
from xbfs_engine.guestfs.volumes import VolumeStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.support.fake_guest import Entry

GUIDS = [f"{number:08x}-aaaa-bbbb-cccc-0123456789ab" for number in range(8)]


def by_guid(number: int) -> bytes:
    return b"DMIO:ID:" + uuid.UUID(GUIDS[number]).bytes_le


def by_start(signature: int, start: int) -> bytes:
    return struct.pack("<IQ", signature, start)


def windows(hive: Entry, path: str = "Windows/System32/config/SYSTEM") -> Entry:
    tree = hive
    for name in reversed(path.split("/")):
        tree = {"Other": {}, name: tree}
    return tree


def with_letters(devices: Mapping[str, bytes]) -> Entry:
    return windows(build(mounted_devices(devices)))


def gpt(name: str, number: int, tree: Entry = b"", kind: str = "ntfs", **more: object) -> FakeVolume:
    return volume(name, tree or {"data": b""}, kind, **({"part_uuid": GUIDS[number]} | more))


def test_the_registry_gives_the_letters_of_partitions_on_gpt_disks() -> None:
    devices = {
        "\\DosDevices\\C:": by_guid(1),
        "\\DosDevices\\x:": by_guid(3),
        "\\DosDevices\\D:": "\\??\\SCSI#CdRom&Ven_XENSRC".encode("utf-16-le"),
        "\\??\\Volume{0a0b0c0d-0000-0000-0000-100000000000}": by_guid(2),
        "\\DosDevices\\Q:": by_guid(7),
    }
    guest = FakeGuest(
        gpt("0p1", 0, kind="vfat", part_label="EFI system partition"),
        gpt("0p2", 1, with_letters(devices)),
        gpt("0p3", 2, label="tools without a letter"),
        gpt("1p1", 3, {"db": b""}),
    )
    found = Shown(guest)
    assert (found.tree.kind, found.mounts) == ("windows", {"/C:": "0p2", "/X:": "1p1"})
    assert found.names("/X:") == {"db"}
    assert found.notes == ""
    assert all(mount.over is None for mount in found.tree.mounts)
    assert found.tree.mounts[1].source == "\\DosDevices\\X:"


def test_the_registry_gives_the_letters_of_partitions_on_mbr_disks() -> None:
    devices = {
        "\\DosDevices\\D:": by_start(0xDEADBEEF, 1 << 20),
        "\\DosDevices\\C:": by_start(0xDEADBEEF, 5 << 40),
        "\\DosDevices\\E:": by_start(0xDEADBEEF, 77),
    }

    def mbr(name: str, signature: str, start: int, tree: Entry) -> FakeVolume:
        return volume(name, tree, "ntfs", part_uuid=f"{signature}-0{name[-1]}", part_start_bytes=start)

    guest = FakeGuest(
        mbr("0p1", "00000001", 1 << 20, {"b": b""}),
        mbr("1p1", "deadbeef", 1 << 20, {"a": b""}),
        mbr("1p2", "deadbeef", 5 << 40, with_letters(devices)),
    )
    found = Shown(guest)
    assert found.mounts == {"/C:": "1p2", "/D:": "1p1", "/E:": "0p1"}
    assert "no letter is told for volume 0p1" in found.notes


def test_a_system_that_is_not_c_keeps_its_letter() -> None:
    devices = {"\\DosDevices\\E:": by_guid(1), "\\DosDevices\\C:": by_guid(2)}
    found = Shown(FakeGuest(gpt("0p1", 1, with_letters(devices)), gpt("0p2", 2)))
    assert found.mounts == {"/C:": "0p2", "/E:": "0p1"}


@pytest.mark.parametrize(
    "hive",
    [
        build({"Select": {}}),
        build(mounted_devices({})),
        b"regf",
        bytes(100_000),
        GuestDamaged("record 77"),
    ],
)
def test_without_letters_the_system_is_c_and_the_others_follow(hive: Entry) -> None:
    guest = FakeGuest(
        gpt("0p1", 0, label="System Reserved"),
        gpt("0p2", 1, kind="exfat"),
        gpt("0p3", 2, windows(hive)),
        gpt("0p4", 3, kind="ext4"),
        gpt("0p5", 4, kind="BitLocker", status=VolumeStatus.LOCKED),
        gpt("1p1", 5),
    )
    found = Shown(guest)
    assert found.mounts == {"/C:": "0p3", "/D:": "0p2", "/E:": "1p1"}
    assert found.notes.count("no letter is told for volume") == 3


def test_a_hive_that_windows_was_writing_is_used_and_told() -> None:
    hive = build(mounted_devices({"\\DosDevices\\F:": by_guid(1)}), sequences=(8, 7))
    found = Shown(FakeGuest(gpt("0p1", 1, windows(hive))))
    assert found.mounts == {"/F:": "0p1"}
    assert "was writing" in found.notes


def test_names_of_windows_have_no_case() -> None:
    hive = build(mounted_devices({"\\DosDevices\\F:": by_guid(1)}))
    for path in ("WINDOWS/system32/CONFIG/System", "windows/SYSTEM32/config/system"):
        assert Shown(FakeGuest(gpt("0p1", 1, windows(hive, path)))).mounts == {"/F:": "0p1"}


def test_a_drive_that_is_locked_or_damaged_is_told() -> None:
    devices = {"\\DosDevices\\C:": by_guid(1), "\\DosDevices\\D:": by_guid(2), "\\DosDevices\\E:": by_guid(3)}
    guest = FakeGuest(
        gpt("0p1", 1, with_letters(devices)),
        gpt("0p2", 2, kind="BitLocker", status=VolumeStatus.LOCKED, reason="no key was given"),
        gpt("0p3", 3, GuestDamaged("no boot sector")),
    )
    found = Shown(guest)
    assert found.mounts == {"/C:": "0p1"}
    assert "D: is volume 0p2, which can not be read: no key was given" in found.notes
    assert "no boot sector" in found.notes


def test_of_two_letters_of_a_volume_one_is_shown_and_of_two_copies_of_a_disk_the_systems_own() -> None:
    devices = {"\\DosDevices\\C:": by_guid(1), "\\DosDevices\\S:": by_guid(1)}
    found = Shown(FakeGuest(gpt("0p1", 1), gpt("1p1", 1, with_letters(devices))))
    assert found.mounts == {"/C:": "1p1"}
    assert "also S:" in found.notes


def test_letters_run_out() -> None:
    guest = FakeGuest(
        volume("0p1", windows(b""), "ntfs"), *(volume(f"{n}p1", {"d": b""}, "ntfs") for n in range(1, 30))
    )
    found = Shown(guest)
    assert len(found.mounts) == 24
    assert "no letter is left for volume 24p1" in found.notes


def test_a_unix_disk_of_another_machine_does_not_hide_windows_nor_the_reverse() -> None:
    linux = system("UUID=r / ext4\n")
    c = {"\\DosDevices\\C:": by_guid(1)}
    first = FakeGuest(gpt("0p1", 1, with_letters(c)), volume("1p1", linux, uuid="r"))
    assert first.tree().kind == "windows"
    assert "other systems are on volumes 1p1" in first.tree().notes[-1]
    second = FakeGuest(volume("0p1", linux, uuid="r"), gpt("1p1", 1, with_letters(c)))
    assert second.tree().kind == "unix"
    unnamed = FakeGuest(volume("0p1", system(""), uuid="r"), gpt("1p1", 1, with_letters(c)))
    assert unnamed.tree().kind == "windows"


def test_storage_that_fails_is_no_property_of_the_registry() -> None:
    guest = FakeGuest(gpt("0p1", 1, windows(StorageTimeout("slow"))))
    with pytest.raises(StorageTimeout):
        guest.tree()


def test_a_large_registry_is_read_in_part_only() -> None:
    devices: dict[str, Keys] = {"MountedDevices": {"\\DosDevices\\F:": by_guid(1)}}
    filler: dict[str, Keys] = {"Filler": {f"v{number}": bytes(100_000) for number in range(60)}}
    guest = FakeGuest(gpt("0p1", 1, windows(build(filler | devices))))
    assert Shown(guest).mounts == {"/F:": "0p1"}
    assert guest.bytes_read < 200_000
