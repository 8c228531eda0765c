"""Transfers over HTTPS: disks, and the metadata of VMs.

xapi says 200 before it has opened a disk, and puts a later error into the stream or just closes it (xen-api,
export_raw_vdi and import_raw_vdi handlers). So each transfer has a task of its own, and the task has the last word.
Calls on streams block and belong into worker threads; everything else is for trio tasks. A stream is used by one
thread at a time, and may be left while a thread is in it: its call then fails.
"""

from __future__ import annotations

import re
import struct
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

import trio

from xbfs_engine.core.errors import LoginRefused, PoolError, TransferFailed, UsageError, XapiFailure
from xbfs_engine.core.limits import KIB, MIB
from xbfs_engine.source.xapi.config import Address
from xbfs_engine.source.xapi.tasks import failure_of, own_task, wait_for
from xbfs_engine.source.xapi.wire import Wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from typing_extensions import Buffer

    from xbfs_engine.source.xapi.session import Pool
    from xbfs_engine.source.xapi.values import Ref
    from xbfs_engine.source.xapi.wire import Head

METADATA_BYTES_MAX: Final = 64 * MIB
"""An archive has some 100 KiB per VM; vTPM and UEFI state add some more."""

_METADATA_S: Final = 300.0
_VERDICT_S: Final = 10.0
"""How long a task may take to fail after its stream broke."""

_HOPS_MAX: Final = 4
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_ERROR_IN_BODY: Final = re.compile(rb"HTTP/1\.[01] [45][0-9]{2} ")
_ERROR_LENGTH: Final = 13
_ERROR_MAX: Final = 16 * KIB
"""xapi's error page is shorter than 4 KiB; no disk is."""

_CHUNK: Final = struct.Struct("<QI")
"""Framing of ``chunked``: offset and length, little-endian; both 0 end it (xen-api, vhd-tool chunked.ml)."""

_REF: Final = re.compile(r"OpaqueRef:[0-9A-Za-z-]+")


class _Request(NamedTuple):
    method: str
    path: str
    query: Mapping[str, str]
    headers: Sequence[tuple[str, str]] = ()
    body: Buffer = b""


class RawStream:
    """A disk as it comes from a host."""

    def __init__(self, pool: Pool, wire: Wire, task: Ref, what: str, timeout_s: float) -> None:
        self._pool = pool
        self._wire = wire
        self._task = task
        self._what = what
        self._timeout_s = timeout_s
        self._looked = False
        self.received_bytes = 0
        """What ``readinto`` has given so far."""

    def readinto(self, view: memoryview) -> int:
        """Fill ``view`` as far as the stream goes: less than its length, or 0, is the end. Blocks.

        The end is a good one only when ``finish`` says so. Raises TransferFailed.
        """
        if not self._looked:
            self._look_for_error()
            self._looked = True
        count = self._wire.read_into(view.cast("B"))
        self.received_bytes += count
        return count

    async def finish(self, *, size_bytes: int | None = None) -> None:
        """After the end: wait for the task's verdict, and check that ``size_bytes`` came.

        Raises XapiFailure with the task's error, TransferFailed.
        """
        await wait_for(self._pool, self._task, self._what, timeout_s=self._timeout_s)
        if size_bytes is not None and self.received_bytes != size_bytes:
            raise TransferFailed(f"{self._what}: {self.received_bytes} of {size_bytes} bytes came")

    def _look_for_error(self) -> None:
        """A stream that begins like an HTTP error, and ends with it, is one; a longer one is a disk like that."""
        start = self._read(_ERROR_LENGTH)
        if _ERROR_IN_BODY.match(start):
            start += self._read(_ERROR_MAX - len(start))
            if len(start) < _ERROR_MAX:
                line = start.partition(b"\r\n")[0][:200].decode("latin-1")
                raise TransferFailed(f"{self._what}: {self._wire.address} sent {line!r} in place of the disk")
        self._wire.put_back(start)

    def _read(self, length: int) -> bytes:
        buffer = bytearray(length)
        return bytes(buffer[: self._wire.read_into(memoryview(buffer))])


class RawSink:
    """A disk on its way to a host."""

    def __init__(self, wire: Wire, *, chunked: bool) -> None:
        self._wire = wire
        self._chunked = chunked
        self.sent_bytes = 0
        """What ``write`` has sent so far."""

    def write(self, data: Buffer) -> None:
        """Send all of ``data``, the next piece of the image. Blocks. Raises TransferFailed."""
        assert not self._chunked
        self._wire.send([data])
        self.sent_bytes += memoryview(data).nbytes

    def write_at(self, offset: int, data: Buffer) -> None:
        """Only for ``chunked``: send ``data`` for ``offset``; what is never sent stays as it is on the disk. Blocks."""
        assert self._chunked
        length = memoryview(data).nbytes
        if length:
            self._wire.send([_CHUNK.pack(offset, length), data])

    def end(self) -> None:
        """Tell the host that ``chunked`` data are complete; done by ``import_raw``."""
        if self._chunked:
            self._wire.send([_CHUNK.pack(0, 0)])


