"""The keys of one session's NBD export: an authority of its own, a certificate for the server, one for its clients.

Owns the files of two directories, in the names that GnuTLS programs (nbdkit, QEMU, libnbd) look for. The authority's
key is forgotten at once: nobody can make another client.
"""

from __future__ import annotations

import datetime
import ipaddress
from typing import TYPE_CHECKING, Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from xbfs.serve.child import STATE_HINT
from xbfs_engine.core.errors import ExportFailed, StorageError
from xbfs_engine.storage.files import make_directories, write_replace

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from xbfs_engine.core.runtime import Clock

LIFE: Final = datetime.timedelta(days=365)
"""An instant recovery lives for days; nobody should have to renew anything."""
_SKEW: Final = datetime.timedelta(days=1)
"""Clocks of hypervisors differ."""

_AUTHORITY: Final = "ca-cert.pem"


class Directories(NamedTuple):
    """Where the files are. ``client`` is what a hypervisor needs: hand it over as it is."""

    server: Path
    client: Path


def make_certificates(state: Path, names: Iterable[str], clock: Clock) -> Directories:
    """The certificates in ``state``, made if they are not there, have run out or are not for ``names``.

    ``names``: host names and addresses by which clients reach the server. Raises ExportFailed.
    """
    found = Directories(state / "server", state / "client")
    now = datetime.datetime.fromtimestamp(clock.now_ns() / 1e9, datetime.UTC)
    wanted = _alternatives(names)
    if not _is_good(found, wanted, now):
        try:
            _write(found, wanted, now)
        except StorageError as exc:
            raise ExportFailed(
                f"the certificates of the NBD export can not be written: {exc.message}", hint=STATE_HINT
            ) from exc
    return found


def _alternatives(names: Iterable[str]) -> x509.SubjectAlternativeName:
    def alternative(name: str) -> x509.GeneralName:
        try:
            return x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            return x509.DNSName(name)

    return x509.SubjectAlternativeName([alternative(name) for name in dict.fromkeys(names)])


def _is_good(found: Directories, wanted: x509.SubjectAlternativeName, now: datetime.datetime) -> bool:
    """Whether all files are there, and the server's certificate (written last) is for what is wanted."""
    try:
        for directory, role in ((found.client, "client"), (found.server, "server")):
            for name in (_AUTHORITY, f"{role}-key.pem"):
                (directory / name).stat()
            certificate = x509.load_pem_x509_certificate((directory / f"{role}-cert.pem").read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return False
    return names == wanted and now < certificate.not_valid_after_utc


def _write(found: Directories, names: x509.SubjectAlternativeName, now: datetime.datetime) -> None:
    authority_key = ec.generate_private_key(ec.SECP256R1())
    issuer = _name("XBFS session")
    authority = (
        _builder(issuer, issuer, authority_key, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    for directory, role, purpose in (
        (found.client, "client", ExtendedKeyUsageOID.CLIENT_AUTH),
        (found.server, "server", ExtendedKeyUsageOID.SERVER_AUTH),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(_name(f"XBFS {role}"), issuer, key, now)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        )
        if role == "server":
            builder = builder.add_extension(names, critical=False)
        make_directories(directory)
        write_replace(directory / f"{role}-key.pem", [_key_pem(key)])
        write_replace(directory / _AUTHORITY, [authority.public_bytes(serialization.Encoding.PEM)])
        certificate = builder.sign(authority_key, hashes.SHA256())
        write_replace(directory / f"{role}-cert.pem", [certificate.public_bytes(serialization.Encoding.PEM)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + LIFE)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
