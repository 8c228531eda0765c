"""Real NBD servers on ports of the loopback interface: nbdkit and qemu-nbd, plain or with TLS."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support.nbd_certificates import HOST_NAME, Identity
from xbfs_engine.source.nbd import NbdTarget, TlsPolicy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_nbdkit = pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed")
needs_qemu_nbd = pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="qemu-nbd is not installed")


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def target(port: int, tls: Identity | None = None, *, subject: str = HOST_NAME, name: str = "") -> NbdTarget:
    """How to reach a server on the loopback interface."""
    policy = TlsPolicy(tls.trusted, subject) if tls else None
    return NbdTarget("127.0.0.1", port, name, policy, "host1")


@contextmanager
def nbdkit(*arguments: str, certificates: Path | None = None, port: int | None = None) -> Iterator[int]:
    """Run nbdkit with these arguments; yields its port."""
    port = port or free_port()
    tls = ["--tls=require", f"--tls-certificates={certificates}"] if certificates else []
    with _running(["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), *tls, *arguments], port):
        yield port


@contextmanager
def qemu_nbd(disk: Path, *, certificates: Path | None = None, name: str = "") -> Iterator[int]:
    """Serve a raw image read-only to several clients; yields the port."""
    port = free_port()
    command = ["qemu-nbd", "-r", "-f", "raw", "-b", "127.0.0.1", "-p", str(port), "-e", "8", "-t", "-x", name]
    if certificates:
        creds = f"tls-creds-x509,id=tls0,endpoint=server,verify-peer=off,dir={certificates}"
        command += ["--object", creds, "--tls-creds", "tls0"]
    with _running([*command, str(disk)], port):
        yield port


@contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert process.poll() is None, f"{command} ended with {process.returncode}"
                assert time.monotonic() < until, f"{command} does not listen"
                time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(10)
