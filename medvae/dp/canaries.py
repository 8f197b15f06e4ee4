"""The canary audit of one run: coins committed to before the first step, and a verdict that anyone can recompute.

`judge` needs nothing but canary.json and the claim: the same function decides at the end of training, at the gate and
in `medvae verify`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from medvae.dp import onerun
from medvae.dp.accounting import pld_epsilon
from medvae.dp.conformance import ANSWERS, Answer, answers, is_number, noise_interval
from medvae.dp.noise import NoiseSource
from medvae.dp.onerun import Bools, Floats
from medvae.dp.tradeoff import miss_bound
from medvae.dp.walks import WALK_ANSWERS, walk_answers
from medvae.errors import ConfigError
from medvae.types import Mechanism

SCHEMA = "medvae.canary/1"
# A correct build is refuted with probability at most the sum of the two; by Clopper and Pearson's caution, far less.
ACCUSATION_LEVEL = 0.05
CONFORMANCE_LEVEL = 0.001
CONFIDENCE = 0.95
# Power at which the smallest visible fault is stated.
POWER = 0.9

# What `judge` adds to canary.json.
JUDGED = ("results", "checks", "verdict", "reasons", "words")

TORN = "canary.json is torn or was altered: its coins, scores and statistics do not fit together"

Verdict = Literal["PASS", "REFUTED", "NOT_MEASURABLE"]


@dataclass(frozen=True)
class Commitment:
    """Coins (m,), the salt that hides them until they are opened, and all that was fixed before the first step."""

    coins: Bools
    salt: str
    registration: Mapping[str, Any]
    digest: str

    @property
    def holds(self) -> bool:
        """Whether the digest is that of salt, registration and coins."""
        return self.digest == _digest(self.salt, self.registration, flips(self.coins))

    def public(self) -> dict[str, Any]:
        """Return what is published before the first step."""
        return {"schema": "medvae.commitment/1", "digest": self.digest, "registration": dict(self.registration)}

    def to_json(self) -> dict[str, Any]:
        """Return all of it; private until the run has ended."""
        return {**self.public(), "salt": self.salt, "flips": flips(self.coins)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Commitment:
        """Read what `to_json` wrote."""
        return cls(read_flips(data["flips"]), str(data["salt"]), dict(data["registration"]), str(data["digest"]))


@dataclass(frozen=True)
class Judgement:
    """What the canaries say of a run.

    answers: every test of conformance; results: one a part of the claim; words: for a lay reader.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    answers: tuple[Answer, ...]
    results: tuple[Mapping[str, Any], ...]
    words: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the part of canary.json that is recomputed."""
        return {
            "results": [dict(r) for r in self.results],
            "checks": [a.to_json() for a in self.answers],
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "words": list(self.words),
        }


def register(
    count: int,
    mechanisms: Sequence[Mechanism],
    scans_per_patient: int,
    patterns: int = 0,
    walks: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return what is fixed before the first step, beside the coins: the claim, and how it is to be tested.

    patterns, walks: how many patterned patients, and how often they walk the way of each mechanism.
    """
    return {
        **({"patterns": {"patients": patterns, "walks": dict(walks or {})}} if patterns else {}),
        "count": count,
        "scans_per_patient": scans_per_patient,
        "mechanisms": [m.to_json() for m in mechanisms],
        "calibrators": onerun.CALIBRATORS,
        "guess_share": onerun.GUESS_SHARE,
        "accusation_level": ACCUSATION_LEVEL,
        "conformance_level": CONFORMANCE_LEVEL,
    }


def commit(registration: Mapping[str, Any], source: NoiseSource) -> Commitment:
    """Toss a fair coin for each canary and commit to them."""
    coins = source.mask(int(registration["count"]), 0.5)
    salt = secrets.token_hex(32) if source.releasable else bytes(source.integers(32, 256).tolist()).hex()
    return Commitment(coins, salt, dict(registration), _digest(salt, registration, flips(coins)))


def parts(mechanisms: Sequence[Mechanism]) -> dict[str, list[Mechanism]]:
    """Return the parts of a claim that are tested: single releases, sampled ones, and all of it where it has both."""
    single = [m for m in mechanisms if m.sample_rate == 1 and m.count == 1]
    stepped = [m for m in mechanisms if m not in single]
    found = {"releases": single, "dpsgd": stepped, "all": list(mechanisms) if single and stepped else []}
    return {name: part for name, part in found.items() if part}


