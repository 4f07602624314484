"""Certificate authorities and certificates for tests of a server."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, also as PEM files."""

    certificate: x509.Certificate
    private_key: ec.EllipticCurvePrivateKey
    pem: Path
    key: Path


def authority(folder: Path, name: str = "authority") -> Issued:
    return _issue(folder, name, None, x509.BasicConstraints(ca=True, path_length=0), days=30)


def issue(by: Issued, folder: Path, name: str, *, days: float = 1.0, uri: str | None = None) -> Issued:
    """A certificate for `name` on this machine; negative `days` make an expired one."""
    return _issue(folder, name, by, x509.BasicConstraints(ca=False, path_length=None), days=days, uri=uri)


def _issue(
    folder: Path, name: str, by: Issued | None, use: x509.BasicConstraints, *, days: float, uri: str | None = None
) -> Issued:
    private_key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    if uri:
        names.append(x509.UniformResourceIdentifier(uri))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.certificate.subject if by else subject)
        .public_key(private_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=60))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(use, critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(by.private_key if by else private_key, hashes.SHA256())
    )
    pem, key = folder / f"{name}.pem", folder / f"{name}.key"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return Issued(certificate, private_key, pem, key)
