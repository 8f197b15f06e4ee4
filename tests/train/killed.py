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

from medvae.crosscheck import prv_epsilon
from medvae.dp.ledger import Ledger
from medvae.train.planning import make_plan
from medvae.train.run import train
from medvae.vault.store import open_cohort


def fork_trainer(cohort: Path, run: Path) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(cohort, run, small_config(), resume=run.is_dir())
            status = 0
        finally:
            os._exit(status)
    return child


def digest(run: Path) -> str:
    return hashlib.sha256((run / "model" / "weights.safetensors").read_bytes()).hexdigest()


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    cohort = write_cohort(folder / "cohort")
    plan = make_plan(30, open_cohort(cohort).reveal().space, small_config()).privacy
    prv_epsilon(plan.mechanisms, plan.delta)  # cached for the children

    whole, cut = folder / "whole", folder / "cut"
    begun = time.monotonic()
    os.waitpid(fork_trainer(cohort, whole), 0)
    duration = time.monotonic() - begun

    chance = random.Random(kills)
    killed, stages = 0, set()
    while killed < kills and not (cut / "privacy.json").exists():
        child = fork_trainer(cohort, cut)
        time.sleep(chance.uniform(0.0, 0.6 * duration))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        checkpoint = cut / "private" / "checkpoint.json"
        stages.add(json.loads(checkpoint.read_text())["step"] if checkpoint.exists() else 0)
    status = os.waitpid(fork_trainer(cohort, cut), 0)[1]

    claims = [json.loads((run / "privacy.json").read_text()) for run in (whole, cut)]
    events = Ledger(cohort / "ledger.db").events()
    result = {
        "killed": killed,
        "stages": sorted(stages),
        "status": os.waitstatus_to_exitcode(status),
        "epsilons": [claim["epsilon"] for claim in claims],
        "charges": [e.run_id for e in events if e.kind == "reserve"],
        "commits": [e.run_id for e in events if e.kind == "commit"],
        "runs": [claim["receipt"]["run_id"] for claim in claims],
        "same_weights": digest(whole) == digest(cut),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
