"""The objects of the pool: every class of the schema, back references, generations for events.

Any thread may call it; one re-entrant lock guards the whole world. Hold ``lock`` to make several steps one, never
while sleeping or moving bulk data.
"""

from __future__ import annotations

import threading
import uuid as uuids
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from . import schema
from .failures import Failure
from .schema import NULL, Record, Ref, Value

if TYPE_CHECKING:
    from collections.abc import Iterator

# (class, field that points) -> (class, field that lists who points), as the datamodel's relations say.
RELATIONS: Final[dict[tuple[str, str], tuple[str, str]]] = {
    ("VBD", "VM"): ("VM", "VBDs"),
    ("VBD", "VDI"): ("VDI", "VBDs"),
    ("VIF", "VM"): ("VM", "VIFs"),
    ("VIF", "network"): ("network", "VIFs"),
    ("VTPM", "VM"): ("VM", "VTPMs"),
    ("VM", "snapshot_of"): ("VM", "snapshots"),
    ("VM", "parent"): ("VM", "children"),
    ("VM", "resident_on"): ("host", "resident_VMs"),
    ("VM", "appliance"): ("VM_appliance", "VMs"),
    ("VDI", "SR"): ("SR", "VDIs"),
    ("VDI", "snapshot_of"): ("VDI", "snapshots"),
    ("PBD", "SR"): ("SR", "PBDs"),
    ("PBD", "host"): ("host", "PBDs"),
    ("PIF", "host"): ("host", "PIFs"),
    ("PIF", "network"): ("network", "PIFs"),
    ("host_cpu", "host"): ("host", "host_CPUs"),
    ("Certificate", "host"): ("host", "certificates"),
    ("console", "VM"): ("VM", "consoles"),
    ("task", "subtask_of"): ("task", "subtasks"),
}
_MAX_DELETED: Final = 10_000


@dataclass(slots=True)
class _Entry:
    cls: str
    fields: Record
    created: int
    modified: int


class Change(NamedTuple):
    """What event.from tells of one object since a generation."""

    generation: int
    cls: str
    operation: str
    ref: Ref
    uuid: str


