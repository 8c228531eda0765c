"""The grammar of ``boot``: what follows it is a restore point, or one of its verbs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from xbfs_engine.core.limits import DISKS_PER_POINT_MAX, GIB, KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs.cli.xen_parsers import Verbs

START: Final = "start"
"""The verb that is meant when a restore point follows ``boot``."""
_VERBS: Final = frozenset({START, "list", "commit", "migrate", "discard", "serve", "-h", "--help"})
_SUFFIXES: Final = {"K": KIB, "M": MIB, "G": GIB}


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
        "The restore point is as it was. Refused while somebody has a disk of it open, but for --force.",
    )
    discard.add_argument("name", metavar="NAME", help="the session")
    discard.add_argument("-n", "--dry-run", action="store_true", help="only say what would be lost")
    discard.add_argument("--force", action="store_true", help="even while its disks are in use")
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
        "boot:boot",
        "begin a session: the disks of a restore point, writable",
        [
            "xbfs boot web@latest",
            "xbfs boot web@latest --export nbd --name web-test",
            "xbfs boot db@2026-09-20 --disk 0 --disk 1 --hydrate 50M",
        ],
        "`xbfs boot POINT` is short for it. What is written goes to local files and survives crashes of anything; the\n"
        "restore point never changes. The session is served until `xbfs boot discard`, also after a restart of the\n"
        "machine if `xbfs boot serve` is a service there. Sessions are kept in XBFS_STATE, else in /var/lib/xbfs for\n"
        "root and in ~/.local/state/xbfs for others.",
    )
    start.add_argument("point", metavar="POINT", help="restore point")
    start.add_argument(
        "--disk", type=_disk_number, action="append", metavar="N", help="only this disk; can be repeated (default: all)"
    )
    start.add_argument(
        "--export",
        choices=("file", "nbd", "nfs"),
        default="file",
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
        type=_rate,
        const=0,
        metavar="RATE",
        help="copy the point to local files in the background, at most RATE bytes a second as 50M (default: no limit),"
        " so that the VM does not depend on the repository",
    )


def _disk_number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= DISKS_PER_POINT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a disk number from 0 to {DISKS_PER_POINT_MAX - 1}")
    return int(text)


def _rate(text: str) -> int:
    digits, unit = (text[:-1], _SUFFIXES[text[-1]]) if text[-1:] in _SUFFIXES else (text, 1)
    if not digits.isascii() or not digits.isdigit() or not KIB <= int(digits) * unit <= 1024 * GIB:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate from 1K to 1024G, such as 50M")
    return int(digits) * unit
