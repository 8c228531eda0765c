"""How we mark what we make on a pool, so that it is known as ours, and never what somebody copied of it. Pure.

Markers are keys of other_config. XAPI copies other_config to snapshots, clones and copies (xen-api, xapi_vm_clone and
xapi_vdi), so a marker also names the object it was put on: a copy names another one. An object whose uuid is not
known when it is made gets its marker without that, and the uuid right afterwards; until then the number of its item
in the ledger tells it. Blocked operations carry their marker in the text of the reason.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PREFIX: Final = "xbfs:"
RUN_KEY: Final = "xbfs:run"
NODE_KEY: Final = "xbfs:node"
VM_KEY: Final = "xbfs:vm"
MADE_KEY: Final = "xbfs:made"
KIND_KEY: Final = "xbfs:kind"
ITEM_KEY: Final = "xbfs:item"
SELF_KEY: Final = "xbfs:self"
SLOT_KEY: Final = "xbfs:slot"

RUN_DIGITS: Final = 16
_RUN: Final = re.compile(rf"[0-9a-f]{{{RUN_DIGITS}}}")
_REASON: Final = re.compile(rf"xbfs run ({_RUN.pattern}) of node (.{{1,255}}) is at work on this VM", re.DOTALL)
_NAME_MAX: Final = 80
"""Characters of a VM's name in the name of what we make: lists stay readable."""

BLOCKED_OPERATIONS: Final = ("pool_migrate", "migrate_send")
"""What a VM must not do while its disks are read: migration ends changed-block tracking."""


@dataclass(frozen=True, slots=True)
class Marker:
    """Who made an object, and for what.

    ``item``: its number in the run's ledger. ``vm_uuid``: the VM it was made for, or empty. ``made``: ISO time.
    ``self_uuid``: the object's own uuid, empty until known. ``slot``: which base of a delta it is, see ``slot_of``.
    """

    run: str
    node: str
    item: int
    kind: str
    vm_uuid: str
    made: str
    self_uuid: str = ""
    slot: str = ""

    def of(self, uuid: str) -> Self:
        """The same on the object with this uuid."""
        return replace(self, self_uuid=uuid)

    def to_other_config(self) -> dict[str, str]:
        """Keys and values for other_config."""
        pairs = {
            RUN_KEY: self.run,
            NODE_KEY: self.node,
            ITEM_KEY: str(self.item),
            KIND_KEY: self.kind,
            VM_KEY: self.vm_uuid,
            MADE_KEY: self.made,
            SELF_KEY: self.self_uuid,
            SLOT_KEY: self.slot,
        }
        return {key: value for key, value in pairs.items() if value}

    def is_on(self, uuid: str) -> bool:
        """Whether the marker was put on the object with this uuid, as far as it says."""
        return self.self_uuid in {"", uuid}


def marker_of(other_config: Mapping[str, str]) -> Marker | None:
    """The marker in an object's other_config; None if there is none, or none that we wrote."""
    run, item = other_config.get(RUN_KEY, ""), other_config.get(ITEM_KEY, "")
    node, kind = other_config.get(NODE_KEY, ""), other_config.get(KIND_KEY, "")
    if not (is_run(run) and node and kind and item.isascii() and item.isdigit() and len(item) < 10):
        return None
    return Marker(
        run=run,
        node=node,
        item=int(item),
        kind=kind,
        vm_uuid=other_config.get(VM_KEY, ""),
        made=other_config.get(MADE_KEY, ""),
        self_uuid=other_config.get(SELF_KEY, ""),
        slot=other_config.get(SLOT_KEY, ""),
    )


def is_run(text: str) -> bool:
    """Whether a text is the id of a run."""
    return _RUN.fullmatch(text) is not None


def slot_of(repository_id: str, vm_uuid: str, disk: int) -> str:
    """What a base is the base of: the next delta of this disk in this repository."""
    return f"{repository_id}/{vm_uuid}/{disk}"


def slots_of(repository_id: str, slots: Iterable[str]) -> list[str]:
    """Those of ``slots`` that are of this repository."""
    return [slot for slot in slots if slot.startswith(f"{repository_id}/")]


def snapshot_name(run: str, item: int, vm_name: str) -> str:
    """The name of a snapshot VM: alone in the world through the run's id."""
    return f"xbfs {run}-{item} {_short(vm_name)}"


def import_name(run: str, item: int, vm_name: str) -> str:
    """The name of a VM while it is being restored."""
    return f"[Importing xbfs {run}-{item}] {_short(vm_name)}"


def block_reason(run: str, node: str) -> str:
    """Why an operation of a VM is blocked; people read it, and a sweep knows it again."""
    return f"xbfs run {run} of node {node} is at work on this VM; it is allowed again when that ends"


def run_of_reason(reason: str) -> tuple[str, str] | None:
    """The run and node that blocked an operation; None if it was not one of ours."""
    found = _REASON.match(reason)
    return (found[1], found[2]) if found else None


def _short(name: str) -> str:
    """Without control characters, which XML can not carry."""
    return "".join(char if char.isprintable() else "?" for char in name[:_NAME_MAX])
