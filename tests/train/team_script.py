"""Train with several processes, as a list of tasks says; print as JSON how each of them ended.

Run as `python team_script.py FOLDER TASKS`. TASKS is JSON, one object a task:
    name, processes     the run folder's name; how many processes
    config              changes to the small recipe; `patients` of the cohort
    stop                the leader raises Stop after this step; resume: go on with a run
    press               the leader gets Ctrl-C after this step
    harm                [rank, step, what]: that process then gets SIGKILL or SIGSTOP, fails, or has a defect
    noisy               every process adds noise of its own: what must never be
    fault               what the processes that do not lead do wrong: "unclipped", "by scan", "doubled"
    budget              set on the cohort's ledger before; environment: variables of all processes
A process of its own, so that every process of a team is forked from a parent that holds no threads.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_cohort import Stop, small_config, write_cohort

import medvae.train.claim
import medvae.train.engine.module
import medvae.train.run
from medvae.dp.ledger import Ledger
from medvae.errors import CohortError, MedvaeError
from medvae.train.distributed import follow
from medvae.train.engine.module import BookkeepingSampler
from medvae.train.joining import form_team
from medvae.train.planning import make_plan
from medvae.train.run import train
from medvae.train.sampler import PatientSampler
from medvae.train.team import Team
from medvae.types import Batch
from medvae.vault.store import open_cohort

Task = Mapping[str, Any]


def work(folder: Path, task: Task) -> dict[str, Any]:
    """Be one process of a team; return what it has to say."""
    torch.set_num_threads(1)
    config = small_config(**task.get("config", {}))
    shares: list[int] = []
    _watch_loads(task, shares)
    if task.get("noisy"):
        _add_noise_everywhere()
    if task.get("fault") and int(os.environ["RANK"]) > 0:
        _work_badly(task["fault"])

    def on_step(step: int, _stats: Mapping[str, float]) -> None:
        if step == task.get("stop"):
            raise Stop
        if step == task.get("press"):
            os.kill(os.getpid(), signal.SIGINT)

    with form_team("cpu") as team:
        if not team.leads:
            claim = follow(team)
        else:
            cohort = folder / f"cohort-{task.get('patients', 30)}"
            claim = train(cohort, folder / task["name"], config, task.get("resume", False), None, on_step, team)
            team.conclude(claim)
    return {"claim": claim, "shares": shares}


def _add_noise_everywhere() -> None:
    plain = Team.add_up

    def add_up(team: Team, sums: Any) -> Any:
        if not team.leads:
            sums = [s + 1.4 * torch.randn(s.shape) for s in sums]
        return plain(team, sums)

    Team.add_up = add_up  # type: ignore[method-assign]


def _work_badly(fault: str) -> None:
    plain = BookkeepingSampler.clipped_sum

    def clipped_sum(engine: BookkeepingSampler, batch: Batch, latent: Any) -> Any:
        bound = engine._max_grad_norm
        engine._max_grad_norm = 1e30 if fault == "unclipped" else bound
        rows = np.arange(len(batch.patient)) if fault == "by scan" else batch.patient
        sums, stats = plain(engine, batch._replace(patient=rows), latent)
        engine._max_grad_norm = bound
        return [2 * s for s in sums] if fault == "doubled" else sums, stats

    medvae.train.engine.module.check_sampler = lambda *_: None  # the check before training would find it first
    BookkeepingSampler.clipped_sum = clipped_sum  # type: ignore[method-assign]


def _watch_loads(task: Task, shares: list[int]) -> None:
    """Note how many scans this process gets in each step, and do it harm where the task says so."""
    rank, step, what = task.get("harm", (None, 0, ""))
    mine = rank == int(os.environ["RANK"])
    plain = PatientSampler.load

    def load(sampler: PatientSampler, rows: Any) -> Any:
        shares.append(len(rows))
        if mine and len(shares) > step:
            if what == "fail":
                raise CohortError("the scans are on strike: pay them")
            if what == "defect":
                raise KeyError("a secret of patient 7")
            os.kill(os.getpid(), getattr(signal, what))
        return plain(sampler, rows)

    PatientSampler.load = load  # type: ignore[method-assign]


def process(folder: Path, task: Task, rank: int, port: int) -> int:
    """Fork a process of a team; it leaves its words in a file."""
    child = os.fork()
    if child:
        return child
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(task["processes"]))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **task.get("environment", {}))
    said: dict[str, Any] = {}
    code = 0
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            said = work(folder, task)
    except (Stop, KeyboardInterrupt) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 99
    except SystemExit as error:
        code = int(error.code or 0)
    except MedvaeError as error:
        said, code = {"error": str(error), "kind": type(error).__name__}, error.exit_code
    except BaseException as error:
        said, code = {"error": repr(error)}, 1
    said |= {"code": code, "stderr": errors.getvalue(), "ended": time.monotonic()}
    (folder / f".said-{rank}").write_text(json.dumps(said))
    os._exit(code)


def team(folder: Path, task: Task) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(task["processes"]):
        (folder / f".said-{rank}").unlink(missing_ok=True)
    began = time.monotonic()
    children = [process(folder, task, rank, port) for rank in range(task["processes"])]
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for rank, child in enumerate(children):
            if rank not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
        harm = task.get("harm")
        stopped = harm is not None and harm[2] == "SIGSTOP" and harm[0] not in codes
        if stopped and len(codes) == len(children) - 1:
            os.kill(children[harm[0]], signal.SIGKILL)  # it would sleep for ever
        time.sleep(0.01)
    files = [folder / f".said-{rank}" for rank in range(task["processes"])]
    said = [json.loads(f.read_text()) if f.exists() else {} for f in files]
    return {"codes": [codes[r] for r in range(len(children))], "said": said, "seconds": time.monotonic() - began}


def main(folder: Path, tasks: list[Task]) -> None:
    torch.set_num_threads(1)
    # The arithmetic once, for all children: what is tested is training.
    plans = functools.cache(make_plan)
    medvae.train.run.make_plan = plans
    medvae.train.claim.prv_epsilon = lambda *_: None
    medvae.train.claim.plain_words = lambda *_: []
    results = []
    for task in tasks:
        cohort = folder / f"cohort-{task.get('patients', 30)}"
        if not cohort.exists():
            write_cohort(cohort, patients=task.get("patients", 30))
        store = open_cohort(cohort).reveal()
        plans(len(store.patients("train")), store.space, small_config(**task.get("config", {})))
        if "budget" in task:
            Ledger(cohort / "ledger.db").set_budget(task["budget"], 1e-5)
        results.append(team(folder, task))
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
