"""get in processes of its own: files of a guest out of a restore point, into a directory and as an archive."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest

from tests.support.cli import World

if TYPE_CHECKING:
    from pathlib import Path

MKE2FS = shutil.which("mke2fs") or "/sbin/mke2fs"
UUID = "5b8c0a6a-5a0f-4b3e-9a51-2b7a6a1d8f01"
BIG = bytes(range(256)) * 4096 * 6
IS_ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> World:
    """VM "web" with a tree of its own."""
    folder = tmp_path_factory.mktemp("get")
    tree = folder / "tree"
    for name in ("etc/nginx/sites", "home/me", "usr", "bin", "sbin", "var/log/old"):
        (tree / name).mkdir(parents=True)
    (tree / "etc/fstab").write_text(f"UUID={UUID} / ext4 defaults 0 1\n")
    (tree / "etc/os-release").write_text("ID=test\n")
    (tree / "etc/nginx/nginx.conf").write_text("worker_processes 1;\n")
    (tree / "etc/nginx/sites/default").write_text("server {}\n")
    (tree / "etc/nginx/sites/link").symlink_to("../nginx.conf")
    (tree / "var/run").symlink_to("/home")
    for number in range(3):
        (tree / f"var/log/log.{number}").write_text(f"line {number}\n")
    (tree / "var/log/old/log.9").write_text("old\n")
    (tree / "home/me/big").write_bytes(BIG)
    with open(bytes(tree / "home/me") + b"/odd\xff\nname", "w") as odd:  # noqa: PTH123 - a name that is no text
        odd.write("y")
    os.utime(tree / "etc/nginx/nginx.conf", ns=(1, 1_600_000_000 * 10**9))
    world = World(folder)
    world.good("init")
    subprocess.run([MKE2FS, "-q", "-t", "ext4", "-U", UUID, "-d", tree, world.gen1, "24M"], check=True)
    world.good("backup", "image", world.gen1, "--vm", "web")
    return world


def test_a_directory_is_restored_like_with_cp(guest: World, tmp_path: Path) -> None:
    done = guest.good("get", "web@latest:/etc/nginx", "-o", tmp_path / "out")
    assert "2 files" in done.out.decode()
    subprocess.run(["diff", "-r", guest.directory / "tree/etc/nginx", tmp_path / "out/nginx"], check=True)
    assert (tmp_path / "out/nginx/sites/link").is_symlink()
    assert (tmp_path / "out/nginx/nginx.conf").stat().st_mtime_ns == 1_600_000_000 * 10**9


def test_what_exists_is_refused(guest: World, tmp_path: Path) -> None:
    (tmp_path / "nginx.conf").write_text("mine")
    refused = guest.run("get", "web@latest:/etc/nginx/nginx.conf", "-o", tmp_path)
    assert refused.code == 37
    assert "--overwrite" in refused.err
    assert (tmp_path / "nginx.conf").read_text() == "mine"
    some = guest.run("get", "web@latest:/etc/nginx/*", "-o", tmp_path, "--json")
    assert some.code == 3
    assert (some.json["files"], some.json["failed"]) == (1, 1)
    guest.good("get", "web@latest:/etc/nginx/nginx.conf", "-o", tmp_path, "--overwrite")
    assert (tmp_path / "nginx.conf").read_text() == "worker_processes 1;\n"


def test_patterns_links_and_times(guest: World, tmp_path: Path) -> None:
    document = guest.good("get", "web@latest:/var/**/log.[0-9]", "-o", tmp_path / "a", "--json").json
    assert document["files"] == 4
    assert sorted(os.listdir(tmp_path / "a")) == ["log.0", "log.1", "log.2", "log.9"]  # noqa: PTH208 - names alone
    time = guest.good("points", "--json").json["points"][0]["time"]
    guest.good("get", f"web@{time}:/var/run/me/big", "-o", tmp_path / "b")
    assert (tmp_path / "b/big").read_bytes() == BIG
    guest.good("get", "web@latest:/home/me", "--volume", "0", "-o", tmp_path / "c")
    assert b"odd\xff\nname" in os.listdir(bytes(tmp_path / "c/me"))  # noqa: PTH208 - bytes


def test_an_archive_comes_out_of_the_pipe(guest: World, tmp_path: Path) -> None:
    done = guest.good("get", "web@latest:/etc", "web@latest:/home", "--tar", "-")
    (tmp_path / "stream.tar").write_bytes(done.out)
    with tarfile.open(tmp_path / "stream.tar") as archive:
        assert archive.extractfile("home/me/big").read() == BIG  # type: ignore[union-attr]  # or it fails
    assert "standard output" in done.err
    guest.good("get", "web@latest:/etc", "web@latest:/home", "--tar", tmp_path / "file.tar")
    assert (tmp_path / "file.tar").read_bytes() == done.out
    assert guest.run("get", "web@latest:/etc", "--tar", tmp_path / "file.tar").code == 37
    assert guest.run("get", "web@latest:/etc", "--tar", "-", "--json").code == 2


def test_mistakes_are_told(guest: World, tmp_path: Path) -> None:
    assert guest.run("get", "nobody@latest:/etc", "-o", tmp_path).code == 15
    assert guest.run("get", "web@latest", "-o", tmp_path).code == 2
    assert guest.run("get", "web@latest:/etc").code == 2
    assert guest.run("get", "web@latest:/nothing", "-o", tmp_path).code == 95
    assert guest.run("get", "web@latest:/etc", "--volume", "7", "-o", tmp_path).code == 95
    assert guest.run("get", "web@latest:/etc/../x", "-o", tmp_path).code == 2
    assert guest.run("get", "web@latest:/etc", "-o", tmp_path / "a/b/c").code == 38
    assert not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing(guest: World, tmp_path: Path) -> None:
    document = guest.good("get", "web@latest:/etc", "-o", tmp_path / "out", "--dry-run", "--json").json
    assert (document["files"], document["directories"], document["symlinks"]) == (4, 3, 1)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told(guest: World, tmp_path: Path) -> None:
    def limit() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = guest.run("get", "web@latest:/home/me/big", "-o", tmp_path, limit=limit)
    assert done.code in (32, 38)
    assert not list(tmp_path.iterdir())


def test_stopped_restores_leave_only_temporary_names(guest: World, tmp_path: Path) -> None:
    with guest.started("get", "web@latest:/home", "-o", tmp_path) as process:
        while not list(tmp_path.glob("home/me/.xbfs-*")) and process.poll() is None:
            pass
        process.kill()
        process.wait()
    left = {path.name for path in tmp_path.rglob("*") if not path.name.startswith(".xbfs-")}
    assert left <= {"home", "me", "big", os.fsdecode(b"odd\xff\nname")}
    big = tmp_path / "home/me/big"
    assert not big.exists() or big.read_bytes() == BIG
    guest.good("get", "web@latest:/home", "-o", tmp_path, "--overwrite")
    assert big.read_bytes() == BIG
    assert json.loads(guest.good("get", "web@latest:/home", "-o", tmp_path, "-n", "--json").out)["files"] == 2
