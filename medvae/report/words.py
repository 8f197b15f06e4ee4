"""How numbers and standing sentences are written in every report: one formatting function, one glossary."""

from __future__ import annotations

import json
import math
import re
from decimal import Context, Decimal
from typing import Any

NOT_MEASURED = "not measured"


def number(value: Any) -> str:
    """Write a JSON value for a reader: whole numbers as they are, others to four significant digits.

    >>> number(0.123456), number(7.99812), number(1e-05), number(131), number(None)
    ('0.1235', '7.998', '0.00001', '131', 'not measured')
    """
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "unbounded"
    short = Context(prec=4).create_decimal(Decimal(repr(value))).normalize()
    if short == 0:
        return "0"
    return f"{short:f}" if -9 < short.adjusted() < 9 else f"{short:e}"


def exact(value: Any) -> str:
    """Write a JSON value with every digit it has in the JSON file."""
    return "–" if value is None else json.dumps(value, ensure_ascii=False)


def sentence(name: str) -> str:
    """Turn the name of a finding or figure into words: `white_box_auc` becomes `White box AUC`."""
    text = re.sub(r"\w+", lambda m: _SPELLING.get(m[0].lower(), m[0]), " ".join(name.replace("_", " ").split()))
    text = text.replace("MS SSIM", "MS-SSIM")
    return text[:1].upper() + text[1:]


_SPELLING = {
    word.lower(): word
    for word in (
        "AUC", "TPR", "FPR", "ROC", "MS", "SSIM", "ELBO", "GLCM", "DP", "FID", "KID", "IoU", "CT", "MR", "VAE", "GDP",
        "SHA256", "Wasserstein", "Dice", "Gaussian", "Poisson", "Croissant", "DICOM", "NIfTI", "ID", "URL", "SD",
    )
} | {"frechet": "Fréchet", "dpsgd": "DP-SGD", "sha256": "SHA-256"}  # fmt: skip

VERDICTS = {
    "RELEASE": (
        "release",
        "✓",
        "The proof holds and no test found a reason to keep the synthetic scans back. "
        "The board decides; this report is its evidence.",
    ),
    "CONDITIONAL": (
        "conditional",
        "!",
        "The synthetic scans may leave only when the points below have been settled and signed for.",
    ),
    "DO NOT RELEASE": (
        "refuse",
        "✕",
        "The synthetic scans and the model must stay inside the institution, for the reasons below.",
    ),
}
OTHER_VERDICT = ("conditional", "?", "No decision could be reached; treat the cohort as not releasable until it is.")

PROVENANCE = {
    "public": "computed without any patient's data",
    "dp": "protected by the proof",
    "canary": "measured on planted, invented patients",
    "private": "measured on real patients, unprotected: internal only",
}

GROUPS = {
    "privacy": ("Privacy", "What could an attacker learn about one patient?"),
    "fidelity": ("Fidelity", "Do the synthetic scans look and measure like real ones?"),
    "utility": ("Utility", "Is a tool built on synthetic scans of use on real ones?"),
}

RESIDUAL_RISKS = (
    "A patient filed under two identifiers counts as two and is protected less than stated.",
    "What is true of the whole group of patients can still be learned, and is meant to be.",
    "The proof holds if the programme was built and run as described.",
    "Each further release from the same patients adds to what an attacker may combine.",
    "Synthetic scans carry the cohort's errors and biases: for research, never for care.",
)

CERTIFICATE_LIMITS = (
    "It does not say that the scans are fit for a purpose: see the dataset card and the audit.",
    "It does not hide what is true of the whole group of patients; it limits what one patient's scans add.",
    "It holds if the programme was built and run as described, and if each patient was filed under one identifier.",
    "The scans are synthetic. They are for research and never for the care of a patient.",
)

BAD_SIGNS = (
    "INVALID", "INCONCLUSIVE", "ABOVE", "NOT ", "refuted", "fail", "Fail", "too often", "membership shows",
)  # fmt: skip
GOOD_SIGNS = (
    "valid:", "pass", "as close as", "as diverse", "no better than guessing", "under the proven", "broken, as it must",
    "as rare as",
)  # fmt: skip
"""How the verdicts of an audit are told apart, for a mark beside them; the words themselves are always printed."""

SIGNATORIES = ("Data steward", "Data protection officer", "Clinical lead", "Chair of the board")

EVIDENCE_NOTE = (
    "This report is evidence for a decision. It is not a legal determination that data are anonymous, under any law."
)

GLOSSARY = (
    ("Differential privacy", "A mathematical promise: what is released looks almost the same whether or not any one "
     "patient took part, whatever else an attacker knows."),
    ("epsilon (ε)", "The size of the promise. Smaller is stronger: 0 reveals nothing; 1 is strong; 8 is weak but still "
     "a proven limit. It is meaningless without delta, the unit and the neighbouring relation."),
    ("delta (δ)", "The small probability for which the limit epsilon need not hold. It must lie far below one in the "
     "number of patients."),
    ("Unit: patient", "All scans of one person count together. A promise by scan or slice would protect a patient with "
     "many scans less."),
    ("Neighbouring: add-remove", "The promise compares the cohort with the same cohort without all scans of one "
     "patient."),
    ("Accountant", "The method that adds up the privacy cost of all steps. PLD (privacy loss distributions) gives an "
     "upper bound; PRV is an independent second method."),
    ("Mechanism", "One step that touched private data, with its noise multiplier (noise over the largest effect of "
     "one patient), its sample rate (chance of a patient to be drawn) and its count."),
    ("ROC, TPR, FPR", "An attacker guesses who took part. TPR is the share of true participants found, FPR the share "
     "of others wrongly accused. The ROC curve shows one against the other."),
    ("AUC", "Area under the ROC curve: 0.5 is guessing, 1 is always right."),
    ("Baseline", "The same number where nothing is wrong: real scans against other real scans, or pure chance."),
    ("Control", "The same number where the method must react: an attack on a model known to leak. An attack that "
     "fails its control shows nothing."),
    ("95 % interval", "The range that would hold the true value in 95 of 100 repeated measurements."),
    ("Provenance", "Where a number comes from: public, dp (protected by the proof), canary (invented patients), or "
     "private (real patients, unprotected; never in a public report)."),
    ("Canary", "An invented patient, planted to see whether the training leaks it. No real patient is touched."),
    ("Fréchet and kernel distance", "Distances between the real and the synthetic scans, by a fixed public measuring "
     "network. Compare with the baseline, not with zero."),
    ("Precision, recall, density, coverage", "Shares of synthetic scans that look real, and of real variety that is "
     "found among the synthetic ones."),
    ("MS-SSIM", "Likeness of two scans to each other. Too high a value among synthetic scans means little variety."),
    ("Wasserstein distance", "How far one distribution of a measured feature must be moved to become the other."),
)  # fmt: skip
