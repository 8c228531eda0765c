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
    """A certificate and its key, both PEM."""

    certificate: str
    key: str

    def write(self, folder: Path) -> Path:
        """As nbdkit and QEMU want it in a directory; returns that."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("ca-cert.pem", "server-cert.pem"):
            (folder / name).write_text(self.certificate)
        (folder / "server-key.pem").write_text(self.key)
        return folder


@lru_cache
def identity(*names: str, common_name: str | None = None, days: int = 3650, serial: int = 1) -> Identity:
    """Signed by itself, valid for ``days`` from yesterday (or until then). Another ``serial`` makes another key."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name or names[0])])
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)  # noqa: TID251
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(start - datetime.timedelta(days=1))
        .not_valid_after(start + datetime.timedelta(days=days))
    )
    if names:
        alternatives = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        builder = builder.add_extension(alternatives, critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    return Identity(
        certificate.public_bytes(serialization.Encoding.PEM).decode(),
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode(),
    )
