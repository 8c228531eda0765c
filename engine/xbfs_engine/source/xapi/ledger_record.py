"""The lines of a ledger: what a run noted of the objects it made on a pool, and what follows from them. Pure.

A ledger is JSON, one event a line. A line that can not be decoded is skipped: it was torn by a crash before whatever
it announces was done, since every line is durable before its deed (``ledger``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from xbfs_engine.source.xapi.markers import is_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

VERSION: Final = 1

_TEXT_MAX: Final = 4096
"""Characters of any text in a ledger: names of VMs are the longest."""


class Kind(StrEnum):
    """What an item of a ledger is. The texts are also the marker's kind."""

    SNAPSHOT = "snapshot"  # a snapshot VM; about: name, of the VM (markers.snapshot_name)
    VDI = "vdi"  # a VDI of a snapshot, or one that was created
    VM = "vm"  # a VM that is being restored; about: name, that it gets in the end (markers.import_name)
    BLOCK = "block"  # blocked operations of a VM
    SWITCH = "switch"  # a key in other_config of an SR; about: sr, key, value, before
    SR = "sr"  # a temporary SR: forgotten, never destroyed


@dataclass(frozen=True, slots=True)
class Keep:
    """A VDI that stays: the base of the next delta.

    ``slot``: whose base (``markers.slot_of``); the newest by ``kept_ns`` counts. ``confirmed``: its restore point is
    durable. ``with_data``: its data stay too, not only its changed-block log.
    """

    slot: str
    kept_ns: int
    confirmed: bool
    with_data: bool


@dataclass(frozen=True, slots=True)
class Item:
    """Something made, or about to be made, on the pool. ``uuid`` is empty until it is known."""

    number: int
    kind: Kind
    intended_ns: int
    vm_uuid: str = ""
    about: Mapping[str, str] = field(default_factory=dict)
    uuid: str = ""
    keep: Keep | None = None


@dataclass(slots=True)
class RunRecord:
    """What a ledger says. ``items``: by number, without those that are gone. ``readable``: of a version we know."""

    run: str
    node: str = ""
    started_ns: int = 0
    items: dict[int, Item] = field(default_factory=dict)
    last_number: int = 0
    readable: bool = True

    def apply(self, event: Mapping[str, object]) -> None:
        """Take in one event; one that makes no sense is ignored."""
        match event:
            case {"do": "run", "version": int() as version, "node": str() as node, "started_ns": int() as started_ns}:
                self.readable = version == VERSION
                self.node, self.started_ns = node, started_ns
            case {"do": "intend", "item": int() as number, "kind": str() as kind, "at": int() as at, **rest}:
                about = rest.get("about")
                if kind not in set(Kind) or not isinstance(about, dict) or number in self.items:
                    return
                about = {str(key): str(value) for key, value in about.items()}
                self.items[number] = Item(number, Kind(kind), at, str(rest.get("vm", "")), about)
                self.last_number = max(self.last_number, number)
            case {"do": "gone", "item": int() as number}:
                self.items.pop(number, None)
            case {"item": int() as number} if number in self.items:
                self.items[number] = _changed(self.items[number], event)


def intend(item: Item) -> dict[str, object]:
    """The event that begins an item."""
    fields = {"kind": item.kind.value, "at": item.intended_ns, "vm": item.vm_uuid, "about": dict(item.about)}
    return {"do": "intend", "item": item.number, **fields}


def begin(record: RunRecord) -> dict[str, object]:
    """The first event of a ledger."""
    head: dict[str, object] = {"do": "run", "version": VERSION, "run": record.run}
    return head | {"node": record.node, "started_ns": record.started_ns}


def made(number: int, uuid: str) -> dict[str, object]:
    """The object exists and has this uuid."""
    return {"do": "made", "item": number, "uuid": uuid}


def kept(number: int, keep: Keep) -> dict[str, object]:
    """The VDI stays."""
    fields = {"slot": keep.slot, "kept_ns": keep.kept_ns, "confirmed": keep.confirmed, "with_data": keep.with_data}
    return {"do": "keep", "item": number, **fields}


def gone(number: int) -> dict[str, object]:
    """The object is gone, or nobody's business any more."""
    return {"do": "gone", "item": number}


def encode(events: Iterable[Mapping[str, object]]) -> bytes:
    """Lines."""
    return b"".join(json.dumps(event, separators=(",", ":")).encode() + b"\n" for event in events)


def compact(record: RunRecord) -> bytes:
    """The shortest ledger that says the same."""
    events = [begin(record)]
    for item in record.items.values():
        events.append(intend(item))
        if item.uuid:
            events.append(made(item.number, item.uuid))
        if item.keep is not None:
            events.append(kept(item.number, item.keep))
    return encode(events)


def decode(run: str, content: bytes) -> RunRecord:
    """What the ledger of ``run`` says. Never fails: what can not be decoded is skipped."""
    assert is_run(run)
    record = RunRecord(run)
    for line in content.split(b"\n"):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and _is_bounded(event):
            record.apply(event)
    if not record.readable:
        record.items.clear()
    return record


def _changed(item: Item, event: Mapping[str, object]) -> Item:
    match event:
        case {"do": "made", "uuid": str() as uuid}:
            return replace(item, uuid=uuid)
        case {
            "do": "keep",
            "slot": str() as slot,
            "kept_ns": int() as kept_ns,
            "confirmed": bool() as confirmed,
            "with_data": bool() as with_data,
        }:
            return replace(item, keep=Keep(slot, kept_ns, confirmed, with_data))
        case _:
            return item


def _is_bounded(event: Mapping[str, object]) -> bool:
    return all(len(value) <= _TEXT_MAX for value in event.values() if isinstance(value, str))
