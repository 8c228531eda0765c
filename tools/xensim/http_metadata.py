"""GET /export_metadata and PUT /import_metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import metadata, rpc
from .failures import Failure
from .routes import route

if TYPE_CHECKING:
    from .context import Context
    from .routes import HttpRequest
    from .schema import Ref


@route("GET", "/export_metadata", role="vm-admin")
def export_metadata(ctx: Context, request: HttpRequest) -> None:
    """The archive of one VM or all, whole and with its length."""
    query = request.query
    if query.get("all") == "true":
        dom0 = query.get("include_dom0") == "true"
        vms = [
            ref
            for ref in ctx.db.all("VM")
            if not ctx.db.flag(ref, "is_a_snapshot") and (dom0 or not ctx.db.flag(ref, "is_control_domain"))
        ]
    else:
        vms = [_vm(ctx, query.get("ref") or query.get("uuid", ""))]
    excluded = query.get("excluded_device_types", "").split(",")
    archive = metadata.export(ctx, vms, snapshots=query.get("export_snapshots", "true") == "true", excluded=excluded)
    request.respond(
        200, {"Content-Type": "application/octet-stream", "Content-Length": str(len(archive))}, body=archive
    )


@route("PUT", "/import_metadata", role="vm-admin")
def import_metadata(ctx: Context, request: HttpRequest) -> None:
    """VMs from an archive. 200 is sent before it is read; the task has the references, or the error."""
    query = request.query
    if "transfer-encoding" in request.headers:
        raise Failure("IMPORT_ERROR_CANNOT_HANDLE_CHUNKED")
    if request.length is None:
        raise Failure("IMPORT_ERROR", "no Content-Length")
    request.respond(200)
    archive = request.rfile.read(request.length)
    options = metadata.Options(
        vdi_map={key.removeprefix("vdi:"): uuid for key, uuid in query.items() if key.startswith("vdi:")},
        restore=query.get("restore") == "true",
        force=query.get("force") == "true",
        dry_run=query.get("dry_run") == "true",
    )
    vms = metadata.import_(ctx, archive, options)
    assert ctx.task
    if ctx.db.exists(ctx.task.ref):
        ctx.db.set(
            ctx.task.ref, other_config=ctx.db.mapping(ctx.task.ref, "other_config") | {"object_creation": "complete"}
        )
    request.result = rpc.encode(vms)


def _vm(ctx: Context, name: str) -> Ref:
    return ctx.db.check("VM", name) if name.startswith("OpaqueRef:") else ctx.db.by_uuid("VM", name)
