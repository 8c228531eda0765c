"""Mounting by ourselves: fusermount3 mounts and hands over the open FUSE device (fuse(4), fusermount3's _FUSE_COMMFD).

libfuse would do the same; with the descriptor in our hands the data plane can read it.
"""

from __future__ import annotations

import array
import os
import socket
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from xbfs.fuse.mountpoint import FUSERMOUNT
from xbfs_engine.core.errors import FuseMissing, MountFailed

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet
    from pathlib import Path

_MOUNT_S: Final = 20.0
_DESCRIPTOR_BYTES: Final = array.array("i").itemsize


def mount_device(path: Path, options: AbstractSet[str], hint: str) -> int:
    """Mount on ``path``; returns the descriptor of the device. Raises MountFailed with ``hint``, FuseMissing."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(_MOUNT_S)
        try:
            helper = subprocess.Popen(
                [FUSERMOUNT, "-o", ",".join(sorted(options)), "--", str(path)],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        except FileNotFoundError as exc:
            raise FuseMissing(f"the program {FUSERMOUNT} is not installed") from exc
        theirs.close()
        device = _received(ours)
        try:
            _, said = helper.communicate(timeout=_MOUNT_S)
        except subprocess.TimeoutExpired:
            helper.kill()
            _, said = helper.communicate()
    if device is None or helper.returncode:
        if device is not None:
            os.close(device)
        why = said.strip() or f"{FUSERMOUNT} ended with {helper.returncode}"
        raise MountFailed(f"{path} can not be mounted on: {why}", hint=hint)
    return device


def _received(channel: socket.socket) -> int | None:
    """The descriptor that comes over the channel, or None if the other side closes it without one."""
    room = socket.CMSG_SPACE(_DESCRIPTOR_BYTES)
    with suppress(OSError):
        _, ancillary, _, _ = channel.recvmsg(1, room)
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors = array.array("i")
                descriptors.frombytes(payload[:_DESCRIPTOR_BYTES])
                os.set_inheritable(descriptors[0], False)
                return descriptors[0]
    return None
