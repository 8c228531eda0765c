"""The directory of an NFS SR, mounted in user space: what SM asks of it at plug and scan, and the files in it.

The hosts that have it plugged hold one mount each; disks are read and written through the first. Any thread may call
it, one at a time gets through. The file system is the real one that somebody exports: nothing here makes or removes a
file but what a host would.
"""

from __future__ import annotations

import os
import socket
import threading
import uuid as uuids
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from ..failures import Failure
from .tracking import backend_failure
from .vhdfile import BadVhd, RawLayer, VhdLayer, new_vhd

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ..schema import Ref
    from .nfs_client import NfsClient, NfsFile

NFS_PORT: Final = 2049
"""What SM tries to connect to before it mounts (util._testHost)."""
_CONNECT_S: Final = 2.0
_TIMEOUT_DS: Final = 200
"""SR.other_config:nfs-timeout where nobody set it, in tenths of a second."""
_READ_BYTES: Final = 64 << 10
"""What libnfs reads by one call of either version."""
_JOURNAL: Final = "filelog.txt"


class IoFailure(Failure):
    """The server did not answer, or refused: SM's commands end with EIO, and so do those of guests."""

    def __init__(self, error: OSError) -> None:
        super().__init__("SR_BACKEND_FAILURE", "input/output error", str(error), "")


class Room(NamedTuple):
    """Of the file system, in bytes."""

    total: int
    used: int


class Share:
    """The directory of one SR; ``place`` is a local path that no layer of it ever makes."""

    def __init__(self, sr: str, place: Path) -> None:
        self.sr, self.place = sr, place
        self.room = Room(0, 0)
        self._lock = threading.RLock()
        self._mounts: dict[Ref, NfsClient] = {}
        self._files: dict[str, NfsFile] = {}

    # Mounting

    def plug(
        self, host: Ref, config: Mapping[str, str], sm_config: Mapping[str, str], other: Mapping[str, str]
    ) -> None:
        """Mount for a host and try what SM tries. Raises Failure."""
        server, directory = config.get("server", ""), config.get("serverpath", "")
        if not server or not directory:
            raise backend_failure(90, "The request is missing the server or serverpath parameter")
        if sm_config.get("nosubdir") != "true":
            directory += f"/{self.sr}"
        version = 4 if config.get("nfsversion", "3").startswith("4") else 3
        with self._lock:
            if host in self._mounts:
                return
            _knock(server)
            # libnfs gives all clients of a process the same name, and the server of NFSv4 ends the elder's leases.
            shared = next(iter(self._mounts.values()), None) if version == 4 else None
            client = shared or _mount(server, directory, version, int(other.get("nfs-timeout", _TIMEOUT_DS)) / 10)
            self._mounts[host] = client
            try:
                _try_out(client)
                self.measure()
            except BaseException:
                self.unplug(host)
                raise

    def unplug(self, host: Ref) -> None:
        """Unmount for a host."""
        with self._lock:
            client = self._mounts.pop(host, None)
            if client is None:
                return
            if client not in self._mounts.values():
                # Files are the first mount's; whichever is first now opens them again.
                self._forget_files()
                client.close()

    def close(self) -> None:
        """Unmount for all."""
        for host in list(self._mounts):
            self.unplug(host)

    def measure(self) -> None:
        """Ask for the size of the file system. Raises IoFailure."""
        with self._client() as client:
            room = client.room()
            self.room = Room(room.total, room.total - room.available)

    # Disks

    def scan(self) -> dict[str, VhdLayer | RawLayer]:
        """The disks by uuid, hidden leaves left out. Raises Failure SR_BACKEND_FAILURE_40 if one file is bad."""
        found: dict[str, VhdLayer | RawLayer] = {}
        try:
            with self._client() as client:
                names = sorted(client.listing())
                self._forget_files()
            self.measure()
            for name in names:
                uuid, _, suffix = name.rpartition(".")
                if suffix == "vhd":
                    found[uuid] = _read_vhd(self, uuid)
                elif suffix == "raw":
                    found[uuid] = RawLayer(self, uuid)
        except (BadVhd, IoFailure) as exc:
            raise backend_failure(40, f"The SR scan failed  [opterr={exc}]") from exc
        for uuid, layer in found.items():
            if layer.parent is not None and layer.parent not in found:
                raise backend_failure(40, f"The SR scan failed  [opterr=uuid={uuid}: no parent {layer.parent}]")
        parents = {layer.parent for layer in found.values()}
        return {uuid: layer for uuid, layer in found.items() if not layer.hidden or uuid in parents}

    def open_disk(self, uuid: str) -> None:
        """What tapdisk insists on when it opens a VHD for writing. Raises Failure SR_BACKEND_FAILURE_46."""
        try:
            _check_chain(self, VhdLayer(self, uuid))
        except (BadVhd, IoFailure) as exc:
            raise backend_failure(46, f"The VDI is not available [opterr={uuid}: {exc}]") from exc

    def create(self, uuid: str, size_bytes: int, parent: VhdLayer | None) -> VhdLayer:
        """An empty VHD, made under another name and renamed over whatever has its own. Raises IoFailure."""
        fresh, name = f"{uuid}.vhd.new", f"{uuid}.vhd"
        with self._client() as client:
            client.write_file(f"/{fresh}", new_vhd(size_bytes, parent))
            client.rename(f"/{fresh}", f"/{name}")
            if parent is not None:
                self._note(client, f"{uuid} {parent.uuid}\n")
        return VhdLayer(self, uuid)

    # Files

    def size(self, name: str) -> int:
        """Bytes of a file. Raises IoFailure."""
        with self._client() as client:
            return self._file(client, name).attributes().size

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of a file, fewer at its end. Raises IoFailure."""
        with self._client() as client:
            file, step = self._file(client, name), max(client.piece, _READ_BYTES)
            parts = [file.read(offset + at, min(step, length - at)) for at in range(0, length, step)]
            return b"".join(parts)

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Write durably. Raises IoFailure."""
        with self._client() as client:
            self._file(client, name).write(offset, data)

    def link(self, old: str, new: str) -> None:
        """A second name; the open file goes on under it. Raises IoFailure."""
        with self._client() as client:
            client.link(f"/{old}", f"/{new}")
            if old in self._files:
                self._files[new] = self._files.pop(old)

    def unlink(self, name: str) -> None:
        """Remove a file that is there. Raises IoFailure."""
        with self._client() as client:
            if name in self._files:
                self._files.pop(name).close()
            client.unlink(f"/{name}")

    def _file(self, client: NfsClient, name: str) -> NfsFile:
        if name not in self._files:
            self._files[name] = client.open(f"/{name}", os.O_RDWR | os.O_SYNC)
        return self._files[name]

    def _forget_files(self) -> None:
        for file in self._files.values():
            try:
                file.close()
            except OSError:
                continue  # what was written is durable already
        self._files = {}

    def _note(self, client: NfsClient, line: str) -> None:
        """SM's journal of snapshots."""
        with client.open(f"/{_JOURNAL}", os.O_RDWR | os.O_CREAT) as file:
            file.write(file.attributes().size, line.encode())

    @contextmanager
    def _client(self) -> Iterator[NfsClient]:
        with self._lock:
            client = next(iter(self._mounts.values()), None)
            try:
                if client is None:
                    raise ConnectionError("not mounted")
                yield client
            except OSError as exc:
                raise IoFailure(exc) from exc


