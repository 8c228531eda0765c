"""The pool that one restores to: its SR and its networks, found by what a user calls them. Pure, on what was read."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

from xbfs_engine.core.errors import ObjectNotFound, VmNotReady
from xbfs_engine.source.xapi.fields import Fields
from xbfs_engine.source.xapi.inventory import take_inventory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xbfs_engine.source.xapi.inventory import Inventory, Sr
    from xbfs_engine.source.xapi.session import Ref, Xapi

_SHOWN_MAX = 20


class Network(NamedTuple):
    """A network of the pool."""

    ref: Ref
    uuid: str
    name: str
    bridge: str


class Target(NamedTuple):
    """A pool as it is now."""

    inventory: Inventory
    networks: Sequence[Network]


async def look_at(xapi: Xapi) -> Target:
    """Read a pool. Raises PoolError."""
    inventory = await take_inventory(xapi)
    networks = []
    for ref, record in (await xapi.records("network")).items():
        fields = Fields("network", ref, record)
        networks.append(Network(ref, fields.text("uuid"), fields.text("name_label"), fields.text("bridge", "")))
    return Target(inventory, networks)


def sr_called(target: Target, text: str) -> Sr:
    """The SR with this name or uuid, fit for disks. Raises ObjectNotFound, VmNotReady."""
    disks = [sr for sr in target.inventory.srs.values() if sr.content_type != "iso"]
    sr = _called(disks, text, "SR")
    if not sr.hosts:
        raise VmNotReady(f"SR {sr.name} is connected to no host", hint="connect it: `xe pbd-plug`")
    return sr


def network_called(target: Target, text: str) -> Network:
    """The network with this name or uuid. Raises ObjectNotFound."""
    return _called(target.networks, text, "network")


T = TypeVar("T", "Sr", Network)


def _called(candidates: Sequence[T], text: str, what: str) -> T:
    found = [one for one in candidates if one.uuid == text] or [one for one in candidates if one.name == text]
    if len(found) == 1:
        return found[0]
    if found:
        uuids = ", ".join(sorted(one.uuid for one in found)[:_SHOWN_MAX])
        raise ObjectNotFound(f"{len(found)} {what}s of the pool are called {text!r}", hint=f"give a uuid: {uuids}")
    raise ObjectNotFound(f"the pool has no {what} {text!r}", hint=f"it has: {names_of(candidates)}")


def names_of(candidates: Sequence[Sr] | Sequence[Network]) -> str:
    """What there is to choose from, for a hint."""
    names = sorted({one.name for one in candidates if one.name})
    return ", ".join(names[:_SHOWN_MAX]) + (" …" if len(names) > _SHOWN_MAX else "") or "none"
