"""How fine the releases of the closed form are, and their names: public numbers."""

from __future__ import annotations

from dataclasses import dataclass

from medvae.nets.mixture import MixtureShapes
from medvae.train.mixture import release_names

RELEASES = ("norms", "centre", "residual_norms", "means", "second")
CLIP_RELEASES = ("norms", "residual_norms")
ALONE = ("norms", "means")


@dataclass(frozen=True)
class MomentShapes:
    """How fine each release is, in cosines an axis: public numbers, chosen by the rule.

    basis: of the mean; coarse: of the centre and of second moments; latent_dim: directions kept at most;
    spectrum_weight: share of the last release's sensitivity that spectra get, against directions (squares add to 1);
    public_clips: clips are public constants, and the two histograms are left out. mean_alone: only the overall mean
    is released, and a histogram of norms before it. warped_pairs: of copies that a scan's second moments average over.
    two_valued: whether images are shapes, where that is public; functions: that second moments of shapes are of, in
    place of the lowest cosines.
    """

    basis: tuple[int, ...]
    coarse: tuple[int, ...]
    latent_dim: int
    spectrum_weight: float
    mixture: MixtureShapes | None = None
    lloyd_steps: int = 0
    public_clips: bool = False
    mean_alone: bool = False
    warped_pairs: int = 0
    two_valued: bool | None = None
    functions: int = 64

    @property
    def releases(self) -> tuple[str, ...]:
        """The names of all releases of the stage, in order."""
        stages = ALONE if self.mean_alone else RELEASES
        first = tuple(name for name in stages if not (self.public_clips and name in CLIP_RELEASES))
        if self.mixture is None:
            return first
        return (*first, *release_names(self.mixture.components, self.lloyd_steps))
