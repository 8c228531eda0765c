"""The grammar of the command line: every verb, its arguments and its help. Imports nothing that does work."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final, NoReturn

from xbfs import __version__
from xbfs.cli import values
from xbfs.cli.backup_vm_parsers import add_backup_vm
from xbfs.cli.boot_parsers import add_boot, named
from xbfs.cli.boot_test_parsers import add_boot_test
from xbfs.cli.get_parsers import add_get
from xbfs.cli.index_parsers import add_diff_files, add_file_index
from xbfs.cli.restore_parsers import add_restore
from xbfs.cli.rewind_parsers import add_rewind
from xbfs.cli.unlock_parsers import add_unlock
from xbfs.cli.xen_parsers import add_pool
from xbfs_engine.core.errors import UsageError
from xbfs_engine.core.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

_DESCRIPTION: Final = """\
Backs up disks of XenServer / XCP-ng virtual machines into an encrypted, deduplicating repository and shows every
restore point as full disk images in a directory.

The repository is named by -r or XBFS_REPOSITORY; its passphrase comes from XBFS_PASSPHRASE, from the file that
XBFS_PASSPHRASE_FILE names, or is asked for. A recovery code does instead of the passphrase. The cache, which may be
deleted at any time, is kept in XBFS_CACHE, else in ~/.cache/xbfs; what VMs that run from the repository write, which
may not, in XBFS_STATE, else in /var/lib/xbfs (root) or ~/.local/state/xbfs.

A POINT is the first digits of an id, VM@latest, VM@TIME (the last point at or before that time, ISO 8601), or a path in
a mount of the repository."""

_FIRST_STEPS: Final = (
    "xbfs init -r /srv/xbfs",
    "xbfs backup image /vm/web.raw --vm web",
    "xbfs mount /mnt/xbfs --background",
)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The parsed command line; ``call`` names the function that does it. Raises UsageError; exits for --help."""
    return build_parser().parse_args(named(words))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        "xbfs",
        description=_DESCRIPTION,
        epilog=_examples(_FIRST_STEPS) + "\n\nexit codes: docs/errors.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"xbfs {__version__}")
    _add_common(parser)
    verbs = _Verbs(parser, "VERB")
    _add_keys(verbs)
    _add_backup(verbs)
    _add_points(verbs)
    _add_maintenance(verbs)
    _add_export(verbs)
    _add_mount(verbs)
    add_unlock(verbs)
    add_get(verbs)
    add_file_index(verbs)
    add_restore(verbs)
    add_rewind(verbs)
    add_boot(verbs)
    add_boot_test(verbs)
    add_pool(verbs)
    return parser


