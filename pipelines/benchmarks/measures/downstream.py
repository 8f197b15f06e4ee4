"""What codes are good for: denoising, clusters, probes of few labels, and missing labels (M2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from measures.cells import Case, Measure, Work
from measures.data import Images, cohort, mnist_part, pneumonia, rows_of, split, write_folder
from measures.reconstruction import recipe as reconstruction_recipe
from measures.training import fit, means, network, rebuilt
from medvae.config import IngestConfig, build
from medvae.latent.cluster import cluster
from medvae.latent.corrupt import corrupt
from medvae.latent.restore import BASELINES, psnr, ssim
from medvae.vault.ingest import ingest

CODES, DENOISED = 16, 200
SCANS, LABELLED = 2000, 50


def run_codes(case: Case, seed: int, work: Work) -> dict[str, float]:
    """Return agreement of clusters with digits and accuracies of a linear probe, on held-out digits."""
    arrays = mnist_part(work.data, work.out, seed, 5000, 2000)
    images = {key: value for key, value in arrays.items() if key.endswith("images")}
    folder, store = cohort(work.out / "cohorts" / f"MNIST-unlabelled-{seed}", images)
    train, test = split(store, "train"), split(store, "holdout")
    if case["codes of"] == "PCA":
        pca = PCA(CODES, random_state=seed).fit(train.x.reshape(len(train.x), -1))
        found = [pca.transform(b.x.reshape(len(b.x), -1)) for b in (train, test)]
    else:
        pipeline = (
            reconstruction_recipe("MNIST", CODES) if case["epsilon"] == "none" else {"model": {"latent_dim": CODES}}
        )
        model = fit(folder, pipeline, case["epsilon"], seed).model
        found = [means(model, b) for b in (train, test)]
    labels = [
        arrays[f"{part}_labels"][rows_of(batch, arrays[f"{part}_images"] / 255)]
        for part, batch in (("train", train), ("test", test))
    ]
    agreement = cluster(found[1].astype(np.float32), 10, {"digit": labels[1].astype(str).tolist()}, seed).agreement
    probes = {f"probe, {share:.0%}": _probe(found, labels, share) for share in (0.01, 0.1, 1.0)}
    return {"NMI": agreement["digit"]["nmi"], "ARI": agreement["digit"]["ari"], **probes}


def _probe(codes: list[Images], labels: list[Images], share: float) -> float:
    count = max(10, round(share * len(codes[0])))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    return float(probe.fit(codes[0][:count], labels[0][:count]).score(codes[1], labels[1]))


def run_denoising(case: Case, seed: int, work: Work) -> dict[str, float]:
    """Return PSNR and SSIM of restored validation images, medians."""
    images = {k: v for k, v in pneumonia(work.data).items() if k.endswith("images")}
    folder, store = cohort(work.out / "cohorts" / "PneumoniaMNIST-unlabelled-0", images)
    held = split(store, "holdout")
    clean = held.x[:DENOISED, 0]
    spoiled = corrupt(clean, case["fault"], 1.0, seed)
    if case["filter"] == "as it came":
        restored = spoiled
    elif case["filter"] in BASELINES:
        restored = np.stack([BASELINES[case["filter"]](image) for image in spoiled])
    else:
        pipeline = reconstruction_recipe("PneumoniaMNIST", 32)
        pipeline = pipeline if case["epsilon"] == "none" else {"model": {"latent_dim": 32}}
        batch = held._replace(x=spoiled[:, None], condition=held.condition[:DENOISED])
        restored = rebuilt(fit(folder, pipeline, case["epsilon"], seed).model, batch)
    return {"PSNR (dB)": float(np.median(psnr(clean, restored))), "SSIM": float(np.median(ssim(clean, restored)))}


def run_labels(case: Case, seed: int, work: Work) -> dict[str, float]:
    """Return the balanced accuracy on the validation images of a classifier that has 50 labels."""
    arrays, rng = pneumonia(work.data), np.random.default_rng(seed)
    kept = rng.permutation(len(arrays["train_images"]))[:SCANS]
    images, labels = (arrays[f"train_{kind}"][kept] for kind in ("images", "labels"))
    held, truth = (arrays["test_images"] / 255).astype(np.float32), arrays["test_labels"]
    if case["classifier"] == "logistic regression":
        judge = LogisticRegression(max_iter=300, class_weight="balanced")
        judge.fit(images[:LABELLED].reshape(LABELLED, -1) / 255, labels[:LABELLED])
        return {"balanced accuracy": float(balanced_accuracy_score(truth, judge.predict(held.reshape(len(held), -1))))}
    folder = work.out / "cohorts" / f"few-labels-{seed}"
    if not folder.exists():
        source = work.out / "sources" / folder.name
        known = [str(labels[i]) if i < LABELLED else "" for i in range(SCANS)]
        write_folder(source, images, "finding", known)
        options: dict[str, Any] = {
            "conditions": ("finding=0|1|missing",),
            "missing": "class",
            "holdout": 0.0,
            "shape": (28, 28),
        }
        options |= {"intensity": "window", "intensity_low": 0.0, "intensity_high": 255.0}
        ingest(source, folder, build(IngestConfig, **options))
    model = fit(
        folder,
        network(case["epsilon"], {"semi_supervised": True, "label_weight": float(case["weight"])}, SCANS),
        case["epsilon"],
        seed,
    ).model
    with torch.inference_mode():
        guess = model.label_probabilities(torch.from_numpy(held[:, None])).argmax(1).numpy()
    return {"balanced accuracy": float(balanced_accuracy_score(truth, guess))}


USES = Measure(
    "codes",
    "Codes: clusters and probes",
    f"MNIST, 5,000 digits without labels to train on, {CODES} codes; k-means with 10 clusters, and a logistic "
    "regression with 1 %, 10 % and all of the labels, scored on 2,000 test digits. Epsilon 8: the closed form.",
    (
        {"codes of": "PCA", "epsilon": "none"},
        {"codes of": "VAE", "epsilon": "none"},
        {"codes of": "VAE", "epsilon": "8"},
    ),
    run_codes,
)
DENOISING = Measure(
    "denoising",
    "Denoising",
    f"PneumoniaMNIST, {DENOISED} validation images, faults at severity 1, medians; the VAE has 32 codes and never saw "
    "a fault. Epsilon 8: the closed form.",
    tuple(
        {"fault": fault, "filter": name, "epsilon": epsilon}
        for fault in ("noise", "missing_slices")
        for name, epsilon in (
            ("as it came", "none"),
            ("non-local means", "none"),
            ("total variation", "none"),
            ("VAE", "none"),
            ("VAE", "8"),
        )
    ),
    run_denoising,
    digits=2,
)
LABELS = Measure(
    "labels",
    f"Semi-supervised (M2) against supervised at {LABELLED} labels",
    f"PneumoniaMNIST, {SCANS:,} images of which {LABELLED} have a label; 250 steps of 64 (epsilon 8: 80 of an eighth). "
    "Balanced accuracy on the 524 validation images; weight: of a label's cross-entropy, in nats. Logistic regression "
    "sees the pixels of the labelled images alone.",
    tuple(
        {"classifier": name, "weight": weight, "epsilon": epsilon}
        for name, weight, epsilon in (
            ("logistic regression", "", "none"),
            ("M2", "50", "none"),
            ("M2", "2000", "none"),
            ("M2", "2000", "8"),
        )
    ),
    run_labels,
)
