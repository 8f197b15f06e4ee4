"""Runs of several processes: the same weights as one, the planned noise once, no rank out of step, and common ends."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from noise_check import has_planned_noise
from safetensors.numpy import load_file
from small_cohort import small_config, weights, write_cohort

from medvae.dp.ledger import Ledger
from medvae.nets.build import build_model
from medvae.train.engine.memory import Limits
from medvae.train.engine.module import BookkeepingSampler
from medvae.train.engine.tuner import Tuner
from medvae.train.joining import form_team
from medvae.train.rule import resolve
from medvae.train.sampler import PatientSampler
from medvae.train.team import LOST, Team, TeamSampler, split_evenly
from medvae.vault.store import open_cohort

SCRIPT = Path(__file__).with_name("team_script.py")
STEPS = 10
Results = dict[str, Any]


def settings_of(steps: int = STEPS, rate: float = 0.05, **dpsgd: Any) -> dict[str, Any]:
    return {
        "recipe": {
            "model": {"latent_dim": 2, "channels": [4], "norm_groups": 2},
            "moments": {"basis_shape": [4, 4], "coarse_shape": [2, 2]},
            "canaries": {"patterns": 0},  # their walks are loads of their own: see test_patterns.py
            "dpsgd": {
                "enabled": True,
                "steps": steps,
                "sample_rate": rate,
                "checkpoint_every": 2,
                "learning_rate": 0.02,
                **dpsgd,
            },
        }
    }


def run_teams(folder: Path, tasks: list[dict[str, Any]], timeout: float = 540) -> dict[str, Results]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), json.dumps(tasks)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {task.get("as", task["name"]): r for task, r in zip(tasks, json.loads(done.stdout), strict=True)}


def distance(a: Path, b: Path) -> float:
    """Largest difference of any weight, over the largest weight of its kind."""
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    pairs = [(left[k].astype(np.float64), right[k].astype(np.float64)) for k in left if left[k].size]
    return max(float(np.abs(a - b).max() / max(1e-3, np.abs(a).max())) for a, b in pairs)


# --- what passes between processes ------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), max_size=30), parts=st.integers(1, 5))
def test_shares_are_whole_patients_each_once_and_about_even(sizes: list[int], parts: int) -> None:
    shares = split_evenly(sizes, parts)
    assert len(shares) == parts
    assert [i for share in shares for i in share] == list(range(len(sizes)))
    even, most = sum(sizes) / parts, max(sizes, default=0)
    assert all(sum(sizes[i] for i in share) <= even + most for share in shares)


def test_a_process_alone_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with form_team() as team:
        assert team == Team()
        assert team.leads
        rows = [np.asarray([3, 4]), np.asarray([9])]
        dealt, latent = team.deal(rows, torch.zeros(3, 2))
        assert dealt.tolist() == [3, 4, 9]
        assert latent.shape == (3, 2)
        sums = [torch.ones(2)]
        assert team.add_up(sums)[0] is sums[0]


@pytest.mark.parametrize("max_scans", [2, 64])
def test_the_sum_of_the_shares_is_the_sum_of_the_whole(cohort: Path, max_scans: int) -> None:
    """Each share is clipped by patient and split into micro-batches by itself; an empty one adds zeros."""
    store = open_cohort(cohort).reveal()
    recipe = resolve(small_config().recipe, 30, store.space)
    torch.manual_seed(0)
    engine = BookkeepingSampler(
        build_model(store.space, recipe), max_grad_norm=0.5, limits=Limits(max_scans), tuner=Tuner(fixed="loop")
    )
    sampler = PatientSampler(store, store.patients("train"), 0.3, 4)
    patients = [store.rows(np.asarray([p])) for p in (2, 3, 5, 8)]
    latent = torch.randn(sum(map(len, patients)), 2)
    whole, _ = TeamSampler(engine, Team()).clipped_sum(sampler.load(np.concatenate(patients)), latent)
    for parts in (2, 3, 6):
        total, start = [torch.zeros_like(w) for w in whole], 0
        for share in split_evenly([len(p) for p in patients], parts):
            rows = np.concatenate([np.zeros(0, dtype=np.int64), *[patients[i] for i in share]])
            sums, _ = engine.clipped_sum(sampler.load(rows), latent[start : start + len(rows)])
            total = [t + s for t, s in zip(total, sums, strict=True)]
            start += len(rows)
        for found, expected in zip(total, whole, strict=True):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Results]]:
    """Runs with few patients a step, so that some processes have none; one that goes 3, 1, 2; and bad ends."""
    folder = tmp_path_factory.mktemp("teams")
    common = {"config": settings_of()}
    cut, pair = {**common, "name": "cut"}, {**common, "processes": 2}
    quiet = settings_of(1, 0.002)["recipe"] | {"canaries": {"enabled": False}}  # whose sums are not zero
    one_step = {"config": {"recipe": quiet, "seed": 1}}
    tasks = [
        *({**common, "name": f"run-{n}", "processes": n} for n in (1, 2, 3)),
        {**cut, "as": "cut-3", "processes": 3, "stop": 3},
        {**cut, "as": "cut-1", "processes": 1, "stop": 6, "resume": True},
        {**cut, "as": "cut-2", "processes": 2, "resume": True},
        *({"name": f"plain-{n}", "processes": n, "config": {**settings_of(4), "dp_epsilon": math.inf}} for n in (1, 2)),
        {"name": "shorter", "processes": 1, "config": settings_of(STEPS - 1)},
        *({**one_step, "name": f"noise-{n}", "processes": n} for n in (1, 2, 3)),
        {**one_step, "name": "noisy", "processes": 2, "noisy": True},
        {**pair, "name": "follower killed", "harm": [1, 5, "SIGKILL"]},
        {**pair, "name": "follower killed", "as": "went on", "resume": True},
        {**pair, "name": "leader killed", "harm": [0, 5, "SIGKILL"]},
        {**pair, "name": "failed", "harm": [1, 5, "fail"]},
        {**pair, "name": "defect", "harm": [1, 5, "defect"]},
        {**pair, "name": "stopped", "harm": [1, 5, "SIGSTOP"], "environment": {"MEDVAE_TEAM_TIMEOUT_S": "10"}},
        {**pair, "name": "pressed", "press": 4},
        {**pair, "name": "pressed", "as": "pressed again", "processes": 3, "resume": True},
        {**pair, "name": "over budget", "patients": 31, "budget": 1.0},
    ]
    return folder, run_teams(folder, tasks)


@pytest.mark.parametrize("processes", [2, 3])
def test_weights_equal_those_of_one_process(teams: tuple[Path, dict[str, Results]], processes: int) -> None:
    folder, results = teams
    assert results[f"run-{processes}"]["codes"] == [0] * processes
    assert distance(folder / "run-1", folder / f"run-{processes}") < 1e-4
    said = results[f"run-{processes}"]["said"]
    assert all(s["claim"] == said[0]["claim"] for s in said)
    assert said[0]["claim"]["processes"] == processes


def test_a_comparison_without_noise_equals_that_of_one_process(teams: tuple[Path, dict[str, Results]]) -> None:
    folder, results = teams
    assert results["plain-2"]["codes"] == [0, 0]
    assert distance(folder / "plain-1", folder / "plain-2") < 1e-4


@pytest.mark.parametrize("run", ["run-2", "run-3", "cut"])
def test_the_log_says_the_same_of_each_step(teams: tuple[Path, dict[str, Results]], run: str) -> None:
    folder, _ = teams
    logs = [(folder / name / "private" / "losses.jsonl").read_text().splitlines() for name in ("run-1", run)]
    assert len(logs[0]) == len(logs[1]) == STEPS
    for alone, together in (map(json.loads, lines) for lines in zip(*logs, strict=True)):
        for key in ("step", "patients", "scans", "loss", "clipped", "median_norm"):
            expected = alone[key]  # null where nobody was drawn
            assert together[key] == (expected if expected is None else pytest.approx(expected, rel=1e-3)), key


def test_another_run_has_other_weights(teams: tuple[Path, dict[str, Results]]) -> None:
    """So that the tolerance above means something."""
    folder, _ = teams
    assert distance(folder / "run-1", folder / "shorter") > 1e-2


@pytest.mark.parametrize("processes", [2, 3])
def test_no_process_falls_out_of_step_on_an_empty_share(teams: tuple[Path, dict[str, Results]], processes: int) -> None:
    """Opacus's sampler drops empty batches of a rank, and the ranks then wait for different steps."""
    _, results = teams
    shares = np.asarray([s["shares"][-STEPS:] for s in results[f"run-{processes}"]["said"]])
    alone = np.asarray(results["run-1"]["said"][0]["shares"][-STEPS:])
    assert shares.shape == (processes, STEPS)
    assert (shares.sum(0) == alone).all()
    for rank in range(processes):
        assert (shares[rank] == 0).any(), "the draw was to leave every process empty at times"
    assert (shares.sum(0) == 0).any(), "and all of them at least once"
    assert ((shares == 0).any(0) & (shares > 0).any(0)).any()


