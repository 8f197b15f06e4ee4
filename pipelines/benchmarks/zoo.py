"""The zoo of broken builds as a table: which check finds each, and with what probability. Writes docs/audit-zoo.md.

python pipelines/benchmarks/zoo.py --simulated 300 --real 20 --out docs/audit-zoo.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.progress import track
from scipy.stats import beta

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "zoo"))

import zoo_world as world  # noqa: E402
from zoo_builds import ALL, Build, without_probe  # noqa: E402
from zoo_other import ALL as OTHERS  # noqa: E402
from zoo_simulate import simulate  # noqa: E402
from zoo_world import Outcome  # noqa: E402

HEAD = """# The zoo: broken builds, and what finds them

Each line is a private training with one fault, switched on by a patch in `tests/zoo`. The canary audit sees a run from
inside: 1,000 made-up patients walk through it, each if its coin says so ([what epsilon promises](privacy.md)). *Scores*
is the accusation test on the claimed trade-off curve; *conformance* tests noise, lengths and draws on the canaries'
coordinates; *patterns* tests sums and noise of patterned made-up patients on the model's own path. *Before training* is
the comparison of the gradient engine with plain autograd on made-up scans; it is switched off for the other columns, so
that they stand alone.

Real runs train a small network on {patients} patients of random images, {steps} steps at q = {rate} and epsilon
{epsilon:g} (releases: the closed form's five sums at epsilon {epsilon:g}); simulated runs draw what canaries would see
of the same claim. Shares of runs in which a fault was found; the lower end of the 95 % interval of a share of 1 is
{low_real:.2f} for {real} runs and {low_sim:.3f} for {simulated}.

Made by `python pipelines/benchmarks/zoo.py --simulated {simulated} --real {real}`.

"""


TABLES = ("canaries", "patterns", "other", "right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulated", type=int, default=300)
    parser.add_argument("--real", type=int, default=20)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="only these, without the head")
    parser.add_argument("--out", type=Path, help="write the page here too, say to docs/audit-zoo.md")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    makers = {
        "canaries": lambda: _canaries(asked.real, asked.simulated),
        "patterns": lambda: _patterns(asked.real),
        "other": _others,
        "right": lambda: _right(asked.real, asked.simulated),
    }
    head = _head(asked.real, asked.simulated) if set(asked.tables) == set(TABLES) else ""
    text = head + "\n".join(makers[name]() for name in TABLES if name in asked.tables)
    if asked.out is not None:
        asked.out.write_text(text, encoding="utf-8")
    print(text)


def _canaries(real: int, simulated: int) -> str:
    rows = []
    for build in track([b for b in ALL if b.finder != "patterns"], "canaries"):
        sims = [simulate(build.sim) for _ in range(simulated)] if build.sim is not None else []
        runs = [_train(build) for _ in range(real)]
        rows.append([build.name, build.finder, *_shares(runs)[:2], *_shares(sims)[:2], _refused(build)])
    columns = ["Meant for", "Real: scores", "conformance", "Simulated: scores", "conformance", "Before training"]
    return "## Found by canaries\n\n" + _lines(["Broken build", *columns], rows)


def _patterns(real: int) -> str:
    rows = []
    for build in track([b for b in ALL if b.finder == "patterns"], "patterned patients"):
        scores, conformance, patterns = _shares([_train(build) for _ in range(real)])
        rows.append([build.name, patterns, scores, conformance, _refused(build)])
    head = ["Broken build", "Real: patterns", "scores", "conformance", "Before training"]
    return "## Found by patterned patients\n\n" + _lines(head, rows)


def _refused(build: Build) -> str:
    with pytest.MonkeyPatch.context() as mp:
        build.patch(mp)
        return "found" if build.run == "dpsgd" and world.train_dpsgd(10).refused else ""


def _train(build: Build) -> Outcome:
    with pytest.MonkeyPatch.context() as mp:
        without_probe(mp)
        build.patch(mp)
        return world.train_dpsgd() if build.run == "dpsgd" else world.train_moments()


def _shares(outcomes: Sequence[Outcome]) -> list[str]:
    if not outcomes:
        return ["", "", ""]
    n = len(outcomes)
    each = [(o.accused, bool(o.failing), bool(o.walked)) for o in outcomes]
    return [f"{sum(hits) / n:.3g}" for hits in zip(*each, strict=True)]


def _others() -> str:
    rows = []
    for other in track(OTHERS, "other checks"):
        found = []
        for broken in (True, False):
            with pytest.MonkeyPatch.context() as mp:
                found.append(other.found(mp, broken))
        wrong, right = "found" if found[0] else "MISSED", "left alone" if not found[1] else "ACCUSED"
        rows.append([other.name, other.finder, wrong, right])
    return "## Found by other checks\n\n" + _lines(["Broken build", "Check", "Broken", "Right"], rows)


def _right(real: int, simulated: int) -> str:
    kinds = {
        "simulated DP-SGD": [simulate() for _ in range(max(1000, simulated))],
        "real DP-SGD": [world.train_dpsgd() for _ in range(max(50, real))],
        "real releases": [world.train_moments() for _ in range(max(50, real))],
    }
    rows = []
    for name, runs in kinds.items():
        hits, n = sum(o.found for o in runs), len(runs)
        accused, failing, walked = (
            sum(hits) for hits in zip(*((o.accused, bool(o.failing), bool(o.walked)) for o in runs), strict=True)
        )
        high = 1.0 if hits == n else float(beta.ppf(0.975, hits + 1, n - hits))
        rows.append([name, str(n), str(accused), str(failing), str(walked), f"{hits / n:.3g}", f"{high:.3g}"])
    head = ["Runs", "Number", "Accused by scores", "By conformance", "By patterns", "Share", "At most (97.5 %)"]
    level = "The accusation test is nominally at 5 %, conformance and patterns together at 0.1 %, a run.\n"
    return "## Correct builds\n\n" + _lines(head, rows) + "\n" + level


def _head(real: int, simulated: int) -> str:
    low = lambda n: float(beta.ppf(0.025, n, 1))  # noqa: E731
    return HEAD.format(
        patients=world.PATIENTS, steps=world.STEPS, rate=world.RATE, epsilon=world.EPSILON, real=real,
        simulated=simulated, low_real=low(real), low_sim=low(simulated),
    )  # fmt: skip


def _lines(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
