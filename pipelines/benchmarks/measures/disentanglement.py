"""How well single codes follow single factors: MIG (Chen et al. 2018), SAP (Kumar et al. 2018), DCI (Eastwood &
Williams 2018), on phantoms whose factors are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from measures.cells import Case, Measure, Work
from measures.data import FACTORS, cohort, factor_phantoms, rows_of, split
from measures.training import fit, means, rebuilt

Floats = npt.NDArray[np.float64]
BINS = 20
CODES = 8
LONGER = " for 2,000"


def run(case: Case, seed: int, work: Work) -> dict[str, float]:
    """Return the three scores on held-out phantoms, and the reconstruction error."""
    train, _ = factor_phantoms(seed, 4000)
    test, factors = factor_phantoms(seed + 1000, 1000)
    folder, store = cohort(
        work.out / "cohorts" / f"factors-{seed}", {"train_images": train, "test_images": test}, intensity="window",
        intensity_low=0.0, intensity_high=1.0,
    )  # fmt: skip
    beta, longer = case["beta"].removesuffix(LONGER), case["beta"].endswith(LONGER)
    model: dict[str, Any] = {"latent_dim": CODES, "channels": (16, 32), "residual_units": 0, "beta": float(beta)}
    steps = {
        "enabled": True,
        "steps": 2000 if longer else 250,
        "sample_rate": 0.016,
        "learning_rate": 5e-3,
        "average_decay": 0.9,
    }
    if case["epsilon"] != "none":
        steps |= {"steps": 100, "sample_rate": 0.06, "learning_rate": 3e-3}
    fitted = fit(folder, {"model": model, "moments": {"enabled": False}, "dpsgd": steps}, case["epsilon"], seed)
    held = split(store, "holdout")
    codes, factors = means(fitted.model, held).astype(np.float64), factors[rows_of(held, test)]
    error = float(np.square(rebuilt(fitted.model, held) - held.x[:, 0]).mean())
    return {"MIG": mig(codes, factors), "SAP": sap(codes, factors), **dci(codes, factors), "MSE x 1000": 1000 * error}


def mig(codes: Floats, factors: Floats) -> float:
    """Return the gap of mutual information between the two most informative codes, over the factor's entropy."""
    shared = np.asarray([[mutual_information(code, factor) for code in codes.T] for factor in factors.T])
    two = np.sort(shared, axis=1)[:, -2:]
    return float(((two[:, 1] - two[:, 0]) / [entropy(f) for f in factors.T]).mean())


def mutual_information(a: Floats, b: Floats) -> float:
    """Return the mutual information in nats of two columns in equal bins, by the plug-in estimate."""
    joint = np.histogram2d(a, b, bins=BINS)[0] / len(a)
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / apart[seen])).sum())


def entropy(a: Floats) -> float:
    """Return the entropy in nats of a column in equal bins."""
    p = np.histogram(a, bins=BINS)[0] / len(a)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def sap(codes: Floats, factors: Floats) -> float:
    """Return the mean gap between the squared correlations of a factor with its two best codes."""
    spread = codes.std(0) * factors.std(0)[:, None]
    covariance = (factors - factors.mean(0)).T @ (codes - codes.mean(0)) / len(codes)
    r2 = np.square(np.divide(covariance, spread, out=np.zeros_like(covariance), where=spread > 1e-12))
    two = np.sort(r2, axis=1)[:, -2:]
    return float((two[:, 1] - two[:, 0]).mean())


def dci(codes: Floats, factors: Floats) -> dict[str, float]:
    """Return disentanglement, completeness and informativeness, the last as R^2 on the second half of the rows."""
    from sklearn.ensemble import RandomForestRegressor

    half = len(codes) // 2
    importance, score = [], []
    for factor in factors.T:
        forest = RandomForestRegressor(30, max_depth=8, random_state=0).fit(codes[:half], factor[:half])
        importance.append(forest.feature_importances_)
        score.append(max(0.0, float(forest.score(codes[half:], factor[half:]))))
    weights = np.asarray(importance).T  # (codes, factors)
    rows, columns = weights.sum(1) / max(weights.sum(), 1e-12), weights.sum(0) / max(weights.sum(), 1e-12)
    disentangled = (rows * (1 - _entropies(weights, 1))).sum()
    complete = (columns * (1 - _entropies(weights, 0))).sum()
    return {"DCI D": float(disentangled), "DCI C": float(complete), "DCI I": float(np.mean(score))}


def _entropies(weights: Floats, axis: int) -> Floats:
    p = weights / np.maximum(weights.sum(axis, keepdims=True), 1e-12)
    logs = np.log(np.where(p > 0, p, 1.0))
    return np.asarray(-(p * logs).sum(axis) / np.log(weights.shape[axis]))


DISENTANGLEMENT = Measure(
    "disentanglement",
    "Disentanglement by beta",
    f"Phantoms of 32x32 pixels, one soft ellipse each, with independent {', '.join(FACTORS)}; 4,000 to train on, 1,000 "
    f"to score; {CODES} codes, no closed form, 250 steps (epsilon 8: 100 larger ones) or 2,000. DCI: "
    "disentanglement, completeness, informativeness.",
    (
        *({"beta": b, "epsilon": "none"} for b in ("1", "2", "4", "8", "16")),
        {"beta": "4", "epsilon": "8"},
        *({"beta": b + LONGER, "epsilon": "none"} for b in ("1", "4", "16")),
    ),
    run,
)