class Database:
    """The objects of one pool."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._entries: dict[Ref, _Entry] = {}
        self._by_class: dict[str, dict[Ref, None]] = {name: {} for name in schema.classes()}
        self._by_uuid: dict[str, Ref] = {}
        self._deleted: list[tuple[Change, int]] = []
        self._generation = 0

    def create(self, cls: str, /, **fields: Value) -> Ref:
        """A new object; fields not given have their published default. A uuid is made unless given."""
        known = schema.classes()[cls].fields
        unknown = fields.keys() - known.keys()
        assert not unknown, f"{cls} has no {unknown}"
        with self.lock:
            values = {name: _copy(fields.get(name, field.default)) for name, field in known.items()}
            ref = f"OpaqueRef:{uuids.uuid4()}"
            if "uuid" in known:
                values["uuid"] = values["uuid"] or str(uuids.uuid4())
                assert str(values["uuid"]) not in self._by_uuid, f"a second {cls} {values['uuid']}"
                self._by_uuid[str(values["uuid"])] = ref
            self._generation += 1
            self._entries[ref] = _Entry(cls, values, self._generation, self._generation)
            self._by_class[cls][ref] = None
            for name in known:
                self._link(ref, name, values[name])
            self.changed.notify_all()
            return ref

    def destroy(self, ref: Ref) -> None:
        """Remove an object; who listed it no longer does, who pointed to it keeps a dangling reference."""
        with self.lock:
            entry = self._entry(ref)
            for name in entry.fields:
                self._unlink(ref, name)
            del self._entries[ref]
            del self._by_class[entry.cls][ref]
            uuid = str(entry.fields.get("uuid", ""))
            self._by_uuid.pop(uuid, None)
            self._generation += 1
            self._deleted.append((Change(self._generation, entry.cls, "del", ref, uuid), entry.created))
            del self._deleted[:-_MAX_DELETED]
            self.changed.notify_all()

    def get(self, ref: Ref) -> Record:
        """A copy of the record. Raises Failure HANDLE_INVALID."""
        with self.lock:
            return {name: _copy(value) for name, value in self._entry(ref).fields.items()}

    def field(self, ref: Ref, name: str) -> Value:
        """A copy of one field. Raises Failure HANDLE_INVALID."""
        with self.lock:
            return _copy(self._entry(ref).fields[name])

    def text(self, ref: Ref, name: str) -> str:
        """A field that holds a string, an enumeration or a reference."""
        value = self.field(ref, name)
        assert isinstance(value, str)
        return value

    def number(self, ref: Ref, name: str) -> int:
        """A field that holds an integer."""
        value = self.field(ref, name)
        assert isinstance(value, int)
        return value

    def flag(self, ref: Ref, name: str) -> bool:
        """A field that holds a truth value."""
        value = self.field(ref, name)
        assert isinstance(value, bool)
        return value

    def date(self, ref: Ref, name: str) -> datetime:
        """A field that holds a date."""
        value = self.field(ref, name)
        assert isinstance(value, datetime)
        return value

    def refs(self, ref: Ref, name: str) -> list[str]:
        """A field that holds a set of references or strings."""
        return cast("list[str]", self.field(ref, name))

    def mapping(self, ref: Ref, name: str) -> dict[str, str]:
        """A field that maps strings to strings."""
        return cast("dict[str, str]", self.field(ref, name))

    def set(self, ref: Ref, /, **fields: Value) -> None:
        """Change fields at once; nothing is told if nothing changes. Raises Failure HANDLE_INVALID."""
        with self.lock:
            entry = self._entry(ref)
            changes = {name: value for name, value in fields.items() if entry.fields[name] != value}
            for name, value in changes.items():
                self._unlink(ref, name)
                entry.fields[name] = _copy(value)
                self._link(ref, name, value)
            if changes:
                self._touch(entry)

    def all(self, cls: str) -> list[Ref]:
        """The references of every object of a class, oldest first."""
        with self.lock:
            return list(self._by_class[cls])

    def where(self, cls: str, /, **fields: Value) -> list[Ref]:
        """The objects of a class whose fields equal the given values."""
        with self.lock:
            return [ref for ref in self._by_class[cls] if all(self.field(ref, k) == v for k, v in fields.items())]

    def by_uuid(self, cls: str, uuid: str) -> Ref:
        """The object of a class with a uuid. Raises Failure UUID_INVALID."""
        with self.lock:
            ref = self._by_uuid.get(uuid)
            if ref is None or self._entries[ref].cls != cls:
                raise Failure("UUID_INVALID", cls, uuid)
            return ref

    def exists(self, ref: Ref) -> bool:
        """Whether the object is there."""
        with self.lock:
            return ref in self._entries

    def cls(self, ref: Ref) -> str:
        """The class of an object. Raises Failure HANDLE_INVALID."""
        with self.lock:
            return self._entry(ref).cls

    def check(self, cls: str, ref: Ref) -> Ref:
        """The reference itself if it is of the class. Raises Failure HANDLE_INVALID [cls, ref]."""
        with self.lock:
            if ref not in self._by_class[cls]:
                raise Failure("HANDLE_INVALID", cls, ref)
            return ref

    @property
    def generation(self) -> int:
        """Grows with every change."""
        with self.lock:
            return self._generation

    def touch(self, ref: Ref) -> None:
        """Tell watchers of an object though nothing changed (event.inject)."""
        with self.lock:
            self._touch(self._entry(ref))

    def changes(self, since: int) -> Iterator[Change]:
        """What happened after generation ``since``, once per object, in the order of the last change."""
        with self.lock:
            found = [change for change, created in self._deleted if change.generation > since >= created]
            for ref, entry in self._entries.items():
                if entry.modified > since:
                    operation = "add" if entry.created > since else "mod"
                    uuid = str(entry.fields.get("uuid", ""))
                    found.append(Change(entry.modified, entry.cls, operation, ref, uuid))
        return iter(sorted(found))

    def _entry(self, ref: Ref) -> _Entry:
        try:
            return self._entries[ref]
        except KeyError:
            gone = next((change.cls for change, _ in reversed(self._deleted) if change.ref == ref), "object")
            raise Failure("HANDLE_INVALID", gone, ref) from None

    def _touch(self, entry: _Entry) -> None:
        self._generation += 1
        entry.modified = self._generation
        self.changed.notify_all()

    def _link(self, ref: Ref, name: str, value: Value) -> None:
        self._relate(ref, name, value, present=True)

    def _unlink(self, ref: Ref, name: str) -> None:
        self._relate(ref, name, self._entries[ref].fields[name], present=False)

    def _relate(self, ref: Ref, name: str, target: Value, *, present: bool) -> None:
        relation = RELATIONS.get((self._entries[ref].cls, name))
        if relation is None or not isinstance(target, str) or target == NULL or target not in self._entries:
            return
        parent = self._entries[target]
        listed = [item for item in cast("list[str]", parent.fields[relation[1]]) if item != ref]
        parent.fields[relation[1]] = [*listed, ref] if present else listed
        self._touch(parent)


def _copy(value: Value) -> Value:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_copy(item) for item in value]
    return value
