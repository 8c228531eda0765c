"""One XML-RPC connection to a pinned host: a call goes out, a bounded reply comes back, or a typed error.

Owns framing, limits and what a broken connection means; knows nothing of sessions, masters or tries. A Link blocks
and serves one call at a time; only ``abort`` may be called meanwhile, from another thread.
"""

from __future__ import annotations

import http.client
import select
import xmlrpc.client
from typing import TYPE_CHECKING, Final, cast
from xml.parsers import expat

import XenAPI

from xbfs_engine.core.errors import PoolError, PoolUnreachable, XbfsError
from xbfs_engine.core.limits import KIB, MIB
from xbfs_engine.source.xapi.abort import Abortable
from xbfs_engine.source.xapi.trust import connect, unreachable
from xbfs_engine.source.xapi.values import from_wire, to_wire

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence

    from xbfs_engine.source.xapi.config import Address
    from xbfs_engine.source.xapi.values import XapiValue

REPLY_BYTES_MAX: Final = 64 * MIB
"""A VM record takes about 8 KiB of XML: room for all records of a pool of 8000 VMs, and memory is bounded."""

_CONNECT_S: Final = 20.0
_READ_SIZE: Final = 64 * KIB
_NOT_XAPI: Final = "is it really a XenServer host?"


class CallBroken(PoolUnreachable):
    """The connection broke after the call was sent: it may have been executed, or not."""


class Refused(Exception):
    """The host answered Status Failure with this this ErrorDescription; the session makes the typed error."""

    def __init__(self, description: Sequence[str]) -> None:
        super().__init__(description[0] if description else "")
        self.description = list(description)


class Link:
    """A connection that is made by the first call and kept for the next ones."""

    def __init__(self, address: Address, pins: Mapping[str, str]) -> None:
        self.address = address
        self._guard = Abortable()
        self._transport = _Transport(address, pins, self._guard)
        host = f"[{address.host}]" if ":" in address.host else address.host
        # Only its wire format is used: XenAPI's own dispatcher keeps the password and logs in again as it likes.
        self._proxy = XenAPI.Session(f"https://{host}:{address.port}", transport=self._transport)

    def call(self, method: str, arguments: Sequence[XapiValue], *, timeout_s: float) -> XapiValue:
        """The value of a call. Every wait for the host ends after ``timeout_s``.

        Raises Refused, CallBroken, PoolUnreachable (nothing was sent), PinMismatch, PoolError.
        """
        wire = [to_wire(argument) for argument in arguments]
        with self._guard.using(self.close):
            try:
                return self._value(method, self._call(method, wire, timeout_s))
            except Refused:
                raise
            except BaseException:
                self.close()
                raise

    def _call(self, method: str, wire: Sequence[object], timeout_s: float) -> object:
        self._transport.timeout_s = timeout_s
        remote = cast("Callable[..., object]", getattr(self._proxy, method))
        try:
            return remote(*wire)
        except XbfsError:
            raise
        except xmlrpc.client.Fault as exc:
            raise PoolError(f"{method}: {self.address} answered {str(exc.faultString)[:200]}", hint=_NOT_XAPI) from exc
        except xmlrpc.client.ProtocolError as exc:
            raise _bad_status(self.address, method, exc) from exc
        except (OSError, http.client.HTTPException) as exc:
            raise _broken(self.address, method, exc) from exc
        except Exception as exc:  # the parser's many ways to choke on what is no XML-RPC
            raise PoolError(f"{method}: the answer of {self.address} is not XML-RPC", hint=_NOT_XAPI) from exc

    def is_stale(self) -> bool:
        """Whether the host closed an idle connection, or sent what nobody asked for."""
        sock = self._transport.socket
        if sock is None or sock.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def abort(self) -> None:
        """End the use of this link: a call in another thread fails now, or before it sends anything."""
        self._guard.abort(self._transport.socket, self.close)

    def close(self) -> None:
        """Close the connection; the next call makes another."""
        self._transport.close()

    def _value(self, method: str, reply: object) -> XapiValue:
        match reply:
            case {"Status": "Success", "Value": value}:
                return from_wire(value)
            case {"Status": "Failure", "ErrorDescription": [*description]}:
                raise Refused([str(item) for item in description])
            case _:
                raise PoolError(f"{method}: the answer of {self.address} is not XAPI's", hint=_NOT_XAPI)


