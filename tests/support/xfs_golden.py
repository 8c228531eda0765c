"""The XFS images that are kept, so that readers are tested without root and mkfs.xfs: how they are made and opened.

``python -m tests.support.xfs_golden`` makes them anew; what they hold was told by the kernel (version 5) or by whoever
wrote it into them (version 4), never by our reader.
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import zstandard

from tests.support import xfs_images
from tests.support.guest_sources import SparseSource
from tests.support.guest_tree import Facts, kernel_facts

if TYPE_CHECKING:
    from collections.abc import Mapping

GOLDEN = Path(__file__).parents[1] / "golden" / "xfs"
V5_UUID = "6ba7b810-9dad-51d1-80b4-00c04fd430c8"
V5 = ("--unsupported", "-b", "size=1024", "-d", "agcount=2", "-i", "nrext64=1", "-m", f"rmapbt=1,uuid={V5_UUID}")
DIRTY = ("--unsupported", "-b", "size=1024", "-d", "agcount=1", "-m", "reflink=0", "-l", "size=4m")
V4 = ("-b", "size=1024", "-i", "size=256", "-n", "ftype=0", "-L", "golden4")


def hidden(name: bytes) -> bool:
    """ACLs in XFS's own form, which the kernel shows to root beside the usual one."""
    return name.startswith(b"trusted.SGI_ACL_")


@cache
def _image(name: str) -> SparseSource:
    return SparseSource.unpack((GOLDEN / f"{name}.img.zst").read_bytes())


def image(name: str) -> SparseSource:
    """A copy of a kept image: ``v5``, ``v4``, and ``dirty``, of version 5, which was in use when it was copied."""
    return _image(name).copy()


def _load(name: str) -> dict[str, list[object]]:
    packed = (GOLDEN / f"{name}.json.zst").read_bytes()
    loaded: dict[str, list[object]] = json.loads(zstandard.ZstdDecompressor().decompress(packed))
    return loaded


def facts(name: str) -> dict[str, Facts]:
    return {path: Facts(*_tuples(values)) for path, values in _load(name).items()}


def v4_facts() -> dict[str, tuple[object, ...]]:
    return {path: tuple(_tuples(values)) for path, values in _load("v4").items()}


def keep(name: str, source: SparseSource, held: Mapping[str, object]) -> None:
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / f"{name}.img.zst").write_bytes(source.pack())
    (GOLDEN / f"{name}.json.zst").write_bytes(zstandard.ZstdCompressor(level=19).compress(json.dumps(held).encode()))


def _tuples(values: list[object]) -> list[object]:
    return [tuple(_tuples(value)) if isinstance(value, list) else value for value in values]


def main() -> int:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        folder = Path(scratch)
        path, point = folder / "image", folder / "mount"
        xfs_images.make(path, *V5, "-L", "golden", size_bytes=48 << 20)
        with xfs_images.mounted(path, point) as root:
            xfs_images.populate(root, many=500, deep=1100)
        with xfs_images.mounted(path, point, "ro") as root:
            held = kernel_facts(root, hidden=hidden)
        keep("v5", SparseSource.of_file(path), held)
        xfs_images.make(path, *DIRTY, size_bytes=40 << 20)
        with xfs_images.mounted(path, point) as root:
            xfs_images.work_and_crash(root)
        dirty = SparseSource.of_file(path)
        with xfs_images.mounted(path, point):
            """The kernel replays the log."""
        with xfs_images.mounted(path, point, "ro") as root:
            keep("dirty", dirty, kernel_facts(root, hidden=hidden))
        written = xfs_images.make_v4(path, folder, *V4)
        keep("v4", SparseSource.of_file(path), written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
