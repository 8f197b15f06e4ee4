"""What a command says to a person, made from the same object that --json prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]


def claim(privacy: Result) -> str:
    """Say an epsilon as it must always be said: with delta, unit, neighbouring relation and accountant."""
    epsilon = privacy["epsilon"]
    about = (
        f"delta {privacy['delta']:.3g}, unit {privacy['unit']}, {privacy['neighboring']} neighbours, "
        f"{privacy['accountant'].upper()} accountant"
    )
    return f"no differential privacy ({about})" if epsilon is None else f"epsilon {epsilon:.4g} ({about})"


def doctor(result: Result) -> list[str]:
    """Versions, devices, optional parts, problems."""
    machine = result["machine"]
    lines = [f"{name} {version or 'MISSING'}" for name, version in result["versions"].items()]
    lines += ["", f"machine: {machine['system']}, {machine['cores']} cores, {machine['memory_gb']} GB memory"]
    lines += [f"devices: {', '.join(result['devices']) or 'none: torch is missing'}"]
    for name, part in result["optional"].items():
        lines.append(
            f"optional {name}: {'found' if part['found'] else 'not found, ' + part['install']} ({part['for']})"
        )
    lines += [f"telemetry: {result['telemetry']}", ""]
    return lines + ([f"problem: {problem}" for problem in result["problems"]] or ["no problem found"])


def ingest(result: Result, cohort: Path) -> list[str]:
    """Counts, the split, what was skipped."""
    shape = " x ".join(str(n) for n in result["spatial_shape"])
    split = result["split"]
    held = split["holdout"] if isinstance(split["holdout"], int) else len(split["holdout"])
    lines = [
        f"{result['patients']} patients with {result['images']} scans of {shape}, masks: {_yes(result['masks'])}",
        f"{held} of the patients are held out for the audit",
    ]
    for name, about in result["conditions"].items():
        values = " | ".join(about["classes"]) if "classes" in about else " to ".join(f"{v:g}" for v in about["range"])
        lines.append(f"condition {name}: {values}")
    lines += [f"note: {note}" for note in result.get("notes", [])]
    lines += [f"skipped {part['count']}: {part['reason']}" for part in result["skipped"]]
    return [*lines, f"cohort: {cohort}", f"next: medvae train {cohort} --dp-epsilon 8 -o run"]


def plan(result: Result) -> list[str]:
    """The plan, a table of epsilons, cost, bounds in words, warnings."""
    lines = [
        f"{result['patients']} training patients; no scan was read and nothing is charged",
        *_asked(result),
        claim(result),
        f"steps {result['steps']}, sample rate {result['sample_rate']:.4g}, noise multiplier "
        f"{result['noise_multiplier']:.4g}, clipping norm {result['max_grad_norm']:g}, "
        f"{result['parameters']:,} trained parameters",
    ]
    if result["cost"] is not None:
        cost = result["cost"]
        lines.append(
            f"about {cost['total_seconds']:.0f} s of training here ({cost['step_seconds']:.2g} s a step, measured on "
            f"made-up scans), peak memory so far {cost['memory_gb']:.1f} GB"
        )
    if result["table"]:
        lines += ["", "noise multiplier by epsilon (delta, unit, neighbours, accountant as above):"]
        for row in result["table"]:
            lines += [f"  {row['asked']:>6g}  {row['noise_multiplier']:.3f}", f"          {row['words']}"]
    lines += ["", "what it means:", *_meaning(result)]
    return lines + [f"warning: {line}" for line in result["warnings"]]


def train(result: Result) -> list[str]:
    """The claim, what it means, where the run is."""
    lines = [*_asked(result), claim(result), *_meaning(result)]
    lines += [f"warning: {line}" for line in result.get("warnings", [])]
    run = result["run"]
    following = f"next: medvae audit {run} -o report"
    if result["releasable"]:
        following += f"; medvae release {run} -o release --report report"
    lines += [f"not releasable: {reason}" for reason in result["reasons"]]
    return [*lines, f"run: {run}", following]


def audit(result: Result, report: Path) -> list[str]:
    """Each finding beside its baseline and control, the decision, the pages."""
    lines = ["private statistics, for those who may see the scans; what may leave is in the public report"]
    for f in result["findings"]:
        lines.append(f"{f['group']:<8} {f['name']}: {_interval(f)}{_beside(f)} {f['verdict']}".rstrip())
    lines.append(f"decision: {_decision(result['decision'])}")
    return [
        *lines,
        f"internal report: {report / 'internal' / 'audit.html'}",
        f"public: {report / 'public' / 'audit.html'}",
    ]


def release(result: Result, folder: Path) -> list[str]:
    """What was written, and how others check it."""
    lines = [claim(result), *_meaning(result)]
    if result["override"] is not None:
        lines += [f"OVERRIDDEN: {line}" for line in result["override"]["overridden"]]
        lines.append(f"reason, printed in certificate and report: {result['override']['reason']}")
    return [*lines, f"release: {folder}", f"anyone can check it: medvae verify {folder}"]


def verify(result: Result) -> list[str]:
    """One line a check."""
    lines = [f"{'ok' if c['ok'] else 'FAILED':<7} {c['name']}: {c['detail']}" for c in result["checks"]]
    return [*lines, "verified: the release is what its certificate says" if result["ok"] else "NOT verified"]


def ledger(result: Result) -> list[str]:
    """One line a run, then the sum; every epsilon stands at the delta of the last line."""
    lines = []
    for run in result["runs"]:
        cost = "no privacy" if run["epsilon"] is None else f"epsilon {run['epsilon']:.4g}"
        state = "ended" if run["ended"] else "not ended, stays charged"
        lines.append(f"{run['utc']}  {run['run_id']}  {cost}  {state}  {run['note']}".rstrip())
        lines.append(f"    {run['words']}")
    left = "no budget is set: give one with --budget"
    if result["budget"] is not None:
        left = f"budget {result['budget']:g}, left {result['remaining']:.4g}"
    spent = f"spent by {len(result['runs'])} runs together: {claim({**result, 'epsilon': result['spent']})}"
    return [*lines, spent, f"    {result['words']}", left]


def demo(result: Result) -> list[str]:
    """Where everything is."""
    return [
        "the cohort is made of phantoms: no real scan is involved",
        claim(result["privacy"]),
        *_meaning(result["privacy"]),
        f"report:  {result['report']}",
        f"release: {result['release']} (verified: {_yes(result['verified'])})",
    ]


def _asked(result: Result) -> list[str]:
    """Say what was asked for, where it was a risk and the epsilon follows from it."""
    asked = result.get("asked") or {}
    if "max_advantage" in asked:
        return [f"asked: no membership attack with an advantage (TPR - FPR) above {asked['max_advantage']:g}"]
    if "max_reid_risk" in asked:
        return [
            f"asked: a guess that is right {100 * asked['baseline']:.4g} % of the time without the release is right at "
            f"most {100 * asked['max_reid_risk']:.4g} % of the time with it"
        ]
    return []


def _meaning(result: Result) -> list[str]:
    """The plain words without the first, which is the claim again, where there is one."""
    words = result["plain_words"] if result["epsilon"] is None else result["plain_words"][1:]
    return [f"  {line}" for line in words]


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _interval(finding: Result) -> str:
    if finding["value"] is None:
        return "not measured"
    if finding["low"] is None or finding["high"] is None:
        return f"{finding['value']:.4g}"
    return f"{finding['value']:.4g} [{finding['low']:.4g}, {finding['high']:.4g}]"


def _beside(finding: Result) -> str:
    beside = [f"{k} {finding[k]:.4g}" for k in ("baseline", "control") if finding[k] is not None]
    return f" ({', '.join(beside)})" if beside else ""


def _decision(decision: Any) -> str:
    return (
        str(decision.get("verdict", decision.get("decision", ""))) if isinstance(decision, Mapping) else str(decision)
    )
