"""The released generator as MONAI Bundles call it: a network by `_target_`, and one call that writes volumes.

Nothing is unpickled: the weights are safetensors, checked against the digest in their card.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from medvae.errors import ConfigError, InputError
from medvae.nets.build import load_release
from medvae.synth.sample import generate, spread_conditions
from medvae.synth.store import read_release
from medvae.types import decode_conditions


class Generator(nn.Module):
    """Draws one image, with its mask where the model makes masks, a row of encoded conditions."""

    def __init__(self, folder: str) -> None:
        """Load the model in `folder`: weights.safetensors and model.json. Raises RunError where they do not fit."""
        super().__init__()
        self.release = read_release(Path(folder))
        self.model = load_release(self.release)

    def forward(self, condition: Tensor, seed: int | None = None) -> Tensor:
        """Return (B, 1 or 2, *spatial) float32 for `condition` (B, K): images in [0, 1], then labels of masks.

        K columns as `encode_conditions` gives them: one a class, one a covariate scaled to [0, 1]; of a class the
        largest column counts. seed: the same one gives the same images; without it, they are fresh.
        """
        space = self.release.space
        if condition.ndim != 2 or condition.shape[1] != space.condition_width:
            raise InputError(f"conditions are (B, {space.condition_width}) here, not {tuple(condition.shape)}")
        rows = [decode_conditions(space.conditions, row) for row in condition.detach().cpu().numpy()]
        cohort = generate(self.release, rows, torch.seed() % 2**32 if seed is None else seed)
        channels = [torch.from_numpy(cohort.images)]
        if cohort.masks is not None:
            channels.append(torch.from_numpy(cohort.masks).float())
        return torch.stack(channels, dim=1).to(condition.device)


def write_volumes(
    network: Generator, folder: str, count: int = 8, seed: int = 0, formats: Sequence[str] = ("nifti",)
) -> list[str]:
    """Generate `count` scans with evenly spread conditions and write them as a release would; return the paths.

    formats: of "nifti", "dicom", "png", "npz". Raises ConfigError for another, RunError where `folder` holds them.
    """
    from medvae.synth.write_dicom import write_dicom
    from medvae.synth.write_nifti import write_nifti
    from medvae.synth.write_npz import write_npz
    from medvae.synth.write_png import write_png

    writers = {"nifti": write_nifti, "dicom": write_dicom, "png": write_png, "npz": write_npz}
    unknown = [name for name in formats if name not in writers]
    if unknown or count < 1:
        raise ConfigError(f"a bundle writes 1 or more scans as {', '.join(writers)}: check count and formats")
    rows = spread_conditions(network.release.space, count, seed)
    cohort = generate(network.release, rows, seed)
    Path(folder).mkdir(parents=True, exist_ok=True)
    return [path for name in formats for path in writers[name](cohort, Path(folder))]
