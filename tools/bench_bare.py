"""A filesystem of one file whose every read is answered from one buffer: what libfuse, pyfuse3 and trio cost alone.

bench_bare.py MOUNTPOINT
"""

from __future__ import annotations

import stat
import sys

import pyfuse3
import trio

_SIZE = 1 << 30
_ANSWER = memoryview(bytes(1 << 20))


class Bare(pyfuse3.Operations):
    """The root has inode 1, the file 2."""

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Attributes."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_nlink = 1
        entry.st_mode = stat.S_IFDIR | 0o500 if inode == 1 else stat.S_IFREG | 0o400
        entry.st_size = 0 if inode == 1 else _SIZE
        entry.entry_timeout = entry.attr_timeout = 3600.0
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Any name is the file."""
        return await self.getattr(2, ctx)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open."""
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """The same bytes always."""
        return _ANSWER[:size]  # type: ignore[return-value]  # any buffer will do


def main() -> None:
    """Serve until unmounted."""
    pyfuse3.init(Bare(), sys.argv[1], {"fsname=bare", "ro"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
