"""All defaults, once: frozen pydantic models. None means 'chosen by the rule from public numbers' (train/rule.py)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medvae.errors import ConfigError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Frozen(BaseModel):
    """A config: unknown keys are refused, and a change is a new value."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class IngestConfig(Frozen):
    """How real scans become a cohort store. Constants only: nothing is estimated over the cohort."""

    shape: tuple[Count, ...] | None = None
    spacing_mm: tuple[Positive, ...] | None = None
    labels: Path | None = None
    modality: Annotated[str, Field(pattern="^[A-Z]{2,3}$")] | None = None
    conditions: tuple[str, ...] = ()
    intensity: Literal["auto", "window", "percentile", "display"] = "auto"
    intensity_low: float | None = None
    intensity_high: float | None = None
    holdout: Annotated[float, Field(ge=0, lt=0.9)] = 0.2
    split_seed: int = 0
    max_scans_per_patient: Count = 16
    slice_gap: Literal["refuse", "skip", "resample"] = "refuse"
    frames: Literal["refuse", "first", "mean", "all"] = "refuse"
    colour: Literal["refuse", "luminance"] = "refuse"
    burned_in: Literal["note", "skip", "refuse"] = "note"
    identical: Literal["note", "merge", "refuse"] = "note"
    missing: Literal["refuse", "drop", "class"] = "refuse"
    max_voxels: Annotated[int, Field(ge=1, le=2**33)] = 2**28
    max_unpacked_gib: Positive = 64.0
    workers: Count = 1
    cluster: str | None = None

    @field_validator("shape")
    @classmethod
    def _two_or_three(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and len(value) not in (2, 3):
            raise ValueError("shape needs 2 or 3 numbers")
        return value


class FieldConfig(Frozen):
    """The Gaussian random field over a spatial latent: codes a cell, and the correlation of neighbours.

    range and variance hold at the start, and for good unless `learned`; the range counts cells of the latent grid.
    """

    channels: Count = 4
    correlation: Literal["identity", "exponential", "matern32", "gaussian"] = "exponential"
    range: Positive = 1.5
    variance: Positive = 1.0
    learned: bool = False


class ModelConfig(Frozen):
    """The conditional VAE and its variants; docs/family.md says what each is known for.

    schedule: of beta over DP-SGD's steps, "anneal" from 0 (Bowman et al. 2016) or "capacity", beta |KL - C| with C
    rising to `capacity` nats (Burgess et al. 2017). adversary: weight of a critic (VAE-GAN), 0 for none.
    semi_supervised: missing labels are inferred (M2); label_weight: of the classifier's cross-entropy beside the ELBO.
    """

    latent_dim: Count | None = None
    channels: tuple[Count, ...] | None = None
    residual_units: Annotated[int, Field(ge=0)] = 1
    norm_groups: Count = 4
    likelihood: Literal["gaussian", "laplace", "bernoulli", "discretised_logistic"] = "gaussian"
    beta: Positive = 1.0
    scale: Positive = 0.1
    mask_weight: Positive = 1.0
    schedule: Literal["constant", "anneal", "capacity"] = "constant"
    capacity: Positive = 25.0
    attention: bool = False
    class_decoders: bool = False
    latent: Literal["vector", "field"] = "vector"
    field: FieldConfig = FieldConfig()
    adversary: Annotated[float, Field(ge=0)] = 0.0
    semi_supervised: bool = False
    label_weight: Positive = 2000.0


class MomentsConfig(Frozen):
    """The closed-form stage: noisy moments by class and covariate, the optimum of a linear conditional VAE.

    warped_pairs: of deformed copies of a scan, beside itself, that its second moments average over. They teach codes
    how anatomy moves where persons are few, and cost no epsilon. two_valued: whether images are shapes, black and
    white, which is public where you say so; left open, the first release says it if its noise leaves it to be seen.
    functions: that second moments of shapes are of, in place of `coarse_shape` cosines.
    """

    enabled: bool = True
    share: Share | None = None
    basis_shape: tuple[Count, ...] | None = None
    coarse_shape: tuple[Count, ...] | None = None
    two_valued: bool | None = None
    functions: Count | None = None
    spectrum_weight: Probability | None = None
    public_clips: bool | None = None
    mean_alone: bool | None = None
    warped_pairs: Annotated[int, Field(ge=0, le=64)] = 0


class MixtureConfig(Frozen):
    """Part of the closed form: for each class a mixture of low-rank Gaussians over the lowest cosines.

    With `enabled` left open the rule decides: where a class's patients carry a covariance of their own.
    """

    enabled: bool | None = None
    components: Count | None = None
    box: tuple[Count, ...] | None = None
    lloyd_steps: Count = 4


class SamplingConfig(Frozen):
    """How a released model is sampled: post-processing. warp: size of the random deformations, 0 for none."""

    warp: Annotated[float, Field(ge=0, le=5)] = 1.0


class DpSgdConfig(Frozen):
    """DP-SGD by patient. With `enabled` left open the rule decides: for many patients without a mixture."""

    enabled: bool | None = None
    steps: Count | None = None
    sample_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    max_grad_norm: Positive = 1.0
    learning_rate: Positive | None = None
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
    scans_per_patient: Count = 4
    grad_sampler: Literal["bookkeeping", "functorch"] = "bookkeeping"
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    checkpoint_every: Count = 25

    @model_validator(mode="after")
    def _precision(self) -> DpSgdConfig:
        if self.grad_sampler == "functorch" and (self.precision != "fp32" or self.channels_last):
            raise ValueError("precision bf16 and channels_last need grad_sampler: bookkeeping")
        return self


class PretrainingConfig(Frozen):
    """What encoder and decoder see before DP-SGD: nothing, made-up shapes, or the scans of `--public COHORT`.

    None of it is private, so it costs no epsilon.
    """

    source: Literal["none", "procedural", "public"] = "none"
    steps: Count = 400
    batch: Count = 64
    learning_rate: Positive = 1e-3


class PriorConfig(Frozen):
    """Where a trained VAE's codes come from: its own Gaussian (none), or a prior fitted to the patients' codes.

    gaussian and mixture are one release of noisy moments by class; flow is trained by DP-SGD. share: of the budget.
    """

    kind: Literal["none", "gaussian", "mixture", "flow"] = "none"
    share: Share = 0.1
    components: Count = 4
    lloyd_steps: Count = 3
    steps: Count = 200
    learning_rate: Positive = 3e-3
    layers: Count = 4
    hidden: Count = 32


class RobustConfig(Frozen):
    """SRL-VAE: the trained VAE is trained on by DP-SGD, on scans that an attacker has perturbed (nets/robust.py).

    radius: largest change of a voxel of an image in [0, 1]; attack_steps: of projected gradient ascent; originality:
    weight of what keeps the codes of clean scans.
    """

    enabled: bool = False
    share: Share = 0.2
    steps: Count = 60
    learning_rate: Positive = 5e-4
    radius: Share = 0.03
    attack_steps: Count = 3
    originality: Annotated[float, Field(ge=0)] = 1.0


class TeacherConfig(Frozen):
    """A classifier trained by DP-SGD on the real scans, which drops or renames samples that it reads otherwise."""

    enabled: bool = False
    share: Share = 0.1
    use: Literal["filter", "label"] = "filter"
    features: Literal["learned", "fixed"] = "fixed"
    channels: Count = 16
    steps: Count = 150
    learning_rate: Positive = 1e-2


class CanaryConfig(Frozen):
    """The one-run audit of every private training.

    count: made-up patients on coordinates of their own; patterns: made-up patients whose scans walk the model's own
    path, 0 for none.
    """

    enabled: bool = True
    count: Count = 1000
    patterns: Annotated[int, Field(ge=0, le=256)] = 8


class Recipe(Frozen):
    """A pipeline YAML: what a user copies and edits."""

    name: str = "default"
    model: ModelConfig = ModelConfig()
    moments: MomentsConfig = MomentsConfig()
    mixture: MixtureConfig = MixtureConfig()
    pretraining: PretrainingConfig = PretrainingConfig()
    dpsgd: DpSgdConfig = DpSgdConfig()
    robust: RobustConfig = RobustConfig()
    prior: PriorConfig = PriorConfig()
    teacher: TeacherConfig = TeacherConfig()
    canaries: CanaryConfig = CanaryConfig()
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _some_stage(self) -> Recipe:
        if self.mixture.enabled and not self.moments.enabled:
            raise ValueError("mixture is a part of the closed form: enable moments too")
        if self.model.latent == "field" and self.moments.enabled:
            raise ValueError("a field latent has no closed form to start from: set moments.enabled to false")
        if self.model.semi_supervised and (self.moments.enabled or self.prior.kind != "none" or self.teacher.enabled):
            raise ValueError(
                "semi_supervised trains on missing labels, which the closed form, a fitted prior and a teacher cannot: "
                "set moments.enabled to false and leave prior and teacher out"
            )
        if not self.moments.enabled and self.dpsgd.enabled is False:
            raise ValueError("every stage is switched off: enable moments or dpsgd")
        if self.dpsgd.enabled is False and self.deep:
            raise ValueError(f"{self.deep} belongs to the network that DP-SGD trains: enable dpsgd, or leave it out")
        if self.extra_share >= 1:
            raise ValueError(
                f"robust, prior and teacher share {self.extra_share:g} of the budget and leave the model nothing: "
                "lower them"
            )
        if self.prior.kind != "none" and self.model.latent == "field":
            raise ValueError(
                "a fitted prior is over vectors of codes: set model.latent to vector, or prior.kind to none"
            )
        return self

    @property
    def deep(self) -> str:
        """The first stage that asks for a network trained by DP-SGD, or nothing."""
        if self.pretraining.source != "none":
            return "pretraining"
        if self.robust.enabled:
            return "robust"
        return "prior" if self.prior.kind != "none" else ""

    @property
    def extra_share(self) -> float:
        """The share of the budget that robust, prior and teacher cost together."""
        robust = self.robust.share if self.robust.enabled else 0.0
        return (
            robust
            + (self.prior.share if self.prior.kind != "none" else 0.0)
            + (self.teacher.share if self.teacher.enabled else 0.0)
        )


class TrainConfig(Frozen):
    """One training run. Its privacy is asked for in exactly one way.

    dp_epsilon: the budget; max_advantage: the largest TPR - FPR of any membership attack; max_reid_risk: the largest
    success of any attacker who would be right with probability `baseline` without the release.
    """

    dp_epsilon: float | None = None
    max_advantage: Probability | None = None
    max_reid_risk: Probability | None = None
    baseline: Probability | None = None
    dp_delta: Probability | None = None
    recipe: Recipe = Recipe()
    seed: int = 0
    threads: Count | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    memory_gib: Positive | None = None
    noise_source: Literal["os_entropy", "seeded"] = "os_entropy"

    @field_validator("dp_epsilon")
    @classmethod
    def _epsilon(cls, value: float | None) -> float | None:
        if value is not None and (math.isnan(value) or value <= 0):
            raise ValueError("epsilon must be above zero (or 'inf' to train without privacy, for comparison)")
        return value

    @model_validator(mode="after")
    def _one_goal(self) -> TrainConfig:
        given = [v for v in (self.dp_epsilon, self.max_advantage, self.max_reid_risk) if v is not None]
        if len(given) != 1:
            told = f"{len(given)} privacy goals are given" if given else "no privacy goal is given"
            raise ValueError(
                f"{told}: give exactly one of --dp-epsilon, --max-advantage and --max-reid-risk (with --baseline)"
            )
        if (self.max_reid_risk is None) != (self.baseline is None):
            raise ValueError(
                "--max-reid-risk and --baseline go together: the baseline is how often the attacker's best guess is "
                "right without the release"
            )
        if self.max_reid_risk is not None and self.baseline is not None and self.baseline >= self.max_reid_risk:
            raise ValueError(
                f"the largest risk {self.max_reid_risk:g} is not above the baseline {self.baseline:g}, which needs no "
                "release: give a larger risk or a smaller baseline"
            )
        return self


class AuditConfig(Frozen):
    """What an audit measures and how long it may take.

    cluster: address of a Ray cluster for shadow models ("local": Ray on this machine), or None for none. Scans are
    sent to its machines, so they must be the hospital's own.
    """

    tier: Literal["quick", "standard", "full"] = "quick"
    synthetic: Count = 500
    confidence: Probability = 0.95
    seed: int = 0
    cluster: str | None = None


class ReleaseConfig(Frozen):
    """What a release holds."""

    count: Count = 100
    formats: tuple[Literal["nifti", "dicom", "png", "npz", "huggingface", "viewer"], ...] = ("npz",)
    conditions: Path | None = None
    seed: int = 0
    title: str = "Synthetic medical images"
    licence: str = "CC-BY-4.0"
    body_part: Annotated[str, Field(pattern="^[A-Z][A-Z0-9_ ]{0,15}$")] | None = None
    key: Path | None = None
    override: str | None = None

    @field_validator("override")
    @classmethod
    def _reason(cls, value: str | None) -> str | None:
        """A reason is printed in public, on one line."""
        reason = None if value is None else " ".join(value.split())
        if reason is not None and not 10 <= len(reason) <= 500:
            raise ValueError("a reason for an override has 10 to 500 characters: say why, for readers of the release")
        return reason


def explain(error: ValidationError) -> ConfigError:
    """Turn pydantic's report into one sentence: which key, what is wrong, what was given."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "config"
    if first["type"] == "extra_forbidden":
        return ConfigError(f"unknown config key {where!r}: remove it or see `medvae train --help`")
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return ConfigError(message)
    return ConfigError(f"{where}: {message} (given: {str(first['input'])[:80]!r})")


def build(model: type[Any], /, **values: Any) -> Any:
    """Build a config from the values that are not None, with errors in one sentence."""
    try:
        return model(**{k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        raise explain(error) from None


def load_recipe(path: Path) -> Recipe:
    """Read a pipeline YAML; unknown keys are refused."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise ConfigError("the pipeline file cannot be read as YAML: see pipelines/ for examples") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError("the pipeline file is not a mapping of keys: see pipelines/ for examples")
    recipe: Recipe = build(Recipe, **data)
    return recipe
