"""The zoo of broken builds as a table: which check finds each, and with what probability. Writes docs/audit-zoo.md.

    python pipelines/benchmarks/zoo.py --simulated 300 --real 20 --runs zoo.jsonl --out docs/audit-zoo.md

Real trainings are written to --runs as they end, and those that are there are not made again, so a stopped command is
simply given again. Keep no such file over a change of the code.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
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
    parser.add_argument("--runs", type=Path, help="file of real trainings, one a line, that grows and is gone on with")
    parser.add_argument("--out", type=Path, help="write the page here too, say to docs/audit-zoo.md")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(asked.runs)
    makers = {
        "canaries": lambda: _canaries(runs, asked.real, asked.simulated),
        "patterns": lambda: _patterns(runs, asked.real),
        "other": _others,
        "right": lambda: _right(runs, asked.real, asked.simulated),
    }
    head = _head(asked.real, asked.simulated) if set(asked.tables) == set(TABLES) else ""
    text = head + "\n".join(makers[name]() for name in TABLES if name in asked.tables)
    if asked.out is not None:
        asked.out.write_text(text, encoding="utf-8")
    print(text)


class Runs:
    """Outcomes of real trainings by the name of their build, kept in a file where one is given."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._known = path, dict[str, list[Outcome]]()
        for line in path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else ():
            found = json.loads(line)
            lists = {k: tuple(v) if isinstance(v, list) else v for k, v in found["outcome"].items()}
            self._known.setdefault(found["build"], []).append(Outcome(**lists))

    def of(self, name: str, train: Callable[[], Outcome], count: int) -> list[Outcome]:
        """Return so many outcomes of a build; those that are missing are made now."""
        outcomes = self._known.setdefault(name, [])
        while len(outcomes) < count:
            outcomes.append(train())
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"build": name, "outcome": asdict(outcomes[-1])}) + "\n")
        return outcomes[:count]


def _canaries(made: Runs, real: int, simulated: int) -> str:
    rows = []
    for build in track([b for b in ALL if b.finder != "patterns"], "canaries"):
        sims = [simulate(build.sim) for _ in range(simulated)] if build.sim is not None else []
        runs = made.of(build.name, partial(_train, build), real)
        rows.append([build.name, build.finder, *_shares(runs)[:2], *_shares(sims)[:2], _refused(build)])
    columns = ["Meant for", "Real: scores", "conformance", "Simulated: scores", "conformance", "Before training"]
    return "## Found by canaries\n\n" + _lines(["Broken build", *columns], rows)


def _patterns(made: Runs, real: int) -> str:
    rows = []
    for build in track([b for b in ALL if b.finder == "patterns"], "patterned patients"):
        scores, conformance, patterns = _shares(made.of(build.name, partial(_train, build), real))
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


def _right(made: Runs, real: int, simulated: int) -> str:
    kinds = {
        "simulated DP-SGD": [simulate() for _ in range(max(1000, simulated))],
        "real DP-SGD": made.of("right, DP-SGD", world.train_dpsgd, max(50, real)),
        "real releases": made.of("right, releases", world.train_moments, max(50, real)),
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
