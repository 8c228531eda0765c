"""A real server to boot: Debian 12 with systemd and PostgreSQL, under BIOS and UEFI, with a login on its serial line.

It tells and does what the micro guest does (debian_guest.sh). Making it needs root and the network (mmdebstrap), and
two minutes; its bytes differ from one making to the next.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from images import bootable, disk

_DISK_BYTES = 1536 << 20
_UUID = "7be1c0de-0000-4000-8000-0000000deb10"
_PACKAGES = "linux-image-cloud-amd64,systemd-sysv,udev,initramfs-tools,e2fsprogs,postgresql-15,login"
_SCRIPT = Path(__file__).with_suffix(".sh")
_UNIT = """\
[Unit]
Description=What the machine asks of this guest
After=multi-user.target
[Service]
Type=exec
ExecStart=/usr/local/sbin/xbfs-guest
[Install]
WantedBy=multi-user.target
"""
# With checksums of its pages: a page that is not whole is noticed when it is read.
_DATABASE = """\
pg_dropcluster 15 main && pg_createcluster 15 main -- --data-checksums --locale=C &&
pg_ctlcluster 15 main start --skip-systemctl-redirect &&
runuser -u postgres -- psql -q -c "CREATE TABLE load(n bigint PRIMARY KEY, data text)" &&
pg_ctlcluster 15 main stop --skip-systemctl-redirect
"""


def make(cache: Path) -> Path:
    """The guest's disk, made now unless one of the same recipe is in ``cache``."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (Path(__file__), _SCRIPT, Path(bootable.__file__))))
    image = cache / "guests" / f"debian-{digest.hexdigest()[:12]}.raw"
    if image.exists():
        return image
    if os.geteuid() != 0:
        raise disk.ImageError("the Debian guest needs root: it is set up in a chroot")
    image.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".debian-", dir=image.parent) as scratch:
        work = Path(scratch)
        tree = work / "root"
        _bootstrap(tree, work)
        kernel, initial = work / "vmlinuz", work / "initrd.img"
        (tree / "vmlinuz").resolve().rename(kernel)
        (tree / "initrd.img").resolve().rename(initial)
        line = "root=LABEL=root ro quiet systemd.show_status=false net.ifnames=0"
        bootable.make(work / "disk", bootable.Bootable(_DISK_BYTES, _UUID, kernel, initial, line, tree), work)
        (work / "disk").rename(image)
        shutil.rmtree(tree)
    return image


def _bootstrap(tree: Path, work: Path) -> None:
    unit = work / "xbfs-guest.service"
    unit.write_text(_UNIT)
    hooks = [
        f'install -D -m 755 {_SCRIPT} "$1/usr/local/sbin/xbfs-guest"',
        f'install -D -m 644 {unit} "$1/etc/systemd/system/xbfs-guest.service"',
        'echo guest >"$1/etc/hostname"',
        'echo "LABEL=root / ext4 errors=remount-ro 0 1" >"$1/etc/fstab"',
        'chroot "$1" passwd -q -d root',
        'chroot "$1" systemctl -q enable xbfs-guest.service serial-getty@ttyS0.service',
        f"chroot \"$1\" sh -c '{_DATABASE}'",
    ]
    disk.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={_PACKAGES}"]
        + [f"--customize-hook={hook}" for hook in hooks]
        + ["bookworm", tree],
        environment={"SOURCE_DATE_EPOCH": str(bootable.BORN_S)},
    )
