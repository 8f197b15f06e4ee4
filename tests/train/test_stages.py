"""Prior and teacher: sensitivity, one epsilon over all stages, what is switched off, restarts, and label counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_cohort import Stop, same, small_config, weights, write_cohort

from medvae.config import TrainConfig, build
from medvae.crosscheck import agree
from medvae.dp.accounting import pld_epsilon
from medvae.dp.ledger import Ledger
from medvae.dp.noise import seeded_noise
from medvae.errors import ConfigError
from medvae.gate.release import release as write_out
from medvae.gate.verify import verify
from medvae.nets.build import load_release, load_teacher
from medvae.nets.codes import CodeFlow, CodeMixture, clip_codes, code_radius
from medvae.nets.teacher import Teacher
from medvae.schemas import problem
from medvae.synth.sample import generate, spread_conditions
from medvae.synth.store import read_release
from medvae.train import moment_shapes, noisy_sums, stages
from medvae.train.loop import make_engine
from medvae.train.noisy_sums import noisy_sum
from medvae.train.planning import TrainPlan, make_plan
from medvae.train.run import train
from medvae.train.stages import CodeSource, Stage, prior_releases
from medvae.types import Batch, Condition, ImageSpace, Intensity, Mechanism

SPACE = ImageSpace((8, 8), (1.0, 1.0), "MR", Intensity("percentile", 1, 99), (Condition("side", "class", ("a", "b")),))
MIXTURE = {"prior": {"kind": "mixture", "components": 2, "lloyd_steps": 2}}
GAUSSIAN = {"prior": {"kind": "gaussian"}}
FLOW = {"prior": {"kind": "flow", "steps": 4, "layers": 2, "hidden": 4}}
TEACHER = {"teacher": {"enabled": True, "steps": 4, "channels": 4}}
PRETRAINED = {"pretraining": {"source": "procedural", "steps": 3, "batch": 4}}
EVERYTHING = {**PRETRAINED, **FLOW, **TEACHER}


def config_with(changes: Mapping[str, Any], **more: Any) -> TrainConfig:
    recipe = {**small_config().recipe.model_dump(), **changes}
    return small_config(recipe=recipe, **more)


# --- sensitivity, by adding and removing one patient ---


def codes_of(values: np.ndarray, label: np.ndarray, patient: np.ndarray, clipped: bool) -> CodeSource:
    codes = torch.as_tensor(values, dtype=torch.float32)
    x = (clip_codes(codes) if clipped else codes).numpy()[:, None]
    return CodeSource(SPACE, x, np.eye(2, dtype=np.float32)[label], patient)


@cache
def planned(changes: str) -> TrainPlan:
    return make_plan(500, SPACE, config_with(json.loads(changes)))


@cache
def mixture_plan() -> TrainPlan:
    return make_plan(30, SPACE, config_with(MIXTURE))


def released_sums(codes: CodeSource, patients: np.ndarray, centres: int) -> dict[str, np.ndarray]:
    """What each release of a mixture prior sums, before its noise, after the same earlier releases."""
    plan = mixture_plan()
    prior, found = CodeMixture(SPACE, 3, 2), {}

    def spy(scans: Any, contribution: Any, _z: float, noise: Any, name: str = "", canaries: Any = None) -> Any:
        found[name] = noisy_sum(scans, contribution, 0.0, noise, name, canaries)
        return np.random.default_rng(centres).normal(0, 30, found[name].shape)  # centres that a scan is near, or not

    class Streams:
        def source(self, _stage: str) -> Any:
            return seeded_noise(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "noisy_sum", spy)
        patch.setattr(stages, "save_checkpoint", lambda *_: None)
        run = Stage(codes, patients, Streams(), None, Path())  # type: ignore[arg-type]
        stages._release_moments(prior, codes, plan, run)
    assert list(found) == prior_releases(plan.recipe)
    return found


def worst_gap(scans: int, size: float, seed: int, clipped: bool = True) -> float:
    """The largest change of any release by one patient with so many scans of codes of that size, in either class."""
    rng = np.random.default_rng(seed)
    own = rng.standard_normal((scans, 3)) * size
    own[:: max(1, scans - 1)] *= 1e6  # some at the clip whatever the size is
    if seed % 5 == 0:
        own[0, 0] = np.inf if seed % 2 else np.nan
    others = rng.standard_normal((12, 3))
    values = np.concatenate([others, own])
    label = np.concatenate([np.arange(12) % 2, rng.integers(0, 2, scans)])
    patient = np.concatenate([np.repeat(np.arange(4), 3), np.full(scans, 4)])
    codes = codes_of(values, label, patient, clipped)
    with_it, without = (released_sums(codes, np.arange(n), seed) for n in (5, 4))
    return max(float(np.linalg.norm(with_it[n] - without[n])) for n in with_it)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 16), st.floats(0, 100), st.integers(0, 10_000))
def test_a_patient_moves_each_release_of_a_prior_by_at_most_one(scans: int, size: float, seed: int) -> None:
    assert worst_gap(scans, size, seed) <= 1 + 1e-6


def test_the_bound_on_a_prior_is_nearly_reached_and_a_missing_clip_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(worst_gap(1, 100.0, seed) for seed in range(1, 5)) > 0.95
    monkeypatch.setattr(noisy_sums, "clip_rows", lambda v, _r: v)
    assert max(worst_gap(1, 100.0, seed, clipped=False) for seed in range(1, 5)) > 10


def made_up(net: str, scans: int, size: float, seed: int) -> tuple[torch.nn.Module, ImageSpace, Batch]:
    """A net off its start, and four patients of whom the last has `scans` scans of that size."""
    rng = np.random.default_rng(seed)
    patient = np.concatenate([np.repeat(np.arange(3), 2), np.full(scans, 3)])
    condition = np.eye(2, dtype=np.float32)[rng.integers(0, 2, len(patient))]
    torch.manual_seed(seed)
    config = small_config().recipe
    if net == "flow":
        space = replace(SPACE, spatial_shape=(4,))
        module: torch.nn.Module = CodeFlow(4, 2, 2, 8)
        x = clip_codes(torch.from_numpy(rng.standard_normal((len(patient), 4)) * size)).numpy()[:, None]
    else:
        space, kind = SPACE, {"features": net, "channels": 4}
        module = Teacher(SPACE, config.teacher.model_copy(update=kind))
        x = np.clip(rng.standard_normal((len(patient), 1, 8, 8)) * size, 0, 1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 3)
    return module, space, Batch(x.astype(np.float32), condition, patient)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["flow", "fixed", "learned"]), st.integers(1, 6), st.floats(0, 10), st.integers(0, 1000))
@example("flow", 2, 2.0, 33)  # others' gradients, of norms of millions, change in their last digits
def test_a_patient_moves_a_step_of_flow_and_teacher_by_at_most_the_clip(
    net: str, scans: int, size: float, seed: int
) -> None:
    module, space, batch = made_up(net, scans, size, seed)
    plan = mixture_plan().privacy
    engine = make_engine(module, plan, 1, space, small_config().recipe.dpsgd)
    keep = batch.patient < 3
    noise = torch.zeros(len(keep), 1)
    whole, _ = engine.clipped_sum(batch, noise)
    less, _ = engine.clipped_sum(Batch(batch.x[keep], batch.condition[keep], batch.patient[keep]), noise[keep])
    gap = torch.cat([(a - b).flatten() for a, b in zip(whole, less, strict=True)]).norm()
    assert float(gap) <= plan.max_grad_norm


def test_codes_are_clipped_before_anything_sees_them() -> None:
    far = torch.tensor([[1e9, 0.0], [float("nan"), 3.0], [0.1, 0.2]])
    clipped = clip_codes(far)
    assert torch.linalg.vector_norm(clipped, dim=1).max() <= 1 + 1e-6
    assert torch.allclose(clipped[2] * code_radius(2), far[2])
    assert torch.isfinite(clipped).all()


# --- one epsilon over all stages ---


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (GAUSSIAN, ["prior_mixture", "dpsgd"]),
        (MIXTURE, ["prior_clusters_1", "prior_clusters_2", "prior_mixture", "dpsgd"]),
        (FLOW, ["dpsgd", "prior_flow"]),
        (TEACHER, ["dpsgd", "teacher"]),
        (
            {**PRETRAINED, **MIXTURE, **TEACHER},
            ["prior_clusters_1", "prior_clusters_2", "prior_mixture", "dpsgd", "teacher"],
        ),
        ({**EVERYTHING, "moments": {"enabled": False}}, ["dpsgd", "prior_flow", "teacher"]),
        ({**TEACHER, "dpsgd": {"enabled": False}}, ["teacher"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("epsilon", [0.7, 8.0])
def test_the_total_is_the_composition_of_all_events_by_two_accountants(
    changes: dict[str, Any], names: list[str], epsilon: float
) -> None:
    plan = make_plan(500, SPACE, config_with(changes, dp_epsilon=epsilon)).privacy
    assert [m.name for m in plan.mechanisms if m.name not in moment_shapes.RELEASES] == names
    found = agree(plan.mechanisms, plan.delta)
    assert found.ok
    assert found.pld == plan.epsilon
    assert 0.985 * epsilon <= plan.epsilon <= epsilon


@pytest.mark.parametrize(
    ("epsilon", "names"), [(0.5, ("means",)), (1.0, moment_shapes.ALONE), (8.0, moment_shapes.RELEASES)]
)
def test_so_does_the_total_of_a_tiny_cohort(epsilon: float, names: tuple[str, ...]) -> None:
    """100 patients: the fewer releases there are, the more of the budget each has, and all of it is spent."""
    plan = make_plan(100, SPACE, build(TrainConfig, dp_epsilon=epsilon)).privacy
    assert tuple(m.name for m in plan.mechanisms) == names
    found = agree(plan.mechanisms, plan.delta)
    assert found.ok
    assert 0.985 * epsilon <= found.pld == plan.epsilon <= epsilon


def noise(changes: Mapping[str, Any], name: str) -> float:
    plan = planned(json.dumps(changes)).privacy
    return next(m.noise_multiplier for m in plan.mechanisms if m.name == name)


@pytest.mark.parametrize("stage", [GAUSSIAN, MIXTURE, FLOW, TEACHER])
def test_a_stage_that_is_off_leaves_its_budget_to_the_others(stage: dict[str, Any]) -> None:
    stage = {name: {**values, "steps": 100} if "steps" in values else values for name, values in stage.items()}
    assert noise({}, "dpsgd") < noise(stage, "dpsgd")
    assert noise({}, "means") < noise(stage, "means")
    free = {**stage, "dpsgd": {"enabled": False}}
    if "teacher" in stage:
        assert noise({"dpsgd": {"enabled": False}}, "means") < noise(free, "means")


def test_pretraining_costs_nothing() -> None:
    plain, pretrained = (make_plan(500, SPACE, config_with(c)).privacy for c in ({}, PRETRAINED))
    assert plain == pretrained


def test_shares_that_leave_nothing_are_refused() -> None:
    greedy = {"prior": {"kind": "flow", "share": 0.6}, "teacher": {"enabled": True, "share": 0.5}}
    with pytest.raises(ConfigError, match="leave the model nothing"):
        config_with(greedy)
    much = {"prior": {"kind": "flow", "share": 0.3}, "moments": {"share": 0.8}}
    with pytest.raises(ConfigError, match="leave nothing"):
        make_plan(500, SPACE, config_with(much))


@pytest.mark.parametrize("changes", [GAUSSIAN, PRETRAINED])
def test_stages_around_the_network_need_it(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="enable dpsgd"):
        config_with({**changes, "dpsgd": {"enabled": False}})
    open_choice = config_with({**changes, "dpsgd": {"sample_rate": 0.1}})
    assert make_plan(60, SPACE, open_choice).recipe.dpsgd.enabled


def test_a_teacher_without_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match="the cohort has none"):
        make_plan(500, replace(SPACE, conditions=()), config_with(TEACHER))


# --- whole runs ---


@pytest.mark.parametrize("changes", [MIXTURE, EVERYTHING, {**TEACHER, "dpsgd": {"enabled": False}}])
def test_a_staged_run_is_charged_for_all_of_it_and_its_model_makes_scans(
    cohort: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    claim = train(cohort, run, config_with(changes, noise_source="os_entropy"))
    assert problem("privacy", claim) is None
    mechanisms = [Mechanism.from_json(m) for m in claim["mechanisms"]]
    assert pld_epsilon(mechanisms, claim["delta"]) == claim["epsilon"] <= 8
    reserved = [e for e in Ledger(cohort / "ledger.db").events() if e.kind == "reserve"]
    assert [list(e.mechanisms) for e in reserved] == [mechanisms]
    canary = json.loads((run / "canary.json").read_text())
    assert [r["mechanism"] for r in canary["conformance"]] == [m.name for m in mechanisms]
    assert [r["steps"] for r in canary["conformance"]] == [m.count for m in mechanisms]
    assert canary["verdict"] != "REFUTED"
    release = read_release(run / "model")
    assert (load_teacher(release) is not None) == ("teacher" in changes)
    assert (load_release(release).code_prior is not None) == ("prior" in changes)
    made = generate(release, spread_conditions(release.space, 10, 1), 1)
    assert np.isfinite(made.images).all()


def test_a_release_with_every_stage_passes_gate_and_verifier(cohort: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    claim = train(cohort, run, config_with(EVERYTHING, noise_source="os_entropy"))
    from medvae.config import ReleaseConfig

    write_out(run, out, ReleaseConfig(count=6, override="a test of the stages on made-up scans"))
    assert verify(out)["ok"]
    proof = json.loads((out / "privacy" / "certificate.json").read_text())["claim"]
    assert proof["mechanisms"] == claim["mechanisms"]
    assert {"prior_flow", "teacher"} < set(proof["charged"])


def test_a_teacher_that_labels_renames_rows_in_the_release_too(cohort: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(cohort, run, config_with({"teacher": {**TEACHER["teacher"], "use": "label"}}))
    release = read_release(run / "model")
    stubborn = dict(release.weights)
    stubborn["teacher.head.weight"] = np.zeros_like(stubborn["teacher.head.weight"])
    stubborn["teacher.head.bias"] = np.asarray([0.0, 9.0], dtype=np.float32)
    made = generate(replace(release, weights=stubborn), spread_conditions(release.space, 8, 1), 1)
    assert [row["side"] for row in made.conditions] == ["b"] * 8


def test_a_teacher_that_filters_draws_again_and_keeps_the_rows(cohort: Path, tmp_path: Path) -> None:
    """A teacher that knows bright from dark: more of what it lets pass is as bright as was asked for."""
    run = tmp_path / "run"
    train(cohort, run, config_with({"teacher": {**TEACHER["teacher"], "features": "learned"}, "sampling": {"warp": 0}}))
    release, rows = read_release(run / "model"), spread_conditions(SPACE, 60, 1)
    made = generate(release, rows, 1)
    assert list(made.conditions) == rows
    teacher = load_teacher(release)
    bare = {**release.card["recipe"], "teacher": {"enabled": False}}
    plain = generate(replace(release, card={**release.card, "recipe": bare}), rows, 1)
    chosen = torch.as_tensor([["a", "b"].index(str(row["side"])) for row in rows])

    def right(images: np.ndarray) -> float:
        assert teacher is not None
        return float((teacher.logits(torch.from_numpy(images)[:, None])[0].argmax(1) == chosen).float().mean())

    assert right(made.images) >= right(plain.images)
    assert right(made.images) > 0.5


def test_seeded_runs_with_every_stage_repeat_and_another_seed_differs(cohort: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(cohort, tmp_path / name, config_with(EVERYTHING, seed=seed))
    first, second, other = (weights(tmp_path / name) for name in "abc")
    assert same(first, second)
    for part in ("decoder.", "code_prior.", "teacher.", "linear."):
        names = [n for n in first if n.startswith(part) and first[n].size > 1 and first[n].any()]
        assert names
        assert any(not np.array_equal(first[n], other[n]) for n in names), part


@pytest.mark.parametrize(
    ("changes", "at"), [(MIXTURE, "teacher_stage"), (EVERYTHING, "_finish"), (FLOW, "prior_stage")]
)
def test_a_run_stopped_between_stages_goes_on_and_releases_nothing_twice(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], at: str
) -> None:
    config = config_with(changes)
    train(cohort, tmp_path / "whole", config)

    def stop(*_: object, **__: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(f"medvae.train.run.{at}", stop)
        with pytest.raises(Stop):
            train(cohort, tmp_path / "cut", config)
    with monkeypatch.context() as patch:
        patch.setattr("medvae.train.run.fit_moments", stop)
        patch.setattr("medvae.train.pretraining.pretrained_state", stop)
        patch.setattr(stages, "noisy_sum", stop)
        train(cohort, tmp_path / "cut", config, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    canaries = [json.loads((tmp_path / run / "canary.json").read_text()) for run in ("whole", "cut")]
    assert canaries[0]["conformance"] == canaries[1]["conformance"]


# --- counts of labels ---


def true_counts_found(released: list[np.ndarray], counts: set[int]) -> bool:
    """Whether some released number is a class's true count, in the weight of any part of any release."""
    parts = (0.15, 0.3, (1 - 0.3**2 - 0.5**2) ** 0.5, 1.0)
    numbers = np.concatenate([r.ravel() for r in released])
    return any(np.abs(numbers / weight - count).min() < 1e-6 for weight in parts for count in counts)


@pytest.mark.parametrize("broken", [False, True])
def test_counts_of_labels_are_noisy_in_every_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """19 patients of two classes with one scan each; a build that forgets the noise is found by the same search."""
    cohort, released = write_cohort(tmp_path / "cohort", patients=19, most_scans=1), []

    def spy(scans: Any, contribution: Any, z: float, source: Any, name: str = "", canaries: Any = None) -> Any:
        found = noisy_sum(scans, contribution, 0.0 if broken else z, source, name, canaries)
        released.append(found)
        return found

    monkeypatch.setattr(stages, "noisy_sum", spy)
    monkeypatch.setattr(noisy_sums, "noisy_sum", spy)
    closed = {"mixture": {"enabled": True, "components": 1, "box": (2, 2)}}
    changes = {**GAUSSIAN, **closed, "canaries": {"enabled": False}}
    train(cohort, tmp_path / "run", config_with(changes))
    assert len(released) > 4
    assert true_counts_found(released, {9, 10}) == broken
