"""The leaderboard: what models trained on synthetic scans are worth on real ones, at a given epsilon.

    python pipelines/benchmarks/quality.py --data ../shared/data --rows mnist:8 --out results
    python pipelines/benchmarks/quality.py --out results --render docs/leaderboard.md

A row is ROW:EPSILON, one of mnist, pneumoniamnist, adrenalmnist3d, msd_hippocampus, or the path of any .npz with
labels. Methods: product, nonprivate (the same recipe without noise), real (the ceiling), closed_form, dp_cvae,
dp_merf and class_means (the floor). Every cell is written as soon as it is finished; cells that are there are not run
again, so a stopped command is simply given again. A GPU is used where there is one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from leaderboard.cells import Settings, plan_cells, run_cell
from leaderboard.methods import METHODS


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rows", default="", help="ROW:EPSILON, several with commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("results"), help="cells, and the ingested cohorts beside them")
    parser.add_argument("--recipe", type=Path, help="pipeline YAML of product and nonprivate, in place of the default")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seeded-noise", action="store_true", help="noise that can be repeated: for tests only")
    parser.add_argument("--inception-weights", type=Path, help="for FID by torch-fidelity, where it is installed")
    parser.add_argument("--render", type=Path, help="write the table of all finished cells here")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.rows:
        settings = Settings(args.data, args.out, args.recipe, args.threads, args.seeded_noise, args.inception_weights)
        seeds = [int(s) for s in args.seeds.split(",")]
        cells = plan_cells(args.rows.split(","), args.methods.split(","), seeds, args.recipe)
        todo = [c for c in cells if not (args.out / "cells" / f"{c.name}.json").exists()]
        print(f"{len(cells) - len(todo)} of {len(cells)} cells are there already", flush=True)
        for cell in todo:
            result = run_cell(cell, settings)
            numbers = {k: v for k, v in (result["scores"] | result["fidelity"]).items() if v is not None}
            shown = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
            print(f"{cell.name}: {shown}; {result['train_cpu_s']:.0f} CPU s to train", flush=True)
    if args.render:
        from leaderboard.render import render

        args.render.write_text(render(args.out), encoding="utf-8")


if __name__ == "__main__":
    main()
