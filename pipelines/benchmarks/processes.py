"""What several processes on one machine cost: the same private step dealt out to one, two and more of them.

    python pipelines/benchmarks/processes.py                  # table; --processes 1 2 4; --json FILE

A step is the whole of it: dealing, clipped sums, adding up, noise, Adam, sending the weights. Each process has one
thread. CPU is the sum over all processes, so it does not depend on what else the machine does; wall time does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from step import make_space

from medvae.config import Recipe
from medvae.dp.noise import seeded_noise
from medvae.nets.build import build_model
from medvae.train.engine.memory import Limits
from medvae.train.engine.module import BookkeepingSampler
from medvae.train.engine.tuner import Tuner
from medvae.train.joining import form_team
from medvae.train.optimizer import PatientDPOptimizer, inner_optimizer
from medvae.train.rule import resolve
from medvae.train.team import TeamSampler
from medvae.types import Batch

CASES = {"2D 64x64, 64 patients": ((64, 64), 64), "3D 32x48x32, 8 patients": ((32, 48, 32), 8)}


def work(shape: tuple[int, ...], patients: int, steps: int) -> dict[str, float]:
    """Take steps as one process of a team; return times a step, in seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    space = make_space(shape, ())
    recipe = resolve(Recipe(), 5000, space)
    model = build_model(space, recipe)
    engine = BookkeepingSampler(model, max_grad_norm=1.0, limits=Limits(64), tuner=Tuner(fixed="loop"))
    rng = np.random.default_rng(0)
    x = rng.random((patients, space.channels, *shape), dtype=np.float32)
    condition = np.zeros((patients, space.condition_width), dtype=np.float32)

    def load(rows: np.ndarray) -> Batch:
        return Batch(x[rows], condition[rows], rows)

    with form_team("cpu") as team:
        sampler = TeamSampler(engine, team) if team.size > 1 else engine
        optimizer = PatientDPOptimizer(
            inner_optimizer(engine.parameters, 1e-4),
            sampler,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_patients=float(patients),
        )
        walls = []
        for step in range(steps + 2):
            if step == 2:  # after warming up
                cpu = time.process_time()
            began = time.perf_counter()
            if team.leads:
                drawn = [np.asarray([i]) for i in range(patients)]
                rows, latent = team.deal(drawn, torch.zeros(patients, model.latent_dim))
                optimizer.step_on(load(rows), latent, seeded_noise(step))
            else:
                share = team.receive_share(model.latent_dim)
                assert share is not None  # noqa: S101
                sampler.clipped_sum(load(share[0]), share[1])
            team.share_weights(engine.parameters)
            walls.append(time.perf_counter() - began)
        cpu = (time.process_time() - cpu) / steps
    return {"wall": statistics.median(walls[2:]), "cpu": cpu, "parameters": sum(p.numel() for p in engine.parameters)}


def team_of(processes: int, shape: tuple[int, ...], patients: int, steps: int) -> dict[str, float]:
    """Fork a team, and return the leader's wall time and all processes' CPU time a step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = []
    for rank in range(processes):
        reading, writing = os.pipe()
        if os.fork() == 0:
            try:
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                os.write(writing, json.dumps(work(shape, patients, steps)).encode())
            finally:
                os._exit(0)
        os.close(writing)
        pipes.append(reading)
    said = [json.loads(os.read(pipe, 65536)) for pipe in pipes]
    for _ in pipes:
        os.wait()
    return {"wall": said[0]["wall"], "cpu": sum(s["cpu"] for s in said), "parameters": said[0]["parameters"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, (shape, patients) in CASES.items():
        for processes in arguments.processes:
            found = team_of(processes, shape, patients, arguments.steps)
            rows.append({"case": name, "processes": processes, **found})
    print(
        f"cores: {os.cpu_count()}; peak of a process: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10} MB"
    )
    print("| case | parameters | processes | wall ms a step | CPU ms a step, all processes | CPU against one |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        alone = next(r for r in rows if r["case"] == row["case"])
        print(
            f"| {row['case']} | {row['parameters']:,} | {row['processes']} | {1e3 * row['wall']:.0f} "
            f"| {1e3 * row['cpu']:.0f} | {row['cpu'] / alone['cpu']:.2f} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
