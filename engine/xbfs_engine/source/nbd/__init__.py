"""Reading disks of hosts over NBD: a client as plain as the hosts' server, and a source that fetches ahead."""

from xbfs_engine.source.nbd.budget import HostBudget
from xbfs_engine.source.nbd.connection import NbdConnection
from xbfs_engine.source.nbd.disk import NbdDisk, open_nbd_disk
from xbfs_engine.source.nbd.target import NbdTarget, Timeouts, TlsPolicy

__all__ = ["HostBudget", "NbdConnection", "NbdDisk", "NbdTarget", "Timeouts", "TlsPolicy", "open_nbd_disk"]
