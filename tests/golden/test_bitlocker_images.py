"""Kept BitLocker volumes read as dislocker read them when they were made.

``python -m tests.golden.test_bitlocker_images`` makes them anew; dislocker tells the checksums.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path

import pytest

from tests.support.bitlocker_images import KIB, RECOVERY, Recipe, pattern, startup_file, volume
from tests.support.volume_images import GOLDEN, content, scan
from xbfs_engine.guestfs.volumes import VolumeKey

KEPT = GOLDEN / "bitlocker.tar.xz"
ASCII = "plain words, 123"
SECRETS = {"clear": (), "external": (startup_file(0),), "password": (ASCII.encode(),), "recovery": (RECOVERY.encode(),)}
RECIPES = {
    "xts-128": Recipe("xts-128", protectors=("password",), secrets={"password0": ASCII}),
    "xts-256": Recipe("xts-256", protectors=("recovery",), sector=4096),
    "cbc-128": Recipe("cbc-128", protectors=("clear",), to_go=True),
    "elephant-256": Recipe("elephant-256"),
    "vista": Recipe("elephant-128", version=1),
}


@cache
def kept() -> dict[str, bytes]:
    with lzma.open(KEPT) as stream, tarfile.open(fileobj=stream) as archive:
        members = [(member.name, archive.extractfile(member)) for member in archive]
        return {name: content.read() for name, content in members if content is not None}


@pytest.mark.parametrize("name", RECIPES)
def test_a_kept_volume_reads_as_it_did(name: str):
    facts = json.loads(kept()["facts.json"])[name]
    keys = tuple(VolumeKey(secret) for secret in SECRETS[RECIPES[name].protectors[0]])
    found = scan({0: kept()[name]}, keys).volumes[0]
    assert found.within == ("BitLocker",)
    data = content(found)
    assert (len(data), hashlib.sha256(data[: facts["length"]]).hexdigest()) == (facts["size"], facts["sha256"])


def make() -> None:
    """Little is written on each volume, so that it is small when compressed."""
    members: dict[str, bytes] = {}
    facts = {}
    for name, recipe in RECIPES.items():
        plain = pattern(sector=recipe.sector)
        plain = plain[: 12 * KIB] + bytes(len(plain) - 12 * KIB)
        members[name] = volume(recipe, plain, used_only=True)
        facts[name] = told_by_dislocker(members[name], recipe)
    members["facts.json"] = json.dumps(facts, indent=1).encode()
    with lzma.open(KEPT, "wb", preset=9) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def told_by_dislocker(data: bytes, recipe: Recipe) -> dict[str, int | str]:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "volume").write_bytes(data)
        (place / "key").write_bytes(startup_file(0))
        kind = recipe.protectors[0]
        means = {"clear": "-c", "external": f"-f{place}/key", "password": f"-u{ASCII}", "recovery": f"-p{RECOVERY}"}[
            kind
        ]
        command = ["dislocker-file", "-q", "-r", means, "-V", f"{place}/volume", "--", f"{place}/plain"]
        subprocess.run(command, check=True)
        plain = (place / "plain").read_bytes()
    # Of Windows Vista's it reads the last sector and the place of the MFT's mirror, 8, otherwise than Windows.
    length = len(plain)
    if recipe.version == 1:
        plain = plain[:56] + (8).to_bytes(8, "little") + plain[64:]
        length -= recipe.sector
    return {"size": len(plain), "length": length, "sha256": hashlib.sha256(plain[:length]).hexdigest()}


if __name__ == "__main__":
    make()