@asynccontextmanager
async def export_raw(
    pool: Pool, vdi_ref: Ref, *, format: Literal["raw", "vhd"], base_ref: Ref | None = None, timeout_s: float
) -> AsyncIterator[RawStream]:
    """The content of a disk as a stream; leave early to drop the rest.

    ``base_ref``: only what differs from that disk, as a differencing VHD. ``timeout_s``: the longest silence, also
    before the first byte. Raises XapiFailure, TransferFailed, PoolUnreachable, LoginRefused, CertificateRejected.
    """
    what = "read a disk over HTTPS"
    query = {"vdi": vdi_ref, "format": format} | ({} if base_ref is None else {"base": base_ref})
    async with own_task(pool, "export disk") as task, _judged(pool, task, what):
        request = _Request("GET", "/export_raw_vdi", {**query, "task_id": task})
        async with _exchange(pool, request, pool.master, what, timeout_s) as (wire, _):
            yield RawStream(pool, wire, task, what, timeout_s)


@asynccontextmanager
async def import_raw(
    pool: Pool, vdi_ref: Ref, *, format: Literal["raw", "vhd", "chunked"], length: int | None, timeout_s: float
) -> AsyncIterator[RawSink]:
    """Write into a disk that exists; leaving cleanly waits for the task and raises its failure.

    ``length``: exact size of what will be written; required for "raw" and "vhd", None for "chunked". ``timeout_s``:
    the longest silence, and the longest the host may take after the last byte. Raises what ``export_raw`` raises.
    """
    chunked = format == "chunked"
    assert chunked == (length is None)
    what = "write a disk over HTTPS"
    # A body can not be sent again after a redirect: the right host is asked for before, and xapi answers before it
    # reads the body, so that a redirect that comes all the same costs nothing.
    host = await _host_of_disk(pool, vdi_ref)
    async with own_task(pool, "import disk") as task:
        query = {"vdi": vdi_ref, "task_id": task, "format": "raw" if chunked else format}
        request = _Request(
            "PUT",
            "/import_raw_vdi",
            query | ({"chunked": "true"} if chunked else {}),
            () if length is None else (("Content-Length", str(length)),),
        )
        async with _judged(pool, task, what), _exchange(pool, request, host, what, timeout_s) as (wire, _):
            sink = RawSink(wire, chunked=chunked)
            yield sink
            if sink.sent_bytes == (length or 0):
                await trio.to_thread.run_sync(sink.end, abandon_on_cancel=True)
                await wait_for(pool, task, what, timeout_s=timeout_s)
                return
        raise TransferFailed(f"{what}: {sink.sent_bytes} of {length} bytes were sent", hint="")


async def export_metadata(pool: Pool, vm_ref: Ref) -> bytes:
    """The metadata of one VM, without its snapshots', as the archive (tar) that ``import_metadata`` takes.

    At most METADATA_BYTES_MAX. Raises what ``export_raw`` raises.
    """
    what = "export metadata of a VM"
    async with own_task(pool, "export metadata") as task, _judged(pool, task, what):
        request = _Request("GET", "/export_metadata", {"ref": vm_ref, "export_snapshots": "false", "task_id": task})
        async with _exchange(pool, request, pool.master, what, _METADATA_S) as (wire, head):
            archive = await trio.to_thread.run_sync(partial(_read_all, wire, head, what), abandon_on_cancel=True)
        await wait_for(pool, task, what, timeout_s=_METADATA_S)
        return archive


async def import_metadata(
    pool: Pool,
    archive: bytes,
    *,
    vdi_map: dict[str, str],
    restore: bool,
    force: bool = False,
    dry_run: bool = False,
) -> list[Ref]:
    """Recreate the VMs of an archive; their references.

    ``vdi_map``: uuid of each archived disk to the uuid of the one that takes its place. ``restore`` keeps uuid and
    MACs, and replaces a VM of that uuid (xen-api, import.ml). Raises what ``export_raw`` raises.
    """
    what = "import metadata of a VM"
    flags = {"restore": restore, "force": force, "dry_run": dry_run}
    query = {name: "true" for name, wanted in flags.items() if wanted}
    query |= {f"vdi:{old}": new for old, new in vdi_map.items()}
    async with own_task(pool, "import metadata") as task, _judged(pool, task, what):
        headers = (("Content-Length", str(len(archive))),)
        request = _Request("PUT", "/import_metadata", {**query, "task_id": task}, headers, archive)
        async with _exchange(pool, request, pool.master, what, _METADATA_S):
            return _REF.findall(await wait_for(pool, task, what, timeout_s=_METADATA_S))


