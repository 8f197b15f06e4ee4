"""How smoothly decoded images change along a path between two codes: perceptual path length (Karras et al. 2019), in
the shipped embedding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from measures.cells import Case, Measure, Work
from measures.data import Images, cohort, mnist_part, split
from measures.reconstruction import PIXELS, recipe
from measures.training import fit, network
from medvae.audit.embedding import embed
from medvae.nets.cvae import ConditionalVAE
from medvae.synth.walk import arc

Floats = npt.NDArray[np.float64]
CODES, PATHS, STEPS, NEAR, TRAIN = 16, 100, 16, 0.01, 5000
Decode = Callable[[Tensor], Images]


def run(case: Case, seed: int, work: Work) -> dict[str, float]:
    """Return three lengths of paths between made-up images; the embedding is standardised, so they have no unit."""
    arrays = mnist_part(work.data, work.out, seed, TRAIN, 2000)
    images = {key: value for key, value in arrays.items() if key.endswith("images")}
    folder, store = cohort(work.out / "cohorts" / f"MNIST-unlabelled-{seed}", images)
    generator = torch.Generator().manual_seed(seed)
    if case["codes of"] == "pixels":
        held = split(store, "holdout").x[: 2 * PATHS, 0]
        return lengths(*(torch.from_numpy(held[i::2].reshape(PATHS, -1)) for i in (0, 1)), _pixels(held.shape[1:]))
    if case["codes of"] == "PCA":
        decode = _pca(split(store, "train").x[:, 0], seed)
    else:
        closed_form = {"model": {"latent_dim": CODES}, "moments": PIXELS}
        pipelines = {"closed form": closed_form, "VAE": recipe("MNIST", CODES)}
        pipeline = pipelines.get(case["codes of"]) or network(case["epsilon"], {}, TRAIN)
        decode = _prior(fit(folder, pipeline, case["epsilon"], seed).model)
    return lengths(*torch.randn(2, PATHS, CODES, generator=generator), decode)


def lengths(start: Tensor, end: Tensor, decode: Decode) -> dict[str, float]:
    """Return path lengths from `start` to `end` (paths, d) as `decode` shows them.

    PPL: mean squared distance of two images NEAR apart on a path, over NEAR squared. across: squared distance of
    its ends. detour: length of a path in STEPS over the distance of its ends; 1 is the straight way.
    """
    between = arc if start.shape[1] == CODES else torch.lerp
    at = np.linspace(0, 1, STEPS + 1)
    path = np.stack([_seen(start, end, float(t), between, decode) for t in at])
    hops = np.linalg.norm(np.diff(path, axis=0), axis=-1)
    across = np.linalg.norm(path[-1] - path[0], axis=-1)
    apart = [_seen(start, end, 0.5 + side * NEAR / 2, between, decode) for side in (-1, 1)]
    near = np.square(apart[1] - apart[0]).sum(-1) / NEAR**2
    return {
        "PPL": float(near.mean()),
        "across": float(np.square(across).mean()),
        "detour": float((hops.sum(0) / across).mean()),
        "longest hop": float((hops.max(0) / hops.mean(0)).mean()),
    }


def _seen(start: Tensor, end: Tensor, t: float, between: Callable[..., Tensor], decode: Decode) -> Floats:
    return embed(decode(torch.stack([between(a, b, t) for a, b in zip(start, end, strict=True)])))


def _prior(model: ConditionalVAE) -> Decode:
    def decode(noise: Tensor) -> Images:
        condition = torch.zeros(len(noise), 0)
        with torch.inference_mode():
            return np.asarray(model.decode(model.prior_sample(condition, noise), condition)[:, 0].numpy())

    return decode


def _pca(train: Images, seed: int) -> Decode:
    pca = PCA(CODES, whiten=True, random_state=seed).fit(train.reshape(len(train), -1))
    return lambda noise: (
        pca.inverse_transform(noise.numpy()).clip(0, 1).reshape(-1, *train.shape[1:]).astype(np.float32)
    )


def _pixels(shape: tuple[int, ...]) -> Decode:
    return lambda flat: flat.numpy().reshape(-1, *shape)


SMOOTHNESS = Measure(
    "smoothness",
    "Smoothness of interpolation",
    f"MNIST, {TRAIN:,} digits, {CODES} codes; {PATHS} paths on great arcs between draws of the prior, seen by the "
    f"shipped embedding. PPL: mean squared distance of two images {NEAR:g} apart around the middle of a path, over "
    f"{NEAR:g} squared; across: squared distance of its ends; detour: length in {STEPS} hops over distance of ends, 1 "
    "being straight; longest hop: over the mean hop, 1 being even. PCA: whitened codes; pixels: held-out digits faded "
    "into each other; VAE: the closed form and a network on top; network: without the closed form.",
    tuple(
        {"codes of": name, "epsilon": epsilon}
        for name, epsilon in (
            ("pixels", "none"),
            ("PCA", "none"),
            ("closed form", "none"),
            ("closed form", "8"),
            ("VAE", "none"),
            ("network", "none"),
            ("network", "8"),
        )
    ),
    run,
    digits=2,
)  # fmt: skip
