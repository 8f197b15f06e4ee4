"""Pretraining: what it sees, that it repeats and costs nothing, and what a public cohort must not be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_cohort import small_config, write_cohort
from test_stages import PRETRAINED, SPACE, Stop, config_with, same, weights

from medvae.cli_run import run as medvae
from medvae.config import ReleaseConfig
from medvae.dp.ledger import Ledger
from medvae.errors import ConfigError, PrivacyError, RunError
from medvae.gate.release import release as write_out
from medvae.gate.verify import verify
from medvae.nets.build import build_model
from medvae.schemas import problem
from medvae.synth.procedural import draw_batch, draw_conditions
from medvae.train.checkpoint import load_checkpoint
from medvae.train.planning import make_plan
from medvae.train.pretraining import open_public, pretrained_state, put_into
from medvae.train.run import train
from medvae.types import Condition, ImageSpace, Intensity
from medvae.vault.store import CohortStore, open_cohort

PUBLIC = {"pretraining": {"source": "public", "steps": 3, "batch": 4}}
VOLUMES = ImageSpace(
    (8, 12, 10),
    (1.0, 1.0, 1.0),
    "MR",
    Intensity("percentile", 1, 99),
    (Condition("size", "class", ("small", "large")), Condition("age", "continuous", range=(20.0, 90.0))),
    (1, 2),
)


def opened(folder: Path) -> CohortStore:
    store: CohortStore = open_cohort(folder).reveal()
    return store


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return write_cohort(tmp_path / "public", patients=11)


# --- made-up images ---


@pytest.mark.parametrize("space", [SPACE, VOLUMES])
def test_made_up_images_are_as_a_cohort_would_hold_them(space: ImageSpace) -> None:
    made = [draw_batch(space, 40, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    x = made[0]
    assert x.shape == (40, space.channels, *space.spatial_shape)
    assert 0 <= x[:, 0].min() < x[:, 0].max() <= 1
    assert x[:, 0].flatten(1).std(1).min() > 0
    masks = x[:, 1:]
    assert ((masks == 0) | (masks == 1)).all()
    assert (masks.sum(1) <= 1).all()
    assert (masks.mean(tuple(range(2, masks.dim()))).mean(0) > 0.01).all()
    condition = draw_conditions(space, 40, torch.Generator().manual_seed(1))
    assert condition.shape == (40, space.condition_width)
    assert (condition[:, :2].sum(1) == 1).all()


def test_the_generator_opens_no_file() -> None:
    script = (
        "import sys, torch\n"
        "from medvae.synth.procedural import draw_batch, draw_conditions\n"
        "from medvae.types import ImageSpace, Intensity\n"
        "space = ImageSpace((8, 8), (1., 1.), 'MR', Intensity('window', 0, 1), (), (1,))\n"
        "draw_batch(space, 2, torch.Generator())\n"  # what is loaded at the first call is loaded now
        "seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append(args) if event in ('open', 'os.listdir') else None)\n"
        "draw_batch(space, 4, torch.Generator()), draw_conditions(space, 4, torch.Generator())\n"
        "assert not seen, seen\n"
        "open(sys.executable, 'rb').close()\n"
        "assert seen, 'the hook sees nothing'\n"
        "assert not any(m.startswith(('medvae.vault', 'medvae.train', 'medvae.audit')) for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# --- the stage ---


@pytest.mark.parametrize("closed_form", [True, False])
def test_pretraining_does_not_depend_on_the_private_cohort(tmp_path: Path, closed_form: bool) -> None:
    states = []
    config = config_with(
        {**PRETRAINED, "moments": {**small_config().recipe.moments.model_dump(), "enabled": closed_form}}
    )
    for patients in (30, 17):
        run = tmp_path / f"run{patients}"
        train(write_cohort(tmp_path / f"cohort{patients}", patients=patients), run, config)
        found = load_checkpoint(run / "private", "pretraining")
        assert found is not None
        states.append({name: tensor.numpy() for name, tensor in found[0].items()})
    assert same(*states)


def test_a_pretrained_network_starts_at_the_closed_form_and_has_seen_images() -> None:
    recipe = make_plan(
        60, SPACE, config_with({"pretraining": {"source": "procedural", "steps": 60, "batch": 16}})
    ).recipe
    model, fresh = build_model(SPACE, recipe), build_model(SPACE, recipe)
    put_into(model, pretrained_state(SPACE, recipe, None, 0))
    x = draw_batch(SPACE, 8, torch.Generator().manual_seed(5))
    condition = draw_conditions(SPACE, 8, torch.Generator().manual_seed(5))
    z = torch.randn(8, model.latent_dim, generator=torch.Generator().manual_seed(5))
    assert torch.equal(model.decode(z, condition), fresh.decode(z, condition))
    assert torch.equal(model.prior_mean(condition), fresh.prior_mean(condition))
    assert not torch.equal(model.encoder(x), fresh.encoder(x))

    deep = recipe.model_copy(update={"moments": recipe.moments.model_copy(update={"enabled": False})})
    trained, untrained = build_model(SPACE, deep), build_model(SPACE, deep)
    put_into(trained, pretrained_state(SPACE, deep, None, 0))
    assert trained(x, condition, z).mean().item() < untrained(x, condition, z).mean().item()


def test_a_run_stopped_while_pretraining_goes_on_to_the_same_weights(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with(PRETRAINED)
    train(cohort, tmp_path / "whole", config)

    def stop(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("medvae.train.pretraining.put_into", stop)
        with pytest.raises(Stop):
            train(cohort, tmp_path / "cut", config)
    train(cohort, tmp_path / "cut", config, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    plain = train(cohort, tmp_path / "plain", config_with({}))
    assert plain["mechanisms"] == json.loads((tmp_path / "whole" / "privacy.json").read_text())["mechanisms"]


# --- public cohorts ---


def test_a_public_cohort_is_named_in_claim_and_certificate_and_never_by_name(
    cohort: Path, public: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    claim = train(cohort, run, config_with(PUBLIC, noise_source="os_entropy"), public=public)
    store = opened(public)
    assert problem("privacy", claim) is None
    named = {"fingerprint": store.fingerprint(), "scans": len(store), "patients": 11, "protected": False}
    assert claim["public_cohort"] == named
    write_out(run, out, ReleaseConfig(count=4, override="a test of public cohorts on made-up scans"))
    assert verify(out)["ok"]
    proof = json.loads((out / "privacy" / "certificate.json").read_text())["claim"]
    assert proof["public_cohort"] == named
    words = " ".join(proof["declared_public"])
    assert "does not protect it" in words
    assert f"{len(store)} scans of 11 patients" in words
    for path in (run / "privacy.json", out / "privacy" / "certificate.json", out / "README.md"):
        assert str(public) not in path.read_text()
    without = train(cohort, tmp_path / "plain", config_with({}, noise_source="os_entropy"))
    assert "public_cohort" not in without
    assert without["mechanisms"] == claim["mechanisms"]


def test_a_public_cohort_with_the_same_conditions_teaches_them_too(cohort: Path, public: Path, tmp_path: Path) -> None:
    recipe = make_plan(60, SPACE, config_with({**PUBLIC, "moments": {"enabled": False}})).recipe
    declared = open_public(public, opened(cohort))
    assert any(name.startswith("prior.") for name in pretrained_state(SPACE, recipe, declared, 0))
    other = write_cohort(tmp_path / "other", patients=9)
    info = json.loads((other / "cohort.json").read_text())
    info["space"]["conditions"]["side"]["classes"] = ["x", "y"]
    (other / "cohort.json").write_text(json.dumps(info))
    declared = open_public(other, opened(cohort))
    assert not any(name.startswith("prior.") for name in pretrained_state(SPACE, recipe, declared, 0))


def test_the_private_cohort_is_refused_as_public_one(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="the private one itself"):
        train(cohort, tmp_path / "run", config_with({}), public=cohort)
    copy = Path(shutil.copytree(cohort, tmp_path / "copy"))
    with pytest.raises(PrivacyError, match="the private one itself"):
        train(cohort, tmp_path / "run", config_with({}), public=copy)
    (copy / "key").chmod(0o600)
    (copy / "key").write_bytes(bytes(32))  # ingested anew: another key, the same scans
    with pytest.raises(PrivacyError, match=f"{len(opened(cohort))} scans"):
        train(cohort, tmp_path / "run", config_with({}), public=copy)
    assert not (tmp_path / "run").exists()
    assert Ledger(cohort / "ledger.db").spent(1e-5) == 0


def test_one_shared_scan_is_enough_to_refuse_even_a_held_out_one(public: Path, tmp_path: Path) -> None:
    private = write_cohort(tmp_path / "private", patients=20, holdout=8)
    held = opened(private).rows([19])[0]
    ours = np.load(private / "images.npy")
    theirs = np.load(public / "images.npy")
    theirs[5] = ours[held]
    np.save(public / "images.npy", theirs)
    with pytest.raises(PrivacyError, match="holds 1 scans"):
        open_public(public, opened(private))


def test_exit_codes_of_public_cohorts(
    cohort: Path, public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def code(*more: str) -> int:
        return medvae(["train", str(cohort), "--dp-epsilon", "8", "-o", str(tmp_path / "run"), "--quiet", *more])

    assert code("--public", str(cohort)) == 3
    said = capsys.readouterr()
    assert str(cohort) not in said.out + said.err
    other = write_cohort(tmp_path / "flat", patients=5, shape=(8, 9))
    assert code("--public", str(other)) == 2
    assert "same --shape" in capsys.readouterr().err
    assert code("--public", str(tmp_path / "nowhere")) == 2


def test_pipeline_and_flag_must_agree(cohort: Path, public: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add --public"):
        train(cohort, tmp_path / "run", config_with(PUBLIC))
    with pytest.raises(ConfigError, match="leave one of them out"):
        train(cohort, tmp_path / "run", config_with(PRETRAINED), public=public)
    with pytest.raises(ConfigError, match="enable dpsgd"):
        train(cohort, tmp_path / "run", config_with({"dpsgd": {"enabled": False}}), public=public)


def test_resuming_with_another_public_cohort_is_refused(
    cohort: Path, public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("medvae.train.run.fit_moments", stop)
        with pytest.raises(Stop):
            train(cohort, tmp_path / "run", config_with(PUBLIC), public=public)
    with pytest.raises(RunError, match="another public cohort"):
        train(cohort, tmp_path / "run", config_with(PUBLIC), public=write_cohort(tmp_path / "p2", 7), resume=True)
    train(cohort, tmp_path / "run", config_with(PUBLIC), public=public, resume=True)
