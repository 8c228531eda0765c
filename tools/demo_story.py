"""The story that tools/demo tells: one pool, two VMs, every step a command as a user would type it.

The pool is simulated (tools/xensim): its hosts speak XAPI, HTTPS and NBD over TLS as the real ones do. The guests'
disks are real Debian filesystems; what a guest writes goes through the simulator's control socket.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / ".cache" / "images"
TIME_SCALE = 0.05
"""Delays of the pool last a twentieth of the real ones."""
GIB = 1 << 30
MICRO_ROOT_START = 41 << 20
"""Where the root of the guest that boots begins."""
BOOT_S = 180
"""How long a guest may take to boot without KVM on a busy machine, and to shut down."""
PARTITION_START = 1 << 20
"""Where the only partition of the guests' disks begins."""


def say(text: str) -> None:
    """A heading."""
    print(f"\n\033[1m{text}\033[0m", flush=True)


def remark(text: str) -> None:
    """A line that no command printed."""
    print(f"    {text}", flush=True)


def show(*command: object, expected: int = 0) -> str:
    """Run a command as a user would, and show it with what it prints. Ends the demo if it ends otherwise."""
    words = [str(word) for word in command]
    print("  $ " + " ".join(words), flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    for line in done.stdout.splitlines():
        print("    " + line)
    sys.stdout.flush()
    if done.returncode != expected:
        raise SystemExit(f"demo: {words[0]} ended with {done.returncode}, not {expected}")
    return done.stdout


class Pool:
    """The simulated pool: its hosts, and what happens to it from the side of guests and administrators."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("demo: the simulated pool did not start")
        ready = json.loads(line)
        self.hosts: list[dict[str, Any]] = ready["hosts"]
        self.password: str = ready["root_password"]
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(ready["control"])
        self._lines = self._socket.makefile("rw")

    def do(self, op: str, **request: object) -> Any:  # noqa: ANN401 - JSON
        """One control operation (tools/xensim/README.md)."""
        self._lines.write(json.dumps({"op": op, **request}) + "\n")
        self._lines.flush()
        answer = json.loads(self._lines.readline())
        if not answer["ok"]:
            raise SystemExit(f"demo: the simulated pool refused {op}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()

    def disk(self, vm: str) -> str:
        """The uuid of a VM's first disk."""
        dump = self.do("dump", classes=["VM", "VBD"])
        (uuid,) = (
            one["uuid"]
            for one in dump["VM"]
            if one["name_label"] == vm and not one["is_a_snapshot"] and not one["is_a_template"]
        )
        return str(next(one["VDI"] for one in dump["VBD"] if one["VM"] == uuid and one["userdevice"] == "0"))

    def left_over(self) -> str:
        """Snapshots of VMs, and VDIs of snapshots that still hold data."""
        dump = self.do("dump", classes=["VM", "VDI"])
        snapshots = sum(one["is_a_snapshot"] for one in dump["VM"])
        full = sum(one["is_a_snapshot"] and one["type"] != "cbt_metadata" for one in dump["VDI"])
        return f"{snapshots} snapshots of VMs and {full} snapshot disks with data"


def guests() -> list[tuple[str, Path]]:
    """The VMs and their disks. Only shop boots: it is a kernel and a small root, the others are filesystems."""
    named = [("web", IMAGES / "small" / "gen1.raw"), ("db", IMAGES / "tiny" / "gen1.raw")]
    if shop := os.environ.get("XBFS_DEMO_GUEST"):
        named.append(("shop", Path(shop)))
    return named


@contextmanager
def running_pool(folder: Path) -> Iterator[Pool]:
    """Two hosts, an NFS SR, and running VMs with real guest disks."""
    world = {
        "hosts": [{"name": "alpha"}, {"name": "beta"}],
        "networks": [{"name": "lan", "bridge": "xenbr0", "purpose": ["nbd"]}],
        "srs": [{"name": "nfs", "type": "nfs", "size": 64 * GIB, "default": True}],
        "vms": [
            {
                "name": name,
                "power_state": "Running",
                "disks": [{"name": f"{name}-root", "sr": "nfs", "image": str(image)}],
                "vifs": [{"network": "lan"}],
            }
            for name, image in guests()
        ],
        "templates": [{"name": "Debian Bookworm 12", "default": True}],
    }
    document = folder / "world.json"
    document.write_text(json.dumps(world))
    command = [sys.executable, "-m", "tools.xensim", "--with-parent", "--world", str(document)]
    command += ["--state", str(folder), "--time-scale", str(TIME_SCALE)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None, text=True
    ) as process:
        assert process.stdin is not None
        pool = None
        try:
            pool = Pool(process)
            yield pool
        finally:
            if pool is not None:
                pool.close()
            process.stdin.close()
            process.wait(20)


def same(pool: Pool, vm: str, expected: Path, scratch: Path) -> None:
    """Prove that a VM's disk on the pool is, byte for byte, a file."""
    pool.do("read_file", vdi=pool.disk(vm), path=str(scratch))
    show("qemu-img", "compare", "-f", "raw", "-F", "raw", scratch, expected)
    scratch.unlink()


def back_up(pool: Pool) -> None:
    """Configure the pool, a full backup, a changed-block backup, a fall-back."""
    say(f"1. A pool of two hosts with {len(guests())} running VMs is configured, and checked for what backups need")
    host = pool.hosts[0]
    Path("password").write_text(pool.password)
    Path("password").chmod(0o600)
    show(*("xbfs", "pool", "add", "lab", f"https://{host['address']}:{host['port']}", "--password-file", "password"),
         *("--fingerprint", host["fingerprint"]))  # fmt: skip
    show("xbfs", "pool", "check", "lab")

    say("2. An encrypted repository, and the first backup: all that is allocated is read")
    show("xbfs", "init")
    show("xbfs", "backup", "vm", *(name for name, _ in guests()), "--pool", "lab")
    remark(f"on the pool are now {pool.left_over()}")

    say("3. The guest of web works on: files are written, appended to and deleted")
    images = IMAGES / "small"
    extents = json.loads((images / "gen2.extents.json").read_text())
    pool.do("guest_write_file", vdi=pool.disk("web"), path=str(images / "gen2.raw"), extents=extents)
    remark(f"{sum(length for _, length in extents) / (1 << 20):.1f} MiB in {len(extents)} places were written")

    say("4. The next backup asks XenServer for changed blocks (CBT), and reads nothing else")
    show("xbfs", "backup", "vm", "web", "db", "--pool", "lab")

    say("5. Somebody switches CBT off and on for db: its changes are unknown, so it is read in full, and says why")
    disk = f"uuid:VDI:{pool.disk('db')}"
    pool.do("call", method="VDI.disable_cbt", args=[disk])
    pool.do("call", method="VDI.enable_cbt", args=[disk])
    show("xbfs", "backup", "vm", "db", "--pool", "lab")


def look() -> Path:
    """Mount, and bring a disk back with cp. Returns the directory of web's first point."""
    say("6. Every restore point is a full disk, in every format")
    show("xbfs", "points")
    show("xbfs", "mount", "mnt", "--background")
    web = Path("mnt/vms/web")
    older = min(path for path in web.iterdir() if not path.is_symlink())
    images = IMAGES / "small"
    show("ls", "-ls", older / "disks")
    show("cp", "--sparse=always", older / "disks" / "0.raw", "restored.raw")
    show("cmp", "restored.raw", images / "gen1.raw")
    remark("the older point, copied with cp, is the disk as it was before the change")
    show("qemu-img", "compare", "-f", "vpc", "-F", "raw", older / "disks" / "0.vhd", images / "gen1.raw")
    show("qemu-img", "compare", "-f", "raw", "-F", "raw", web / "latest" / "disks" / "0.raw", images / "gen2.raw")
    return older


def find_a_file(older: Path) -> None:
    """Find a file that the guest has deleted since, and copy it back."""
    say("7. A file is gone from web. It is found by name in all points, and copied back from the older one")
    show("xbfs", "index", "web", "--all", "-q")
    latest = older.parent / "latest"
    show("sh", "-c", f"xbfs diff {older} {latest} --files | grep '^- f' | head -4")
    gone = json.loads(
        subprocess.run(
            ["xbfs", "diff", older, latest, "--files", "--json"], capture_output=True, text=True, check=True
        ).stdout
    )
    path = next(
        PurePosixPath(one["path"])
        for one in gone["files"]
        if one["change"] == "removed" and one["old"]["type"] == "f" and one["old"]["size_bytes"] > 0
    )
    show("xbfs", "find", path.name, "web")
    show("cat", older / "files" / "0p1.json")
    show("cp", "-a", older / "files" / "0p1" / path.relative_to("/"), ".")
    show("ls", "-l", path.name)
    first = IMAGES / "small" / "gen1.raw"
    show("debugfs", "-R", f"dump {path} as-it-was", f"{first}?offset={PARTITION_START}")
    show("cmp", path.name, "as-it-was")
    remark("the copy is the file as another reader of ext4 takes it from the disk before the change")
    show("xbfs", "get", f"{older}:{path}", "-o", "got", "-q")
    show("cmp", f"got/{path.name}", "as-it-was")


def bring_back(pool: Pool, older: Path, work: Path) -> None:
    """Restore as a new VM; rewind the old one in place."""
    images = IMAGES / "small"
    say("8. The older point becomes a new VM on the pool, beside the one that runs")
    show("xbfs", "restore", older, "--pool", "lab", "--sr", "nfs", "--as", "web-before", "--start")
    same(pool, "web-before", images / "gen1.raw", work / "disk")

    say("9. web itself goes back in place: only what differs is written, after a safety point")
    show("xbfs", "rewind", "web", "--to", older, "--pool", "lab", "--dry-run")
    show("xbfs", "rewind", "web", "--to", older, "--pool", "lab", "--stop", "--start")
    same(pool, "web", images / "gen1.raw", work / "disk")


def survive(pool: Pool) -> None:
    """Kill a backup in the middle, and sweep."""
    say("10. A backup is killed (kill -9) while its snapshot exists; a sweep takes away what it left, and nothing else")
    fault = pool.do("fault", point="VDI.list_changed_blocks", effect="hold")
    print("  $ xbfs backup vm web --pool lab &", flush=True)
    with subprocess.Popen(
        ["xbfs", "backup", "vm", "web", "--pool", "lab"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as victim:
        pool.do("wait_fault", number=fault, hits=1, timeout_s=60)
        print("  $ kill -9 %1", flush=True)
        victim.send_signal(signal.SIGKILL)
    pool.do("clear", number=fault)
    remark(f"on the pool are now {pool.left_over()}")
    show("xbfs", "pool", "sweep", "lab")
    remark(f"on the pool are now {pool.left_over()}")
    show("xbfs", "backup", "vm", "web", "--pool", "lab")


def run_again(pool: Pool, work: Path) -> None:
    """Delete a VM, and boot it from the repository."""
    say("11. The VM shop is deleted, disk and all. It runs again from its restore point, before anything is restored")
    qemu = shutil.which("qemu-system-x86_64")
    if "shop" not in dict(guests()) or qemu is None:
        remark(
            f"skipped: {'qemu-system-x86 is not installed' if qemu is None else 'no guest that boots could be made'}"
        )
        return
    (vm,) = (one for one in pool.do("dump", classes=["VM"])["VM"] if one["name_label"] == "shop")
    disk = pool.disk("shop")
    for method, argument in (("VM.hard_shutdown", f"VM:{vm['uuid']}"), ("VM.destroy", f"VM:{vm['uuid']}"),
                             ("VDI.destroy", f"VDI:{disk}")):  # fmt: skip
        pool.do("call", method=method, args=[f"uuid:{argument}"])
    remark("VM.hard_shutdown, VM.destroy, VDI.destroy: the pool knows it no more")
    started = time.monotonic()
    show("xbfs", "boot", "shop@latest", "--name", "shop")
    remark(f"its disk is there, and writable, after {time.monotonic() - started:.1f} s")
    console = work / "console"
    listed = subprocess.run(["xbfs", "boot", "list", "--json"], capture_output=True, text=True, check=True)
    place = json.loads(listed.stdout)["sessions"][0]["places"][0]
    drive = f"file={place['file']},format=raw,if=virtio"
    machine = ["-accel", "tcg", "-cpu", "max", "-M", "q35", "-m", "384", "-nodefaults", "-display", "none"]
    words = ["-smbios", "type=1,family=write=order-4711 off", "-serial", f"file:{console}", "-drive", drive]
    print(f"  $ qemu-system-x86_64 -drive {drive} ... &", flush=True)
    with subprocess.Popen([qemu, *machine, "-net", "none", *words]) as guest:
        try:
            guest.wait(BOOT_S)
        finally:
            guest.kill()
    for line in console.read_text(errors="replace").splitlines():
        if line.startswith("XBFS-"):
            print("    " + line)
    remark(f"{time.monotonic() - started:.1f} s after the command it had booted, without KVM, written and shut down")
    show("xbfs", "boot", "list")
    show("debugfs", "-R", "cat /written/order-4711", f"{place['file']}?offset={MICRO_ROOT_START}")
    remark("what the guest wrote, read from its live disk by another reader of ext4; the restore point is as it was")
    show("xbfs", "boot", "discard", "shop")


def stop_live_server(state: Path) -> None:
    """End who serves sessions in the background, as a service manager would."""
    for lock in state.glob("*/server.lock"):
        pid = int(lock.read_text())
        os.kill(pid, signal.SIGTERM)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.05)


def main() -> None:
    """Tell the story in a scratch directory."""
    work = Path(tempfile.mkdtemp(prefix="xbfs-demo."))
    places = {"XBFS_REPOSITORY": "repository", "XBFS_CACHE": "cache", "XBFS_CONFIG": "config", "XBFS_STATE": "state"}
    os.environ.update({name: str(work / folder) for name, folder in places.items()})
    os.environ["XBFS_PASSPHRASE"] = "correct horse battery staple"
    os.chdir(work)
    for name in ("mnt", "pool"):
        (work / name).mkdir()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        stack.callback(os.chdir, ROOT)
        pool = stack.enter_context(running_pool(work / "pool"))
        stack.callback(lambda: subprocess.run(["xbfs", "umount", work / "mnt"], capture_output=True, check=False))
        stack.callback(stop_live_server, work / "state")
        back_up(pool)
        older = look()
        find_a_file(older)
        bring_back(pool, older, work)
        survive(pool)
        run_again(pool, work)
        say("12. Everything stored is read and authenticated")
        show("xbfs", "verify")
        show("xbfs", "points")
        stored = subprocess.run(["du", "-sh", "repository"], capture_output=True, text=True, check=True).stdout.split()[
            0
        ]
        say(f"Done: {stored} hold every point of all VMs as full disks.")


if __name__ == "__main__":
    main()
