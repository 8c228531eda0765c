"""A program of its own: carries libfuse's answers from a socket to the kernel.

    python -I -S pump.py SOCKET DEVICE SET CLEAR        two inherited descriptors, then flags in hexadecimal

libfuse speaks to a socket where it believes to have the FUSE device (``plane``). A process, not a thread: in the
server a thread would fight the event loop for the interpreter over every answer, which doubles what a lookup takes.
Ends when the server is gone or the mount is. A server that was killed takes exporting programs along; until they are
dead, requests wait: an answer that the mount is over would reach their clients, which are about to connect again.

What the kernel is told unasked (a name is gone, say) has a thread of its own: the kernel takes it only once nobody
waits for an answer about that name, and such an answer may be the next to carry. It is given a moment, though, so that
who gets the next answer mostly sees what was told before.

The first answer is the one to INIT, before which the kernel asks nothing else. Its flags say what the kernel may leave
to us or keep for us: SET are added and CLEAR taken away, which pyfuse3 can not say. They have 64 bits: the upper half
is ``flags2``, and with bits of that the answer also tells how deep file systems may be stacked.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from queue import SimpleQueue

ANSWER_MAX = 2 << 20
HEADER = struct.Struct("=IiQ")
"""fuse_out_header: length, error and the request's number, 0 for what nobody asked (include/uapi/linux/fuse.h)."""
FLAGS = struct.Struct("=I")
FLAGS_AT = 28
"""`flags` of fuse_init_out, behind the header."""
MORE = struct.Struct("=II")
MORE_AT = 48
"""`flags2` of it, which counts if `flags` has FUSE_INIT_EXT, and `max_stack_depth`."""
EXT = 1 << 30
STACK_DEPTH = 1
"""A file of ours may be backed by one of a file system that is no stack itself."""
TOLD_S = 0.05
ORPHANS_S = 0.1
"""How long the kernel takes at most to tell the children of a server that it died."""


class Telling:
    """The thread that tells the kernel what it did not ask."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._left: SimpleQueue[bytes] = SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        threading.Thread(target=self._tell, daemon=True).start()

    def add(self, notice: bytes) -> None:
        """Tell it soon; waits a moment for that, unless an earlier one is stuck already."""
        was_idle = self._idle.is_set()
        self._idle.clear()
        self._left.put(notice)
        if was_idle:
            self._idle.wait(TOLD_S)

    def _tell(self) -> None:
        while True:
            notice = self._left.get()
            with suppress(OSError):  # ENOENT: the kernel does not know it
                os.write(self._device, notice)
            if self._left.empty():
                self._idle.set()


def _change_init(answer: memoryview, added: int, removed: int) -> None:
    """Change the flags of INIT's answer."""
    (flags,) = FLAGS.unpack_from(answer, FLAGS_AT)
    flags = flags & ~removed | added & 0xFFFFFFFF
    if added >> 32 and len(answer) >= MORE_AT + MORE.size:
        more = MORE.unpack_from(answer, MORE_AT)[0] if flags & EXT else 0
        MORE.pack_into(answer, MORE_AT, more | added >> 32, STACK_DEPTH)
        flags |= EXT
    FLAGS.pack_into(answer, FLAGS_AT, flags)


def _received(answers: socket.socket, buffer: memoryview) -> int:
    """The next answer's size, 0 if the server is gone."""
    try:
        return answers.recv_into(buffer)
    except ConnectionResetError:
        return 0


def main() -> None:
    """Carry until one side is gone."""
    answers = socket.socket(fileno=int(sys.argv[1]))
    device = int(sys.argv[2])
    added, removed = int(sys.argv[3], 16), int(sys.argv[4], 16)
    buffer = memoryview(bytearray(ANSWER_MAX))
    telling = Telling(device)
    is_first = True
    while size := _received(answers, buffer):
        if is_first and size >= FLAGS_AT + FLAGS.size:
            _change_init(buffer[:size], added, removed)
        is_first = False
        if HEADER.unpack_from(buffer)[2] == 0:
            telling.add(bytes(buffer[:size]))
            continue
        try:
            os.write(device, buffer[:size])
        except OSError as exc:
            # ENOENT: whoever asked is gone. Others: libfuse would not do more than ignore them either.
            if exc.errno == errno.ENODEV:
                return
    time.sleep(ORPHANS_S)


if __name__ == "__main__":
    main()
