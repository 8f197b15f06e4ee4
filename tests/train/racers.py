"""Several trainers at once on one cohort whose budget is enough for one; print as JSON how each ended.

Run as `python racers.py FOLDER COUNT`. With MEDVAE_LEDGER set, each has a copy of the cohort folder of its own.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from small_cohort import small_config, write_cohort

import medvae.train.claim
import medvae.train.run
from medvae.dp.ledger_place import ADDRESS, open_ledger
from medvae.errors import MedvaeError
from medvae.train.planning import make_plan
from medvae.train.run import train
from medvae.vault.store import open_cohort

BUDGET = 9.0


def racer(cohort: Path, run: Path, start: tuple[int, int]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.close(start[1])
        os.read(start[0], 1)  # ends when the parent closes the last writing end: for all at once
        train(cohort, run, small_config())
        code = 0
    except MedvaeError as error:
        code = error.exit_code
    finally:
        os._exit(code)


def main(folder: Path, count: int) -> None:
    torch.set_num_threads(1)
    cohorts = [write_cohort(folder / "cohort")] * count
    if os.environ.get(ADDRESS):
        cohorts[1:] = [Path(shutil.copytree(cohorts[0], folder / f"copy-{i}")) for i in range(1, count)]
    plans = functools.cache(make_plan)
    medvae.train.run.make_plan = plans
    medvae.train.claim.prv_epsilon = lambda *_: None
    medvae.train.claim.plain_words = lambda *_: []
    plans(30, open_cohort(cohorts[0]).reveal().space, small_config())
    open_ledger(cohorts[0]).set_budget(BUDGET, 1e-5)

    start = os.pipe()
    racers = [racer(cohort, folder / f"run-{i}", start) for i, cohort in enumerate(cohorts)]
    os.close(start[1])
    codes = [os.waitstatus_to_exitcode(os.waitpid(r, 0)[1]) for r in racers]
    ledger = open_ledger(cohorts[0])
    result = {
        "codes": codes,
        "finished": [(folder / f"run-{i}" / "privacy.json").exists() for i in range(count)],
        "left": [(folder / f"run-{i}").exists() for i in range(count)],
        "kinds": [e.kind for e in ledger.events()],
        "spent": ledger.spent(1e-5),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
