"""The grammar of the verbs that look after a pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xbfs.cli.xen_parsers import Verbs


def add_pool_checks(verbs: Verbs) -> None:
    """``pool check`` and ``pool sweep``, below ``pool``."""
    check = verbs.add(
        "check",
        "pool_check:check",
        "tell whether a pool is fit for backups, and what to do about what is not",
        ["xbfs pool check prod", "xbfs pool check prod --json"],
        "Looks at the user's role, the licence, networks for NBD, certificates, clocks, SRs, chains of VHDs, disks\n"
        "that control domains hold, and at what runs of XBFS left. Changes nothing. Ends with 3 if there are warnings.",
    )
    check.add_argument("name", metavar="NAME", help="the pool")
    check.add_argument("-a", "--all", action="store_true", help="also show what is fine")
    sweep = verbs.add(
        "sweep",
        "pool_check:sweep",
        "remove what runs of this node that died have left on a pool",
        ["xbfs pool sweep prod --dry-run", "xbfs pool sweep prod"],
        "Every run begins with this. Removes snapshots, disks, blocked operations and tasks that are noted in this\n"
        "node's ledger, and nothing else; runs that are at work and other nodes are left alone. What each newest\n"
        "restore point needs for the next changed-block backup stays: the repository is asked for it. Without one\n"
        "(-r, XBFS_REPOSITORY), or one that can not be opened, whatever a point may need stays.",
    )
    sweep.add_argument("name", metavar="NAME", help="the pool")
    sweep.add_argument("-n", "--dry-run", action="store_true", help="only say what would be removed")
