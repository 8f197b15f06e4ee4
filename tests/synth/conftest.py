"""Small made-up cohorts for the writers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from medvae.types import Condition, ImageSpace, Intensity, SyntheticCohort

PERCENTILE = Intensity("percentile", 0.5, 99.5)
CONDITIONS = (
    Condition("lesion", "class", ("absent", "present")),
    Condition("age", "continuous", range=(20.0, 90.0)),
    Condition("sex", "class", ("F", "M")),
)
CLAIM = {
    "epsilon": 8.0,
    "delta": 1e-5,
    "unit": "patient",
    "neighboring": "add-remove",
    "accountant": "pld",
}


@pytest.fixture
def make_cohort() -> Callable[..., SyntheticCohort]:
    """Return a maker of cohorts without any symmetry, in space or in intensity."""

    def make(
        shape: tuple[int, ...] = (8, 10, 6),
        modality: str = "MR",
        intensity: Intensity = PERCENTILE,
        count: int = 3,
        masks: bool = True,
    ) -> SyntheticCohort:
        rng = np.random.default_rng(0)
        images = rng.random((count, *shape), dtype=np.float32)
        labels = rng.integers(0, 3, (count, *shape)).astype(np.uint8)
        rows = tuple(
            {"lesion": ("absent", "present")[i % 2], "age": 30.4 + 10 * i, "sex": "FM"[i % 2]} for i in range(count)
        )
        spacing = (1.0, 1.5, 2.5)[: len(shape)]
        space = ImageSpace(shape, spacing, modality, intensity, CONDITIONS, (1, 2) if masks else ())
        return SyntheticCohort(images, labels if masks else None, rows, space)

    return make


@pytest.fixture
def claim() -> dict[str, object]:
    """Return the numbers that a certificate gives to the DICOM writer."""
    return dict(CLAIM)
