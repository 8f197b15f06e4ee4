"""Positive controls on a real cohort: an overfitted VAE that attacks must break, and planted copies to be found.

    medvae ingest SOURCE -o cohort
    python pipelines/benchmarks/controls.py cohort

Beside them the blind baseline, which never sees a model: its interval must hold 0.5. What the same attacks find on a
private model, `medvae audit RUN --tier standard` says.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from medvae.audit import deep_attack, membership
from medvae.audit.attacks import DEEP, Attack, control_pool, make_pool
from medvae.audit.case import EFFORTS
from medvae.audit.embedding import embed
from medvae.audit.intervals import Estimate
from medvae.audit.material import load_scans
from medvae.audit.risks import COMPARED, search_copies
from medvae.vault.store import open_cohort

CONFIDENCE, FPR = 0.95, 0.01
SHOWN = (DEEP[0].name, Attack("likelihood", "raw", "mean").name, Attack("likelihood", "rmia", "sum").name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--tier", choices=list(EFFORTS), default="standard")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    effort, rng = EFFORTS[asked.tier], np.random.default_rng(asked.seed)
    store = open_cohort(asked.cohort).reveal()
    train, held = (load_scans(store, split, effort.pool, rng) for split in ("train", "holdout"))
    print("| control | value | 95 % interval | n |\n|---|---|---|---|")
    pool = make_pool(train, held, effort.judged, rng)
    control = control_pool(pool, effort.control_patients, np.random.default_rng(asked.seed + 1))
    if control is None:
        raise SystemExit(f"needs {4 * membership.MIN_PATIENTS} patients or more for a control")
    found = deep_attack._control(control, effort.draws, effort.control_steps, asked.seed)
    for name in SHOWN:
        row(f"overfitted VAE, {name}, AUC", membership.area(found[name], CONFIDENCE))
        got = membership.rate(found[name], FPR, CONFIDENCE)
        title = f"overfitted VAE, {name}, TPR at {FPR:.0%} FPR"
        if got.value is None or got.low is None or got.high is None:
            print(f"| {title} | {got.words} | | {got.others} |", flush=True)
        else:
            row(title, Estimate(got.value, got.low, got.high, got.members))
    judged = pool.only_judged()
    means = membership.patient_means(embed(judged.scans.images), judged.scans.patient)
    blind = membership.blind_baseline(means[judged.member], means[~judged.member], CONFIDENCE, asked.seed)
    row("blind baseline, AUC", blind)
    train, held = (scans.take(np.sort(rng.permutation(len(scans))[:COMPARED])) for scans in (train, held))
    copies = search_copies(held.images[:1], train, held, CONFIDENCE, asked.seed)
    row("planted copies found", copies.planted_found)
    if copies.false_flags is None:
        print(f"| false flags | {copies.words} | | {copies.chance} |")
    else:
        row("false flags", copies.false_flags)
        print(f"\n{copies.words}")


def row(name: str, found: Estimate) -> None:
    print(f"| {name} | {found.value:.4g} | {found.low:.4g} to {found.high:.4g} | {found.n} |", flush=True)


if __name__ == "__main__":
    main()