@asynccontextmanager
async def console(pool: Pool, console_ref: Ref, *, timeout_s: float) -> AsyncIterator[Wire]:
    """What draws a running VM's screen: RFB both ways, from its host. ``timeout_s``: the longest silence.

    xapi's own way to a picture, /vncsnapshot, answers 500 in releases before August 2026 (xen-api, pull request 7202).
    Raises XapiFailure, TransferFailed (also: the host lets nobody else look), PoolUnreachable, CertificateRejected.
    """
    what = "look at a VM's screen"
    location = str(await pool.call("console.get_location", console_ref))
    try:
        host = urlsplit(location).hostname or ""
        address = Address.parse(f"[{host}]" if ":" in host else host, port=pool.master.port)
    except (UsageError, ValueError) as exc:
        raise TransferFailed(f"{what}: the pool does not say at which host it is") from exc
    async with _exchange(pool, _Request("CONNECT", "/console", {"ref": console_ref}), address, what, timeout_s) as (
        wire,
        _,
    ):
        yield wire


@asynccontextmanager
async def _judged(pool: Pool, task: Ref, what: str) -> AsyncIterator[None]:
    """What the task says of a broken stream tells more than the break."""
    try:
        yield
    except TransferFailed as exc:
        reason = await failure_of(pool, task, what, timeout_s=_VERDICT_S)
        if reason is None:
            raise
        raise reason from exc


@asynccontextmanager
async def _exchange(
    pool: Pool, request: _Request, address: Address, what: str, timeout_s: float
) -> AsyncIterator[tuple[Wire, Head]]:
    """A request that was answered with 200, by the host that it was at last sent to."""
    for _ in range(_HOPS_MAX):
        # In a cookie, not in the query: redirects and logs hold queries.
        headers = [("Host", str(address)), ("User-Agent", "xbfs"), ("Cookie", f"session_id={await pool.session()}")]
        target = f"{request.path}?{urlencode(request.query, quote_via=quote)}"
        wire = Wire(address, pool.config.pins, timeout_s=timeout_s)
        ask = partial(wire.request, request.method, target, [*headers, *request.headers], request.body)
        try:
            head = await trio.to_thread.run_sync(ask, abandon_on_cancel=True)
            if head.status == 200:
                yield wire, head
                return
            if head.status not in _REDIRECTS:
                raise _bad_status(what, address, head)
            address = _redirected(address, head)
        finally:
            wire.abort()
    raise TransferFailed(f"{what}: hosts send us from one to the other")


def _redirected(address: Address, head: Head) -> Address:
    """Only the host is taken from a redirect; it must be pinned like any other before it hears the session."""
    try:
        parts = urlsplit(head.headers.get("location", ""))
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return Address.parse(f"{parts.scheme}://{host or ''}", port=parts.port or address.port)
    except (UsageError, ValueError) as exc:
        raise TransferFailed(f"{address} redirects to what is no https address of a host") from exc


def _bad_status(what: str, address: Address, head: Head) -> PoolError:
    told = f"{what}: {address} answered {head.status} {head.reason}".rstrip()
    return LoginRefused(told) if head.status in {401, 403} else TransferFailed(told)


async def _host_of_disk(pool: Pool, vdi_ref: Ref) -> Address:
    """A host that reaches the disk's SR: the master if it does."""
    sr = await pool.call("VDI.get_SR", vdi_ref)
    connections = await pool.call("SR.get_PBDs", sr)
    found: list[str] = []
    for pbd in connections if isinstance(connections, list) else []:
        record = await pool.call("PBD.get_record", pbd)
        if isinstance(record, dict) and record.get("currently_attached") is True:
            found.append(str(await pool.call("host.get_address", record.get("host", ""))))
    if not found:
        raise XapiFailure(f"SR {sr} is connected to no host", code="SR_HAS_NO_PBDS", hint="connect it: `xe pbd-plug`")
    return pool.master if pool.master.host in found else Address.parse(found[0], port=pool.master.port)


def _read_all(wire: Wire, head: Head, what: str) -> bytes:
    """The body, as long as its head says, or to its end. Raises TransferFailed."""
    announced = head.headers.get("content-length", "")
    expected = int(announced) if announced.isascii() and announced.isdigit() and len(announced) < 16 else None
    if (expected or 0) > METADATA_BYTES_MAX:
        raise TransferFailed(f"{what}: {expected} bytes are more than this is ever", hint="")
    body = b"".join(_pieces(wire, METADATA_BYTES_MAX + 1 if expected is None else expected))
    if len(body) > METADATA_BYTES_MAX or (expected is not None and len(body) != expected):
        raise TransferFailed(f"{what}: {len(body)} bytes came, not {expected or 'a sane number'}")
    return body


def _pieces(wire: Wire, length: int) -> Iterator[bytes]:
    while length:
        buffer = bytearray(min(length, MIB))
        count = wire.read_into(memoryview(buffer))
        yield bytes(buffer[:count])
        length -= count
        if count < len(buffer):
            return
