"""The grammar of ``get``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xbfs.cli.xen_parsers import Verbs


def add_get(verbs: Verbs) -> None:
    """``get``."""
    get = verbs.add(
        "get",
        "get:get",
        "restore files of a guest from a restore point, with all their metadata",
        [
            "xbfs get web@latest:/etc/nginx -o /restore",
            "xbfs get 'web@2026-09-20T21:00:03Z:/var/log/**/*.gz' -o logs",
            "xbfs get 'desk@latest:C:/Users/me/*.docx' -o .",
            "xbfs get db@latest:/data --volume vg0-data --tar - | ssh host 'tar -x --xattrs --acls -C /srv'",
        ],
        "Each file or directory that PATH names appears under its last name in DIR, like with `cp -a`: with modes,\n"
        "times, links, holes, extended attributes, ACLs and, for root, owners and devices. PATH begins at the first\n"
        "colon before a slash or a drive; it is one in the guest's own tree, or in one volume with --volume. In it,\n"
        "* ? and [...] stand for characters of a name and ** for any directories; a name that is written exactly so\n"
        "matches, too. Quote it, so that the shell leaves it alone. What can not be read or written is told, the rest\n"
        "restored. Encrypted volumes need their key in XBFS_UNLOCK or XBFS_UNLOCK_FILE.",
    )
    get.add_argument(
        "sources", nargs="+", metavar="POINT:/PATH", help="restore point, and a path or pattern in its guest"
    )
    target = get.add_mutually_exclusive_group(required=True)
    target.add_argument("-o", "--output", metavar="DIR", help="directory; made if it does not exist")
    target.add_argument("--tar", metavar="FILE", help="tar archive (pax) instead, - for standard output")
    get.add_argument("--volume", metavar="V", help="only this volume, such as 0p2; paths are those within it")
    get.add_argument("--overwrite", action="store_true", help="replace files that exist, and add to directories")
    get.add_argument("--no-owner", action="store_true", help="let files belong to whoever runs this")
    get.add_argument("--no-xattrs", action="store_true", help="restore no extended attributes and no ACLs")
    get.add_argument("-n", "--dry-run", action="store_true", help="only count what would be restored")
    get.add_argument("-q", "--quiet", action="store_true", help="show no progress")
