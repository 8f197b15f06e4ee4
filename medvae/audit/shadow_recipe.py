"""How one shadow is trained: the recipe of the audited run, on other patients, in memory.

The closed form runs through the very code of the product (train/moments.py), on scans that are cosine coefficients
already: the transform is done once and not once a shadow. DP-SGD runs stacked (stacked.py), with the recipe's draws,
clip and noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from medvae.audit.linear_scores import cosines
from medvae.audit.material import Scans
from medvae.audit.shadows import Bools
from medvae.config import Recipe
from medvae.nets.linear import LinearPart
from medvae.train.planning import moment_shapes
from medvae.types import Batch, FloatArray, ImageSpace

Ints = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]

LINEAR = "linear."
SCORE = "score/"


class CoefficientPart(LinearPart):
    """A linear part whose images are coefficients already: (B, C, *spatial) of the full cosine transform."""

    def pixels(self, x: Tensor) -> Tensor:
        """Return images (B, C, *spatial); the basis has to be the full one."""
        return self._apply_axes(x, transpose=False)

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Return all coefficients (B, C, *spatial) of images; the basis has to be the full one."""
        return self._apply_axes(pixels, transpose=True)

    def reduce(self, x: Tensor) -> Tensor:
        """Return the lowest coefficients (B, C, *k)."""
        return x[(slice(None), slice(None), *(slice(k) for k in self.mean_map.shape[2:]))]

    def expand(self, coefficients: Tensor) -> Tensor:
        """Return all coefficients (B, C, *spatial), the others zero."""
        out = coefficients.new_zeros(*coefficients.shape[:2], *self.space.spatial_shape)
        out[(slice(None), slice(None), *(slice(k) for k in coefficients.shape[2:]))] = coefficients
        return out


@dataclass(frozen=True)
class InMemory:
    """A cohort in memory, in the form that training asks for. patient: (N,) in 0 .. P - 1."""

    x: FloatArray
    condition: FloatArray
    patient: Ints
    space: ImageSpace

    def rows(self, patients: Ints) -> Ints:
        """Return the rows of these patients' scans, patient after patient."""
        return np.concatenate([np.flatnonzero(self.patient == p) for p in patients])

    def load(self, rows: Ints) -> Batch:
        """Return the scans of these rows."""
        return Batch(self.x[rows], self.condition[rows], self.patient[rows])


@dataclass(frozen=True)
class ClosedForm:
    """Trains closed-form shadows. full: all cosine coefficients of the pool's scans, see `InMemory`."""

    full: InMemory
    recipe: Recipe
    noise_multipliers: Mapping[str, float]
    seed: int

    def __call__(self, numbers: Sequence[int], included: Bools) -> list[Arrays]:
        """Fit one linear part a shadow; the arrays carry the names they have in a released model."""
        return [self.fit(number, np.flatnonzero(row)) for number, row in zip(numbers, included, strict=True)]

    def fit(self, number: int, patients: Ints) -> Arrays:
        """Fit the shadow of this number on these patients."""
        from medvae.dp.noise import seeded_noise
        from medvae.train.moments import fit_moments

        part = fit_moments(
            self.full,
            patients.astype(np.int64),
            self.noise_multipliers,
            moment_shapes(self.recipe),
            noise=seeded_noise(self.seed * 1_000_003 + number),
            part=CoefficientPart,
        )
        return {LINEAR + name: tensor.numpy() for name, tensor in part.state_dict().items()}


def closed_form(
    pool: Scans, recipe: Recipe, noise_multipliers: Mapping[str, float], seed: int, full: FloatArray | None = None
) -> ClosedForm:
    """Prepare closed-form shadows on a pool of scans; `full` holds its coefficients where they are known already."""
    index = np.searchsorted(pool.patients, pool.patient).astype(np.int64)
    transformed = cosines(pool.x) if full is None else full
    return ClosedForm(InMemory(transformed, pool.condition, index, pool.space), recipe, noise_multipliers, seed)


