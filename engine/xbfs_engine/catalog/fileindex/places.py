"""Where the guest shows what a volume holds: paths within a volume and paths of the guest's own tree. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from xbfs_engine.core.errors import GuestNotFound

if TYPE_CHECKING:
    from xbfs_engine.catalog.fileindex.records import FileIndex


class Shown(NamedTuple):
    """A path as people write it: absolute, in the guest's own tree if ``in_tree``, else within ``volume``."""

    path: bytes
    volume: str
    in_tree: bool


class VolumeView(NamedTuple):
    """How the paths of one volume are shown: ``mounts`` are (path, path within the volume), the deepest within first.

    ``others``: where else something is mounted, which may hide what this volume holds there.
    """

    volume: str
    mounts: tuple[tuple[bytes, bytes], ...]
    others: tuple[bytes, ...]

    def show(self, inside: bytes) -> Shown:
        """The path within the volume as the guest shows it; within the volume, if it does not."""
        for path, top in self.mounts:
            if not top or inside == top or inside.startswith(top + b"/"):
                shown = path.rstrip(b"/") + b"/" + inside[len(top) :].lstrip(b"/")
                shown = shown.rstrip(b"/") or b"/"
                if not any(len(other) > len(path) and is_within(shown, other) for other in self.others):
                    return Shown(shown, self.volume, True)
        return Shown(b"/" + inside, self.volume, False)


def view_of(index: FileIndex, volume: str, *, in_tree: bool = True) -> VolumeView:
    """How that point's guest shows a volume; ``in_tree`` False: by paths within the volume."""
    if not in_tree:
        return VolumeView(volume, (), ())
    mounts = [mount for mount in index.tree.mounts if mount.volume == volume and mount.inside is not None]
    mounts.sort(key=lambda mount: -len(mount.inside or b""))
    others = tuple(mount.path for mount in index.tree.mounts)
    return VolumeView(volume, tuple((mount.path, mount.inside or b"") for mount in mounts), others)


def locate(index: FileIndex, path: bytes) -> tuple[str, bytes]:
    """The volume, and the path within it, of an absolute path in the guest's own tree.

    Raises GuestNotFound if the guest has no such tree, or nothing of it that the index has is mounted there.
    """
    if not index.tree.mounts:
        names = ", ".join(volume.name for volume in index.volumes if volume.entries) or "none"
        why = "; ".join(index.tree.notes) or "none was found"
        raise GuestNotFound(
            f"the guest of {index.point[:12]} has no tree of its own: {why}",
            hint=f"name the volume with --volume: {names}",
        )
    path = b"/" + path.strip(b"/")
    mounts = [mount for mount in index.tree.mounts if is_within(path, mount.path)]
    if not mounts:
        tops = ", ".join(mount.path.decode(errors="backslashreplace") for mount in index.tree.mounts)
        raise GuestNotFound(f"nothing is mounted there in {index.point[:12]}", hint=f"there are: {tops}")
    # The last of those that are equally deep hides the others.
    mount = max(enumerate(mounts), key=lambda numbered: (len(numbered[1].path), numbered[0]))[1]
    if mount.inside is None:
        raise GuestNotFound(f"the index of {index.point[:12]} does not hold what is mounted there")
    rest = path[len(mount.path.rstrip(b"/")) :].strip(b"/")
    return mount.volume, b"/".join(filter(None, (mount.inside, rest)))


def is_within(path: bytes, top: bytes) -> bool:
    """Whether an absolute path is ``top`` or below it."""
    return path == top or path.startswith(top.rstrip(b"/") + b"/")
