"""The memory budget: how a batch is split, what is refused, and that the process keeps to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_oracle import clipped_sum, flat
from small_cohort import small_config
from torch import Tensor, nn

from medvae.dp.ledger_place import open_ledger
from medvae.errors import ConfigError
from medvae.train.engine.memory import GIB, KEPT_BYTES, Limits, Need, limits, resident_bytes
from medvae.train.engine.module import BookkeepingModule
from medvae.train.engine.tuner import Tuner
from medvae.train.gradient import Compute
from medvae.train.probe import made_up_batch, step_cost
from medvae.train.run import train
from medvae.types import ImageSpace, Intensity

CPU = torch.device("cpu")
MIB = 2**20


def gib(need: int) -> float:
    """Return a budget with room for so many bytes above what this process holds."""
    return (resident_bytes(CPU) + need) / GIB


def test_without_a_budget_only_the_size_of_a_part_is_bounded() -> None:
    assert limits(Need(MIB, MIB, 0), None, 4, CPU) == Limits(512, KEPT_BYTES)
    assert limits(Need(GIB, MIB, 0), None, 4, CPU).scans == 1  # one patient is always taken whole


def test_a_budget_keeps_gradients_where_they_fit() -> None:
    found = limits(Need(MIB, MIB, 10 * MIB), gib(111 * MIB), 4, CPU)
    assert 45 <= found.scans <= 50
    assert found.room == float("inf")
    assert found.kept <= KEPT_BYTES


def test_gradients_are_recomputed_where_that_makes_far_larger_parts() -> None:
    found = limits(Need(MIB, 100 * MIB, 0), gib(205 * MIB), 4, CPU)
    assert 45 <= found.scans <= 51
    assert found.room < 105 * MIB


@pytest.mark.parametrize("scans", [1, 4])
def test_a_budget_below_one_patient_is_refused(scans: int) -> None:
    need = Need(10 * MIB, 5 * MIB, 20 * MIB)
    assert limits(need, gib((26 + 10 * scans) * MIB), scans, CPU).scans >= 1
    with pytest.raises(ConfigError, match=rf"one patient of {scans} scans needs .* give at least"):
        limits(need, gib((24 + 10 * scans) * MIB), scans, CPU)


def test_a_run_without_room_for_a_patient_is_refused_before_it_is_charged(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory_gib is 0\.01"):
        train(cohort, tmp_path / "run", small_config(memory_gib=0.01))
    assert not (tmp_path / "run").exists()
    assert all(entry.kind == "create" for entry in open_ledger(cohort).events())


def test_a_run_with_a_budget_ends_as_one_without(cohort: Path, tmp_path: Path) -> None:
    free = train(cohort, tmp_path / "free", small_config(2))
    kept = train(cohort, tmp_path / "kept", small_config(2, memory_gib=64.0))
    assert free["epsilon"] == kept["epsilon"]


SCRIPT = """
import json, sys
import numpy as np, torch
from medvae.config import DpSgdConfig, ModelConfig
from medvae.nets.cvae import ConditionalVAE
from medvae.train.engine.memory import GIB, peak_bytes, resident_bytes
from medvae.train.loop import make_engine
from medvae.train.probe import made_up_batch
from medvae.types import ImageSpace, Intensity, PrivacyPlan

torch.set_num_threads(1)
space = ImageSpace((64, 64), (1.0, 1.0), "MR", Intensity("percentile", 1, 99), ())
model = ConditionalVAE(space, ModelConfig(latent_dim=8, channels=(8, 16)))
plan = PrivacyPlan(8.0, 1e-5, 1000, 0.1, 1.0, 1.0, 1, ())
more = json.loads(sys.argv[1])
budget = None if more is None else resident_bytes(torch.device("cpu")) / GIB + more
batch = made_up_batch(space, 80, 4.0)
engine = make_engine(model, plan, 8, space, DpSgdConfig(), memory_gib=budget)
engine.clipped_sum(batch, torch.zeros(len(batch.patient), 8))
print(json.dumps([peak_bytes(torch.device("cpu")) / GIB, budget]))
"""


def test_a_step_stays_within_its_budget() -> None:
    """The same step takes more where it is free to."""

    def peak(more: float | None) -> tuple[float, float]:
        words = [sys.executable, "-c", SCRIPT, json.dumps(more)]
        done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=500)
        found, budget = json.loads(done.stdout)
        return found, budget

    inside, budget = peak(0.25)
    assert inside <= budget
    assert peak(None)[0] > budget


def test_the_cost_of_a_plan_counts_all_of_its_steps() -> None:
    from medvae.train.planning import make_plan

    space = ImageSpace((8, 8), (1.0, 1.0), "MR", Intensity("percentile", 1, 99), ())
    plan = make_plan(40, space, small_config(50))
    cost = step_cost(plan, space, 2.0)
    assert cost is not None
    assert cost.total_seconds > 50 * cost.step_seconds > 0
    assert cost.memory_gb > 0.1


def test_made_up_scans_have_the_mean_asked_for() -> None:
    space = ImageSpace((4, 4), (1.0, 1.0), "MR", Intensity("percentile", 1, 99), ())
    batch = made_up_batch(space, 10, 1.5)
    assert len(batch.patient) == 15
    assert sorted(set(batch.patient.tolist())) == list(range(10))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu()).square().flatten(1).sum(1)


def test_bf16_and_channels_last_give_float32_sums_within_the_bound() -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.randn(6, 1, 8, 8)
    exact, norms = clipped_sum(model, (x,), (1, 3, 2), 1e6)
    module = BookkeepingModule(model, compute=Compute(bf16=True, channels_last=True))
    weight = torch.tensor([1.0, *[1 / 3] * 3, *[1 / 2] * 2])
    found, rounded, _ = module.clipped_sum((x,), weight, (1, 3, 2), 1e6)
    sums = [s for s in found if s is not None]
    assert all(s.dtype == torch.float32 for s in sums)
    assert torch.allclose(rounded, norms, rtol=0.03)
    assert float((flat(sums) - flat(exact)).norm() / flat(exact).norm()) < 0.03
    one, _, _ = module.clipped_sum((x,), torch.full((6,), 1 / 6), (6,), 0.1)
    assert float(flat([s for s in one if s is not None]).norm()) <= 0.1 * (1 + 1e-5)


class InPlace(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.second(h)
        h.add_(1.0)
        return y.square().flatten(1).sum(1)


def test_an_input_changed_in_place_is_refused() -> None:
    with pytest.raises((ConfigError, RuntimeError), match=r"in place|inplace"):
        clipped_sum(InPlace(), (torch.randn(2, 1, 6, 6),), (1, 1), 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU at hand")
@pytest.mark.parametrize("strategy", [None, "loop", "grouped4", "unfold", "ghost", "recompute"])
def test_on_a_gpu_as_on_the_cpu(strategy: str | None) -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.randn(6, 1, 8, 8)
    exact, norms = clipped_sum(model, (x,), (1, 3, 2), 0.1)
    module = BookkeepingModule(model.cuda(), tuner=Tuner(fixed=strategy))
    weight = torch.tensor([1.0, *[1 / 3] * 3, *[1 / 2] * 2]).cuda()
    room = 0.0 if strategy == "recompute" else float("inf")
    sums, found, _ = module.clipped_sum((x.cuda(),), weight, (1, 3, 2), 0.1, room)
    assert torch.allclose(found.cpu(), norms, rtol=1e-3)
    gap = flat([s.cpu() for s in sums if s is not None]) - flat(exact)
    assert float(gap.norm() / flat(exact).norm()) < 1e-3
