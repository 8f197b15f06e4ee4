"""Self-attention over the voxels of a feature map (Vaswani et al. 2017), as a residual that starts at zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class SpatialAttention(nn.Module):
    """h + project(attention(norm(h))): every voxel of the map looks at every other of the same scan.

    Its parameters sit in two linear layers and one GroupNorm, whose gradients by patient the engine knows. Memory
    grows with the square of the voxels, so it belongs at the coarsest level.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(channels, groups), channels)
        self.queries_keys_values = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, h: Tensor) -> Tensor:
        """Return features of the shape of h (B, channels, *spatial)."""
        tokens = self.norm(h).flatten(2).transpose(1, 2)
        q, k, v = self.queries_keys_values(tokens).unsqueeze(1).chunk(3, dim=3)  # (B, 1 head, voxels, channels)
        looked = self.project(functional.scaled_dot_product_attention(q, k, v)[:, 0])
        return h + torch.as_tensor(looked).transpose(1, 2).reshape(h.shape)