def _read_vhd(share: Share, uuid: str) -> VhdLayer:
    try:
        return VhdLayer(share, uuid)
    except BadVhd as exc:
        raise BadVhd(f"uuid={uuid}: {exc}") from exc


def _check_chain(share: Share, layer: VhdLayer) -> None:
    if layer.hidden:
        raise BadVhd("the disk is hidden")
    while layer.parent is not None:
        parent = VhdLayer(share, layer.parent)
        if parent.id != layer.parent_id:
            raise BadVhd(f"{layer.name}: the uuid of the parent is another")
        layer = parent


def _mount(server: str, directory: str, version: int, timeout_s: float) -> NfsClient:
    # Only pools with such an SR need libnfs.
    from .nfs_client import NfsClient

    port = NFS_PORT if version == 4 else 0  # for version 3 mount.nfs asks rpcbind, too
    try:
        return NfsClient(server, directory, version=version, port=port, timeout_s=timeout_s)
    except OSError as exc:
        raise _no_mount(f"{server}:{directory}", exc) from exc


def _knock(server: str) -> None:
    try:
        with socket.create_connection((server, NFS_PORT), _CONNECT_S):
            pass
    except OSError as exc:
        raise _no_mount(server, exc) from exc


def _no_mount(place: str, error: OSError) -> Failure:
    return backend_failure(12, f"mount failed with return code 32 [opterr={place}: {error}]")


def _try_out(client: NfsClient) -> None:
    """SM's write test; its test of hard links only warns where it fails, and then snapshots do not work."""
    name = f"/{uuids.uuid4()}"
    try:
        client.write_file(name, b"")
        client.unlink(name)
    except OSError as exc:
        raise backend_failure(461, f"Unable to write to the SR [opterr={exc}]") from exc
    try:
        client.write_file(name, b"")
        client.link(name, f"{name}.new")
        client.unlink(name)
        client.unlink(f"{name}.new")
    except OSError as exc:
        raise backend_failure(461, f"No hard links in the SR [opterr={exc}]") from exc