class _Transport(xmlrpc.client.Transport):
    """xmlrpc.client over a pinned connection, with limits, and without its second try of a call that was sent."""

    accept_gzip_encoding = False
    user_agent = "xbfs"

    def __init__(self, address: Address, pins: Mapping[str, str], guard: Abortable) -> None:
        super().__init__()
        self.timeout_s = _CONNECT_S
        self._guard = guard
        self._http = _Connection(address, pins)

    @property
    def socket(self) -> socket.socket | None:
        return self._http.pinned

    def close(self) -> None:
        self._http.close()

    def make_connection(self, host: object) -> http.client.HTTPConnection:
        del host  # the one that the Link was made for
        return self._http

    def request(  # type: ignore[override]
        self, host: object, handler: str, request_body: object, verbose: bool = False
    ) -> object:
        """One POST. Raises HTTPException and OSError only after the connection stood."""
        if self._http.sock is None:
            self._http.connect()
            self._guard.check()
        self._http.sock.settimeout(self.timeout_s)
        self.send_request(host, handler, request_body, verbose)  # type: ignore[arg-type]
        response = self._http.getresponse()
        try:
            if response.status != 200:
                raise xmlrpc.client.ProtocolError(handler, response.status, response.reason, {})
            return self._parse(response)
        finally:
            # A connection that ends with its answer lives as long as this.
            response.close()

    def _parse(self, response: http.client.HTTPResponse) -> object:
        """The reply, read to its end so that the connection can be used again."""
        if (response.length or 0) > REPLY_BYTES_MAX:
            raise _too_long()
        unmarshaller = xmlrpc.client.Unmarshaller()
        parser = expat.ParserCreate()
        parser.StartElementHandler = unmarshaller.start
        parser.EndElementHandler = unmarshaller.end
        parser.CharacterDataHandler = unmarshaller.data
        parser.StartDoctypeDeclHandler = _no_doctype
        unmarshaller.xml("", None)  # expat hands out str: nothing is left to decode
        total = 0
        while piece := response.read(_READ_SIZE):
            total += len(piece)
            if total > REPLY_BYTES_MAX:
                raise _too_long()
            parser.Parse(piece, False)
        try:
            parser.Parse(b"", True)
        except expat.ExpatError as exc:
            raise http.client.IncompleteRead(b"") from exc
        return unmarshaller.close()


class _Connection(http.client.HTTPConnection):
    def __init__(self, address: Address, pins: Mapping[str, str]) -> None:
        super().__init__(address.host, address.port)
        self._address = address
        self._pins = pins
        self.pinned: socket.socket | None = None
        """The last connection, also while http.client has handed it over to a response."""

    def connect(self) -> None:
        self.sock = self.pinned = connect(self._address, self._pins, timeout_s=_CONNECT_S)


def _broken(address: Address, method: str, exc: OSError | http.client.HTTPException) -> PoolError:
    if isinstance(exc, OSError):
        return CallBroken(unreachable(address, method, exc).message)
    return CallBroken(f"{method}: {address} broke off its answer ({type(exc).__name__})")


def _bad_status(address: Address, method: str, exc: xmlrpc.client.ProtocolError) -> PoolError:
    told = f"{method}: {address} answered with HTTP status {exc.errcode}"
    # What stands before XAPI says 502 or 503 while XAPI is restarted.
    return CallBroken(told) if exc.errcode >= 500 else PoolError(told, hint=_NOT_XAPI)


def _too_long() -> PoolError:
    return PoolError(f"a host's answer is longer than {REPLY_BYTES_MAX} bytes", hint=_NOT_XAPI)


def _no_doctype(*_: object) -> None:
    """Entities could make much of a short document; XAPI's have none."""
    raise ValueError("a document type")
