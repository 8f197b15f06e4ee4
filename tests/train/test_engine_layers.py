"""Every layer the engine knows, over a drawn grid, against one backward a patient in float64."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from engine_oracle import check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medvae.train.engine import book, convolution, segments

GRID = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=5).map(tuple)
BOUNDS = st.sampled_from([0.01, 1.0, 1e6])
STRATEGIES = st.sampled_from([None, "loop", "grouped4", "grouped8", "unfold", "ghost", "recompute", "products"])
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
# Limits by which layers as small as these count as large: rows are kept one by one, windows copied along channels and a
# few patients at a time, products taken a patient.
AS_LARGE: dict[Any, dict[str, Any]] = {
    book: {"SMALL": 0},
    convolution: {"SMALL": 0, "WIDE": 1, "WINDOW_BYTES": 2**15},
    segments: {"SHORT": 0},
}
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class Loss(nn.Module):
    """A layer between two others, and a loss a row that weighs every place differently."""

    def __init__(self, *layers: nn.Module, layout: str = "dense") -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(relaid(x, self.layout))
        weights = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view(x.shape[1:])
        return (x.sin() * (1 + weights)).flatten(1).sum(1)


def relaid(x: Tensor, layout: str) -> Tensor:
    """Return the same numbers in another memory layout."""
    if layout == "last" and x.dim() - 2 in LAST:
        return x.contiguous(memory_format=LAST[x.dim() - 2])
    if layout == "strided" and x.dim() > 2:
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    return x


@st.composite
def convolutions(draw: Any) -> tuple[nn.Module, tuple[int, ...]]:
    """Draw a convolution and the shape of one input."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2]))
    inside, outside = (groups * draw(st.integers(1, 3)) for _ in range(2))
    options = {
        "kernel_size": draw(st.integers(1, 3)),
        "stride": draw(st.integers(1, 2)),
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    shape = tuple(draw(st.integers(5, 7)) for _ in range(dims))
    if draw(st.booleans()):
        more = draw(st.integers(0, 1)) if max(options["stride"], options["dilation"]) > 1 else 0
        layer = TRANSPOSED[dims](inside, outside, padding=draw(st.integers(0, 1)), output_padding=more, **options)
        return layer, (inside, *shape)
    padding: Any = draw(st.sampled_from([0, 1, 2, "same", "valid"]))
    if padding == "same":
        options["stride"] = 1
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    return CONVOLUTIONS[dims](inside, outside, padding=padding, padding_mode=mode, **options), (inside, *shape)


@GRID
@given(
    drawn=convolutions(),
    counts=LENGTHS,
    bound=BOUNDS,
    strategy=STRATEGIES,
    layout=st.sampled_from(["dense", "last", "strided"]),
    large=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolutions(
    drawn: tuple[nn.Module, tuple[int, ...]],
    counts: tuple[int, ...],
    bound: float,
    strategy: str | None,
    layout: str,
    large: bool,
    seed: int,
) -> None:
    """`large`: the ways that are meant for large layers, on small ones."""
    torch.manual_seed(seed)
    layer, shape = drawn
    before = CONVOLUTIONS[len(shape) - 1](shape[0], shape[0], 1)  # so that the input needs a gradient as well
    with ExitStack() as patched:
        for module, values in AS_LARGE.items() if large else ():
            patched.enter_context(patch.multiple(module, **values))
        check(Loss(before, layer, layout=layout), (torch.randn(sum(counts), *shape),), counts, bound, strategy)


@GRID
@given(
    counts=LENGTHS,
    bound=BOUNDS,
    strategy=STRATEGIES,
    middle=st.lists(st.integers(1, 5), max_size=2).map(tuple),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linear_on_any_rank(
    counts: tuple[int, ...], bound: float, strategy: str | None, middle: tuple[int, ...], bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Loss(nn.Linear(4, 6, bias=bias), nn.LayerNorm(6, bias=bias), nn.Linear(6, 3))
    check(model, (torch.randn(sum(counts), *middle, 4),), counts, bound, strategy)


@GRID
@given(
    counts=LENGTHS,
    bound=BOUNDS,
    shape=st.lists(st.integers(1, 4), max_size=3).map(tuple),
    layout=st.sampled_from(["dense", "last", "strided"]),
    seed=st.integers(0, 99),
)
def test_group_norm(counts: tuple[int, ...], bound: float, shape: tuple[int, ...], layout: str, seed: int) -> None:
    torch.manual_seed(seed)
    first, second = nn.GroupNorm(2, 4), nn.GroupNorm(1, 4)
    for parameter in [*first.parameters(), *second.parameters()]:
        nn.init.normal_(parameter)
    check(Loss(first, second, layout=layout), (torch.randn(sum(counts), 4, *shape, 2),), counts, bound)


@pytest.mark.parametrize("normalised", [(3,), (2, 3)])
def test_layer_norm_over_several_axes(normalised: tuple[int, ...]) -> None:
    norm = nn.LayerNorm(normalised)
    nn.init.normal_(norm.weight)
    check(Loss(nn.Linear(3, 3), norm), (torch.randn(6, 4, 2, 3),), (1, 3, 2), 0.1)


@pytest.mark.parametrize("padding", [None, 1])
def test_embedding(padding: int | None) -> None:
    model = Loss(nn.Embedding(5, 3, padding_idx=padding), nn.Linear(3, 2))
    check(model, (torch.randint(0, 5, (6, 4)),), (1, 3, 2), 0.1)


class Tied(nn.Module):
    """One convolution called twice, two linear layers and an embedding with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.embed = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6)
        self.again = nn.Linear(4, 6, bias=False)
        self.out.weight = self.again.weight = self.embed.weight

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        h = self.conv(self.conv(x).tanh()).flatten(1)[:, :4]
        return (self.out(h + self.embed(index)).sin() + self.again(h)).square().sum(1)


@pytest.mark.parametrize("strategy", [None, "loop", "grouped4", "unfold", "ghost", "recompute"])
@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (2, 2), (1, 7, 3), (4,)])
def test_parameters_used_more_than_once_are_added_before_the_norm(
    counts: tuple[int, ...], strategy: str | None
) -> None:
    torch.manual_seed(0)
    scans = sum(counts)
    check(Tied(), (torch.randn(scans, 2, 4, 4), torch.randint(0, 6, (scans,))), counts, 0.3, strategy)


def test_parameters_that_are_frozen_or_unused_take_no_part() -> None:
    torch.manual_seed(0)
    model = Loss(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Conv2d(3, 2, 1))
    model.layers[0].weight.requires_grad_(False)
    model.layers[1].bias.requires_grad_(False)
    model.layers[2].requires_grad_(False)
    model.add_module("unused", nn.Linear(2, 2))
    check(model, (torch.randn(4, 1, 5, 5),), (1, 3), 0.1)


def test_output_size_of_a_transposed_convolution() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(1, 2, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[8, 7]).sin().flatten(1).sum(1)

    check(Up(), (torch.randn(3, 1, 4, 4),), (1, 2), 0.1)
