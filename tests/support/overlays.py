"""Overlays over any disk, for tests that want an image and no more: their files are gone when nobody uses them."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from xbfs.view.overlay import FrozenOverlay, Overlay, create_overlay, freeze_all
from xbfs.view.overlay.files import StateFiles, make_files
from xbfs.view.overlay.opening import begin
from xbfs.view.overlay.recent import RecentMarks, boot_id
from xbfs_engine.core.runtime import SystemClock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xbfs.view.base import RandomAccess
    from xbfs.view.overlay.files import StateFile
    from xbfs_engine.core.errors import StorageError

UNIT = 4096


def written_overlay(base: RandomAccess) -> Overlay:
    """Units of all layers, of the base's bytes and of others, at the ends and in the middle."""
    directory = Path(tempfile.mkdtemp(prefix="overlay-"))
    overlay = create_overlay(directory / "o", base, identity=b"")
    weakref.finalize(overlay, shutil.rmtree, directory)
    write_to(overlay, b"w")
    return overlay


def hydrated_overlay(base: RandomAccess) -> Overlay:
    """The same, with the rest of the base copied."""
    overlay = written_overlay(base)
    overlay.hydrate(rate_bytes_s=None, clock=SystemClock(), stop=Event())
    return overlay


def frozen_overlay(base: RandomAccess) -> FrozenOverlay:
    """The same, frozen and written to afterwards: it must hold what was there before."""
    overlay = written_overlay(base)
    (frozen,) = freeze_all([overlay])
    write_to(overlay, b"x")
    overlay.discard(0, overlay.size_bytes // 2)
    weakref.finalize(frozen, overlay.close)
    return frozen


def write_to(overlay: Overlay, fill: bytes) -> None:
    """Write and discard here and there."""
    size = overlay.size_bytes
    for at in range(0, size, 150_001):
        overlay.write_at(at, [fill * min(5000, size - at)])
    for at in range(70_000, size, 333_333):
        overlay.discard(at, min(3 * UNIT, size - at))
    if size:
        overlay.write_at(size - 1, [fill])


class FaultyFile:
    """A StateFile that fails as ``fails`` says, by the name of the method."""

    def __init__(self, file: StateFile, fails: dict[str, StorageError]) -> None:
        self._file = file
        self._fails = fails

    def __getattr__(self, name: str) -> object:
        if name in self._fails:
            raise self._fails[name]
        return getattr(self._file, name)


@contextmanager
def faulty(directory: Path, base: RandomAccess) -> Iterator[tuple[Overlay, dict[str, dict[str, StorageError]]]]:
    """An overlay and, by file, what fails in it from now on."""
    real = make_files(directory)
    fails: dict[str, dict[str, StorageError]] = {name: {} for name in StateFiles._fields}
    files = StateFiles(*[FaultyFile(file, fails[name]) for name, file in real._asdict().items()])
    try:
        yield begin(files, base, RecentMarks(files.recent, boot_id()), identity=b""), fails
    finally:
        real.close()
