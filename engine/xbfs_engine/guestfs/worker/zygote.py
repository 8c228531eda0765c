"""The zygote: a process that has imported all readers and forks workers. It sees no disk and no key.

It is started by exec, so that nothing of its caller's memory is in it, and takes orders over a SOCK_SEQPACKET socket:
``fork`` with two sockets, answered by the worker's number and pidfd; ``end <number>``, answered by the wait status.
It ends, and every worker with it, when that socket or its caller's process ends. One thread.
"""

from __future__ import annotations

import codecs
import fcntl
import gc
import importlib
import os
import select
import signal
import socket
from contextlib import suppress
from typing import Final

from xbfs_engine.guestfs.worker.confine import die_with
from xbfs_engine.guestfs.worker.forms import END, ORDER_BYTES_MAX, READY
from xbfs_engine.guestfs.worker.server import serve

_LATE_MODULES: Final = (
    "gzip",
    "fs_explorer.codecs.heavy.lzx",
    "fs_explorer.codecs.heavy.xpress",
    "fs_explorer.codecs.lznt1",
    "fs_explorer.codecs.lzo",
    "fs_explorer.codecs.native",
    "fs_explorer.codecs.zstd",
)
"""What readers import only when they need it, and can not once they are confined."""

_ENCODINGS: Final = ("ascii", "cp437", "cp1252", "idna", "latin-1", "utf-8", "utf-8-sig", "utf-16-le", "utf-16-be",
                     "utf-16", "utf-32-le", "mac_roman")  # fmt: skip

_OUT_OF_THE_WAY: Final = 16
_FAILED: Final = 70
"""Exit code; sysexits.h EX_SOFTWARE."""


def main(descriptor: int, caller: int) -> None:
    """Serve orders that come over ``descriptor`` from the process ``caller``."""
    preload()
    orders = socket.socket(fileno=descriptor)
    waiting = select.poll()
    with suppress(OSError):
        # Ends also if a fork of the caller keeps the other end of the socket open.
        waiting.register(os.pidfd_open(caller), select.POLLIN)
    if os.getppid() != caller:
        return
    waiting.register(orders, select.POLLIN)
    orders.send(READY)
    _silence()
    children: set[int] = set()
    try:
        while all(descriptor == orders.fileno() for descriptor, _ in waiting.poll()):
            order, descriptors, _, _ = socket.recv_fds(orders, ORDER_BYTES_MAX, 2)
            if not order:
                return
            _obey(orders, order, descriptors, children)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


def preload() -> None:
    """Import everything a worker may need."""
    for name in _LATE_MODULES:
        importlib.import_module(name)
    for name in _ENCODINGS:
        codecs.lookup(name)
    # Pages that are never written stay shared among all workers.
    gc.collect()
    gc.freeze()


def _obey(orders: socket.socket, order: bytes, descriptors: list[int], children: set[int]) -> None:
    if order.startswith(END):
        child = int(order[len(END) :])
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        children.remove(child)
        orders.send(b"%d" % status)
        return
    control, blocks = descriptors
    me = os.getpid()
    child = os.fork()
    if not child:
        _become_worker(control, blocks, me)
    children.add(child)
    os.close(control)
    os.close(blocks)
    pidfd = os.pidfd_open(child)
    socket.send_fds(orders, [b"%d" % child], [pidfd])
    os.close(pidfd)


def _become_worker(control: int, blocks: int, zygote: int) -> None:
    """Never returns."""
    try:
        die_with(zygote)
        # First out of the way of one another, then to the places behind the standard ones.
        control, blocks = (fcntl.fcntl(number, fcntl.F_DUPFD, _OUT_OF_THE_WAY) for number in (control, blocks))
        os.dup2(control, 3)
        os.dup2(blocks, 4)
        os.closerange(5, os.sysconf("SC_OPEN_MAX"))
        serve(socket.socket(fileno=3), socket.socket(fileno=4))
    except BaseException:  # noqa: BLE001 - nothing of the zygote's may run here
        os._exit(_FAILED)
    os._exit(0)


def _silence() -> None:
    """Nobody reads what is said from here on."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)
