"""That the volumes our tests make are BitLocker is said by two programs that have read real ones for years, cryptsetup
and dislocker. What they decrypt is what our reader shows.

Volumes of Windows itself are among cryptsetup's own tests; they are not ours to keep, so they are compared if
XBFS_BITLOCKER_IMAGES names the directory that its ``tests/bitlk-images.tar.xz`` was unpacked into.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import bitlocker_images as made
from tests.support.bitlocker_images import KIB, Recipe, pattern, shown, startup_file, volume
from tests.support.guest_sources import FileSource
from tests.support.volume_images import content, scan
from xbfs_engine.guestfs.volumes import Disk, VolumeKey, VolumeStatus, find_volumes
from xbfs_engine.guestfs.volumes.bitlocker import find_bitlocker, unlock

PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
WINDOWS = os.environ.get("XBFS_BITLOCKER_IMAGES", "")
VARIANTS = {
    **{method: Recipe(method) for method in made.METHODS},
    "xts-256-4k": Recipe("xts-256", sector=4096),
    "cbc-128-4k": Recipe("cbc-128", sector=4096),
    "to-go": Recipe("cbc-256", to_go=True),
    "vista-128": Recipe("elephant-128", version=1),
    "vista-256": Recipe("elephant-256", version=1),
    "paused-early": Recipe(encrypted=150 * KIB, state=(5, 4)),
    "paused-late": Recipe("cbc-256", encrypted=300 * KIB, state=(5, 1)),
}
SECRETS = {"password": "plain words, 123", "recovery": made.RECOVERY}


def run(*command: str | Path, status: int = 0) -> str:
    program = shutil.which(str(command[0]), path=PATH)
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(
        [program, *map(str, command[1:])], capture_output=True, check=False, env={"PATH": PATH, "LC_ALL": "C.UTF-8"}
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout.decode("utf-8", "replace")


def written(directory: Path, recipe: Recipe) -> bytes:
    data = volume(recipe, pattern(sector=recipe.sector))
    (directory / "volume").write_bytes(data)
    (directory / "key.bek").write_bytes(startup_file(0))
    return data


@pytest.mark.parametrize("variant", VARIANTS)
def test_dislocker_decrypts_the_same(tmp_path: Path, variant: str):
    recipe = VARIANTS[variant]
    data = written(tmp_path, recipe)
    opened = scan({0: data}, (VolumeKey(startup_file(0)),)).volumes[0]
    assert content(opened) == shown(recipe, pattern(sector=recipe.sector))
    run("dislocker-file", "-q", "-r", "-f", tmp_path / "key.bek", "-V", tmp_path / "volume", "--", tmp_path / "plain")
    theirs = (tmp_path / "plain").read_bytes()
    length = len(theirs)
    assert length >= (recipe.encrypted or len(data))
    if recipe.version == 1:
        # Up to 0.7.3 it leaves out where the MFT's mirror is, and decrypts the boot sector's copy, which is plain.
        theirs = theirs[:56] + content(opened)[56:64] + theirs[64:]
        length -= recipe.sector
    assert theirs[:length] == content(opened)[:length]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("vista")])
def test_cryptsetup_reads_the_header_and_finds_the_same_key(tmp_path: Path, variant: str):
    recipe = VARIANTS[variant]
    written(tmp_path, recipe)
    dump = run(
        "cryptsetup", "-q", "bitlkDump", tmp_path / "volume", "--dump-volume-key", "--key-file", tmp_path / "key.bek"
    )
    found = bytes.fromhex(re.sub(r"\s", "", dump.partition("MK dump:")[2]))
    key = made.sector_key(recipe)
    # Of the 128 bits with the diffuser it leaves out what is not used.
    assert found == (key if recipe.method != "elephant-128" else key[:16] + key[32:48])
    dump = run("cryptsetup", "bitlkDump", tmp_path / "volume")
    assert str(made.VOLUME) in dump
    assert str(made.protector_id(0)) in dump
    assert "VMK protected with startup key" in dump


@pytest.mark.parametrize("kind", SECRETS)
def test_both_take_the_same_passwords(tmp_path: Path, kind: str):
    """Windows' image of a password outside ASCII is among cryptsetup's; not every version of the two takes one."""
    recipe = Recipe(protectors=("tpm", kind), secrets={f"{kind}1": SECRETS[kind]})
    data = written(tmp_path, recipe)
    assert scan({0: data}, (VolumeKey(SECRETS[kind].encode()),)).volumes[0].within == ("BitLocker",)
    (tmp_path / "secret").write_text(SECRETS[kind])
    dump = run(
        "cryptsetup", "-q", "bitlkDump", tmp_path / "volume", "--dump-volume-key", "--key-file", tmp_path / "secret"
    )
    assert "MK dump:" in dump
    option = ("-u" if kind == "password" else "-p") + SECRETS[kind]
    run("dislocker-file", "-q", "-r", option, "-V", tmp_path / "volume", "--", tmp_path / "plain")
    assert (tmp_path / "plain").read_bytes() == shown(recipe, pattern())


def test_dislocker_opens_what_is_suspended(tmp_path: Path):
    written(tmp_path, Recipe(protectors=("clear",)))
    run("dislocker-file", "-q", "-r", "-c", "-V", tmp_path / "volume", "--", tmp_path / "plain")
    assert (tmp_path / "plain").read_bytes() == shown(Recipe(), pattern())


def windows_cases() -> dict[str, dict[str, str]]:
    cases: dict[str, dict[str, str]] = {}
    if not WINDOWS:
        return cases
    for line in (Path(WINDOWS) / "images.conf").read_text().splitlines():
        if line.startswith("["):
            case = cases[line[1:-1]] = {}
        elif "=" in line:
            name, _, value = line.partition("=")
            case[name] = value
    return cases


@pytest.mark.skipif(not WINDOWS, reason="XBFS_BITLOCKER_IMAGES names no directory of cryptsetup's images")
@pytest.mark.parametrize("name", windows_cases())
def test_what_windows_made_is_what_the_kernel_decrypts(name: str):
    """Their checksums are of whole volumes as dm-crypt shows them."""
    facts = windows_cases()[name]
    with FileSource(Path(WINDOWS) / f"{name}.img") as source:
        header = find_bitlocker(source)
        assert header is not None
        assert header.uuid == facts["GUID"]
        if not facts["SHA256SUM"]:
            assert "not yet encrypted" in header.problem
            return
        secrets: list[bytes | None] = [facts[key].encode() for key in ("PW", "RP", "RP2") if facts.get(key)]
        if "SK_VMK_GUID" in facts:
            secrets.append((Path(WINDOWS) / f"{facts['SK_VMK_GUID'].upper()}.BEK").read_bytes())
        if "CLEARKEY_VMK_GUID" in facts:
            secrets.append(None)
        assert secrets
        plains = [unlock(source, header, secret) for secret in secrets]
        digest = hashlib.sha256()
        for at in range(0, source.size_bytes, 1 << 20):
            length = min(1 << 20, source.size_bytes - at)
            first, *others = (plain.read_at(at, length) for plain in plains if plain is not None)
            assert len(others) == len(secrets) - 1
            if not at:
                assert all(other == first for other in others)
            digest.update(first)
        assert digest.hexdigest() == facts["SHA256SUM"]
        inside = find_volumes([Disk("0", source)], [VolumeKey(secret) for secret in secrets if secret]).volumes[0]
        assert (inside.status, inside.uuid) == (VolumeStatus.FILESYSTEM, facts["UUID"])
