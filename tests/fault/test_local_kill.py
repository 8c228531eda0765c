"""Local storage and outputs under SIGKILL and on a full disk: what is visible is complete, the rest recognisable."""

from __future__ import annotations

import hashlib
import os
import random  # noqa: TID251 - seeded
import resource
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.runtime import FixedClock
from xbfs_engine.core.errors import StorageFull
from xbfs_engine.storage.files import AtomicOutput, is_temporary, write_replace
from xbfs_engine.storage.local import LocalStorage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WRITER = """
import hashlib, os, sys, threading
from pathlib import Path
from xbfs_engine.storage.local import LocalStorage

storage = LocalStorage(Path(sys.argv[1]))

def write():
    while True:
        parts = [os.urandom(997) for _ in range(300)]
        digest = hashlib.sha256(b"".join(parts)).hexdigest()
        storage.put(f"data/{digest[:1]}/{digest}", parts)
        os.write(1, f"{digest}\\n".encode())

for _ in range(3):
    threading.Thread(target=write).start()
"""

STEPPER = """
import os, signal, sys
from pathlib import Path
from xbfs_engine.storage.files import AtomicOutput, write_replace
from xbfs_engine.storage.local import LocalStorage

root, what, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
steps = 0

def deadly(call):
    def step(*args, **kwargs):
        global steps
        steps += 1
        if steps > last:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return step

for name in ("open", "writev", "pwrite", "fsync", "link", "replace", "close", "unlink", "mkdir"):
    setattr(os, name, deadly(getattr(os, name)))
match what:
    case "put":
        LocalStorage(root / "repository").put("data/a", [b"new"] * 3000)
    case "replace":
        write_replace(root / "a", [b"new"] * 3000)
    case "output":
        with AtomicOutput(root / "a", overwrite=True) as out:
            out.write_at(0, b"new" * 1000)
            out.write_at(3000, b"new" * 2000)
            out.commit()
steps = -1000
"""
ROUNDS = 20


def child(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PATH": os.environ["PATH"]}
    return subprocess.Popen([sys.executable, "-c", script, *arguments], env=environment, stdout=subprocess.PIPE)


def files_below(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if not path.is_dir()]


def test_a_writer_killed_at_any_moment_leaves_complete_blobs_and_temporary_files(tmp_path: Path) -> None:
    moments = random.Random(7)
    storage = LocalStorage(tmp_path)
    acknowledged: set[str] = set()
    for _ in range(ROUNDS):
        with child(WRITER, str(tmp_path)) as writer:
            assert writer.stdout is not None
            first = writer.stdout.readline()
            time.sleep(moments.uniform(0, 0.02))
            writer.kill()
            said = (first + writer.stdout.read()).decode()
            assert writer.wait(10) == -signal.SIGKILL
        acknowledged |= {line.strip() for line in said.splitlines(keepends=True) if line.endswith("\n")}
    visible = {blob.name.rpartition("/")[2]: blob for blob in storage.list_blobs("")}
    for digest, blob in visible.items():
        assert hashlib.sha256(storage.get(blob.name)).hexdigest() == digest
    assert len(acknowledged) >= ROUNDS
    assert acknowledged <= visible.keys()
    left = [path for path in files_below(tmp_path) if path.name not in visible]
    assert left, "no kill hit a put: this test has seen nothing"
    assert all(path.parent == tmp_path / "tmp" and is_temporary(path.name) for path in left)

    assert storage.sweep_temporary(3600, FixedClock(time.time_ns() + 3700 * 10**9)) == len(left)  # noqa: TID251
    assert {path.name for path in files_below(tmp_path)} == visible.keys()
    assert all(storage.size(blob.name) == 300 * 997 for blob in visible.values())


@pytest.mark.parametrize(
    ("what", "place", "old"), [("put", "repository/data/a", None), ("replace", "a", b"old"), ("output", "a", b"old")]
)
def test_killed_before_each_step_of_a_write(tmp_path: Path, what: str, place: str, old: bytes | None) -> None:
    """One child per step, all at once: each dies before its own step; the last few live."""
    seen: list[tuple[bool, bool]] = []
    steps = 24
    for step in range(steps):
        (tmp_path / str(step)).mkdir()
        if old is not None:
            (tmp_path / str(step) / place).write_bytes(old)
    for first in range(0, steps, 4):
        batch = range(first, min(first + 4, steps))
        for step, stepper in [(step, child(STEPPER, str(tmp_path / str(step)), what, str(step))) for step in batch]:
            with stepper:
                survived = stepper.wait(30) == 0
            assert survived or stepper.returncode == -signal.SIGKILL
            root, target = tmp_path / str(step), tmp_path / str(step) / place
            data = target.read_bytes() if target.exists() else None
            assert data in (old, b"new" * 3000)
            others = [path for path in files_below(root) if path != target]
            assert all(is_temporary(path.name) for path in others)
            assert survived <= (data != old and not others)
            seen.append((data != old, bool(others)))
    # The steps really were there: killed with nothing begun, a temporary file left, the target there, all done.
    assert {(False, False), (False, True), (True, False)} <= set(seen)
    assert ((True, True) in seen) == (what == "put"), "a link stands beside its temporary name for a moment"
    assert [visible for visible, _ in seen] == sorted(visible for visible, _ in seen)
    assert survived, "more steps than this test tries"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "xbfs-test", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 1 MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_full(root: Path, *, fits: int, too_much: int) -> None:
    """``fits`` bytes find room beside 300 KB, ``too_much`` do not."""
    storage = LocalStorage(root / "repository")
    storage.put("data/a", [bytes(300_000)])
    (root / "b").write_bytes(b"old")
    before = sorted(files_below(root))

    def write_output() -> None:
        with AtomicOutput(root / "b", overwrite=True) as out:
            for offset in range(0, too_much, 1000):
                out.write_at(offset, bytes(1000))
            out.commit()

    writes: list[Callable[[], None]] = [
        lambda: storage.put("data/b", [bytes(1000)] * (too_much // 1000)),
        lambda: write_replace(root / "b", [bytes(too_much)]),
        write_output,
    ]
    for write in writes:
        with pytest.raises(StorageFull) as caught:
            write()
        assert caught.value.hint
        assert sorted(files_below(root)) == before
    assert [blob.name for blob in storage.list_blobs("")] == ["data/a"]
    assert (root / "b").read_bytes() == b"old"
    storage.put("data/b", [bytes(fits)])
    assert storage.size("data/b") == fits


def test_a_full_disk_is_reported_and_nothing_of_the_blob_stays(small_disk: Path) -> None:
    check_full(small_disk, fits=500_000, too_much=900_000)


@pytest.mark.usefixtures("small_files")
def test_a_file_size_limit_is_reported_and_nothing_of_the_blob_stays(tmp_path: Path) -> None:
    check_full(tmp_path, fits=1 << 20, too_much=(1 << 20) + 1000)
