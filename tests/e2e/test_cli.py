"""The main job by the real command line, two writers at once, readers beside a writer, and commands stopped midway."""

from __future__ import annotations

import filecmp
import json
import os
import pty
import signal
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.support.cli import CHUNK, COMMAND, MIB, PASSPHRASE, World, bitmap, make_world
from tests.support.runtime import SeededRandom

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BIG = 160 * MIB
"""More than two threads put into their first packs."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("big") / "big.raw"
    path.write_bytes(SeededRandom(2).token(BIG))
    return path


def same_disk(image: Path, image_format: str, raw: Path) -> bool:
    """Whether qemu-img reads the same bytes; it rounds the raw size up to sectors, and a VHD's to 2 MiB."""
    words = ["qemu-img", "compare", "-f", image_format, "-F", "raw", str(image), str(raw)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_a_full_backup_reads_what_is_allocated_and_a_delta_what_has_changed(world: World) -> None:
    (full,), (delta,) = world.full["point"]["disks"], world.delta["point"]["disks"]
    assert (full["method"], full["size_bytes"]) == ("full", 5 * MIB + 777)
    assert full["read"]["source_bytes"] == world.full["read_bytes"] < 2 * MIB + 4 * CHUNK
    assert delta["method"] == "cbt"
    assert delta["read"] == {
        "source_bytes": 3 * CHUNK,
        "zero_bytes": CHUNK,
        "unchanged_bytes": 0,
        "duplicate_bytes": 0,
        "new_bytes": 2 * CHUNK,
    }
    assert world.delta["point"]["parent"] == world.ids[0]
    assert world.delta["point"]["vm_uuid"] == world.full["point"]["vm_uuid"]
    assert delta["vdi_uuid"] == full["vdi_uuid"]
    assert world.delta["bottleneck"] in world.delta["stage_seconds"]
    assert 0 < world.delta["point"]["run"]["stored_bytes"] < 3 * CHUNK
    assert "gen2.cbt" in delta["reason"]


def test_a_backup_tells_people_what_it_cost_and_how_to_look_at_it(world: World, tmp_path: Path) -> None:
    copy = world.copy(tmp_path)
    told = copy.good(
        "backup", "image", copy.gen2, copy.gen1, "--vm", "two disks", "--disk", "0", "--disk", "5"
    ).out.decode()
    point = copy.points()[-1]
    assert f"restore point {point[:12]} of two disks at 20" in told
    assert "disk 0: gen2.raw, 5.0 MiB\n  full: first point of this VM\n  read " in told
    assert "disk 5: gen1.raw, 5.0 MiB" in told
    assert "unchanged 0 B, duplicate " in told
    for word in ("stored ", "metadata", "took ", "MB/s", "bottleneck: ", f"xbfs mount DIR; ls DIR/by-id/{point}/disks"):
        assert word in told


def test_points_are_listed_shown_and_found_in_every_way(world: World) -> None:
    first, second = world.ids
    listed = world.good("points", "--json").json["points"]
    assert listed == [world.full["point"], world.delta["point"]]
    lines = world.good("points", "web").out.decode().splitlines()
    assert [line.split()[0] for line in lines] == ["POINT", first[:12], second[:12]]
    times = [point["time"] for point in listed]
    for name, point in (
        (first[:8], first),
        (first, first),
        ("web@latest", second),
        (f"web@{times[0]}", first),
        (f"web@{times[1]}", second),
        (f"{listed[0]['vm_uuid']}@latest", second),
    ):
        assert world.good("show", name, "--json").json["id"] == point
    shown = world.good("show", "web@latest").out.decode()
    assert second in shown
    assert "read 192.0 KiB: zero 64.0 KiB, unchanged 0 B, duplicate 0 B, new 128.0 KiB" in shown


def test_diff_lists_exactly_the_changed_extents(world: World) -> None:
    told = world.good("diff", *world.ids, "--json").json
    assert (told["disk"], told["size_bytes"]) == (0, 5 * MIB + 777)
    assert told["extents"] == [
        {"offset": CHUNK, "length": CHUNK, "data": True},
        {"offset": 3 * CHUNK, "length": CHUNK, "data": False},
        {"offset": 32 * CHUNK, "length": CHUNK, "data": True},
    ]
    assert told["totals"] == {
        "extents": 3,
        "changed_bytes": 3 * CHUNK,
        "data_bytes": 2 * CHUNK,
        "zero_bytes": CHUNK,
    }
    assert world.good("diff", "web@latest", "web@latest", "--json").json["extents"] == []
    text = world.good("diff", *world.ids).out.decode()
    assert [line.split() for line in text.splitlines()[1:4]] == [
        [str(block * CHUNK), str(CHUNK), kind] for block, kind in ((1, "data"), (3, "zero"), (32, "data"))
    ]


def test_diff_over_growth_is_clipped_at_the_end_of_the_newer_disk(world: World, tmp_path: Path) -> None:
    copy = world.copy(tmp_path)
    size = 40 * MIB + 100  # past one leaf: the map's root is a level higher than before
    with copy.gen2.open("r+b") as file:
        file.truncate(size)
        file.seek(size - 100)
        file.write(b"y" * 100)
    (tmp_path / "grown.json").write_text(json.dumps([[size - 100, 100]]))
    copy.good("backup", "image", copy.gen2, "--vm", "web", "--changed", f"0={tmp_path / 'grown.json'}")
    grown = copy.good("diff", world.ids[1], "web@latest", "--json").json
    assert (grown["old_size_bytes"], grown["size_bytes"]) == (5 * MIB + 777, size)
    # The old last chunk was short, so its longer successor differs by id.
    assert grown["extents"] == [
        {"offset": 5 * MIB, "length": CHUNK, "data": True},
        {"offset": 40 * MIB, "length": 100, "data": True},
    ]
    shrunk = copy.good("diff", "web@latest", world.ids[1], "--json").json
    assert shrunk["extents"] == [{"offset": 5 * MIB, "length": 777, "data": True}]
    copy.good("export", "web@latest", "-o", tmp_path / "out.raw")
    assert filecmp.cmp(tmp_path / "out.raw", copy.gen2, shallow=False)


def test_both_points_come_back_in_every_format(world: World, tmp_path: Path) -> None:
    for point, source in zip(world.ids, (world.gen1, world.gen2), strict=True):
        raw, vhd, fixed = (tmp_path / f"{point[:8]}.{suffix}" for suffix in ("raw", "vhd", "fixed"))
        told = world.good("export", point, "--disk", "0", "--format", "raw", "-o", raw, "--json").json
        assert (told["image_bytes"], told["file"]) == (5 * MIB + 777, str(raw))
        assert filecmp.cmp(raw, source, shallow=False)
        assert raw.stat().st_blocks * 512 < 3 * MIB
        world.good("export", point, "--format", "vhd", "-o", vhd)
        world.good("export", point, "--format", "vhd-fixed", "-o", fixed)
        assert same_disk(vhd, "vpc", source)
        assert same_disk(fixed, "vpc", source)
        assert same_disk(raw, "raw", source)
    assert world.good("export", "web@latest", "-o", "-").out == world.gen2.read_bytes()
    world.good("export", "web@latest", "-o", raw, "--overwrite")


def test_a_healthy_repository_is_called_so(world: World) -> None:
    for verb, deep in (("check", False), ("verify", True)):
        told = world.good(verb, "--json").json
        assert (told["healthy"], told["findings"]) == (True, [])
        assert (told["examined"]["read_bytes"] > MIB) == deep
        assert "no damage" in world.good(verb).out.decode()


def test_the_recovery_code_and_new_key_slots_open_the_repository(world: World, tmp_path: Path) -> None:
    copy = world.copy(tmp_path)
    assert copy.run("points", XBFS_PASSPHRASE=world.init["recovery_code"].lower()).code == 0
    (tmp_path / "secret").write_text("another one\n")
    added = copy.run("key", "add", "--role", "node", "--json", XBFS_NEW_PASSPHRASE_FILE=str(tmp_path / "secret"))
    slot = added.json["slot"]
    assert slot["role"] == "node"
    for done in (
        copy.run("backup", "image", copy.gen1, "--vm", "by node", XBFS_PASSPHRASE="another one"),
        copy.run("points", XBFS_PASSPHRASE=None, XBFS_PASSPHRASE_FILE=str(tmp_path / "secret")),
    ):
        assert done.code == 0, done.err
    assert len(copy.good("key", "list", "--json").json["slots"]) == 3
    assert copy.good("key", "remove", slot["slot_id"], "--dry-run", "--json").json["removed"] is False
    assert copy.good("key", "remove", slot["slot_id"][:6], "--json").json["removed"] is True
    assert copy.run("points", XBFS_PASSPHRASE="another one").code == 51


def test_the_mount_shows_what_was_backed_up_and_its_paths_name_points(world: World, tmp_path: Path) -> None:
    mount = tmp_path / "mnt"
    mount.mkdir()
    told = world.good("mount", mount, "--background", "--json").json
    try:
        assert told["mount_point"] == str(mount)
        disks = mount / "vms" / "web" / "latest" / "disks"
        assert filecmp.cmp(disks / "0.raw", world.gen2, shallow=False)
        assert same_disk(disks / "0.vhd", "vpc", world.gen2)
        assert filecmp.cmp(mount / "by-id" / world.ids[0] / "disks" / "0.raw", world.gen1, shallow=False)
        assert world.good("show", disks / "0.raw", "--json").json["id"] == world.ids[1]
        assert world.run("mount", mount).code == 62
    finally:
        world.good("umount", mount)
    assert world.run("umount", mount).code == 65


def test_two_backups_at_once_both_succeed(world: World, tmp_path: Path) -> None:
    copy = world.copy(tmp_path)
    (copy.directory / "c.raw").write_bytes(copy.gen2.read_bytes()[:MIB] + SeededRandom(3).token(3 * MIB))
    jobs = ((copy.gen1, "a"), (copy.directory / "c.raw", "c"), (copy.gen2, "web"))
    with ExitStack() as stack:
        running = [stack.enter_context(copy.started("backup", "image", path, "--vm", vm)) for path, vm in jobs]
        for process in running:
            _, told = process.communicate(timeout=120)
            assert process.returncode == 0, told
    assert len(copy.points()) == 5
    for path, vm in jobs:
        assert copy.good("export", f"{vm}@latest", "-o", "-").out == path.read_bytes()
    assert copy.good("verify", "--json").json["healthy"]


def test_readers_beside_a_writer_see_only_committed_points(world: World, big: Path, tmp_path: Path) -> None:
    copy = world.copy(tmp_path)
    with copy.stopped_in_the_middle("backup", "image", big, "--vm", "big") as writer:
        assert copy.points() == list(world.ids)
        assert copy.good("export", "web@latest", "-o", "-").out == copy.gen2.read_bytes()
        told = copy.good("verify", "--json").json
        assert (told["healthy"], told["points_hit"]) == (True, [])
        writer.send_signal(signal.SIGCONT)
        _, errors = writer.communicate(timeout=120)
    assert writer.returncode == 0, errors
    assert copy.points()[:-1] == list(world.ids)
    copy.good("export", "big@latest", "-o", tmp_path / "out.raw")
    assert filecmp.cmp(tmp_path / "out.raw", big, shallow=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_backup_that_is_stopped_leaves_no_point_and_the_next_one_succeeds(
    number: int, world: World, big: Path, tmp_path: Path
) -> None:
    copy = world.copy(tmp_path)
    with copy.stopped_in_the_middle("backup", "image", big, "--vm", "big", "--json") as writer:
        writer.send_signal(number)
        writer.send_signal(signal.SIGCONT)
        out, errors = writer.communicate(timeout=120)
    assert (writer.returncode, json.loads(out)["error"]["class"]) == (130, "Cancelled"), errors
    assert copy.points() == list(world.ids)
    assert not list((copy.repository / "tmp").iterdir())
    again = copy.good("backup", "image", big, "--vm", "big", "--json").json
    assert again["point"]["run"]["stored_bytes"] <= BIG * 1.01
    assert copy.good("verify", "--json").json["healthy"]


def test_an_image_that_grows_while_it_is_read_makes_no_point(world: World, big: Path, tmp_path: Path) -> None:
    copy = world.copy(tmp_path)
    growing = tmp_path / "growing.raw"
    growing.write_bytes(big.read_bytes())
    with copy.stopped_in_the_middle("backup", "image", growing, "--vm", "big", "--json") as writer:
        os.truncate(growing, BIG + 512)
        writer.send_signal(signal.SIGCONT)
        out, errors = writer.communicate(timeout=120)
    assert (writer.returncode, json.loads(out)["error"]["class"]) == (42, "SourceChanged"), errors
    assert b"hint: back up a snapshot" in errors
    assert copy.points() == list(world.ids)


def test_over_reporting_bitmaps_store_nothing_twice(world: World, tmp_path: Path) -> None:
    copy = world.copy(tmp_path)
    copy.bitmap.write_text(bitmap(range(40), 5 * MIB + 777))
    told = copy.good("backup", "image", copy.gen2, "--vm", "web", "--changed", copy.bitmap, "--json").json
    (disk,) = told["point"]["disks"]
    assert disk["read"]["source_bytes"] == 40 * CHUNK
    assert (disk["read"]["new_bytes"], told["point"]["run"]["stored_bytes"]) == (0, 0)


def on_terminal(world: World, words: Sequence[str], typed: Sequence[str]) -> tuple[int, str]:
    """Run a command on a terminal of its own, answering each prompt."""
    environment = world.environment(XBFS_PASSPHRASE=None)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(COMMAND[0], [*COMMAND, *words], environment)
    shown = b""
    answers = list(typed)
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # EIO: the last process on the terminal has ended
            break
        if not piece:
            break
        shown += piece
        if shown.endswith(b": ") and answers:
            os.write(terminal, answers.pop(0).encode() + b"\n")
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


def test_a_passphrase_is_asked_for_on_a_terminal_and_never_shown(world: World, tmp_path: Path) -> None:
    code, shown = on_terminal(world, ["points"], [PASSPHRASE])
    assert (code, world.ids[1][:12] in shown, PASSPHRASE in shown) == (0, True, False)
    other = ["-r", str(tmp_path / "other"), "init"]
    code, shown = on_terminal(world, other, ["one", "two"])
    assert (code, "passphrases differ" in shown) == (2, True)
    assert not (tmp_path / "other").exists()
    code, shown = on_terminal(world, other, ["one", "one"])
    assert (code, shown.count("recovery code: ")) == (0, 1)
