"""Whole runs on a small cohort in the real store."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from small_cohort import Stop, same, small_config, weights, write_cohort

from medvae.dp.accounting import pld_epsilon
from medvae.dp.ledger import Ledger
from medvae.errors import BudgetExceeded, ConfigError, RunError
from medvae.nets.build import load_release
from medvae.schemas import problem
from medvae.synth.store import read_release
from medvae.train import run as train_run
from medvae.train.run import train
from medvae.types import Mechanism


def stop_at(step: int) -> object:
    def on_step(done: int, _stats: Mapping[str, float]) -> None:
        if done == step:
            raise Stop

    return on_step


def test_a_run_leaves_a_model_and_its_claim(cohort: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    claim = train(cohort, run, small_config(noise_source="os_entropy"))
    assert claim == json.loads((run / "privacy.json").read_text())
    assert problem("privacy", claim) is None
    assert claim["releasable"] is True
    assert claim["reasons"] == []
    assert 7.9 < claim["epsilon"] <= 8.0
    assert claim["noise_source"].startswith("os_entropy")
    assert claim["crosscheck"]["epsilon"] == pytest.approx(claim["epsilon"], rel=0.01)
    mechanisms = [Mechanism.from_json(m) for m in claim["mechanisms"]]
    assert pld_epsilon(mechanisms, claim["delta"]) == claim["epsilon"]
    assert [m.count for m in mechanisms if m.name == "dpsgd"] == [claim["steps"]] == [6]
    assert all(np.isfinite(w).all() for w in weights(run).values())
    load_release(read_release(run / "model"))
    events = Ledger(cohort / "ledger.db").events()
    assert [e.kind for e in events] == ["create", "reserve", "commit"]
    assert events[1].receipt.to_json() == claim["receipt"]
    assert list(events[1].mechanisms) == mechanisms
    assert any("few" in w for w in claim["warnings"])


def test_training_moves_the_weights_and_fresh_noise_differs(cohort: Path, tmp_path: Path) -> None:
    config = small_config(noise_source="os_entropy")
    train(cohort, tmp_path / "a", config)
    train(cohort, tmp_path / "b", config)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert not np.array_equal(a["decoder.last.conv.weight"], b["decoder.last.conv.weight"])
    assert not np.array_equal(a["linear.mean_map"], b["linear.mean_map"])
    assert np.abs(a["decoder.last.conv.weight"]).max() > 0


def test_private_statistics_stay_in_the_private_folder(cohort: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(cohort, run, small_config())
    lines = [json.loads(line) for line in (run / "private" / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(6))
    planted = [repr(line[key]) for line in lines for key in ("loss", "median_norm") if line[key] is not None]
    assert planted
    public = [p for p in run.rglob("*") if p.is_file() and "private" not in p.relative_to(run).parts]
    assert {p.name for p in public} == {
        "canary.json",
        "canary_commitment.json",
        "privacy.json",
        "weights.safetensors",
        "model.json",
    }
    for path in public:
        content = path.read_bytes()
        assert not any(value.encode() in content for value in planted)
        assert str(cohort).encode() not in content
        assert not any(word in content for word in (b'"loss"', b"median_norm"))
        # canary.json counts clipped made-up patients; of real ones nothing is said anywhere.
        assert b"clipped" not in content or path.name == "canary.json"


def test_a_seeded_run_is_repeatable_and_never_releasable(cohort: Path, tmp_path: Path) -> None:
    claim = train(cohort, tmp_path / "a", small_config())
    train(cohort, tmp_path / "b", small_config())
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert claim["releasable"] is False
    assert "repeated" in claim["reasons"][0]


@pytest.mark.parametrize("step", [0, 3, 5])
def test_a_resumed_run_equals_an_undisturbed_one(cohort: Path, tmp_path: Path, step: int) -> None:
    whole = train(cohort, tmp_path / "whole", small_config())
    with pytest.raises(Stop):
        train(cohort, tmp_path / "cut", small_config(), on_step=stop_at(step))
    assert not (tmp_path / "cut" / "privacy.json").exists()
    resumed = train(cohort, tmp_path / "cut", small_config(), resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert resumed["epsilon"] == whole["epsilon"]
    reserved = [e.run_id for e in Ledger(cohort / "ledger.db").events() if e.kind == "reserve"]
    assert reserved == [whole["receipt"]["run_id"], resumed["receipt"]["run_id"]]
    lines = (tmp_path / "cut" / "private" / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(6))


def test_resuming_never_releases_the_moments_twice(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(noise_source="os_entropy")
    with pytest.raises(Stop):
        train(cohort, tmp_path / "run", config, on_step=stop_at(1))

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the moments were released a second time")

    monkeypatch.setattr(train_run, "fit_moments", refuse)
    train(cohort, tmp_path / "run", config, resume=True)


def test_the_ledger_is_charged_before_a_scan_is_read(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def load(_store: object, _rows: object) -> None:
        seen.extend(e.kind for e in Ledger(cohort / "ledger.db").events())
        raise Stop

    monkeypatch.setattr("medvae.vault.store.CohortStore.load", load)
    with pytest.raises(Stop):
        train(cohort, tmp_path / "run", small_config())
    assert seen == ["create", "reserve"]
    assert Ledger(cohort / "ledger.db").spent(1e-5) > 7.9


def test_over_budget_is_refused_with_nothing_left_behind(cohort: Path, tmp_path: Path) -> None:
    Ledger(cohort / "ledger.db").set_budget(10.0, 1e-5)
    train(cohort, tmp_path / "a", small_config())
    with pytest.raises(BudgetExceeded):
        train(cohort, tmp_path / "b", small_config())
    assert not (tmp_path / "b").exists()


def test_resuming_a_finished_run_returns_its_result(cohort: Path, tmp_path: Path) -> None:
    claim = train(cohort, tmp_path / "run", small_config())
    assert train(cohort, tmp_path / "run", small_config(threads=2), resume=True) == claim
    with pytest.raises(RunError, match="dp_epsilon"):
        train(cohort, tmp_path / "run", small_config(dp_epsilon=4.0), resume=True)


def test_one_charge_pays_for_one_model(cohort: Path, tmp_path: Path) -> None:
    """A run folder wound back and trained again with fresh noise would be a second release."""
    config = small_config(noise_source="os_entropy")
    run = tmp_path / "run"
    train(cohort, run, config)
    (run / "privacy.json").unlink()
    for path in (run / "private").glob("checkpoint*"):
        path.unlink()
    with pytest.raises(RunError, match="another model"):
        train(cohort, run, config, resume=True)
    assert not (run / "privacy.json").exists()


def test_resuming_with_other_settings_or_another_cohort_is_refused(cohort: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Stop):
        train(cohort, run, small_config(), on_step=stop_at(1))
    with pytest.raises(RunError, match="seed"):
        train(cohort, run, small_config(seed=3), resume=True)
    with pytest.raises(RunError, match="another cohort"):
        train(write_cohort(tmp_path / "other", patients=31), run, small_config(), resume=True)


def test_folders_that_hold_no_run(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run to resume"):
        train(cohort, tmp_path / "missing", small_config(), resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(RunError, match="choose a new one"):
            train(cohort, tmp_path / "full", small_config(), resume=resume)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    run = tmp_path / "run"
    train(cohort, run, small_config())
    with pytest.raises(RunError, match="--resume"):
        train(cohort, run, small_config())
    facts = json.loads((run / "private" / "run.json").read_text())
    (run / "private" / "run.json").write_text(json.dumps({**facts, "schema": "medvae.run/0"}))
    with pytest.raises(RunError, match="version"):
        train(cohort, run, small_config(), resume=True)


def test_a_second_process_on_one_run_is_refused(cohort: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def intrude(_step: int, _stats: Mapping[str, float]) -> None:
        with pytest.raises(RunError, match="another process"):
            train(cohort, run, small_config(), resume=True)
        raise Stop

    with pytest.raises(Stop):
        train(cohort, run, small_config(), on_step=intrude)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_state_to_resume(cohort: Path, tmp_path: Path, number: signal.Signals) -> None:
    def press(step: int, _stats: Mapping[str, float]) -> None:
        if step == 2:
            for _ in range(2):  # a launcher may pass on what the terminal sent already
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(cohort, tmp_path / "run", small_config(), on_step=press)
    assert signal.getsignal(number) is before
    facts = json.loads((tmp_path / "run" / "private" / "checkpoint.json").read_text())
    assert facts["step"] == 3
    assert facts["spent"][-1]["event"]["count"] == facts["step"]
    train(cohort, tmp_path / "run", small_config(), resume=True)
    train(cohort, tmp_path / "whole", small_config())
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_broken_checkpoint_is_one_sentence(cohort: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Stop):
        train(cohort, run, small_config(), on_step=stop_at(4))
    path = run / "private" / "checkpoint.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "noise_multiplier": 0.1}))
    with pytest.raises(RunError, match="torn or was altered"):
        train(cohort, run, small_config(), resume=True)


def test_without_privacy_nothing_is_releasable(cohort: Path, tmp_path: Path) -> None:
    claim = train(cohort, tmp_path / "run", small_config(dp_epsilon=float("inf"), noise_source="os_entropy"))
    assert claim["epsilon"] is None
    assert claim["releasable"] is False
    assert "no noise" in claim["reasons"][0]
    assert claim["noise_multiplier"] == 0.0
    assert problem("privacy", claim) is None
    assert Ledger(cohort / "ledger.db").spent(1e-5) == 0.0


@pytest.mark.parametrize("stage", ["moments", "dpsgd"])
def test_each_stage_alone(cohort: Path, tmp_path: Path, stage: str) -> None:
    config = small_config()
    other = {"moments": "dpsgd", "dpsgd": "moments"}[stage]
    off = getattr(config.recipe, other).model_copy(update={"enabled": False})
    config = config.model_copy(update={"recipe": config.recipe.model_copy(update={other: off})})
    claim = train(cohort, tmp_path / "run", config)
    assert 7.9 < claim["epsilon"] <= 8.0
    assert claim["steps"] == (6 if stage == "dpsgd" else 1)
    assert problem("privacy", claim) is None
    load_release(read_release(tmp_path / "run" / "model"))


@pytest.mark.parametrize("delta", [0.5, 1 / 30])
def test_a_delta_at_or_above_one_over_patients_is_refused(cohort: Path, tmp_path: Path, delta: float) -> None:
    with pytest.raises(ConfigError, match="delta"):
        train(cohort, tmp_path / "run", small_config(dp_delta=delta))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "moments",
    [{"basis_shape": (9, 9)}, {"basis_shape": (4,)}, {"basis_shape": (4, 4), "coarse_shape": (5, 5)}],
)
def test_shapes_that_do_not_fit_are_refused_before_the_charge(
    cohort: Path, tmp_path: Path, moments: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match="numbers up to"):
        train(cohort, tmp_path / "run", small_config(recipe={"moments": moments}))
    assert not (tmp_path / "run").exists()
    assert Ledger(cohort / "ledger.db").spent(1e-5) == 0


def test_held_out_patients_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medvae.vault.store import CohortStore

    cohort = write_cohort(tmp_path / "cohort", patients=20, holdout=8)
    read = set()
    plain = CohortStore.load

    def load(store: CohortStore, rows: np.ndarray) -> object:
        batch = plain(store, rows)
        read.update(batch.patient.tolist())
        return batch

    monkeypatch.setattr(CohortStore, "load", load)
    claim = train(cohort, tmp_path / "run", small_config())
    assert claim["patients"] == 12
    assert read == set(range(12))
