"""The grammar of ``test``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xbfs.cli import values
from xbfs.cli.boot_parsers import add_place

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.xen_parsers import Verbs

DEADLINE_S: Final = 300
_PARALLEL_MAX: Final = 16


def add_boot_test(verbs: Verbs) -> None:
    """``test``."""
    test = verbs.add(
        "test",
        "boot_test:test",
        "boot a restore point where it harms nobody, and store whether it runs",
        [
            "xbfs test web@latest",
            "xbfs test web@latest --marker 'nginx: ready' --screenshot web.png",
            "xbfs test --vm web --vm db --parallel 2 --json",
            "xbfs test web@latest --pool prod",
        ],
        "Boots the disks in QEMU without a network, or on a pool in a network that leads nowhere, and without copying\n"
        "them; what the guest writes is thrown away, and the restore point never changes. The verdict is booted,\n"
        "failed or unclear; docs/boot-test.md has the rule. It is kept in the repository, with the screen and the end\n"
        "of the console: `xbfs show POINT` tells it. Exit code 0 if all booted, 109 if one failed, 3 if one is\n"
        "unclear. Needs an owner's key slot; here qemu-system-x86, and for UEFI guests ovmf; for a pool what\n"
        "`xbfs boot --pool` needs.",
    )
    test.add_argument("point", nargs="?", metavar="POINT", help="restore point")
    test.add_argument("--vm", action="append", default=[], metavar="NAME", help="the newest point of a VM; repeatable")
    test.add_argument("--policy", metavar="P", help="not in this release")
    test.add_argument(
        "--deadline",
        type=values.number(1, values.DAY_S),
        default=DEADLINE_S,
        metavar="SECONDS",
        help=f"how long each may take (default: {DEADLINE_S}; emulation is slow)",
    )
    test.add_argument(
        "--parallel", type=values.number(1, _PARALLEL_MAX), default=1, metavar="N", help="so many at once (default: 1)"
    )
    test.add_argument("--marker", metavar="TEXT", help="booted is what writes this to its serial console, nothing else")
    test.add_argument("--screenshot", metavar="FILE", help="write the last screen there, as PNG; for one point")
    test.add_argument("--keep", action="store_true", help="leave the session, and on a pool its VM, to be looked at")
    test.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    _add_qemu(test)
    _add_pool(test)


def _add_qemu(test: argparse.ArgumentParser) -> None:
    qemu = test.add_argument_group("in QEMU")
    qemu.add_argument(
        "--accel", choices=("auto", "kvm", "tcg"), help="default: auto, kvm if a real boot under it works here"
    )
    qemu.add_argument("--firmware", choices=("auto", "bios", "uefi"), help="default: auto, as the VM had it")
    qemu.add_argument("--bus", choices=("ide", "virtio"), help="how disks are attached (default: ide)")
    qemu.add_argument("--memory", type=values.number(64, 1 << 20), metavar="MIB", help="of the guest (default: 1024)")


def _add_pool(test: argparse.ArgumentParser) -> None:
    pool = test.add_argument_group("on a pool", "as the VM was, but for its networks: docs/boot-test.md")
    pool.add_argument("--pool", metavar="POOL", help="boot it there, as `xbfs pool list` shows it")
    add_place(pool)
