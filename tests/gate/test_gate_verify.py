"""A release that was touched in any way fails its verification; an untouched one passes without private data."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hand_made_run as hand
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import given, settings
from hypothesis import strategies as st

from medvae.errors import ConfigError, RunError, VerificationFailed
from medvae.gate import manifest, sign
from medvae.gate.verify import verify
from medvae.schemas import problem


def fail(release: Path, match: str | None = None, **given: Any) -> str:
    with pytest.raises(VerificationFailed, match=match) as caught:
        verify(release, **given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_an_untouched_release_passes_and_says_who_signed(base_release: Path) -> None:
    result = verify(base_release)
    assert problem("verify", result) is None
    assert [c["name"] for c in result["checks"]] == [
        "files", "signature", "statement", "certificate", "claim", "headline", "epsilon", "bounds", "plain words",
        "spending", "delta", "count", "canaries", "audit",
    ]  # fmt: skip
    assert result["key"]["pinned"] is False
    assert "who signed is not proven" in result["checks"][1]["detail"]


def test_verify_loads_no_network_and_none_of_the_private_rooms() -> None:
    rooms = ("medvae.vault", "medvae.train", "medvae.audit", "medvae.nets", "torch", "monai", "mlflow")
    code = f"import sys, medvae.gate.verify; print([m for m in sys.modules if m.startswith({rooms})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_release_may_be_moved_and_read_only(released: Path, tmp_path: Path) -> None:
    moved = released.rename(tmp_path / "elsewhere")
    assert verify(moved)["ok"]


FILES = st.integers(min_value=0, max_value=10_000)


@pytest.fixture(scope="module")
def scratch(base_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that each example changes and puts right again."""
    return Path(shutil.copytree(base_release, tmp_path_factory.mktemp("bits") / "release"))


@settings(max_examples=120, deadline=None)
@given(file=FILES, byte=FILES, bit=st.integers(0, 7))
def test_any_flipped_bit_in_any_file_fails(scratch: Path, file: int, byte: int, bit: int) -> None:
    paths = sorted(p for p in scratch.rglob("*") if p.is_file())
    path = paths[file % len(paths)]
    before = path.read_bytes()
    changed = bytearray(before)
    changed[byte % len(before)] ^= 1 << bit
    path.write_bytes(changed)
    try:
        fail(scratch)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", ["SHA256SUMS", "statement.dsse.json"])
