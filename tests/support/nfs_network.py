"""A network of our own for NFS tests: rpcbind and servers listen on its loopback, the machine's own are not touched."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import shutil
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESS = "10.99.0.1"
"""Of this machine in the private network: nfs-ganesha does not bind to 127.0.0.1 where there is no other address."""
_FS, _NEWNS, _NEWNET = 0x00000200, 0x00020000, 0x40000000
_PRIVATE = 0x4000 | 0x40000  # MS_REC | MS_PRIVATE
_DEADLINE_S = 20

needs_ganesha = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ganesha.nfsd") is None or shutil.which("rpcbind", path="/usr/sbin") is None,
    reason="needs root, nfs-ganesha and rpcbind",
)
needs_libnfs = pytest.mark.skipif(ctypes.util.find_library("nfs") is None, reason="libnfs is not installed")


@contextmanager
def private_network(*, with_rpcbind: bool = True) -> Iterator[str]:
    """This thread, and all processes started in it, are in network and mount namespaces of their own; yields ADDRESS.

    /run is private too: rpcbind's clients of this machine find it by a socket there.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    thread = Path("/proc/thread-self/ns")
    here = Path.cwd()
    before = [os.open(thread / kind, os.O_RDONLY | os.O_CLOEXEC) for kind in ("net", "mnt")]

    def call(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    call(libc.unshare(_NEWNS | _NEWNET))
    rpcbind = None
    try:
        call(libc.mount(b"none", b"/", None, ctypes.c_ulong(_PRIVATE), None))
        call(libc.mount(b"tmpfs", b"/run", b"tmpfs", ctypes.c_ulong(0), None))
        for command in (("link", "set", "lo", "up"), ("address", "add", f"{ADDRESS}/32", "dev", "lo")):
            subprocess.run(["ip", *command], check=True, timeout=_DEADLINE_S)
        if with_rpcbind:
            rpcbind = _start_rpcbind()
        yield ADDRESS
    finally:
        if rpcbind is not None:
            rpcbind.kill()
            rpcbind.wait()
        # Threads that were started in here share this one's working directory: then the kernel keeps it from leaving.
        call(libc.unshare(_FS))
        for descriptor in before:
            call(libc.setns(descriptor, 0))
            os.close(descriptor)
        os.chdir(here)


def _start_rpcbind() -> subprocess.Popen[bytes]:
    rpcbind = subprocess.Popen(["/usr/sbin/rpcbind", "-f"], stderr=subprocess.DEVNULL, cwd="/")
    end = time.monotonic() + _DEADLINE_S
    while time.monotonic() < end:
        with suppress(subprocess.SubprocessError):
            subprocess.run(["rpcinfo", "-p", ADDRESS], check=True, capture_output=True, timeout=_DEADLINE_S)
            return rpcbind
        time.sleep(0.05)
    rpcbind.kill()
    raise AssertionError("rpcbind does not answer")
