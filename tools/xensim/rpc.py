"""XML-RPC and JSON-RPC as XAPI speaks them: bytes to calls, results to bytes. Pure."""

from __future__ import annotations

import json
import xmlrpc.client
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple
from xml.sax.saxutils import escape

from .failures import Failure
from .schema import DATE_FORMAT

if TYPE_CHECKING:
    from .schema import Value


class Request(NamedTuple):
    """A call as it came: ``protocol`` is xml, json1 or json2."""

    protocol: str
    method: str
    args: Sequence[Value]
    number: Value | None = None


def parse_xml(body: bytes) -> Request:
    """Raises Failure for what is no XML-RPC call."""
    try:
        args, method = xmlrpc.client.loads(body)
    except Exception as exc:
        raise Failure("INTERNAL_ERROR", "not an XML-RPC call") from exc
    return Request("xml", method or "", [_plain(item) for item in args])


def parse_json(body: bytes) -> Request:
    """Raises Failure for what is no JSON-RPC call."""
    try:
        document = json.loads(body)
        protocol = "json2" if document.get("jsonrpc") == "2.0" else "json1"
        return Request(protocol, str(document["method"]), list(document.get("params", [])), document.get("id"))
    except (ValueError, KeyError, AttributeError, TypeError) as exc:
        raise Failure("INTERNAL_ERROR", "not a JSON-RPC call") from exc


def success(request: Request, value: Value) -> bytes:
    """The reply with a result."""
    if request.protocol == "xml":
        return _response({"Status": "Success", "Value": value})
    document = {"result": jsonable(value), "id": request.number}
    document |= {"jsonrpc": "2.0"} if request.protocol == "json2" else {"error": None}
    return json.dumps(document).encode()


def failure(request: Request, problem: Failure) -> bytes:
    """The reply with an error."""
    if request.protocol == "xml":
        return _response({"Status": "Failure", "ErrorDescription": problem.description})
    if request.protocol == "json2":
        error = {"code": 1, "message": problem.code, "data": list(problem.params)}
        return json.dumps({"jsonrpc": "2.0", "error": error, "id": request.number}).encode()
    return json.dumps({"result": None, "error": problem.description, "id": request.number}).encode()


def fragment(value: Value) -> str:
    """A result as tasks hold it: nothing for void, else ``<value>…</value>``."""
    return "" if value == "" else encode(value)


def encode(value: Value) -> str:
    """A value in XML-RPC; integers have 64 bits and therefore travel as strings."""
    if isinstance(value, bool):
        return f"<value><boolean>{int(value)}</boolean></value>"
    if isinstance(value, float):
        return f"<value><double>{value!r}</double></value>"
    if isinstance(value, datetime):
        return f"<value><dateTime.iso8601>{value.strftime(DATE_FORMAT)}</dateTime.iso8601></value>"
    if isinstance(value, str | int):
        return f"<value>{escape(str(value))}</value>"
    if isinstance(value, Mapping):
        rows = (f"<member><name>{escape(key)}</name>{encode(item)}</member>" for key, item in value.items())
        return f"<value><struct>{''.join(rows)}</struct></value>"
    return f"<value><array><data>{''.join(encode(item) for item in value)}</data></array></value>"


def decode(text: bytes) -> Value:
    """A ``<value>`` document as plain values. Raises Failure."""
    wrapped = b"<methodResponse><params><param>" + text + b"</param></params></methodResponse>"
    try:
        (value,), _ = xmlrpc.client.loads(wrapped)
    except Exception as exc:
        raise Failure("INTERNAL_ERROR", "not an XML-RPC value") from exc
    return _plain(value)


def jsonable(value: Value) -> object:
    """A value as JSON has it: numbers are numbers, dates are strings."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime(DATE_FORMAT)
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    return [jsonable(item) for item in value]


def _response(value: Value) -> bytes:
    body = f"<methodResponse><params><param>{encode(value)}</param></params></methodResponse>"
    return b'<?xml version="1.0"?>' + body.encode()


def _plain(value: object) -> Value:
    if isinstance(value, xmlrpc.client.DateTime):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | int | float | bool):
        return value
    raise TypeError(type(value))
