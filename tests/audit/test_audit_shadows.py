"""Shadow models: who they see, what a stacked step is, and going on after a kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audit_world import phantom_scans, recipe, space_of

from medvae.audit.attacks import make_pool
from medvae.audit.deep_attack import shadow_models, trainer_of
from medvae.audit.shadow_recipe import LINEAR, ClosedForm, InMemory, closed_form
from medvae.audit.shadows import Bools, run_shadows, splits
from medvae.audit.stacked import Batches, Schedule, Stack, take_step
from medvae.config import MixtureConfig, MomentsConfig, Recipe
from medvae.errors import ConfigError
from medvae.nets.build import build_model
from medvae.nets.cvae import ConditionalVAE
from medvae.train.moments import fit_moments
from medvae.train.planning import moment_shapes
from medvae.train.rule import resolve
from medvae.types import Batch


def test_every_patient_is_left_out_of_equally_many_and_classes_are_spread() -> None:
    strata = np.repeat([0, 1], [60, 40])
    rows = splits(strata, 0.75, 16, 0)
    assert (rows.sum(0) == 12).all()
    assert (rows[:, :60].sum(1) == 45).all()
    assert (rows[:, 60:].sum(1) == 30).all()
    assert (splits(strata, 0.75, 8, 0) == rows[:8]).all()  # a higher tier takes over the shadows of a lower one
    assert splits(strata, 0.1, 4, 0).sum() == 100
    assert splits(strata, 1.0, 4, 0).sum() == 300


def model_of(two_valued: bool | None) -> ConditionalVAE:
    """A network from nothing, or around a linear part of grey images or of shapes."""
    closed = MomentsConfig(enabled=two_valued is not None, basis_shape=(4, 4))
    model = build_model(space_of((16, 16)), recipe().model_copy(update={"moments": closed}))
    if model.linear is not None:
        model.linear.two_valued.fill_(two_valued is True)
    return model


@pytest.mark.parametrize("two_valued", [None, False, True])
def test_a_stacked_step_is_the_step_of_each_model_alone(two_valued: bool | None) -> None:
    """Against the product's own engine: per-patient gradients, clipped, summed, divided by the expected number."""
    from medvae.train.gradient import FunctorchSampler

    bound = 0.5
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(model_of(two_valued))
    rng = np.random.default_rng(0)
    x = rng.random((3, 4, 2, 3, 16, 16)).astype(np.float32)
    condition = rng.random((3, 4, 2, 3)).astype(np.float32)
    latent = rng.standard_normal((3, 4, 2, 4)).astype(np.float32)
    weight = np.zeros((3, 4, 2), dtype=np.float32)
    weight[:, 0], weight[:, 1, 0], weight[:, 2] = 0.5, 1.0, 0.5  # the fourth patient is padding
    stack = Stack(models)
    batch = Batches(*(torch.from_numpy(a) for a in (x, condition, latent, weight)))
    take_step(stack, batch, Schedule(1, lambda step: 0.0, 2.5, 0.0, bound), torch.Generator())
    for k, model in enumerate(models):
        rows = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
        p, s = np.asarray(rows).T
        alone = Batch(x[k][p, s], condition[k][p, s], p.astype(np.int64))
        sums, stats = FunctorchSampler(model, max_grad_norm=bound, max_scans=8).clipped_sum(
            alone, torch.from_numpy(latent[k][p, s])
        )
        assert float(stats.reveal().norms.max()) > bound  # the clip was at work
        for (name, _), value in zip(model.named_parameters(), sums, strict=True):
            found = stack.stacked[name].grad
            assert found is not None
            torch.testing.assert_close(found[k], value / 2.5, rtol=1e-3, atol=1e-5)


def test_models_of_shapes_and_of_grey_images_make_no_stack() -> None:
    models = [model_of(True), model_of(False)]
    with pytest.raises(ValueError, match="must agree"):
        Stack(models)


def test_stacked_noise_has_the_planned_size() -> None:
    torch.manual_seed(0)
    stack = Stack([build_model(space_of((16, 16)), recipe()) for _ in range(2)])
    empty = Batches(
        torch.zeros(2, 1, 1, 3, 16, 16), torch.zeros(2, 1, 1, 3), torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1)
    )
    take_step(stack, empty, Schedule(1, lambda step: 0.0, 4.0, 3.0, 0.5), torch.Generator().manual_seed(0))
    drawn = torch.cat([p.grad.flatten() for p in stack.parameters() if p.grad is not None])
    assert abs(float(drawn.std()) / (3.0 * 0.5 / 4.0) - 1) < 0.03