def test_every_single_bit_of_sums_and_statement_counts(scratch: Path, name: str) -> None:
    """These two are not in SHA256SUMS themselves; base64 padding and white space are where a flip could hide."""
    path = scratch / name
    before = path.read_bytes()
    spots = range(0, len(before), max(1, len(before) // 150))
    tail = range(max(0, len(before) - 120), len(before))
    try:
        for spot in {*spots, *tail}:
            changed = bytearray(before)
            changed[spot] ^= 1 << (spot % 8)
            path.write_bytes(changed)
            fail(scratch)
    finally:
        path.write_bytes(before)
    assert verify(scratch)["ok"]


@pytest.mark.parametrize("change", [lambda b: b + b"\n", lambda b: b[:-1], lambda b: b"", lambda b: b + b" "])
def test_longer_and_shorter_files_fail(released: Path, change: Callable[[bytes], bytes]) -> None:
    for name in ("README.md", "SHA256SUMS", "statement.dsse.json", "privacy/certificate.json"):
        before = (released / name).read_bytes()
        (released / name).write_bytes(change(before))
        fail(released)
        (released / name).write_bytes(before)


@pytest.mark.parametrize("name", ["participants.tsv", "dicom/SYN0001/IM0001.dcm", "privacy/certificate.json"])
def test_a_missing_file_is_named(released: Path, name: str) -> None:
    (released / name).unlink()
    assert name in fail(released, "missing")


@pytest.mark.parametrize("name", ["SHA256SUMS", "statement.dsse.json"])
def test_missing_sums_or_statement_fail(released: Path, name: str) -> None:
    (released / name).unlink()
    assert name in fail(released, "missing")


def test_an_extra_file_is_named(released: Path) -> None:
    (released / "dicom" / "SYN0001" / "extra.dcm").write_bytes(b"x")
    assert "dicom/SYN0001/extra.dcm" in fail(released, "not listed")


def test_a_hidden_extra_file_fails(released: Path) -> None:
    (released / ".note").touch()
    fail(released, "not listed")


def test_a_link_fails_even_to_the_same_bytes(released: Path, tmp_path: Path) -> None:
    shutil.move(released / "README.md", tmp_path / "readme")
    os.symlink(tmp_path / "readme", released / "README.md")
    fail(released, "link")


def test_swapped_files_fail(released: Path) -> None:
    a, b = (released / f"dicom/SYN000{i}/IM0001.dcm" for i in (1, 2))
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)
    fail(released, "altered")


def reseal(release: Path, change: Callable[[dict[str, Any]], None], **statement: Any) -> None:
    """Forge: change the certificate, then redo sums and signature with a key of the forger's own."""
    key = ed25519.Ed25519PrivateKey.generate()
    path = release / "privacy" / "certificate.json"
    proof = read(path)
    proof["signer"] |= {"key_id": sign.key_id(key.public_key()), "public_key": sign.public_pem(key.public_key())}
    change(proof)
    path.write_text(json.dumps(proof), encoding="utf-8")
    sums = manifest.digests(release)
    (release / "SHA256SUMS").write_bytes(manifest.render(sums))
    from medvae.gate.certificate import predicate

    content = sign.statement(statement.get("sums", sums), statement.get("predicate") or predicate(proof))
    (release / "statement.dsse.json").write_bytes(sign.seal(content, key))


def test_a_forger_with_an_own_key_passes_only_without_a_pin(released: Path, base_release: Path, tmp_path: Path) -> None:
    signer = read(base_release / "privacy" / "certificate.json")["signer"]
    pin = tmp_path / "holder.pem"
    pin.write_text(signer["public_key"])
    assert verify(base_release, public_key=pin)["key"] == {"key_id": signer["key_id"], "pinned": True}
    reseal(released, lambda proof: proof.update(title="forged"))
    assert verify(released)["ok"], "self-asserted: whole, and the result says that who signed is not proven"
    fail(released, "signature: made by the key", public_key=pin)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda p: p["claim"].update(epsilon=1.0), "epsilon"),
        (lambda p: p["claim"]["mechanisms"][1]["event"].update(count=21), "headline"),
        (lambda p: p["claim"]["mechanisms"][0]["event"].update(noise_multiplier=1.0), "epsilon"),
        (lambda p: p["claim"]["mechanisms"][0]["event"].update(noise_multiplier=0), "epsilon"),
        (lambda p: p["claim"]["crosscheck"].update(epsilon=1.0), "epsilon"),
        (lambda p: p["claim"].update(advantage=0.01), "bounds"),
        (lambda p: p["claim"].update(mu=0.1), "bounds"),
        (lambda p: p["claim"]["trade_off"]["tpr_at_most"].__setitem__(2, 0.001), "bounds"),
        (lambda p: p["claim"]["trade_off"]["fpr"].pop(), "bounds"),
        (lambda p: p["claim"].update(patients=10**6), "delta"),
        (lambda p: p["claim"].update(unit="scan"), "certificate"),
        (lambda p: p["claim"].update(noise_source="seeded"), "certificate"),
        (lambda p: p["checks"][0].update(ok=False), "certificate"),
        (lambda p: p["claim"].pop("mu"), "certificate"),
        (lambda p: p["plain_words"].__setitem__(0, "Nobody can be recognised."), "plain words"),
        (lambda p: p["limits"].pop(), "plain words"),
        (lambda p: p["cumulative"].update(epsilon=0.1), "spending"),
        (lambda p: p["cumulative"].update(runs=0), "certificate"),
        (lambda p: p["cumulative"].update(delta=1e-3), "spending"),
        (lambda p: p.update(audit=None), "audit"),
        (lambda p: p["audit"].update(decision="RELEASE"), "audit"),
        (lambda p: p["release"].update(count=4), "count"),
        (lambda p: p["release"].update(formats=["npz", "nifti", "png"]), "count"),
    ],
)
def test_a_signed_claim_that_does_not_hold_fails(released: Path, change: Callable[[Any], Any], check: str) -> None:
    """Even who holds a key cannot sign a smaller epsilon than the mechanisms cost, or more images than there are."""
    reseal(released, change)
    assert fail(released).startswith(f"{check}: ")


