"""The engine as a whole: agreement with Opacus's functorch mode, the bound, refusals, and what it leaves behind."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_oracle import check, clipped_sum, flat
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import AutoencoderKL
from opacus.grad_sample.gsm_base import AbstractGradSampleModule
from torch import Tensor, nn

from medvae.config import ModelConfig
from medvae.errors import ConfigError
from medvae.nets.cvae import ConditionalVAE
from medvae.train.engine.memory import Limits
from medvae.train.engine.module import BookkeepingModule, BookkeepingSampler
from medvae.train.engine.tuner import Tuner, fastest, load_choices, save_choices
from medvae.train.gradient import FunctorchSampler, check_sampler
from medvae.types import Batch, Condition, ImageSpace, Intensity

LATENT = 3


class Net(nn.Module):
    """Two convolutions, a norm and a linear layer; a loss a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 2, 3, stride=2)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return self.linear(self.second(self.norm(self.first(x)).tanh()).flatten(1)).square().sum(1)


def images(scans: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(scans, 1, 6, 6, generator=torch.Generator().manual_seed(scans))


def vae(shape: tuple[int, ...], units: int = 1) -> ConditionalVAE:
    side = (Condition("side", "class", ("a", "b")),)
    space = ImageSpace(shape, (1.0,) * len(shape), "MR", Intensity("percentile", 1, 99), side, (1,))
    torch.manual_seed(1)
    model = ConditionalVAE(space, ModelConfig(latent_dim=LATENT, channels=(4, 8), residual_units=units))
    with torch.no_grad():
        for parameter in model.parameters():  # layers that start at zero would hide others
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def cohort(shape: tuple[int, ...], lengths: list[int]) -> tuple[Batch, Tensor]:
    rng = np.random.default_rng(2)
    scans = sum(lengths)
    x = rng.random((scans, 2, *shape), dtype=np.float32)
    condition = np.eye(2, dtype=np.float32)[rng.integers(0, 2, scans)]
    batch = Batch(x, condition, np.repeat(np.arange(len(lengths)), lengths))
    return batch, torch.from_numpy(rng.normal(size=(scans, LATENT)).astype(np.float32))


@pytest.mark.parametrize("units", [0, 1, 2])
@pytest.mark.parametrize("shape", [(8, 12), (7, 9), (6, 8, 4)])
@pytest.mark.parametrize("max_scans", [3, 64])
def test_equals_functorch_on_the_conditional_vae(shape: tuple[int, ...], units: int, max_scans: int) -> None:
    model = vae(shape, units)
    batch, latent = cohort(shape, [1, 3, 2, 1])
    for bound in (0.05, 1e6):
        oracle = FunctorchSampler(copy.deepcopy(model), max_grad_norm=bound, max_scans=max_scans)
        expected, exact = oracle.clipped_sum(batch, latent)
        sampler = BookkeepingSampler(copy.deepcopy(model), max_grad_norm=bound, limits=Limits(max_scans))
        sums, stats = sampler.clipped_sum(batch, latent)
        assert stats.reveal().norms.tolist() == pytest.approx(exact.reveal().norms.tolist(), rel=1e-5)
        assert stats.reveal().loss == pytest.approx(exact.reveal().loss, rel=1e-5)
        assert stats.reveal().clipped == exact.reveal().clipped
        assert stats.reveal().scans == 7
        assert float((flat(sums) - flat(expected)).norm() / flat(expected).norm()) < 1e-4


def test_passes_the_check_before_training() -> None:
    model = vae((8, 12))
    batch, latent = cohort((8, 12), [2, 1])
    sampler = BookkeepingSampler(copy.deepcopy(model), max_grad_norm=0.1, limits=Limits(8))
    check_sampler(sampler, model, batch, latent)


def test_empty_batch_gives_zeros() -> None:
    model = vae((8, 12))
    batch, latent = cohort((8, 12), [])
    sums, stats = BookkeepingSampler(model, max_grad_norm=1.0, limits=Limits(4)).clipped_sum(batch, latent)
    assert [s.shape for s in sums] == [p.shape for p in model.parameters()]
    assert float(flat(sums).abs().sum()) == 0.0
    assert math.isnan(stats.reveal().loss)


@settings(max_examples=60, deadline=None)
@given(
    scans=st.integers(1, 7),
    bound=st.sampled_from([1e-3, 0.1, 1.0, 7.0]),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    strategy=st.sampled_from([None, "loop", "grouped4", "unfold", "ghost", "recompute"]),
    seed=st.integers(0, 99),
)
def test_a_patient_never_adds_more_than_the_bound(
    scans: int, bound: float, scale: float, strategy: str | None, seed: int
) -> None:
    torch.manual_seed(seed)
    sums, norms = clipped_sum(Net(), (images(scans, scale),), (scans,), bound * (1 - 1e-5), strategy)
    assert float(flat(sums).norm()) <= bound
    if float(norms[0]) > bound:
        assert float(flat(sums).norm()) > 0.99 * bound


class Cancelling(nn.Module):
    """Two scans of one patient whose gradients nearly cancel."""

    def __init__(self, gap: float) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 32, bias=False)
        self.gap = gap

    def forward(self, x: Tensor) -> Tensor:
        sign = torch.tensor([1.0, -1.0 + self.gap])
        return self.linear(x).sin().sum(1) * sign


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("strategy", ["products", "ghost", "recompute"])
def test_the_bound_holds_where_scans_cancel(gap: float, strategy: str) -> None:
    """A norm from inner products loses what cancels; what is released must be bounded all the same."""
    torch.manual_seed(0)
    x = torch.randn(1, 64).expand(2, 64) * 100 + 1e-5 * torch.randn(2, 64)
    bound = 1e-4
    sums, _ = clipped_sum(Cancelling(gap), (x,), (2,), bound * (1 - 1e-5), strategy)
    assert float(flat(sums).norm()) <= bound


