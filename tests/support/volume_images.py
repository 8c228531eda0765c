"""Disks for tests of volumes: strict sources over bytes, and the golden disks that a real kernel made."""

from __future__ import annotations

import lzma
import tarfile
from functools import cache
from pathlib import Path

from xbfs_engine.core.errors import SourceUnreadable
from xbfs_engine.guestfs.volumes import Disk, Volume, VolumeKey, Volumes, find_volumes

GOLDEN = Path(__file__).parents[1] / "golden" / "volumes"


class BytesSource:
    """Bytes that refuse any read that is not wholly within them, as a real source does; it counts what is read."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data
        self.read_bytes = 0

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def read_at(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > len(self.data):
            raise SourceUnreadable(f"{length} bytes at {offset} of {len(self.data)}")
        self.read_bytes += length
        return bytes(self.data[offset : offset + length])


@cache
def golden_disks(case: str) -> dict[int, bytes]:
    """The disks of one case of tools/make_volume_images, by number."""
    with lzma.open(GOLDEN / f"{case}.tar.xz") as stream, tarfile.open(fileobj=stream) as archive:
        found = {}
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                found[int(Path(member.name).stem)] = content.read()
    return found


def scan(disks: dict[int, bytes], keys: tuple[VolumeKey, ...] = ()) -> Volumes:
    """The volumes of disks given by number."""
    return find_volumes([Disk(str(number), BytesSource(data)) for number, data in sorted(disks.items())], keys)


def by_name(found: Volumes) -> dict[str, Volume]:
    return {volume.name: volume for volume in found.volumes}


def content(volume: Volume) -> bytes:
    """All of a volume, read in pieces that fit no unit of anything."""
    assert volume.source is not None, volume.reason
    step = 100_003
    pieces = [volume.source.read_at(at, min(step, volume.size_bytes - at)) for at in range(0, volume.size_bytes, step)]
    return b"".join(pieces)


def pattern(tag: int, length: int, start: int = 0) -> bytes:
    """What tools/make_volume_images fills volumes with."""
    assert start % 4096 == 0
    blocks = range(start // 4096, -(-(start + length) // 4096))
    return b"".join((tag << 56 | block).to_bytes(8, "little") * 512 for block in blocks)[:length]
