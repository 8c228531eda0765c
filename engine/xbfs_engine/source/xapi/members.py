"""The hosts of a pool and the certificates the pool says they have: how one confirmed host vouches for the others.

Keeps no state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from xbfs_engine.core.errors import PoolError, XapiFailure
from xbfs_engine.source.xapi.failures import Handling, handling_of
from xbfs_engine.source.xapi.trust import fingerprint_of_pem, parse_fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xbfs_engine.source.xapi.session import Xapi
    from xbfs_engine.source.xapi.values import Ref, XapiValue


class Member(NamedTuple):
    """A host of a pool; ``fingerprint`` is empty when the pool can not tell it at present."""

    name: str
    address: str
    fingerprint: str


async def members(xapi: Xapi) -> list[Member]:
    """All hosts of the pool that have an address, by name. Raises PoolError."""
    known = await _certificates(xapi)
    found = []
    for ref, record in (await xapi.records("host")).items():
        name, address = record.get("name_label"), record.get("address")
        if not isinstance(name, str) or not isinstance(address, str):
            raise PoolError("host.get_all_records: a host has no name and address", hint="is it a XenServer host?")
        if address:
            found.append(Member(name, address, known.get(ref) or await _shown(xapi, ref)))
    return sorted(found)


async def _certificates(xapi: Xapi) -> Mapping[Ref, str]:
    """Fingerprints by host, from the class Certificate; old releases lack it, or its field ``type``."""
    try:
        records = await xapi.records("Certificate")
    except XapiFailure as exc:
        if handling_of(exc) is Handling.UNSUPPORTED:
            return {}
        raise
    return {
        str(record.get("host")): parse_fingerprint(text)
        for record in records.values()
        if record.get("type") == "host" and (text := _fingerprint(record))
    }


def _fingerprint(record: Mapping[str, XapiValue]) -> str:
    """``fingerprint`` is the older name of the same (xen-api, datamodel_certificate.ml)."""
    return str(record.get("fingerprint_sha256") or record.get("fingerprint") or "")


async def _shown(xapi: Xapi, host: Ref) -> str:
    try:
        pem = await xapi.call("host.get_server_certificate", host)
    except XapiFailure:
        return ""  # the host is down, or its release too old
    return fingerprint_of_pem(str(pem))
