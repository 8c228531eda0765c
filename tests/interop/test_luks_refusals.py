"""LUKS volumes that can not be opened as they are, or only with other means, say so: what cryptsetup itself leaves
behind in the midst of its work, and what a small process has no memory for."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.interop.test_luks_peers import FAST, MIB, SECRET, made, run
from tests.support.volume_images import by_name, content, scan
from xbfs_engine.guestfs.volumes import Volume, VolumeKey, VolumeStatus

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KEY = VolumeKey(SECRET)
SMALL = 480 * MIB
"""Of addresses: enough for Python with numpy and cryptography, not for 512 MiB more."""

HUNGRY = ("--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "524288", "--pbkdf-parallel", "1")


def row(data: bytes, *keys: VolumeKey) -> Volume:
    return by_name(scan({0: data}, keys))["0"]


def rewritten(data: bytearray, change: Callable[[dict[str, dict]], None]) -> bytes:
    """A LUKS2 header whose JSON was changed, with its checksum; the backup is no longer one."""
    size = int.from_bytes(data[8:16], "big")
    root = json.loads(data[4096:size].partition(b"\0")[0])
    change(root)
    data[4096:size] = json.dumps(root).encode().ljust(size - 4096, b"\0")
    data[448:512] = bytes(64)
    data[448:480] = hashlib.sha256(data[:size]).digest()
    data[size : size + 4096] = bytes(4096)
    return bytes(data)


def test_a_volume_that_is_being_encrypted_anew_is_refused(tmp_path: Path):
    made(tmp_path, "luks2-xts")
    device = tmp_path / "device"
    with device.open("r+b") as file:
        file.truncate(40 * MIB)
    run("cryptsetup", "-q", "reencrypt", "--init-only", "--key-file", "-", *FAST, device, given=SECRET)
    assert "online-reencrypt" in run("cryptsetup", "luksDump", device)
    found = row(device.read_bytes(), KEY)
    assert (found.kind, found.status) == ("crypto_LUKS", VolumeStatus.UNREADABLE)
    assert "needs online-reencrypt" in found.reason


def test_a_luks1_volume_that_is_being_encrypted_anew_is_refused(tmp_path: Path):
    data = made(tmp_path, "luks1-xts")
    data[:6] = b"LUKS\xde\xad"
    found = row(bytes(data), KEY)
    assert (found.kind, found.status) == ("crypto_LUKS", VolumeStatus.UNREADABLE)
    assert "left unfinished" in found.reason
    assert found.uuid == run("cryptsetup", "luksUUID", tmp_path / "device").strip()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda root: root["segments"].update({"1": dict(root["segments"]["0"])}), "2 segments"),
        (lambda root: root["segments"]["0"].update(integrity={"type": "hmac(sha256)"}), "not just encrypted"),
        (lambda root: root["segments"]["0"].update(type="hw-opal-crypt"), "not just encrypted"),
        (lambda root: root["segments"]["0"].update(type="linear"), "not just encrypted"),
        (lambda root: root["segments"]["0"].update(offset="0"), "lies elsewhere"),
        (lambda root: root["config"].update(requirements={"mandatory": ["opal"]}), "needs opal"),
        (lambda root: root["keyslots"].clear(), "no key slot takes a passphrase"),
    ],
)
def test_what_a_header_asks_for_beyond_decryption_is_refused(
    tmp_path: Path, change: Callable[[dict[str, dict]], None], reason: str
):
    found = row(rewritten(made(tmp_path, "luks2-xts"), change), KEY)
    assert (found.kind, found.status) == ("crypto_LUKS", VolumeStatus.UNREADABLE)
    assert reason in found.reason


def test_who_else_keeps_keys_is_told(tmp_path: Path):
    """A volume that only a TPM opens has key slots as any other."""
    made(tmp_path, "luks2-xts")
    device = tmp_path / "device"
    for keeper in ("vault", "clevis"):
        (tmp_path / "token").write_text(json.dumps({"type": keeper, "keyslots": ["0"]}))
        run("cryptsetup", "token", "import", "--json-file", tmp_path / "token", device)
    data = device.read_bytes()
    words = "it is encrypted and no key was given; 'clevis' and 'vault' may hold the keys of it, and can not be"
    assert (row(data).status, row(data).reason) == (VolumeStatus.LOCKED, f"{words} asked here")
    assert row(data, KEY).within == ("crypto_LUKS",)


def test_a_header_without_its_volume_is_told(tmp_path: Path):
    """As `cryptsetup luksFormat --header` leaves it on a stick."""
    data, header = tmp_path / "data", tmp_path / "header"
    for kind in ("luks1", "luks2"):
        for path in (data, header):
            path.write_bytes(bytes(20 * MIB))
        options = ("--pbkdf-force-iterations", "1000") if kind == "luks1" else FAST
        run(
            "cryptsetup", "-q", "luksFormat", "--type", kind, "--key-file", "-", *options, "--header", header, data,
            given=SECRET,
        )  # fmt: skip
        found = row(header.read_bytes(), KEY)
        assert (found.status, "lies elsewhere" in found.reason) == (VolumeStatus.UNREADABLE, True), found.reason


def in_a_small_process(path: Path, secret: bytes) -> str:
    """Status and reason, as a process says that may not take more memory."""
    program = (
        "import sys; from pathlib import Path; from tests.interop.test_luks_refusals import row, VolumeKey;"
        "found = row(Path(sys.argv[1]).read_bytes(), VolumeKey(sys.argv[2].encode()));"
        "print(found.status.value, found.reason, found.within)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path, secret],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (SMALL, SMALL)),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


def test_memory_that_is_not_to_be_had_is_told_and_other_key_slots_are_tried(tmp_path: Path):
    made(tmp_path, "luks2-xts")
    device = tmp_path / "device"
    (tmp_path / "hungry").write_bytes(b"hungry")
    run("cryptsetup", "-q", "luksAddKey", "--key-file", "-", *HUNGRY, device, tmp_path / "hungry", given=SECRET)
    assert in_a_small_process(device, SECRET).endswith("('crypto_LUKS',)")
    told = in_a_small_process(device, b"hungry")
    assert told.startswith("locked no key that was given opens it; not every key slot could be tried: 524288 KiB")
    run("cryptsetup", "-q", "luksKillSlot", device, "0")
    told = in_a_small_process(device, b"hungry")
    assert told.startswith("unreadable 524288 KiB of memory, which a LUKS key slot needs, are not to be had")


def test_a_key_that_fits_is_found_among_others_that_do_not(tmp_path: Path):
    data = bytes(made(tmp_path, "luks2-xts"))
    keys = [
        VolumeKey(b"one"),
        VolumeKey(b""),
        VolumeKey(SECRET, "other"),
        VolumeKey(b"\0" * 5000),
        KEY,
        VolumeKey(b"x"),
    ]
    assert len(content(row(data, *keys))) == MIB
