"""The micro guest: a disk of 128 MiB that boots under BIOS and UEFI in seconds, tells so on its serial console, and can
be asked to write and to load a database (micro_init.sh tells how).

Debian's cloud kernel, busybox, sqlite3 and e2fsck. Only the kernel's package is fetched, once; it is not installed.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
from pathlib import Path

from images import bootable, disk, initramfs

_DISK_BYTES = 128 << 20
_PAYLOAD_BYTES = 8 << 20
_UUID = "7be1c0de-0000-4000-8000-0000000d15c0"
_MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "ata_piix", "ahci", "xen_blkfront")
_INIT = Path(__file__).with_name("micro_init.sh")


def make(cache: Path) -> Path:
    """The guest's disk, made now unless one of the same recipe is in ``cache``. Needs the network for the kernel the
    first time."""
    package = kernel_package(cache / "packages")
    programs = [initramfs.program(name) for name in ("busybox", "sqlite3", "e2fsck")]
    image = cache / "guests" / f"micro-{_recipe(package, programs)}.raw"
    if image.exists():
        return image
    image.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".micro-", dir=image.parent) as scratch:
        work = Path(scratch)
        disk.run(["dpkg-deb", "-x", package, work / "kernel"])
        _pack(work / "initrd.img", work / "kernel", programs)
        _root(work / "root")
        (kernel,) = (work / "kernel/boot").glob("vmlinuz-*")
        content = bootable.Bootable(_DISK_BYTES, _UUID, kernel, work / "initrd.img", "quiet", work / "root")
        bootable.make(work / "disk", content, work)
        (work / "disk").rename(image)
    return image


def kernel_package(directory: Path) -> Path:
    """Debian's package of the newest cloud kernel, kept in ``directory``. Raises ImageError."""
    kept = sorted(directory.glob("linux-image-*-cloud-amd64_*.deb"))
    if kept:
        return kept[-1]
    # The package of that plain name only names the newest one.
    depends = disk.run(["apt-cache", "--no-all-versions", "show", "linux-image-cloud-amd64"])
    names = [word for word in depends.split() if word.startswith("linux-image-") and word[12].isdigit()]
    if not names:
        raise disk.ImageError("apt knows no linux-image-cloud-amd64; as root on Debian: apt-get update")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=directory) as scratch:
        disk.run(["sh", "-c", 'cd "$1" && exec apt-get -qq download "$2"', "sh", scratch, names[0]])
        (package,) = Path(scratch).glob("*.deb")
        return package.rename(directory / package.name)


def _recipe(package: Path, programs: list[Path]) -> str:
    digest = hashlib.sha256(package.name.encode())
    sources = [Path(__file__).with_name(f"{name}.py") for name in ("micro", "initramfs", "bootable", "disk")]
    parts = [*sources, _INIT, *programs, *(library for path in programs[1:] for library in initramfs.libraries(path))]
    for part in parts:
        digest.update(hashlib.sha256(part.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _pack(target: Path, kernel: Path, programs: list[Path]) -> None:
    # busybox of busybox-static needs no libraries, and ldd fails on it.
    files = {f"/bin/{path.name}": path.read_bytes() for path in programs}
    files |= {"/bin/sh": files["/bin/busybox"], "/init": _INIT.read_bytes()}
    for path in programs:
        if path.name != "busybox":
            files |= {str(library): library.read_bytes() for library in initramfs.libraries(path)}
    modules = initramfs.modules(kernel / "lib/modules", _MODULES)
    files |= {f"/modules/{path.name}": path.read_bytes() for path in modules}
    files["/modules/order"] = "\n".join(path.name for path in modules).encode() + b"\n"
    initramfs.pack(target, files)


def _root(tree: Path) -> None:
    """A root with a payload that the guest hashes: half noise, half text."""
    tree.mkdir()
    noise = random.Random(7).randbytes(_PAYLOAD_BYTES // 2)
    payload = noise + (b"all is well in the micro guest\n" * _PAYLOAD_BYTES)[: _PAYLOAD_BYTES // 2]
    (tree / "payload").write_bytes(payload)
    (tree / "payload.sha256").write_text(hashlib.sha256(payload).hexdigest())
