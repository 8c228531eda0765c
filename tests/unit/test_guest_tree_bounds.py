"""A guest's tree has bounds whatever its tables say, and one thing that can not be read does not end the search."""

from __future__ import annotations

from tests.support.fake_guest import Entry, FakeBtrfsGuest, FakeGuest, Shown, system, volume
from xbfs_engine.guestfs.volumes import VolumeStatus


def test_so_many_mounts_are_shown_and_the_rest_is_told() -> None:
    names = [f"m{number:03}" for number in range(300)]
    fstab = "UUID=r / ext4\n" + "".join(f"UUID={name} /{name} ext4\n" for name in names)
    tree = system(fstab, **{name: {} for name in names})
    found = Shown(FakeGuest(volume("0p1", tree, uuid="r"), *(volume(name, {}, uuid=name) for name in names)))
    assert len(found.mounts) == 257
    assert found.tree.notes == ("only the first 256 mounts are shown",)


def test_so_many_notes_are_told_and_the_rest_is_counted() -> None:
    fstab = "UUID=r / ext4\n" + "".join(f"UUID=x{number} /m{number} ext4 noauto\n" for number in range(300))
    tree = FakeGuest(volume("0p1", system(fstab), uuid="r")).tree()
    assert len(tree.notes) == 257
    assert tree.notes[-1] == "44 more notes are left out"


def test_a_line_of_control_characters_is_told_in_one_line() -> None:
    fstab = "UUID=r / ext4\nUUID=\\012\\033[2J /a\\012b ext4\n" + f"LABEL={'x' * 5000} /home ext4\n"
    tree = FakeGuest(volume("0p1", system(fstab), uuid="r")).tree()
    assert len(tree.notes) == 2
    assert "\\x1b" in tree.notes[0]
    assert all(note.isprintable() and len(note) < 600 for note in tree.notes)


def test_units_in_many_folders_are_looked_at_in_the_first_only() -> None:
    units: dict[str, Entry] = {f"u{number:04}.wants": {"a.mount": b""} for number in range(600)}
    guest = FakeGuest(volume("0p1", system("UUID=r / ext4\n", etc={"systemd": {"system": units}}), uuid="r"))
    assert Shown(guest).mounts == {"/": "0p1"}
    assert guest.calls < 10_000


def test_a_default_subvolume_that_is_not_there_hides_no_other() -> None:
    tree: dict[str, Entry] = {"@": system("UUID=r / btrfs subvol=@\n")}
    found = Shown(FakeBtrfsGuest({}, volume("0p1", tree, "btrfs", uuid="r")))
    assert found.mounts == {"/": "0p1"}
    assert "etc" in found.names("/")


def test_a_long_path_and_a_long_chain_of_links_are_told() -> None:
    links: dict[str, Entry] = {f"l{number}": f"l{number + 1}" for number in range(60)}
    fstab = "UUID=r / ext4\nUUID=x /l0 ext4\nUUID=x " + "/usr/.." * 600 + "/home ext4\n"
    guest = FakeGuest(volume("0p1", system(fstab, home={}, **links), uuid="r"), volume("0p2", {}, uuid="x"))
    found = Shown(guest)
    assert found.mounts == {"/": "0p1"}
    assert "more than 40 links" in found.notes
    assert "more than 512 names" in found.notes


def test_only_so_many_volumes_are_opened_in_search_of_a_system() -> None:
    guest = FakeGuest(*(volume(f"{number}p1", {}) for number in range(2000)))
    assert guest.tree().mounts == ()
    assert guest.calls < 5000
    locked = FakeGuest(*(volume(f"{number}p1", status=VolumeStatus.LOCKED) for number in range(2000)))
    assert all(len(note) < 600 for note in locked.tree().notes)
