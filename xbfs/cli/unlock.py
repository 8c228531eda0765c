"""unlock: hand the key of an encrypted volume to a running mount."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs.cli import text
from xbfs.cli.volume_keys import asked_keys
from xbfs.control import client
from xbfs.control.wire import Unlock
from xbfs_engine.core.errors import GuestLocked, MountError, NotMounted, UsageError

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.output import Output

_STATUS: Final = Path(".xbfs", "status.json")


class _Place(NamedTuple):
    """A restore point in a mount, and where the mount's server listens."""

    point: str
    control: Path


def unlock(arguments: argparse.Namespace, output: Output) -> None:
    """Try the key, and say what it opened."""
    place = _place(Path(arguments.path))
    keys = asked_keys(f"key of {arguments.volume or 'the encrypted volumes'}: ", arguments.volume)
    opened: list[str] = []
    refused: GuestLocked | None = None
    for key in keys:
        try:
            opened += client.unlock(place.control, Unlock(place.point, arguments.volume, key.secret))
        except GuestLocked as exc:
            refused = exc
    if not opened and refused is not None:
        raise refused
    output.result({"point": place.point, "opened": opened})
    if not opened:
        output.say("no volume is locked; nothing was done")
        return
    output.say(f"opened {', '.join(opened)}; {text.count(len(opened), 'volume')} can be read until the mount ends")


def _place(path: Path) -> _Place:
    path = path.absolute()
    root = next((parent for parent in (path, *path.parents) if (parent / _STATUS).is_file()), None)
    if root is None:
        raise NotMounted(f"{path} is in no mount of restore points")
    try:
        control = json.loads((root / _STATUS).read_text()).get("control")
    except (OSError, ValueError) as exc:
        raise MountError(f"{root / _STATUS} can not be read: {exc}") from exc
    if not isinstance(control, str):
        raise MountError(f"the mount on {root} takes no keys", hint="its log says why; mount again")
    for place in (path, path / "latest", *path.parents):
        with suppress(OSError):
            return _Place(os.getxattr(place, "user.xbfs.point").decode(), Path(control))
        if place == root:
            break
    raise UsageError(f"{path} is neither a VM nor in a restore point", hint=f"name one: {root}/vms/NAME")