def test_processes_never_draw_the_same_patients(teams: tuple[Path, dict[str, Results]]) -> None:
    """Equal seeds on all ranks draw equal masks in Opacus; here one draw is dealt out, so the shares add up to it."""
    _, results = teams
    for processes in (2, 3):
        for ranks in zip(*(s["shares"][-STEPS:] for s in results[f"run-{processes}"]["said"]), strict=True):
            assert sum(ranks) < 2 * max(1, max(ranks)) + 9
    said = results["run-2"]["said"]
    assert said[0]["shares"][-STEPS:] != said[1]["shares"][-STEPS:]


def test_a_checkpoint_goes_on_with_another_number_of_processes(teams: tuple[Path, dict[str, Results]]) -> None:
    folder, results = teams
    assert [results[f"cut-{n}"]["codes"][0] for n in (3, 1, 2)] == [99, 99, 0]
    assert results["cut-3"]["codes"][1:] == [0, 0]  # the leader says what was wrong; the others just end
    assert all(s["stderr"] == "" for s in results["cut-3"]["said"])
    assert distance(folder / "run-1", folder / "cut") < 1e-4
    events = Ledger(folder / "cohort-30" / "ledger.db").events()
    cut = results["cut-2"]["said"][0]["claim"]["receipt"]["run_id"]
    assert [e.kind for e in events if e.run_id == cut] == ["reserve", "commit"]


