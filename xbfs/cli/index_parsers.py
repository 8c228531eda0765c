"""The grammar of ``index``, ``find`` and ``history``, and of ``diff --files``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from xbfs.cli.xen_parsers import Verbs

_KINDS: Final = "fdlbcps"


def add_file_index(verbs: Verbs) -> None:
    """``index``, ``find`` and ``history``."""
    _add_index(verbs)
    _add_find(verbs)
    _add_history(verbs)


def add_diff_files(diff: argparse.ArgumentParser) -> None:
    """What ``diff`` takes to compare files."""
    diff.add_argument("--files", action="store_true", help="list files that were added, removed or changed instead")
    _add_volume(diff)
    _add_build(diff)


def _add_index(verbs: Verbs) -> None:
    index = verbs.add(
        "index",
        "index:index",
        "list the files of restore points, so that find, history and diff --files need not read them",
        ["xbfs index", "xbfs index web --all", "xbfs index web@2026-09-20 --force"],
        "Without POINT the newest point of every VM is indexed, with the name of a VM its newest one. What has an\n"
        "index is passed over. Volumes of which nothing has changed that was read to list them are taken over from\n"
        "the index of a neighbouring point; the others are listed again, and only what differs is stored. An index\n"
        "can be removed and built again at any time. Encrypted volumes need their key in XBFS_UNLOCK or\n"
        "XBFS_UNLOCK_FILE; the names in them are then stored, encrypted like all that is in the repository. Needs an\n"
        "owner's key slot.",
    )
    index.add_argument("point", nargs="?", metavar="POINT|VM", help="restore point, or VM by name or uuid")
    index.add_argument("--all", action="store_true", help="every restore point, of the VM or of all")
    index.add_argument(
        "--force", action="store_true", help="build it anew although there is one: it is damaged, or a key is known now"
    )
    index.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def _add_find(verbs: Verbs) -> None:
    find = verbs.add(
        "find",
        "find:find",
        "find files by name in all restore points",
        [
            "xbfs find 'invoice*.pdf' web",
            "xbfs find '/etc/**/*.conf' --between 2026-09-01 2026-09-30",
            "xbfs find -i 'report?.docx' --type f --json",
        ],
        "PATTERN is a glob: on the name, or, if it has a slash, on the path: from the root if it begins with a slash,\n"
        "else anywhere. * and ? stop at slashes, ** does not. One line tells each version (kind, size, time of\n"
        "modification, path) with the restore points that hold it.",
    )
    find.add_argument("pattern", metavar="PATTERN", help="glob, quoted so that the shell leaves it alone")
    find.add_argument("vms", nargs="*", metavar="VM", help="only these VMs, by name or uuid (default: all)")
    find.add_argument(
        "--between", nargs=2, metavar=("A", "B"), help="only points from A to B, each a time or a restore point"
    )
    _add_volume(find)
    find.add_argument(
        "--type", type=_kinds, default=None, metavar="KINDS", help="only these kinds: f, d, l, b, c, p, s, or several"
    )
    find.add_argument("-i", "--ignore-case", action="store_true", help="take capitals and small letters for the same")
    find.add_argument("--limit", type=_count, metavar="N", help="end after N versions")
    _add_build(find)
    find.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def _add_history(verbs: Verbs) -> None:
    history = verbs.add(
        "history",
        "history:history",
        "tell the versions of one file over all restore points",
        ["xbfs history web:/etc/nginx/nginx.conf", "xbfs history db:/data/base --volume vg0-data"],
    )
    history.add_argument("file", metavar="VM:/PATH", help="VM by name or uuid, and a path in the guest's own tree")
    _add_volume(history)
    _add_build(history)
    history.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def _add_volume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--volume", metavar="V", help="only this volume, such as 0p2; paths are those within it")


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--build", action="store_true", help="first build indexes where there are none")


def _kinds(text: str) -> str:
    if not text or not set(text) <= set(_KINDS):
        raise argparse.ArgumentTypeError(f"{text!r} is not one or several of {', '.join(_KINDS)}")
    return text


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)
