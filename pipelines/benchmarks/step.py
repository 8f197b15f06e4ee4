"""Time and memory of one DP-SGD step by patient, against the size of the batch and of the cohort.

    python pipelines/benchmarks/step.py            # table; --json FILE writes the numbers too
    python pipelines/benchmarks/step.py --quick    # the small sizes only

Times are CPU seconds on the threads given, interleaved in one process: the plain step (no clipping, no noise) and the
private one take turns on the same batch. Memory is the peak of a process of its own. Cohorts are sparse files on disk
read by memory map, so that 100,000 patients need no such disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from medvae.config import DpSgdConfig, Recipe
from medvae.dp.noise import os_noise
from medvae.nets.build import build_model
from medvae.train.loop import make_engine, train_dpsgd
from medvae.train.optimizer import PatientDPOptimizer, inner_optimizer
from medvae.train.randomness import make_randomness
from medvae.train.rule import resolve
from medvae.train.sampler import IntArray, PatientSampler
from medvae.types import Batch, Condition, ImageSpace, Intensity, Mechanism, PrivacyPlan

SIDE = Condition("side", "class", ("a", "b"))
SIZES = {
    "2D 28x28": ((28, 28), (), 2000),
    "2D 64x64": ((64, 64), (), 2000),
    "3D 32x48x32, 2 masks": ((32, 48, 32), (1, 2), 500),
}
# The default, with DP-SGD where the rule would leave it out.
RECIPE = Recipe(dpsgd=DpSgdConfig(enabled=True))
PLAN = {"max_grad_norm": 1.0, "noise_multiplier": 1.0}


class SparseCohort:
    """Two scans a patient in a sparse file: the shape of the real store, at no cost of disk."""

    def __init__(self, path: Path, patients: int, space: ImageSpace) -> None:
        self.space = space
        shape = (2 * patients, space.channels, *space.spatial_shape)
        self._x = np.memmap(path, dtype=np.uint8, mode="w+", shape=shape)

    def rows(self, patients: IntArray) -> IntArray:
        return np.concatenate([np.asarray([2 * p, 2 * p + 1], dtype=np.int64) for p in patients])

    def load(self, rows: IntArray) -> Batch:
        condition = np.tile(np.asarray([[1.0, 0.0]], dtype=np.float32), (len(rows), 1))
        return Batch(np.asarray(self._x[rows], dtype=np.float32) / 255, condition, rows // 2)


def make_space(shape: tuple[int, ...], masks: tuple[int, ...]) -> ImageSpace:
    return ImageSpace(shape, (1.0,) * len(shape), "MR", Intensity("percentile", 1, 99), (SIDE,), masks)


def in_child(work: Callable[..., dict[str, float]], *args: object) -> dict[str, float]:
    """Run `work(*args)` in a forked process and return its numbers with the child's peak memory above its start."""
    read, write = os.pipe()
    if os.fork() == 0:
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = work(*args)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(write, json.dumps({**result, "peak_mib": (peak - start) / 1024}).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.wait()
    found: dict[str, float] = json.loads(text)
    return found


def step_times(
    shape: tuple[int, ...], masks: tuple[int, ...], patients: int, scans: int, repeats: int
) -> dict[str, float]:
    """Return CPU seconds of a plain and a private step on the expected patients of a draw, taking turns.

    Model and draw are those of the default recipe for so many patients; each has `scans` scans.
    """
    space = make_space(shape, masks)
    recipe = resolve(RECIPE, patients, space)
    generator = np.random.default_rng(0)
    drawn = round((recipe.dpsgd.sample_rate or 0.0) * patients)
    count = drawn * scans
    x = generator.random((count, space.channels, *shape), dtype=np.float32)
    batch = Batch(x, np.eye(2, dtype=np.float32)[np.arange(count) % 2], np.repeat(np.arange(drawn), scans))
    latent = torch.randn(count, recipe.model.latent_dim)
    source = os_noise()
    optimizers = {}
    for name in ("plain", "private"):
        # A plan without privacy gets the plain engine, one with it the product's default.
        epsilon = float("inf") if name == "plain" else 8.0
        plan = PrivacyPlan(epsilon, 1e-5, patients, 1.0, PLAN["noise_multiplier"], PLAN["max_grad_norm"], 1, ())
        engine = make_engine(build_model(space, recipe), plan, recipe.model.latent_dim, space, recipe.dpsgd)
        optimizers[name] = PatientDPOptimizer(
            inner_optimizer(engine.parameters, 1e-3),
            engine,
            noise_multiplier=0.0 if name == "plain" else PLAN["noise_multiplier"],
            max_grad_norm=PLAN["max_grad_norm"],
            expected_patients=float(drawn),
        )
    times: dict[str, list[float]] = {"plain": [], "private": []}
    for turn in range(repeats + 2):
        for name, optimizer in optimizers.items():
            begun = time.process_time()
            optimizer.step_on(batch, latent, source)
            if turn > 1:  # the first warms up and chooses strategies
                times[name].append(time.process_time() - begun)
    parameters = sum(p.numel() for p in optimizers["plain"].params)
    noise = []
    for _ in range(5):
        begun = time.process_time()
        source.normal(parameters)
        noise.append(time.process_time() - begun)
    plain, private = (statistics.median(times[n]) for n in ("plain", "private"))
    return {
        "parameters": parameters,
        "scans": count,
        "plain_s": plain,
        "private_s": private,
        "ratio": private / plain,
        "noise_s": statistics.median(noise),
        "noise_share": statistics.median(noise) / private,
    }


def batch_time(drawn: int, shape: tuple[int, ...], repeats: int) -> dict[str, float]:
    """Return CPU seconds of a private step on so many patients of one scan each, with one model for all sizes."""
    space = make_space(shape, ())
    recipe = resolve(RECIPE, 2000, space)
    rng = np.random.default_rng(0)
    x = rng.random((drawn, space.channels, *shape), dtype=np.float32)
    batch = Batch(x, np.eye(2, dtype=np.float32)[np.arange(drawn) % 2], np.arange(drawn))
    latent = torch.randn(drawn, recipe.model.latent_dim)
    plan = PrivacyPlan(8.0, 1e-5, 2000, 1.0, PLAN["noise_multiplier"], PLAN["max_grad_norm"], 1, ())
    engine = make_engine(build_model(space, recipe), plan, recipe.model.latent_dim, space, recipe.dpsgd)
    optimizer = PatientDPOptimizer(inner_optimizer(engine.parameters, 1e-3), engine, expected_patients=drawn, **PLAN)
    source, times = os_noise(), []
    for _ in range(repeats + 2):
        begun = time.process_time()
        optimizer.step_on(batch, latent, source)
        times.append(time.process_time() - begun)
    return {"patients": drawn, "step_s": statistics.median(times[2:])}


def train_on(patients: int, shape: tuple[int, ...], steps: int) -> dict[str, float]:
    """Take DP-SGD steps of 16 expected patients on a cohort of `patients`."""
    space = make_space(shape, ())
    recipe = resolve(RECIPE, 1000, space)
    rate = min(1.0, 16 / patients)
    plan = PrivacyPlan(8.0, 1e-5, patients, rate, 1.0, 1.0, steps, (Mechanism("dpsgd", 1.0, rate, steps),))
    with tempfile.TemporaryDirectory() as folder:
        store = SparseCohort(Path(folder) / "x", patients, space)
        sampler = PatientSampler(store, np.arange(patients, dtype=np.int64), rate, 2)
        largest = 0.0

        def note(_step: int, stats: Mapping[str, float]) -> None:
            nonlocal largest
            largest = max(largest, stats["scans"])

        begun = time.process_time()
        train_dpsgd(
            build_model(space, recipe),
            sampler,
            plan,
            recipe.dpsgd,
            int(recipe.model.latent_dim or 0),
            randomness=make_randomness("seeded", 0),
            folder=Path(folder),
            on_step=note,
        )
    return {"patients": patients, "step_s": (time.process_time() - begun) / steps, "largest_batch": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small sizes only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    steps = []
    for name, (shape, masks, patients) in list(SIZES.items())[: 1 if options.quick else None]:
        for scans in (1, 4):
            row = in_child(step_times, shape, masks, patients, scans, 2 if options.quick else 5)
            steps.append({"size": name, "scans_per_patient": scans, **row})
            print(
                f"{name:22} {scans} scans a patient, {row['parameters']:>8,} parameters: plain {row['plain_s']:.3f} s, "
                f"private {row['private_s']:.3f} s ({row['ratio']:.2f}x), noise {row['noise_s']:.4f} s "
                f"({100 * row['noise_share']:.1f} %), peak {row['peak_mib']:.0f} MiB"
            )
    batches = []
    for drawn in (16, 32, 64, 128, 256):
        row = in_child(batch_time, drawn, (28, 28), 9)
        batches.append(row)
        print(
            f"batch of {drawn:>3} patients: step {row['step_s']:.4f} s, "
            f"{1e3 * row['step_s'] / drawn:.3f} ms a patient, peak {row['peak_mib']:.0f} MiB"
        )
    cohorts = []
    for patients in (100, 100_000) if options.quick else (100, 1_000, 10_000, 100_000):
        row = in_child(train_on, patients, (28, 28), 5 if options.quick else 20)
        cohorts.append(row)
        print(
            f"cohort of {patients:>7,} patients: step {row['step_s']:.3f} s, peak {row['peak_mib']:.0f} MiB "
            f"(largest draw: {row['largest_batch']:.0f} scans)"
        )
    if options.json:
        options.json.write_text(
            json.dumps({"threads": options.threads, "steps": steps, "batches": batches, "cohorts": cohorts}, indent=2)
        )


if __name__ == "__main__":
    main()
