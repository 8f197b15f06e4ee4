"""Where a run's noise, its draws of patients and its latent samples come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from medvae.dp.noise import NoiseSource, os_noise, seeded_noise


@dataclass(frozen=True)
class Randomness:
    """One root of randomness a process; each stage and step draws from a fork of its own.

    With a root from the operating system the key lives in memory only and is never stored: a resumed run has a new
    one. Steps that were lost after the last checkpoint are then drawn anew, and as nothing of the lost ones was
    released, they cost nothing. With a seeded root, for tests, a step's draws are a function of (seed, stage, step),
    so a run that was killed and resumed ends in the same bits as one that was not.
    """

    root: NoiseSource = field(repr=False)

    @property
    def name(self) -> str:
        """What privacy.json says as `noise_source`."""
        return self.root.name

    @property
    def releasable(self) -> bool:
        """Whether a run with this randomness may be released."""
        return self.root.releasable

    def source(self, stage: str, step: int = 0) -> NoiseSource:
        """Return the stream of noise and draws of one step. Ask once a step: the same labels give the same stream."""
        return self.root.fork(f"{stage}/{step}")

    def latent(self, stage: str, step: int = 0) -> torch.Generator:
        """Return the generator of one step's latent samples: private state, but no part of the privacy argument."""
        seed = self.root.fork(f"{stage}/{step}/latent").integers(1, 2**62)[0]
        return torch.Generator().manual_seed(int(seed))


def make_randomness(kind: Literal["os_entropy", "seeded"], seed: int) -> Randomness:
    """Return fresh entropy of the operating system, or a repeatable stream for tests (never releasable)."""
    return Randomness(os_noise() if kind == "os_entropy" else seeded_noise(seed))
