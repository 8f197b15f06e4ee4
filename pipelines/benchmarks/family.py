"""The VAE family on real images: what each variant is known for, measured, without privacy and at epsilon 8.

    python pipelines/benchmarks/family.py --data ../shared/data --rows reconstruction,anomaly --out results
    python pipelines/benchmarks/family.py --out results --render docs/family.md

A row is one of the measurements below (all: --rows all). Every cell (a case at a seed) is written as soon as it is
finished, and cells that are there are not run again, so a stopped command is simply given again. Models are trained by
the product itself, with a pipeline of few steps so that all of it runs on one CPU core; "none" is without privacy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measures import MEASURES
from measures.cells import Work, run_cells
from measures.render import render


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rows", default="", help=f"with commas, or all: {', '.join(m.name for m in MEASURES)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("results"), help="cells, and the ingested cohorts beside them")
    parser.add_argument("--render", type=Path, help="put the tables of all finished cells between this page's markers")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    known = {m.name: m for m in MEASURES}
    rows = list(known) if args.rows == "all" else [r for r in args.rows.split(",") if r]
    if unknown := [r for r in rows if r not in known]:
        raise SystemExit(f"there is no row {unknown[0]!r}: use {', '.join(known)}, or all")
    for row in rows:
        run_cells(known[row], [int(s) for s in args.seeds.split(",")], Work(args.data, args.out))
    if args.render:
        render(args.render, args.out, MEASURES)


if __name__ == "__main__":
    main()
