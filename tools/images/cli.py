"""The command line of tools/make_images; the only module here that prints."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from images import debian, debian_guest, disk, ext4, guest, micro, synthetic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "images"
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "B": 1}
_DESCRIPTION = """\
Make guest disks to back up.

  tiny    48 MiB guest of this system's files, in seconds (tests)
  small   1.5 GiB guest with some 400 MB of this system's files (demo)
  full    8 GiB Debian 12 guest with a database server and compilers (benchmarks); as root, needs the network

Each makes CACHE/VARIANT/ with gen1.raw, gen2.raw (the same filesystem after real work), gen2.cbt (what changed, as
XAPI's VDI.list_changed_blocks tells it), gen2.extents.json (the same as [[offset, length], ...] in bytes),
manifest.json and, for full, clone.raw and clone.cbt. What is there already is kept. On one system tiny and small are
the same bytes each time; full is not.

  micro   128 MiB guest that boots under BIOS and UEFI in seconds; needs the network for its kernel, once
  server  1.5 GiB Debian 12 with systemd and PostgreSQL that boots likewise; as root, needs the network

  sparse  scattered data without a filesystem, on a sparse disk of any size
  mutate  scattered changes to any disk, in place or in a copy
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (disk.ImageError, OSError) as exc:
        print(f"make_images: error: {exc}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{tiny,small,full,micro,server,sparse,mutate}")
    for name in ("tiny", "small", "full"):
        command = commands.add_parser(name)
        command.add_argument("--cache", type=Path, default=_CACHE, help="default: .cache/images in the checkout")
        command.set_defaults(run=_variant, variant=name)
    for name in ("micro", "server"):
        command = commands.add_parser(name)
        command.add_argument("--cache", type=Path, default=_CACHE, help="default: .cache/images in the checkout")
        command.set_defaults(run=_bootable, variant=name)
    command = commands.add_parser("sparse")
    command.add_argument("out", type=Path)
    command.add_argument("--size", type=_size, required=True, help="of the disk, such as 64GiB or 16TiB")
    command.add_argument("--data", type=_size, required=True, help="how much of it holds data, such as 2GiB")
    command.add_argument("--seed", type=int, default=1)
    command.set_defaults(run=_sparse)
    command = commands.add_parser("mutate")
    command.add_argument("image", type=Path)
    command.add_argument("--fraction", type=_fraction, required=True, help="of the 64 KiB blocks with data to change")
    command.add_argument("--out", type=Path, help="change a new sparse copy, not the image itself")
    command.add_argument("--cbt", type=Path, required=True, help="where to write the bitmap of changed blocks")
    command.add_argument("--seed", type=int, default=1)
    command.set_defaults(run=_mutate)
    return parser


def _size(text: str) -> int:
    for unit, factor in _UNITS.items():
        if text.endswith(unit):
            return round(float(text.removesuffix(unit)) * factor)
    return int(text)


def _fraction(text: str) -> float:
    if not 0 < (fraction := float(text)) <= 1:
        raise argparse.ArgumentTypeError("a fraction is above 0 and at most 1")
    return fraction


def _variant(options: argparse.Namespace) -> None:
    final: Path = options.cache / options.variant
    if (final / "manifest.json").exists():
        print(f"{final}: there already")
        return
    options.cache.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[Path, Path], list[str]]] = {
        "tiny": lambda images, work: _small_guest(guest.TINY, images, work),
        "small": lambda images, work: _small_guest(guest.SMALL, images, work),
        "full": debian.make,
    }
    # Beside the final place, so that the finished images only have to be renamed.
    with tempfile.TemporaryDirectory(prefix=f".{options.variant}-", dir=options.cache) as scratch:
        images, work = Path(scratch, "images"), Path(scratch, "work")
        images.mkdir()
        work.mkdir()
        warnings = makers[options.variant](images, work)
        _describe(options.variant, images, warnings)
        if final.exists():
            shutil.rmtree(final)
        images.rename(final)
    for warning in warnings:
        print(f"make_images: warning: {warning}", file=sys.stderr)
    print(final)


def _bootable(options: argparse.Namespace) -> None:
    print({"micro": micro.make, "server": debian_guest.make}[options.variant](options.cache))


def _small_guest(variant: guest.Variant, images: Path, work: Path) -> list[str]:
    first, second = images / "gen1.raw", images / "gen2.raw"
    guest.first_generation(first, variant, work)
    disk.copy_sparse(first, second)
    guest.second_generation(second, variant, work)
    return []


def _describe(variant: str, images: Path, warnings: list[str]) -> None:
    first, second, clone = (images / f"{name}.raw" for name in ("gen1", "gen2", "clone"))
    for image in images.glob("*.raw"):
        ext4.check(image)
    if clone.exists():
        clone.with_suffix(".cbt").write_text(disk.cbt_bitmap(disk.changed_blocks(first, clone), clone.stat().st_size))
    size_bytes = second.stat().st_size
    blocks = disk.changed_blocks(first, second)
    (images / "gen2.cbt").write_text(disk.cbt_bitmap(blocks, size_bytes))
    (images / "gen2.extents.json").write_text(json.dumps(disk.extents(blocks, size_bytes)) + "\n")
    manifest = {
        "variant": variant,
        "warnings": warnings,
        "changed_blocks": len(blocks),
        "files": {path.name: disk.describe(path) for path in sorted(images.iterdir())},
    }
    (images / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _sparse(options: argparse.Namespace) -> None:
    synthetic.make_sparse(options.out, size_bytes=options.size, data_bytes=options.data, seed=options.seed)


def _mutate(options: argparse.Namespace) -> None:
    image = options.image
    if options.out:
        disk.copy_sparse(image, options.out)
        image = options.out
    blocks = synthetic.mutate(image, fraction=options.fraction, seed=options.seed)
    options.cbt.write_text(disk.cbt_bitmap(blocks, image.stat().st_size))
    print(f"{image}: {len(blocks)} blocks of 64 KiB changed")
