"""The real command line in processes of its own, and a small repository with two restore points to use it on."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.runtime import SeededRandom

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

ROOT = Path(__file__).parents[2]
PASSPHRASE = "correct horse battery staple"
CHUNK = 64 << 10
MIB = 1 << 20
TIMEOUT_S = 120
COMMAND = (sys.executable, "-m", "xbfs")


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: bytes
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The document on standard output."""
        document = json.loads(self.out)
        assert isinstance(document, dict)
        return document


@dataclass(frozen=True)
class World:
    """A repository, its cache, images, and what the first two backups told."""

    directory: Path
    full: dict[str, Any] = field(default_factory=dict)
    delta: dict[str, Any] = field(default_factory=dict)
    init: dict[str, Any] = field(default_factory=dict)

    @property
    def repository(self) -> Path:
        return self.directory / "repository"

    @property
    def gen1(self) -> Path:
        return self.directory / "gen1.raw"

    @property
    def gen2(self) -> Path:
        return self.directory / "gen2.raw"

    @property
    def bitmap(self) -> Path:
        return self.directory / "gen2.cbt"

    @property
    def ids(self) -> tuple[str, str]:
        return self.full["point"]["id"], self.delta["point"]["id"]

    def environment(self, **changes: str | None) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("XBFS_")}
        clean |= {
            "PYTHONPATH": f"{ROOT / 'engine'}:{ROOT}",
            "XBFS_REPOSITORY": str(self.repository),
            "XBFS_CACHE": str(self.directory / "cache"),
            "XBFS_PASSPHRASE": PASSPHRASE,
        }
        for name, value in changes.items():
            clean.pop(name, None)
            if value is not None:
                clean[name] = value
        return clean

    def run(self, *words: str | Path, limit: Callable[[], None] | None = None, **environment: str | None) -> Done:
        """Run a command to its end, without a terminal."""
        done = subprocess.run(
            [*COMMAND, *map(str, words)],
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
            preexec_fn=limit,
        )
        return Done(done.returncode, done.stdout, done.stderr.decode())

    def good(self, *words: str | Path) -> Done:
        """Run a command that must do its work."""
        done = self.run(*words)
        assert done.code == 0, done.err
        return done

    @contextmanager
    def started(self, *words: str | Path) -> Iterator[subprocess.Popen[bytes]]:
        """A command that runs on, and is gone when the context is left."""
        process = subprocess.Popen(
            [*COMMAND, *map(str, words)],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=_be_nice,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    @contextmanager
    def stopped_in_the_middle(self, *words: str | Path) -> Iterator[subprocess.Popen[bytes]]:
        """A backup that was stopped (SIGSTOP) once it had stored its first pack but was not done."""
        before = self.packs()
        deadline = time.monotonic() + TIMEOUT_S
        with self.started(*words) as process:
            while self.packs() == before:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.002)
            process.send_signal(signal.SIGSTOP)
            yield process

    def packs(self) -> int:
        return sum(1 for _ in self.repository.glob("data/*/*"))

    def points(self) -> list[str]:
        return [point["id"] for point in self.good("points", "--json").json["points"]]

    def copy(self, directory: Path) -> World:
        """The same world in another place, to be damaged."""
        shutil.copytree(self.directory, directory, dirs_exist_ok=True)
        return replace(self, directory=directory)


def _be_nice() -> None:
    """Let whoever watches this process be faster."""
    os.nice(15)


def make_world(directory: Path) -> World:
    """A repository with a full and a changed-block restore point of VM "web"."""
    world = World(directory)
    write_images(world)
    init = world.good("init", "--json").json
    full = world.good("backup", "image", world.gen1, "--vm", "web", "--json").json
    delta = world.good("backup", "image", world.gen2, "--vm", "web", "--changed", world.bitmap, "--json").json
    return World(directory, full, delta, init)


def write_images(world: World) -> None:
    """gen1: 5 MiB and 777 bytes with holes; gen2: chunk 1 changed, chunk 3 zeroed, chunk 32 filled where a hole was."""
    seeded = SeededRandom(1)
    data = bytearray(5 * MIB + 777)
    data[:MIB] = seeded.token(MIB)
    data[3 * MIB : 4 * MIB] = b"all work and no play " * (MIB // 21) + bytes(MIB % 21)
    data[-77:] = b"x" * 77
    write_sparse(world.gen1, data)
    data[CHUNK + 100 : CHUNK + 105] = b"hello"
    data[3 * CHUNK : 4 * CHUNK] = bytes(CHUNK)
    data[32 * CHUNK + 4096 : 32 * CHUNK + 8192] = seeded.token(4096)
    write_sparse(world.gen2, data)
    world.bitmap.write_text(bitmap([1, 3, 32], len(data)))


def write_sparse(path: Path, data: bytes | bytearray) -> None:
    """Zero pages become holes."""
    with path.open("wb") as file:
        file.truncate(len(data))
        for offset in range(0, len(data), 4096):
            page = data[offset : offset + 4096]
            if any(page):
                os.pwrite(file.fileno(), page, offset)


def bitmap(blocks: Iterable[int], size_bytes: int) -> str:
    """Base64 of a bit per 64 KiB, the most significant first, as XAPI gives it."""
    bits = bytearray(-(-size_bytes // (8 * CHUNK)))
    for block in blocks:
        bits[block // 8] |= 0x80 >> (block % 8)
    return base64.b64encode(bits).decode()
