"""A program of its own: carries libfuse's answers from a socket to the kernel.

    python -I -S pump.py SOCKET DEVICE        two inherited descriptors

libfuse speaks to a socket where it believes to have the FUSE device (``plane``). A process, not a thread: in the
server a thread would fight the event loop for the interpreter over every answer, which doubles what a lookup takes.
Ends when the server is gone or the mount is.
"""

from __future__ import annotations

import errno
import os
import socket
import sys

ANSWER_MAX = 2 << 20


def main() -> None:
    """Carry until one side is gone."""
    answers = socket.socket(fileno=int(sys.argv[1]))
    device = int(sys.argv[2])
    buffer = memoryview(bytearray(ANSWER_MAX))
    while size := answers.recv_into(buffer):
        try:
            os.write(device, buffer[:size])
        except OSError as exc:
            # ENOENT: whoever asked is gone. Others: libfuse would not do more than ignore them either.
            if exc.errno == errno.ENODEV:
                return


if __name__ == "__main__":
    main()
