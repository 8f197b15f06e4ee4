"""Ramps of shapes: exact distances, what they sharpen back to, and their use in the linear part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from medvae.nets.linear import LinearPart
from medvae.nets.shape import LEVEL, grey_shares, ramp, reach_of, sharpened
from medvae.types import ImageSpace, Intensity


def blobs(shape: tuple[int, ...], count: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth random shapes (count, *shape) of zeros and ones."""
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.standard_normal(shape), 2) for _ in range(count)]
    return np.stack([f > f.std() for f in fields]).astype(np.float32)


@pytest.mark.parametrize("shape", [(48, 40), (32, 24, 40), (10, 12)])
def test_a_ramp_is_the_signed_distance_cut_at_its_reach(shape):
    images, reach = blobs(shape), reach_of(shape)
    found = ramp(torch.from_numpy(images), len(shape)).numpy()
    for x, r in zip(images > 0.5, found, strict=True):
        inside, outside = ndimage.distance_transform_edt(x), ndimage.distance_transform_edt(~x)
        expected = np.clip(LEVEL + (inside - outside) / (2 * reach), 0, 1)
        np.testing.assert_allclose(r, expected, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_image_without_a_border_is_far_from_it(value):
    found = ramp(torch.full((1, 32, 32), value), 2)
    torch.testing.assert_close(found, torch.full((1, 32, 32), value))


def test_sharpened_ramps_are_the_images_again():
    images = torch.from_numpy(blobs((32, 24, 40)))
    torch.testing.assert_close(sharpened(ramp(images, 3), 3), images)


@pytest.mark.parametrize("shape", [(48, 40), (16, 20, 24)])
def test_grey_off_the_border_tells_images_from_shapes_and_at_it_how_soft_they_are(shape):
    place = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    inside = [radius - np.linalg.norm(place - np.asarray(shape) / 2 + 0.3, axis=-1) for radius in (4.2, 5.0, 6.7)]
    for width, low, high in ((0.0, 0.0, 0.0), (1.0, 0.35, 0.6), (1.5, 0.55, 0.85)):
        soft = np.clip(0.5 + np.stack(inside) / max(width, 1e-9), 0, 1).astype(np.float32)
        off, at = grey_shares(torch.from_numpy(soft)).mean(0).tolist()
        assert off < 0.01
        assert low <= at <= high
    fields = np.stack([ndimage.gaussian_filter(np.random.default_rng(s).standard_normal(shape), 2) for s in range(3)])
    grey = torch.from_numpy((0.5 + 0.1 * fields / fields.std()).clip(0, 1).astype(np.float32))
    assert float(grey_shares(grey)[:, 0].min()) > 0.3
    assert bool((grey_shares(torch.zeros(1, *shape)) == 0).all())


def test_borders_are_as_wide_as_asked():
    ramps = torch.linspace(0, 1, 41)[None].expand(33, 41)  # rises by 1 over 40 voxels, and by 1 / 4 a voxel as a ramp
    for width in (0.0, 1.0, 4.0):
        made = sharpened(ramps, 2, width=width)
        between = ((made > 0) & (made < 1)).float().sum(1).max()
        assert abs(float(between) - 10 * width) <= 1


def test_an_attack_finds_a_gradient_through_a_ramp():
    images = torch.from_numpy(blobs((24, 24))).requires_grad_()
    ramp(images, 2).square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0


def test_ramps_under_vmap_are_those_of_single_images():
    images = torch.from_numpy(blobs((24, 20)))
    torch.testing.assert_close(torch.vmap(lambda x: ramp(x, 2))(images), ramp(images, 2))


def test_a_linear_part_of_shapes_encodes_ramps_and_no_other():
    space = ImageSpace((24, 20), (1.0, 1.0), "OT", Intensity("window", 0, 255), (), ())
    part, images = LinearPart(space, (6, 5), 2), torch.from_numpy(blobs((24, 20)))[:, None]
    assert part.levels(images) is images
    part.two_valued.fill_(True)
    torch.testing.assert_close(part.levels(images), ramp(images, 2))
    part.directions.normal_(generator=torch.Generator().manual_seed(0))
    none = torch.zeros(3, 0)
    expected = part.codes(part.reduce(ramp(images, 2)) - part.mean_coefficients(none))
    assert torch.equal(part.encode(images, none), expected)