def released_noise(run: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Return what the one step of a run added to an empty draw's sum of zeros: Adam's first moment is a tenth of it."""
    private = run / "private"
    facts = json.loads((private / "checkpoint.json").read_text())
    tensors = load_file(private / facts["tensors"])
    moments = [v.ravel() for k, v in sorted(tensors.items()) if k.endswith("/exp_avg")]
    noise = np.concatenate(moments).astype(float) / 0.1 * facts["sample_rate"] * facts["patients"]
    return noise, facts


def test_noise_enters_once_and_has_the_planned_size(teams: tuple[Path, dict[str, Results]]) -> None:
    folder, results = teams
    for name in ("noise-1", "noise-2", "noise-3", "noisy"):
        assert sum(s["shares"][-1] for s in results[name]["said"]) == 0
    for processes in (1, 2, 3):
        noise, facts = released_noise(folder / f"noise-{processes}")
        std = facts["noise_multiplier"] * facts["max_grad_norm"]
        assert len(noise) > 500
        assert has_planned_noise(noise, std)
        for factor in (2**0.5, 3**0.5):
            assert not has_planned_noise(noise * factor, std)
            assert not has_planned_noise(noise / factor, std)
    noise, facts = released_noise(folder / "noisy")
    assert not has_planned_noise(noise, facts["noise_multiplier"] * facts["max_grad_norm"])


# --- ends -------------------------------------------------------------------------------------------------------------


def test_a_lost_process_ends_the_run_in_a_sentence_and_it_goes_on(teams: tuple[Path, dict[str, Results]]) -> None:
    folder, results = teams
    killed = results["follower killed"]
    assert killed["codes"] == [2, -9]
    assert killed["said"][0]["error"] == LOST
    assert killed["seconds"] < 60
    assert results["went on"]["codes"] == [0, 0]
    assert distance(folder / "run-1", folder / "follower killed") < 1e-4


def test_a_lost_leader_ends_the_others(teams: tuple[Path, dict[str, Results]]) -> None:
    killed = teams[1]["leader killed"]
    assert killed["codes"] == [-9, 2]
    assert killed["said"][1]["stderr"] == f"medvae: {LOST}\n"
    assert killed["seconds"] < 60


def test_the_first_process_speaks_for_one_that_fails(teams: tuple[Path, dict[str, Results]]) -> None:
    failed, defect = teams[1]["failed"], teams[1]["defect"]
    assert failed["codes"] == [2, 2]
    assert failed["said"][0]["error"] == "process 2 of 2 failed: the scans are on strike: pay them"
    assert defect["codes"] == [1, 1]
    assert defect["said"][0]["error"] == "process 2 of 2 failed: a defect of ours (KeyError)"
    assert failed["said"][1]["stderr"] == defect["said"][1]["stderr"] == ""


def test_a_process_that_hangs_is_given_up(teams: tuple[Path, dict[str, Results]]) -> None:
    stopped = teams[1]["stopped"]
    assert stopped["codes"] == [2, -9]
    assert stopped["said"][0]["error"] == LOST
    assert stopped["seconds"] < 60


def test_ctrl_c_leaves_a_state_for_any_number_of_processes(teams: tuple[Path, dict[str, Results]]) -> None:
    folder, results = teams
    assert results["pressed"]["codes"] == [130, 0]
    assert results["pressed again"]["codes"] == [0, 0, 0]
    assert distance(folder / "run-1", folder / "pressed") < 1e-4


def test_a_refusal_ends_all_and_is_said_once(teams: tuple[Path, dict[str, Results]]) -> None:
    folder, results = teams
    refused = results["over budget"]
    assert refused["codes"] == [3, 0]
    assert refused["said"][0]["kind"] == "BudgetExceeded"
    assert refused["said"][1]["stderr"] == ""
    assert not (folder / "over budget").exists()


# --- the command ------------------------------------------------------------------------------------------------------


def test_torchrun_starts_a_run_that_speaks_with_one_voice(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path / "cohort")
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings_of(4, 0.1)["recipe"]))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "medvae"),
        *("train", str(cohort), "--dp-epsilon", "8", "--pipeline", str(tmp_path / "recipe.yaml")),
        *("-o", str(tmp_path / "run"), "--device", "cpu", "--json"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=540, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    claim = json.loads(done.stdout)
    assert claim["processes"] == 2
    assert claim["releasable"] is True
    assert done.stderr.count("train ...") == 1
