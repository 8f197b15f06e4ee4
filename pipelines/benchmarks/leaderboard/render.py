"""docs/leaderboard.md from the finished cells: nothing in it is typed by hand, and what was not run is said."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leaderboard.cells import read_cells
from leaderboard.rows import ROWS

Result = dict[str, Any]

HEAD = """# Leaderboard

What a network trained on synthetic scans alone is worth on real ones, by method and epsilon. This page is made from
the finished cells of a results folder by `python pipelines/benchmarks/quality.py --out results --render
docs/leaderboard.md`; nothing in it is edited by hand.

- Epsilon is the total of all that touched the training scans, unit patient, add/remove, PLD, at the delta shown.
- Figures are means over seeds ± standard deviation; each seed is fresh noise, a fresh training and fresh judges, and
  on hippocampus another fold of persons too.
- Judges see the same steps, batches and augmentation whatever they are trained on, classes equally often, and are
  tested once, with their last weights, on real scans that were held out.
- *Ceiling*: the same judges trained on the real training scans. *Floor*: trained on noisy class means. *Non-private*:
  the product's recipe without noise, against which diversity is measured.
- Fréchet distance, recall and coverage compare with the held-out scans in the shipped embedding, at equal numbers and
  equal composition by class. Inception FID is `not run` where its weights were not given.
- Core-hours are processor time of one seed, training and generating, without the judges.
- Rivals run at bounded cost: DP-MERF for 800 steps, plain DP-CVAE for the rule's steps (200 in 2D, 120 in 3D), which
  are few for a network that starts from nothing. Its rows say what that buys and not what the method can reach. They,
  and noisy class means, learn from scans at the judges' resolution, which on AdrenalMNIST3D is half of the product's.