@pytest.mark.parametrize("strategy", ["loop", "grouped4", "unfold", "ghost", "recompute", "products"])
@pytest.mark.parametrize("counts", [(2, 2, 2), (1, 3, 2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_counts_as_zero(strategy: str, counts: tuple[int, ...], value: float) -> None:
    torch.manual_seed(0)
    model, x = Net(), images(6)
    start = counts[0]
    stop = start + counts[1]
    x[start] = value
    sums, norms = clipped_sum(model, (x,), counts, 0.1, strategy)
    rest = torch.cat([x[:start], x[stop:]])
    expected, _ = clipped_sum(model, (rest,), (counts[0], counts[2]), 0.1, strategy)
    assert torch.isfinite(norms).tolist() == [True, False, True]
    assert torch.allclose(flat(sums), flat(expected), atol=1e-6)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("strategy", ["loop", "grouped4", "unfold", "ghost", "recompute"])
def test_where_opacus_hooks_go_wrong_padding_modes(mode: Any, strategy: str) -> None:
    torch.manual_seed(0)
    model = Net()
    model.first = nn.Conv2d(1, 4, 3, padding=1, padding_mode=mode)
    check(model, (images(4),), (1, 3), 0.1, strategy)


class ChannelsLast(Net):
    """As MONAI's attention leaves it: a convolution on an input that is not laid out plainly."""

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        h = self.first(x).tanh()
        h = h.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).view(h.shape)
        return self.linear(self.second(self.norm(h)).flatten(1)).square().sum(1)


@pytest.mark.parametrize("strategy", [None, "loop", "grouped4", "unfold", "ghost", "recompute"])
def test_where_opacus_hooks_go_wrong_channels_last(strategy: str | None) -> None:
    torch.manual_seed(0)
    check(ChannelsLast(), (images(4).contiguous(memory_format=torch.channels_last),), (1, 3), 0.1, strategy)
    check(ChannelsLast().to(memory_format=torch.channels_last), (images(4),), (2, 2), 0.1, strategy)


class Attention(nn.Module):
    """MONAI's AutoencoderKL with attention, on which Opacus's hooks are silently wrong."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        levels: Any = {"channels": (4, 8), "num_res_blocks": (1, 1), "attention_levels": (False, True)}
        self.net = AutoencoderKL(dims, 1, 1, latent_channels=2, norm_num_groups=2, **levels)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        mean, sigma = self.net.encode(x)
        return (self.net.decode(mean + sigma * noise) - x).square().flatten(1).sum(1)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("strategy", [None, "loop", "unfold", "ghost", "recompute"])
def test_attention_of_monai(dims: int, strategy: str | None) -> None:
    torch.manual_seed(0)
    scans = 4 if dims == 2 else 3
    inputs = torch.randn(scans, 1, *(8,) * dims), torch.randn(scans, 2, *(4,) * dims)
    check(Attention(dims), inputs, (scans - 3, 2, 1) if scans > 3 else (2, 1), 0.1, strategy)


class Scaled(Net):
    """Holds a parameter outside any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class Standardised(nn.Conv2d):
    """A convolution that changes its weight before use."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.PReLU(), "PReLU"),
        (nn.Bilinear(2, 2, 2), "Bilinear"),
        (nn.MultiheadAttention(4, 2), "MultiheadAttention"),
        (Standardised(1, 1, 3), "Standardised"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 3)), "_WeightNorm|ParametrizedConv2d|Parametrization"),
        (nn.utils.spectral_norm(nn.Linear(2, 2)), "Linear"),
        (nn.Embedding(3, 2, max_norm=1.0), "Embedding"),
    ],
)
def test_an_unknown_layer_is_refused_by_name(layer: nn.Module, kind: str) -> None:
    model = Net()
    model.extra = layer
    with pytest.raises(ConfigError, match=f"'extra.*({kind})"):
        BookkeepingModule(model)
    assert "forward" not in model.first.__dict__


def test_a_bare_parameter_is_refused() -> None:
    with pytest.raises(ConfigError, match="Scaled"):
        BookkeepingModule(Scaled())


def test_batch_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match="BatchNorm2d"):
        BookkeepingSampler(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), max_grad_norm=1.0, limits=Limits(4))


class Bypass(Net):
    """Uses a layer's weight behind the layer's back."""

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return super().forward(x) + x.flatten(1)[:, :8] @ self.linear.weight.sum(0)


class Folded(Net):
    """Moves image rows into the batch, where no layer can tell whose they are."""

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return self.linear(x.reshape(-1, 6)[:, :1].expand(-1, 8)).sum(1).view(len(x), -1).sum(1)


@pytest.mark.parametrize(("kind", "name"), [(Bypass, "linear.weight"), (Folded, "linear")])
def test_a_weight_used_where_no_scan_can_be_told_is_refused(kind: type[Net], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        clipped_sum(kind(), (images(3),), (1, 2), 0.1)


def test_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = Net()
    plain = model(images(3))
    module = BookkeepingModule(model)
    assert isinstance(module, AbstractGradSampleModule)
    module.clipped_sum((images(3),), torch.ones(3), (1, 1, 1), 1.0)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model(images(3)), plain)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.linear.weight.zero_()
    assert not torch.equal(copied(images(3)), plain)
    assert torch.equal(model(images(3)), plain)
    assert module.to_standard_module() is model
    assert all("forward" not in m.__dict__ for m in model.modules())
    model(images(3)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_failed_forward_leaves_no_open_book() -> None:
    module = BookkeepingModule(Net())
    with pytest.raises(RuntimeError):
        module.clipped_sum((torch.randn(3, 2, 6, 6),), torch.ones(3), (1, 2), 1.0)
    sums, norms, _ = module.clipped_sum((images(3),), torch.ones(3), (1, 2), 1.0)
    assert len(norms) == 2
    assert all(s is not None for s in sums)


def test_strategies_are_timed_once_and_can_be_given() -> None:
    torch.manual_seed(0)
    x, weight = images(6), torch.ones(6)
    module = BookkeepingModule(Net())
    module.clipped_sum((x,), weight, (1,) * 6, 1.0)
    choices = dict(module.choices)
    assert len(choices) == 3
    module.clipped_sum((x[:5],), weight[:5], (1,) * 5, 1.0)  # a draw of nearly the same size
    assert dict(module.choices) == choices
    given = {key: "unfold" if key.startswith("conv") else "products" for key in choices}
    repeated = BookkeepingModule(Net(), tuner=Tuner(given))
    repeated.clipped_sum((x,), weight, (1,) * 6, 1.0)
    assert dict(repeated.choices) == given


def test_choices_are_stored_with_a_run_and_a_torn_file_only_costs_time(tmp_path: Path) -> None:
    assert load_choices(tmp_path) == {}
    save_choices(tmp_path, {"conv b": "loop", "conv a": "ghost"})
    assert load_choices(tmp_path) == {"conv a": "ghost", "conv b": "loop"}
    (tmp_path / "strategies.json").write_text('{"conv a": "gh')
    assert load_choices(tmp_path) == {}


@pytest.mark.parametrize("room", [0.0, 5_000.0, math.inf])
@pytest.mark.parametrize("kept", [1, 10**4, 10**9])
@pytest.mark.parametrize("max_scans", [1, 4, 100])
def test_a_batch_is_split_between_patients_only(kept: int, max_scans: int, room: float) -> None:
    model = vae((8, 12))
    batch, latent = cohort((8, 12), [1, 7, 2, 3, 1])
    whole, _ = BookkeepingSampler(copy.deepcopy(model), max_grad_norm=0.1, limits=Limits(100)).clipped_sum(
        batch, latent
    )
    sampler = BookkeepingSampler(model, max_grad_norm=0.1, limits=Limits(max_scans, kept, room))
    sums, stats = sampler.clipped_sum(batch, latent)
    assert len(stats.reveal().norms) == 5
    assert float((flat(sums) - flat(whole)).norm() / flat(whole).norm()) < 1e-4


def test_the_fastest_is_chosen() -> None:
    small, large = torch.randn(10, 10), torch.randn(600, 600)
    assert fastest({"slow": lambda: large @ large, "fast": lambda: small @ small}, torch.device("cpu")) == "fast"


def test_autocast_keeps_sums_in_float32_and_within_the_bound() -> None:
    torch.manual_seed(0)
    model, x = Net(), images(6)
    exact, norms = clipped_sum(model, (x,), (1, 3, 2), 1e6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums, found = clipped_sum(model, (x,), (1, 3, 2), 1e6)
        one, _ = clipped_sum(model, (x,), (6,), 0.1 * (1 - 1e-5))
    assert all(s.dtype == torch.float32 for s in sums)
    assert torch.allclose(found, norms, rtol=0.03)
    assert float((flat(sums) - flat(exact)).norm() / flat(exact).norm()) < 0.03
    assert float(flat(one).norm()) <= 0.1
