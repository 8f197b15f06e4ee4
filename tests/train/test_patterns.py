"""Patterned canary patients: true sums at live weights, noise on every parameter, on followers too, and at no cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from small_cohort import small_config, write_cohort
from test_train_distributed import run_teams, settings_of

from medvae.config import TrainConfig
from medvae.dp.canaries import judge
from medvae.dp.walks import FOLDS, WalkWatch, walk_answers
from medvae.errors import ConfigError
from medvae.schemas import problem
from medvae.train.patterns import FIRST, WALKS, WithPatterns, make_patterns, walk_steps
from medvae.train.run import train
from medvae.types import Condition, ImageSpace, Intensity, Mechanism
from medvae.vault.store import open_cohort

MECHANISM = Mechanism("dpsgd", 1.3, 0.2, 60)
SPACE = ImageSpace(
    (9, 8), (1.0, 1.0), "MR", Intensity("percentile", 1, 99),
    (Condition("side", "class", ("a", "b")), Condition("age", "continuous", range=(0.0, 9.0))), (1, 4),
)  # fmt: skip


def config(patterns: int = 8, **changes: object) -> TrainConfig:
    base = small_config(**changes)
    canaries = base.recipe.canaries.model_copy(update={"patterns": patterns})
    return base.model_copy(update={"recipe": base.recipe.model_copy(update={"canaries": canaries})})


def document(run: Path) -> dict[str, Any]:
    return json.loads((run / "canary.json").read_text())


def judged(found: Mapping[str, Any], run: Path) -> Any:
    claim = json.loads((run / "privacy.json").read_text())
    return judge(found, [Mechanism.from_json(m) for m in claim["mechanisms"]], claim["delta"])


# --- the made-up patients ---------------------------------------------------------------------------------------------


def test_patterns_come_out_of_the_store_as_they_were_made() -> None:
    made = make_patterns(SPACE, 6, 3)
    rows = np.arange(len(made.patient))
    loaded = made.store.load(rows)
    assert (np.diff(made.patient) < 0).any(), "a patient's scans must not lie together"
    for patient in made.patients:
        truth = made.truth(int(patient), rows)
        mine = loaded.patient == patient
        assert np.array_equal(loaded.x[mine], truth.x)
        assert np.array_equal(loaded.condition[mine], truth.condition)
    counts = np.bincount(made.patient)
    assert counts[0] == 4, "one patient has more scans than are taken"
    assert counts.min() == 1
    assert len(np.unique(loaded.x.reshape(len(rows), -1), axis=0)) == len(rows)


def test_patterns_are_the_same_in_every_process() -> None:
    one = make_patterns(SPACE, 5, 2)
    make_patterns.cache_clear()
    two = make_patterns(SPACE, 5, 2)
    assert one is not two
    assert np.array_equal(one.levels, two.levels)
    assert np.array_equal(one.patient, two.patient)


def test_patterned_patients_are_beside_the_cohort_and_never_in_it(tmp_path: Path) -> None:
    store = open_cohort(write_cohort(tmp_path / "cohort")).reveal()
    made = make_patterns(store.space, 4, 2)
    both = WithPatterns(store, made)
    mine = both.rows(FIRST + np.asarray([2]))
    assert (mine >= FIRST).all()
    assert np.array_equal(both.load(mine).x, made.truth(2, mine - FIRST).x)
    real = np.asarray([3, 4])
    assert np.array_equal(both.load(both.rows(real)).x, store.load(store.rows(real)).x)


# --- what a walk tests ------------------------------------------------------------------------------------------------


def walked(walks: int = 10, scale: float = 1.0, part: int | None = None, gap: float = 1e-6, fresh: bool = True):
    rng, watch = np.random.default_rng(), WalkWatch(MECHANISM)
    sizes, kept = (7, 400, 3000), None
    for _ in range(walks):
        noise = [MECHANISM.noise_multiplier * rng.standard_normal(n) for n in sizes]
        noise = noise if fresh or kept is None else kept
        kept = noise
        watch.see(gap, 3, 8, [n * (scale if part in (None, i) else 1.0) for i, n in enumerate(noise)])
    return watch


def failing(watch: WalkWatch, level: float, walks: int = 10) -> set[str]:
    return {a.name.removesuffix(" of dpsgd") for a in walk_answers(watch.record(), MECHANISM, walks, level) if not a.ok}


def test_a_correct_build_fails_a_walk_as_rarely_as_said() -> None:
    found = [failing(walked(), 0.05) for _ in range(300)]
    for name in ("noise of walks", "freshness of the noise of walks"):
        hits = sum(name in f for f in found)
        assert hits <= stats.binom.isf(1e-5, 300, 0.05)
    assert not any({"clipped sums of patterned patients", "walks of patterned patients"} & f for f in found)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ({"scale": 0.95}, "noise of walks"),
        ({"scale": 0.0, "part": 0}, "noise of walks"),
        ({"scale": 0.9, "part": 2}, "noise of walks"),
        ({"fresh": False}, "freshness of the noise of walks"),
        ({"gap": 0.01}, "clipped sums of patterned patients"),
        ({"gap": math.nan}, "clipped sums of patterned patients"),
        ({"walks": 9}, "walks of patterned patients"),
    ],
)
def test_a_fault_on_the_models_own_path_is_found(how: dict[str, Any], name: str) -> None:
    assert name in failing(walked(**how), 1e-5)


def test_noise_is_folded_so_that_short_models_are_tested_exactly() -> None:
    """Fewer numbers than folds: the statistic is a plain chi-square on them."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        watch = WalkWatch(MECHANISM)
        for _ in range(2):
            watch.see(0.0, 0, 1, [MECHANISM.noise_multiplier * rng.standard_normal(FOLDS // 100)])
        hits += "freshness of the noise of walks" in failing(watch, 0.05, 2)
    assert stats.binom.ppf(1e-5, 200, 0.02) <= hits <= stats.binom.isf(1e-5, 200, 0.05)


def test_walks_are_spread_over_the_steps() -> None:
    for steps in (1, 7, 10, 11, 120, 1999):
        due = walk_steps(steps)
        assert due[0] == 0
        assert len(due) <= WALKS
        assert len(due) >= min(steps, WALKS // 2)


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_publishes_its_walks_and_anyone_can_judge_them(cohort: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(cohort, run, config(noise_source="os_entropy"))
    found = document(run)
    assert problem("canary", found) is None
    assert {w["mechanism"] for w in found["walks"]} == {m["name"] for m in found["registration"]["mechanisms"]}
    assert all(w["gap"] < 1e-5 for w in found["walks"])
    own = next(w for w in found["walks"] if w["mechanism"] == "dpsgd")
    assert own["walks"] == 6
    assert own["clipped"] > 0, "the clip must have had something to do"
    answers = judged(found, run).answers
    assert sum("patterned" in a.name for a in answers) == 2 * len(found["walks"])
    assert all(a.ok for a in answers)


@pytest.mark.parametrize(
    "harm",
    [{"walks": []}, {"gap": 0.5}, {"tolerance": 1.0, "gap": 0.5}, {"walks_made": 1}, {"squares": "half"}],
    ids=lambda h: next(iter(h)),
)
def test_walks_that_were_left_out_or_failed_refute(cohort: Path, tmp_path: Path, harm: dict[str, Any]) -> None:
    run = tmp_path / "run"
    train(cohort, run, config())
    found = document(run)
    own = found["walks"][-1]
    if "walks" in harm:
        del found["walks"]
    elif "squares" in harm:
        own["squares"] = [s / 2 for s in own["squares"]]
    elif "walks_made" in harm:
        own["walks"] = 1
    else:
        own.update(harm)
    assert judged(found, run).verdict == "REFUTED"


def test_torn_walks_are_one_sentence(cohort: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(cohort, run, config())
    found = document(run)
    del found["walks"][0]["squares"]
    with pytest.raises(ConfigError, match="torn"):
        judged(found, run)


def test_patterns_change_no_bit_of_the_model(cohort: Path, tmp_path: Path) -> None:
    weights = []
    for patterns in (0, 8):
        run = tmp_path / f"run{patterns}"
        train(cohort, run, config(patterns))
        weights.append((run / "model" / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("step", [0, 3])
def test_a_resumed_run_keeps_its_walks(cohort: Path, tmp_path: Path, step: int) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, _stats: Mapping[str, float]) -> None:
        if done == step:
            raise Stop

    train(cohort, tmp_path / "whole", config())
    with pytest.raises(Stop):
        train(cohort, tmp_path / "cut", config(), on_step=stop)
    train(cohort, tmp_path / "cut", config(), resume=True)
    assert document(tmp_path / "whole")["walks"] == document(tmp_path / "cut")["walks"]


def test_both_engines_and_low_precision_walk_true(cohort: Path, tmp_path: Path) -> None:
    for name, change in (("functorch", {"grad_sampler": "functorch"}), ("bf16", {"precision": "bf16"})):
        given = config()
        dpsgd = given.recipe.dpsgd.model_copy(update=change)
        train(
            cohort,
            tmp_path / name,
            given.model_copy(update={"recipe": given.recipe.model_copy(update={"dpsgd": dpsgd})}),
        )
        own = document(tmp_path / name)["walks"][-1]
        assert own["gap"] <= own["tolerance"] == (0.05 if name == "bf16" else 1e-3)


def test_volumes_with_masks_walk_too() -> None:
    space = replace(SPACE, spatial_shape=(6, 8, 6), spacing_mm=(1.0, 1.0, 1.0))
    made = make_patterns(space, 3, 2)
    assert made.store.load(np.arange(2)).x.shape == (2, 3, 6, 8, 6)


# --- several processes ------------------------------------------------------------------------------------------------


def test_a_fault_of_a_follower_is_seen_by_the_leader(tmp_path: Path) -> None:
    """One process in two does not clip, clips by scan, or counts its patients twice; the leader's part is right."""
    recipe = settings_of(6)["recipe"] | {"canaries": {"patterns": 8}}
    common = {"processes": 2, "config": {"recipe": recipe}}
    faults = ("", "unclipped", "by scan", "doubled")
    tasks = [{**common, "name": f"run {fault}", "fault": fault} for fault in faults]
    results = run_teams(tmp_path, tasks)
    for fault in faults:
        run = tmp_path / f"run {fault}"
        assert results[f"run {fault}"]["codes"] == [0, 0]
        found = judged(document(run), run)
        failed = [a.name for a in found.answers if not a.ok]
        assert failed == ([] if not fault else ["clipped sums of patterned patients of dpsgd"])
        assert (found.verdict == "REFUTED") is bool(fault)


def test_walks_of_a_team_are_those_of_one_process(tmp_path: Path) -> None:
    recipe = settings_of(6)["recipe"] | {"canaries": {"patterns": 8}}
    tasks = [{"name": f"run-{n}", "processes": n, "config": {"recipe": recipe}} for n in (1, 3)]
    run_teams(tmp_path, tasks)
    one, three = (document(tmp_path / f"run-{n}")["walks"][-1] for n in (1, 3))
    assert one["patients"] == three["patients"]
    assert one["squares"] == pytest.approx(three["squares"], rel=1e-5)
    assert max(one["gap"], three["gap"]) < 1e-5
