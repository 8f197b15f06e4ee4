"""What is compared: a method gets a cohort, an epsilon and a seed, and makes scans. Each says what it spent.

Every private method is (epsilon, delta)-DP in all, unit patient, add/remove, by PLD, at the product's default delta.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from leaderboard.coarse import coarse_shape, release_means, scans_of
from leaderboard.merf import FourierFeatures, draw_scans, fit_generator
from leaderboard.rows import Row, joined, real_scans
from medvae.audit.material import Scans, shrink, synthetic_scans
from medvae.config import Recipe, TrainConfig, build, load_recipe
from medvae.dp.noise import NoiseSource, os_noise, seeded_noise
from medvae.synth.sample import generate, spread_conditions
from medvae.synth.store import read_release
from medvae.train.run import train
from medvae.types import ModelRelease
from medvae.vault.store import CohortStore

PIPELINES = Path(__file__).resolve().parents[2]
RECIPES = {
    "product": "default.yaml",
    "nonprivate": "default.yaml",
    "closed_form": "closed_form.yaml",
    "dp_cvae": "dpsgd_only.yaml",
}
CHANGED_BY_RECIPE = ("product", "nonprivate")
# Methods that get scans at the judges' resolution, as class means and DP-MERF see them too: by DP-SGD from nothing at
# 64 voxels an axis, a step takes a minute of one core.
AT_JUDGES_SIZE = ("dp_cvae",)
TEXTURE = 0.1  # standard deviation of the white noise on class means
GENERATED_AT_ONCE = 2**26  # voxels


@dataclass(frozen=True)
class Task:
    """One cell's work. Noise is fresh, as in any release, unless `seeded` asks for noise that can be repeated."""

    row: Row
    cohort: Path
    store: CohortStore
    epsilon: float
    seed: int
    recipe: Path | None = None
    threads: int | None = None
    seeded: bool = False

    @property
    def noise(self) -> NoiseSource:
        """The noise of the methods that are not this product."""
        return seeded_noise(self.seed) if self.seeded else os_noise()

    def labels(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return class indices (N,) in equal numbers and random order."""
        (condition,) = [c for c in self.store.space.conditions if c.kind == "class"]
        rng = np.random.default_rng(self.seed)
        return rng.permutation(np.arange(self.row.synthetic) % condition.width)


@dataclass(frozen=True)
class Made:
    """Scans at the judge's resolution, what was spent for them, and the processor seconds of making them."""

    scans: Scans
    epsilon: float | None
    delta: float | None
    train_cpu_s: float
    generate_cpu_s: float
    notes: Mapping[str, Any] = field(default_factory=dict)


def real(task: Task) -> Made:
    """The ceiling: the real training scans themselves."""
    return Made(real_scans(task.store, "train", task.row.longest), None, None, 0.0, 0.0)


def product(task: Task, method: str) -> Made:
    """A recipe of this product: the default one, the one that --recipe names, or a baseline's."""
    asked = task.recipe if method in CHANGED_BY_RECIPE else None
    recipe: Recipe = load_recipe(asked or PIPELINES / RECIPES[method])
    config: TrainConfig = build(
        TrainConfig,
        dp_epsilon=math.inf if method == "nonprivate" else task.epsilon,
        recipe=recipe,
        seed=task.seed,
        threads=task.threads,
        noise_source="seeded" if task.seeded else "os_entropy",
    )
    begun = time.process_time()
    folder = Path(tempfile.mkdtemp(prefix="quality-"))
    try:
        claim = train(task.cohort, folder / "run", config)
        release = read_release(folder / "run" / "model")
    finally:
        shutil.rmtree(folder)
    trained = time.process_time() - begun
    scans = generated(task, release)
    spent = time.process_time() - begun - trained
    notes = {"recipe": release.card["recipe"], "mechanisms": claim["mechanisms"]}
    return Made(scans, claim["epsilon"], claim["delta"], trained, spent, notes)


def generated(task: Task, release: ModelRelease) -> Scans:
    """Generate the row's number of scans in equal classes, part by part, each brought to the judge's resolution."""
    row, space = task.row, release.space
    conditions = spread_conditions(space, row.synthetic, task.seed)
    size = max(1, GENERATED_AT_ONCE // math.prod(space.spatial_shape))
    parts = []
    for index, start in enumerate(range(0, row.synthetic, size)):
        made = generate(release, conditions[start : start + size], seed=1_000_000 * task.seed + index)
        parts.append(shrink(synthetic_scans(made), row.longest))
    return joined(parts)


def class_means(task: Task) -> Made:
    """The floor: each class's noisy mean scan on a coarse grid, from one Gaussian release, under white noise."""
    begun = time.process_time()
    space, longest, labels = task.store.space, task.row.longest, task.labels()
    shape = coarse_shape(space, longest)
    # Images around 0.5 lie within this norm, and masks too unless they fill more than a sixteenth of the scan.
    centre = np.asarray([0.5, *[0.0] * (shape[0] - 1)], dtype=np.float32).reshape(-1, *[1] * (len(shape) - 1))
    radius = math.sqrt((0.5**2 + (shape[0] - 1) * 0.25**2) * math.prod(shape[1:]))
    released = release_means(
        task.store, longest, lambda x: (x - centre).reshape(len(x), -1) / radius, task.epsilon, task.noise
    )
    means = np.clip(released.means.reshape(-1, *shape) * radius + centre, 0, 1).astype(np.float32)
    trained = time.process_time() - begun
    scans = scans_of(means[labels], labels, space, longest)
    scans.images[:] += np.random.default_rng(task.seed).normal(0, TEXTURE, scans.images.shape)
    np.clip(scans.images, 0, 1, out=scans.images)
    return Made(scans, released.epsilon, released.delta, trained, time.process_time() - begun - trained)


def dp_merf(task: Task) -> Made:
    """DP-MERF: one release of class means of random features, and a generator trained to agree with it."""
    begun = time.process_time()
    space, longest, labels = task.store.space, task.row.longest, task.labels()
    shape = coarse_shape(space, longest)
    features = FourierFeatures(shape, task.seed)
    released = release_means(task.store, longest, features.of_array, task.epsilon, task.noise)
    net = fit_generator(released.means, features, shape, task.seed)
    trained = time.process_time() - begun
    scans = scans_of(draw_scans(net, labels, task.seed), labels, space, longest)
    return Made(scans, released.epsilon, released.delta, trained, time.process_time() - begun - trained)


METHODS: dict[str, Callable[[Task], Made]] = {
    "real": real,
    **{name: partial(product, method=name) for name in RECIPES},
    "class_means": class_means,
    "dp_merf": dp_merf,
}
WITHOUT_EPSILON = ("real", "nonprivate")  # the same cell serves every epsilon
