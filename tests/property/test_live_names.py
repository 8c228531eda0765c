"""Names in the live tree against a plain directory: whatever clients make, link, rename and remove, disks among it.

And whatever they write: the restore point below never changes.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.disks import CHUNK, MemoryDisk
from tests.support.runtime import FixedClock
from xbfs.vfs.live import calls
from xbfs.vfs.live.attributes import ROOT
from xbfs.vfs.live.changes import Asker, Changes
from xbfs.vfs.live.handles import OpenDisk, OpenForeign
from xbfs.vfs.live.stubs import place_stub, stub_keys
from xbfs.vfs.live.tree import LiveTree
from xbfs.view.overlay import create_overlay, open_overlay

if TYPE_CHECKING:
    from collections.abc import Callable

ME = Asker(os.getuid(), os.getgid())
SIZE = 2 * CHUNK
MEMORY = Path("/dev/shm")
"""Where syncing takes no time."""
NAMES = ("a", "b", "c", "d/a", "d/b", "e", "e/a", "d")
names = st.sampled_from(NAMES)


class NamesMachine(RuleBasedStateMachine):
    """``plain`` is the model: a directory of the file system, in which small files stand for the disks."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="live-", dir=MEMORY if MEMORY.is_dir() else None))
        self.plain = self.home / "plain"
        self.serial = 0

    @initialize()
    def begin(self) -> None:
        self.base = MemoryDisk.holding(SIZE, [0, 1])
        self.original = self.base.read_at(0, SIZE)
        self.overlays = []
        self.content: dict[str, bytearray] = {}
        self.plain.mkdir()
        for key, path in (("0", "a"), ("1", "d/b")):
            place_stub(self.home / "tree", path, key)
            (self.plain / path).parent.mkdir(exist_ok=True)
            (self.plain / path).write_text(f"disk {key}")
            self.content[f"disk {key}"] = bytearray(self.original)
            create_overlay(self.home / key, self.base, identity=b"x").close()
        self.show()

    def show(self) -> None:
        self.overlays = [open_overlay(self.home / key, self.base, identity=b"x") for key in ("0", "1")]
        self.tree = LiveTree(FixedClock())
        self.tree.add("vm", self.home / "tree", dict(zip(("0", "1"), self.overlays, strict=True)))
        self.changes = Changes(self.tree.nodes)

    def place(self, path: str) -> tuple[int, bytes]:
        """The directory that a path leads to, and the last name; walked as the kernel does it."""
        *parents, name = path.split("/")
        inode = self.tree.lookup(ROOT, b"vm").inode
        for parent in parents:
            found = self.tree.lookup(inode, parent.encode())
            if not stat.S_ISDIR(found.mode):
                raise NotADirectoryError(errno.ENOTDIR, path)
            inode = found.inode
        return inode, name.encode()

    def inode(self, path: str) -> int:
        return self.tree.lookup(*self.place(path)).inode

    def both(self, real: Callable[[], object], model: Callable[[], object]) -> None:
        """The same is done to both, with the same outcome."""
        codes: list[int | None] = []
        for action in (real, model):
            try:
                action()
                codes.append(None)
            except OSError as exc:
                codes.append(exc.errno)
        assert codes[0] == codes[1]

    @rule(path=names)
    def make(self, path: str) -> None:
        self.serial += 1
        text = f"file {self.serial}"

        def real() -> None:
            inode = self.changes.make(*self.place(path), stat.S_IFREG | 0o600, ME).inode
            file = self.tree.open(inode, os.O_RDWR)
            assert isinstance(file, OpenForeign)
            file.write_now(0, text.encode())
            self.tree.close(file)

        def model() -> None:
            fd = os.open(self.plain / path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            os.write(fd, text.encode())
            os.close(fd)

        self.both(real, model)

    @rule(path=names)
    def make_directory(self, path: str) -> None:
        self.both(lambda: self.changes.make(*self.place(path), stat.S_IFDIR | 0o700, ME), (self.plain / path).mkdir)

    @rule(old=names, new=names)
    def link(self, old: str, new: str) -> None:
        def real() -> None:
            inode = self.inode(old)
            if stat.S_ISDIR(self.tree.attributes(inode).mode):
                raise PermissionError(errno.EPERM, "the kernel asks for no links of directories")
            self.changes.link(inode, *self.place(new))

        def model() -> None:
            if (self.plain / old).is_dir():
                raise PermissionError(errno.EPERM, "the same")
            os.link(self.plain / old, self.plain / new)

        self.both(real, model)

    @rule(old=names, new=names, flags=st.sampled_from([0, 0, 0, 1, 2]))
    def rename(self, old: str, new: str, flags: int) -> None:
        self.both(
            lambda: self.changes.rename(*self.place(old), *self.place(new), flags),
            lambda: calls.rename(-100, bytes(self.plain / old), -100, bytes(self.plain / new), flags),
        )

    @rule(path=names)
    def remove(self, path: str) -> None:
        self.both(lambda: self.changes.unlink(*self.place(path)), (self.plain / path).unlink)

    @rule(path=names)
    def remove_directory(self, path: str) -> None:
        self.both(lambda: self.changes.rmdir(*self.place(path)), (self.plain / path).rmdir)

    @rule(path=names, offset=st.integers(0, SIZE + 5000), data=st.binary(min_size=1, max_size=6000))
    def write(self, path: str, offset: int, data: bytes) -> None:
        if not (self.plain / path).is_file():
            return
        text = (self.plain / path).read_text()
        file = self.tree.open(self.inode(path), os.O_RDWR)
        assert isinstance(file, OpenDisk) == (text in self.content)
        if isinstance(file, OpenDisk):
            file.write_now(offset, data)
            whole = self.content[text]
            whole += bytes(max(0, offset + len(data) - len(whole)))
            whole[offset : offset + len(data)] = data
        self.tree.close(file)

    @rule()
    def restart(self) -> None:
        self.tree.remove("vm")
        for overlay in self.overlays:
            overlay.close()
        self.show()

    @invariant()
    def same_names(self) -> None:
        if not self.plain.exists():
            return
        found: dict[str, list[str]] = {"0": [], "1": []}
        for path in sorted(self.plain.rglob("*")):
            name = str(path.relative_to(self.plain))
            attributes = self.tree.attributes(self.inode(name))
            if path.is_dir():
                listed = self.tree.names(self.inode(name))
                assert sorted(listed) == sorted(os.fsencode(inner.name) for inner in path.iterdir())
                continue
            text = path.read_text()
            file = self.tree.open(self.inode(name), os.O_RDONLY)
            shown = b"".join(file.parts_now(0, 1 << 30))
            self.tree.close(file)
            assert attributes.nlink == path.stat().st_nlink
            assert shown == self.content.get(text, text.encode())
            assert attributes.size_bytes == len(shown)
            if text in self.content:
                found[text.removeprefix("disk ")].append(name)
        assert stub_keys(self.home / "tree") == found
        assert self.base.read_at(0, SIZE) == self.original

    def teardown(self) -> None:
        if self.plain.exists():
            self.tree.remove("vm", force=True)
            for overlay in self.overlays:
                overlay.close()
        shutil.rmtree(self.home)


TestNames = NamesMachine.TestCase
TestNames.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
