"""The choice of a strategy: each is timed once for each layer shape, batch size and machine."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from medvae.train.checkpoint import write_json
from medvae.train.engine.convolution import ConvCall
from medvae.train.engine.strategies import GHOST, Found, Key, LinearCall, norms_of, summed, weighted_sum

# A strategy is timed so many times at most, or until it took its share.
TURNS, SHARE_SECONDS = 7, 0.1
FILE = "strategies.json"
# For fewer patients a loop over them is never far from the best, and every convolution tried leaves compiled code.
FEW = 3


class Tuner:
    """Times the strategies once for each layer shape, batch size and machine, and remembers the fastest.

    A call that is met for the first time takes the first strategy and is noted. `settle`, called when the step's
    memory is free again, times what was noted on made-up numbers: nothing about a patient enters a choice, and the
    step needs no memory for strategies that it does not use.
    """

    def __init__(self, choices: Mapping[str, str] | None = None, *, fixed: str | None = None) -> None:
        """Start from choices made before, so that a run that resumes repeats them.

        `fixed` names a strategy to use wherever it can be, without timing: for tests and repeatable runs.
        """
        self._given = dict(choices or {})
        self._memory: dict[Key, str] = {}
        self._noted: dict[Key, tuple[ConvCall | LinearCall, torch.device, bool]] = {}
        self._fixed = fixed

    @property
    def choices(self) -> dict[str, str]:
        """Strategy by layer shape, batch size and machine: the choices made or given so far."""
        return self._given | {_text(key): name for key, name in self._memory.items()}

    def choose(self, call: ConvCall | LinearCall, *, may_defer: bool) -> Callable[[], Found]:
        """Return the strategy for this call."""
        names = _candidates(call, may_defer)
        if isinstance(call, ConvCall) and call.segments.patients < FEW and self._fixed is None:
            names = names[:1]
        if len(names) == 1 or self._fixed is not None:
            return call.strategy(self._fixed if self._fixed in names else names[0])
        key = (*call.key, may_defer)
        if key not in self._memory:
            given = self._given.get(_text(key))
            if given not in names:
                self._noted.setdefault(key, (call.blank(), call.x.device, may_defer))
                return call.strategy(names[0])
            self._memory[key] = given
        return call.strategy(self._memory[key])

    def settle(self) -> bool:
        """Time the strategies of the calls that were met for the first time; return whether there were any."""
        noted, self._noted = self._noted, {}
        for key, (blank, device, may_defer) in noted.items():
            call = blank.like(device)
            works = {n: _whole(call, call.strategy(n)) for n in _candidates(call, may_defer)}
            with torch.no_grad():
                self._memory[key] = fastest(works, device)
        return bool(noted)


def _candidates(call: ConvCall | LinearCall, may_defer: bool) -> list[str]:
    return [n for n in call.candidates() if may_defer or n != GHOST]


def _text(key: Key) -> str:
    return " ".join("x".join(map(str, k)) if isinstance(k, tuple) else str(k) for k in key)


def _whole(call: ConvCall | LinearCall, strategy: Callable[[], Found]) -> Callable[[], object]:
    """Return all the work that a strategy makes: the bias, norms and the weighted sum too."""
    factor = torch.ones(call.segments.patients, device=call.x.device)
    factors = factor.tolist()

    def whole() -> object:
        found = strategy()
        by_bias = found.by_bias
        if by_bias is None and isinstance(call, ConvCall) and call.bias:
            by_bias = call.gradient.flatten(2).sum(2)
        if found.rows is None:
            return by_bias, call.weighted(None, call.segments.spread(factor))
        if isinstance(found.rows, list):
            return by_bias, weighted_sum([r.float() for r in found.rows], list(range(len(factors))), factors)
        rows = found.rows.float()
        return by_bias, norms_of(rows), summed(factor, rows)

    return whole


def fastest(works: Mapping[str, Callable[[], object]], device: torch.device) -> str:
    """Return the name of the work that took least, in its best of a few turns after one to warm up.

    One that takes twice as long as the best so far, or has had its share of time, is not tried again.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(works, math.inf)
    spent = dict.fromkeys(works, 0.0)
    for turn in range(TURNS + 1):
        least = min(best.values())
        for name, work in works.items():
            if turn > 1 and (best[name] > 2 * least or spent[name] > SHARE_SECONDS):
                continue
            _synchronise(device)
            begun = clock()
            work()
            _synchronise(device)
            taken = clock() - begun
            if turn:
                best[name] = min(best[name], taken)
                spent[name] += taken
    return min(best, key=lambda name: best[name])


def _synchronise(device: torch.device) -> None:
    """Wait for what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def load_choices(folder: Path) -> dict[str, str]:
    """Return the choices stored with a run, or none: they only make a resumed run repeat itself."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def save_choices(folder: Path, choices: Mapping[str, str]) -> None:
    """Store the choices with a run: facts about layers and the machine."""
    write_json(folder / FILE, dict(sorted(choices.items())))
