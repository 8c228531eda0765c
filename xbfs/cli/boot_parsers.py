"""The grammar of ``boot``: what follows it is a restore point, or one of its verbs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xbfs.cli import values
from xbfs.cli.boot_commit_parsers import add_commit
from xbfs.cli.restore_parsers import add_networks

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from xbfs.cli.xen_parsers import Verbs

START: Final = "start"
"""The verb that is meant when a restore point follows ``boot``."""
_VERBS: Final = frozenset({START, "list", "commit", "migrate", "discard", "serve", "-h", "--help"})


def add_boot(verbs: Verbs) -> None:
    """``boot`` and its verbs."""
    boot = verbs.group("boot", "run a VM from the repository: writable, at once, without restoring it")
    _add_start(boot)
    boot.add(
        "list",
        "boot_list:list_sessions",
        "list the sessions of this repository on this machine",
        ["xbfs boot list", "xbfs boot list --json"],
    )
    discard = boot.add(
        "discard",
        "boot_discard:discard",
        "throw a session away, with all that was written to its disks",
        ["xbfs boot discard web-1f3c --dry-run", "xbfs boot discard web-1f3c"],
        "The restore point is as it was. Refused while somebody has a disk of it open, but for --force. What a\n"
        "session has on a pool goes first: its VM, and its SR, which is forgotten.",
    )
    discard.add_argument("name", metavar="NAME", help="the session")
    discard.add_argument("-n", "--dry-run", action="store_true", help="only say what would be lost")
    discard.add_argument(
        "--force", action="store_true", help="even while its disks are in use; on a pool: power the VM off"
    )
    add_commit(boot)
    _add_migrate(boot)
    boot.add(
        "serve",
        "boot_serve:serve",
        "serve all sessions in the foreground",
        ["xbfs boot serve"],
        "Runs until Ctrl-C or SIGTERM; for systemd (Type=notify), and for seeing what is wrong. `xbfs boot POINT`\n"
        "starts it in the background if nobody serves.",
    )


def named(words: Sequence[str]) -> list[str]:
    """A command line in which ``boot POINT`` is ``boot start POINT``."""
    place = _next(words, 0)
    if place == len(words) or words[place] != "boot":
        return list(words)
    first = _next(words, place + 1)
    if first < len(words) and words[first] in _VERBS:
        return list(words)
    return [*words[: place + 1], START, *words[place + 1 :]]


def _next(words: Sequence[str], place: int) -> int:
    """Where the next word is that does not belong to the options which may stand anywhere."""
    while place < len(words):
        word = words[place]
        if word in {"-r", "--repository"}:
            place += 2
        elif word == "--json" or word.startswith("--repository=") or (word.startswith("-r") and word != "-r"):
            place += 1
        else:
            return place
    return len(words)


def _add_start(boot: Verbs) -> None:
    start = boot.add(
        START,
        "boot_pool:begin",
        "begin a session: the disks of a restore point, writable",
        [
            "xbfs boot web@latest",
            "xbfs boot web@latest --export nbd --name web-test",
            "xbfs boot db@2026-09-20 --disk 0 --disk 1 --hydrate 50M",
            "xbfs boot web@latest --pool prod --isolated",
        ],
        "`xbfs boot POINT` is short for it. What is written goes to local files and survives crashes of anything; the\n"
        "restore point never changes. The session is served until `xbfs boot discard`, also after a restart of the\n"
        "machine if `xbfs boot serve` is a service there. Sessions are kept in XBFS_STATE, else in /var/lib/xbfs for\n"
        "root and in ~/.local/state/xbfs for others.",
    )
    start.add_argument("point", metavar="POINT", help="restore point")
    start.add_argument(
        "--disk",
        type=values.disk_number,
        action="append",
        metavar="N",
        help="only this disk; can be repeated (default: all)",
    )
    start.add_argument(
        "--export",
        choices=("file", "nbd", "nfs"),
        help="files of this machine; NBD, with TLS on the network; or an NFS share (default: file)",
    )
    start.add_argument(
        "--format", choices=("raw", "vhd"), help="what the disks are presented as (default: vhd for nfs, else raw)"
    )
    start.add_argument("--name", help="of the session (default: that of the VM and four digits)")
    start.add_argument(
        "--client",
        action="append",
        default=[],
        metavar="CIDR",
        help="address or network: who may mount by nfs, or that nbd listens for it; can be repeated"
        " (default: this machine alone)",
    )
    start.add_argument(
        "--hydrate",
        nargs="?",
        type=values.bytes_from("1K", "50M", "rate"),
        const=0,
        metavar="RATE",
        help="copy the point to local files in the background, at most RATE bytes a second as 50M (default: no limit),"
        " so that the VM does not depend on the repository",
    )
    start.add_argument(
        "--passthrough",
        action="store_true",
        help="with --hydrate: disks that are opened when they are copied are read and written by the kernel alone, as"
        " fast as files are; no commit while they are open (root, Linux 6.9 or newer; elsewhere as without)",
    )
    _add_pool(start)


def _add_pool(start: argparse.ArgumentParser) -> None:
    pool = start.add_argument_group("on a pool", "the VM runs on a XenServer / XCP-ng pool: docs/instant-pool.md")
    pool.add_argument("--pool", metavar="POOL", help="run it there, as `xbfs pool list` shows it")
    pool.add_argument("--as", dest="vm_name", metavar="NAME", help="name of the VM there (default: the name it had)")
    pool.add_argument("--sr-name", metavar="NAME", help="name of the SR that is made (default: xbfs and the VM's name)")
    networks = pool.add_mutually_exclusive_group()
    add_networks(networks)
    networks.add_argument("--isolated", action="store_true", help="its interfaces go into a network that leads nowhere")
    pool.add_argument("--no-start", action="store_true", help="leave the VM halted")
    add_place(pool)


def add_place(pool: argparse._ArgumentGroup) -> None:
    """Which hosts get at this machine, and how."""
    pool.add_argument("--host", metavar="HOST", help="only this host, by name or uuid, gets the SR (default: all)")
    pool.add_argument(
        "--server", metavar="ADDRESS", help="how hosts reach this machine (default: as it reaches the pool's master)"
    )


def _add_migrate(boot: Verbs) -> None:
    migrate = boot.add(
        "migrate",
        "boot_migrate:migrate",
        "bring the VM of a session on a pool to an SR of the pool, and end the session",
        ["xbfs boot migrate web-1f3c --to san1"],
        "A VM that runs goes on running; the disks of a halted one are copied. Then the session's SR is forgotten,\n"
        "and the VM needs this machine no more. What was interrupted is gone on with by the same command.",
    )
    migrate.add_argument("name", metavar="NAME", help="the session")
    migrate.add_argument("--to", required=True, metavar="SR", help="where the disks go: name or uuid of an SR")
    migrate.add_argument("-q", "--quiet", action="store_true", help="show no progress")
