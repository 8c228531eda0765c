"""What XAPI's error codes mean, what to do about each, and the typed error for one. Pure.

Codes and parameters: xen-api datamodel_errors.ml; SR_BACKEND_FAILURE_n: SM's XE_SR_ERRORCODES.xml. Session references,
NBD export names and passwords that XAPI puts into parameters never reach a message.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from xbfs_engine.core.errors import LoginRefused, PoolError, XapiFailure

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TASK_TIMEOUT: Final = "XBFS_TASK_TIMEOUT"
"""Our own code: a task did not end by its deadline."""

SESSION_INVALID: Final = "SESSION_INVALID"
HOST_IS_SLAVE: Final = "HOST_IS_SLAVE"

_PARAMETER_MAX: Final = 500
"""Characters of one parameter that are kept: SM puts whole stack traces into them."""


class Handling(Enum):
    """What a caller can do about a failure."""

    BUSY = "busy"  # something else works on the object: again later, with growing delays
    TRANSIENT = "transient"  # host or service trouble that passes
    GONE = "gone"  # the object is not there any more
    UNSUPPORTED = "unsupported"  # this pool, licence, SR or release can not do it: take the fall-back
    REFUSED = "refused"  # the state or a person forbids it: report


class Meaning(NamedTuple):
    """What a code says to a person."""

    text: str
    hint: str
    handling: Handling


_BUSY, _TRANSIENT, _GONE, _UNSUPPORTED, _REFUSED = Handling
_LATER = "it is tried again by the next run"
_SR = "look at the SR on its host: `xe sr-scan`, /var/log/SMlog"
_SPACE = "free space on the SR, or let it coalesce old snapshots"
_HOSTS = "see that the pool's hosts are up, then run it again"

_MEANINGS: Final[dict[str, Meaning]] = {
    "SR_BACKEND_FAILURE_44": Meaning("the SR has no room for a snapshot", _SPACE, _REFUSED),
    "SR_FULL": Meaning("the SR is full", _SPACE, _REFUSED),
    "SR_BACKEND_FAILURE_40": Meaning("the SR can not be scanned", _SR, _TRANSIENT),
    "SR_BACKEND_FAILURE_42": Meaning("the SR's directory is there already and not empty", _SR, _REFUSED),
    "SR_BACKEND_FAILURE_46": Meaning(
        "the disk is not available, or was not detached cleanly",
        "if it stays so, an attach flag (host_… in sm_config) was left by a crashed host",
        _TRANSIENT,
    ),
    "SR_BACKEND_FAILURE_47": Meaning("the SR is not available", _SR, _TRANSIENT),
    "SR_BACKEND_FAILURE_65": Meaning("the disk can not be loaded", _SR, _TRANSIENT),
    "SR_BACKEND_FAILURE_66": Meaning("the disk is raw: no changed-block tracking", "", _UNSUPPORTED),
    "SR_BACKEND_FAILURE_79": Meaning("a disk can not be made smaller", "", _REFUSED),
    "SR_BACKEND_FAILURE_82": Meaning("the disk is still marked as paused", _LATER, _BUSY),
    "SR_BACKEND_FAILURE_109": Meaning(
        "the disk's chain of snapshots is too long (30)",
        "delete snapshots of the VM and wait until the SR has coalesced them",
        _REFUSED,
    ),
    "SR_BACKEND_FAILURE_180": Meaning("the volume group is over-provisioned", _SR, _REFUSED),
    "SR_BACKEND_FAILURE_181": Meaning("the volume group's metadata can not be written", _SR, _REFUSED),
    "SR_BACKEND_FAILURE_457": Meaning("changed-block tracking can not be switched on", _LATER, _UNSUPPORTED),
    "SR_BACKEND_FAILURE_458": Meaning("changed-block tracking failed", _LATER, _UNSUPPORTED),
    "SR_BACKEND_FAILURE_459": Meaning("the changed-block logs contradict each other", "", _UNSUPPORTED),
    "SR_BACKEND_FAILURE_460": Meaning("the two disks have no common changed-block history", "", _UNSUPPORTED),
    "SR_BACKEND_FAILURE_1200": Meaning("the storage manager crashed", _SR, _TRANSIENT),
    "UNIMPLEMENTED_IN_SM_BACKEND": Meaning("this kind of SR can not do it", "", _UNSUPPORTED),
    "SR_OPERATION_NOT_SUPPORTED": Meaning("this kind of SR can not do it", "", _UNSUPPORTED),
    "VDI_IN_USE": Meaning("the disk is in use", _LATER, _BUSY),
    "VDI_MISSING": Meaning("the disk has gone from its SR", "", _GONE),
    "VDI_NO_CBT_METADATA": Meaning("the disk has no changed-block log", "", _UNSUPPORTED),
    "VDI_INCOMPATIBLE_TYPE": Meaning("not possible with this type of disk", "", _UNSUPPORTED),
    "VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION": Meaning(
        "the disk is reset at every boot", "leave it out of the backup", _UNSUPPORTED
    ),
    "VDI_IS_SHARABLE": Meaning("the disk is shared between VMs", "leave it out of the backup", _UNSUPPORTED),
    "VDI_CBT_ENABLED": Meaning("changed-block tracking of the disk is on", "", _REFUSED),
    "VDI_TOO_LARGE": Meaning("the disk is too large for this format", "", _UNSUPPORTED),
    "VDI_IO_ERROR": Meaning("the host can not read or write the disk", _SR, _TRANSIENT),
    "VDI_READONLY": Meaning("the disk can only be read", "", _REFUSED),
    "VDI_TOO_SMALL": Meaning("the disk is too small", "", _REFUSED),
    "VDI_LOCATION_MISSING": Meaning("a disk of the VM is not on its SR", "", _REFUSED),
    "VDI_CONTENT_ID_MISSING": Meaning("a disk of the VM is on no SR", "", _REFUSED),
    "SR_NOT_ATTACHED": Meaning("the SR is not connected", "connect it: `xe pbd-plug`", _REFUSED),
    "SR_DEVICE_IN_USE": Meaning("the SR is in use", _LATER, _BUSY),
    "SR_NOT_EMPTY": Meaning("the SR holds disks", "", _REFUSED),
    "SR_HAS_PBD": Meaning("the SR is still connected", "", _REFUSED),
    "DEFAULT_SR_NOT_FOUND": Meaning("the pool has no default SR", "name the SR", _REFUSED),
    "SR_HAS_NO_PBDS": Meaning("the SR is connected to no host", "connect it: `xe pbd-plug`", _REFUSED),
    "OTHER_OPERATION_IN_PROGRESS": Meaning("another operation works on the object", _LATER, _BUSY),
    "OPERATION_NOT_ALLOWED": Meaning("the object's state does not allow this", "", _REFUSED),
    "OPERATION_BLOCKED": Meaning("somebody blocked this operation", "see blocked_operations of the object", _REFUSED),
    "VM_BAD_POWER_STATE": Meaning("the VM's power state does not allow this", "", _REFUSED),
    "VM_HAS_PCI_ATTACHED": Meaning("the VM holds a PCI device", "", _REFUSED),
    "VM_HAS_VUSBS": Meaning("the VM holds a USB device", "", _REFUSED),
    "DEVICE_ALREADY_EXISTS": Meaning("a device of that number is there already", "", _BUSY),
    "DEVICE_ALREADY_ATTACHED": Meaning("the device is attached already", "", _BUSY),
    "DEVICE_ALREADY_DETACHED": Meaning("the device is detached already", "", _BUSY),
    "DEVICE_DETACH_REJECTED": Meaning("the guest does not let go of the device", _LATER, _BUSY),
    "DEVICE_DETACH_TIMEOUT": Meaning("the guest does not let go of the device", _LATER, _BUSY),
    "VIF_IN_USE": Meaning("the network interface is in use", "", _REFUSED),
    "VM_IS_TEMPLATE": Meaning("it is a template", "", _REFUSED),
    "VM_BIOS_STRINGS_ALREADY_SET": Meaning("the VM has BIOS strings already", "", _REFUSED),
    "VM_REQUIRES_NETWORK": Meaning("the host does not reach a network of the VM", "", _REFUSED),
    "VM_REQUIRES_SR": Meaning("the host does not reach an SR of the VM", "", _REFUSED),
    "HOST_NOT_ENOUGH_FREE_MEMORY": Meaning("no host has enough free memory", "stop another VM first", _REFUSED),
    "LICENCE_RESTRICTION": Meaning(
        "the pool's licence does not include this",
        "full reads work without it; see the section on licences in docs/xenserver.md",
        _UNSUPPORTED,
    ),
    "FEATURE_RESTRICTED": Meaning("the pool's licence does not include this", "", _UNSUPPORTED),
    "MESSAGE_METHOD_UNKNOWN": Meaning("the pool's release does not know this call", "", _UNSUPPORTED),
    "MESSAGE_PARAMETER_COUNT_MISMATCH": Meaning("the pool's release knows another form of this call", "", _UNSUPPORTED),
    "NOT_IMPLEMENTED": Meaning("the host can not do this", "", _UNSUPPORTED),
    "NOT_SUPPORTED_DURING_UPGRADE": Meaning("the pool is being upgraded", "run it again after the upgrade", _REFUSED),
    "TOO_MANY_PENDING_TASKS": Meaning("the pool has too many tasks", _LATER, _BUSY),
    "TOO_BUSY": Meaning("the pool is too busy", _LATER, _BUSY),
    "TOO_MANY_STORAGE_MIGRATES": Meaning("too many storage migrations run", _LATER, _BUSY),
    "HOST_OFFLINE": Meaning("a host is down", _HOSTS, _TRANSIENT),
    "CANNOT_CONTACT_HOST": Meaning("a host can not be reached by the pool", _HOSTS, _TRANSIENT),
    "HOST_DISABLED": Meaning("the host is disabled", "enable it: `xe host-enable`", _TRANSIENT),
    "HOST_NOT_LIVE": Meaning("a host does not answer its pool", _HOSTS, _TRANSIENT),
    "HOST_STILL_BOOTING": Meaning("the host is still booting", _HOSTS, _TRANSIENT),
    "NO_HOSTS_AVAILABLE": Meaning("no host can do this at present", _HOSTS, _TRANSIENT),
    "HOST_HAS_NO_MANAGEMENT_IP": Meaning("the host has no management address", _HOSTS, _TRANSIENT),
    HOST_IS_SLAVE: Meaning("the pool has another master", _HOSTS, _TRANSIENT),
    SESSION_INVALID: Meaning("the pool ended our session, twice in a row", _HOSTS, _TRANSIENT),
    "HANDLE_INVALID": Meaning("the object has gone", "", _GONE),
    "UUID_INVALID": Meaning("no object has this uuid", "", _GONE),
    "TASK_CANCELLED": Meaning("the task was cancelled on the pool", "", _REFUSED),
    "NETWORK_INCOMPATIBLE_PURPOSES": Meaning(
        "a pool's networks carry either NBD with TLS or without, not both", "remove purpose insecure_nbd", _REFUSED
    ),
    "IMPORT_ERROR": Meaning("the import failed", "", _REFUSED),
    "IMPORT_ERROR_PREMATURE_EOF": Meaning("the import broke off", "", _TRANSIENT),
    "IMPORT_ERROR_SOME_CHECKSUMS_FAILED": Meaning("the import was damaged on its way", "", _TRANSIENT),
    "IMPORT_ERROR_UNEXPECTED_FILE": Meaning("the archive is not what the host expects", "", _REFUSED),
    "IMPORT_INCOMPATIBLE_VERSION": Meaning("the backup is from a newer release than the host's", "", _REFUSED),
    "VM_TO_IMPORT_IS_NOT_NEWER_VERSION": Meaning("the pool holds this VM in a newer version", "", _REFUSED),
    "DUPLICATE_MAC_SEED": Meaning("another VM of the pool has the same MAC seed", "", _REFUSED),
    TASK_TIMEOUT: Meaning("it did not end by its deadline", _HOSTS, _TRANSIENT),
}

_LOGIN: Final = {
    "SESSION_AUTHENTICATION_FAILED": "user and password do not fit",
    "SESSION_AUTHORIZATION_FAILED": "the user has no role on this pool",
}
_STORAGE: Final = Meaning("the storage manager failed", _SR, Handling.REFUSED)
_UNKNOWN: Final = Meaning("the host refused", "see /var/log/xensource.log on the pool's master", Handling.REFUSED)

_ROLES: Final = (
    (re.compile(r"(network\.(add|remove)_purpose|host\.call_plugin|vm\.update_allowed_operations)"), "pool-admin"),
    (re.compile(r"(sr\.(create|introduce|probe|forget|destroy)|pbd\.|message\.|network\.)"), "pool-operator"),
    (re.compile(r"vtpm\.(get|set)_contents"), "the local root user"),
)
"""The least role of what vm-power-admin, which all the rest can do with, can not do (xen-api, datamodel_roles.ml)."""

_SECRETS: Final = re.compile(r"(session_id=|/session/)[^&\s\"']+")


def meaning_of(code: str) -> Meaning:
    """What a code means; unknown ones are refusals."""
    return _MEANINGS.get(code, _STORAGE if code.startswith("SR_BACKEND_FAILURE") else _UNKNOWN)


def handling_of(error: PoolError) -> Handling:
    """What can be done about an error of a call."""
    if isinstance(error, XapiFailure):
        return meaning_of(error.code).handling
    return Handling.TRANSIENT if error.retryable else Handling.REFUSED


def failure(what: str, description: Sequence[str], *, secrets: Iterable[str] = ()) -> PoolError:
    """The error for XAPI's answer ``description`` (code, parameters…) to ``what``, without ``secrets``.

    LoginRefused for users and roles, else XapiFailure.
    """
    code = description[0][:_PARAMETER_MAX] if description else "INTERNAL_ERROR"
    # The only parameter of this one is the session itself.
    raw = () if code == SESSION_INVALID else description[1:]
    params = tuple(_without(secrets, text)[:_PARAMETER_MAX] for text in raw)
    if code in _LOGIN:
        return LoginRefused(f"{what}: {_LOGIN[code]} ({code})")
    if code == "RBAC_PERMISSION_DENIED":
        permission = params[0] if params else what
        return LoginRefused(
            f"{what}: the user's role does not allow {permission}",
            hint=f"this needs the role {role_for(permission)}, or more",
        )
    told = [" ".join(text.split()) for text in params if text]
    meaning = meaning_of(code)
    message = f"{what}: {meaning.text} ({' '.join([code, *told])})"
    return XapiFailure(message, code=code, params=params, hint=meaning.hint)


def role_for(permission: str) -> str:
    """The least role that holds a permission ("vm.snapshot", as RBAC_PERMISSION_DENIED names it)."""
    lowered = permission.lower().removeprefix("async.")
    return next((role for pattern, role in _ROLES if pattern.match(lowered)), "vm-power-admin")


def _without(secrets: Iterable[str], text: str) -> str:
    for secret in secrets:
        if secret:
            text = text.replace(secret, "…")
    return _SECRETS.sub(r"\1…", text)
