"""Reconstruction error on held-out scans against PCA and ICA at equal numbers of codes."""

from __future__ import annotations

from typing import Any

import numpy as np

from measures.cells import Case, Measure, Work
from measures.data import Images, cohort, hippocampus, mnist_part, pneumonia, split
from measures.training import fit, rebuilt
from medvae.vault.store import CohortStore

CODES = (8, 16, 32, 64)
SETS = ("MNIST", "PneumoniaMNIST", "hippocampus")
COARSE = {"MNIST": (12, 12), "PneumoniaMNIST": (16, 16)}
# Chest X-rays are smooth: what is left over is finer than of digits.
SCALE = {"MNIST": 0.1, "PneumoniaMNIST": 0.03}
STEPS = {"MNIST": 250, "PneumoniaMNIST": 500}
# Squared error of pixels is compared: digits are images here, and no shapes whose border is drawn sharply.
PIXELS = {"two_valued": False}
DEEP = {"channels": (16, 32), "residual_units": 0, "beta": 0.3}


def run(case: Case, seed: int, work: Work) -> dict[str, float]:
    """Return mean squared errors on held-out scans."""
    folder, store = scans(case["data"], seed, work)
    train, test = split(store, "train"), split(store, "holdout")
    codes = int(case["codes"])
    if case["epsilon"] == "none":
        model = fit(folder, recipe(case["data"], codes), "none", seed).model
    else:
        model = fit(folder, {"model": {"latent_dim": codes}, "moments": PIXELS}, case["epsilon"], seed).model
    vae = float(np.square(rebuilt(model, test) - test.x[:, 0]).mean())
    figures = {"VAE": 1000 * vae}
    for name, error in classical(train.x[:, 0], test.x[:, 0], codes, seed).items():
        figures[name] = 1000 * error
    return figures | {"VAE over PCA": figures["VAE"] / figures["PCA"]}


def scans(name: str, seed: int, work: Work) -> tuple[Any, CohortStore]:
    """Return the cohort of a data set, without labels: PCA has none either."""
    if name == "hippocampus":
        return hippocampus(work.data, work.out, seed)
    arrays = mnist_part(work.data, work.out, seed, 5000, 2000) if name == "MNIST" else pneumonia(work.data)
    images = {key: value for key, value in arrays.items() if key.endswith("images")}
    return cohort(work.out / "cohorts" / f"{name}-unlabelled-{seed if name == 'MNIST' else 0}", images)


def recipe(name: str, codes: int) -> dict[str, Any]:
    """Return the pipeline without privacy: the closed form, then a network on top of it."""
    if name == "hippocampus":  # a network overfits a hundred persons
        moments = {"basis_shape": (16, 24, 16), "coarse_shape": (11, 16, 11), "warped_pairs": 8}
        return {"model": {"latent_dim": codes}, "moments": moments, "mixture": {"enabled": False}}
    steps = {"steps": STEPS[name], "sample_rate": 0.0128, "learning_rate": 5e-3, "average_decay": 0.9}
    model = {**DEEP, "latent_dim": codes, "scale": SCALE[name]}
    moments = {"basis_shape": (28, 28), "coarse_shape": COARSE[name], **PIXELS}
    return {"model": model, "moments": moments, "dpsgd": {"enabled": True, **steps}}


def classical(train: Images, test: Images, codes: int, seed: int) -> dict[str, float]:
    """Return the errors of PCA and of ICA on its whitened codes, both clipped to [0, 1] as the VAE's images are."""
    from sklearn.decomposition import PCA, FastICA

    flat, held = (a.reshape(len(a), -1).astype(np.float64) for a in (train, test))
    pca = PCA(codes, whiten=True, random_state=seed).fit(flat)
    ica = FastICA(whiten=False, max_iter=20, tol=1e-2, random_state=seed).fit(pca.transform(flat))
    coded = pca.transform(held)
    found = {"PCA": coded, "ICA": ica.inverse_transform(ica.transform(coded))}
    again = {name: pca.inverse_transform(z).clip(0, 1) for name, z in found.items()}
    return {name: float(np.square(images - held).mean()) for name, images in again.items()}


RECONSTRUCTION = Measure(
    "reconstruction",
    "Reconstruction against PCA and ICA",
    "Mean squared error times 1,000 on held-out scans, at equal numbers of codes. MNIST: 5,000 training and 2,000 test "
    "digits; PneumoniaMNIST: 4,708 and 524; hippocampus: 103 persons' volumes of 16x24x16 voxels and 28 persons held "
    "out. Without privacy: closed form, then for 250 (PneumoniaMNIST: 500) steps a small network (hippocampus: the "
    "closed form alone, as a network overfits so few, from scans and 16 warped copies of each); epsilon 8: the rule's "
    "own choice, the closed form alone. Linear ICA rotates PCA's codes, so both rebuild the same images.",
    tuple(
        {"data": name, "codes": str(codes), "epsilon": epsilon}
        for name in SETS
        for codes in CODES
        for epsilon in ("none", "8")
    ),
    run,
    digits=2,
)
