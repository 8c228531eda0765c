"""Pinned certificates: a host is who it says when it shows the very certificate that was seen and confirmed before.

Hosts have certificates of their own signing, each another one (xen-api, certificates), so chains and names tell
nothing. ``connect`` compares after the TLS handshake and before a byte of ours is sent: neither password nor session
ever go to a host that is not pinned. Keeps no state; the functions block and may be called by any thread.
"""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from xbfs_engine.core.errors import CertificateRejected, PoolUnreachable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from xbfs_engine.source.xapi.config import Address

_FINGERPRINT = re.compile(r"([0-9A-F]{2}:){31}[0-9A-F]{2}")
_PEM_MAX: Final = 64 * 1024
_HINT_NEW: Final = "if the host is new in the pool or its certificate was renewed, pin it with `xbfs pool trust`"


class PinMismatch(CertificateRejected):
    """A host shows ``shown``; ``pinned`` is empty when nothing was pinned for it."""

    def __init__(self, address: Address, *, shown: str, pinned: str) -> None:
        known = f"pinned is {pinned}" if pinned else "none is pinned for it"
        super().__init__(f"{address} shows the certificate {shown or '(none)'}; {known}", hint=_HINT_NEW)
        self.address = address
        self.shown = shown
        self.pinned = pinned


class HostCertificate(NamedTuple):
    """What a host shows, for a person to compare."""

    fingerprint: str
    subject: str
    not_before: datetime
    not_after: datetime


def fingerprint(der: bytes) -> str:
    """SHA-256 as XAPI's Certificate.fingerprint_sha256 writes it: 32 upper-case bytes with colons."""
    return hashlib.sha256(der).digest().hex(":").upper()


def parse_fingerprint(text: str) -> str:
    """A fingerprint as people and tools write it, colons and case being free. Raises CertificateRejected."""
    digits = text.strip().upper().removeprefix("SHA256:").removeprefix("SHA256 FINGERPRINT=").replace(":", "")
    normal = ":".join(digits[at : at + 2] for at in range(0, len(digits), 2))
    if not _FINGERPRINT.fullmatch(normal):
        raise CertificateRejected(
            f"{text[:120]!r} is not a SHA-256 fingerprint", hint="64 hexadecimal digits, with or without colons"
        )
    return normal


def fingerprint_of_pem(pem: str) -> str:
    """The fingerprint of the first certificate in ``pem``. Raises CertificateRejected."""
    try:
        certificate = x509.load_pem_x509_certificate(_first_certificate(pem[:_PEM_MAX]))
    except ValueError as exc:
        raise CertificateRejected("a host's certificate can not be decoded", hint="") from exc
    return fingerprint(certificate.public_bytes(Encoding.DER))


def connect(address: Address, pins: Mapping[str, str], *, timeout_s: float) -> ssl.SSLSocket:
    """A TLS connection to a pinned host; nothing was sent on it yet, and its waits end after ``timeout_s``.

    Raises PoolUnreachable, PinMismatch.
    """
    connection = _handshake(address, timeout_s)
    shown = _shown(connection)
    pinned = pins.get(address.host, "")
    if not shown or shown != pinned:
        connection.close()
        raise PinMismatch(address, shown=shown, pinned=pinned)
    return connection


def look_at(address: Address, *, timeout_s: float) -> HostCertificate:
    """The certificate a host shows now, trusted or not. Raises PoolUnreachable, CertificateRejected."""
    with _handshake(address, timeout_s) as connection:
        der = connection.getpeercert(binary_form=True) or b""
    try:
        certificate = x509.load_der_x509_certificate(der)
        subject = certificate.subject.rfc4514_string()
        times = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except ValueError as exc:
        raise CertificateRejected(f"{address} shows a certificate that can not be decoded: {exc}", hint="") from exc
    return HostCertificate(fingerprint(der), subject, *times)


def _handshake(address: Address, timeout_s: float) -> ssl.SSLSocket:
    try:
        plain = socket.create_connection((address.host, address.port), timeout=timeout_s)
    except (OSError, UnicodeError) as exc:
        raise PoolUnreachable(f"{address} does not answer: {_reason(exc)}") from exc
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return _context().wrap_socket(plain)
    except OSError as exc:
        with suppress(OSError):
            plain.close()
        raise PoolUnreachable(f"{address} does not speak TLS as we do: {_reason(exc)}") from exc


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # The pin takes the place of chain and name. TLS 1.2 is what hosts speak (xen-api, stunnel configuration).
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _shown(connection: ssl.SSLSocket) -> str:
    der = connection.getpeercert(binary_form=True)
    return fingerprint(der) if der else ""


def _first_certificate(pem: str) -> bytes:
    start = pem.find(ssl.PEM_HEADER)
    end = pem.find(ssl.PEM_FOOTER, start)
    if start < 0 or end < 0:
        raise ValueError("no certificate")
    return pem[start : end + len(ssl.PEM_FOOTER)].encode("ascii")


def _reason(exc: OSError | UnicodeError) -> str:
    if isinstance(exc, TimeoutError):
        return "it took too long"
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc) or type(exc).__name__


def unreachable(address: Address, what: str, exc: OSError) -> PoolUnreachable:
    """The error for a connection that broke during ``what``."""
    return PoolUnreachable(f"{what}: the connection to {address} broke: {_reason(exc)}")
