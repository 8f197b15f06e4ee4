"""Canaries in a training: nothing changes for the model, coins outlive a crash, and nothing of a patient is
published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from small_cohort import Stop, small_config, write_cohort

from medvae.config import TrainConfig
from medvae.dp.canaries import Commitment, judge
from medvae.dp.ledger import Ledger
from medvae.errors import RunError
from medvae.schemas import problem
from medvae.train import loop, noisy_sums
from medvae.train.run import train
from medvae.types import Mechanism


def config(count: int = 24, **changes: object) -> TrainConfig:
    base = small_config(**changes)
    canaries = base.recipe.canaries.model_copy(update={"count": max(count, 1), "enabled": count > 0})
    return base.model_copy(update={"recipe": base.recipe.model_copy(update={"canaries": canaries})})


def document(run: Path) -> dict[str, object]:
    return json.loads((run / "canary.json").read_text())


def mechanisms(run: Path) -> list[Mechanism]:
    return [Mechanism.from_json(m) for m in json.loads((run / "privacy.json").read_text())["mechanisms"]]


def test_a_run_opens_its_coins_and_anyone_can_judge_them(cohort: Path, tmp_path: Path) -> None:
    claim = train(cohort, tmp_path / "run", config(60, noise_source="os_entropy"))
    found = document(tmp_path / "run")
    assert problem("canary", found) is None
    assert found["receipt_digest"] == claim["receipt"]["digest"]
    judged = judge(found, mechanisms(tmp_path / "run"), claim["delta"])
    assert judged.verdict == found["verdict"] != "REFUTED"
    assert judged.to_json() == {k: found[k] for k in judged.to_json()}
    public = json.loads((tmp_path / "run" / "canary_commitment.json").read_text())
    assert public["digest"] == found["commitment"]["digest"]
    assert public["registration"] == found["registration"]
    reserve = next(e for e in Ledger(cohort / "ledger.db").events() if e.kind == "reserve")
    assert public["digest"] in reserve.note


def test_the_coins_are_committed_to_before_the_ledger_is_charged(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Ledger.reserve

    def reserve(self: Ledger, *given: object, **named: object) -> object:
        assert (tmp_path / "run" / "canary_commitment.json").is_file()
        assert Commitment.from_json(json.loads((tmp_path / "run/private/canaries.json").read_text())).holds
        return original(self, *given, **named)

    monkeypatch.setattr(Ledger, "reserve", reserve)
    train(cohort, tmp_path / "run", config())


def test_canaries_change_no_sum_of_the_model(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same patients drawn and no noise, all weights are the same bits with and without canaries."""
    draw, noise = loop.PatientSampler.draw_patients, loop.PatientDPOptimizer.add_noise

    def draw_alike(self: loop.PatientSampler, source: object) -> list[np.ndarray]:
        canaries = [r for r in draw(self, source) if r[0] >= 2**40]
        chosen = self.patients[(np.arange(len(self.patients)) + len(seen)) % 3 == 0]
        seen.append(0)
        return [self.store.rows(np.asarray([p])) for p in chosen] + canaries

    def no_noise(self: loop.PatientDPOptimizer) -> None:
        self.noise_multiplier = 0.0
        noise(self)

    monkeypatch.setattr(loop.PatientSampler, "draw_patients", draw_alike)
    monkeypatch.setattr(loop.PatientDPOptimizer, "add_noise", no_noise)
    original = noisy_sums.noisy_sum
    monkeypatch.setattr(noisy_sums, "noisy_sum", lambda s, c, z, n, *rest: original(s, c, 0.0, n, *rest))
    weights = []
    for count in (0, 60):
        seen: list[int] = []
        run = tmp_path / f"run{count}"
        train(cohort, run, config(count))
        assert len(seen) == 6
        weights.append((run / "model" / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("step", [0, 3])
def test_a_resumed_run_keeps_coins_and_scores(cohort: Path, tmp_path: Path, step: int) -> None:
    def stop(done: int, _stats: Mapping[str, float]) -> None:
        if done == step:
            raise Stop

    train(cohort, tmp_path / "whole", config())
    with pytest.raises(Stop):
        train(cohort, tmp_path / "cut", config(), on_step=stop)
    before = (tmp_path / "cut" / "canary_commitment.json").read_bytes()
    train(cohort, tmp_path / "cut", config(), resume=True)
    assert (tmp_path / "cut" / "canary_commitment.json").read_bytes() == before
    whole, cut = document(tmp_path / "whole"), document(tmp_path / "cut")
    assert whole["parts"] == cut["parts"]
    assert whole["conformance"] == cut["conformance"]


@pytest.mark.parametrize("harm", ["lost", "torn", "another coin", "another salt"])
def test_a_run_whose_coins_were_touched_is_not_resumed(cohort: Path, tmp_path: Path, harm: str) -> None:
    def stop(done: int, _stats: Mapping[str, float]) -> None:
        raise Stop

    with pytest.raises(Stop):
        train(cohort, tmp_path / "run", config(), on_step=stop)
    path = tmp_path / "run" / "private" / "canaries.json"
    data = json.loads(path.read_text())
    if harm == "lost":
        path.unlink()
    elif harm == "torn":
        path.write_text(path.read_text()[:40])
    elif harm == "another coin":
        data["flips"] = data["flips"][:-1] + ("0" if data["flips"][-1] == "1" else "1")
        path.write_text(json.dumps(data))
    else:
        path.write_text(json.dumps({**data, "salt": "0" * 64}))
    with pytest.raises(RunError, match="coins"):
        train(cohort, tmp_path / "run", config(), resume=True)


def test_no_canaries_where_they_are_off_or_nothing_is_claimed(cohort: Path, tmp_path: Path) -> None:
    train(cohort, tmp_path / "off", config(0))
    train(cohort, tmp_path / "open", config(dp_epsilon=float("inf")))
    for run in ("off", "open"):
        assert not (tmp_path / run / "canary.json").exists()
        assert not (tmp_path / run / "canary_commitment.json").exists()


def test_what_is_published_does_not_depend_on_a_scan(tmp_path: Path) -> None:
    """Two cohorts of other images, the same randomness: canary.json differs in its receipt and model alone.

    Walks of patterned patients are made at the run's own weights, which the claim covers: they differ by rounding.
    """
    published, walked = [], []
    for name in ("a", "b"):
        cohort = write_cohort(tmp_path / name)
        if name == "b":
            for path in cohort.glob("images.npy"):
                data = np.load(path, mmap_mode="r+")
                data[:] = data.max() - np.asarray(data)
                del data
        torch.manual_seed(0)
        train(cohort, tmp_path / f"run {name}", config())
        found = document(tmp_path / f"run {name}")
        walked.append([[w["squares"], w["folded_squares"], w["walks"]] for w in found.pop("walks")])
        found["checks"] = [c for c in found["checks"] if "walk" not in c["name"] and "patterned" not in c["name"]]
        published.append({k: v for k, v in found.items() if k not in ("receipt_digest", "weights_sha256")})
    assert published[0] == published[1]
    for one, two in zip(*walked, strict=True):
        assert np.hstack(one) == pytest.approx(np.hstack(two), rel=1e-4)


def test_both_engines_show_canaries_the_same_lengths(cohort: Path, tmp_path: Path) -> None:
    found = {}
    for kind in ("bookkeeping", "functorch"):
        given = config()
        dpsgd = given.recipe.dpsgd.model_copy(update={"grad_sampler": kind})
        given = given.model_copy(update={"recipe": given.recipe.model_copy(update={"dpsgd": dpsgd})})
        train(cohort, tmp_path / kind, given)
        found[kind] = document(tmp_path / kind)["parts"]
    for one, two in zip(found["bookkeeping"], found["functorch"], strict=True):
        assert one["scores"] == pytest.approx(two["scores"], abs=1e-4)
