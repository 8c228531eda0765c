"""Our readers of NTFS, FAT and exFAT against ntfs-3g, mtools and exfat-fuse: what those wrote and read, we read."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from tests.support import windows_images
from tests.support.guest_sources import FileSource
from tests.support.guest_tree import Facts, content, kernel_facts, node_of, reader_facts
from xbfs_engine.core.errors import GuestUnsupported
from xbfs_engine.guestfs.base import Kind, VolumeState
from xbfs_engine.guestfs.explorer.exfat import open_exfat
from xbfs_engine.guestfs.explorer.fat import open_fat
from xbfs_engine.guestfs.explorer.ntfs import open_ntfs

if TYPE_CHECKING:
    from pathlib import Path

    from xbfs_engine.guestfs.base import GuestFilesystem, NodeId

NTFS_MISSING = windows_images.why_not("ntfs-3g", "mkntfs", "wimlib-imagex")
FAT_MISSING = windows_images.why_not("mkfs.fat", "mcopy", mounts=False)
EXFAT_MISSING = windows_images.why_not("mkfs.exfat", "mount.exfat-fuse", "losetup")

GEOMETRIES = {
    "as it comes": (),
    "small clusters": ("-c", "512"),
    "large clusters": ("-c", "65536"),
    "4096-byte sectors": ("-s", "4096"),
}
COMPARED = ("dir", "many", "files")


@pytest.mark.skipif(bool(NTFS_MISSING), reason=NTFS_MISSING)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_ntfs_is_as_ntfs_3g_sees_it(name: str, tmp_path: Path) -> None:
    image, point = tmp_path / "image", tmp_path / "mount"
    windows_images.make_ntfs(image, *GEOMETRIES[name], size_bytes=(256 if "65536" in GEOMETRIES[name] else 64) << 20)
    with windows_images.mounted_ntfs(image, point) as root:
        known = windows_images.populate_ntfs(root, tmp_path)
    with windows_images.mounted_ntfs(image, point, "ro") as root:
        theirs = {path: seen(root / path) for top in COMPARED for path in [top, *below(root, top)]}
    with FileSource(image) as source:
        volume = open_ntfs(source)
        assert (volume.info.label, volume.info.state) == ("golden", VolumeState.CLEAN)
        every = reader_facts(_Readable(volume))
        ours = {path: shown(facts) for path, facts in every.items() if path.split("/")[0] in COMPARED}
        assert ours == theirs
        for path, expected in known.items():
            assert content(volume, node_of(volume, path)) == expected, path
        check_links(volume)


def below(root: Path, top: str) -> list[str]:
    return [str(path.relative_to(root)) for path in (root / top).rglob("*")]


def seen(path: Path) -> tuple[object, ...]:
    """What ntfs-3g and we see alike; directories have a size and links in ntfs-3g only."""
    stat = path.stat()
    if path.is_dir():
        return ("d", stat.st_ino, stat.st_mtime_ns)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ("f", stat.st_ino, stat.st_mtime_ns, stat.st_nlink, stat.st_size, digest)


def shown(facts: Facts) -> tuple[object, ...]:
    alike = (facts.kind, facts.inode, facts.times[1])
    return alike if facts.kind == "d" else (*alike, facts.nlink, facts.size, facts.content)


class _Readable:
    """The volume without what it rightly refuses to read, and what is compared elsewhere."""

    def __init__(self, volume: GuestFilesystem) -> None:
        self._volume = volume

    def __getattr__(self, name: str) -> object:
        return getattr(self._volume, name)

    def list(self, node: NodeId) -> list[object]:
        return [entry for entry in self._volume.list(node) if entry.name not in (b"links", b"wof")]


def check_links(volume: GuestFilesystem) -> None:
    def link(name: str) -> tuple[Kind, bytes, dict[bytes, bytes]]:
        node = node_of(volume, f"links/{name}")
        return volume.stat(node).kind, volume.readlink(node), {x.name: x.value for x in volume.xattrs(node)}

    assert link("interix")[:2] == (Kind.SYMLINK, b"../dir/plain")
    assert link("linux")[:2] == (Kind.SYMLINK, b"../dir/plain")
    for name, path, raw in (
        ("symlink", b"../dir/plain", windows_images.SYMLINK_TARGET),
        ("junction", b"/Users/all", windows_images.JUNCTION_TARGET),
    ):
        kind, target, xattrs = link(name)
        assert (kind, target, xattrs[b"user.ntfs.target"]) == (Kind.SYMLINK, path, raw.encode())
        assert raw.encode("utf-16-le") in xattrs[b"user.ntfs.reparse"]
    refused = node_of(volume, "links/deduplicated")
    with pytest.raises(GuestUnsupported, match="0x80000013"):
        volume.read(refused, 0, 10)
    with pytest.raises(GuestUnsupported, match="0x80000013"):
        list(volume.extents(refused))
    (long,) = [entry for entry in volume.list(node_of(volume, "links")) if entry.name.startswith("長".encode())]
    assert len(long.name) <= 255
    assert volume.lookup(node_of(volume, "links"), long.name) == long
    assert content(volume, long.node) == b"long"
    descriptor = {x.name: x.value for x in volume.xattrs(long.node)}[b"user.ntfs.acl"]
    # Revision 1, self-relative.
    assert (descriptor[0], descriptor[3] & 0x80) == (1, 0x80)


@pytest.mark.skipif(bool(FAT_MISSING), reason=FAT_MISSING)
@pytest.mark.parametrize(("bits", "size_bytes"), [(12, 6 << 20), (16, 24 << 20), (32, 64 << 20)])
def test_fat_is_what_mtools_wrote(bits: int, size_bytes: int, tmp_path: Path) -> None:
    image, folder = tmp_path / "image", tmp_path / "tree"
    folder.mkdir()
    windows_images.populate_fat(folder)
    options = () if bits == 32 else ("-s", "4")
    windows_images.make_fat(image, bits, *options, size_bytes=size_bytes)
    windows_images.copy_to_fat(image, folder)
    with FileSource(image) as source:
        volume = open_fat(source)
        info = ("vfat", "GOLDEN", "1234-5678", size_bytes, VolumeState.CLEAN, "")
        assert volume.info == info
        assert plain(reader_facts(volume)) == plain(kernel_facts(folder))
        numbers = [facts.inode for facts in reader_facts(volume).values()]
        assert len(set(numbers)) == len(numbers)


@pytest.mark.skipif(bool(EXFAT_MISSING), reason=EXFAT_MISSING)
def test_exfat_is_what_exfat_fuse_wrote(tmp_path: Path) -> None:
    image, folder, point = tmp_path / "image", tmp_path / "tree", tmp_path / "mount"
    folder.mkdir()
    windows_images.populate_fat(folder)
    windows_images.make_exfat(image)
    with windows_images.mounted_exfat(image, point) as root:
        for path in sorted(folder.rglob("*")):
            copy = root / path.relative_to(folder)
            copy.mkdir() if path.is_dir() else copy.write_bytes(path.read_bytes())
        # Interleaved, so that they are chained in the table.
        with (root / "a").open("wb") as a, (root / "b").open("wb") as b:
            for _ in range(60):
                a.write(b"a" * 4096)
                b.write(b"b" * 4096)
                a.flush()
                b.flush()
        (folder / "a").write_bytes(b"a" * 4096 * 60)
        (folder / "b").write_bytes(b"b" * 4096 * 60)
    with FileSource(image) as source:
        volume = open_exfat(source)
        assert (volume.info.type, volume.info.label, volume.info.state) == ("exfat", "golden", VolumeState.CLEAN)
        assert volume.info.size_bytes == image.stat().st_size
        ours = {path: facts[:3] for path, facts in plain(reader_facts(volume)).items()}
        assert ours == {path: facts[:3] for path, facts in plain(kernel_facts(folder)).items()}


def plain(facts: dict[str, Facts]) -> dict[str, tuple[object, ...]]:
    """Kind, size, content, and the time of change in the two seconds that FAT tells apart, of files."""
    return {
        path: (f.kind, f.size, f.content, f.times[1] // 2_000_000_000) if f.kind == "f" else (f.kind, 0, "", 0)
        for path, f in facts.items()
    }
