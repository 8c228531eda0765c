"""The system calls that a worker may make: reading and writing what is open, memory, time; threads if it must.

A call that a library makes in passing fails; any other ends the process with SIGSYS. Memory never becomes code.
Numbers are those of Linux ``arch/x86/entry/syscalls/syscall_64.tbl`` and ``uapi/asm-generic/unistd.h``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Final, NamedTuple

from xbfs_engine.guestfs.worker.kernel import syscall

_LOAD: Final = 0x20
_IF_EQUAL: Final = 0x15
_IF_ANY_BIT: Final = 0x45
_RETURN: Final = 0x06
"""Classic BPF: BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JSET|K, BPF_RET|K (uapi/linux/bpf_common.h)."""

_ALLOW: Final = 0x7FFF0000
_FAIL: Final = 0x00050000
_KILL: Final = 0x80000000
"""SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS (uapi/linux/seccomp.h)."""

_NUMBER_AT: Final = 0
_ARCHITECTURE_AT: Final = 4
_FIRST_ARGUMENT_AT: Final = 16
_THIRD_ARGUMENT_AT: Final = _FIRST_ARGUMENT_AT + 2 * 8
"""In struct seccomp_data; low halves of arguments, as both architectures are little-endian."""

_PROT_EXEC: Final = 4
_CLONE_THREAD: Final = 0x00010000
_CLONE3: Final = 435
"""Of all architectures. Its flags lie in memory, where a filter can not look; glibc then takes clone."""
_SET_MODE_FILTER: Final = 1


class _Architecture(NamedTuple):
    audit: int
    """AUDIT_ARCH_… (uapi/linux/audit.h)."""
    seccomp: int
    allowed: tuple[int, ...]
    mapping: tuple[int, ...]
    """mmap and mprotect: allowed but for code."""
    failing: tuple[int, ...]
    threads: tuple[int, ...]
    """set_robust_list, set_tid_address."""
    clone: int


_ARCHITECTURES: Final = {
    "x86_64": _Architecture(
        0xC000003E,
        317,
        # recvfrom sendto read write futex munmap mremap madvise brk clock_gettime gettimeofday clock_nanosleep
        # nanosleep sched_yield poll ppoll rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
        # getpid gettid getrandom close exit exit_group rseq membarrier
        (45, 44, 0, 1, 202, 11, 25, 28, 12, 228, 96, 230, 35, 24, 7, 271, 13, 14, 15, 131, 219, 39, 186, 318, 3, 60,
         231, 334, 324),
        (9, 10),
        # open openat openat2 stat fstat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getcwd
        # getdents64 ioctl fcntl lseek uname sysinfo getrusage times sched_getaffinity prlimit64 getuid geteuid getgid
        # getegid
        (2, 257, 437, 4, 5, 6, 262, 332, 21, 269, 439, 89, 267, 79, 217, 16, 72, 8, 63, 99, 98, 100, 204, 302, 102, 107,
         104, 108),
        (273, 218),
        56,
    ),
    "aarch64": _Architecture(
        0xC00000B7,
        277,
        # The same, as far as there are such.
        (207, 206, 63, 64, 98, 215, 216, 233, 214, 113, 169, 115, 101, 124, 73, 134, 135, 139, 132, 128, 172, 178, 278,
         57, 93, 94, 293, 283),
        (222, 226),
        (56, 437, 79, 80, 291, 48, 439, 78, 17, 61, 29, 25, 62, 160, 179, 165, 153, 123, 261, 174, 175, 176, 177),
        (99, 96),
        220,
    ),
}  # fmt: skip


def program(architecture: _Architecture, *, with_threads: bool) -> bytes:
    """The filter as BPF."""
    codes = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_IF_EQUAL, 1, 0, architecture.audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    verdicts = dict.fromkeys(architecture.allowed, _ALLOW)
    verdicts |= dict.fromkeys(architecture.failing, _FAIL | errno.EACCES)
    if with_threads:
        verdicts |= dict.fromkeys(architecture.threads, _ALLOW) | {_CLONE3: _FAIL | errno.ENOSYS}
    for number, verdict in verdicts.items():
        codes += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, verdict)]
    for number in architecture.mapping:
        codes += _by_bit(number, _THIRD_ARGUMENT_AT, _PROT_EXEC, if_set=_FAIL | errno.EACCES, if_not=_ALLOW)
    if with_threads:
        codes += _by_bit(architecture.clone, _FIRST_ARGUMENT_AT, _CLONE_THREAD, if_set=_ALLOW, if_not=_KILL)
    codes.append((_RETURN, 0, 0, _KILL))
    return b"".join(struct.pack("=HBBI", *code) for code in codes)


def _by_bit(number: int, argument_at: int, bit: int, *, if_set: int, if_not: int) -> list[tuple[int, int, int, int]]:
    """A verdict on one call that hangs on one bit of an argument."""
    return [
        (_IF_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, argument_at),
        (_IF_ANY_BIT, 0, 1, bit),
        (_RETURN, 0, 0, if_set),
        (_RETURN, 0, 0, if_not),
    ]


def restrict(*, with_threads: bool) -> str:
    """Put the filter in force. Raises OSError where the kernel or this module does not know how."""
    architecture = _ARCHITECTURES.get(os.uname().machine)
    if architecture is None or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise OSError(errno.ENOSYS, f"no filter for {os.uname().machine}")
    code = ctypes.create_string_buffer(program(architecture, with_threads=with_threads))
    # struct sock_fprog: how many instructions, and where.
    pointer = struct.pack("=HxxxxxxQ", (len(code) - 1) // 8, ctypes.addressof(code))
    syscall(architecture.seccomp, _SET_MODE_FILTER, 0, pointer)
    return "allow-list"
