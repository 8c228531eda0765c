"""A program of its own: carries libfuse's answers from a socket to the kernel.

    python -I -S pump.py SOCKET DEVICE SET CLEAR        two inherited descriptors, then flags in hexadecimal

libfuse speaks to a socket where it believes to have the FUSE device (``plane``). A process, not a thread: in the
server a thread would fight the event loop for the interpreter over every answer, which doubles what a lookup takes.
Ends when the server is gone or the mount is.

The first answer is the one to INIT, before which the kernel asks nothing else. Its flags say what the kernel may leave
to us or keep for us: SET are added and CLEAR taken away, which pyfuse3 can not say.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys

ANSWER_MAX = 2 << 20
FLAGS = struct.Struct("=I")
FLAGS_AT = 28
"""`flags` of fuse_init_out, behind a fuse_out_header of 16 bytes (include/uapi/linux/fuse.h)."""


def main() -> None:
    """Carry until one side is gone."""
    answers = socket.socket(fileno=int(sys.argv[1]))
    device = int(sys.argv[2])
    added, removed = int(sys.argv[3], 16), int(sys.argv[4], 16)
    buffer = memoryview(bytearray(ANSWER_MAX))
    is_first = True
    while size := answers.recv_into(buffer):
        if is_first and size >= FLAGS_AT + FLAGS.size:
            (flags,) = FLAGS.unpack_from(buffer, FLAGS_AT)
            FLAGS.pack_into(buffer, FLAGS_AT, flags & ~removed | added)
        is_first = False
        try:
            os.write(device, buffer[:size])
        except OSError as exc:
            # ENOENT: whoever asked is gone. Others: libfuse would not do more than ignore them either.
            if exc.errno == errno.ENODEV:
                return


if __name__ == "__main__":
    main()
