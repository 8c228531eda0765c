"""Symlinks of guests lead where they lead in the guest, as the kernel resolves them there, and never out of it."""

from __future__ import annotations

import ctypes
import os
import random  # noqa: TID251 - seeded
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.guest_mounts import guest_mount
from tests.support.guest_sources import SparseSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.mounts import Mounted
    from xbfs.fuse.mount import DataPlaneKind

RESOLVE_IN_ROOT = 0x10
OPENAT2 = 437
_libc = ctypes.CDLL(None, use_errno=True)

HOSTILE = {
    "absolute": "/etc/passwd",
    "up": "../../../../../../../../../../etc/passwd",
    "root": "/",
    "dots": "/../..",
    "here": ".",
    "slashes": "///etc//./passwd",
    "dir/absolute": "/etc/passwd",
    "dir/up": "../../../../../../../etc/passwd",
    "dir/sub/up": "../../../../../..",
    "dir/sub/just": "../../etc/passwd",
    "dir/out": "/etc/../../../etc/passwd",
    "dir/to-deep": "/a/b/c/d",
    "dir/through": "to-deep/../../x",
    "dir/through-top": "../deep/../../../../../etc/passwd",
    "deep": "a/b/c/d",
    "shallow": "/",
    "a/b/c/d/through-shallow": "../../../../shallow/../../../../../etc/passwd",
    "a/b/c/d/self": "self/../../../../../../../etc/passwd",
    "a/b/ping": "pong/../x",
    "a/b/pong": "ping/../x",
    "missing": "nothing/../../../../../../etc/passwd",
    "dir/file-up": "../etc/passwd/../../../../../../etc/passwd",
    "a/b/c/d/plain": "../../x",
    "a/b/c/d/long": "x/" * 40 + "../" * 60 + "etc/passwd",
    "dir/chain0": "/a/b/c/d/../../../../dir/chain1",
    "dir/chain1": "../a/../dir/chain2",
    "dir/chain2": "/dir/../etc/passwd",
}
DIRECTORIES = ("etc", "dir/sub", "a/b/c/d", "a/b/x")
FILES = ("etc/passwd", "a/b/x/file", "a/b/c/x")


def make_tree(root: Path) -> None:
    for name in DIRECTORIES:
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (root / name).write_text(f"the guest's {name}")
    for name, target in HOSTILE.items():
        (root / name).symlink_to(target)
    seeded = random.Random(5)
    names = ["a", "b", "c", "l0", "l1", "l2"]
    for top in ("r0", "r1"):
        folders = [root / top]
        folders[0].mkdir()
        for _ in range(14):
            folder = seeded.choice(folders) / seeded.choice(names[:3])
            if not folder.exists():
                folder.mkdir()
                folders.append(folder)
        for folder in folders:
            for number in range(4):
                parts = seeded.choices([*names, "..", "..", ".", "l3", "etc"], k=seeded.randrange(1, 9))
                target = seeded.choice(["", "", "/", "/r0/", "../"]) + "/".join(parts)
                (folder / f"l{number}").symlink_to(target)


@pytest.fixture(scope="module")
def trees(data_plane: DataPlaneKind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mounted, Path]]:
    folder = tmp_path_factory.mktemp("links")
    raw, image = folder / "raw", folder / "image"
    raw.mkdir()
    make_tree(raw)
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", raw, image], check=True, capture_output=True)
    with guest_mount(folder, SparseSource.of_file(image)) as mount:
        yield mount, raw


def in_guest(root: Path, path: str) -> str | None:
    """What a path leads to for somebody whose root directory this is (openat2(2)); None if it leads nowhere."""
    top = os.open(root, os.O_PATH)
    how = struct.pack("QQQ", os.O_PATH, 0, RESOLVE_IN_ROOT)
    found = _libc.syscall(OPENAT2, top, path.encode(), how, len(how))
    try:
        if found < 0:
            return None
        return str(Path(f"/proc/self/fd/{found}").readlink().relative_to(root))
    finally:
        os.close(top)
        if found >= 0:
            os.close(found)


def in_mount(root: Path, path: str) -> str | None:
    try:
        found = os.open(root / path, os.O_PATH)
    except OSError:
        return None
    try:
        return str(Path(f"/proc/self/fd/{found}").readlink().relative_to(root))
    finally:
        os.close(found)


def links(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_symlink())


def test_every_link_leads_where_it_leads_in_the_guest(trees: tuple[Mounted, Path]) -> None:
    mount, raw = trees
    shown = (mount.vm / "latest").resolve() / "files/0"
    assert set(links(raw)) <= set(links(shown))
    for path in links(raw):
        assert in_mount(shown, path) == in_guest(raw, path), (path, (shown / path).readlink())
    assert (shown / "dir/chain0").read_text() == "the guest's etc/passwd"
    assert in_guest(raw, "dir/through-top") == "etc/passwd", "the peer resolves too"
    followed = [path for path in links(raw) if in_guest(raw, path) is not None]
    assert len(followed) > 30


def test_no_link_leads_out_whatever_comes_behind_it(trees: tuple[Mounted, Path]) -> None:
    mount, raw = trees
    shown = (mount.vm / "latest").resolve() / "files/0"
    for path in links(raw):
        real = os.path.realpath(shown / path)
        assert Path(real).is_relative_to(shown), (path, real)
        target = (shown / path).readlink()
        assert not target.is_absolute()


def test_the_target_itself_is_told_but_not_listed(trees: tuple[Mounted, Path]) -> None:
    mount, raw = trees
    shown = (mount.vm / "latest").resolve() / "files/0"
    for path in links(raw):
        target = os.getxattr(shown / path, "security.xbfs.target", follow_symlinks=False)
        assert os.fsdecode(target) == os.readlink(raw / path)  # noqa: PTH115 - a Path drops dots and slashes
        assert os.listxattr(shown / path, follow_symlinks=False) == []


def test_what_is_harmless_stays_as_it_is(trees: tuple[Mounted, Path]) -> None:
    mount, _ = trees
    shown = (mount.vm / "latest").resolve() / "files/0"
    for path in ("dir/sub/just", "deep", "a/b/c/d/plain"):
        assert os.readlink(shown / path) == HOSTILE[path]  # noqa: PTH115 - the same
    assert os.readlink(shown / "dir/absolute") == "../etc/passwd"  # noqa: PTH115 - the same
