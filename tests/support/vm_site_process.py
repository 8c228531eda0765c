"""One run of a node in a process of its own, to be killed at any moment (``python -m`` this module)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tests.support.engine import Engine
from tests.support.runtime import FixedClock
from tests.support.vm_site import VmSite
from tests.support.xensim import ROOT, SimHost
from xbfs_engine.storage.local import LocalStorage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.xensim import XenSim


def local_site(sim: Any, directory: Path, node: str, clock: FixedClock | None = None) -> VmSite:
    """A site whose repository other processes can open too."""
    storage = LocalStorage(directory / "repository")
    if clock is None:
        directory.mkdir(exist_ok=True)
        engine = Engine.fresh(directory / "cache", storage)
    else:
        engine = Engine(storage, directory / "cache", clock=clock)
    return VmSite(sim, directory, engine, node=node)


def killed_run(site: VmSite, sim: XenSim, directory: Path, names: Sequence[str], *, point: str, nth: int) -> bool:
    """A run that is killed when the pool is at the ``nth`` pass by ``point`` (a glob); whether it came so far."""
    site.engine.clock.advance(60)
    task = {
        "hosts": [vars(host) for host in sim.hosts],
        "directory": str(directory),
        "node": site.node,
        "now_ns": site.engine.clock.now_ns(),
        "names": list(names),
    }
    fault = sim.fault(point, "hold", nth=nth)
    command = [sys.executable, "-m", "tests.support.vm_site_process"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'engine'}:{ROOT}"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin
        process.stdin.write(json.dumps(task))
        process.stdin.close()
        came = False
        while not came and process.poll() is None:
            came = sim.do("wait_fault", number=fault, hits=1, timeout_s=0.1)
        process.kill()
    sim.clear(fault)
    return came


def main() -> None:
    """The run."""
    task = json.load(sys.stdin)
    hosts = [SimHost(**host) for host in task["hosts"]]
    sim = SimpleNamespace(hosts=hosts, master=hosts[0])
    site = local_site(sim, Path(task["directory"]), task["node"], FixedClock(task["now_ns"]))
    site.run(*task["names"])


if __name__ == "__main__":
    main()
