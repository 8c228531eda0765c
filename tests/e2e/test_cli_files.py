"""index, find, history and diff --files in processes of their own, on the disk of a guest in two restore points."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.cli import World

if TYPE_CHECKING:
    from pathlib import Path

MKE2FS = shutil.which("mke2fs") or "/sbin/mke2fs"
DEBUGFS = shutil.which("debugfs") or "/sbin/debugfs"


def _change(path: Path, *commands: str) -> None:
    for command in commands:
        subprocess.run([DEBUGFS, "-w", "-R", command, path], check=True, capture_output=True)


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> World:
    """VM "web" with /etc/fstab of its own: then a file is deleted, one is grown, one is new."""
    folder = tmp_path_factory.mktemp("files")
    tree = folder / "tree"
    for name in ("etc", "home/me", "usr", "bin", "sbin"):
        (tree / name).mkdir(parents=True)
    (tree / "etc/fstab").write_text("UUID=5b8c0a6a-5a0f-4b3e-9a51-2b7a6a1d8f01 / ext4 defaults 0 1\n")
    (tree / "etc/os-release").write_text("ID=test\n")
    (tree / "home/me/report.txt").write_text("first\n")
    (tree / "home/me/gone").write_text("x")
    with open(bytes(tree / "home/me") + b"/odd\xff\nname", "w") as odd:  # noqa: PTH123 - a name that is no text
        odd.write("y")
    world = World(folder)
    world.good("init")
    command = [MKE2FS, "-q", "-t", "ext4", "-U", "5b8c0a6a-5a0f-4b3e-9a51-2b7a6a1d8f01", "-d", tree, world.gen1, "8M"]
    subprocess.run(command, check=True, capture_output=True)
    shutil.copy(world.gen1, world.gen2)
    (folder / "longer").write_text("the second version\n")
    _change(world.gen2, "rm /home/me/gone", "rm /home/me/report.txt")
    _change(world.gen2, f"write {folder / 'longer'} /home/me/report.txt", f"write {folder / 'longer'} /etc/new")
    for image in (world.gen1, world.gen2):
        world.good("backup", "image", image, "--vm", "web")
    return world


@pytest.fixture(scope="module")
def indexed(guest: World) -> World:
    world = guest.copy(guest.directory.with_name("indexed"))
    world.good("index", "--all")
    return world


def test_a_backup_may_index_what_it_has_made(guest: World) -> None:
    world = guest.copy(guest.directory.with_name("indexed-at-once"))
    done = world.good("backup", "image", world.gen2, "--vm", "web", "--index", "--json").json
    found = world.run("find", "new", "web", "--json").json
    assert found["files"][0]["first"]["id"] == done["point"]["id"]
    assert len(found["warnings"]) == 1, "the two points before have none"


def test_index_passes_over_what_has_one(indexed: World) -> None:
    document = indexed.good("index", "web", "--all", "--json").json
    assert (document["indexed"], document["had_index"]) == ([], 2)
    again = indexed.good("index", "web@latest", "--force", "--json").json
    (built,) = again["indexed"]
    assert built["segments_stored"] == 0
    assert [(volume["name"], volume["type"], volume["state"]) for volume in built["volumes"]] == [
        ("0", "ext4", "clean")
    ]
    assert indexed.good("check").code == 0


def test_find_tells_versions_and_what_was_deleted(indexed: World) -> None:
    first, second = indexed.points()
    found = indexed.good("find", "*", "--type", "f", "--volume", "0", "--json").json["files"]
    by_path = {(each["path"], each["size_bytes"]): each for each in found}
    assert by_path["/home/me/gone", 1]["deleted_since"]["id"] == second
    assert by_path["/home/me/gone", 1]["last"]["id"] == first
    assert by_path["/home/me/report.txt", 6]["deleted_since"] is None, "there is a newer version"
    assert by_path["/home/me/report.txt", 19]["first"]["id"] == second
    assert by_path["/etc/fstab", 62]["points"] == 2
    (odd,) = [each for each in found if "path_b64" in each]
    assert odd["path"] == "/home/me/odd\ufffd\nname"
    lines = indexed.good("find", "odd*", "web").out.decode().splitlines()
    assert len(lines) == 1
    assert "odd\\xff\\nname" in lines[0]


def test_paths_are_those_of_the_guest(indexed: World) -> None:
    """Its fstab says that volume 0 is the root."""
    (found,) = indexed.good("find", "/etc/fstab", "--json").json["files"]
    assert (found["path"], found["volume"], found["in_tree"]) == ("/etc/fstab", "0", True)
    (run,) = indexed.good("history", "web:/etc/fstab", "--json").json["versions"]
    assert (run["state"], len(run["points"])) == ("present", 2)


def test_find_limits_and_chooses(indexed: World) -> None:
    document = indexed.good("find", "/**", "--limit", "3", "--json").json
    assert (len(document["files"]), document["limited"]) == (3, True)
    first, _ = indexed.points()
    assert indexed.good("find", "GONE", "-i", "--between", first, first, "--json").json["files"][0]["points"] == 1
    assert indexed.good("find", "new", "--between", first, first, "--json").json["files"] == []
    assert indexed.run("find", "x", "nobody").code == 15
    assert indexed.run("find", "x", "--volume", "7").code == 95
    assert indexed.run("find", "").code == 2


def test_history_tells_each_version(indexed: World) -> None:
    def states(name: str) -> list[tuple[str, int | None]]:
        document = indexed.good("history", f"web:{name}", "--volume", "0", "--json").json
        return [(run["state"], run["file"] and run["file"]["size_bytes"]) for run in document["versions"]]

    assert states("/home/me/report.txt") == [("present", 6), ("present", 19)]
    assert states("/home/me/gone") == [("present", 1), ("absent", None)]
    assert states("/etc/new") == [("absent", None), ("present", 19)]
    assert states("/etc/fstab/") == [("present", 62)]
    assert indexed.run("history", "nobody:/x").code == 15
    assert indexed.run("history", "web").code == 2


def test_diff_lists_files(indexed: World) -> None:
    first, second = indexed.points()
    document = indexed.good("diff", first, second, "--files", "--json").json
    changes = {each["path"]: each["change"] for each in document["files"]}
    assert changes == {"/etc/new": "added", "/home/me/gone": "removed", "/home/me/report.txt": "changed"}
    assert document["totals"] == {"added": 1, "removed": 1, "changed": 1}
    back = indexed.good("diff", second, first, "--files").out.decode()
    assert "1 added, 1 removed, 1 changed" in back
    assert indexed.run("diff", first, second, "--files", "--disk", "0").code == 2
    assert indexed.run("diff", first, second, "--volume", "0").code == 2


def test_points_without_an_index_are_named_or_indexed_on_the_way(guest: World) -> None:
    world = guest.copy(guest.directory.with_name("without"))
    first, second = world.points()
    world.good("index", first)
    done = world.run("find", "report.txt", "--json")
    assert done.code == 3
    (warning,) = json.loads(done.out)["warnings"]
    assert second[:12] in warning["message"]
    assert "xbfs index" in warning["hint"]
    assert len(json.loads(done.out)["files"]) == 1
    assert world.run("diff", first, second, "--files").code == 95
    assert len(world.good("find", "report.txt", "--build", "--json").json["files"]) == 2
    assert world.good("diff", first, second, "--files").code == 0


def test_a_damaged_index_is_named_and_not_in_the_way(guest: World) -> None:
    world = guest.copy(guest.directory.with_name("damaged"))
    world.good("index", "--all")
    first, _ = world.points()
    (root,) = (world.repository / "files" / first).iterdir()
    blob = bytearray(root.read_bytes())
    blob[300] ^= 1
    root.chmod(0o600)
    root.write_bytes(blob)
    done = world.run("find", "report.txt", "--json")
    assert (done.code, len(done.json["files"])) == (3, 1)
    assert "--force" in done.err
    assert world.run("check").code == 28
    assert world.good("show", first).code == 0
    world.good("index", first, "--force")
    assert world.good("check").code == 0
    shutil.rmtree(world.repository / "files")
    assert world.good("check").code == 0
    assert len(world.good("find", "report.txt", "--build", "--json").json["files"]) == 2
