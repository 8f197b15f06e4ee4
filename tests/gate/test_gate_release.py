"""What a release folder holds, what it never holds, and that it appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hand_made_run as hand
import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from medvae.config import CanaryConfig, Recipe, ReleaseConfig
from medvae.errors import ConfigError, MedvaeError, RunError
from medvae.gate import bids, card, certificate, manifest, sign
from medvae.gate import release as gate
from medvae.gate.verify import verify
from medvae.schemas import problem
from medvae.types import Condition, ImageSpace, Intensity, ModelRelease

SMALL = ReleaseConfig(count=2, formats=("npz",))
CONTRACT = {
    "README.md", "DATASET_CARD.md", "LICENSE", "CITATION.cff", "croissant.json", "dataset_description.json",
    "participants.tsv", "participants.json", "nifti", "dicom", "png", "cohort.npz", "huggingface", "viewer.html",
    "privacy", "provenance.json", "SHA256SUMS", "statement.dsse.json",
}  # fmt: skip


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def tool(name: str) -> str:
    """Return a validator of the test extra, beside the running Python or on the path."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_the_folder_is_as_the_contract_says(base_release: Path) -> None:
    assert {p.name for p in base_release.iterdir()} == CONTRACT | {".bidsignore", "audit"}
    assert {p.name for p in (base_release / "privacy").iterdir()} == {
        "certificate.json",
        "certificate.html",
        "certificate.pdf",
    }
    assert {p.name for p in (base_release / "audit").iterdir()} == {"audit.html", "audit.json"}


@pytest.mark.parametrize("name", ["certificate", "provenance"])
def test_json_files_keep_to_their_schema(base_release: Path, name: str) -> None:
    path = base_release / ("privacy" if name == "certificate" else ".") / f"{name}.json"
    data = read(path)
    assert problem(name, data) is None
    assert problem(name, {**data, "loss": 0.25}) is not None
    for key in data:
        assert problem(name, {k: v for k, v in data.items() if k != key}) is not None, key


def test_the_claim_is_whole(base_release: Path) -> None:
    """The list of shared privacy rules: what a claim must state."""
    proof = read(base_release / "privacy" / "certificate.json")
    claim = proof["claim"]
    assert (claim["unit"], claim["neighboring"], claim["accountant"]) == ("patient", "add-remove", "pld")
    assert claim["trade_off"]["fpr"] == list(certificate.FPR)
    assert all(t >= f for f, t in zip(claim["trade_off"]["fpr"], claim["trade_off"]["tpr_at_most"], strict=True))
    assert claim["charged"] == ["moments", "dpsgd"]
    assert claim["mu"] > 0
    assert 0 < claim["advantage"] < 1
    assert abs(claim["crosscheck"]["epsilon"] / claim["epsilon"] - 1) < 0.01
    assert claim["noise_source"].startswith("os_entropy")
    for words in ("unit_words", "sampler", "patients_words", "floating_point"):
        assert len(claim[words]) > 40
    lock = Path(bids.__file__).parents[2] / "constraints.txt"
    assert proof["software"]["lock_sha256"] == hashlib.sha256(lock.read_bytes()).hexdigest()


def test_epsilon_is_never_said_alone(base_release: Path) -> None:
    for name in ("README.md", "DATASET_CARD.md", "CITATION.cff", "croissant.json", "nifti/README.md"):
        text = (base_release / name).read_text()
        assert "(delta 1e-05, unit patient, add-remove neighbours, PLD accountant)" in text, name


