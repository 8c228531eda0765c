"""GET /export_raw_vdi and PUT /import_raw_vdi: disks over HTTPS, raw, as VHD, or in pieces (xen-api, vhd-tool).

Both answer 200 before they have touched the disk, so what fails later shows in the task only; an export then just
ends, or goes on with the text of an error (fault on the point ``export.body``: effects ``close`` and ``error_text``,
after ``params[0]`` bytes). An import that is cut short by a fault is one on ``import.body`` with effect ``fail_late``.
"""

from __future__ import annotations

import struct
import uuid as uuids
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from .failures import DropConnection, Failure
from .routes import route
from .storage import vhd
from .storage.kinds import SIZE_MOST
from .storage.manager import storage
from .storage.tracking import backend_failure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .context import Context
    from .faults import Fault
    from .routes import HttpRequest
    from .schema import Ref

_STEP: Final = 1 << 20
_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_CHUNK: Final = struct.Struct("<QI")
_TEXT: Final = b"HTTP/1.1 500 Internal Server Error\r\nConnection: close\r\n\r\n<html><body>Error</body></html>"
_IO_ERROR: Final = ("VDI_IO_ERROR", "Device I/O errors")


@route("GET", "/export_raw_vdi", role="vm-admin")
def export_raw_vdi(ctx: Context, request: HttpRequest) -> None:
    """The content of a VDI as a stream of unknown length."""
    vdi = _named(ctx, request, "vdi")
    if _elsewhere(ctx, request, vdi):
        return
    kind = request.query.get("format", "raw")
    if kind not in ("raw", "vhd"):
        request.respond(404)
        raise Failure("INTERNAL_ERROR", f"unknown format {kind}")
    base = _named(ctx, request, "base") if "base" in request.query else None
    if kind == "vhd" and ctx.db.number(vdi, "virtual_size") > SIZE_MOST:
        raise Failure("VDI_TOO_LARGE", vdi, str(SIZE_MOST))
    request.respond(200, {"Content-Type": "application/octet-stream"})
    for one in (vdi, base):
        if one is not None:
            storage(ctx).refuse_metadata(one)
    pieces = _vhd(ctx, vdi, base) if kind == "vhd" else _raw(ctx, vdi)
    _send(ctx, request, pieces, ctx.world.faults.take("export.body", vdi))


@route("PUT", "/import_raw_vdi", role="vm-admin")
def import_raw_vdi(ctx: Context, request: HttpRequest) -> None:
    """Write a VDI; sectors that are not sent stay as they are."""
    if request.headers.get("transfer-encoding"):
        request.respond(403)
        raise Failure("INTERNAL_ERROR", "Transfer-Encoding is not supported")
    kind = "chunked" if "chunked" in request.query else request.query.get("format", "raw")
    if kind not in ("raw", "vhd", "chunked"):
        request.respond(404)
        raise Failure("INTERNAL_ERROR", f"unknown format {kind}")
    vdi = _named(ctx, request, "vdi") if "vdi" in request.query else _created(ctx, request)
    if _elsewhere(ctx, request, vdi):
        return
    if kind == "vhd" and request.length is None:
        request.respond(403)
        raise Failure("INTERNAL_ERROR", "a VHD needs a Content-Length")
    request.respond(200)
    _receive(ctx, request, vdi, kind)
    storage(ctx).refresh(ctx.db.text(vdi, "SR"), vdi)


def _send(ctx: Context, request: HttpRequest, pieces: Iterator[bytes | memoryview], fault: Fault | None) -> None:
    left = int(fault.params[0]) if fault and fault.params else 0
    for piece in pieces:
        if ctx.task:
            ctx.task.check()
        if fault and left <= len(piece):
            request.send(piece[:left])
            if fault.effect == "error_text":
                request.send(_TEXT)
            raise Failure(*_IO_ERROR)
        left -= len(piece)
        request.send(piece)


def _raw(ctx: Context, vdi: Ref) -> Iterator[memoryview]:
    size_bytes, uuid = ctx.db.number(vdi, "virtual_size"), ctx.db.text(vdi, "uuid")
    buffer = memoryview(bytearray(_STEP))
    for start in range(0, size_bytes, _STEP):
        piece = buffer[: min(_STEP, size_bytes - start)]
        storage(ctx).store.read_into(uuid, start, piece)
        _progress(ctx, start + len(piece), size_bytes)
        yield piece


def _vhd(ctx: Context, vdi: Ref, base: Ref | None) -> Iterator[bytes | memoryview]:
    db, store = ctx.db, storage(ctx).store
    uuid, size_bytes = db.text(vdi, "uuid"), db.number(vdi, "virtual_size")
    for one in (vdi, base):
        if one is not None and store.node(db.text(one, "uuid")).raw and base is not None:
            raise Failure("VDI_NOT_SPARSE", one)
    timestamp = int((ctx.world.clock.now() - _EPOCH).total_seconds())
    parent = None if base is None else vhd.Identity(uuids.uuid4().bytes, timestamp)
    blocks = store.blocks(uuid, None if base is None else db.text(base, "uuid"))
    total, sent = vhd.length(blocks), 0
    for piece in vhd.encode(
        size_bytes,
        blocks,
        vhd.Identity(uuids.uuid4().bytes, timestamp),
        lambda offset, view: store.read_into(uuid, offset, view),
        parent,
    ):
        sent += len(piece)
        _progress(ctx, sent, total)
        yield piece


