"""The signature: an in-toto Statement over every file, in a DSSE envelope, by Ed25519. Offline, in milliseconds.

Formats: in-toto Attestation Framework, Statement v1; DSSE protocol v1 (secure-systems-lab/dsse). The envelope has
one accepted byte form, so that every bit of the file counts, those of base64 padding and white space too.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from medvae.errors import ConfigError, VerificationFailed

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:medvae:release:1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
KEY_VARIABLE = "MEDVAE_SIGNING_KEY"
_REMEDY = "make one with `openssl genpkey -algorithm ed25519`"


def signing_key(chosen: Path | None, run: Path) -> Ed25519PrivateKey:
    """Return the key to sign with: the one given, else that of MEDVAE_SIGNING_KEY, else the run's own.

    The run's own is made on first use, at RUN/private/signing_key.pem, readable by its owner only; it never enters
    a release. Raises ConfigError where a given key cannot be used.
    """
    named = os.environ.get(KEY_VARIABLE)
    path = chosen or (Path(named) if named else None)
    if path is not None:
        return _read_private(path)
    own = run / "private" / "signing_key.pem"
    if not own.exists():
        try:
            _write_private(own, Ed25519PrivateKey.generate())
        except PermissionError:
            raise ConfigError(
                f"the run's folder is not yours to write a signing key to: name one by {KEY_VARIABLE}"
            ) from None
    return _read_private(own)


def public_pem(key: Ed25519PublicKey) -> str:
    """Return the public key as PEM (SubjectPublicKeyInfo)."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def key_id(key: Ed25519PublicKey) -> str:
    """Return "sha256:" and the digest of the key's DER form: what an issuer publishes and a reader compares."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return "sha256:" + hashlib.sha256(der).hexdigest()


def read_public(pem: bytes) -> Ed25519PublicKey | None:
    """Return the Ed25519 public key in PEM bytes, or None where there is none."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, Ed25519PublicKey) else None


def statement(sums: Mapping[str, str], predicate: Mapping[str, Any]) -> dict[str, Any]:
    """Return the in-toto Statement: subjects are the files of SHA256SUMS, the predicate is the claim in short."""
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": value}} for name, value in sorted(sums.items())],
        "predicateType": PREDICATE_TYPE,
        "predicate": dict(predicate),
    }


def subjects(content: Mapping[str, Any]) -> dict[str, str]:
    """Return {name: SHA-256} of a statement's subjects."""
    return {str(s["name"]): str(s["digest"]["sha256"]) for s in content["subject"]}


def seal(content: Mapping[str, Any], key: Ed25519PrivateKey) -> bytes:
    """Return the DSSE envelope of a statement, signed."""
    payload = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    return _envelope(payload, key_id(key.public_key()), key.sign(_pre_authentication(payload)))


def unseal(data: bytes, key: Ed25519PublicKey) -> dict[str, Any]:
    """Return the statement in an envelope; raises VerificationFailed unless `key` signed it, to the last bit."""
    try:
        outer = json.loads(data)
        payload = base64.b64decode(outer["payload"], validate=True)
        signature = base64.b64decode(outer["signatures"][0]["sig"], validate=True)
        named = str(outer["signatures"][0]["keyid"])
    except (ValueError, KeyError, IndexError, TypeError, binascii.Error):
        raise VerificationFailed("signature: statement.dsse.json is not a DSSE envelope: it was altered") from None
    if named != key_id(key):
        raise VerificationFailed(f"signature: made by the key {named[:80]!r}, and {key_id(key)!r} was expected")
    if _envelope(payload, named, signature) != data:
        raise VerificationFailed("signature: statement.dsse.json is not in its own form: it was altered")
    try:
        key.verify(signature, _pre_authentication(payload))
    except InvalidSignature:
        raise VerificationFailed("signature: it does not belong to this statement and key") from None
    content: dict[str, Any] = json.loads(payload)
    if content.get("_type") != STATEMENT_TYPE or content.get("predicateType") != PREDICATE_TYPE:
        raise VerificationFailed(f"signature: the statement is not of the type {PREDICATE_TYPE!r}")
    return content


def _pre_authentication(payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding (protocol.md, "PAE")."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _envelope(payload: bytes, named: str, signature: bytes) -> bytes:
    outer = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": named, "sig": base64.b64encode(signature).decode()}],
    }
    return (json.dumps(outer, indent=2) + "\n").encode()


def _read_private(path: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError:
        raise ConfigError(f"the signing key cannot be read: check its path, or {_REMEDY}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"the signing key is not an unencrypted PEM private key: {_REMEDY}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"the signing key is not an Ed25519 key: {_REMEDY}")
    return key


def _write_private(path: Path, key: Ed25519PrivateKey) -> None:
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    partial.replace(path)
