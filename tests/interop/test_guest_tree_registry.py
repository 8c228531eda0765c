"""Our reader of registry hives against hivex: what one writes the other reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.registry_hives import Keys, build, peer_read, peer_write, to_json, why_no_peer
from xbfs_engine.guestfs.tree.hive import Hive

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs_engine.guestfs.tree.hive import Key

pytestmark = pytest.mark.skipif(bool(why_no_peer()), reason=why_no_peer())

CONTENT: dict[str, Keys] = {
    "MountedDevices": {"\\DosDevices\\C:": b"\x12\x34\x56\x78" + bytes(8), "": b"default", "empty": b"", "few": b"abc"},
    "ControlSet001": {"Services": {f"service{number:04}": {"Start": b"\2\0\0\0"} for number in range(700)}},
    "Ünïcödé": {"日本語": {"値": "日本語".encode("utf-16-le")}},
}
LONG: dict[str, Keys] = {"long": {"exact": bytes(16344), "more": b"x" * 16345, "much": bytes(range(256)) * 400}}


def dump(hive: Hive, key: Key) -> dict[str, object]:
    found: dict[str, object] = {value.name: value.data.hex() for value in hive.values(key)}
    return found | {below.name: dump(hive, below) for below in hive.subkeys(key)}


def opened(data: bytes) -> Hive:
    return Hive(lambda offset, length: data[offset : offset + length], len(data))


def test_what_hivex_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "SYSTEM"
    peer_write(path, CONTENT)
    hive = opened(path.read_bytes())
    assert dump(hive, hive.root) == to_json(CONTENT) == peer_read(path)
    assert not hive.is_dirty


@pytest.mark.parametrize("form", ["lf", "lh", "li", "ri"])
def test_hivex_reads_the_hives_of_our_tests_as_we_do(tmp_path: Path, form: str) -> None:
    path = tmp_path / "SYSTEM"
    data = build(CONTENT | LONG, form)  # type: ignore[arg-type]
    path.write_bytes(data)
    hive = opened(data)
    assert dump(hive, hive.root) == to_json(CONTENT | LONG) == peer_read(path)