"""
NAMES = {
    "product": "product",
    "closed_form": "closed form alone",
    "dp_cvae": "plain DP-CVAE",
    "dp_merf": "DP-MERF",
    "class_means": "noisy class means (floor)",
    "nonprivate": "non-private product",
    "real": "real data (ceiling)",
}
RIVALS = ("class_means", "closed_form", "dp_cvae", "dp_merf")
DIVERSITY = {1.0: 0.6, 8.0: 0.8}


def render(out: Path) -> str:
    """Return the page in Markdown. Raises SystemExit where no cell is finished."""
    cells = list(read_cells(out))
    if not cells:
        raise SystemExit("the results folder holds no finished cell: run some rows first")
    names = {c["row"] for c in cells}
    order = [n for n in ROWS if n in names] + sorted(names - set(ROWS))
    return "\n".join([HEAD, *(_row([c for c in cells if c["row"] == name]) for name in order)])


def _row(cells: Sequence[Result]) -> str:
    epsilons = sorted({c["asked_epsilon"] for c in cells if c["asked_epsilon"] is not None})
    fixed = [c for c in cells if c["asked_epsilon"] is None]
    lines = [f"## {cells[0]['title']}", ""]
    for epsilon in epsilons or [None]:
        mine = [c for c in cells if c["asked_epsilon"] == epsilon and epsilon is not None]
        lines += _table(epsilon, mine, fixed)
    return "\n".join([*lines, "```console", *(f"$ {line}" for line in commands(cells)), "```", ""])


def commands(cells: Sequence[Result]) -> list[str]:
    """Return the commands that make these cells anew, one for each recipe, run in the repository's folder.

    A recipe is looked for beside those of the repository.
    """
    row = cells[0]["row"] if cells[0]["row"] in ROWS else f"{cells[0]['row']}.npz"
    lines = []
    for recipe in sorted({c["recipe"] for c in cells}):
        mine = [c for c in cells if c["recipe"] == recipe]
        epsilons = sorted({c["asked_epsilon"] for c in mine if c["asked_epsilon"] is not None})
        methods = [name for name in NAMES if any(c["method"] == name for c in mine)]
        seeds = sorted({c["seed"] for c in mine})
        line = f"python pipelines/benchmarks/quality.py --rows {','.join(f'{row}:{e:g}' for e in epsilons or [8.0])}"
        line += f" --methods {','.join(methods)} --seeds {','.join(map(str, seeds))} --out results"
        line += f" --recipe pipelines/{recipe}.yaml" if recipe else ""
        lines.append(line + (" --seeded-noise" if any(c["noise"] == "seeded" for c in mine) else ""))
    return lines


def _table(epsilon: float | None, mine: Sequence[Result], fixed: Sequence[Result]) -> list[str]:
    first = (*mine, *fixed)[0]
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for cell in (*mine, *fixed):
        groups[cell["method"], cell["recipe"]].append(cell)
    order = {name: i for i, name in enumerate(NAMES)}
    keys = sorted(groups, key=lambda k: (order.get(k[0], len(order)), k[1]))
    measure = first["measure"]
    parts = sorted({n for c in (*mine, *fixed) for n in c["scores"] if n.startswith(f"{measure}/")})
    parts = parts if len(parts) > 1 else []
    relative = [f"{measure} / real"] if first["relative"] else []
    head = ["method", "epsilon", measure, *relative, *parts, "Fréchet", "Inception FID", "recall", "coverage"]
    head += ["recall / coverage over non-private", "core-hours", "seeds"]
    spent = f"epsilon {epsilon:g}" if epsilon is not None else "ceilings"
    deltas = sorted({f"{c['delta']:.3g}" for c in mine if c["delta"] is not None})
    trained = _span(c["train_patients"] for c in (*mine, *fixed))
    delta = f", delta {', '.join(deltas)}" if deltas else ""
    lines = [f"### {spent}{delta}, {trained} training patients", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key in keys:
        group = groups[key]
        cells = [NAMES.get(key[0], key[0]) + (f", recipe {key[1]}" if key[1] else "")]
        cells.append(_spread([c["epsilon"] for c in group], 3))
        cells.append(_spread([c["scores"][measure] for c in group], 4))
        cells += [_spread(ratios(group, fixed), 4) for _ in relative]
        cells += [_spread([c["scores"].get(name) for c in group], 4) for name in parts]
        cells.append(_spread([c["fidelity"]["frechet"] for c in group], 2))
        cells.append(_spread([c["fidelity"]["inception_fid"] for c in group], 2, "not run"))
        cells += [_spread([c["fidelity"][name] for c in group], 3) for name in ("recall", "coverage")]
        cells.append(" / ".join(_number(v, 2) for v in diversity(group, fixed)))
        hours = [(c["train_cpu_s"] + c["generate_cpu_s"]) / 3600 for c in group]
        cells += ["" if key[0] == "real" else _number(statistics.fmean(hours), 3), str(len(group))]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *_verdict(epsilon, first, groups, fixed), ""]


def ratios(group: Sequence[Result], fixed: Sequence[Result]) -> list[float]:
    """Return the measure of each cell over the ceiling: that of its own fold, or the mean over all seeds."""
    measure = group[0]["measure"]
    ceilings = {c["seed"]: c["scores"][measure] for c in fixed if c["method"] == "real"}
    if not ceilings:
        return []
    if group[0]["folds"]:
        return [c["scores"][measure] / ceilings[c["seed"]] for c in group if c["seed"] in ceilings]
    mean = statistics.fmean(ceilings.values())
    return [c["scores"][measure] / mean for c in group]


def diversity(group: Sequence[Result], fixed: Sequence[Result]) -> list[float | None]:
    """Return mean recall and mean coverage over those of the non-private product, of the same recipe where it was run.

    None where the non-private model reaches less than 0.01, of which no share can be told.
    """
    every = [c for c in fixed if c["method"] == "nonprivate"]
    free = [c for c in every if c["recipe"] == group[0]["recipe"]] or [c for c in every if not c["recipe"]]
    found: list[float | None] = []
    for name in ("recall", "coverage"):
        best = statistics.fmean(c["fidelity"][name] for c in free) if free else 0.0
        own = statistics.fmean(c["fidelity"][name] for c in group)
        found.append(own / best if best >= 0.01 else None)
    return found


def _verdict(
    epsilon: float | None,
    first: Result,
    groups: dict[tuple[str, str], list[Result]],
    fixed: Sequence[Result],
) -> list[str]:
    """Say of each target whether the product's mean reaches it, and of each rival whether it lies behind."""
    product = next((g for (name, recipe), g in groups.items() if name == "product" and not recipe), None)
    if epsilon is None or product is None:
        return []
    values = ratios(product, fixed) if first["relative"] else [c["scores"][first["measure"]] for c in product]
    said = []
    for word, key in (("target", "targets"), ("stretch", "stretch")):
        target = first[key].get(f"{epsilon:g}")
        if target is not None and values:
            mean = statistics.fmean(values)
            said.append(f"{word} {target:g}: {'reached' if mean >= target else 'missed'} with {mean:.4f}")
        elif target is not None:
            said.append(f"{word} {target:g}: not measured, the ceiling was not run")
    wanted = DIVERSITY.get(epsilon)
    if wanted is not None:
        for name, value in zip(("recall", "coverage"), diversity(product, fixed), strict=True):
            told = "not measured" if value is None else f"{'reached' if value >= wanted else 'missed'} with {value:.2f}"
            said.append(f"{name} over non-private, target {wanted:g}: {told}")
    own = statistics.fmean(c["scores"][first["measure"]] for c in product)
    for rival in RIVALS:
        group = groups.get((rival, ""))
        if group is None:
            said.append(f"{NAMES[rival]}: not run")
        else:
            other = statistics.fmean(c["scores"][first["measure"]] for c in group)
            said.append(f"{'ahead of' if own > other else 'NOT ahead of'} {NAMES[rival]} by {own - other:+.4f}")
    return [f"- {sentence}" for sentence in said]


def _spread(values: Sequence[float | None], digits: int, missing: str = "") -> str:
    found = [v for v in values if v is not None]
    if not found:
        return missing
    mean = f"{statistics.fmean(found):.{digits}f}"
    return mean if len(found) < 2 else f"{mean} ± {statistics.stdev(found):.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _span(values: Any) -> str:
    found = sorted(set(values))
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"
