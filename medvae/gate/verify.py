"""A third party's check of a release folder: no private data, no network, no model.

In order: every file against SHA256SUMS, the signature over those sums, the certificate's form, the claim recomputed
by two accountants, the bounds on attacks, words and spending beside it, the rule for delta, the number of images, the
statistics of the canaries, and the claim of the report that goes along.
Every byte of the folder is under the signature or has one accepted form, so any changed bit fails.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from medvae.dp.tradeoff import plain_words
from medvae.errors import ConfigError, MedvaeError, RunError, VerificationFailed
from medvae.gate import canary, certificate, manifest, sign
from medvae.gate.checks import AGREEMENT, bounds, delta_rule, headline, recompute
from medvae.gate.findings import CLAIMED, SAME, planted_by
from medvae.gate.outcome import Check
from medvae.schemas import problem
from medvae.types import Mechanism

CERTIFICATE = "privacy/certificate.json"
AUDIT = "audit/audit.json"
_MARKS = (manifest.SUMS, manifest.STATEMENT, CERTIFICATE)
_SUBJECT = re.compile(r"(nifti|dicom|png|huggingface)/(?:data/)?(?:sub-)?(SYN\d+)")
_MODEL = ("models/weights.safetensors", "models/model.json")
PINNED_WORDS = "signed by the key you gave"
SELF_ASSERTED_WORDS = (
    "signed by the key that the release itself names, so nothing changed since the signing; who signed is not proven: "
    "compare the key with one the data holder published, or give theirs by --public-key"
)


def verify(release: Path, public_key: Path | None = None) -> dict[str, Any]:
    """Check a release folder; return {"ok": True, "checks": [...], "key": {...}, "claim": {...}, "count"}.

    public_key: PEM of the data holder's Ed25519 key; without it the signature shows integrity and not origin.
    Raises VerificationFailed naming the first check that fails, and RunError where the folder is no release.
    """
    if not any((release / mark).is_file() for mark in _MARKS):
        raise RunError("this folder is no release: make one with `medvae release RUN -o RELEASE`")
    pinned = None if public_key is None else _read_key(public_key)

    sums = manifest.parse(_read(release, manifest.SUMS))
    manifest.compare(sums, manifest.digests(release))
    checks = [Check("files", True, f"{len(sums)} files are as listed in SHA256SUMS")]

    proof = _read_certificate(release)
    key = pinned or _own_key(proof)
    statement = sign.unseal(_read(release, manifest.STATEMENT), key)
    words = PINNED_WORDS if pinned else SELF_ASSERTED_WORDS
    checks.append(Check("signature", True, f"{words} ({sign.key_id(key)})"))

    checks += [
        _same_files(statement, sums),
        _form(proof),
        _same_claim(statement, proof),
        headline(proof["claim"], _mechanisms(proof["claim"])),
        _epsilon(proof["claim"]),
        _bounds(proof["claim"]),
        _words(proof),
        _spending(proof),
        delta_rule(proof["claim"]["delta"], proof["claim"]["patients"]),
        _count(release, proof["release"], sums),
        *_canaries(release, proof, sums),
        *_audit(release, proof, sums),
    ]
    for check in checks:
        if not check.ok:
            raise VerificationFailed(f"{check.name}: {check.detail}")
    return {
        "schema": "medvae.verify/1",
        "ok": True,
        "checks": [check.to_json() for check in checks],
        "key": {"key_id": sign.key_id(key), "pinned": pinned is not None},
        "claim": certificate.short_claim(proof["claim"]),
        "count": proof["release"]["count"],
    }


def _read(release: Path, name: str) -> bytes:
    try:
        return (release / name).read_bytes()
    except OSError:
        raise VerificationFailed(f"files: {name!r} is missing from the release") from None


def _read_certificate(release: Path) -> dict[str, Any]:
    try:
        proof = json.loads(_read(release, CERTIFICATE))
    except ValueError:
        proof = None
    if not isinstance(proof, dict):
        raise VerificationFailed("certificate: certificate.json is not readable as JSON")
    return proof


def _read_key(path: Path) -> Ed25519PublicKey:
    try:
        key = sign.read_public(path.read_bytes())
    except OSError:
        key = None
    if key is None:
        raise ConfigError("the public key cannot be read as an Ed25519 PEM file: ask the data holder for theirs")
    return key


def _own_key(proof: Mapping[str, Any]) -> Ed25519PublicKey:
    signer = proof.get("signer")
    pem = signer.get("public_key") if isinstance(signer, dict) else None
    key = sign.read_public(pem.encode()) if isinstance(pem, str) else None
    if key is None:
        raise VerificationFailed("signature: the certificate names no public key, so nothing shows that it is whole")
    return key


def _same_files(statement: Mapping[str, Any], sums: Mapping[str, str]) -> Check:
    same = sign.subjects(statement) == sums
    said = "covers every file of SHA256SUMS" if same else "was made for other files than SHA256SUMS lists"
    return Check("statement", same, f"the signed statement {said}")


def _form(proof: Mapping[str, Any]) -> Check:
    found = problem("certificate", proof)
    if found is not None:  # later checks rely on the form
        raise VerificationFailed(f"certificate: {found}")
    override = proof["override"]
    gate = "every check of the gate had passed"
    if override is not None:
        gate = f"the gate was OVERRIDDEN by the data holder, against: {'; '.join(override['overridden'])}"
    return Check("certificate", True, f"keeps to its schema, and {gate}")


def _same_claim(statement: Mapping[str, Any], proof: Mapping[str, Any]) -> Check:
    same = statement["predicate"] == certificate.predicate(proof)
    said = "is that of the certificate" if same else "differs from the certificate's"
    return Check("claim", same, f"the signed claim {said}")


def _mechanisms(claim: Mapping[str, Any]) -> list[Mechanism]:
    return [Mechanism.from_json(m) for m in claim["mechanisms"]]


def _epsilon(claim: Mapping[str, Any]) -> Check:
    try:
        return recompute(_mechanisms(claim), claim)
    except MedvaeError as error:
        return Check("epsilon", False, str(error))


def _bounds(claim: Mapping[str, Any]) -> Check:
    try:
        return bounds(claim, _mechanisms(claim))
    except (MedvaeError, ValueError) as error:  # ValueError: the curve's two lists differ in length
        return Check("bounds", False, str(error))


def _canaries(release: Path, proof: Mapping[str, Any], sums: Mapping[str, str]) -> list[Check]:
    """Recompute the one-run audit; a training that planted canaries has to show them."""
    if canary.FILE not in sums:
        planted = planted_by(_recipe(release, sums))
        words = "the training planted canaries, and what they showed is missing from the release"
        none = "this training planted none, so nothing here tests how it was run"
        return [Check("canaries", not planted, words if planted else none)]
    try:
        document = json.loads(_read(release, canary.FILE))
    except ValueError:
        raise VerificationFailed("canaries: canary.json is not readable as JSON") from None
    claim, overridden = proof["claim"], (proof["override"] or {}).get("overridden", ())
    return [canary.canary_check(document, claim, _mechanisms(claim), overridden="canaries" in overridden)]


def _recipe(release: Path, sums: Mapping[str, str]) -> Mapping[str, Any]:
    """Return the recipe that a cohort's provenance or a bundle's model card names."""
    for name, keys in (("provenance.json", ("model", "recipe")), (_MODEL[1], ("recipe",))):
        if name not in sums:
            continue
        try:
            found: Any = json.loads(_read(release, name))
            for key in keys:
                found = found[key]
            return {"canaries": {"enabled": bool(found["canaries"]["enabled"])}}
        except (ValueError, KeyError, TypeError):
            break
    raise VerificationFailed("canaries: the release names no recipe, so nothing says whether canaries were planted")


def _audit(release: Path, proof: Mapping[str, Any], sums: Mapping[str, str]) -> list[Check]:
    """Hold the public report, where one goes along, against the certificate."""
    if proof["audit"] is None and AUDIT not in sums:
        return []
    if proof["audit"] is None:
        return [Check("audit", False, "a report goes along that the certificate does not name")]
    if AUDIT not in sums:
        return [Check("audit", False, "the certificate names a report, and it is missing from the release")]
    try:
        report = json.loads(_read(release, AUDIT))
    except ValueError:
        report = None
    found = "it is not readable as JSON" if not isinstance(report, dict) else problem("audit", report)
    if found is not None or report["audience"] != "public":
        return [Check("audit", False, f"audit.json: {found or 'it is not the public report'}")]
    told, claim = report["claim"], proof["claim"]
    theirs = {**claim, "receipt_digest": claim["receipt"]["digest"]}
    keys = {*CLAIMED, "receipt_digest", "weights_sha256"} | (set(SAME) & told.keys() & theirs.keys() - {"crosscheck"})
    other = sorted(key for key in keys if told.get(key) != theirs[key])
    if other:
        return [Check("audit", False, f"the report and the certificate differ in {other[0]!r}")]
    same = report["decision"]["verdict"] == proof["audit"]["decision"]
    words = "of this run and claim" if same else "another decision than the certificate names"
    return [Check("audit", same, f"the public report is {words}" if same else f"the public report holds {words}")]


def _spending(proof: Mapping[str, Any]) -> Check:
    """All runs on the cohort cannot have spent less than this one."""
    claim, total = proof["claim"], proof["cumulative"]
    same = all(claim[key] == total[key] for key in certificate.SHORT if key != "epsilon")
    ok = same and total["runs"] >= 1 and total["epsilon"] >= claim["epsilon"] * (1 - AGREEMENT)
    words = f"epsilon {total['epsilon']:.6g} by {total['runs']} runs on this cohort"
    return Check("spending", ok, words if ok else f"{words}, which is less than this run alone")


def _words(proof: Mapping[str, Any]) -> Check:
    """What the certificate says in plain language must be what its numbers say; other versions have other words."""
    claim = proof["claim"]
    if proof["tool"] != certificate.TOOL:
        return Check("plain words", True, "written by another version, not compared")
    found = plain_words(claim["epsilon"], claim["delta"], _mechanisms(claim))
    same = list(proof["plain_words"]) == list(found) and list(proof["limits"]) == list(certificate.LIMITS)
    return Check("plain words", same, "say what the numbers say" if same else "say something else than the numbers do")


def _count(release: Path, made: Mapping[str, Any], sums: Mapping[str, str]) -> Check:
    """Count images in each format, and rows in participants.tsv; a bundle holds a model and no image."""
    if made["formats"] == ["bundle"]:
        ok = made["count"] == 0 and all(name in sums for name in _MODEL)
        return Check(
            "count", ok, "a generator and no image" if ok else "a bundle of a generator, whose model is missing"
        )
    subjects: dict[str, set[str]] = {}
    for match in filter(None, map(_SUBJECT.match, sums)):
        subjects.setdefault(match[1], set()).add(match[2])
    found = {kind: len(names) for kind, names in subjects.items()}
    if "cohort.npz" in sums:
        found["npz"] = _npz_images(release / "cohort.npz")
    if "viewer.html" in sums:  # shows some of the images, and is no copy of the data
        found["viewer"] = made["count"]
    wanted = dict.fromkeys(made["formats"], made["count"])
    rows = max(0, _read(release, "participants.tsv").count(b"\n") - 1)
    ok = found == wanted and rows == made["count"]
    told = ", ".join(f"{kind} {n}" for kind, n in sorted(found.items())) or "none"
    return Check("count", ok, f"{made['count']} claimed; found {told}, and {rows} rows in participants.tsv")


def _npz_images(path: Path) -> int:
    """Read the number of images from the array's header: no array is loaded and nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
            major, _ = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            return int(read(file)[0][0])
    except (OSError, KeyError, ValueError, IndexError, zipfile.BadZipFile):
        return -1
