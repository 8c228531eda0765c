"""The sandbox of workers, tried from inside: each attempt is a program that confines itself first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xbfs_engine.guestfs.worker.confine import Confinement

BEGIN = """
import ctypes, errno, json, mmap, os, resource, signal, socket, sys, threading
from xbfs_engine.guestfs.worker import landlock, seccomp
from xbfs_engine.guestfs.worker.confine import confine
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
def map_code():
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_EXEC, private, -1, 0) == 2**64 - 1:
        raise OSError(ctypes.get_errno(), "mmap")
def many(call):
    "To keep it alive."
    return [call() for _ in range(100)]
path = os.devnull
"""
END = """
try:
    {attempt}
except (OSError, MemoryError, RuntimeError) as error:
    os.write(1, f"refused {{getattr(error, 'errno', None)}}".encode())
else:
    os.write(1, b"done")
os._exit(0)
"""
CONFINED = "confine(64 << 20, with_threads={threads})"
SIGSYS = -signal.SIGSYS


def run(*lines: str, user: int | None = None) -> tuple[str, int]:
    """What a program says, and how it ends."""
    done = subprocess.run(
        ["/usr/bin/python3" if user else sys.executable, "-c", "\n".join(lines)],
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "engine")},
        capture_output=True, text=True, check=False, timeout=30,
        user=user, group=user, extra_groups=[] if user else None,
    )  # fmt: skip
    assert "Error" not in done.stderr, done.stderr
    return done.stdout, done.returncode


def attempt(what: str, *, first: str = CONFINED.format(threads=False)) -> tuple[str, int]:
    return run(BEGIN, first, END.format(attempt=what))


def confinement(user: int | None = None) -> Confinement:
    said, _ = run(BEGIN, "os.write(1, json.dumps(confine(64 << 20, with_threads=False)).encode())", user=user)
    in_force, missing = json.loads(said)
    return Confinement(tuple(in_force), tuple(missing))


@pytest.fixture(scope="module")
def here() -> Confinement:
    """What this machine allows."""
    return confinement()


def skip_without(here: Confinement, layer: str) -> None:
    for missing in here.missing:
        if missing.startswith(layer):
            pytest.skip(missing)


def test_a_worker_can_still_compute_and_use_memory_below_its_limit() -> None:
    assert attempt("bytes(32 << 20)") == ("done", 0)


def test_memory_ends_at_the_limit() -> None:
    assert attempt("bytearray(200 << 20)") == ("refused None", 0)


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize(
    "what",
    [
        "socket.socket()",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.kill(1, 0)",
        "os.kill(os.getppid(), 9)",
        "libc.ptrace(16, os.getppid(), 0, 0)",
        "os.unlink('/nothing')",
        "os.mkdir('/tmp/nothing')",
        "os.pipe()",
        "os.setuid(0)",
        "os.memfd_create('code')",
        "libc.unshare(0x10000000)",
        "libc.syscall(425, 1, None)",
    ],
)
def test_calls_that_no_reader_makes_end_the_process(here: Confinement, what: str, threads: bool) -> None:
    skip_without(here, "seccomp")
    assert attempt(what, first=CONFINED.format(threads=threads)) == ("", SIGSYS)


@pytest.mark.parametrize(
    "what",
    ["open(path)", "os.stat(path)", "os.listdir('/')", "os.readlink('/proc/self/exe')", "map_code()", "import this"],
)
def test_calls_that_a_library_may_make_in_passing_fail(here: Confinement, what: str) -> None:
    skip_without(here, "seccomp")
    assert attempt(what) in (("refused 13", 0), ("refused None", 0))


def test_threads_are_only_for_who_needs_them(here: Confinement) -> None:
    skip_without(here, "seccomp")
    start = "thread = threading.Thread(target=int); thread.start(); thread.join()"
    assert attempt(start, first=CONFINED.format(threads=True)) == ("done", 0)
    assert attempt(start) == ("", SIGSYS)


def test_landlock_alone_keeps_files_shut_and_ports_unused(here: Confinement) -> None:
    skip_without(here, "Landlock")
    alone = "libc.prctl(38, 1, 0, 0, 0); landlock.restrict()"
    assert attempt("open('/etc/hostname')", first=alone) == ("refused 13", 0)
    assert attempt("os.listdir('/')", first=alone) == ("refused 13", 0)
    assert attempt("os.mkdir('/dev/shm/nothing')", first=alone) == ("refused 13", 0)
    assert attempt("os.execv('/bin/true', ['true'])", first=alone) == ("refused 13", 0)
    assert attempt("os.stat(path)", first=alone) == ("done", 0)


def test_the_limits_alone_leave_no_files_and_no_processes() -> None:
    alone = "from xbfs_engine.guestfs.worker.confine import _limit; _limit(64 << 20, with_threads=False)"
    if os.geteuid():
        assert attempt("os.fork()", first=alone) == ("refused 11", 0)
    assert attempt("many(os.pipe)", first=alone) == ("refused 24", 0)
    assert attempt("os.write(os.open('/dev/shm', os.O_TMPFILE | os.O_RDWR), b'1')", first=alone) == ("refused 27", 0)


def test_without_root_everything_but_the_own_user_is_in_force(here: Confinement) -> None:
    """In a user namespace, where the kernel lets everybody make one."""
    if os.geteuid():
        pytest.skip("the other tests are without root")
    in_force, missing = confinement(user=65534)
    assert "user of the caller" in in_force
    assert {layer.split()[0] for layer in in_force} >= {"capabilities", "no", "limits"}
    assert [layer for layer in missing if not layer.startswith("namespaces")] == [*here.missing]


@pytest.mark.skipif(os.geteuid() != 0, reason="others take no copy of the mounts")
def test_a_worker_keeps_no_mount_busy(here: Confinement) -> None:
    skip_without(here, "namespaces")
    program = "\n".join([BEGIN, "confine(64 << 20, with_threads=False)", "os.write(1, b'.')", "os.read(0, 1)"])
    environment = {"PYTHONPATH": str(Path(__file__).parents[2] / "engine")}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdin=pipe, stdout=pipe) as confined:
        assert confined.stdin is not None
        assert confined.stdout is not None
        assert confined.stdout.read(1) == b"."
        assert Path(f"/proc/{confined.pid}/mountinfo").read_bytes() == b""
        confined.stdin.close()
