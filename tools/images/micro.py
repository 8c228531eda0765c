"""The micro guest: a disk of 128 MiB that boots under BIOS and UEFI in seconds, tells so on its serial console, and can
be asked to write and to load a database (micro_init.sh tells how).

Debian's cloud kernel, busybox, sqlite3 and e2fsck, syslinux for BIOS and GRUB for UEFI; made without root, mounts and
loop devices. Only the kernel's package is fetched, once; it is not installed. One set of installed packages gives the
same guest each time, its boot partition's directory times apart.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
from pathlib import Path

from images import disk, initramfs

_SECTOR_BYTES = 512
_DISK_BYTES = 128 << 20
_BOOT_START, _BOOT_BYTES = 1 << 20, 40 << 20
_ROOT_START = _BOOT_START + _BOOT_BYTES
_ROOT_BYTES = _DISK_BYTES - _ROOT_START - (1 << 20)
_PAYLOAD_BYTES = 8 << 20
_BORN_S = 1_700_000_000
_UUIDS = {
    "disk": "7be1c0de-0000-4000-8000-00000000d15c",
    "boot": "7be1c0de-0000-4000-8000-00000000b007",
    "root": "7be1c0de-0000-4000-8000-000000000001",
    "file system": "7be1c0de-0000-4000-8000-00000000f5f5",
}
_MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "ata_piix", "ahci", "xen_blkfront")
_GRUB_MODULES = ("part_gpt", "fat", "normal", "linux", "search", "search_fs_file", "serial", "configfile")
_COMMAND_LINE = (
    "console=tty0 console=ttyS0,115200 quiet mitigations=off tsc=reliable no_timer_check random.trust_cpu=on panic=5"
)
_SYSLINUX = (
    f"SERIAL 0 115200\nDEFAULT l\nTIMEOUT 1\nLABEL l\n KERNEL /vmlinuz\n INITRD /initrd.img\n APPEND {_COMMAND_LINE}\n"
)
_GRUB = f"set timeout=0\nlinux /vmlinuz {_COMMAND_LINE}\ninitrd /initrd.img\nboot\n"
_GRUB_FIRST = "search --file --set=root /xbfs-boot.id\nset prefix=($root)/\nconfigfile /grub.cfg\n"
_MBR = Path("/usr/lib/syslinux/mbr/gptmbr.bin")
_GRUB_FILES = Path("/usr/lib/grub/x86_64-efi")
_INIT = Path(__file__).with_name("micro_init.sh")


def make(cache: Path) -> Path:
    """The guest's disk, made now unless one of the same recipe is in ``cache``. Needs the network for the kernel the
    first time."""
    package = _kernel_package(cache / "packages")
    programs = [initramfs.program(name) for name in ("busybox", "sqlite3", "e2fsck")]
    image = cache / "guests" / f"micro-{_recipe(package, programs)}.raw"
    if image.exists():
        return image
    image.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".micro-", dir=image.parent) as scratch:
        work = Path(scratch)
        disk.run(["dpkg-deb", "-x", package, work / "kernel"])
        _pack(work / "initrd.img", work / "kernel", programs)
        draft = work / "disk"
        disk.create(draft, _DISK_BYTES)
        _partition(draft)
        _boot_partition(draft, work)
        _root_partition(draft, work)
        draft.rename(image)
    return image


def _recipe(package: Path, programs: list[Path]) -> str:
    digest = hashlib.sha256(package.name.encode())
    here = Path(__file__)
    parts = [here, here.with_name("initramfs.py"), _INIT, *programs]
    parts += [library for path in programs[1:] for library in initramfs.libraries(path)]
    for part in parts:
        digest.update(hashlib.sha256(part.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _kernel_package(directory: Path) -> Path:
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


def _partition(image: Path) -> None:
    """A boot partition that UEFI finds by its type and syslinux's boot code by its attribute, and one for the root."""
    boot, root = (f"start={start // 512}, size={size // 512}" for start, size in
                  ((_BOOT_START, _BOOT_BYTES), (_ROOT_START, _ROOT_BYTES)))  # fmt: skip
    script = (
        f"label: gpt\nlabel-id: {_UUIDS['disk']}\nunit: sectors\nsector-size: {_SECTOR_BYTES}\n"
        f"{boot}, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, uuid={_UUIDS['boot']}, attrs=LegacyBIOSBootable\n"
        f"{root}, type={disk.LINUX_ROOT_X86_64}, uuid={_UUIDS['root']}\n"
    )
    disk.run(["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", image], stdin=script)
    if not _MBR.exists():
        raise disk.ImageError("syslinux-common is not installed; tools/setup installs it")
    with image.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), _MBR.read_bytes()[:440], 0)


def _boot_partition(image: Path, work: Path) -> None:
    (kernel,) = (work / "kernel/boot").glob("vmlinuz-*")
    files = {"vmlinuz": kernel.read_bytes(), "initrd.img": (work / "initrd.img").read_bytes()}
    files |= {"syslinux.cfg": _SYSLINUX.encode(), "grub.cfg": _GRUB.encode(), "xbfs-boot.id": b"micro\n"}
    first = work / "first.cfg"
    first.write_text(_GRUB_FIRST)
    loader = work / "BOOTX64.EFI"
    disk.run(["grub-mkimage", "-d", _GRUB_FILES, "-O", "x86_64-efi", "-p", "/", "-c", first, "-o", loader,
              *_GRUB_MODULES])  # fmt: skip
    # FAT16: mtools refuses a FAT32 of so few clusters.
    where = ["--offset", _BOOT_START // _SECTOR_BYTES, "-h", _BOOT_START // _SECTOR_BYTES]
    disk.run(["mkfs.vfat", "--invariant", "-F16", "-n", "XBFSBOOT", *map(str, where), image, str(_BOOT_BYTES // 1024)])
    inside = ["-i", f"{image}@@{_BOOT_START}"]
    disk.run(["mmd", *inside, "::/EFI", "::/EFI/BOOT"])
    for name, data in files.items():
        (work / name).write_bytes(data)
        os.utime(work / name, (_BORN_S, _BORN_S))
    disk.run(["mcopy", "-m", *inside, *(work / name for name in files), "::/"])
    disk.run(["mcopy", *inside, loader, "::/EFI/BOOT/BOOTX64.EFI"])
    disk.run(["syslinux", "--install", "-t", str(_BOOT_START), image])


def _root_partition(image: Path, work: Path) -> None:
    """A root with a payload that the guest hashes: half noise, half text."""
    tree, part = work / "root", work / "root.ext4"
    tree.mkdir()
    noise = random.Random(7).randbytes(_PAYLOAD_BYTES // 2)
    payload = noise + (b"all is well in the micro guest\n" * _PAYLOAD_BYTES)[: _PAYLOAD_BYTES // 2]
    (tree / "payload").write_bytes(payload)
    (tree / "payload.sha256").write_text(hashlib.sha256(payload).hexdigest())
    disk.create(part, _ROOT_BYTES)
    options = f"hash_seed={_UUIDS['root']},lazy_itable_init=0,nodiscard,root_owner=0:0"
    clock = {"SOURCE_DATE_EPOCH": str(_BORN_S), "E2FSPROGS_FAKE_TIME": str(_BORN_S)}
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-L", "micro", "-U", _UUIDS["file system"]]
    disk.run([*command, "-E", options, "-d", tree, part], environment=clock)
    disk.run(["dd", f"if={part}", f"of={image}", "bs=1M", f"seek={_ROOT_START >> 20}", "conv=notrunc,sparse"])
    shutil.rmtree(tree)
