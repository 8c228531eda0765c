"""The grammar of ``restore``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbfs.cli import values

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.xen_parsers import Verbs


def add_restore(verbs: Verbs) -> None:
    """``restore``."""
    restore = verbs.add(
        "restore",
        "restore:restore",
        "make a VM, or disks of it, on a XenServer / XCP-ng pool from a restore point",
        [
            "xbfs restore web@latest --pool prod --sr nfs1 --as web-copy",
            "xbfs restore web@2026-09-20 --pool dr --sr local --network lan=dr-lan --start",
            "xbfs restore db@latest --pool prod --sr nfs1 --disk 1 --attach helper",
        ],
        "Makes a new, halted VM with all that the point knows of the old one; nothing on the pool is replaced. With\n"
        "--disk it makes only these disks, as VDIs without a VM or attached to one; with --disk and --as, a VM\n"
        "that has only these. Needs nothing of the pool that the point came from. What fails leaves nothing on the\n"
        "pool. Networks are those of the same uuid or name, or given with --network; none is ever created.",
    )
    restore.add_argument("point", metavar="POINT", help="restore point")
    restore.add_argument("--pool", required=True, metavar="POOL", help="the pool, as `xbfs pool list` shows it")
    restore.add_argument("--sr", required=True, metavar="SR", help="where the disks go: name or uuid of an SR")
    restore.add_argument("--as", dest="name", metavar="NAME", help="name of the VM (default: the name it had)")
    restore.add_argument(
        "--disk",
        dest="disks",
        type=values.disk_number,
        action="append",
        default=[],
        metavar="N",
        help="only disk N; may be given several times",
    )
    restore.add_argument("--attach", metavar="VM", help="with --disk: the VM, by name or uuid, that gets the disks")
    add_networks(restore)
    restore.add_argument(
        "--keep-identity",
        action="store_true",
        help="keep the VM's uuid and MACs; refused where the pool still has that VM",
    )
    restore.add_argument("--start", action="store_true", help="start the VM in the end")
    restore.add_argument("-n", "--dry-run", action="store_true", help="only say what would be made")
    restore.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def add_networks(options: argparse.ArgumentParser | argparse._MutuallyExclusiveGroup) -> None:
    """``--network``, of verbs that make a VM on a pool."""
    options.add_argument(
        "--network",
        dest="networks",
        type=values.network_pair,
        action="append",
        default=[],
        metavar="A=B",
        help="put what was in network A into network B of the pool, each by name or uuid",
    )
