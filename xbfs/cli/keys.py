"""init and the key verbs."""

from __future__ import annotations

import os
import pwd
from typing import TYPE_CHECKING

from xbfs.cli import text
from xbfs.cli.context import new_passphrase, repository_of, storage_of
from xbfs_engine.codec.keys import Role
from xbfs_engine.core.errors import KeySlotNotFound, RepositoryExists, UsageError
from xbfs_engine.core.runtime import system_runtime
from xbfs_engine.store.repository import CONFIGS, create_repository

if TYPE_CHECKING:
    import argparse

    from xbfs.cli.output import Output
    from xbfs_engine.codec.slots import Slot
    from xbfs_engine.store.repository import ListedSlot


def init(arguments: argparse.Namespace, output: Output) -> None:
    """Create a repository."""
    storage = storage_of(arguments)
    if any(True for _ in storage.list_blobs(CONFIGS)):
        raise RepositoryExists(f"{storage.location()} holds a repository already")
    secret = new_passphrase("XBFS_PASSPHRASE")
    created = create_repository(storage, system_runtime(), passphrase=secret, label=arguments.label or _user_at_host())
    repository = created.repository
    output.result(
        {"repository": storage.location(), "repository_id": repository.id, "recovery_code": created.recovery_code}
    )
    output.say(f"created repository {repository.id} in {storage.location()}")
    _say_recovery_code(created.recovery_code, output)


def list_slots(arguments: argparse.Namespace, output: Output) -> None:
    """List the key slots."""
    listed = repository_of(arguments).list_slots()
    output.result({"slots": [_listed_record(item) for item in listed]})
    rows = [("SLOT", "KIND", "ROLE", "CREATED", "LABEL")]
    for item in listed:
        if item.slot is None:
            rows.append((item.slot_id, "-", "-", "-", "damaged"))
        else:
            slot = item.slot
            rows.append((slot.slot_id, slot.kind.value, slot.role.value, text.when(slot.created_ns), slot.label))
    for line in text.table(rows):
        output.say(line)
    for item in listed:
        if item.problem is not None:
            output.warn(item.problem.message, "remove it with `xbfs key remove`, or restore it from a copy")


def add(arguments: argparse.Namespace, output: Output) -> None:
    """Add a key slot."""
    repository = repository_of(arguments)
    role, label = Role(arguments.role), arguments.label or _user_at_host()
    if arguments.recovery:
        added = repository.add_recovery_slot(role=role, label=label)
        output.result({"slot": _slot_record(added.slot), "recovery_code": added.code})
        output.say(f"added key slot {added.slot.slot_id}: a recovery code for the {role.value}")
        _say_recovery_code(added.code, output)
        return
    slot = repository.add_slot(new_passphrase("XBFS_NEW_PASSPHRASE"), role=role, label=label)
    output.result({"slot": _slot_record(slot)})
    output.say(f"added key slot {slot.slot_id}: a passphrase for the {role.value}")


def remove(arguments: argparse.Namespace, output: Output) -> None:
    """Remove a key slot."""
    repository = repository_of(arguments)
    wanted: str = arguments.slot
    found = [item for item in repository.list_slots() if item.slot_id.startswith(wanted)]
    if not found:
        raise KeySlotNotFound(f"no key slot has an id that begins with {wanted!r}")
    if len(found) > 1:
        ids = ", ".join(item.slot_id for item in found)
        raise UsageError(f"{wanted!r} could be any of the key slots {ids}", hint="give more digits of the id")
    slot = found[0].slot
    what = "damaged" if slot is None else f"{slot.kind.value}, {slot.role.value}, {slot.label!r}"
    output.result({"slot_id": found[0].slot_id, "removed": not arguments.dry_run})
    if arguments.dry_run:
        output.say(f"would remove key slot {found[0].slot_id} ({what})")
        return
    repository.remove_slot(found[0].slot_id)
    output.say(f"removed key slot {found[0].slot_id} ({what})")


def _say_recovery_code(code: str, output: Output) -> None:
    output.say()
    output.say(f"  recovery code: {code}")
    output.say()
    output.say(
        "It opens the repository like the passphrase and is shown only now. Write it down, and keep it apart from"
    )
    output.say("the repository. Without passphrase and recovery code nobody can read the backups, ever.")


def _slot_record(slot: Slot) -> dict[str, object]:
    return {
        "slot_id": slot.slot_id,
        "kind": slot.kind.value,
        "role": slot.role.value,
        "label": slot.label,
        "created": text.when(slot.created_ns),
    }


def _listed_record(item: ListedSlot) -> dict[str, object]:
    if item.slot is not None:
        return _slot_record(item.slot)
    return {"slot_id": item.slot_id, "problem": item.problem.message if item.problem else ""}


def _user_at_host() -> str:
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        user = f"uid {os.geteuid()}"
    return f"{user}@{os.uname().nodename}"
