"""xbfs test --pool in processes of their own, on a simulated pool: its guests do what a test has them do.

One is real: QEMU boots the very VHD that the pool's hosts see, over NFS, and draws the screen that the pool hands out.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.boot_pool_site import boot_pool_site
from tests.support.boot_world import parent, wait_until
from tests.support.cli import COMMAND, TIMEOUT_S
from tests.support.instant_lab import blockdev
from tests.support.micro_guest import BOOTED, micro_disk
from tests.support.nfs_network import needs_ganesha, needs_libnfs
from tests.support.qemu_guest import Guest
from tests.support.xensim import MIB, default_world, signalled_at

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.boot_pool_site import Site

pytestmark = [needs_ganesha, needs_libnfs]

ON_POOL = ("--pool", "lab", "--json")
STALE = {"name": "Debian GNU/Linux 12 as of the backup"}


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    world = default_world()
    image = str(micro_disk())
    blocked = dict.fromkeys(("start", "hard_shutdown", "clean_shutdown", "destroy"), "protected")
    world["vms"] += [
        {"name": "micro", "disks": [{"name": "micro-root", "sr": "nfs", "image": image}]},
        {"name": "guarded", "blocked_operations": blocked, "disks": [{"name": "g", "sr": "nfs", "size": 8 * MIB}]},
    ]
    with boot_pool_site(world) as made:
        # What its agent told while it was backed up comes with every VM that is made of the point.
        made.sim.do("guest_agent", vm=made.sim.vm("web")["uuid"], os_version=STALE)
        made.good(made.world, "backup", "vm", "web", "--pool", "lab")
        made.good(made.world, "backup", "vm", "micro", "guarded", "--pool", "lab")
        made.sim.do("coalesce")
        made.before = made.state()
        yield made


@pytest.fixture(autouse=True)
def nothing_stays(site: Site) -> Iterator[None]:
    yield
    site.sim.clear()
    left = [one["uuid"] for one in site.sim.dump("VM")["VM"] if one["name_label"].endswith("(boot test)")]
    assert site.sessions() == [], left
    assert site.state() == site.before


class Running:
    """A test on its way, and the VM that it has started."""

    def __init__(self, site: Site, process: subprocess.Popen[bytes], name: str) -> None:
        self.site, self.process, self.name = site, process, f"{name} (boot test)"

    @property
    def vm(self) -> str:
        wait_until(lambda: self._state() == "Running" or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.communicate()
        return str(self.site.sim.vm(self.name)["uuid"])

    def _state(self) -> str:
        found = [vm for vm in self.site.sim.dump("VM")["VM"] if vm["name_label"] == self.name]
        return str(found[0]["power_state"]) if found else ""


@contextmanager
def on_trial(site: Site, name: str, *words: str) -> Iterator[Running]:
    environment = site.world.environment(XBFS_CONFIG=str(site.world.directory / "config"))
    command = [*COMMAND, "test", f"{name}@latest", "--pool", "lab", *words]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield Running(site, process, name)
            process.wait(TIMEOUT_S)
        finally:
            process.kill()


def results_of(site: Site, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = site.good(site.world, "show", f"{name}@latest")["tests"]
    return found


def test_a_guest_whose_agent_speaks_has_booted_and_is_taken_away(site: Site, tmp_path: Path) -> None:
    with on_trial(site, "web") as test:
        vm = site.sim.vm(test.name) if test.vm else {}
        (vif,) = (one for one in site.sim.dump("VIF")["VIF"] if one["VM"] == vm["uuid"])
        (network,) = (one for one in site.sim.dump("network")["network"] if one["uuid"] == vif["network"])
        assert network["PIFs"] == []
        assert site.sim.dump("VM_guest_metrics")["VM_guest_metrics"], "the words of the backup are there"
        time.sleep(2.5)
        assert test.process.poll() is None, "they are no proof"
        site.sim.do("guest_agent", vm=test.vm)
    assert test.process.returncode == 0
    result = results_of(site, "web")[-1]
    assert (result["verdict"], result["accelerator"]) == ("booted", "xen")
    assert {"name": "pool", "speaks": "", "reading": "lab"} in result["signals"]
    assert result["reason"] == "the guest agent answers"


@pytest.mark.slow
def test_a_guest_that_switches_itself_off_has_failed(site: Site) -> None:
    with on_trial(site, "web") as test:
        site.sim.do("guest_ends", vm=test.vm)
    assert test.process.returncode == 109
    assert "switched itself off" in results_of(site, "web")[-1]["reason"]


@pytest.mark.slow
def test_nothing_but_an_old_agent_is_a_guest_that_hangs(site: Site) -> None:
    done = site.run("test", "web@latest", *ON_POOL, "--deadline", "4")
    assert done.code == 109, done.err
    assert "hung in its loader" in done.json["tests"][0]["reason"]


@pytest.mark.slow
def test_two_at_once(site: Site) -> None:
    words = ("test", "--vm", "web", "--vm", "micro", "--parallel", "2", *ON_POOL, "--deadline", "3")
    done = site.run(*words)
    assert done.code == 109, done.err
    assert [test["verdict"] for test in done.json["tests"]] == ["failed", "failed"]


def test_a_vm_that_the_pool_does_not_start_says_nothing_of_the_point(site: Site) -> None:
    site.sim.fault("VM.start", "fail", code="HOST_NOT_ENOUGH_FREE_MEMORY", params=("1", "0"))
    done = site.run("test", "web@latest", *ON_POOL)
    assert done.code == 3, done.err
    (result,) = done.json["tests"]
    assert (result["verdict"], "did not start" in result["reason"]) == ("unclear", True)


def test_kill_9_leaves_what_the_next_test_takes_away(site: Site) -> None:
    with on_trial(site, "web") as test:
        assert test.vm
        test.process.send_signal(signal.SIGKILL)
    (left,) = site.sessions()
    assert left.startswith("test-")
    done = site.run("test", "web@latest", "--pool", "lab", "--deadline", "1")
    assert f"session {left} of a test that was killed is thrown away" in done.out.decode()


def test_an_interrupted_test_takes_all_away(site: Site) -> None:
    with on_trial(site, "web") as test:
        assert test.vm
        test.process.send_signal(signal.SIGINT)
    assert test.process.returncode == 130


def test_a_vm_whose_original_is_protected_goes_all_the_same(site: Site) -> None:
    done = site.run("test", "guarded@latest", *ON_POOL, "--deadline", "1")
    assert (done.code, "stays" in done.err) == (109, False), done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    ["SR.introduce", "PBD.plug", "network.create", "VM.start", "VM.destroy", "network.destroy", "PBD.unplug"],
)
def test_ctrl_c_at_any_time_leaves_nothing(site: Site, call: str) -> None:
    environment = site.world.environment(XBFS_CONFIG=str(site.world.directory / "config"))
    words = ("test", "web@latest", "--pool", "lab", "--deadline", "1")
    assert signalled_at(site.sim, call, signal.SIGINT, words, environment) in (130, 109)


@pytest.mark.slow
def test_a_start_that_goes_on_after_ctrl_c_leaves_nothing(site: Site) -> None:
    fault = site.sim.fault("VM.start", "hold")
    with on_trial(site, "web") as test:
        site.sim.wait_fault(fault, timeout_s=60)
        test.process.send_signal(signal.SIGINT)
        time.sleep(3)
        site.sim.clear(fault)
        test.process.wait(TIMEOUT_S)
    assert test.process.returncode == 130


@pytest.mark.slow
def test_a_live_server_that_hangs_does_not_hold_the_deadline(site: Site) -> None:
    with on_trial(site, "web", "--deadline", "3") as test:
        assert test.vm
        others = [pid for pid in site.world.processes() if pid != test.process.pid]
        server = next(pid for pid in others if parent(pid) in others)
        os.kill(server, signal.SIGSTOP)
        try:
            time.sleep(17)  # two looks that give the server up
        finally:
            os.kill(server, signal.SIGCONT)
        test.process.wait(TIMEOUT_S)
    assert test.process.returncode == 3, results_of(site, "web")[-1]
    assert "something runs" in results_of(site, "web")[-1]["reason"], "what was read is not known"


@pytest.mark.slow
def test_the_networks_of_two_tests_of_one_vm_are_both_taken(site: Site) -> None:
    with on_trial(site, "web") as first:
        vm = first.vm
        fault = site.sim.fault("VM.set_name_label", "hold")
        with on_trial(site, "web", "--deadline", "1") as second:
            site.sim.wait_fault(fault, timeout_s=60)
            site.sim.do("guest_agent", vm=vm)
            first.process.wait(TIMEOUT_S)
            site.sim.clear(fault)
            second.process.wait(TIMEOUT_S)


@pytest.mark.slow
def test_a_session_that_somebody_else_took_away_is_no_warning(site: Site) -> None:
    with on_trial(site, "web", "--deadline", "6") as test:
        assert test.vm
        (name,) = site.sessions()
        site.good(site.world, "boot", "discard", name, "--force")
        _, err = test.process.communicate(timeout=TIMEOUT_S)
    assert (test.process.returncode, b"stays" in err) == (3, False), err


@pytest.mark.parametrize("call", ["network.create", "VM.set_name_label", "PBD.plug"])
def test_what_fails_before_leaves_nothing(site: Site, call: str) -> None:
    site.sim.fault(call, "fail_after", code="INTERNAL_ERROR", times=100)
    done = site.run("test", "web@latest", *ON_POOL)
    assert done.code not in (0, 1, 3, 109), (done.code, done.err)


@pytest.mark.slow
def test_one_that_is_kept_runs_on(site: Site) -> None:
    done = site.run("test", "web@latest", "--pool", "lab", "--deadline", "1", "--keep")
    assert done.code == 109, done.err
    assert site.sim.vm("web (boot test)")["power_state"] == "Running"
    (kept,) = site.sessions()
    assert kept.startswith("tested-")
    assert f"`xbfs boot discard {kept}`" in done.err + done.out.decode()
    site.good(site.world, "boot", "discard", kept, "--force")


@pytest.mark.parametrize(
    "words",
    [("--marker", "up"), ("--accel", "tcg"), ("--memory", "512"), ("--bus", "virtio"), ("--server", "backup.example")],
)
def test_what_a_pool_has_not_is_refused_with_a_hint(site: Site, words: tuple[str, ...]) -> None:
    done = site.run("test", "web@latest", "--pool", "lab", *words)
    assert (done.code, "hint:" in done.err) == (2, True), done.err


def test_a_place_on_a_pool_needs_one(site: Site) -> None:
    done = site.run("test", "web@latest", "--host", "alpha")
    assert (done.code, "--pool" in done.err) == (2, True), done.err


def test_a_real_guest_boots_from_the_share_and_its_screen_is_kept(site: Site, tmp_path: Path) -> None:
    screen, picture = site.world.directory / "vnc", tmp_path / "screen.png"
    with on_trial(site, "micro", "--screenshot", str(picture)) as test:
        vm = test.vm
        site.sim.do("screen", vm=vm, path=str(screen))
        (session,) = site.good(site.world, "boot", "list")["sessions"]
        disk, _ = blockdev(session, "nfs")
        with Guest(disk, tmp_path / "guest", screen=screen) as guest:
            guest.wait_for(BOOTED)
            assert test.process.poll() is None
            site.sim.do("guest_agent", vm=vm)
            test.process.wait(TIMEOUT_S)
    assert test.process.returncode == 0, test.process.communicate()
    assert picture.read_bytes().startswith(b"\x89PNG")
    signals = {signal["name"]: signal for signal in results_of(site, "micro")[-1]["signals"]}
    assert signals["reads"]["speaks"] == "for", "what the guest read is counted"
    assert signals["screen"]["speaks"] == "for"
    assert "picture" not in signals


@pytest.mark.slow
def test_a_test_leaves_those_of_other_processes_alone(site: Site) -> None:
    with on_trial(site, "web", "--deadline", "120") as test:
        vm = test.vm
        done = site.run("test", "micro@latest", *ON_POOL, "--deadline", "1")
        assert done.code == 109, done.err
        assert test.process.poll() is None
        site.sim.do("guest_agent", vm=vm)
    assert test.process.returncode == 0


@pytest.mark.slow
def test_the_result_is_there_before_anything_is_taken_away(site: Site) -> None:
    before = len(results_of(site, "micro"))
    environment = site.world.environment(XBFS_CONFIG=str(site.world.directory / "config"))
    words = ("test", "micro@latest", "--pool", "lab", "--deadline", "1")
    signalled_at(site.sim, "PBD.unplug", signal.SIGKILL, words, environment)
    assert len(results_of(site, "micro")) == before + 1
    assert site.run(*words).code == 109, "and takes away what was left"


def test_a_test_runs_where_it_is_wanted(site: Site) -> None:
    with on_trial(site, "web", "--host", "alpha", "--server", "127.0.0.77") as test:
        vm = test.vm
        found = site.sim.vm(test.name)
        sr = next(one for one in site.sim.dump("SR")["SR"] if "(boot test)" in one["name_label"])
        pbds = [one for one in site.sim.dump("PBD")["PBD"] if one["SR"] == sr["uuid"]]
        alpha = next(one for one in site.sim.dump("host")["host"] if one["name_label"] == "alpha")
        assert [pbd["host"] for pbd in pbds] == [alpha["uuid"]]
        assert found["resident_on"] == alpha["uuid"]
        assert pbds[0]["device_config"]["server"] == "127.0.0.77"
        site.sim.do("guest_agent", vm=vm)
    assert test.process.returncode == 0
