"""The few data types that pass between rooms. Numpy only: no torch, no file formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from medvae.errors import ConfigError, InputError, PrivacyError

T = TypeVar("T")
FloatArray = npt.NDArray[np.float32]
Provenance = Literal["public", "dp", "canary", "private"]
ConditionValue = str | float
Progress = Callable[[int, int], None]  # (done, total)

# The class of a condition whose value a scan lacks, where a cohort is told to keep such scans.
MISSING_CLASS = "missing"
PROVENANCES: tuple[Provenance, ...] = ("public", "dp", "canary", "private")
SHAREABLE: frozenset[str] = frozenset({"public", "dp", "canary"})


class Private(Generic[T]):
    """Wraps a value that must not leave: masked when printed, never pickled, unwrapped by name only."""

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value = value

    def reveal(self) -> T:
        """Return the wrapped value; a call of this name is what a reviewer searches for."""
        return self._value

    def __repr__(self) -> str:
        return f"Private({type(self._value).__name__})"

    def __reduce__(self) -> NoReturn:
        raise PrivacyError("a private value was about to be pickled: keep it in memory or in the run's private/ folder")


@dataclass(frozen=True)
class Condition:
    """One thing a scan is conditioned on. Class names and ranges are public, by declaration of the user.

    A class is encoded one-hot (width = number of classes); a continuous covariate is scaled from its public
    range to [-1, 1] (width 1) and clipped there, so that its norm is bounded whatever the data hold. Ordered classes
    are continuous, too: `levels` names the whole numbers from 0 on, and the range spans them.
    """

    name: str
    kind: Literal["class", "continuous"]
    classes: tuple[str, ...] = ()
    range: tuple[float, float] | None = None
    levels: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Number of columns this condition takes in the encoded vector."""
        return len(self.classes) if self.kind == "class" else 1

    def encode(self, value: ConditionValue) -> FloatArray:
        """Encode one value as a vector of shape (width,)."""
        if self.kind == "class":
            if str(value) not in self.classes:
                raise InputError(
                    f"condition {self.name!r} has no class {str(value)!r}: use one of {', '.join(self.classes)}"
                )
            return np.asarray([float(str(value) == c) for c in self.classes], dtype=np.float32)
        low, high = self._bounds()
        if value in self.levels:
            value = float(self.levels.index(str(value)))
        try:
            number = float(value)
        except ValueError:
            raise InputError(f"condition {self.name!r} is a number between {low:g} and {high:g}") from None
        if not math.isfinite(number):
            raise InputError(f"condition {self.name!r} is not a finite number: leave such rows out")
        scaled = 2 * (number - low) / (high - low) - 1
        return np.asarray([min(1.0, max(-1.0, scaled))], dtype=np.float32)

    def decode(self, vector: npt.ArrayLike) -> ConditionValue:
        """Return the class name or the number that a vector of shape (width,) stands for."""
        v = np.asarray(vector, dtype=np.float64)
        if self.kind == "class":
            return self.classes[int(v.argmax())]
        low, high = self._bounds()
        return float(low + (v[0] + 1) * (high - low) / 2)

    def _bounds(self) -> tuple[float, float]:
        if self.range is None or not self.range[0] < self.range[1]:
            raise ConfigError(f"condition {self.name!r} needs a public range: give {self.name}=LOW:HIGH")
        return self.range

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form used in cohort.json and model.json, without the name."""
        if self.kind == "class":
            return {"kind": "class", "classes": list(self.classes)}
        levels = {"levels": list(self.levels)} if self.levels else {}
        return {"kind": "continuous", "range": list(self._bounds())} | levels

    @classmethod
    def from_json(cls, name: str, data: Mapping[str, Any]) -> Condition:
        """Read what `to_json` wrote."""
        bounds = data.get("range")
        return cls(
            name=name,
            kind=data["kind"],
            classes=tuple(data.get("classes", ())),
            range=None if bounds is None else (float(bounds[0]), float(bounds[1])),
            levels=tuple(data.get("levels", ())),
        )


def condition_width(conditions: tuple[Condition, ...]) -> int:
    """Return K, the number of columns of the encoded condition vector."""
    return sum(c.width for c in conditions)


def encode_conditions(conditions: tuple[Condition, ...], row: Mapping[str, ConditionValue]) -> FloatArray:
    """Encode one row of values as a vector of shape (K,), in the order of `conditions`."""
    missing = [c.name for c in conditions if c.name not in row]
    if missing:
        raise InputError(f"no value for condition {missing[0]!r}: give a column of that name")
    parts = [c.encode(row[c.name]) for c in conditions]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def decode_conditions(conditions: tuple[Condition, ...], vector: npt.ArrayLike) -> dict[str, ConditionValue]:
    """Return the row of values that an encoded vector of shape (K,) stands for."""
    v = np.asarray(vector)
    row: dict[str, ConditionValue] = {}
    start = 0
    for c in conditions:
        row[c.name] = c.decode(v[start : start + c.width])
        start += c.width
    return row


@dataclass(frozen=True)
class Intensity:
    """How raw values became [0, 1]: a public window, or each scan's own percentiles.

    mode "window": (raw - low) / (high - low), with low and high in raw units (HU for CT).
    mode "percentile": low and high are percentiles of the scan itself, in 0..100.
    """

    mode: Literal["window", "percentile"]
    low: float
    high: float


@dataclass(frozen=True)
class ImageSpace:
    """The public facts about what a model sees and makes: the same for every scan of a cohort.

    Images have the shape `spatial_shape` with values in [0, 1]; masks hold 0 or one of `mask_labels`.
    As a training array the channels are [image, one per mask label].
    """

    spatial_shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    modality: str
    intensity: Intensity
    conditions: tuple[Condition, ...]
    mask_labels: tuple[int, ...] = ()

    @property
    def spatial_dims(self) -> int:
        """2 or 3."""
        return len(self.spatial_shape)

    @property
    def channels(self) -> int:
        """One for the image and one a mask label."""
        return 1 + len(self.mask_labels)

    @property
    def condition_width(self) -> int:
        """K, the width of the encoded condition vector."""
        return condition_width(self.conditions)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form used in model.json."""
        return {
            "spatial_shape": list(self.spatial_shape),
            "spacing_mm": list(self.spacing_mm),
            "modality": self.modality,
            "intensity": {
                "mode": self.intensity.mode,
                "low": self.intensity.low,
                "high": self.intensity.high,
            },
            "conditions": {c.name: c.to_json() for c in self.conditions},
            "mask_labels": list(self.mask_labels),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageSpace:
        """Read what `to_json` wrote."""
        i = data["intensity"]
        return cls(
            spatial_shape=tuple(int(n) for n in data["spatial_shape"]),
            spacing_mm=tuple(float(s) for s in data["spacing_mm"]),
            modality=str(data["modality"]),
            intensity=Intensity(i["mode"], float(i["low"]), float(i["high"])),
            conditions=tuple(Condition.from_json(n, c) for n, c in data["conditions"].items()),
            mask_labels=tuple(int(m) for m in data["mask_labels"]),
        )


class Batch(NamedTuple):
    """Scans of the drawn patients, in memory only.

    x: (B, C, *spatial) float32, image in [0, 1] and masks in {0, 1}; condition: (B, K) float32;
    patient: (B,) int64, sorted, so that a patient's scans are one contiguous segment.
    """

    x: FloatArray
    condition: FloatArray
    patient: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Mechanism:
    """One release of private information, as the accountants see it.

    A Gaussian mechanism with `noise_multiplier` (noise standard deviation over L2 sensitivity), applied
    `count` times, each to a Poisson sample of the patients at `sample_rate` (1.0: to all of them).
    """

    name: str
    noise_multiplier: float
    sample_rate: float = 1.0
    count: int = 1

    def to_json(self) -> dict[str, Any]:
        """Return {"name", "event"} as privacy.json holds it."""
        kind = "gaussian" if self.sample_rate == 1.0 else "poisson_sampled_gaussian"
        event = {
            "type": kind,
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": self.sample_rate,
            "count": self.count,
        }
        return {"name": self.name, "event": event}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Mechanism:
        """Read what `to_json` wrote."""
        e = data["event"]
        return cls(str(data["name"]), float(e["noise_multiplier"]), float(e["sample_rate"]), int(e["count"]))


@dataclass(frozen=True)
class PrivacyPlan:
    """All that touches private data in one run, fixed before the first byte is read. Public.

    (epsilon, delta)-DP for the unit "patient" under add/remove neighbours: the two cohorts differ by all the
    scans of one patient. `epsilon` is the PLD total of `mechanisms` at `delta`; infinite when no noise is added.
    """

    epsilon: float
    delta: float
    patients: int
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    steps: int
    mechanisms: tuple[Mechanism, ...]
    unit: str = "patient"
    neighboring: str = "add-remove"
    accountant: str = "pld"

    @property
    def private(self) -> bool:
        """Whether noise is added at all."""
        return math.isfinite(self.epsilon)


@dataclass(frozen=True)
class Finding:
    """One measured number of an audit, with what is needed to judge it. `provenance` decides where it may go.

    value, low, high: the estimate and its 95 % interval; n: what it was measured on; baseline: the same number
    where nothing is wrong (real against real, or chance); control: the same number where the method must react.
    """

    name: str
    group: Literal["fidelity", "utility", "privacy"]
    value: float | None
    provenance: Provenance
    low: float | None = None
    high: float | None = None
    n: int | None = None
    baseline: float | None = None
    control: float | None = None
    verdict: str = ""

    def __post_init__(self) -> None:
        if self.provenance not in PROVENANCES:
            raise ConfigError(f"provenance {self.provenance!r} of finding {self.name!r} is not one of {PROVENANCES}")

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form used in audit.json."""
        names = ("name", "group", "value", "low", "high", "n", "baseline", "control", "provenance", "verdict")
        return {k: getattr(self, k) for k in names}


@dataclass(frozen=True)
class ModelRelease:
    """A trained model as the gate may take it: plain arrays and a JSON card, nothing of the training state.

    card: {"schema", "model", "space", "recipe"}; everything in it is public or a differentially private output.
    """

    weights: Mapping[str, npt.NDArray[Any]]
    card: Mapping[str, Any]

    @property
    def space(self) -> ImageSpace:
        """The image space the model generates in."""
        return ImageSpace.from_json(self.card["space"])


@dataclass(frozen=True)
class SyntheticCohort:
    """Generated scans; made only from a `ModelRelease`.

    images: (N, *spatial) float32 in [0, 1]; masks: (N, *spatial) uint8 of 0 and mask labels, or None;
    conditions: one row of values a scan.
    """

    images: FloatArray
    masks: npt.NDArray[np.uint8] | None
    conditions: tuple[Mapping[str, ConditionValue], ...]
    space: ImageSpace
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)
