"""A mixture of low-rank Gaussians for each class, over the lowest cosines of what the conditional mean leaves over.

r | c ~ sum_j w_cj N(mu_cj, F_cj' F_cj): mixtures of probabilistic PCAs (Tipping & Bishop 1999b), one a cell. It stands
where a linear VAE has one Gaussian for everybody. A cell is one combination of the class conditions.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from medvae.types import Condition, ImageSpace

# Directions kept of one component, at most: those below the noise are dropped long before.
RANK = 64


@dataclass(frozen=True)
class MixtureShapes:
    """How many components a cell has, and how many cosines an axis they cover: public numbers, chosen by the rule."""

    components: int
    box: tuple[int, ...]


def cell_count(conditions: tuple[Condition, ...]) -> int:
    """Return the number of combinations of the class conditions; 1 where there is none."""
    return prod(c.width for c in conditions if c.kind == "class")


def cell_of(condition: Tensor, conditions: tuple[Condition, ...]) -> Tensor:
    """Return the cell (B,) of encoded conditions (B, K)."""
    cell = torch.zeros(len(condition), dtype=torch.int64)
    start = 0
    for c in conditions:
        if c.kind == "class":
            cell = cell * c.width + condition[:, start : start + c.width].argmax(1)
        start += c.width
    return cell


class MixturePart(nn.Module):
    """Holds the mixture as buffers: weights (cells, J), means (cells, J, D), factors (cells, J, rank, D).

    D = C * prod(box) cosine coefficients, image and masks together.
    """

    weights: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, space: ImageSpace, shapes: MixtureShapes) -> None:
        super().__init__()
        self.space, self.shapes = space, shapes
        cells, size = cell_count(space.conditions), space.channels * prod(shapes.box)
        self.register_buffer("weights", torch.zeros(cells, shapes.components))
        self.register_buffer("means", torch.zeros(cells, shapes.components, size))
        self.register_buffer("factors", torch.zeros(cells, shapes.components, min(size, RANK), size))

    def draw(self, condition: Tensor, generator: torch.Generator) -> Tensor:
        """Return one draw of r for each row of conditions (B, K): coefficients (B, C, *box)."""
        cell = cell_of(condition, self.space.conditions)
        component = torch.multinomial(self.weights[cell] + 1e-12, 1, generator=generator)[:, 0]
        noise = torch.randn(len(cell), self.factors.shape[2], generator=generator)
        # A component at a time: its factor is then read once, not once a row.
        out = self.means[cell, component]
        for g, j in torch.unique(torch.stack([cell, component]), dim=1).T.tolist():
            rows = (cell == g) & (component == j)
            out[rows] += noise[rows] @ self.factors[g, j]
        return out.view(len(cell), self.space.channels, *self.shapes.box)

    def patterns(self) -> Tensor:
        """Return patterns (n, C, *box) whose products sum to the second moment of r, over all cells in equal shares."""
        w = self.weights / self.weights.sum(1, keepdim=True).clamp(min=1e-12) / len(self.weights)
        parts = torch.cat([self.means.unsqueeze(2), self.factors], dim=2) * w.sqrt()[:, :, None, None]
        return parts.view(-1, self.space.channels, *self.shapes.box)
