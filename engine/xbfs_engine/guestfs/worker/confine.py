"""How a worker gives up its rights before it meets a disk.

Each layer stands for itself, and what the kernel or a container does not allow is left out and told: readers are more
useful with less of a sandbox than none. What remains is computing, memory up to a limit, and the sockets that are open.
Runs once, in a process with one thread.
"""

from __future__ import annotations

import os
import resource
import signal
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.guestfs.worker import landlock, seccomp
from xbfs_engine.guestfs.worker.kernel import detach_mounts, prctl, syscall, unshare

if TYPE_CHECKING:
    from collections.abc import Callable

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
"""Linux uapi/linux/prctl.h."""

_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWUTS: Final = 0x04000000
_CLONE_NEWIPC: Final = 0x08000000
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
"""Linux uapi/linux/sched.h."""

_CAPSET: Final = {"x86_64": 126, "aarch64": 91}
_CAPABILITIES_V3: Final = (0x20080522).to_bytes(4, "little") + bytes(4)
"""Header of capset(2): version 3, this process."""

_FIRST_USER: Final = 0x70000000
"""Users from here on belong to nobody: above those that systemd gives to containers, and below 2^31. Each worker is one
of its own, by its process's number."""

_DESCRIPTORS_MAX: Final = 16


class Confinement(NamedTuple):
    """What of the sandbox is in force, and what this kernel or container does not allow; each a few words."""

    in_force: tuple[str, ...]
    missing: tuple[str, ...]


def die_with(parent: int) -> None:
    """Be killed when the parent ends. The kernel forgets it when a process changes its user."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def confine(memory_bytes: int, *, with_threads: bool) -> Confinement:
    """Give up everything but open sockets and ``memory_bytes`` more than there are; threads may still be started."""
    parent = os.getppid()
    # Before there are no files any more.
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
        memory_bytes += int(file.read().split()[0]) * resource.getpagesize()
    in_force: dict[str, str] = {}
    missing: dict[str, str] = {}

    def put(name: str, layer: Callable[[], str]) -> None:
        try:
            in_force[name] = f"{name} {layer()}".strip()
        except (OSError, ValueError) as error:
            missing[name] = f"{name}: {error}"
        else:
            missing.pop(name, None)

    put("namespaces", _leave_namespaces)
    put("user", _become_nobody)
    if "namespaces" in missing:
        put("namespaces", _leave_into_a_user_namespace)
    put("capabilities", _drop_capabilities)
    put("no new privileges", _refuse_privileges)
    put("limits", partial(_limit, memory_bytes, with_threads=with_threads))
    put("Landlock", landlock.restrict)
    # The last moment at which this can be asked for.
    die_with(parent)
    put("seccomp", partial(seccomp.restrict, with_threads=with_threads))
    return Confinement(tuple(in_force.values()), tuple(missing.values()))


def _leave_namespaces() -> str:
    """As root; without any mount: a copy of those of the machine would keep them busy after their unmount."""
    unshare(_CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS | _CLONE_NEWNS)
    detach_mounts()
    return "network, ipc, uts, mount"


def _leave_into_a_user_namespace() -> str:
    """As anybody, where the kernel lets everybody make one. Mounts are locked in it, so they are not copied at all."""
    unshare(_CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS | _CLONE_NEWUSER)
    return "network, ipc, uts, user"


def _become_nobody() -> str:
    if os.geteuid():
        return "of the caller"
    user = _FIRST_USER + os.getpid()
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    return "of its own"


def _drop_capabilities() -> str:
    """Of a user namespace: a process that was root has lost them with its user."""
    syscall(_CAPSET[os.uname().machine], _CAPABILITIES_V3, bytes(24))
    return "none"


def _refuse_privileges() -> str:
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    # Nobody but root may look into it, and it leaves no core behind.
    prctl(_PR_SET_DUMPABLE, 0)
    return ""


def _limit(memory_bytes: int, *, with_threads: bool) -> str:
    limits = [
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_NOFILE, _DESCRIPTORS_MAX),
    ]
    if not with_threads:
        # Threads count as processes of their user, who may be the caller with all of its own.
        limits.append((resource.RLIMIT_NPROC, 0))
    for which, most in limits:
        resource.setrlimit(which, (most, most))
    return "of memory, files" + ("" if with_threads else ", processes")
