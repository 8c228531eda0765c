"""The adapter around fs_explorer: names that Linux takes, listings that go on, and pure Python only."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support import guest_golden
from xbfs_engine.core.errors import GuestDamaged, GuestUnsupported, GuestWrongKind
from xbfs_engine.guestfs.base import READ_BYTES_MAX
from xbfs_engine.guestfs.explorer.volume import fit_name

if TYPE_CHECKING:
    from xbfs_engine.guestfs.base import DirEntry, GuestFilesystem

NATIVE = """
import ctypes, os
from fs_explorer.codecs import native
from tests.unit.test_guest_explorer import read_everything

class Loaded(BaseException): ...

def refuse(*_, **__):
    raise Loaded

ctypes.CDLL = os.memfd_create = refuse
read_everything()
maps = open("/proc/self/maps").read()
assert "fs_explorer" not in maps and "memfd" not in maps, maps
assert not native._state.tried and not native._cache
try:
    # Outside of the adapter it would be.
    native.kernel("fsmeta")
except Loaded:
    print("pure")
"""


def read_everything() -> None:
    for name in guest_golden.NAMES:
        volume = guest_golden.opened(name)
        waiting = [volume.root]
        while waiting:
            node = waiting.pop()
            list(volume.xattrs(node))
            stat = volume.stat(node)
            if stat.kind.value == "d":
                waiting += [entry.node for entry in volume.list(node)]
                volume.lookup(node, b"anything")
            elif stat.kind.value == "f":
                # One of them is refused, and rightly.
                with suppress(GuestUnsupported):
                    volume.read(node, 0, READ_BYTES_MAX)


def test_the_compiled_helper_is_never_loaded() -> None:
    result = subprocess.run([sys.executable, "-c", NATIVE], capture_output=True, text=True, check=False)
    assert (result.stdout, result.returncode) == ("pure\n", 0), result.stderr


@given(st.binary(max_size=900))
@example(b"")
@example(b".")
@example(b"..")
@example("長".encode() * 255)
@example(b"\x80" * 300)
def test_any_name_becomes_one_that_linux_takes(name: bytes) -> None:
    fitted = fit_name(name)
    assert 0 < len(fitted) <= 255
    assert not {0, ord("/")} & set(fitted)
    assert fitted not in (b".", b"..")
    assert fit_name(fitted) == fitted


@given(st.text(min_size=100, max_size=255))
def test_what_is_cut_is_still_utf_8_and_told_apart(text: str) -> None:
    name = text.encode()
    assert fit_name(name).decode()
    assert fit_name(name + b"a" * 300) != fit_name(name + b"a" * 299 + b"b")


DIRECTORIES = {"ext4": b"dir400", "btrfs": b"dir120", "ntfs": b"many", "fat": b"many", "exfat": b"many"}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_listing_goes_on_at_any_cookie(name: str) -> None:
    volume = guest_golden.opened(name)
    entry = volume.lookup(volume.root, DIRECTORIES[name])
    assert entry is not None
    whole = list(volume.list(entry.node))
    assert len(whole) >= 100
    assert [e.cookie for e in whole] == sorted({e.cookie for e in whole})
    for fresh in (False, True):
        assert paged(name, volume, entry, fresh=fresh) == whole
    # Also from the middle of what was read before.
    assert list(volume.list(entry.node, whole[40].cookie)) == whole[41:]
    assert [volume.lookup(entry.node, e.name) for e in whole] == whole
    assert volume.lookup(entry.node, b"not there") is None
    assert volume.lookup(entry.node, whole[7].name + b"x") is None


def paged(name: str, volume: GuestFilesystem, directory: DirEntry, *, fresh: bool) -> list[DirEntry]:
    """In pages of 17, each from a volume opened anew or from the same one."""
    found: list[DirEntry] = []
    cookie = 0
    while True:
        volume = guest_golden.opened(name) if fresh else volume
        page = [entry for _, entry in zip(range(17), volume.list(directory.node, cookie), strict=False)]
        if not page:
            return found
        found += page
        cookie = page[-1].cookie


@pytest.mark.parametrize("name", DIRECTORIES)
def test_calls_for_the_wrong_kind_say_so(name: str) -> None:
    volume = guest_golden.opened(name)
    with pytest.raises((GuestWrongKind, GuestDamaged)):
        volume.read(volume.root, 0, 10)
    with pytest.raises(GuestWrongKind):
        volume.readlink(volume.root)
    files = [e for e in volume.list(volume.root) if e.kind.value == "f"]
    for entry in files[:1]:
        with pytest.raises(GuestWrongKind):
            list(volume.list(entry.node))
