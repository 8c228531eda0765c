"""A whole Debian 12 guest with a database server and compilers, its next day, and a clone of it.

Needs root and the network (mmdebstrap). Days are lived in a chroot on a loop mount; where loop mounts are refused the
log and database of ``guest`` are changed without mounting. Times and identifiers inside come from the real run, so
two runs do not give the same bytes.
"""

from __future__ import annotations

import os
import random
import shutil
import uuid
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from images import disk, ext4, guest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_DISK_BYTES = 8 << 30
_PACKAGES = (
    "linux-image-amd64,systemd-sysv,openssh-server,postgresql,postgresql-contrib,g++,golang-go,openjdk-17-jre-headless,"
    "nginx,nodejs,python3-scipy,python3-pandas,git,vim,perl-doc,locales,sqlite3,procps"
)
# Downloaded with the guest and installed by the second day and in the clone, which need no network then.
_LATER = {"gen2": ("php-cli", "ruby", "cmake", "mariadb-client"), "clone": ("redis-server", "tmux", "htop")}
_LOG_LINES, _ACCOUNTS = 1_500_000, 400_000
_MEDIA_FILES, _MEDIA_BYTES = 60, 3_500_000
# How long any one command inside the guest may take.
_DEADLINE_S = 1800


def make(images: Path, work: Path) -> list[str]:
    """Make gen1.raw, gen2.raw and clone.raw in ``images``; returns what the manifest should warn of."""
    if os.geteuid() != 0:
        raise disk.ImageError("the full guest needs root: it has device nodes, and is lived in by chroot")
    first, second, clone = (images / f"{name}.raw" for name in ("gen1", "gen2", "clone"))
    tree = work / "root"
    _bootstrap(tree)
    disk.create(first, _DISK_BYTES)
    size_bytes = disk.partition(first, disk_uuid=str(uuid.uuid4()), partition_uuid=str(uuid.uuid4()))
    ext4.make(first, size_bytes, uuid=guest.ROOT_UUID, time_s=guest.FIRST_DAY_S, content=tree)
    shutil.rmtree(tree)
    guest.add_application(first, work, log_lines=_LOG_LINES, accounts=_ACCOUNTS)
    refusal = _mount_refusal(first, work / "mnt")
    if refusal is None:
        with _mounted(first, work / "mnt") as root:
            _postgres(root, "createdb bench", "pgbench -q -i -s 20 bench", "pgbench -n -c 2 -t 2000 bench")
    disk.copy_sparse(first, second)
    disk.copy_sparse(first, clone)
    guest.use_application(second, work, log_lines=_LOG_LINES // 8, accounts=_ACCOUNTS)
    if refusal is not None:
        return [f"no loop mounts here, so no PostgreSQL and no new packages, and clone.raw equals gen1.raw: {refusal}"]
    with _mounted(second, work / "mnt") as root:
        _second_day(root)
    with _mounted(clone, work / "mnt") as root:
        _become_clone(root)
    return []


def _bootstrap(tree: Path) -> None:
    download = 'chroot "$1" apt-get -qq -y --download-only --no-install-recommends install'
    disk.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", "--skip=cleanup/apt", f"--include={_PACKAGES}"]
        + [f"--customize-hook={download} {' '.join(names)}" for names in _LATER.values()]
        + ["bookworm", tree],
        environment={"SOURCE_DATE_EPOCH": str(guest.FIRST_DAY_S)},
    )
    (tree / "etc/hostname").write_text("guest-1\n")
    (tree / "etc/fstab").write_text(f"UUID={guest.ROOT_UUID} / ext4 errors=remount-ro 0 1\n")
    media = tree / "srv/media"
    media.mkdir(parents=True)
    _add_media(media, range(_MEDIA_FILES))


def _add_media(media: Path, numbers: range) -> None:
    for number in numbers:
        chance = random.Random(number)
        (media / f"photo{number:03}.jpg").write_bytes(
            chance.randbytes(chance.randrange(_MEDIA_BYTES // 2, _MEDIA_BYTES))
        )


def _second_day(root: Path) -> None:
    """Packages installed, archives and media removed and added, thousands of database transactions, logs grown."""
    _install(root, "gen2")
    _in_guest(root, "apt-get", "clean")
    media = root / "srv/media"
    for number in range(0, _MEDIA_FILES, 8):
        (media / f"photo{number:03}.jpg").unlink()
    _add_media(media, range(_MEDIA_FILES, _MEDIA_FILES + 6))
    _postgres(root, "pgbench -n -c 2 -t 8000 bench")


def _become_clone(root: Path) -> None:
    """A machine cloned from the same template: new name and keys, a few packages of its own."""
    (root / "etc/hostname").write_text("clone-1\n")
    (root / "etc/machine-id").write_text(uuid.uuid4().hex + "\n")
    for key in (root / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    _in_guest(root, "ssh-keygen", "-A")
    _install(root, "clone")
    _postgres(root, "pgbench -n -c 2 -t 500 bench")


def _install(root: Path, name: str) -> None:
    policy = root / "usr/sbin/policy-rc.d"  # no package may start its service here
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    options = ("-qq", "-y", "--no-download", "--no-install-recommends")
    _in_guest(root, "apt-get", *options, "install", *_LATER[name])
    policy.unlink()


def _postgres(root: Path, *commands: str) -> None:
    _in_guest(root, "pg_ctlcluster", "15", "main", "start")
    try:
        for command in commands:
            _in_guest(root, "su", "postgres", "-c", command)
    finally:
        _in_guest(root, "pg_ctlcluster", "15", "main", "stop", "-m", "fast")


def _in_guest(root: Path, *command: str) -> None:
    settings = ("PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive", "HOME=/root")
    disk.run(["timeout", str(_DEADLINE_S), "chroot", root, "/usr/bin/env", "-i", *settings, *command])


def _mount_refusal(image: Path, point: Path) -> str | None:
    """Why this system does not let us loop-mount; None when it does."""
    try:
        with _mounted(image, point):
            return None
    except disk.ImageError as exc:
        return str(exc)


@contextmanager
def _mounted(image: Path, point: Path) -> Iterator[Path]:
    """The image's root filesystem with /proc and shared memory, all unmounted again whatever happens."""
    point.mkdir(exist_ok=True)
    with ExitStack() as stack:
        for target, arguments in (
            (point, ["-o", f"loop,offset={disk.PARTITION_OFFSET_BYTES}", image]),
            (point / "proc", ["-t", "proc", "proc"]),
            (point / "dev/shm", ["-t", "tmpfs", "tmpfs"]),
        ):
            disk.run(["mount", *arguments, target])
            stack.callback(disk.run, ["umount", target])
        yield point
