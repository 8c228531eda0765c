"""An ext4 filesystem inside a disk file, made and changed by e2fsprogs: no root, mount, loop device or device mapper.

The same calls give the same bytes on every run: identifiers, hash seed and clock are fixed by the caller.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path, PurePosixPath

from images.disk import PARTITION_OFFSET_BYTES, ImageError, run

BLOCK_BYTES = 4096

_HASH_SEED = "6d0c2f6e-52b0-4c8c-9a3e-1f1f4a1e7b21"
_EXTENT = re.compile(r"(\d+) - +(\d+) +(\d+) - +(\d+) +(\d+)")
# What debugfs says although nothing is wrong: its banner, and that a directory to be made is there already.
_HARMLESS = re.compile(r"debugfs [\d.]+ \(.*\)|(ext2fs_)?mkdir: Ext2 directory already exists.*")


def make(disk: Path, size_bytes: int, *, uuid: str, time_s: int, content: Path | None = None) -> None:
    """Make an ext4 at the partition offset, filled from the directory ``content``; ``time_s`` is its birthday."""
    fill = ["-d", str(content)] if content else []
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK_BYTES), "-L", "root", "-U", uuid, *fill]
    options = f"offset={PARTITION_OFFSET_BYTES},hash_seed={_HASH_SEED},lazy_itable_init=0,nodiscard"
    # SOURCE_DATE_EPOCH is for e2fsprogs 1.47.1 and newer, the other name for what is older.
    clock = {"SOURCE_DATE_EPOCH": str(time_s), "E2FSPROGS_FAKE_TIME": str(time_s)}
    run([*command, "-E", options, disk, str(size_bytes // BLOCK_BYTES)], environment=clock)


def check(disk: Path) -> None:
    """ImageError unless e2fsck finds the filesystem without fault."""
    run(["e2fsck", "-fn", _located(disk)])


class Session:
    """Collects changes to one filesystem and carries them out in one debugfs run. For one thread."""

    def __init__(self, disk: Path, *, time_s: int) -> None:
        self._disk = disk
        # With a set clock debugfs stamps every inode it touches, and the superblock, with it.
        self._commands = [f"set_current_time @{time_s}"]
        self._directories = {PurePosixPath("/")}

    def make_directory(self, path: PurePosixPath) -> None:
        """Make ``path`` and its parents, as far as they do not exist."""
        if path not in self._directories:
            self.make_directory(path.parent)
            self._enter(path.parent)
            self._commands.append(f'mkdir "{path.name}"')
            self._directories.add(path)

    def write(self, path: PurePosixPath, source: Path) -> None:
        """A new file with the bytes and mode of ``source``, which must stay until ``commit``."""
        self.make_directory(path.parent)
        self._enter(path.parent)
        self._commands.append(f'write "{source}" "{path.name}"')

    def symlink(self, path: PurePosixPath, target: str) -> None:
        """A new symbolic link at ``path``."""
        self.make_directory(path.parent)
        self._enter(path.parent)
        self._commands.append(f'symlink "{path.name}" "{target}"')

    def remove(self, path: PurePosixPath) -> None:
        """Remove a file."""
        self._commands.append(f'rm "{path}"')

    def replace(self, path: PurePosixPath, source: Path) -> None:
        """Remove the file and write it anew; equal leading blocks mostly land where they were, as in an append."""
        self.remove(path)
        self.write(path, source)

    def commit(self) -> None:
        """Carry everything out; ImageError with debugfs's words when anything went wrong."""
        with tempfile.NamedTemporaryFile("w", suffix=".debugfs", encoding="utf-8") as script:
            script.write("\n".join(self._commands) + "\n")
            script.flush()
            # debugfs exits 0 whatever happens: its standard error is the only witness.
            said = run(
                ["sh", "-c", 'exec debugfs -w -f "$1" "$2" 2>&1 >/dev/null', "sh", script.name, _located(self._disk)]
            )
        complaints = [line for line in said.splitlines() if not _HARMLESS.fullmatch(line)]
        if complaints:
            raise ImageError(f"{self._disk}: debugfs said: {'; '.join(complaints[:5])}")
        del self._commands[1:]

    def _enter(self, directory: PurePosixPath) -> None:
        # debugfs makes an entry of the name as it stands, slashes included, in its current directory.
        self._commands.append(f'cd "{directory}"')


def overwrite(disk: Path, path: PurePosixPath, old: bytes, new: bytes) -> None:
    """Turn a file's content from ``old`` to ``new``, both of one length, in its own blocks, as a database does."""
    if len(old) != len(new):
        raise ImageError(f"{path}: an overwrite keeps the size, {len(old)} is not {len(new)} bytes")
    listing = run(["debugfs", "-R", f'dump_extents -n -l "{path}"', _located(disk)])
    places = {
        int(match[1]) + index: int(match[3]) + index
        for match in _EXTENT.finditer(listing)
        for index in range(int(match[5]))
    }
    with disk.open("r+b", buffering=0) as file:
        for offset in range(0, len(new), BLOCK_BYTES):
            if (page := new[offset : offset + BLOCK_BYTES]) == old[offset : offset + BLOCK_BYTES]:
                continue
            if (place := places.get(offset // BLOCK_BYTES)) is None:
                raise ImageError(f"{path}: no block holds offset {offset}")
            os.pwrite(file.fileno(), page, PARTITION_OFFSET_BYTES + place * BLOCK_BYTES)


def _located(disk: Path) -> str:
    return f"{disk}?offset={PARTITION_OFFSET_BYTES}"
