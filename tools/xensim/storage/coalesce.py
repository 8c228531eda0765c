"""What SM's garbage collector does to trees: unused bases go, bases with a single child are merged (SM, cleanup.py).

One pass at a time (``DiskStore.gc_lock``); disks stay readable and writable meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .store import DiskStore, Node


class Merged(NamedTuple):
    """One step: ``removed`` is no more, ``parents`` are the new parents (None: none) of nodes by uuid."""

    removed: str
    parents: Mapping[str, str | None]


def step(store: DiskStore, allowed: Callable[[Node], bool]) -> Merged | None:
    """Do one thing that is due among nodes that ``allowed`` accepts; None if nothing is.

    ``allowed`` is asked about the node that would go away into another: a hidden one, or a leaf for leaf coalesce.
    """
    with store.gc_lock:
        for node in list(store.nodes.values()):
            if not node.hidden:
                continue
            children = store.children(node)
            if not children and allowed(node):
                with store.lock:
                    del store.nodes[node.uuid]
                return Merged(node.uuid, {})
            if len(children) == 1 and allowed(children[0]):
                return _inner(store, node, children[0]) if children[0].hidden else _leaf(store, node, children[0])
    return None


def _inner(store: DiskStore, parent: Node, child: Node) -> Merged:
    """The data of a hidden child goes down into its parent; grandchildren hang on to the parent."""
    parent.layer.absorb(child.layer)
    with store.lock:
        parent.size_bytes = child.size_bytes
        moved = store.children(child)
        for node in moved:
            node.parent = parent
        del store.nodes[child.uuid]
    return Merged(child.uuid, {node.uuid: parent.uuid for node in moved})


def _leaf(store: DiskStore, parent: Node, leaf: Node) -> Merged | None:
    """The data of a disk goes down into its base, which then takes the place and name of the disk."""
    with leaf.lock:
        if store.find(leaf.uuid) is not leaf or leaf.parent is not parent or len(store.children(parent)) != 1:
            return None
        parent.layer.absorb(leaf.layer)
        parent.layer.grow(leaf.size_bytes)
        with store.lock:
            leaf.layer, leaf.parent = parent.layer, parent.parent
            del store.nodes[parent.uuid]
    return Merged(parent.uuid, {leaf.uuid: leaf.parent.uuid if leaf.parent else None})
