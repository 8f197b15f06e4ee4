"""Defaults of the commands that use a trained model's codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from medvae.config import Count, Frozen, Probability

Split = Literal["train", "holdout", "all"]


class EncodeConfig(Frozen):
    """clusters: of k-means; without a number, as many as the class condition with the most classes has."""

    split: Split = "all"
    format: Literal["parquet", "csv", "npz"] = "parquet"
    clusters: Annotated[int, Field(ge=1, le=1000)] | None = None
    seed: int = 0


class ReconstructConfig(Frozen):
    """patients: at most so many, drawn by the seed; all where none is given."""

    split: Split = "holdout"
    patients: Count | None = None
    seed: int = 0


class DenoiseConfig(Frozen):
    """corruption: put on the scans first, so that there is a truth to compare with; None restores them as they are."""

    split: Split = "holdout"
    patients: Count | None = 64
    corruption: Literal["noise", "bias", "motion", "ghosting", "missing_slices"] | None = "noise"
    severity: Annotated[float, Field(gt=0, le=5)] = 1.0
    seed: int = 0


class ScoreConfig(Frozen):
    """false_alarm_rate: of normal patients flagged, at most; calibration: cohort with normal patients held out of
    training; normal: NAME=CLASS of those among them that are normal, all where it is None; adjust: "detail" takes away
    what fine detail alone explains of a score, by a line through at most `adjust_patients` training patients."""

    false_alarm_rate: Probability = 0.05
    calibration: Path | None = None
    normal: str | None = None
    adjust: Literal["nothing", "detail"] = "nothing"
    adjust_patients: Count = 500
    seed: int = 0


class WalkConfig(Frozen):
    """steps: pictures of a path; along: a continuous condition to walk along, or None for the codes themselves;
    start and end: NAME=VALUE of the conditions, others as in the middle of their range."""

    steps: Annotated[int, Field(ge=2, le=200)] = 9
    paths: Annotated[int, Field(ge=1, le=64)] = 6
    along: str | None = None
    start: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    reach: Annotated[float, Field(gt=0, le=10)] = 2.5
    seed: int = 0


class AugmentConfig(Frozen):
    """condition: the one to even out; bins: of a continuous one; most: synthetic scans at most; each: so many of every
    class or bin, in place of what it lacks."""

    condition: str | None = None
    bins: Annotated[int, Field(ge=2, le=100)] = 10
    most: Count = 10_000
    each: Count | None = None
    formats: tuple[Literal["nifti", "png", "npz"], ...] = ("npz",)
    seed: int = 0