def _plant(provenance: dict[str, Any]) -> None:
    provenance["model"]["recipe"]["canaries"]["enabled"] = True


@pytest.mark.parametrize(
    ("name", "change", "check"),
    [
        ("audit/audit.json", lambda a: a["claim"].update(epsilon=0.1), "audit: .*'epsilon'"),
        ("audit/audit.json", lambda a: a["claim"].update(patients=10**6), "audit: .*'patients'"),
        ("audit/audit.json", lambda a: a["claim"].update(receipt_digest="0" * 64), "audit: .*'receipt_digest'"),
        ("audit/audit.json", lambda a: a["claim"].update(weights_sha256="0" * 64), "audit: .*'weights_sha256'"),
        ("audit/audit.json", lambda a: a["claim"].pop("mechanisms"), "audit: "),
        ("audit/audit.json", lambda a: a["decision"].update(verdict="RELEASE"), "audit: .*another decision"),
        ("audit/audit.json", lambda a: a.update(audience="internal"), "audit: .*not the public"),
        ("audit/audit.json", lambda a: a.update(note="x"), "audit: "),
        ("provenance.json", _plant, "canaries: the training planted canaries"),
        ("provenance.json", lambda p: p["model"].pop("recipe"), "canaries: the release names no recipe"),
    ],
)
def test_parts_of_a_signed_release_that_tell_different_stories_fail(
    released: Path, name: str, change: Callable[[Any], Any], check: str
) -> None:
    story = read(released / name)
    change(story)
    (released / name).write_text(json.dumps(story), encoding="utf-8")
    reseal(released, lambda proof: None)
    fail(released, f"^{check}")


def test_a_report_that_went_missing_is_seen(released: Path) -> None:
    (released / "audit" / "audit.json").unlink()
    reseal(released, lambda proof: None)
    fail(released, "^audit: .*missing")


def test_a_statement_of_other_subjects_or_another_claim_fails(released: Path) -> None:
    sums = manifest.parse((released / "SHA256SUMS").read_bytes())
    sums.pop("README.md")
    reseal(released, lambda proof: None, sums=sums)
    fail(released, "^statement: ")
    reseal(released, lambda proof: None, predicate={"epsilon": 0.1})
    fail(released, "^claim: ")


def test_a_signature_from_another_release_fails(released: Path, base_run: Path, tmp_path: Path) -> None:
    from medvae.config import ReleaseConfig

    hand.release(base_run, tmp_path / "other", ReleaseConfig(count=2), render=hand.fake_render)
    shutil.copyfile(tmp_path / "other" / "statement.dsse.json", released / "statement.dsse.json")
    fail(released, "^statement: ")


def test_an_envelope_of_another_type_fails(released: Path) -> None:
    path = released / "statement.dsse.json"
    outer = read(path)
    content = json.loads(base64.b64decode(outer["payload"]))
    outer["payload"] = base64.b64encode(json.dumps(content, indent=1).encode()).decode()
    path.write_text(json.dumps(outer, indent=2) + "\n")
    fail(released, "signature: it does not belong")


def test_a_certificate_without_a_key_fails(released: Path) -> None:
    path = released / "privacy" / "certificate.json"
    for text in ("{}", "[]", "{", json.dumps({"signer": {"public_key": "none"}})):
        path.write_text(text)
        sums = manifest.digests(released)
        (released / "SHA256SUMS").write_bytes(manifest.render(sums))
        fail(released, "signature|certificate")


def test_what_is_no_release_is_bad_input(tmp_path: Path, base_run: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing", base_run):
        with pytest.raises(RunError, match="no release"):
            verify(folder)


def test_a_public_key_that_is_none_is_bad_input(base_release: Path, tmp_path: Path) -> None:
    other = ed25519.Ed25519PrivateKey.generate()
    private = other.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "private.pem").write_bytes(private)
    for path in (tmp_path / "private.pem", tmp_path / "missing.pem"):
        with pytest.raises(ConfigError, match="public key"):
            verify(base_release, public_key=path)
