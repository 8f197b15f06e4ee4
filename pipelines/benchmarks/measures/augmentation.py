"""A rare class, filled up with made-up scans: balanced accuracy on real scans, against the usual remedies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from measures.cells import Case, Measure, Work
from measures.data import Images, cohort, pneumonia, split
from measures.training import fit, network
from medvae.audit.embedding import embed
from medvae.synth.sample import generate

COMMON = 1500
EVERY = "closed form, both classes"
MADE = {"conditional VAE": {}, "class-specific VAE": {"class_decoders": True}}


def run(case: Case, seed: int, work: Work) -> dict[str, float]:
    """Thin the normal chest X-rays, fill them up as the case says, train a judge, test it on the validation images."""
    arrays, rng, share = pneumonia(work.data), np.random.default_rng(seed), float(case["rare"].rstrip(" %")) / 100
    rare_count = round(COMMON * share / (1 - share))
    rows = [rng.permutation(np.flatnonzero(arrays["train_labels"] == k)) for k in (0, 1)]
    kept = np.concatenate([rows[0][:rare_count], rows[1][:COMMON]])
    thinned = arrays | {"train_images": arrays["train_images"][kept], "train_labels": arrays["train_labels"][kept]}
    folder, store = cohort(work.out / "cohorts" / f"thinned-{case['rare'].split()[0]}-{seed}", thinned)
    train, test = split(store, "train"), split(store, "holdout")
    label, truth = train.condition.argmax(1), test.condition.argmax(1)
    rare = train.x[label == 0, 0]
    added = _added(case, seed, rare, COMMON - rare_count, folder)
    images = np.concatenate([train.x[:, 0], added])
    label = np.concatenate([label, np.zeros(len(added), dtype=label.dtype)])
    if case["remedy"] == EVERY:
        made = _made(case, seed, [0] * COMMON + [1] * COMMON, folder)
        images, label = np.concatenate([images, made]), np.concatenate([label, np.repeat([0, 1], COMMON)])
    judge = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    judge.fit(embed(images), label)
    return {"balanced accuracy": float(balanced_accuracy_score(truth, judge.predict(embed(test.x[:, 0]))))}


def turned(images: Images, rng: np.random.Generator) -> Images:
    """Return images (N, h, w) each shifted and turned a little, as is usual."""
    moved = [
        ndimage.rotate(ndimage.shift(image, rng.normal(0, 1.5, 2), mode="nearest", order=1), rng.normal(0, 7),
                       reshape=False, mode="nearest", order=1)
        for image in images
    ]  # fmt: skip
    return np.stack(moved).astype(np.float32)


def _added(case: Case, seed: int, rare: Images, count: int, folder: Path) -> Images:
    rng = np.random.default_rng(seed + 1)
    if case["remedy"] == "none":
        return rare[:0]
    again = rare[rng.integers(0, len(rare), count)]
    if case["remedy"] in ("oversampling", EVERY):
        return again
    if case["remedy"] == "shifts and turns":
        return turned(again, rng)
    return _made(case, seed, [0] * count, folder)


def _made(case: Case, seed: int, labels: Sequence[int], folder: Path) -> Images:
    model = MADE.get(case["remedy"])
    recipe = {} if model is None else network(case["epsilon"], model, COMMON)
    release = fit(folder, recipe, case["epsilon"], seed).release
    (condition,) = release.space.conditions
    return generate(release, [{condition.name: condition.classes[k]} for k in labels], seed).images


AUGMENTATION = Measure(
    "augmentation",
    "A class thinned to 2 % and 5 %",
    f"PneumoniaMNIST, {COMMON:,} ill images and as few normal ones as the share says; the normal class is filled up to "
    "equal numbers. The judge is a logistic regression on the shipped embedding, tested on the 524 validation images. "
    "The closed form and the networks see the thinned images alone. Both classes: oversampling, and beside it "
    f"{COMMON:,} made-up images of each class (`medvae augment --each`).",
    tuple(
        {"rare": rare, "remedy": remedy, "epsilon": epsilon}
        for rare in ("2 %", "5 %")
        for remedy, epsilon in (
            ("none", "none"),
            ("oversampling", "none"),
            ("shifts and turns", "none"),
            ("closed form", "none"),
            ("closed form", "8"),
            (EVERY, "none"),
            (EVERY, "8"),
            ("conditional VAE", "none"),
            ("class-specific VAE", "none"),
            ("class-specific VAE", "8"),
        )
    ),
    run,
)
