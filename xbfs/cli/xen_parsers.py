"""The grammar of the verbs about pools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from xbfs.cli.pool_check_parsers import add_pool_checks

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


class Verbs(Protocol):
    """Where verbs are added: see ``xbfs.cli.parsers``."""

    def add(
        self, name: str, call: str, summary: str, examples: Sequence[str], details: str = ""
    ) -> argparse.ArgumentParser:
        """A verb done by ``call`` ("module:function")."""
        ...

    def group(self, name: str, summary: str) -> Verbs:
        """A verb that has verbs of its own."""
        ...


def add_pool(verbs: Verbs) -> None:
    """``pool …``."""
    pool = verbs.group("pool", "say which XenServer / XCP-ng pools there are")
    add = pool.add(
        "add",
        "pool:add",
        "configure a pool: addresses, user, password and certificates",
        [
            "xbfs pool add prod https://xen1.example.org https://xen2.example.org --user backup",
            "xbfs pool add prod xen1 --password-file /run/secrets/prod --fingerprint 3A:9F:…",
        ],
        "Shows the certificate of each host that is named and asks whether it is the right one; with --fingerprint it\n"
        "must be one of those given. The pool then tells the certificates of its other hosts. Nothing is ever sent to\n"
        "a host that shows another certificate. The password is asked for and kept in the credentials file (mode 600)\n"
        "beside the configuration, in XBFS_CONFIG or ~/.config/xbfs; with --password-file or --password-env only the\n"
        "place is kept.",
    )
    add.add_argument("name", metavar="NAME", help="what the pool is called here")
    add.add_argument("urls", nargs="+", metavar="URL", help="a host of the pool, the master or any: https://HOST")
    add.add_argument("--user", default="root", help="who logs in; role vm-power-admin or more (default: root)")
    secret = add.add_mutually_exclusive_group()
    secret.add_argument("--password-file", metavar="FILE", help="read the password from FILE whenever it is needed")
    secret.add_argument("--password-env", metavar="NAME", help="take the password from the environment variable NAME")
    pool.add("list", "pool:list_pools", "list the configured pools", ["xbfs pool list"])
    remove = pool.add(
        "remove", "pool:remove", "forget a pool and its password", ["xbfs pool remove prod"], "Restore points stay."
    )
    remove.add_argument("name", metavar="NAME", help="the pool")
    remove.add_argument("-n", "--dry-run", action="store_true", help="only say what would be forgotten")
    trust = pool.add(
        "trust",
        "pool:trust",
        "pin the certificates that the hosts of a pool show now",
        ["xbfs pool trust prod"],
        "For hosts that are new in the pool, and for certificates that were renewed: each that is not pinned yet is\n"
        "shown and must be confirmed, or be among those given with --fingerprint.",
    )
    trust.add_argument("name", metavar="NAME", help="the pool")
    for parser in (add, trust):
        parser.add_argument(
            "--fingerprint",
            action="append",
            default=[],
            metavar="SHA256",
            help="accept this certificate without asking; may be given several times",
        )
    add_pool_checks(pool)
