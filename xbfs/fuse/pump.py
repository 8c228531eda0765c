"""A program of its own: carries libfuse's answers from a socket to the kernel.

    python -I -S pump.py SOCKET DEVICE SET CLEAR        two inherited descriptors; flags in hexadecimal

libfuse speaks to a socket where it believes to have the FUSE device (``plane``). A process, not a thread: in the
server a thread would fight the event loop for the interpreter over every answer, which doubles what a lookup takes.
The first answer, to INIT, says what the mount can do: bits of its flags are set and cleared for what libfuse does not
know. Ends when the server is gone or the mount is.

The first answer is the one to INIT, before which the kernel asks nothing else. In it the kernel is told to keep the
targets of links, which pyfuse3 can not say: `latest` is in the path of every file that is looked at.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys

ANSWER_MAX = 2 << 20
INIT_FLAGS = struct.Struct("=I")
INIT_FLAGS_AT = 28
"""Of fuse_init_out behind fuse_out_header: major, minor, max_readahead come first (Linux, uapi/linux/fuse.h)."""
FLAGS = struct.Struct("=I")
FLAGS_AT = 28
"""`flags` of fuse_init_out, behind a fuse_out_header of 16 bytes (include/uapi/linux/fuse.h)."""
CACHE_SYMLINKS = 1 << 23
"""FUSE_CACHE_SYMLINKS; kernels before 4.20 ignore it."""


def main() -> None:
    """Carry until one side is gone."""
    answers = socket.socket(fileno=int(sys.argv[1]))
    device = int(sys.argv[2])
    buffer = memoryview(bytearray(ANSWER_MAX))
    is_first = True
    while size := answers.recv_into(buffer):
        if is_first and size >= FLAGS_AT + FLAGS.size:
            FLAGS.pack_into(buffer, FLAGS_AT, FLAGS.unpack_from(buffer, FLAGS_AT)[0] | CACHE_SYMLINKS)
        is_first = False
        if is_first and size >= INIT_FLAGS_AT + INIT_FLAGS.size:
            (flags,) = INIT_FLAGS.unpack_from(buffer, INIT_FLAGS_AT)
            INIT_FLAGS.pack_into(buffer, INIT_FLAGS_AT, flags & ~clear_flags | set_flags)
        is_first = False
        try:
            os.write(device, buffer[:size])
        except OSError as exc:
            # ENOENT: whoever asked is gone. Others: libfuse would not do more than ignore them either.
            if exc.errno == errno.ENODEV:
                return


if __name__ == "__main__":
    main()
