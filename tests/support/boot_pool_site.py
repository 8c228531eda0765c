"""A simulated pool, a repository with a point of its VM web, and the real command line between them."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.boot_world import BootWorld
from tests.support.engine import pattern
from tests.support.nfs_network import private_network
from tests.support.restore_lab import RESTLESS, content, state_of
from tests.support.xensim import MIB, XenSim, default_world, running_sim, signalled_at

if TYPE_CHECKING:
    import signal
    from collections.abc import Iterator, Mapping

    from tests.support.cli import Done

LOOSE = RESTLESS | {"VDIs", "PBDs", "VIFs", "virtual_allocation", "physical_size"}


class Site:
    """A pool, a repository with a point of its VM web, and the command line between them."""

    def __init__(self, sim: XenSim, directory: Path) -> None:
        self.sim = sim
        bare = BootWorld(directory)
        (directory / "password").write_text(sim.root_password)
        os.environ["XBFS_CONFIG"] = str(directory / "config")
        self.world = BootWorld(directory, init=self.good(bare, "init"))
        words = ["pool", "add", "lab", sim.master.url, "--password-file", str(directory / "password")]
        self.good(self.world, *words, *(word for host in sim.hosts for word in ("--fingerprint", host.fingerprint)))
        self.contents: dict[int, bytes] = {}
        for number, vdi in enumerate(sim.disks("web")):
            sim.guest_write(vdi, MIB, pattern(number, 2 * MIB))
            self.contents[number] = content(sim, vdi)
        self.good(self.world, "backup", "vm", "web", "--pool", "lab")
        sim.do("coalesce")
        self.before = self.state()

    def good(self, world: BootWorld, *words: str) -> dict[str, Any]:
        done = world.run(*words, "--json", XBFS_CONFIG=str(world.directory / "config"))
        assert done.code == 0, done.err
        return done.json

    def run(self, *words: str) -> Done:
        done = self.world.run(*words, XBFS_CONFIG=str(self.world.directory / "config"))
        assert self.sim.root_password not in done.err + done.out.decode()
        assert "OpaqueRef" not in done.err + done.out.decode()
        return done

    def state(self) -> dict[str, dict[str, Any]]:
        """All that a session could leave behind or change."""
        found = state_of(self.sim) | {
            cls: {
                one["uuid"]: {key: value for key, value in one.items() if key not in LOOSE}
                for one in self.sim.dump(cls)[cls]
            }
            for cls in ("SR", "PBD")
        }
        found["task"] = {}
        return found

    def stopped_at(self, point: str, how: signal.Signals, *words: str) -> int:
        """A command that gets a signal when the pool has done ``point`` and not answered yet; its exit code."""
        environment = self.world.environment(XBFS_CONFIG=str(self.world.directory / "config"))
        return signalled_at(self.sim, point, how, ("boot", *words), environment)

    def sessions(self) -> list[str]:
        return [one["name"] for one in self.good(self.world, "boot", "list")["sessions"]]


@contextmanager
def boot_pool_site(world: Mapping[str, Any] | None = None) -> Iterator[Site]:
    """In a network of our own, as hosts ask the NFS ports that a real one asks."""
    directory = Path(tempfile.mkdtemp(prefix="xp-", dir="/dev/shm"))
    try:
        with private_network(), running_sim(world or default_world(), directory / "sim") as sim:
            site = Site(sim, directory)
            try:
                yield site
            finally:
                site.world.end()
    finally:
        shutil.rmtree(directory)
