"""SRL-VAE (Lee et al. 2025, arXiv 2504.17219): a trained VAE is trained on, on inputs that an attacker has perturbed.

The attack makes the reconstruction of a scan as bad as a perturbation of bounded size can (projected gradient ascent,
Madry et al. 2018). The VAE then learns to reconstruct the clean scan from the perturbed one, while the codes of clean
scans are held near those of the VAE it was: the "originality" that keeps its fidelity.

Differs from the paper: no perceptual distance is added to the reconstruction's likelihood, and the KL term stays.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from medvae.nets.cvae import ConditionalVAE

# How far all steps of an attack together could go, in radii: enough to leave a corner and reach another.
REACH = 2.5


def attack(model: ConditionalVAE, x: Tensor, condition: Tensor, radius: float, steps: int) -> Tensor:
    """Return x (B, C, *spatial) with the image channel moved by at most `radius` a voxel, within [0, 1].

    Each of `steps` moves every voxel along the sign of the gradient of -log p(x | E(x')), the clean scan's likelihood
    under the moved scan's mean code. A scan's perturbation depends on no other scan. Masks stay as they are.
    """
    image, rest = x[:, :1], x[:, 1:]
    moved = image.clone()
    with torch.enable_grad():
        for _ in range(steps):
            moved.requires_grad_(True)
            code, _ = model.encode(torch.cat([moved, rest], dim=1), condition)
            (slope,) = torch.autograd.grad(model.reconstruction(x, code, condition).sum(), moved)
            further = moved.detach() + REACH * radius / steps * slope.sign()
            moved = further.clamp(min=image - radius, max=image + radius).clamp(0, 1)
    return torch.cat([moved.detach(), rest], dim=1)


class Smoothed(nn.Module):
    """A VAE in its second training, and the VAE it was before, which is frozen.

    A scan comes with its perturbed self: x holds C clean channels and C perturbed ones. Scans without are taken twice.
    """

    def __init__(self, model: ConditionalVAE, originality: float) -> None:
        """Take the model over. What the second training has no use for, critic and classifier, is frozen."""
        super().__init__()
        self.original = copy.deepcopy(model).requires_grad_(False)
        self.model = model
        self.originality = originality
        for part in (model.critic, model.labels):
            if part is not None:
                part.requires_grad_(False)

    def forward(self, x: Tensor, condition: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of each scan, (B,): x (B, C or 2C, *spatial), condition (B, K), noise (B, d).

        The negative ELBO of the clean scan under the perturbed scan's code, plus `originality` times the squared
        distance of the clean scan's mean code from what it was, a channel element.
        """
        channels = self.model.space.channels
        clean, perturbed = (x, x) if x.shape[1] == channels else (x[:, :channels], x[:, channels:])
        elbo = self.model.elbo_of(self.model.encode(perturbed, condition), clean, condition, noise)["loss"]
        now, _ = self.model.encode(clean, condition)
        before, _ = self.original.encode(clean, condition)
        return (elbo + self.originality * (now - before).square().sum(1)) / clean[0].numel()
