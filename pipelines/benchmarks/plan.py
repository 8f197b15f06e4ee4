"""What `medvae plan` foresees of DP-SGD against what then happens, in CPU seconds.

    python pipelines/benchmarks/plan.py COHORT --steps 12      # a cohort made by `medvae ingest`; it is left untouched
    python pipelines/benchmarks/plan.py COHORT --steps 12 --engines    # what happens by this engine and by functorch

Plan and run have a process each and see a copy of the cohort. CPU time, as a busy machine stretches the wall's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import medvae.train.run as running
from medvae.config import DpSgdConfig, Recipe, TrainConfig, build
from medvae.train.engine.memory import peak_bytes
from medvae.train.patterns import walk_steps
from medvae.train.planning import make_plan
from medvae.train.probe import step_cost
from medvae.vault.store import open_cohort

LEAST_STEPS = 12


def foreseen(cohort: Path, config: TrainConfig) -> dict[str, float]:
    store = open_cohort(cohort).reveal()
    made = make_plan(len(store.patients("train")), store.space, config)
    cost = step_cost(made, store.space, len(store) / store.info["patients"], clock=time.process_time)
    if cost is None:
        raise SystemExit("the recipe trains nothing")
    return {"step_s": cost.step_seconds, "total_s": cost.total_seconds, "memory_gb": cost.memory_gb}


def happened(cohort: Path, config: TrainConfig, run: Path) -> dict[str, float]:
    """Return the mean step without canaries' walks or a choice of strategies, and the time of all of DP-SGD."""
    marks: list[float] = []

    def timed(*args: Any, **options: Any) -> None:
        marks.append(time.process_time())
        stage(*args, **options)
        marks.append(time.process_time())

    stage, running.train_dpsgd = running.train_dpsgd, timed
    running.train(cohort, run, config, on_step=lambda _step, _stats: marks.append(time.process_time()))
    steps = enumerate(pairwise(marks[1:-1]), start=1)
    taken = sorted(b - a for step, (a, b) in steps if step not in walk_steps(len(marks) - 2))
    middle = taken[: max(1, len(taken) - 1)]  # the slowest also chooses strategies
    return {
        "step_s": sum(middle) / len(middle),
        "total_s": marks[-1] - marks[0],
        "memory_gb": peak_bytes(torch.device("cpu")) / 1e9,
    }


def print_engines(cohort: Path, steps: int) -> None:
    """Train with each engine on a copy of the cohort; print CPU seconds and peak memory."""
    print("| | a step, CPU s | all of DP-SGD, CPU s | peak memory, GB |\n|---|---|---|---|")
    for name in ("bookkeeping", "functorch"):
        with tempfile.TemporaryDirectory() as folder:
            copied = shutil.copytree(cohort, Path(folder) / "cohort")
            words = [str(copied), "--steps", str(steps), "--part", "train", "--grad-sampler", name]
            found = in_process(words)
        print(f"| {name} | " + " | ".join(f"{value:.3g}" for value in found.values()) + " |", flush=True)


def in_process(words: list[str]) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--engines", action="store_true", help="compare this engine and functorch, without a plan")
    parser.add_argument("--grad-sampler", choices=("bookkeeping", "functorch"), default="bookkeeping")
    parser.add_argument("--part", choices=("plan", "train"), help="print one part's numbers as JSON")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    if options.steps < LEAST_STEPS:
        parser.error(f"{options.steps} steps leave none between the walks of canaries: give at least {LEAST_STEPS}")
    torch.set_num_threads(1)
    recipe = Recipe(dpsgd=DpSgdConfig(enabled=True, steps=options.steps, grad_sampler=options.grad_sampler))
    config: Any = build(TrainConfig, dp_epsilon=8.0, recipe=recipe, device="cpu")
    if options.part == "plan":
        print(json.dumps(foreseen(options.cohort, config)))
        return
    if options.part == "train":
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(happened(options.cohort, config, Path(folder) / "run")))
        return
    if options.engines:
        print_engines(options.cohort, options.steps)
        return
    found = {}
    for part in ("plan", "train"):
        with tempfile.TemporaryDirectory() as folder:
            copied = shutil.copytree(options.cohort, Path(folder) / "cohort")
            found[part] = in_process([str(copied), "--steps", str(options.steps), "--part", part])
    print("| | foreseen | happened | ratio |\n|---|---|---|---|")
    for name, value in found["plan"].items():
        real = found["train"][name]
        print(f"| {name} | {value:.3g} | {real:.3g} | {value / real:.2f} |")
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
