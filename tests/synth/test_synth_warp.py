"""Random deformations: small, smooth, joint over channels, and none at size 0."""

from __future__ import annotations

import pytest
import torch

from medvae.synth.warp import move, paired_warps, warp


def ball(dims: int, size: int = 24) -> torch.Tensor:
    axes = torch.meshgrid(*[torch.arange(size) - (size - 1) / 2] * dims, indexing="ij")
    radius = torch.stack(axes).square().sum(0).sqrt()
    return (radius < size / 4).float()[None, None]


@pytest.mark.parametrize("dims", [2, 3])
def test_size_zero_changes_nothing_and_more_moves_more(dims):
    x = ball(dims).expand(20, 2, *[24] * dims)
    assert warp(x, 0.0, torch.Generator()) is x
    change = [float((warp(x, s, torch.Generator().manual_seed(1)) - x).abs().mean()) for s in (0.01, 0.5, 1.0, 3.0)]
    assert change == sorted(change)
    assert change[0] < 0.003
    # The ball keeps its mass within a few percent on average: it is moved and bent, and not blown up.
    mass = warp(x, 1.0, torch.Generator().manual_seed(2))[:, 0].flatten(1).sum(1) / x[0, 0].sum()
    assert float(mass.mean()) == pytest.approx(1.0, abs=0.06)
    assert 0.005 < float(mass.std()) < 0.2


def test_channels_move_together_and_scans_apart():
    x = ball(2).expand(4, 2, 24, 24)
    out = warp(x, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(out[:, 0], out[:, 1])
    assert float((out[0] - out[1]).abs().max()) > 0.1


def test_values_stay_in_range_and_the_border_repeats():
    out = warp(torch.ones(8, 1, 16, 16), 3.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("shape", [(16, 20), (8, 12, 10)])
def test_paired_warps_are_constants_and_move_nothing_on_average(shape):
    grids = paired_warps(shape, 3, 1.0)
    assert grids.shape == (6, *shape, len(shape))
    torch.testing.assert_close(grids, paired_warps(shape, 3, 1.0))
    place = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, n) for n in shape], indexing="ij"))
    moved = torch.stack([move(place[None], grid[None])[0] for grid in grids])
    assert float((moved[0] - place).abs().max()) > 0.01
    inner = (slice(None), *[slice(2, -2)] * len(shape))
    torch.testing.assert_close(moved.mean(0)[inner], place[inner], atol=1e-5, rtol=0)