class _Parser(argparse.ArgumentParser):
    """Reports mistakes like every other error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see `{self.prog} --help`")


class _Verbs:
    """The verbs below a parser."""

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self._group = parser.add_subparsers(
            title="verbs", metavar=title, required=True, parser_class=_Parser, dest=title.lower()
        )

    def add(self, name: str, call: str, summary: str, examples: Sequence[str], details: str = "") -> _Parser:
        """A verb done by ``call`` ("module:function")."""
        parser = self._group.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + "." + ("\n\n" + details if details else ""),
            epilog=_examples(examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        assert isinstance(parser, _Parser)
        parser.set_defaults(call=call)
        _add_common(parser)
        return parser

    def group(self, name: str, summary: str) -> _Verbs:
        """A verb that has verbs of its own."""
        parser = self._group.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        return _Verbs(parser, f"{name.upper()}-VERB")


def _examples(lines: Sequence[str]) -> str:
    return ("example:" if len(lines) == 1 else "examples:") + "".join(f"\n  {line}" for line in lines)


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Options that may stand before and behind the verb."""
    unset = argparse.SUPPRESS
    parser.add_argument("-r", "--repository", metavar="PATH", default=unset, help="repository (or XBFS_REPOSITORY)")
    parser.add_argument("--json", action="store_true", default=unset, help="print one JSON object, sizes in bytes")


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def _add_keys(verbs: _Verbs) -> None:
    init = verbs.add(
        "init",
        "keys:init",
        "create a repository and print its recovery code",
        ["xbfs init -r /srv/xbfs"],
        "The recovery code opens the repository like the passphrase. It is printed once and kept nowhere: write it\n"
        "down and keep it apart from the repository.",
    )
    init.add_argument("--label", help="what the passphrase's key slot is called (default: USER@HOST)")
    keys = verbs.group("key", "manage the key slots that open the repository")
    keys.add("list", "keys:list_slots", "list the key slots", ["xbfs key list"])
    add = keys.add(
        "add",
        "keys:add",
        "add a key slot: another passphrase or recovery code",
        ["xbfs key add --role node --label 'backup node 2'", "xbfs key add --recovery"],
        "The new passphrase comes from XBFS_NEW_PASSPHRASE, from the file that XBFS_NEW_PASSPHRASE_FILE names, or is\n"
        "asked for twice. An owner's slot opens everything; with a node's slot one can back up and list, but not read\n"
        "any stored data.",
    )
    add.add_argument("--recovery", action="store_true", help="make a recovery code instead of asking for a passphrase")
    add.add_argument("--role", choices=("owner", "node"), default="owner", help="what the slot opens (default: owner)")
    add.add_argument("--label", help="what the slot is called (default: USER@HOST)")
    remove = keys.add(
        "remove",
        "keys:remove",
        "remove a key slot",
        ["xbfs key remove 3f2a90d1c0de4711 --dry-run"],
        "Its secret then no longer opens the repository; whoever copied the slot before still can use the copy.",
    )
    remove.add_argument("slot", metavar="SLOT", help="id of the slot as `xbfs key list` shows it, or its first digits")
    remove.add_argument("-n", "--dry-run", action="store_true", help="only say what would be removed")


def _add_backup(verbs: _Verbs) -> None:
    backup = verbs.group("backup", "make a restore point")
    add_backup_vm(backup)
    image = backup.add(
        "image",
        "backup:image",
        "back up local disk images or block devices as one restore point",
        [
            "xbfs backup image /vm/web.raw --vm web",
            "xbfs backup image /vm/web.raw --vm web --changed web.cbt",
            "xbfs backup image /vm/sys.raw /vm/data.raw --vm db --disk 0 --disk 3 --changed 3=data.cbt",
        ],
        "Every PATH is one disk of the VM. With --changed only what FILE names is read and the rest is taken from the\n"
        "base point; without it every disk is read as far as it is allocated. The images must not be written to\n"
        "meanwhile: back up a snapshot or the disks of a stopped VM.",
    )
    image.add_argument("paths", nargs="+", metavar="PATH", help="raw image or block device")
    image.add_argument("--vm", required=True, metavar="NAME", help="name of the VM")
    image.add_argument("--vm-uuid", metavar="UUID", help="uuid of the VM (default: that of the VM of this name)")
    image.add_argument(
        "--disk",
        type=values.disk_number,
        action="append",
        metavar="N",
        help="number of the disk, once for every PATH (default: 0, 1, …)",
    )
    image.add_argument(
        "--changed",
        action="append",
        default=[],
        metavar="[N=]FILE",
        help="changes of disk N since the base point: a CBT bitmap as VDI.list_changed_blocks returns it (base64),"
        " or JSON [[offset, length], …]",
    )
    start = image.add_mutually_exclusive_group()
    start.add_argument("--base", metavar="POINT", help="the point the changes are relative to (default: the newest)")
    start.add_argument("--new-chain", action="store_true", help="continue no earlier point: the disk was replaced")
    image.add_argument("--index", action="store_true", help="then list the guest's files, as `xbfs index` does")
    _add_quiet(image)