def test_sums_are_those_of_sha256sum(base_release: Path) -> None:
    done = subprocess.run([tool("sha256sum"), "-c", "SHA256SUMS"], cwd=base_release, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode()
    listed = set(manifest.parse((base_release / "SHA256SUMS").read_bytes()))
    found = {p.relative_to(base_release).as_posix() for p in base_release.rglob("*") if p.is_file()}
    assert found - listed == {"SHA256SUMS", "statement.dsse.json"}


def test_the_statement_is_in_toto_in_dsse(base_release: Path) -> None:
    """The signature is checked here by the protocol's text and cryptography alone, with none of our code."""
    import base64

    envelope = read(base_release / "statement.dsse.json")
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    body = base64.b64decode(envelope["payload"])
    signer = read(base_release / "privacy" / "certificate.json")["signer"]
    key = serialization.load_pem_public_key(signer["public_key"].encode())
    assert isinstance(key, ed25519.Ed25519PublicKey)
    kind = envelope["payloadType"]
    pae = f"DSSEv1 {len(kind)} {kind} {len(body)} ".encode() + body
    key.verify(base64.b64decode(envelope["signatures"][0]["sig"]), pae)
    statement = json.loads(body)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert {s["name"] for s in statement["subject"]} == set(manifest.parse((base_release / "SHA256SUMS").read_bytes()))
    assert statement["predicate"]["unit"] == "patient"


def test_croissant_validates(base_release: Path) -> None:
    done = subprocess.run(
        [tool("mlcroissant"), "validate", "--jsonld", "croissant.json"],
        cwd=base_release, capture_output=True, check=False, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    data = read(base_release / "croissant.json")
    assert sum(key.startswith("rai:") for key in data) >= 10
    for part in data["distribution"]:
        if "sha256" in part:
            assert manifest.digest(base_release / part["contentUrl"]) == part["sha256"]


def bids_errors(folder: Path) -> tuple[list[Any], list[str]]:
    done = subprocess.run(
        [tool("bids-validator-deno"), "--format", "json", str(folder)], capture_output=True, check=False, text=True
    )
    found = json.loads(done.stdout)
    issues = [i for i in found["issues"]["issues"] if i["severity"] == "error"]
    return issues, found["summary"]["subjects"]


def test_bids_validates_at_the_root_and_in_nifti(base_release: Path) -> None:
    issues, _ = bids_errors(base_release)
    assert issues == []
    issues, subjects = bids_errors(base_release / "nifti")
    assert issues == []
    assert len(subjects) == 3


def test_bids_validates_where_bids_has_no_modality(tmp_path: Path) -> None:
    space = ImageSpace((12, 9), (1.0, 1.0), "CT", Intensity("window", -1000, 400), ())
    run = hand.build_run(tmp_path / "ct", space=space)
    hand.release(run, tmp_path / "release", ReleaseConfig(count=2, formats=("nifti", "png")), render=hand.fake_render)
    assert bids_errors(tmp_path / "release")[0] == []
    assert bids_errors(tmp_path / "release" / "nifti")[0] == []
    verify(tmp_path / "release")


def test_the_citation_and_the_card_are_yaml(base_release: Path) -> None:
    assert yaml.safe_load((base_release / "CITATION.cff").read_text())["type"] == "dataset"
    front = (base_release / "DATASET_CARD.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front)["license"] == "cc-by-4.0"


def test_a_title_cannot_break_a_file(run: Path, tmp_path: Path) -> None:
    title = 'A "quoted": title\n# with: [a line], <b>\ttab'
    hand.release(run, tmp_path / "out", ReleaseConfig(count=2, formats=("npz",), title=title), render=hand.fake_render)
    assert yaml.safe_load((tmp_path / "out/CITATION.cff").read_text())["title"] == " ".join(title.split())
    verify(tmp_path / "out")


def test_conditions_are_uniform_unless_given(base_release: Path) -> None:
    rows = (base_release / "participants.tsv").read_text().splitlines()
    assert rows[0] == "participant_id\tsize_class\tage"
    assert [r.split("\t")[0] for r in rows[1:]] == ["sub-SYN0001", "sub-SYN0002", "sub-SYN0003"]
    assert {r.split("\t")[1] for r in rows[1:]} == {"small", "large"}
    assert "uniform" in read(base_release / "provenance.json")["synthesis"]["conditions"]


def test_a_table_of_conditions_is_repeated_and_other_columns_stay_behind(run: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text(f"patient,age,size_class\n{hand.PLANTED[0]},30,small\n{hand.PLANTED[0]},60.5,large\n")
    config = ReleaseConfig(count=5, formats=("npz",), conditions=table)
    hand.release(run, tmp_path / "out", config, render=hand.fake_render)
    rows = [r.split("\t")[1:] for r in (tmp_path / "out/participants.tsv").read_text().splitlines()[1:]]
    assert rows == [["small", "30"], ["large", "60.5"], ["small", "30"], ["large", "60.5"], ["small", "30"]]
    assert "given by the data holder" in read(tmp_path / "out/privacy/certificate.json")["release"]["conditions"]
    assert found_in(tmp_path / "out", [hand.PLANTED[0], "table.csv"]) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no column|cannot be read"),
        ("age,size_class\n", "no row"),
        ("age\n30\n", "no column 'size_class'"),
        ("age,size_class\n30,JANSEN\n", "row 1 .* not a known class"),
        ("age,size_class\n30,small\n200,small\n", "row 2 .* not a number from 20 to 90"),
        ("age,size_class\nnan,small\n", "row 1"),
        ("age,size_class\nJANSEN,small\n", "row 1"),
        ("age,size_class\n30\n", "row 1"),
    ],
)
def test_a_bad_table_is_one_sentence_and_repeats_no_value(run: Path, tmp_path: Path, text: str, reason: str) -> None:
    table = tmp_path / "table.csv"
    table.write_text(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        hand.release(run, tmp_path / "out", ReleaseConfig(count=2, conditions=table))
    assert "JANSEN" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_used_folder_is_refused_and_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        hand.release(run, tmp_path / "out", SMALL)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_an_empty_folder_and_the_remains_of_a_crash_are_no_hindrance(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "torn.npz").write_bytes(b"torn")
    hand.release(run, tmp_path / "out", SMALL, render=hand.fake_render)
    assert not (tmp_path / ".out.partial").exists()
    verify(tmp_path / "out")


STAGES: dict[str, tuple[Any, str]] = {
    "generate": (gate.sample, "generate"),
    "certificate": (certificate, "build"),
    "readme": (card, "readme"),
    "citation": (card, "citation"),
    "bids": (bids, "write_bids"),
    "croissant": (gate, "croissant"),
    "provenance": (gate, "_provenance"),
    "audit": (gate, "write_audit"),
    "sums": (manifest, "render"),
    "statement": (sign, "seal"),
    "nifti": (gate.WRITERS, "nifti"),
    "dicom": (gate.WRITERS, "dicom"),
    "png": (gate.WRITERS, "png"),
    "npz": (gate.WRITERS, "npz"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("late", "error"),
    [(False, OSError(28, "No space left on device")), (True, KeyboardInterrupt())],
    ids=["disk full before", "ctrl-c after"],
)
def test_nothing_half_written_after_a_failure_anywhere(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    late: bool,
    error: BaseException,
) -> None:
    place, name = STAGES[stage]
    original: Callable[..., Any] = place[name] if isinstance(place, dict) else getattr(place, name)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if late:
            original(*args, **kwargs)
        raise error

    if isinstance(place, dict):
        monkeypatch.setitem(place, name, fail)
    else:
        monkeypatch.setattr(place, name, fail)
    before = sorted(p.name for p in tmp_path.iterdir())
    formats = ("npz", stage) if stage in gate.WRITERS else ("npz",)
    with pytest.raises(type(error)):
        hand.release(run, tmp_path / "out", ReleaseConfig(count=1, formats=formats), render=hand.fake_render)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_model_that_makes_other_shapes_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fewer(model: ModelRelease, conditions: Any, seed: int, progress: Any = None) -> Any:
        return hand.fake_generate(model, conditions[:1], seed)

    monkeypatch.setattr(gate.sample, "generate", fewer)
    with pytest.raises(MedvaeError, match="shape"):
        hand.release(run, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_progress_reaches_its_end_and_never_goes_back(run: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = ReleaseConfig(count=3, formats=("nifti", "png", "npz"))
    hand.release(run, tmp_path / "out", config, render=hand.fake_render, progress=lambda *step: seen.append(step))
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert seen[-1] == (12, 12)


def found_in(folder: Path, needles: list[str]) -> list[str]:
    """Return each needle found in any name or byte below `folder`, archives and compressed files opened."""
    hits = []
    for path in folder.rglob("*"):
        texts = [path.relative_to(folder).as_posix().encode()]
        if path.is_file():
            texts += [path.read_bytes(), *unpacked(path)]
        hits += [n for n in needles for text in texts if n.encode() in text]
    return hits


def unpacked(path: Path) -> list[bytes]:
    import base64
    import gzip

    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            return [archive.read(name) for name in archive.namelist()]
    if path.suffix == ".gz" and not tarfile.is_tarfile(path):
        return [gzip.decompress(path.read_bytes())]
    if path.name == "statement.dsse.json":
        return [base64.b64decode(read(path)["payload"])]
    return []


def test_nothing_of_the_private_folder_is_in_the_release(base_run: Path, base_release: Path) -> None:
    """Identifiers planted in the run's config, losses and ledger note are searched for in every byte."""
    own = base_run / "private"
    paths = [str(base_run), str(base_run.parent), base_run.parent.name, "ledger.db", "losses", "BEGIN PRIVATE KEY"]
    assert found_in(own, list(hand.PLANTED)) != []
    assert found_in(base_release, [*hand.PLANTED, *paths]) == []


def test_the_search_finds_what_is_planted(released: Path) -> None:
    """The leak test must be able to fail, inside archives too."""
    np.savez_compressed(released / "cohort.npz", images=np.zeros(2), notes=np.asarray([hand.PLANTED[1]], dtype="S"))
    (released / f"scan_{hand.PLANTED[0]}.txt").touch()
    assert {hand.PLANTED[0], hand.PLANTED[1]} <= set(found_in(released, list(hand.PLANTED)))


def test_free_text_of_the_run_does_not_pass(run: Path, tmp_path: Path, edit_privacy: Callable[..., None]) -> None:
    edit_privacy(warnings=[hand.PLANTED[0]], plain_words=[hand.PLANTED[1]], note=hand.PLANTED[0])
    hand.release(run, tmp_path / "out", SMALL, render=hand.fake_render)
    assert found_in(tmp_path / "out", list(hand.PLANTED)) == []


def pem(key: Any) -> bytes:
    return bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def test_the_runs_own_key_is_made_once_and_stays_private(run: Path, tmp_path: Path) -> None:
    first = hand.release(run, tmp_path / "a", SMALL, render=hand.fake_render)
    second = hand.release(run, tmp_path / "b", SMALL, render=hand.fake_render)
    assert first["key_id"] == second["key_id"]
    own = run / "private" / "signing_key.pem"
    assert own.stat().st_mode & 0o777 == 0o600
    secret = own.read_text().splitlines()[1]
    assert found_in(tmp_path / "a", [secret]) == []


def test_a_given_key_signs_and_the_variable_stands_in_for_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, other = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(pem(key))
    (tmp_path / "other.pem").write_bytes(pem(other))
    monkeypatch.setenv(sign.KEY_VARIABLE, str(tmp_path / "other.pem"))
    by_variable = hand.release(run, tmp_path / "a", SMALL, render=hand.fake_render)
    given = SMALL.model_copy(update={"key": tmp_path / "key.pem"})
    by_config = hand.release(run, tmp_path / "b", given, render=hand.fake_render)
    assert by_variable["key_id"] == sign.key_id(other.public_key())
    assert by_config["key_id"] == sign.key_id(key.public_key())
    assert not (run / "private" / "signing_key.pem").exists()


def test_a_run_that_cannot_be_written_asks_for_a_key(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(sign, "_write_private", refused)
    with pytest.raises(ConfigError, match="MEDVAE_SIGNING_KEY"):
        hand.release(run, tmp_path / "out", SMALL)


@pytest.mark.parametrize("content", [b"", b"no key", pem(ec.generate_private_key(ec.SECP256R1()))])
def test_a_key_that_cannot_sign_is_bad_input(run: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key.pem").write_bytes(content)
    with pytest.raises(ConfigError, match="signing key"):
        hand.release(run, tmp_path / "out", SMALL.model_copy(update={"key": tmp_path / "key.pem"}))
    with pytest.raises(ConfigError, match="signing key"):
        hand.release(run, tmp_path / "out", SMALL.model_copy(update={"key": tmp_path / "missing.pem"}))
    assert not (tmp_path / "out").exists()


def test_a_real_model_makes_the_same_images_from_the_same_seed(tmp_path: Path) -> None:
    """With the real generator: an untrained network stands in for a trained one."""
    import torch

    from medvae.nets.build import build_model, make_card, state_arrays
    from medvae.train.rule import resolve

    space = ImageSpace(
        (16, 16), (1.0, 1.0), "MR", Intensity("percentile", 1, 99), (Condition("kind", "class", ("a", "b")),)
    )
    recipe = resolve(Recipe(canaries=CanaryConfig(enabled=False)), 50, space)
    torch.manual_seed(0)
    model = ModelRelease(state_arrays(build_model(space, recipe)), make_card(space, recipe))
    run = hand.build_run(tmp_path / "real", space=space, model=model)
    digests = []
    for name in ("a", "b"):
        hand.release(run, tmp_path / name, ReleaseConfig(count=4, formats=("npz",), seed=3), render=hand.fake_render)
        verify(tmp_path / name)
        with np.load(tmp_path / name / "cohort.npz", allow_pickle=False) as arrays:
            assert arrays["images"].shape == (4, 16, 16)
            assert sorted(arrays["labels"]) == [0, 0, 1, 1]
            digests.append(arrays["images"].tobytes())
    assert digests[0] == digests[1]