def _receive(ctx: Context, request: HttpRequest, vdi: Ref, kind: str) -> None:
    db, store = ctx.db, storage(ctx).store
    storage(ctx).refuse_metadata(vdi)
    if storage(ctx).writers(vdi):
        raise backend_failure(46, "The VDI is not available [opterr=already attached RW]")
    uuid = db.text(vdi, "uuid")
    fault = ctx.world.faults.take("import.body", vdi)
    left = int(fault.params[0]) if fault and fault.params else 0

    def write(offset: int, data: memoryview) -> None:
        nonlocal left
        if ctx.task:
            ctx.task.check()
        left -= len(data)
        if offset + len(data) > db.number(vdi, "virtual_size") or (fault and left <= 0):
            raise Failure(*_IO_ERROR)
        store.write(uuid, offset, data)

    with storage(ctx).written(vdi):
        if kind == "vhd":
            _receive_vhd(ctx, request, vdi, write)
        elif kind == "chunked":
            _receive_chunks(request, write)
        else:
            _receive_raw(request, write)


def _receive_vhd(ctx: Context, request: HttpRequest, vdi: Ref, write: vhd.Write) -> None:
    db, manager = ctx.db, storage(ctx)
    sr = db.text(vdi, "SR")
    raw = manager.store.node(db.text(vdi, "uuid")).raw
    if manager.kind(sr).thick and (raw or db.mapping(sr, "sm_config").get("use_vhd") != "true"):
        raise Failure(*_IO_ERROR)  # vhd-tool says "unimplemented: prezeroed", but only to the log of the host
    length, taken = request.length or 0, 0

    def read(size: int) -> bytes:
        nonlocal taken
        data = request.rfile.read(min(size, length - taken, _STEP))
        taken += len(data)
        _progress(ctx, taken, length)
        return data

    try:
        vhd.decode(read, length, write)
    except vhd.Malformed as exc:
        raise Failure(*_IO_ERROR) from exc


def _receive_chunks(request: HttpRequest, write: vhd.Write) -> None:
    """Records of offset (64 bits), length (32 bits), both little-endian, and data; both zero end it."""
    while True:
        offset, length = _CHUNK.unpack(_exactly(request, _CHUNK.size))
        if length == 0 and offset == 0:
            return
        for start in range(0, length, _STEP):
            write(offset + start, memoryview(_exactly(request, min(_STEP, length - start))))


def _receive_raw(request: HttpRequest, write: vhd.Write) -> None:
    length, offset = request.length, 0
    while length is None or offset < length:
        data = request.rfile.read(_STEP if length is None else min(_STEP, length - offset))
        if not data:
            break
        write(offset, memoryview(data))
        offset += len(data)
    if length is not None and offset < length:
        raise DropConnection


def _exactly(request: HttpRequest, size: int) -> bytes:
    data = request.rfile.read(size)
    if len(data) < size:
        raise Failure(*_IO_ERROR)
    return data


def _created(ctx: Context, request: HttpRequest) -> Ref:
    """The new VDI of an import into an SR."""
    uuid = request.query.get("sr_uuid")
    sr = ctx.db.by_uuid("SR", uuid) if uuid else ctx.db.check("SR", request.query.get("sr_id", ""))
    if request.length is None:
        raise Failure("INTERNAL_ERROR", "an import into an SR needs a Content-Length")
    vdi = ctx.ref(
        "VDI.create",
        {
            "name_label": "",
            "SR": sr,
            "virtual_size": request.length,
            "type": "user",
            "sharable": False,
            "read_only": False,
            "other_config": {},
        },
    )
    request.result = f"<value>{vdi}</value>"
    return vdi


def _named(ctx: Context, request: HttpRequest, key: str) -> Ref:
    """The VDI a parameter names by reference or uuid."""
    value = request.query.get(key, "")
    return value if ctx.db.exists(value) else ctx.db.by_uuid("VDI", value)


def _elsewhere(ctx: Context, request: HttpRequest, vdi: Ref) -> bool:
    """Send the caller to a host that sees the SR, if this one does not."""
    hosts = storage(ctx).hosts(ctx.db.text(vdi, "SR"))
    if ctx.host in hosts:
        return False
    if not hosts:
        raise Failure("SR_NOT_ATTACHED", ctx.db.text(vdi, "SR"))
    request.redirect(hosts[0])
    return True


def _progress(ctx: Context, done: int, total: int) -> None:
    if ctx.task and total:
        ctx.task.progress(done / total)
