"""A certificate authority of these tests' own, as a company network has one."""

import datetime
import ipaddress
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

DAY = datetime.timedelta(days=1)


def certify(directory: Path) -> tuple[ssl.SSLContext, Path]:
    """Return what a server on 127.0.0.1 speaks TLS with, and the file that its clients need."""
    authority, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority of the tests")])
    now = datetime.datetime.now(datetime.UTC)

    def sign(subject: x509.Name, key: ec.EllipticCurvePublicKey, *extensions: tuple) -> bytes:
        builder = x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
        builder = builder.not_valid_before(now - DAY).not_valid_after(now + DAY)
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        signed = builder.sign(authority, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)

    usage = x509.KeyUsage(
        key_cert_sign=True, crl_sign=True, digital_signature=False, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    trusted = directory / "ca.crt"
    trusted.write_bytes(
        sign(
            issuer, authority.public_key(), (identifier, False), (usage, True),
            (x509.BasicConstraints(ca=True, path_length=0), True),
        )
    )  # fmt: skip
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    parent = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    chain = directory / "server.pem"
    private = server.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    own = sign(x509.Name([]), server.public_key(), (here, True), (parent, False))
    chain.write_bytes(private + own)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(chain)
    return tls, trusted
