"""The grammar of ``backup vm``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xbfs.cli import values

if TYPE_CHECKING:
    from xbfs.cli.xen_parsers import Verbs

CONNECTIONS_MAX: Final = 8
"""Half of the NBD connections that a host has for everybody (xapi-nbd allows 16)."""


def add_backup_vm(backup: Verbs) -> None:
    """``backup vm``, below ``backup``."""
    vm = backup.add(
        "vm",
        "backup_vm:vm",
        "back up VMs of a XenServer / XCP-ng pool, each as a restore point",
        [
            "xbfs backup vm web db --pool prod",
            "xbfs backup vm --tag nightly --pool prod",
            "xbfs backup vm --all --pool prod --json",
        ],
        "Takes a snapshot of each VM, reads what changed since its last restore point, and lets go of the snapshot\n"
        "but for its changed-block log. Where changes are not known for certain the disk is read in full, and the\n"
        "point says why. NAME is a VM's name or uuid, or a pattern with * and ?. VMs tagged xo:no-bak and disks with\n"
        "[NOBAK] in their name are left out. Leftovers of runs that were killed are removed from the pool first.",
    )
    vm.add_argument("names", nargs="*", metavar="NAME", help="VM, by name, uuid or pattern")
    vm.add_argument("--pool", required=True, metavar="POOL", help="the pool, as `xbfs pool list` shows it")
    vm.add_argument("--all", action="store_true", help="all VMs of the pool")
    vm.add_argument("--tag", action="append", default=[], metavar="TAG", help="all VMs with this tag")
    vm.add_argument(
        "--exclude",
        type=values.disk_number,
        action="append",
        default=[],
        metavar="N",
        help="leave disk N (its position in the VM) out; for one VM",
    )
    vm.add_argument("--full", action="store_true", help="read all that is allocated, even where changes are known")
    vm.add_argument(
        "--connections",
        type=values.number(1, CONNECTIONS_MAX),
        metavar="N",
        default=4,
        help=f"NBD connections to read a disk with, 1 to {CONNECTIONS_MAX} (default: 4)",
    )
    vm.add_argument(
        "--keep-data",
        action="store_true",
        help="leave the data of the snapshot on the pool until the next backup, not only its changed-block log",
    )
    vm.add_argument(
        "--wait",
        type=values.seconds(0),
        metavar="SECONDS",
        default=300.0,
        help="skip a VM when what its SR has yet to coalesce did not become less for so long (default: 300)",
    )
    vm.add_argument("--index", action="store_true", help="then list the guests' files, as `xbfs index` does")
    vm.add_argument("-q", "--quiet", action="store_true", help="show no progress")
