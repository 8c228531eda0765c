"""The tools the engine is compared with, each driven by its own command line, all of them encrypting where they can."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from benchlib import Cost, run

PASSPHRASE = "a passphrase for benchmarks"
ROOT = Path(__file__).resolve().parent.parent


class Peer:
    """A tool. ``work/repo`` is where it stores; the disk is always work/disk.raw."""

    name: ClassVar[str]
    incremental_possible: ClassVar[bool] = True

    def begin(self, work: Path) -> None:
        """Create an empty repository."""

    def full(self, work: Path, disk: Path) -> Cost:
        """Back up from nothing."""
        raise AssertionError

    def incremental(self, work: Path, disk: Path, changed: Path) -> Cost:
        """Back up again after a change; ``changed`` is the CBT bitmap for those who can use one."""
        raise AssertionError

    def restore(self, work: Path, out: Path) -> Cost:
        """Write the newest state below ``out``."""
        raise AssertionError

    def check(self, work: Path) -> Cost | None:
        """Read and authenticate everything, if the tool can."""


class Xbfs(Peer):
    """Ours, through its command line."""

    name = "xbfs"

    def _env(self, work: Path) -> dict[str, str]:
        return {
            "XBFS_PASSPHRASE": PASSPHRASE,
            "XBFS_CACHE": str(work / "cache"),
            "XBFS_REPOSITORY": str(work / "repo"),
        }

    def _run(self, work: Path, *arguments: str | Path, stdout: Path | None = None) -> Cost:
        return run([ROOT / ".venv/bin/xbfs", *arguments], env=self._env(work), stdout=stdout)

    def begin(self, work: Path) -> None:
        """`xbfs init`."""
        self._run(work, "init")

    def backup(self, work: Path, disk: Path, changed: Path | None, report: Path) -> Cost:
        """`xbfs backup image`, its record to ``report``."""
        delta: list[str | Path] = ["--changed", changed] if changed else []
        return self._run(work, "backup", "image", disk, "--vm", "guest", *delta, "--json", stdout=report)

    def full(self, work: Path, disk: Path) -> Cost:
        """A full read."""
        return self.backup(work, disk, None, work / "report.json")

    def incremental(self, work: Path, disk: Path, changed: Path) -> Cost:
        """Only the changed blocks."""
        return self.backup(work, disk, changed, work / "report.json")

    def restore(self, work: Path, out: Path) -> Cost:
        """Export of the newest point; every chunk is verified."""
        return self._run(work, "export", "guest@latest", "--disk", "0", "--format", "raw", "-o", out / "disk.raw")

    def check(self, work: Path) -> Cost:
        """`xbfs verify`."""
        return self._run(work, "verify")


class Restic(Peer):
    """restic, repository version 2, compression as it comes."""

    name = "restic"

    def _run(self, work: Path, *arguments: str | Path) -> Cost:
        env = {
            "RESTIC_PASSWORD": PASSPHRASE,
            "RESTIC_CACHE_DIR": str(work / "cache"),
            "RESTIC_REPOSITORY": str(work / "repo"),
        }
        return run(["restic", "-q", *arguments], env=env)

    def begin(self, work: Path) -> None:
        """`restic init`."""
        self._run(work, "init", "--repository-version", "2")

    def full(self, work: Path, disk: Path) -> Cost:
        """`restic backup`."""
        return self._run(work, "backup", disk)

    def incremental(self, work: Path, disk: Path, changed: Path) -> Cost:
        """The same again: it has to read the whole file."""
        del changed
        return self._run(work, "backup", "--force", disk)

    def restore(self, work: Path, out: Path) -> Cost:
        """`restic restore`."""
        return self._run(work, "restore", "latest", "--target", out)

    def check(self, work: Path) -> Cost:
        """`restic check --read-data`."""
        return self._run(work, "check", "--read-data")


class Borg(Peer):
    """borg 1 with zstd 1 and authenticated encryption; the chunker is given by the subclass."""

    chunker: ClassVar[list[str]]

    def _run(self, work: Path, *arguments: str | Path) -> Cost:
        env = {
            "BORG_PASSPHRASE": PASSPHRASE,
            "BORG_BASE_DIR": str(work / "borg"),
            "BORG_REPO": str(work / "repo"),
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        }
        return run(["borg", *arguments], env=env)

    def begin(self, work: Path) -> None:
        """`borg init`."""
        self._run(work, "init", "-e", "repokey-blake2")

    def _create(self, work: Path, archive: str, disk: Path) -> Cost:
        return self._run(
            work, "create", "-C", "zstd,1", *self.chunker, "--files-cache", "disabled", f"::{archive}", disk
        )

    def full(self, work: Path, disk: Path) -> Cost:
        """`borg create`."""
        return self._create(work, "one", disk)

    def incremental(self, work: Path, disk: Path, changed: Path) -> Cost:
        """The same again: it has to read the whole file."""
        del changed
        return self._create(work, "two", disk)

    def restore(self, work: Path, out: Path) -> Cost:
        """`borg extract --sparse`."""
        here = Path.cwd()
        os.chdir(out)
        try:
            return self._run(work, "extract", "--sparse", "::two")
        finally:
            os.chdir(here)

    def check(self, work: Path) -> Cost:
        """`borg check --verify-data`."""
        return self._run(work, "check", "--verify-data")


class BorgFixed(Borg):
    """Fixed chunks of 1 MiB, as one would choose for disk images."""

    name = "borg fixed 1 MiB"
    chunker: ClassVar[list[str]] = ["--chunker-params", "fixed,1048576"]


class BorgDefault(Borg):
    """Content-defined chunks."""

    name = "borg default"
    chunker: ClassVar[list[str]] = []


class QemuImg(Peer):
    """A compressed qcow2: no encryption, no deduplication, no increments."""

    name = "qemu-img convert -c"
    incremental_possible = False

    def full(self, work: Path, disk: Path) -> Cost:
        """zstd clusters."""
        options = ["-c", "-o", "compression_type=zstd", "-m", "2"]
        return run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, disk, work / "repo"])

    def restore(self, work: Path, out: Path) -> Cost:
        """Back to raw."""
        return run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", work / "repo", out / "disk.raw"])


class Zstd(Peer):
    """The compressor alone: the floor."""

    name = "zstd -1 -T2"
    incremental_possible = False

    def full(self, work: Path, disk: Path) -> Cost:
        """One stream."""
        return run(["zstd", "-q", "-1", "-T2", disk, "-o", work / "repo"])

    def restore(self, work: Path, out: Path) -> Cost:
        """Decompress, sparse."""
        return run(["zstd", "-q", "-d", work / "repo", "-o", out / "disk.raw"])


PEERS: list[Peer] = [Xbfs(), Restic(), BorgFixed(), BorgDefault(), QemuImg(), Zstd()]
