"""A program of its own: carries libfuse's answers from a socket to the kernel.

    python -I -S pump.py SOCKET DEVICE SET CLEAR        two inherited descriptors, then flags in hexadecimal

libfuse speaks to a socket where it believes to have the FUSE device (``plane``). A process, not a thread: in the
server a thread would fight the event loop for the interpreter over every answer, which doubles what a lookup takes.
Ends when the server is gone or the mount is.

What the kernel is told unasked (a name is gone, say) has a thread of its own: the kernel takes it only once nobody
waits for an answer about that name, and such an answer may be the next to carry. It is given a moment, though, so that
who gets the next answer mostly sees what was told before.

The first answer is the one to INIT, before which the kernel asks nothing else. Its flags say what the kernel may leave
to us or keep for us: SET are added and CLEAR taken away, which pyfuse3 can not say.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import threading
from contextlib import suppress
from queue import SimpleQueue

ANSWER_MAX = 2 << 20
HEADER = struct.Struct("=IiQ")
"""fuse_out_header: length, error and the request's number, 0 for what nobody asked (include/uapi/linux/fuse.h)."""
FLAGS = struct.Struct("=I")
FLAGS_AT = 28
"""`flags` of fuse_init_out, behind the header."""
TOLD_S = 0.05


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
            (flags,) = FLAGS.unpack_from(buffer, FLAGS_AT)
            FLAGS.pack_into(buffer, FLAGS_AT, flags & ~removed | added)
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


if __name__ == "__main__":
    main()
