"""LUKS volumes whose headers cryptsetup made, with data encrypted sector by sector through another path than ours, and
LUKS volumes that are wholly qemu's work."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC, ECB, XTS

from tests.support.volume_images import BytesSource, by_name, content, golden_disks, scan
from xbfs_engine.core.errors import GuestUnsupported
from xbfs_engine.guestfs.volumes import VolumeKey, VolumeStatus
from xbfs_engine.guestfs.volumes.luks import find_luks, unlock

if TYPE_CHECKING:
    from pathlib import Path

PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
MIB = 1 << 20
SECRET = b"correct horse"
PLAIN = b"".join(n.to_bytes(8, "little") for n in range(MIB // 8))
FAST = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
CASES = {
    "luks1-xts": ("luks1", "aes-xts-plain64", 256, 512, ("--pbkdf-force-iterations", "1000")),
    "luks1-xts-512": ("luks1", "aes-xts-plain64", 512, 512, ("--pbkdf-force-iterations", "1000", "-h", "sha512")),
    "luks1-essiv": ("luks1", "aes-cbc-essiv:sha256", 256, 512, ("--pbkdf-force-iterations", "1000", "-h", "sha1")),
    "luks1-plain": ("luks1", "aes-cbc-plain", 128, 512, ("--pbkdf-force-iterations", "1000")),
    "luks2-xts": ("luks2", "aes-xts-plain64", 512, 512, FAST),
    "luks2-4k": ("luks2", "aes-xts-plain64", 512, 4096, FAST),
    "luks2-2k": ("luks2", "aes-xts-plain64", 256, 2048, FAST),
    "luks2-essiv-4k": ("luks2", "aes-cbc-essiv:sha256", 256, 4096, FAST),
    "luks2-argon2id": (
        "luks2", "aes-xts-plain64", 512, 4096,
        ("--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "4096", "--pbkdf-parallel", "2"),
    ),
    "luks2-argon2i": (
        "luks2", "aes-xts-plain64", 256, 512,
        ("--pbkdf", "argon2i", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "2048", "--pbkdf-parallel", "1"),
    ),
}  # fmt: skip


def run(*command: str | Path, given: bytes = b"") -> str:
    program = shutil.which(str(command[0]), path=PATH)
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(
        [program, *map(str, command[1:])], input=given, capture_output=True, check=False, env={"PATH": PATH}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def encrypt(cipher: str, key: bytes, data: bytes, sector_bytes: int) -> bytes:
    """Sector by sector with the library's own modes."""
    out = []
    for at in range(0, len(data), sector_bytes):
        number = (at // 512).to_bytes(16, "little")
        if cipher.startswith("aes-xts"):
            mode: XTS | CBC = XTS(number)
        elif "essiv" in cipher:
            essiv = Cipher(AES(hashlib.sha256(key).digest()), ECB()).encryptor()
            mode = CBC(essiv.update(number))
        else:
            mode = CBC(number)
        out.append(Cipher(AES(key), mode).encryptor().update(data[at : at + sector_bytes]))
    return b"".join(out)


def made(tmp_path: Path, case: str, *more: str) -> bytearray:
    """A device with a header of cryptsetup's and PLAIN behind it."""
    kind, cipher, bits, sector_bytes, options = CASES[case]
    key = hashlib.shake_256(case.encode()).digest(bits // 8)
    (tmp_path / "key").write_bytes(key)
    device = tmp_path / "device"
    device.touch()
    os.truncate(device, 20 * MIB)
    sectors = () if kind == "luks1" else ("--sector-size", str(sector_bytes))
    run(
        "cryptsetup", "-q", "luksFormat", "--type", kind, "-c", cipher, "-s", str(bits), "--volume-key-file",
        tmp_path / "key", "--key-file", "-", *sectors, *options, *more, device, given=SECRET,
    )  # fmt: skip
    if kind == "luks1":
        dump = run("cryptsetup", "luksDump", device)
        start = 512 * int(next(line.split()[-1] for line in dump.splitlines() if line.startswith("Payload offset")))
    else:
        dump = run("cryptsetup", "luksDump", "--dump-json-metadata", device)
        start = int(json.loads(dump)["segments"]["0"]["offset"])
    data = bytearray(device.read_bytes())
    data[start : start + MIB] = encrypt(cipher, key, PLAIN, sector_bytes)
    return data[: start + MIB]


def qemu(tmp_path: Path, options: str) -> None:
    """A device that qemu encrypted PLAIN into."""
    (tmp_path / "plain").write_bytes(PLAIN)
    command = [
        "qemu-img", "convert", "--object", f"secret,id=s,data={SECRET.decode()}", "-f", "raw", "-O", "luks",
        "-o", f"key-secret=s,iter-time=10,{options}", tmp_path / "plain", tmp_path / "device",
    ]  # fmt: skip
    for attempt in range(12):
        try:
            run(*command)
        except AssertionError as error:
            # It measures the processor first, and gives up when something else keeps that busy.
            if "accurate CPU usage" not in str(error) or attempt == 11:
                raise
        else:
            return


@pytest.mark.parametrize("case", CASES)
def test_a_volume_opens_with_its_passphrase_only(tmp_path: Path, case: str):
    data = bytes(made(tmp_path, case))
    locked = by_name(scan({0: data}))["0"]
    assert (locked.kind, locked.status) == ("crypto_LUKS", VolumeStatus.LOCKED)
    assert locked.source is None
    wrong = by_name(scan({0: data}, (VolumeKey(b"wrong"),)))["0"]
    assert wrong.status is VolumeStatus.LOCKED
    assert "no key that was given opens it" in wrong.reason
    opened = by_name(scan({0: data}, (VolumeKey(b"wrong"), VolumeKey(SECRET))))["0"]
    assert opened.within == ("crypto_LUKS",)
    assert content(opened) == PLAIN


def test_a_second_key_slot_and_a_key_file_open_it_too(tmp_path: Path):
    made(tmp_path, "luks2-xts")
    (tmp_path / "other").write_bytes(b"\0\1binary\n" * 40)
    run(
        "cryptsetup", "-q", "luksAddKey", "--key-file", "-", *FAST, tmp_path / "device", tmp_path / "other",
        given=SECRET,
    )  # fmt: skip
    source = BytesSource((tmp_path / "device").read_bytes())
    header = find_luks(source)
    assert header is not None
    assert len(header.keyslots) == 2
    assert unlock(source, header, (tmp_path / "other").read_bytes()) is not None
    assert unlock(source, header, SECRET) is not None
    assert unlock(source, header, b"\0\1binary\n") is None
    run("cryptsetup", "-q", "luksKillSlot", tmp_path / "device", "0")
    source = BytesSource((tmp_path / "device").read_bytes())
    header = find_luks(source)
    assert header is not None
    assert unlock(source, header, SECRET) is None


def test_a_key_is_tried_only_where_it_belongs(tmp_path: Path):
    data = bytes(made(tmp_path, "luks2-xts"))
    uuid = run("cryptsetup", "luksUUID", tmp_path / "device").strip()
    for volume, status in [
        ("0", VolumeStatus.OTHER),
        (uuid, VolumeStatus.OTHER),
        ("1", VolumeStatus.LOCKED),
    ]:
        assert by_name(scan({0: data}, (VolumeKey(SECRET, volume),)))["0"].status is status
    assert SECRET.decode() not in repr(VolumeKey(SECRET))


def test_the_backup_of_a_header_is_enough(tmp_path: Path):
    data = made(tmp_path, "luks2-4k")
    data[:4096] = bytes(4096)
    opened = by_name(scan({0: bytes(data)}, (VolumeKey(SECRET),)))["0"]
    assert content(opened) == PLAIN
    locked = by_name(scan({0: bytes(data)}))["0"]
    assert "backup was used" in locked.reason


def test_both_headers_damaged_is_told(tmp_path: Path):
    data = made(tmp_path, "luks2-xts")
    data[5000] ^= 1
    data[16384 + 5000] ^= 1
    row = by_name(scan({0: bytes(data)}, (VolumeKey(SECRET),)))["0"]
    assert row.status is VolumeStatus.UNREADABLE
    assert row.reason == "its header and the backup of it are damaged"


def test_a_cipher_that_is_not_known_is_told(tmp_path: Path):
    qemu(tmp_path, "cipher-alg=serpent-256")
    row = by_name(scan({0: (tmp_path / "device").read_bytes()}, (VolumeKey(SECRET),)))["0"]
    assert row.status is VolumeStatus.UNREADABLE
    assert "serpent-xts-plain64" in row.reason


@pytest.mark.parametrize(
    ("mode", "vector", "more"),
    [("xts", "plain64", ""), ("cbc", "essiv", ",ivgen-hash-alg=sha256"), ("cbc", "plain64", "")],
)
def test_what_qemu_encrypted_reads_the_same(tmp_path: Path, mode: str, vector: str, more: str):
    qemu(tmp_path, f"cipher-alg=aes-256,cipher-mode={mode},ivgen-alg={vector}{more}")
    opened = by_name(scan({0: (tmp_path / "device").read_bytes()}, (VolumeKey(SECRET),)))["0"]
    assert content(opened) == PLAIN


def test_a_volume_group_in_an_encrypted_partition_is_found_after_unlocking(tmp_path: Path):
    """The usual installation of Debian and Ubuntu."""
    disks = dict(golden_disks("lvm"))
    inner = disks.pop(3)
    _, cipher, _, sector_bytes, _ = CASES["luks2-4k"]
    data = made(tmp_path, "luks2-4k")
    key = (tmp_path / "key").read_bytes()
    data[len(data) - MIB :] = encrypt(cipher, key, inner, sector_bytes)
    assert by_name(scan({**disks, 3: bytes(data)}))["vg0-thin"].source is None
    found = by_name(scan({**disks, 3: bytes(data)}, (VolumeKey(SECRET),)))
    assert content(found["vg0-thin"]) == content(by_name(scan(dict(golden_disks("lvm"))))["vg0-thin"])
    assert found["vg0-thin"].within == ("crypto_LUKS", "LVM2_member")


def test_a_header_that_asks_for_too_much_is_refused_before_anything_is_done(tmp_path: Path):
    source = BytesSource(bytes(made(tmp_path, "luks2-argon2id")))
    header = find_luks(source)
    assert header is not None
    for field, value in [("memory_kib", 1 << 30), ("iterations", 1 << 40), ("lanes", 1 << 20)]:
        slot = header.keyslots[0]
        slot = slot._replace(kdf=slot.kdf._replace(**{field: value}))
        with pytest.raises(GuestUnsupported, match="asks for"):
            unlock(source, header._replace(keyslots=(slot,)), SECRET)
