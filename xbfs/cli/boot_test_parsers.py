"""The grammar of ``test``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xbfs.cli import values

if TYPE_CHECKING:
    from xbfs.cli.xen_parsers import Verbs

DEADLINE_S: Final = 300
MEMORY_MIB: Final = 1024
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
        ],
        "Boots the disks in QEMU without a network and without copying them; what the guest writes is thrown away,\n"
        "and the restore point never changes. The verdict is booted, failed or unclear; docs/boot-test.md has the\n"
        "rule. It is kept in the repository, with the screen and the end of the console: `xbfs show POINT` tells it.\n"
        "Exit code 0 if all booted, 109 if one failed, 3 if one is unclear. Needs qemu-system-x86, for UEFI guests\n"
        "ovmf, and an owner's key slot.",
    )
    test.add_argument("point", nargs="?", metavar="POINT", help="restore point")
    test.add_argument("--vm", action="append", default=[], metavar="NAME", help="the newest point of a VM; repeatable")
    test.add_argument("--policy", metavar="P", help="not in this release")
    test.add_argument("--pool", metavar="P", help="not in this release")
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
    test.add_argument(
        "--accel", choices=("auto", "kvm", "tcg"), default="auto", help="auto: kvm if a real boot under it works here"
    )
    test.add_argument("--firmware", choices=("auto", "bios", "uefi"), default="auto", help="auto: as the VM had it")
    test.add_argument("--bus", choices=("ide", "virtio"), default="ide", help="how disks are attached (default: ide)")
    test.add_argument(
        "--memory",
        type=values.number(64, 1 << 20),
        default=MEMORY_MIB,
        metavar="MIB",
        help=f"of the guest (default: {MEMORY_MIB})",
    )
    test.add_argument("--marker", metavar="TEXT", help="booted is what writes this to its serial console, nothing else")
    test.add_argument("--screenshot", metavar="FILE", help="write the last screen there, as PNG; for one point")
    test.add_argument("--keep", action="store_true", help="leave the session, to be looked at: see `xbfs boot list`")
    test.add_argument("-q", "--quiet", action="store_true", help="show no progress")
