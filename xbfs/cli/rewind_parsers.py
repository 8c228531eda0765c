"""The grammar of ``rewind``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs.cli import values

if TYPE_CHECKING:
    from xbfs.cli.xen_parsers import Verbs


def add_rewind(verbs: Verbs) -> None:
    """``rewind``."""
    rewind = verbs.add(
        "rewind",
        "rewind:rewind",
        "bring the disks of a VM back to a restore point in place, writing only what differs",
        [
            "xbfs rewind web --to web@2026-09-20 --pool prod --dry-run",
            "xbfs rewind web --to 3f2a90d1 --pool prod --stop --start",
            "xbfs rewind web --abandon --pool prod",
        ],
        "The VM must be halted, or be stopped and started with --stop and --start; its guest is only ever asked to\n"
        "shut down. First a safety point is made of the VM as it is: rewind to that one to undo the rewind. Then what\n"
        "differs from POINT is told, written into the existing VDIs, read back and compared. Disks that were added\n"
        "since stay as they are. If it is interrupted while it writes, the VM can not be started until the rewind was\n"
        "run again to its end, or --abandon says that its disks shall be used as they are.",
    )
    rewind.add_argument("vm", metavar="VM", help="name or uuid of the VM")
    rewind.add_argument("--pool", required=True, metavar="POOL", help="the pool, as `xbfs pool list` shows it")
    what = rewind.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", metavar="POINT", help="the restore point")
    what.add_argument(
        "--abandon", action="store_true", help="let disks that an interrupted rewind left half-written be used"
    )
    rewind.add_argument("-n", "--dry-run", action="store_true", help="only say what would be written")
    rewind.add_argument("--stop", action="store_true", help="shut a running VM down before")
    rewind.add_argument("--start", action="store_true", help="start the VM afterwards")
    rewind.add_argument(
        "--stop-timeout",
        type=values.seconds(1),
        default=600.0,
        metavar="SECONDS",
        help="how long the guest may take to shut down (default: 600)",
    )
    rewind.add_argument("--no-safety-point", action="store_true", help="make no restore point of the VM as it is")
    rewind.add_argument(
        "--full-compare",
        action="store_true",
        help="read the disks in full and compare; also takes another VDI of the same size for a disk of the point",
    )
    rewind.add_argument("-q", "--quiet", action="store_true", help="show no progress")
