"""Utility and fidelity of what a recipe makes, on a real cohort or on phantoms, over several runs with fresh noise.

    python pipelines/benchmarks/audited.py phantom2d --epsilon 8 --runs 3
    python pipelines/benchmarks/audited.py SOURCE --condition size_class --shape 32 48 32 --spacing-mm 1 1 1

Each run trains anew and is audited by `medvae audit`; the table gives the mean over runs beside the audit's own floor
(synthetic class means) and ceiling (real data). Held-out patients are the test set, as in every audit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from medvae.audit.run import audit
from medvae.config import AuditConfig, IngestConfig, Recipe, TrainConfig, build, load_recipe
from medvae.synth.phantom import make_phantom
from medvae.synth.phantom_write import write_phantom
from medvae.train.run import train
from medvae.vault.ingest import ingest

PHANTOMS = {"phantom2d": (2, 64), "phantom3d": (3, 32)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="phantom2d, phantom3d, or what `medvae ingest` reads")
    parser.add_argument("--patients", type=int, default=240, help="of phantoms")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--pipeline", type=Path)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--condition", action="append", default=[])
    parser.add_argument("--shape", type=int, nargs="+")
    parser.add_argument("--spacing-mm", type=float, nargs="+")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    return parser.parse_args()


def make_cohort(args: argparse.Namespace, folder: Path) -> Path:
    source, conditions = Path(args.source), tuple(args.condition)
    if args.source in PHANTOMS:
        dims, size = PHANTOMS[args.source]
        source = folder / "source"
        write_phantom(make_phantom(dims, args.patients, seed=0, size=size), source, "nifti" if dims == 3 else "png")
        conditions = conditions or ("lesion", "age=20:90")
        args.shape = args.shape or [size] * dims
    values = {"labels": args.labels, "conditions": conditions, "shape": args.shape, "spacing_mm": args.spacing_mm}
    ingest(source, folder / "cohort", build(IngestConfig, **values))
    return folder / "cohort"


def one_run(cohort: Path, folder: Path, seed: int, epsilon: float, recipe: Recipe) -> dict[str, Any]:
    begun = time.process_time()
    claim = train(cohort, folder / f"run-{seed}", build(TrainConfig, dp_epsilon=epsilon, recipe=recipe, seed=seed))
    trained = time.process_time() - begun
    result = audit(folder / f"run-{seed}", folder / f"report-{seed}", build(AuditConfig, seed=seed))
    findings = [f for f in result["findings"] if f["group"] != "privacy" and f["value"] is not None]
    return {"epsilon": claim["epsilon"], "delta": claim["delta"], "train_cpu_s": trained, "findings": findings}


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for finding in runs[0]["findings"]:
        found = [f for r in runs for f in r["findings"] if f["name"] == finding["name"]]
        rows.append(
            {
                "measure": finding["name"],
                "values": [f["value"] for f in found],
                "mean": statistics.fmean(f["value"] for f in found),
                "floor": finding["baseline"],
                "ceiling": finding["control"],
            }
        )
    return rows


def main() -> None:
    args = arguments()
    recipe = load_recipe(args.pipeline) if args.pipeline else Recipe()
    with tempfile.TemporaryDirectory() as name:
        cohort = make_cohort(args, Path(name))
        runs = [one_run(cohort, Path(name), seed, args.epsilon, recipe) for seed in range(args.runs)]
    rows = table(runs)
    cpu = statistics.median(r["train_cpu_s"] for r in runs)
    print(f"epsilon {runs[0]['epsilon']:.4g} at delta {runs[0]['delta']:.3g} (patient, add-remove, PLD)")
    print(f"{args.runs} runs, training {cpu:.0f} CPU s each (median)")
    print("| measure | mean | runs | floor or real-against-real | ceiling |\n|---|---|---|---|---|")
    for row in rows:
        each = ", ".join(f"{v:.3f}" for v in row["values"])
        floor, ceiling = ("" if row[k] is None else f"{row[k]:.3f}" for k in ("floor", "ceiling"))
        print(f"| {row['measure']} | {row['mean']:.3f} | {each} | {floor} | {ceiling} |")
    if args.json:
        args.json.write_text(json.dumps({"runs": runs, "table": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
