"""Kill training with SIGKILL again and again; print as JSON what the ledger and the weights say in the end.

Run as `python killed.py FOLDER KILLS`. A process of its own, so that each trainer is forked from a parent that holds
no threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from small_cohort import small_config, write_cohort

import medvae.train.claim
import medvae.train.run
from medvae.crosscheck import prv_epsilon
from medvae.dp.accounting import pld_epsilon
from medvae.dp.ledger_place import open_ledger
from medvae.dp.tradeoff import plain_words
from medvae.train.planning import make_plan
from medvae.train.run import train
from medvae.vault.store import open_cohort

STEPS = 40


def fork_trainer(cohort: Path, run: Path) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(cohort, run, small_config(steps=STEPS), resume=run.is_dir())
            status = 0
        finally:
            os._exit(status)
    return child


def remember_accounting(cohort: Path) -> None:
    """Do the arithmetic once, for all children: what is to be killed is training."""
    plan = make_plan(30, open_cohort(cohort).reveal().space, small_config(steps=STEPS))
    cross = prv_epsilon(plan.privacy.mechanisms, plan.privacy.delta)
    plain_words(plan.privacy.epsilon, plan.privacy.delta, plan.privacy.mechanisms)
    medvae.train.run.make_plan = lambda *_: plan
    medvae.train.claim.prv_epsilon = lambda *_: cross


def digest(run: Path) -> str:
    return hashlib.sha256((run / "model" / "weights.safetensors").read_bytes()).hexdigest()


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    cohort = write_cohort(folder / "cohort")
    remember_accounting(cohort)

    runs = [folder / "whole", folder / "cut-0"]
    begun = time.monotonic()
    finish(cohort, runs[0])
    duration = time.monotonic() - begun

    chance = random.Random(kills)
    killed, steps = 0, []
    while killed < kills:
        if (runs[-1] / "privacy.json").exists():  # nothing left to kill: begin another
            runs.append(folder / f"cut-{len(runs)}")
        child = fork_trainer(cohort, runs[-1])
        time.sleep(chance.uniform(0.0, duration))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        checkpoint = runs[-1] / "private" / "checkpoint.json"
        steps.append(json.loads(checkpoint.read_text())["step"] if checkpoint.exists() else 0)
    finish(cohort, runs[-1])

    claims = [json.loads((run / "privacy.json").read_text()) for run in runs]
    ledger = open_ledger(cohort)
    events = ledger.events()
    result = {
        "killed": killed,
        "steps": steps,
        "epsilons": [claim["epsilon"] for claim in claims],
        "runs": [claim["receipt"]["run_id"] for claim in claims],
        "charges": [e.run_id for e in events if e.kind == "reserve"],
        "commits": [e.run_id for e in events if e.kind == "commit"],
        "spent": ledger.spent(claims[0]["delta"]),
        "expected": pld_epsilon([m for e in events if e.kind == "reserve" for m in e.mechanisms], claims[0]["delta"]),
        "weights": [digest(run) for run in runs],
    }
    print(json.dumps(result))


def finish(cohort: Path, run: Path) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(fork_trainer(cohort, run), 0)[1])
    if status:
        raise SystemExit(f"training ended with status {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
