"""Resizing in numpy beside MONAI's Resize, for any shapes and any order in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import Resize

from medvae.vault.resize import area, linear, nearest

SIZES = st.one_of(st.tuples(*[st.integers(1, 40)] * 2), st.tuples(*[st.integers(1, 20)] * 3))


@st.composite
def cases(draw: st.DrawFn, shrink: bool = False) -> tuple[np.ndarray, tuple[int, ...]]:
    """An array of noise, its axes in any order in memory, and a new shape."""
    old = draw(SIZES)
    new = tuple(draw(st.integers(1, n if shrink else 40)) for n in old)
    order = draw(st.permutations(range(len(old))))
    lying = np.random.default_rng(draw(st.integers(0, 99))).random([old[a] for a in order], dtype=np.float32)
    return lying.transpose(np.argsort(order)), new


def monai(array: np.ndarray, shape: tuple[int, ...], mode: str) -> np.ndarray:
    smooth = mode not in ("area", "nearest-exact")
    return np.asarray(Resize(shape, mode=mode, anti_aliasing=smooth)(np.ascontiguousarray(array)[None]))[0]


@settings(max_examples=100, deadline=None)
@given(cases(shrink=True))
def test_area_is_monais(case: tuple[np.ndarray, tuple[int, ...]]) -> None:
    np.testing.assert_allclose(area(*case), monai(*case, "area"), atol=2e-6)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_linear_is_monais(case: tuple[np.ndarray, tuple[int, ...]]) -> None:
    """To one level of the store: torch knows the places between voxels in single precision only."""
    made = linear(*case)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, monai(*case, "bilinear" if len(case[1]) == 2 else "trilinear"), atol=1 / 65535)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_nearest_is_torchs_but_for_ties(case: tuple[np.ndarray, tuple[int, ...]]) -> None:
    """Where a new centre lies on the border of two old voxels, rounding decides for torch and the upper one here."""
    array, shape = case
    ties = [np.any((2 * np.arange(n) + 1) * o % (2 * n) == 0) for o, n in zip(array.shape, shape, strict=True)]
    made = nearest(array, shape)
    assert made.shape == shape
    assert np.isin(made, array).all()
    if not any(ties):
        lying = torch.from_numpy(np.ascontiguousarray(array))[None, None]
        torchs = torch.nn.functional.interpolate(lying, size=list(shape), mode="nearest-exact")[0, 0].numpy()
        np.testing.assert_array_equal(made, torchs)


@pytest.mark.parametrize("shape", [(8, 8, 8), (12, 3, 9)])
def test_ingest_needs_no_torch(shape: tuple[int, ...]) -> None:
    """torch or MONAI would be imported by every process that decodes."""
    import subprocess
    import sys

    script = (
        "import sys, numpy as np, medvae.vault.ingest; from medvae.types import Intensity\n"
        "from medvae.vault.preprocess import Grid, prepare; from medvae.vault.scan import Volume\n"
        "rng = np.random.default_rng(0)\n"
        f"v = Volume(rng.random((9, 10, 11), dtype='f4'), np.eye(4), rng.integers(0, 3, (9, 10, 11)), np.eye(4))\n"
        f"prepare(v, Grid({shape}, None, Intensity('percentile', 1, 99)))\n"
        "sys.exit(bool({'torch', 'monai'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
