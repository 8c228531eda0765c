"""The initial file system of the micro guest: busybox, programs with their libraries, kernel modules, one script.

Packs a cpio archive (format "newc", Linux Documentation/driver-api/early-userspace/buffer-format.rst) itself, so that
the same files give the same bytes whoever packs them. Works on files of this system and keeps no state.
"""

from __future__ import annotations

import gzip
import re
import shutil
import stat
from pathlib import Path

from images.disk import ImageError, run

_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_DIRECTORY, _FILE = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o755


def program(name: str) -> Path:
    """Where a program of this system is; ImageError if it is not installed."""
    found = shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin")
    if found is None:
        raise ImageError(f"{name} is not installed; tools/setup installs it")
    return Path(found)


def libraries(executable: Path) -> list[Path]:
    """The shared libraries a program needs and its loader, where the program expects them."""
    return [Path(path) for path in _LIBRARY.findall(run(["ldd", executable]))]


def modules(kernel: Path, names: tuple[str, ...]) -> list[Path]:
    """The files of kernel modules below ``kernel``, each behind those it depends on; what is built in is left out."""
    files = {path.stem.replace("-", "_"): path for path in kernel.rglob("*.ko")}
    ordered: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name)
        if path is None or path in ordered:
            return
        found = _DEPENDS.search(path.read_bytes())
        for needed in found[1].decode().split(",") if found else ():
            add(needed.replace("-", "_"))
        ordered.append(path)

    for name in names:
        add(name)
    return ordered


def pack(target: Path, files: dict[str, bytes]) -> None:
    """A compressed archive of executable files by their absolute paths; the directories above them are made."""
    entries: dict[str, tuple[int, bytes]] = {}
    for path, data in sorted(files.items()):
        parents = Path(path.lstrip("/")).parents
        entries.update({str(parent): (_DIRECTORY, b"") for parent in reversed(parents) if str(parent) != "."})
        entries[path.lstrip("/")] = (_FILE, data)
    archive = bytearray()
    for number, (name, (mode, data)) in enumerate(entries.items(), 1):
        archive += _entry(name, data, mode=mode, number=number)
    archive += _entry("TRAILER!!!", b"", mode=0, number=0)
    target.write_bytes(gzip.compress(bytes(archive), mtime=0))


def _entry(name: str, data: bytes, *, mode: int, number: int) -> bytes:
    # magic, ino, mode, uid, gid, nlink, mtime, filesize, device and special device by halves, namesize, check
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