@dataclass(frozen=True)
class Deep:
    """Trains whole shadows: the closed form, where the recipe has it, then DP-SGD, a stack at a time.

    judged: scans that every shadow scores (by `whitebox.scan_scores`) before its weights are set aside.
    """

    scans: InMemory
    closed: ClosedForm | None
    recipe: Recipe
    noise_multiplier: float
    private: bool
    judged: Scans
    draws: int
    seed: int
    steps: int | None = None

    def __call__(self, numbers: Sequence[int], included: Bools) -> list[Arrays]:
        """Train the group and score; returns "score/..." (N,) and the model's own arrays."""
        import torch

        from medvae.audit.whitebox import scan_scores
        from medvae.nets.build import state_arrays

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        models = [self._start(n, np.flatnonzero(row)).to(device) for n, row in zip(numbers, included, strict=True)]
        shapes = np.asarray([m.linear is not None and bool(m.linear.two_valued) for m in models])
        for mine in (np.flatnonzero(shapes), np.flatnonzero(~shapes)):  # a stack's models compute the same
            if len(mine):
                self._descend([models[i] for i in mine], [numbers[i] for i in mine.tolist()], included[mine], device)
        found = []
        for model in models:
            ready = model.cpu().eval()
            scores = scan_scores(ready, self.judged, self.draws, self.seed)
            found.append({SCORE + name: values for name, values in scores.items()} | state_arrays(ready))
        return found

    def _start(self, number: int, patients: Ints) -> Any:
        import torch

        from medvae.nets.build import build_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + number)
            model = build_model(self.scans.space, self.recipe)
        if self.closed is not None and model.linear is not None:
            fitted = self.closed.fit(number, patients)
            model.linear.load_state_dict({k.removeprefix(LINEAR): torch.from_numpy(v) for k, v in fitted.items()})
        return model.train()

    def _descend(self, models: Sequence[Any], numbers: Sequence[int], included: Bools, device: Any) -> None:
        import torch

        from medvae.audit.stacked import Schedule, train_stacked
        from medvae.train.optimizer import rate_factor

        config = self.recipe.dpsgd
        if config.steps is None or config.sample_rate is None or config.learning_rate is None:
            raise ValueError("the recipe is not resolved")
        total, peak = config.steps, config.learning_rate
        schedule = Schedule(
            steps=self.steps or total,
            rate=lambda step: peak * rate_factor(step, total),
            divisor=config.sample_rate * float(included.sum(1).mean()),
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=config.max_grad_norm if self.private else None,
            average_decay=config.average_decay,
        )
        latent_dim = self.recipe.model.latent_dim or 1
        draw = PoissonDraws(
            self.scans, included, config.sample_rate, config.scans_per_patient, latent_dim, numbers, device
        )
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + numbers[0])
        train_stacked(models, draw, schedule, generator)


@dataclass(frozen=True)
class PoissonDraws:
    """Draws for each of K models its own Poisson sample of patients and of their scans, padded to one shape."""

    scans: InMemory
    included: Bools
    sample_rate: float
    scans_per_patient: int
    latent_dim: int
    numbers: Sequence[int]
    device: Any

    def __call__(self, step: int) -> Any:
        """Return the batches of one step."""
        import torch

        from medvae.audit.stacked import Batches

        drawn: list[list[Ints]] = []
        for number, row in zip(self.numbers, self.included, strict=True):
            rng = np.random.default_rng([number, step, 43])
            chosen = np.flatnonzero(row & (rng.random(len(row)) < self.sample_rate))
            drawn.append([self._scans_of(p, rng) for p in chosen])
        most = max(1, *(len(patients) for patients in drawn))
        deep = max([1, *(len(rows) for patients in drawn for rows in patients)])
        place = np.zeros((len(drawn), most, deep), dtype=np.int64)
        weight = np.zeros(place.shape, dtype=np.float32)
        for k, patients in enumerate(drawn):
            for p, rows in enumerate(patients):
                place[k, p, : len(rows)], weight[k, p, : len(rows)] = rows, 1 / len(rows)
        latent = np.random.default_rng([self.numbers[0], step, 44]).standard_normal((*place.shape, self.latent_dim))
        arrays = (self.scans.x[place], self.scans.condition[place], latent.astype(np.float32), weight)
        return Batches(*(torch.from_numpy(a).to(self.device) for a in arrays))

    def _scans_of(self, patient: np.int64, rng: np.random.Generator) -> Ints:
        rows = self.scans.rows(np.asarray([patient]))
        return rng.permutation(rows)[: self.scans_per_patient]
