"""Where a disk can be read over NBD, which certificate its host must show, and how long one waits for it."""

from __future__ import annotations

import ssl
from typing import NamedTuple

from xbfs_engine.core.errors import CertificateRejected


class TlsPolicy(NamedTuple):
    """The certificate (PEM) that the server must show or descend from, and the name it must bear.

    Both come from VDI.get_nbd_info (xen-api, datamodel; ``subject`` is a DNS name while ``address`` is normally an IP).
    """

    certificate_pem: str
    subject: str


class NbdTarget(NamedTuple):
    """One way to a disk. ``tls`` None: plain. ``owner`` labels the host in messages and in its budget.

    ``export_name`` holds a session reference: it is a secret and never shown.
    """

    host: str
    port: int
    export_name: str
    tls: TlsPolicy | None
    owner: str

    def __repr__(self) -> str:
        return f"NbdTarget({self.place}, tls={self.tls is not None})"

    @property
    def place(self) -> str:
        """Host and port for messages."""
        address = f"{self.host}:{self.port}"
        return address if self.owner == self.host else f"{self.owner} ({address})"


class Timeouts(NamedTuple):
    """Patience in seconds: until a disk is open, for one reply, and pauses between tries to connect."""

    connect_s: float = 60.0
    message_s: float = 60.0
    pauses_s: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """A host's firewall opens the port ten seconds after the network got its purpose (XenServer documentation)."""

    @property
    def tries(self) -> int:
        """Tries to connect, and tries of one read, before giving up."""
        return len(self.pauses_s) + 1


def tls_context(policy: TlsPolicy) -> ssl.SSLContext:
    """Trust nothing but the policy's certificate. Raises CertificateRejected if that is none.

    Hosts speak exactly TLS 1.2 (xapi-nbd), so 1.3 must not be required.
    """
    if not policy.subject.isascii() or not policy.subject.isprintable() or not policy.subject.strip("."):
        raise CertificateRejected(f"the subject {policy.subject!r} that XAPI gives for NBD is no name")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A host's certificate is its own and signed by nobody else: it is the anchor although it may not be an authority.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.check_hostname = not _is_wildcard(policy.subject)
    try:
        context.load_verify_locations(cadata=policy.certificate_pem)
    except (ssl.SSLError, ValueError, TypeError) as exc:  # TypeError: not ASCII
        raise CertificateRejected("the certificate that XAPI gives for NBD can not be decoded") from exc
    return context


def check_wildcard(policy: TlsPolicy, peer: ssl.SSLObject) -> None:
    """Check a ``subject`` like "*.example.com": the library only matches names of hosts. Raises CertificateRejected.

    XAPI gives such a subject when the certificate has no other name, so it must be there to the letter.
    """
    if not _is_wildcard(policy.subject):
        return
    certificate = peer.getpeercert() or {}
    names = {str(name[1]).lower() for name in certificate.get("subjectAltName", ()) if name[0] == "DNS"}
    if policy.subject.lower() not in names:
        raise CertificateRejected(f"the NBD server's certificate does not bear the name {policy.subject!r}")


def _is_wildcard(subject: str) -> bool:
    return subject.startswith("*")
