"""Makes a disk that boots under BIOS and UEFI of a kernel, an initial file system and a root: GPT, a boot partition
with syslinux and GRUB, an ext4. Without root, mounts and loop devices. The kernel talks to the first serial port.

Keeps no state; one layout and one content give the same bytes, but for times of directories of the boot partition.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from images import disk

BORN_S = 1_700_000_000
"""When everything on such a disk was made."""
ROOT_START = 41 << 20
"""Where the second partition, the root, begins."""

_BOOT_START, _BOOT_BYTES = 1 << 20, ROOT_START - (1 << 20)
_MBR = Path("/usr/lib/syslinux/mbr/gptmbr.bin")
_GRUB_FILES = Path("/usr/lib/grub/x86_64-efi")
_GRUB_MODULES = ("part_gpt", "fat", "normal", "linux", "search", "search_fs_file", "serial", "configfile")
_GRUB_FIRST = "search --file --set=root /xbfs-boot.id\nset prefix=($root)/\nconfigfile /grub.cfg\n"
_COMMAND_LINE = (
    "console=tty0 console=ttyS0,115200 mitigations=off tsc=reliable no_timer_check random.trust_cpu=on panic=5"
)


@dataclass(frozen=True, slots=True)
class Bootable:
    """What such a disk is made of. ``uuid``: of the disk; those of its parts follow from its last digit, so it ends
    with 0. ``root``: a directory that becomes the root."""

    size_bytes: int
    uuid: str
    kernel: Path
    initial: Path
    command_line: str
    root: Path


def make(target: Path, content: Bootable, work: Path) -> None:
    """The disk as a new file. Raises ImageError."""
    disk.create(target, content.size_bytes)
    _partition(target, content)
    _boot_partition(target, content, work)
    _root_partition(target, content, work)


def _part_uuid(content: Bootable, number: int) -> str:
    return f"{content.uuid[:-1]}{number}"


def _root_bytes(content: Bootable) -> int:
    return content.size_bytes - ROOT_START - disk.PARTITION_OFFSET_BYTES


def _partition(image: Path, content: Bootable) -> None:
    """A boot partition that UEFI finds by its type and syslinux's boot code by its attribute, and one for the root."""
    script = (
        f"label: gpt\nlabel-id: {content.uuid}\nunit: sectors\nsector-size: 512\n"
        f"start={_BOOT_START // 512}, size={_BOOT_BYTES // 512}, uuid={_part_uuid(content, 1)}, "
        "type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, attrs=LegacyBIOSBootable\n"
        f"start={ROOT_START // 512}, size={_root_bytes(content) // 512}, uuid={_part_uuid(content, 2)}, "
        f"type={disk.LINUX_ROOT_X86_64}\n"
    )
    disk.run(["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", image], stdin=script)
    if not _MBR.exists():
        raise disk.ImageError("syslinux-common is not installed; tools/setup installs it")
    with image.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), _MBR.read_bytes()[:440], 0)


def _boot_partition(image: Path, content: Bootable, work: Path) -> None:
    line = f"{_COMMAND_LINE} {content.command_line}".rstrip()
    syslinux = (
        f"SERIAL 0 115200\nDEFAULT l\nTIMEOUT 1\nLABEL l\n KERNEL /vmlinuz\n INITRD /initrd.img\n APPEND {line}\n"
    )
    files = {
        "vmlinuz": content.kernel.read_bytes(),
        "initrd.img": content.initial.read_bytes(),
        "syslinux.cfg": syslinux.encode(),
        "grub.cfg": f"set timeout=0\nlinux /vmlinuz {line}\ninitrd /initrd.img\nboot\n".encode(),
        "xbfs-boot.id": b"\n",
    }
    first, loader, boot = work / "first.cfg", work / "BOOTX64.EFI", work / "boot"
    first.write_text(_GRUB_FIRST)
    grub = ["grub-mkimage", "-d", str(_GRUB_FILES), "-O", "x86_64-efi", "-p", "/", "-c", str(first)]
    disk.run([*grub, "-o", loader, *_GRUB_MODULES])
    boot.mkdir()
    for name, data in files.items():
        (boot / name).write_bytes(data)
        os.utime(boot / name, (BORN_S, BORN_S))
    # FAT16: mtools refuses a FAT32 of so few clusters.
    sector = str(_BOOT_START // 512)
    where = ["--offset", sector, "-h", sector, str(image), str(_BOOT_BYTES // 1024)]
    disk.run(["mkfs.vfat", "--invariant", "-F16", "-n", "XBFSBOOT", *where])
    inside = ["-i", f"{image}@@{_BOOT_START}"]
    disk.run(["mmd", *inside, "::/EFI", "::/EFI/BOOT"])
    disk.run(["mcopy", "-m", *inside, *(boot / name for name in files), "::/"])
    disk.run(["mcopy", *inside, loader, "::/EFI/BOOT/BOOTX64.EFI"])
    disk.run(["syslinux", "--install", "-t", str(_BOOT_START), image])


def _root_partition(image: Path, content: Bootable, work: Path) -> None:
    part = work / "root.ext4"
    disk.create(part, _root_bytes(content))
    options = f"hash_seed={_part_uuid(content, 4)},lazy_itable_init=0,nodiscard,root_owner=0:0"
    clock = {"SOURCE_DATE_EPOCH": str(BORN_S), "E2FSPROGS_FAKE_TIME": str(BORN_S)}
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-L", "root", "-U", _part_uuid(content, 3)]
    disk.run([*command, "-E", options, "-d", content.root, part], environment=clock)
    disk.run(["dd", f"if={part}", f"of={image}", "bs=1M", f"seek={ROOT_START >> 20}", "conv=notrunc,sparse"])
    part.unlink()
