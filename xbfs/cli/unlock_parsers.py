"""The grammar of ``unlock``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xbfs.cli.xen_parsers import Verbs


def add_unlock(verbs: Verbs) -> None:
    """``unlock``."""
    unlock = verbs.add(
        "unlock",
        "unlock:unlock",
        "give a running mount the key of a guest's encrypted volume",
        [
            "xbfs unlock /mnt/xbfs/vms/web",
            "XBFS_UNLOCK_FILE=/root/web.key xbfs unlock /mnt/xbfs/vms/web/latest --volume 0p3",
        ],
        "The key is a LUKS passphrase or key file, or a BitLocker password, recovery password or .BEK file. It comes\n"
        "from XBFS_UNLOCK, from the file that XBFS_UNLOCK_FILE names, or is asked for. The mount keeps it in memory\n"
        "until it ends, tries it on the restore points of this VM only, and never writes it anywhere.",
    )
    unlock.add_argument("path", metavar="PATH", help="a VM, a restore point or anything in it, within the mount")
    unlock.add_argument("--volume", metavar="NAME", default="", help="name or uuid of the volume (default: any locked)")