def _add_points(verbs: _Verbs) -> None:
    points = verbs.add("points", "points:points", "list the restore points", ["xbfs points", "xbfs points web --json"])
    points.add_argument("vm", nargs="?", metavar="VM", help="only those of the VM of this name or uuid")
    show = verbs.add("show", "points:show", "tell all that is known of a restore point", ["xbfs show web@latest"])
    show.add_argument("point", metavar="POINT", help="restore point")
    show.add_argument("--screenshot", metavar="FILE", help="write the newest screen of a boot test there, as PNG")
    diff = verbs.add(
        "diff",
        "diff:diff",
        "list the extents of a disk, or the files, that differ between two restore points",
        [
            "xbfs diff web@2026-09-20 web@latest",
            "xbfs diff 3f2a90d1 77c0 --disk 1 --json",
            "xbfs diff web@2026-09-20 web@latest --files",
        ],
        "Takes time in proportion to the difference, not to the disk. Extents are those of B; 'zero' are extents that\n"
        "hold data in A and none in B.",
    )
    diff.add_argument("a", metavar="A", help="the older restore point")
    diff.add_argument("b", metavar="B", help="the newer restore point")
    _add_disk(diff)
    add_diff_files(diff)


def _add_maintenance(verbs: _Verbs) -> None:
    check = verbs.add(
        "check",
        "maintenance:check",
        "check that the repository is complete and consistent, without reading the data",
        ["xbfs check"],
    )
    verify = verbs.add(
        "verify",
        "maintenance:verify",
        "read and authenticate everything stored, and say which restore points any damage hits",
        ["xbfs verify"],
    )
    for parser in (check, verify):
        _add_quiet(parser)


def _add_export(verbs: _Verbs) -> None:
    export = verbs.add(
        "export",
        "export:export",
        "write a disk of a restore point as a plain image file or stream",
        [
            "xbfs export web@latest --disk 0 --format raw -o /vm/web.raw",
            "xbfs export web@latest --format vhd -o - | ssh host 'cat >web.vhd'",
        ],
        "The file appears under its name when it is complete and durable, and every byte of it was authenticated.",
    )
    export.add_argument("point", metavar="POINT", help="restore point")
    _add_disk(export)
    export.add_argument(
        "--format", choices=("raw", "vhd", "vhd-fixed"), default="raw", help="image format (default: raw)"
    )
    export.add_argument(
        "-o", "--output", metavar="FILE", help="file, or - for standard output (default: ID-diskN.FORMAT here)"
    )
    export.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    _add_quiet(export)


def _add_mount(verbs: _Verbs) -> None:
    mount = verbs.add(
        "mount",
        "mount:mount",
        "show every restore point as files below a directory, read-only",
        ["xbfs mount /mnt/xbfs --background", "cp --sparse=always /mnt/xbfs/vms/web/latest/disks/0.raw /vm/web.raw"],
        "Runs until `xbfs umount DIR`, Ctrl-C or SIGTERM. New restore points appear by themselves. Guests' own files\n"
        "are in files/ and root/ of each; a key in XBFS_UNLOCK or XBFS_UNLOCK_FILE is tried on encrypted volumes.",
    )
    mount.add_argument("directory", metavar="DIR", help="an empty directory outside the repository")
    mount.add_argument("--background", action="store_true", help="return when the mount is there, serve it on")
    mount.add_argument("--allow-other", action="store_true", help="let other users in (see fuse.conf)")
    mount.add_argument(
        "--ownership",
        choices=("guest", "operator"),
        help="guests' files keep their owners and modes, or all belong to you (default: guest for root, else operator)",
    )
    mount.add_argument(
        "--links",
        choices=("rebased", "raw"),
        default="rebased",
        help="guests' symlinks stay within the guest, or lead where they say, on this machine (default: rebased)",
    )
    mount.add_argument(
        "--cache-size",
        type=values.bytes_from("1M", "512M", "size"),
        metavar="SIZE",
        default=128 * MIB,
        help="decoded data kept, as 512M (default: 128M)",
    )
    mount.add_argument(
        "--deadline", type=_seconds, metavar="SECONDS", default=30.0, help="a read fails after this time (default: 30)"
    )
    mount.add_argument(
        "--data-plane",
        choices=("device", "inline"),
        default="device",
        help="who answers reads: threads of ours at the FUSE device, or libfuse's loop (default: device)",
    )
    umount = verbs.add("umount", "mount:umount", "unmount what `xbfs mount` mounted", ["xbfs umount /mnt/xbfs"])
    umount.add_argument("directory", metavar="DIR", help="the mount point")


def _add_disk(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--disk", type=values.disk_number, metavar="N", help="number of the disk (default: the only one)"
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 86400")
    return seconds
