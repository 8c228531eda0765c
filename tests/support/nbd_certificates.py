"""Certificates as hosts of a pool have them: signed by themselves, for names; made once per run of tests."""

from __future__ import annotations

import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from pathlib import Path

HOST_NAME = "host1.lab"


class Identity(NamedTuple):
    """A certificate and its key, both PEM. ``trusted``: what clients are given, itself or its issuer."""

    certificate: str
    key: str
    trusted: str

    def write(self, folder: Path) -> Path:
        """As nbdkit and QEMU want it in a directory; returns that."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ca-cert.pem").write_text(self.trusted)
        (folder / "server-cert.pem").write_text(self.certificate)
        (folder / "server-key.pem").write_text(self.key)
        return folder


@lru_cache
def identity(*names: str, common_name: str | None = None, days: int = 3650, serial: int = 1) -> Identity:
    """Signed by itself, valid until ``days`` from now. Another ``serial`` makes another key."""
    key = _key()
    subject = _name(common_name or names[0])
    certificate = _pem(_build(subject, subject, key, names, days=days).serial_number(serial).sign(key, hashes.SHA256()))
    return Identity(certificate, _key_pem(key), certificate)


@lru_cache
def issued(*names: str) -> Identity:
    """Signed by an authority, which is what is trusted."""
    authority_key, key = _key(), _key()
    authority = _name("authority")
    root = _build(authority, authority, authority_key, (), days=10).serial_number(1)
    root = root.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    leaf = _build(_name(names[0]), authority, key, names, days=10).serial_number(2)
    signed = [_pem(each.sign(authority_key, hashes.SHA256())) for each in (leaf, root)]
    return Identity(signed[0], _key_pem(key), signed[1])


def _key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _build(
    subject: x509.Name, issuer: x509.Name, key: rsa.RSAPrivateKey, names: tuple[str, ...], *, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)  # noqa: TID251 - servers and OpenSSL look at the real clock
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .not_valid_before(now - datetime.timedelta(days=2))
        .not_valid_after(now + datetime.timedelta(days=days))
    )
    if not names:
        return builder
    return builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: rsa.RSAPrivateKey) -> str:
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return pem.decode()
