"""BitLocker volumes of every variant open with what Windows gives people, and say what they need otherwise.

The volumes are of our own formatter, which tests/interop/test_bitlocker_peers.py has checked by other programs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support import bitlocker_images as made
from tests.support.bitlocker_images import KIB, Recipe, pattern, shown, startup_file, volume
from tests.support.guest_golden import image, opened
from tests.support.volume_images import BytesSource, by_name, content, scan
from xbfs_engine.core.errors import GuestDamaged, GuestLocked, GuestUnsupported
from xbfs_engine.guestfs.base import Kind
from xbfs_engine.guestfs.reading import GuestReading
from xbfs_engine.guestfs.volumes import Disk, Volume, VolumeKey, VolumeStatus
from xbfs_engine.guestfs.volumes.bitlocker import find_bitlocker, unlock

VARIANTS = {
    **{method: Recipe(method) for method in made.METHODS},
    "xts-128-4k": Recipe("xts-128", sector=4096),
    "cbc-256-4k": Recipe("cbc-256", sector=4096),
    "to-go": Recipe("xts-256", to_go=True),
    "to-go-long-head": Recipe("cbc-128", to_go=True, head_bytes=40 * KIB),
    "no-place-of-the-head": Recipe(head_datum=False),
    "vista-128": Recipe("elephant-128", version=1),
    "vista-256": Recipe("elephant-256", version=1),
    "paused-early": Recipe(encrypted=150 * KIB, state=(5, 4)),
    "paused-late": Recipe("cbc-256", encrypted=300 * KIB, state=(5, 1)),
}
BEK = VolumeKey(startup_file(0))


def row(data: bytes, *keys: VolumeKey) -> Volume:
    return by_name(scan({0: data}, keys))["0"]


def of(recipe: Recipe) -> bytes:
    return volume(recipe, pattern(sector=recipe.sector))


def damaged(data: bytes, *places: int) -> bytes:
    changed = bytearray(data)
    for place in places:
        changed[place] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_shown_as_windows_shows_it(variant: str):
    recipe = VARIANTS[variant]
    plain = pattern(sector=recipe.sector)
    found = row(volume(recipe, plain), BEK)
    assert (found.kind, found.status, found.within) == ("ntfs", VolumeStatus.FILESYSTEM, ("BitLocker",))
    assert content(found) == shown(recipe, plain)


def test_what_was_never_written_is_not_decrypted_into_a_difference():
    """A volume of which only the used part was encrypted: the rest of it is of no meaning, and reads without error."""
    recipe = Recipe()
    plain = pattern()[: 64 * KIB] + bytes(448 * KIB)
    assert content(row(volume(recipe, plain, used_only=True), BEK))[: 64 * KIB] == plain[: 64 * KIB]


def test_a_password_in_any_script_opens_it_and_a_wrong_one_does_not():
    data = of(Recipe(protectors=("tpm", "password", "recovery")))
    assert row(data, VolumeKey(made.PASSWORD.encode())).within == ("BitLocker",)
    wrong = row(data, VolumeKey(b"Gr\xfc\xdfe"), VolumeKey(b""), VolumeKey(b"wrong"))
    assert wrong.status is VolumeStatus.LOCKED
    assert wrong.reason.startswith("no key that was given opens it; it opens with its password or the recovery")


@pytest.mark.parametrize("secret", [made.RECOVERY, made.RECOVERY.replace("-", "") + "\n"])
def test_a_recovery_password_opens_it_however_it_is_written(secret: str):
    assert row(of(Recipe(protectors=("recovery",))), VolumeKey(secret.encode())).within == ("BitLocker",)


@pytest.mark.parametrize(
    "secret",
    [
        made.RECOVERY[:-1] + "2",
        made.RECOVERY.replace("-", "_"),
        made.RECOVERY + "-000011",
        "720896" + made.RECOVERY[6:],
        made.RECOVERY.replace("4", "\u0664"),
    ],
)
def test_a_mistyped_recovery_password_is_none_and_costs_nothing(secret: str):
    """It could only be a password then, and there is none here; 720896 / 11 is more than 16 bits hold."""
    source = BytesSource(of(Recipe(protectors=("recovery",))))
    header = find_bitlocker(source)
    assert header is not None
    assert unlock(source, header, secret.encode()) is None


def test_the_right_one_of_two_recovery_passwords_is_found():
    recipe = Recipe(protectors=("recovery", "recovery"), secrets={"recovery1": made.OTHER_RECOVERY})
    assert row(of(recipe), VolumeKey(made.OTHER_RECOVERY.encode())).within == ("BitLocker",)


@pytest.mark.parametrize(
    "secret",
    [
        startup_file(0, bytes(32)),
        startup_file(0)[:-1],
        startup_file(0) + b"\0",
        startup_file(0)[:48],
        damaged(startup_file(0), 48),
        startup_file(0).replace(made.EXTERNAL_KEY, b""),
    ],
)
def test_another_or_a_damaged_startup_key_file_opens_nothing(secret: bytes):
    found = row(of(Recipe()), VolumeKey(secret))
    assert found.status is VolumeStatus.LOCKED
    assert f"it opens with the startup key file {str(made.protector_id(0)).upper()}.BEK" in found.reason


def test_a_key_is_tried_only_on_its_volume():
    data = of(Recipe())
    for name in ("0", str(made.VOLUME), str(made.VOLUME).upper()):
        assert row(data, VolumeKey(startup_file(0), name)).within == ("BitLocker",)
    assert row(data, VolumeKey(startup_file(0), "1")).status is VolumeStatus.LOCKED


def test_a_locked_volume_says_who_it_is_and_which_keys_to_look_for():
    found = row(of(Recipe(protectors=("tpm", "pin", "card", "recovery", "external", "password"))))
    assert (found.kind, found.uuid, found.label) == ("BitLocker", str(made.VOLUME), "DESKTOP D: 1/2/2026")
    assert (found.status, found.source) == (VolumeStatus.LOCKED, None)
    recovery, external = (str(made.protector_id(n)).upper() for n in (3, 4))
    assert found.reason == (
        f"it is encrypted and no key was given; it opens with the recovery password of identifier {recovery}"
        f" or the startup key file {external}.BEK or its password;"
        " a TPM or a TPM with a PIN or a smart card can not be used here"
    )
    assert "no key that can be given here" in row(of(Recipe(protectors=("tpm",)))).reason


def test_suspended_protection_needs_no_key():
    recipe = Recipe(protectors=("password", "clear"))
    found = row(of(recipe))
    assert (found.status, found.within) == (VolumeStatus.FILESYSTEM, ("BitLocker",))
    assert found.reason == "BitLocker is suspended: it opens without a key"
    assert content(found) == shown(recipe, pattern())


def test_one_valid_copy_of_the_metadata_is_enough():
    recipe = Recipe()
    data = of(recipe)
    first, second, third = (place + 70 for place in recipe.places)
    assert content(row(damaged(data, first, second), BEK)) == shown(recipe, pattern())
    found = row(damaged(data, first, second, third), BEK)
    assert (found.kind, found.status) == ("BitLocker", VolumeStatus.UNREADABLE)
    assert found.reason == "none of the 3 copies of BitLocker's metadata is valid"


def test_a_copy_of_the_metadata_that_was_moved_is_not_used():
    recipe = Recipe()
    data = bytearray(of(recipe))
    data[448 * KIB :] = data[recipe.places[0] : recipe.places[0] + 64 * KIB]
    for place in recipe.places:
        data[place : place + 8] = bytes(8)
    data[176:184] = (448 * KIB).to_bytes(8, "little")
    assert row(bytes(data), BEK).status is VolumeStatus.UNREADABLE


def test_metadata_that_windows_did_not_write_are_refused_though_their_checksum_is_right():
    recipe = Recipe()
    data = bytearray(of(recipe))
    honest = made.block(recipe, len(data), 0)
    total = int.from_bytes(honest[8:10], "little") * 16
    forged = honest[:120] + b"X" + honest[121:total]
    for place in recipe.places:
        data[place : place + len(honest)] = made.validated(forged)[: total + 8] + honest[total + 8 :]
    found = row(bytes(data), BEK)
    assert (found.status, found.reason) == (
        VolumeStatus.UNREADABLE,
        "BitLocker's metadata were changed by something else than Windows",
    )


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Recipe(identity=made.ON_WRITE), "not yet encrypted all"),
        (Recipe(identity=made.ON_WRITE, to_go=True), "not yet encrypted all"),
        (Recipe(state=(2, 4), encrypted=256 * KIB), "under way (state 2, to become 4)"),
        (Recipe(state=(4, 1)), "left unfinished"),
        (Recipe(state=(1, 1)), "it says that it is decrypted"),
        (Recipe(state=(5, 4), encrypted=256 * KIB, converting=64 * KIB), "left unfinished"),
        (Recipe(head_at=130 * KIB), "where they can not be"),
        (Recipe(head_at=4 * KIB), "where they can not be"),
        (Recipe(encrypted=300 * KIB), "where they can not be"),
        (Recipe(protectors=("tpm",) * 65), "65 key protectors"),
        (Recipe(protectors=("password",) * 17), "17 key protectors"),
    ],
)
def test_what_is_not_sure_is_refused_with_its_reason(recipe: Recipe, reason: str):
    data = of(recipe)
    found = row(data, BEK)
    assert (found.kind, found.status, found.source) == ("BitLocker", VolumeStatus.UNREADABLE, None)
    assert reason in found.reason
    assert found.uuid == str(made.VOLUME)


def test_what_lies_behind_the_volume_is_not_shown():
    """A partition that is larger than what BitLocker encrypted."""
    plain = pattern()
    found = row(volume(Recipe(), plain) + b"older data" * 1000, BEK)
    assert content(found) == shown(Recipe(), plain)


def test_no_read_leaves_the_device_that_a_volume_was_cut_to():
    """A partition that became smaller than what BitLocker says."""
    recipe = replace(Recipe(), places=(64 * KIB, 128 * KIB, 192 * KIB), head_at=32 * KIB)
    found = row(of(recipe)[: 300 * KIB], BEK)
    assert found.size_bytes == 300 * KIB
    assert content(found) == shown(recipe, pattern())[: 300 * KIB]
    assert "on a device of" in found.reason


def test_an_ordinary_fat_made_by_windows_95_is_not_bitlocker_to_go():
    data = bytearray(image("fat").read_at(0, 2 << 20))
    data[3:11] = b"MSWIN4.1"
    assert find_bitlocker(BytesSource(bytes(data))) is None
    assert row(bytes(data)).kind == "vfat"


def test_a_volume_key_that_is_another_volumes_is_damage():
    source = BytesSource(of(Recipe()))
    header = find_bitlocker(source)
    assert header is not None
    assert header.key is not None
    for broken in (
        header._replace(key=header.key._replace(nonce=bytes(12))),
        header._replace(method=header.method._replace(key_bytes=64)),
    ):
        with pytest.raises(GuestDamaged):
            unlock(source, broken, startup_file(0))
    with pytest.raises(GuestUnsupported, match="so it is"):
        unlock(source, header._replace(problem="so it is"), startup_file(0))


def test_ntfs_in_an_encrypted_partition_is_read():
    ntfs = image("ntfs")
    size = ntfs.size_bytes
    places = (size + 64 * KIB, size + 128 * KIB, size + 192 * KIB)
    recipe = Recipe("xts-128", places=places, head_at=size + 32 * KIB)
    plain = ntfs.read_at(0, size) + bytes(256 * KIB)
    disk = Disk("0", BytesSource(volume(recipe, plain, used_only=True)))
    with pytest.raises(GuestLocked, match="startup key file"):
        GuestReading([disk]).root("0")
    guest, bare = GuestReading([disk], [BEK]), opened("ntfs")
    assert guest.info("0") == bare.info
    compared = 0
    waiting = [bare.root]
    while waiting:
        node = waiting.pop()
        for entry in bare.list(node):
            stat = bare.stat(entry.node)
            assert guest.stat("0", entry.node) == stat
            if stat.kind is Kind.DIRECTORY:
                waiting.append(entry.node)
            elif stat.kind is Kind.FILE and compared < 40:
                length = min(stat.size_bytes, 1 << 20)
                assert guest.read("0", entry.node, 0, length) == bare.read(entry.node, 0, length)
                compared += 1
    assert compared == 40


def test_a_diffused_volume_read_in_small_steps_costs_no_more_than_its_pieces():
    """Undoing the diffuser of one sector takes as long as of a hundred."""
    recipe = VARIANTS["elephant-256"]
    source = BytesSource(of(recipe))
    header = find_bitlocker(source)
    assert header is not None
    plain = unlock(source, header, startup_file(0))
    assert plain is not None
    source.read_bytes = 0
    expected = shown(recipe, pattern())
    for at in range(0, plain.size_bytes - 700, 700):
        assert plain.read_at(at, 700) == expected[at : at + 700]
    assert source.read_bytes <= plain.size_bytes
    assert plain.read_at(0, plain.size_bytes) == expected
