"""Disks that boot, made by tools/make_images: the micro guest and a Debian server. What they say on their consoles.

Both understand the same words (tools/images/micro_init.sh): check, write=NAME, load, off; the micro guest also stream.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

_MAKE_IMAGES = Path(__file__).parents[2] / "tools" / "make_images"

BOOTED = "XBFS-BOOT-OK"
"""What it prints once its root is mounted and the payload in it has the right digest."""
ROOT_OFFSET = 41 << 20
"""Where its ext4 begins, in bytes; for debugfs and e2fsck."""

_DATABASE = re.compile(r"XBFS-DB (\S+) count=(\d+) highest=(\d*) whole=(\d*)")
_ACKNOWLEDGED = re.compile(r"XBFS-ACK (\d+)\r?\n")


class Database(NamedTuple):
    """What the guest found in its database: "ok" if it could be read and checked, how many transactions, the last one,
    and whether all rows are whole."""

    integrity: str
    transactions: int
    highest: int
    whole: bool


def micro_disk() -> Path:
    """The micro guest's disk, never to be written to; skips the test where it can not be made."""
    return _made("micro")


def server_disk() -> Path:
    """The disk of a Debian 12 with systemd and PostgreSQL; else as the micro guest's. Takes two minutes, once."""
    return _made("server")


@functools.cache
def _made(variant: str) -> Path:
    done = subprocess.run([sys.executable, _MAKE_IMAGES, variant], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no {variant} guest: {done.stderr.strip()}")
    return Path(done.stdout.strip())


def acknowledged(console: str) -> int:
    """The last transaction that the console says is durable; 0 if there is none."""
    return max((int(number) for number in _ACKNOWLEDGED.findall(console)), default=0)


def database(console: str) -> Database:
    """What a guest started with ``check`` says of its database."""
    found = _DATABASE.search(console)
    assert found, console[-2000:]
    return Database(found[1], int(found[2]), int(found[3] or 0), found[4] == "1")
