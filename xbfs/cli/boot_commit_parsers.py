"""The grammar of ``boot commit``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xbfs.cli.xen_parsers import Verbs


def add_commit(boot: Verbs) -> None:
    """``boot commit``."""
    commit = boot.add(
        "commit",
        "boot_commit:commit",
        "make a restore point of a session's disks as they are now",
        ["xbfs boot commit web-1f3c --dry-run", "xbfs boot commit web-1f3c"],
        "The VM may run on: all disks are taken at one moment, as a power cut would leave them. Only what was written\n"
        "since the session began is read. The point is one of the same VM, and its parent is the session's point; the\n"
        "session goes on over that one. The next backup of the VM from a pool reads it in full.",
    )
    commit.add_argument("name", metavar="NAME", help="the session")
    commit.add_argument("-n", "--dry-run", action="store_true", help="only say what would be read")
    commit.add_argument("-q", "--quiet", action="store_true", help="show no progress")