@pytest.mark.parametrize("variant", ["plain", "mixture", "public clips", "mean alone", "warps", "shapes"])
def test_closed_form_shadows_are_fits_of_the_product(variant: str) -> None:
    """On coefficients as on images: the same linear part, from the same noise."""
    from medvae.dp.noise import seeded_noise

    scans = phantom_scans(2, 20, 0, 16)
    if variant == "shapes":
        scans = replace(scans, x=scans.x[:, 1:2], space=replace(scans.space, mask_labels=()))
    mixture = MixtureConfig(enabled=variant == "mixture", box=(3, 3), components=2)
    moments = MomentsConfig(
        public_clips=variant == "public clips", mean_alone=variant == "mean alone", warped_pairs=variant == "warps"
    )
    resolved = resolve(Recipe(mixture=mixture, moments=moments), 20, scans.space)
    shapes = moment_shapes(resolved)
    has = {"mixture": shapes.mixture is not None, "public clips": shapes.public_clips, "mean alone": shapes.mean_alone}
    has |= {"warps": shapes.warped_pairs > 0}
    assert has == {name: name == variant for name in has}
    noise = {**dict.fromkeys(shapes.releases, 2.0), "norms": 0.1}
    trainer = closed_form(scans, resolved, noise, 5)
    found = trainer.fit(3, np.arange(10))
    images = InMemory(scans.x, scans.condition, trainer.full.patient, scans.space)
    expected = fit_moments(images, np.arange(10), noise, shapes, noise=seeded_noise(5 * 1_000_003 + 3))
    assert bool(expected.two_valued) == (variant == "shapes")
    for name, tensor in expected.state_dict().items():
        np.testing.assert_allclose(found[LINEAR + name], tensor.numpy(), rtol=1e-3, atol=2e-4)


def small_closed_form() -> ClosedForm:
    scans = phantom_scans(2, 20, 0, 16)
    recipe = resolve(Recipe(), 20, scans.space)
    return closed_form(scans, recipe, dict.fromkeys(moment_shapes(recipe).releases, 2.0), 5)


def counting(folder: Path, slow: float = 0.0) -> Any:
    def train(numbers: Sequence[int], included: Bools) -> list[dict[str, np.ndarray]]:
        for number in numbers:
            (folder / f"trained-{number}-{os.getpid()}").touch()
        time.sleep(slow)
        return [{"sum": row.sum(keepdims=True).astype(float)} for row in included]

    return train


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_audit_shadows import counting, splits, run_shadows
import numpy as np
folder = Path(sys.argv[1])
run_shadows(counting(folder, 0.2), splits(np.zeros(8, dtype=int), 0.5, 12, 0), folder)
"""


def test_shadows_go_on_after_a_kill(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)])
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("shadow-*.npz"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = len(list(tmp_path.glob("shadow-*.npz")))
    assert 3 <= done < 12
    (tmp_path / "shadow-0000.npz").write_bytes(b"torn")  # as a full disk would leave it
    included = splits(np.zeros(8, dtype=int), 0.5, 12, 0)
    found = run_shadows(counting(tmp_path), included, tmp_path)
    assert len(found) == 12
    assert found.resumed == done - 1
    assert [float(a["sum"][0]) for a in found.arrays] == included.sum(1).tolist()
    again = run_shadows(counting(tmp_path), included[:, ::-1].copy(), tmp_path)  # other patients: none of them counts
    assert again.resumed == int((included == included[:, ::-1]).all(1).sum())


def test_a_failed_shadow_is_counted_and_left_out() -> None:
    def train(numbers: Sequence[int], included: Bools) -> list[dict[str, np.ndarray]]:
        if numbers[0] == 1:
            raise FloatingPointError
        return [{"v": np.asarray([np.nan if numbers[0] == 2 else 1.0])}]

    found = run_shadows(train, splits(np.zeros(8, dtype=int), 0.5, 4, 0), None)
    assert (len(found), found.failed) == (2, 2)
    assert found.words == "2 of 4 shadow models failed and are left out"
    assert found.included.shape == (2, 8)


def test_shadows_of_dp_sgd_score_and_are_left_out_where_time_does_not_allow() -> None:
    scans = phantom_scans(2, 20, 1, 16)
    pool = make_pool(scans.of(np.arange(10)), scans.of(np.arange(10, 20)), 6, np.random.default_rng(0))
    small = resolve(recipe(), 10, scans.space)
    small = small.model_copy(update={"dpsgd": small.dpsgd.model_copy(update={"steps": 2})})
    trainer = trainer_of(pool, small, 1.0, True, None, 2, 0)
    none = shadow_models(trainer, pool, 4, 0.0, None, None, lambda done, total: None)
    assert len(none) == 0
    assert "would take about" in none.words
    found = shadow_models(trainer, pool, 4, None, None, None, lambda done, total: None)
    assert len(found) == 4
    assert found.arrays[0]["score/likelihood"].shape == (len(pool.only_judged().scans),)
    weights = [
        a["decoder.last.conv.weight"] if "decoder.last.conv.weight" in a else a["posterior.weight"]
        for a in found.arrays
    ]
    assert not np.array_equal(weights[0], weights[1])


def test_a_cluster_without_ray_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    included = splits(np.zeros(20, dtype=int), 0.5, 4, 0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="need Ray"):
        run_shadows(small_closed_form(), included, None, cluster="local")


@pytest.mark.slow
def test_a_cluster_returns_what_one_machine_does(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    included = splits(np.zeros(20, dtype=int), 0.5, 6, 0)
    try:
        far = run_shadows(small_closed_form(), included, tmp_path, group=2, cluster="local")
        assert run_shadows(small_closed_form(), included, tmp_path, cluster="local").resumed == 6
    finally:
        ray.shutdown()
    near = run_shadows(small_closed_form(), included, None)
    for a, b in zip(far.arrays, near.arrays, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in b)
