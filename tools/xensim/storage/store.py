"""The disks of all SRs as trees of layers: what vhd files, logical volumes and the SM's calls on them come to.

A node is a disk (a leaf) or, hidden, the read-only base that leaves have in common. Snapshots move the layer of a leaf
into a new base in no time. Any thread may call it. Locks, in this order: ``gc_lock`` (one coalescer), the lock of a
node (its writers; snapshots and leaf coalesce wait for them), ``lock`` (the shape of the trees; never held while
bulk data moves). Reads take ``lock`` for an instant only.
"""

from __future__ import annotations

import os
import threading
import uuid as uuids
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ..failures import Failure
from .layers import BLOCK, UNIT, Layer, allocated, copy_range, data_ranges, read_chain
from .share import Share
from .tracking import Tracking, backend_failure
from .vhdfile import SECTOR, RawLayer, VhdLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

CHAIN_MOST: Final = 30
"""Layers of a chain beyond which SM refuses to snapshot (vhdutil.MAX_CHAIN_SIZE)."""


@dataclass(eq=False, slots=True)
class Node:
    """A disk or a base of disks."""

    uuid: str
    sr: str
    size_bytes: int
    layer: Layer
    parent: Node | None = None
    hidden: bool = False
    raw: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)


class DiskStore:
    """All disks, by uuid."""

    def __init__(self, state_dir: Path) -> None:
        self._dir = state_dir
        self._names = 0
        self._srs: dict[str, str] = {}
        self.lock = threading.RLock()
        self.gc_lock = threading.RLock()
        self.nodes: dict[str, Node] = {}
        self.shares: dict[str, Share] = {}
        self._made: set[str] = set()
        self._mirrors: dict[str, str] = {}
        self.tracking = Tracking(lambda uuid: self._place(self._srs[uuid]) / f"{uuid}.cbtlog")

    def find(self, uuid: str) -> Node | None:
        """The node, or None."""
        with self.lock:
            return self.nodes.get(uuid)

    def node(self, uuid: str) -> Node:
        """The node. Raises Failure VDI_MISSING, as for files that are gone."""
        found = self.find(uuid)
        if found is None:
            raise Failure("VDI_MISSING", "", uuid)
        return found

    def members(self, sr: str) -> list[Node]:
        """The nodes of an SR."""
        with self.lock:
            return [node for node in self.nodes.values() if node.sr == sr]

    def children(self, node: Node) -> list[Node]:
        """The nodes whose parent it is."""
        with self.lock:
            return [other for other in self.nodes.values() if other.parent is node]

    def chain(self, node: Node) -> list[Layer]:
        """The layers of a disk, its own first."""
        with self.lock:
            layers, at = [node.layer], node.parent
            while at is not None:
                layers.append(at.layer)
                at = at.parent
            return layers

    def create(self, uuid: str, sr: str, size_bytes: int, *, raw: bool = False) -> Node:
        """An empty disk."""
        with self.lock:
            if sr not in self.shares:
                self._made.add(sr)
            node = self.nodes[uuid] = Node(uuid, sr, size_bytes, self._layer(uuid, sr, size_bytes), raw=raw)
            self._srs[uuid] = sr
            return node

    def read_into(self, uuid: str, offset_bytes: int, view: memoryview) -> None:
        """Bytes of a disk. Raises Failure VDI_MISSING."""
        read_chain(self.chain(self.node(uuid)), offset_bytes, view)

    def read(self, uuid: str, offset_bytes: int, length_bytes: int) -> bytes:
        """Bytes of a disk. Raises Failure VDI_MISSING."""
        data = bytearray(length_bytes)
        self.read_into(uuid, offset_bytes, memoryview(data))
        return bytes(data)

    def write(self, uuid: str, offset_bytes: int, data: bytes | memoryview) -> None:
        """Write anywhere within a disk and track it. Raises Failure VDI_MISSING."""
        node = self.node(uuid)
        end = offset_bytes + len(data)
        assert 0 <= offset_bytes <= end <= node.size_bytes, (offset_bytes, end, node.size_bytes)
        with node.lock:
            # A host writes sectors; over a parent whole units are what a file on a share tells apart.
            unit = SECTOR if node.sr in self.shares and node.parent is None else UNIT
            before, after = offset_bytes % unit, -end % unit
            if before or after:
                whole = bytearray(before + len(data) + after)
                self.read_into(uuid, offset_bytes - before, memoryview(whole))
                whole[before : before + len(data)] = data
                node.layer.write(offset_bytes - before, whole)
            elif data:
                node.layer.write(offset_bytes, data)
            self.tracking.mark(uuid, offset_bytes, len(data))
            if mirror := self._mirrors.get(uuid):
                self.write(mirror, offset_bytes, data)

    def import_file(self, uuid: str, path: Path) -> None:
        """Fill a disk from a raw image: holes stay holes, nothing is tracked. Raises Failure VDI_MISSING."""
        node = self.node(uuid)
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size_bytes = os.fstat(source).st_size
            assert size_bytes <= node.size_bytes, f"the image has {size_bytes} bytes, the VDI {node.size_bytes}"
            with node.lock:
                for offset, length in data_ranges(source, size_bytes):
                    # Ends that are no whole units are zeros in a fresh layer; bytes of the image all the same.
                    start, end = offset // UNIT * UNIT, min(-(-(offset + length) // UNIT) * UNIT, size_bytes)
                    copy_range(source, start, node.layer.open(), start, end - start)
                    node.layer.add(start, end - start)
        finally:
            os.close(source)

    def snapshot(self, uuid: str, new_uuid: str, *, tracked: bool) -> Node | None:
        """A second disk with the same content; returns the base made for both, None if an old one serves.

        ``tracked``: the log of the disk goes with the new one. Raises Failure.
        """
        node = self.node(uuid)
        with node.lock, self.lock:
            if node.raw:
                raise Failure("UNIMPLEMENTED_IN_SM_BACKEND", "", "VDI.snapshot", "")
            if len(self.chain(node)) >= CHAIN_MOST:
                raise backend_failure(109, "The snapshot chain is too long")
            base = None
            if not node.layer.empty or node.parent is None:
                base = Node(str(uuids.uuid4()), node.sr, node.size_bytes, node.layer, node.parent, hidden=True)
                base.layer.link(base.uuid)
                self.nodes[base.uuid] = base
                node.layer, node.parent = self._layer(uuid, node.sr, node.size_bytes, base.layer), base
                base.layer.hide()
            layer = self._layer(new_uuid, node.sr, node.size_bytes, node.parent.layer if node.parent else None)
            self.nodes[new_uuid] = Node(new_uuid, node.sr, node.size_bytes, layer, node.parent)
            self._srs[new_uuid] = node.sr
            if tracked:
                self.tracking.rotate(uuid, new_uuid)
            return base

    def copy(self, uuid: str, target: str, progress: Callable[[float], None] = lambda _: None) -> None:
        """Write the content of a disk into another that is at least as long; ``progress`` is told how much is done."""
        node = self.node(uuid)
        blocks = allocated(self.chain(node), node.size_bytes).nonzero()[0].tolist()
        for done, index in enumerate(blocks):
            start = index * BLOCK
            data = bytearray(min(BLOCK, node.size_bytes - start))
            with node.lock:  # a mirror has either got a write from here, or gets it afterwards
                read_chain(self.chain(node), start, memoryview(data))
                self.write(target, start, memoryview(data))
            progress((done + 1) / len(blocks))

    @contextmanager
    def mirror(self, uuid: str, target: str) -> Iterator[None]:
        """As long as it lasts, what is written to a disk is written to another too."""
        node = self.node(uuid)
        with node.lock:
            self._mirrors[uuid] = target
        try:
            yield
        finally:
            with node.lock:
                del self._mirrors[uuid]

    # Shares

    def introduce(self, sr: str) -> Share | None:
        """The share of an SR that somebody else has prepared; None if the SR is one of ours."""
        with self.lock:
            if sr in self._made:
                return None
            return self.shares.setdefault(sr, Share(sr, self._dir / f"share-{sr}"))

    def scan(self, share: Share) -> None:
        """Take over the disks that are in a share now. Raises Failure SR_BACKEND_FAILURE_40."""
        with ExitStack() as still:
            for node in self.members(share.sr):
                still.enter_context(node.lock)
            found = share.scan()
            still.enter_context(self.lock)
            for uuid in [node.uuid for node in self.members(share.sr) if node.uuid not in found]:
                del self.nodes[uuid]
            for uuid, layer in found.items():
                known = self.nodes.get(uuid)
                node = known or Node(uuid, share.sr, layer.size_bytes, layer, raw=isinstance(layer, RawLayer))
                node.layer, node.size_bytes, node.hidden = layer, layer.size_bytes, layer.hidden
                self.nodes[uuid], self._srs[uuid] = node, share.sr
            for uuid, layer in found.items():
                self.nodes[uuid].parent = self.nodes[layer.parent] if layer.parent else None

    def forget(self, sr: str) -> None:
        """A share is known no more; its files stay."""
        with self.lock:
            share = self.shares.pop(sr, None)
            if share is not None:
                share.close()
                for node in self.members(sr):
                    del self.nodes[node.uuid]

    def resize(self, uuid: str, size_bytes: int) -> None:
        """Grow a disk. Raises Failure VDI_MISSING."""
        node = self.node(uuid)
        with node.lock:
            node.layer.grow(size_bytes)
            node.size_bytes = size_bytes
            self.tracking.resize(uuid, size_bytes)

    def drop_data(self, uuid: str) -> None:
        """Remove a disk; its log stays, and bases it leaves behind are for the coalescer."""
        node = self.node(uuid)
        with node.lock, self.lock:
            node.layer.remove()
            del self.nodes[uuid]

    def destroy(self, uuid: str) -> None:
        """Remove a disk and its log, or what data_destroy has left of it."""
        if self.find(uuid):
            self.drop_data(uuid)
        self.tracking.remove(uuid)

    def drop_sr(self, sr: str) -> None:
        """Remove everything of an SR."""
        with self.gc_lock, self.lock:
            for node in self.members(sr):
                self.nodes.pop(node.uuid)
            for uuid in [uuid for uuid, owner in self._srs.items() if owner == sr]:
                self.tracking.remove(uuid)

    def blocks(self, uuid: str, base: str | None = None) -> NDArray[np.bool_]:
        """The 2 MiB blocks that some BAT of the chain has; with ``base`` only of layers the two do not share."""
        node = self.node(uuid)
        layers = self.chain(node)
        if base is not None:
            other = self.chain(self.node(base))
            layers = [layer for layer in layers if layer not in other] + [one for one in other if one not in layers]
        return allocated(layers, node.size_bytes)

    def utilisation(self, node: Node) -> int:
        """Bytes the layer of a node takes, or would take, as a VHD file."""
        return node.layer.stored_bytes()

    def _place(self, sr: str) -> Path:
        path = self._dir / f"sr-{sr}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _layer(self, uuid: str, sr: str, size_bytes: int, parent: Layer | None = None) -> Layer:
        if share := self.shares.get(sr):
            return share.create(uuid, size_bytes, parent if isinstance(parent, VhdLayer) else None)
        self._names += 1
        return Layer(self._place(sr) / f"layer-{self._names}", size_bytes)
