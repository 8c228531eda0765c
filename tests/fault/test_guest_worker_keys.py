"""Keys of encrypted volumes given to a worker: cryptsetup made the header, and Argon2 runs within the sandbox."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import XTS

from tests.support import guest_golden
from tests.support.guest_workers import CountingLauncher
from tests.support.volume_images import BytesSource
from xbfs_engine.core.errors import GuestLocked
from xbfs_engine.core.runtime import SystemClock
from xbfs_engine.guestfs.volumes import Disk, VolumeKey, VolumeStatus
from xbfs_engine.guestfs.worker.client import GuestWorkers

if TYPE_CHECKING:
    from pathlib import Path

PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
SECRET = b"correct horse"
KEY = bytes(range(64))
SECTOR = 4096
ARGON2 = ("--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "65536", "--pbkdf-parallel", "4")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A disk with a LUKS2 header of four lanes, and FAT behind it."""
    program = shutil.which("cryptsetup", path=PATH)
    if program is None:
        pytest.skip("cryptsetup is not installed")
    folder: Path = tmp_path_factory.mktemp("luks")
    header, key, secret = folder / "header", folder / "key", folder / "secret"
    header.write_bytes(bytes(20 << 20))
    key.write_bytes(KEY)
    secret.write_bytes(SECRET)
    done = subprocess.run(
        [
            program, "luksFormat", "-q", "--type", "luks2", "--sector-size", str(SECTOR), "-s", "512",
            "--offset", "32768", "--volume-key-file", key, "--key-file", secret, *ARGON2, header,
        ],
        env={"PATH": PATH}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    inside = guest_golden.image("fat")
    plain = inside.read_at(0, inside.size_bytes)
    sealed = [
        Cipher(AES(KEY), XTS((at // 512).to_bytes(16, "little"))).encryptor().update(plain[at : at + SECTOR])
        for at in range(0, len(plain), SECTOR)
    ]
    return header.read_bytes()[: 16 << 20] + b"".join(sealed)


def test_keys_open_volumes_and_are_replaced(locked: bytes) -> None:
    launcher = CountingLauncher()
    with GuestWorkers(SystemClock(), launcher=launcher) as workers:
        guest = workers.open("locked", [Disk("0", BytesSource(locked))])
        assert [row.status for row in guest.volumes().rows] == [VolumeStatus.LOCKED]
        with pytest.raises(GuestLocked):
            guest.root("0")
        guest.give_keys([VolumeKey(b"wrong"), VolumeKey(SECRET)])
        assert [(row.name, row.kind) for row in guest.volumes().rows] == [("0", "vfat")]
        assert guest.list("0", guest.root("0")).entries
        guest.give_keys([VolumeKey(b"wrong")])
        assert [row.status for row in guest.volumes().rows] == [VolumeStatus.LOCKED]
        with pytest.raises(GuestLocked):
            guest.root("0")
        assert launcher.launched == 3
        assert workers.live == 1