def document(
    commitment: Commitment,
    scores: Mapping[str, Floats],
    records: Sequence[Mapping[str, Any]],
    mechanisms: Sequence[Mechanism],
    delta: float,
    binding: Mapping[str, str],
    walks: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return canary.json. scores: (m,) by mechanism; records: of `conformance.Watch`; binding: receipt and model;
    walks: of `walks.WalkWatch`, where patterned patients walked.

    Nothing in it comes from a patient: scores are functions of noise, coins and made-up gradients, and walks of noise,
    made-up scans and weights that the claim covers.
    """
    opened = {
        "schema": SCHEMA,
        **binding,
        "delta": delta,
        "count": len(commitment.coins),
        "included": int(commitment.coins.sum()),
        "registration": dict(commitment.registration),
        "commitment": {"algorithm": "sha256", "digest": commitment.digest, "salt": commitment.salt},
        "flips": flips(commitment.coins),
        "parts": [
            {"name": name, "scores": [_short(s) for s in np.sum([scores[m.name] for m in part], axis=0)]}
            for name, part in parts(mechanisms).items()
            if name != "all"
        ],
        "conformance": [dict(r) for r in records],
        **({"walks": [dict(w) for w in walks]} if walks else {}),
    }
    return {**opened, **judge(opened, mechanisms, delta).to_json()}


def judge(document: Mapping[str, Any], mechanisms: Sequence[Mechanism], delta: float) -> Judgement:
    """Judge a claim by the published scores, opened coins and statistics of canary.json.

    mechanisms, delta: of the claim that is to be judged (certificate or privacy.json). REFUTED where a test shows that
    the build is not the one claimed, by chance with probability at most ACCUSATION_LEVEL + CONFORMANCE_LEVEL.
    NOT_MEASURABLE where there are too few canaries for any outcome to refute. Raises ConfigError for a document that
    cannot be read.
    """
    coins, scores, records = _read(document)
    found = [_committed(document, coins), _same_claim(document, records, mechanisms)]
    if not all(a.ok for a in found):
        return _conclude(found, [], [])
    included, out = int(coins.sum()), int((~coins).sum())
    each = CONFORMANCE_LEVEL / ((ANSWERS + WALK_ANSWERS) * len(mechanisms))
    for record, mechanism in zip(records, mechanisms, strict=True):
        found += answers(record, mechanism, included, out, each)
    found += _walked(document, mechanisms, each)
    claimed = parts(mechanisms)
    results = []
    for name, part in claimed.items():
        of_part = sum(scores.values()) if name == "all" else scores[name]
        results.append(_result(name, np.asarray(of_part), coins, part, ACCUSATION_LEVEL / len(claimed), delta))
    judged = _conclude(found, results, mechanisms, records)
    return replace(judged, words=(*judged.words, *walk_words(document.get("walks") or ())))


def _walked(document: Mapping[str, Any], mechanisms: Sequence[Mechanism], level: float) -> list[Answer]:
    """Test the walks that were registered; none were before patterned patients were known."""
    registered = (document["registration"].get("patterns") or {}).get("walks") or {}
    records = {str(w["mechanism"]): w for w in document.get("walks") or ()}
    if set(records) != set(registered):
        return [Answer("walks", False, "patterned patients did not walk the way of every mechanism as registered")]
    try:
        return [a for m in mechanisms if m.name in records for a in _walk(records[m.name], registered, m, level)]
    except (KeyError, TypeError, ValueError, IndexError):
        raise ConfigError(TORN) from None


def _walk(record: Mapping[str, Any], registered: Mapping[str, Any], m: Mechanism, level: float) -> list[Answer]:
    return walk_answers(record, m, int(registered[m.name]), level)


def unjudged(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was seen of a run, coins opened: canary.json without what is judged from it."""
    return {key: value for key, value in document.items() if key not in JUDGED}


def unjudged_digest(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of `unjudged`, which the ledger holds from the run's end: what was seen is fixed by then."""
    text = json.dumps(unjudged(document), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flips(coins: Bools) -> str:
    """Write coins as a string of 0 and 1."""
    return "".join("1" if c else "0" for c in coins)


def read_flips(text: str) -> Bools:
    """Read what `flips` wrote; raises ValueError for anything else."""
    if not text or set(text) - {"0", "1"}:
        raise ValueError("coins are not a string of 0 and 1")
    return np.asarray([c == "1" for c in text], dtype=np.bool_)


def visible_factor(mechanisms: Sequence[Mechanism], included: int, out: int, level: float) -> float | None:
    """Return the largest noise over the claimed one that the accusation test finds with probability POWER.

    By the normal approximation of the scores' sums over steps; None where even no noise would hardly be found.
    """
    # Few of all counts of errors matter: the curve is asked for those alone.
    misses_allowed = lru_cache(None)(lambda k: float(miss_bound(mechanisms, onerun.upper(k, out, level / 2))))
    worst = onerun.upper(np.arange(included + 1), included, level / 2)
    rng = np.random.default_rng(0)

    def power(factor: float) -> float:
        from scipy.special import ndtr

        moments = np.sum([onerun.score_moments(m, noise_factor=factor) for m in mechanisms], axis=0)
        (mean_out, spread_out), (mean_in, spread_in) = moments
        half = (mean_in - mean_out) / 2
        false = rng.binomial(out, ndtr(-half / max(spread_out, 1e-30) ** 0.5), 400)
        missed = rng.binomial(included, ndtr(-half / max(spread_in, 1e-30) ** 0.5), 400)
        return float((worst[missed] < np.vectorize(misses_allowed)(false)).mean())

    low, high = 0.01, 1.0
    if power(low) < POWER:
        return None
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) >= POWER else (low, middle)
    return round(low, 3)


def measurable(mechanisms: Sequence[Mechanism], included: int, out: int, level: float) -> bool:
    """Whether scores without a single error would accuse."""
    if not (included and out):
        return False
    scores, coins = np.repeat([1.0, -1.0], [included, out]), np.repeat([True, False], [included, out])
    return any(r.accuses for r in onerun.accusation(scores, coins, [0.0], level, lambda a: miss_bound(mechanisms, a)))


def _result(
    name: str, scores: Floats, coins: Bools, mechanisms: Sequence[Mechanism], level: float, delta: float
) -> dict[str, Any]:
    threshold, tested, tested_coins = onerun.calibrated(scores, coins)
    included, out = int(tested_coins.sum()), int((~tested_coins).sum())
    found: dict[str, Any] = {"part": name, "mechanisms": [m.name for m in mechanisms], "confidence": CONFIDENCE}
    found["measurable"] = is_number(threshold) and measurable(mechanisms, included, out, level)
    found["accused"] = False
    if not found["measurable"]:
        return found
    rows = onerun.accusation(tested, tested_coins, [threshold], level, lambda a: miss_bound(mechanisms, a))
    return {
        **found,
        "accused": any(r.accuses for r in rows),
        "level": level,
        "rows": [{**asdict(r), "accuses": r.accuses} for r in rows],
        "claimed_epsilon": pld_epsilon(mechanisms, delta),
        **onerun.estimates(scores, coins, mechanisms, 1 - CONFIDENCE, delta),
        "visible_noise_factor": visible_factor(mechanisms, included, out, level),
    }


def _conclude(
    found: Sequence[Answer],
    results: Sequence[Mapping[str, Any]],
    mechanisms: Sequence[Mechanism],
    records: Sequence[Mapping[str, Any]] = (),
) -> Judgement:
    reasons = [f"{a.name}: {a.detail}" for a in found if not a.ok]
    reasons += [
        f"accusation by the scores of {r['part']}: canaries that took part are recognised more surely than the claim "
        "allows to anyone"
        for r in results
        if r["accused"]
    ]
    verdict: Verdict = "REFUTED" if reasons else "PASS"
    if not reasons and not any(r["measurable"] for r in results):
        verdict = "NOT_MEASURABLE"
        reasons = ["there are too few canaries for any outcome to refute the claim: give canaries.count 1000 or more"]
    return Judgement(
        verdict, tuple(reasons), tuple(found), tuple(results), tuple(_words(verdict, results, mechanisms, records))
    )


def walk_words(walks: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Say in words what the walks of patterned patients showed; nothing where there were none."""
    if walks:
        patients, cut = (sum(int(w[key]) for w in walks) for key in ("patients", "clipped"))
        worst = max(float(w["gap"]) / float(w["tolerance"]) for w in walks)
        off = "are their true sums but for rounding" if worst <= 1 else "are not what they should be"
        yield (
            f"On the model's own path, sums of {patients} contributions of patterned made-up patients ({cut} of them "
            f"longer than the clip) {off}."
        )


def _words(
    verdict: Verdict,
    results: Sequence[Mapping[str, Any]],
    mechanisms: Sequence[Mechanism],
    records: Sequence[Mapping[str, Any]],
) -> Iterable[str]:
    yield {
        "PASS": "Made-up patients that walked through the training with the real ones found nothing that speaks "
        "against the claim. That is no proof; the proof is the mathematics, if built as described.",
        "REFUTED": "Made-up patients that walked through the training with the real ones show that it was not the one "
        "that is claimed: the claim does not hold for this run.",
        "NOT_MEASURABLE": "There were too few made-up patients in this training to test its claim.",
    }[verdict]
    for r in results:
        if not r["measurable"]:
            continue
        factor = r["visible_noise_factor"]
        yield (
            f"{r['part']}: the claim is epsilon {r['claimed_epsilon']:.3g}; from this one run alone, epsilon is at "
            f"least {r['fdp_epsilon']:.2f} by guesses and {r['rates_epsilon']:.2f} by error rates (each at "
            f"{r['confidence']:.0%} confidence)"
            + ("." if factor is None else f"; noise of {factor:.2g} of the claim's would be accused 9 times in 10.")
        )
    for record, mechanism in zip(records, mechanisms, strict=True):
        if record["steps"] and record["noise"]["coordinates"]:
            value, low, high = noise_interval(record, mechanism, CONFIDENCE)
            yield (
                f"{mechanism.name}: the noise is {value:.4f} of the claimed one "
                f"({CONFIDENCE:.0%} interval {low:.4f} to {high:.4f})."
            )


def _committed(document: Mapping[str, Any], coins: Bools) -> Answer:
    opened, registration = document["commitment"], document["registration"]
    holds = opened["digest"] == _digest(str(opened["salt"]), registration, flips(coins))
    said = "is that of the opened coins" if holds else "is not that of the opened coins, salt and registration"
    return Answer("commitment", holds, f"the digest {said}")


def _same_claim(
    document: Mapping[str, Any], records: Sequence[Mapping[str, Any]], mechanisms: Sequence[Mechanism]
) -> Answer:
    claimed, registered = [m.to_json() for m in mechanisms], document["registration"]["mechanisms"]
    seen = [str(r["mechanism"]) for r in records]
    if registered != claimed:
        return Answer("claim", False, "the claim is not the one that was registered before the first step")
    if seen != [m.name for m in mechanisms]:
        return Answer("claim", False, f"canaries saw {', '.join(seen) or 'nothing'}, and the claim charges other parts")
    return Answer("claim", True, "as registered before the first step, and every part of it was watched")


def _read(document: Mapping[str, Any]) -> tuple[Bools, dict[str, Floats], list[Mapping[str, Any]]]:
    broken = ConfigError(TORN)
    try:
        if document["schema"] != SCHEMA:
            raise ConfigError(f"canary.json is not of version {SCHEMA}: use the medvae that wrote it")
        coins = read_flips(document["flips"])
        scores = {str(p["name"]): np.asarray(p["scores"], dtype=np.float64) for p in document["parts"]}
        records: list[Mapping[str, Any]] = [dict(r) for r in document["conformance"]]
        registered = [Mechanism.from_json(m) for m in document["registration"]["mechanisms"]]
        fits = (
            all(s.shape == coins.shape and is_number(s) for s in scores.values())
            and set(scores) == set(parts(registered)) - {"all"}
            and len(coins) == document["count"] == document["registration"]["count"]
            and int(coins.sum()) == document["included"]
        )
        _ = (document["commitment"]["digest"], document["commitment"]["salt"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise broken from None
    if not fits:
        raise broken
    return coins, scores, records


def _digest(salt: str, registration: Mapping[str, Any], coins: str) -> str:
    body = json.dumps({"salt": salt, "registration": registration, "flips": coins}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(body.encode()).hexdigest()


def _short(score: float) -> float:
    """Keep nine digits: more would tell nothing, and a score without noise may be beyond any number."""
    return float(f"{np.clip(score, -1e12, 1e12):.9g}")
