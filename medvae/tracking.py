"""What a command tells MLflow: the only importer of mlflow.

Two experiments, so that a team's server can give them different readers: "medvae" for what may be shared, and
"medvae-private" for what was measured on patients without protection. Only parameters of an allow-list are written;
no user name, host, command line or path of data; no stack trace. A store that fails never stops the work: it is said
once on stderr, and the command goes on.

By default the store is sqlite:///mlflow.db in the working directory (MLFLOW_TRACKING_URI is honoured) and nothing
goes over a network. MEDVAE_TRACKING=off switches all of it off.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from medvae.errors import PrivacyError
from medvae.types import SHAREABLE, ImageSpace
from medvae.version import __version__

DEFAULT_STORE = "sqlite:///mlflow.db"
SHARED, PRIVATE = "medvae", "medvae-private"
MODEL_NAME = "medvae"
RELEASED, CHAMPION = "released", "champion"  # the latest version; the first one, until people move it
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Set before mlflow is imported, where the user has not chosen otherwise."""

NUMBERS = frozenset(
    {
        "average_decay", "baseline", "basis_shape", "batch_size", "beta", "budget", "channels", "checkpoint_every",
        "components", "confidence", "count", "delta", "dp_delta", "dp_epsilon", "enabled", "epsilon", "holdout",
        "intensity_high", "intensity_low", "latent_dim", "learning_rate", "mask_weight", "max_advantage",
        "max_grad_norm", "max_reid_risk", "max_scans_per_patient", "max_unpacked_gib", "max_voxels", "mixtures",
        "noise_multiplier", "norm_groups",
        "patients", "releasable", "residual_units", "resume", "sample_rate", "scale", "scans_per_patient", "seed",
        "shape", "share", "spacing_mm", "split_seed", "steps", "synthetic", "threads", "workers",
    }
)  # fmt: skip
"""Parameters that may be written where their values are numbers (or short lists of them)."""

WORDS: Mapping[str, frozenset[str]] = {
    "accountant": frozenset({"pld", "prv"}),
    "device": frozenset({"auto", "cpu", "cuda"}),
    "formats": frozenset({"nifti", "dicom", "png", "npz", "huggingface", "viewer"}),
    "grad_sampler": frozenset({"bookkeeping", "functorch"}),
    "burned_in": frozenset({"note", "skip", "refuse"}),
    "colour": frozenset({"refuse", "luminance"}),
    "frames": frozenset({"refuse", "first", "mean", "all"}),
    "identical": frozenset({"note", "merge", "refuse"}),
    "intensity": frozenset({"auto", "window", "percentile", "display"}),
    "likelihood": frozenset({"gaussian", "laplace", "bernoulli", "discretised_logistic"}),
    "neighboring": frozenset({"add-remove"}),
    "noise_source": frozenset({"os_entropy", "seeded"}),
    "missing": frozenset({"refuse", "drop", "class"}),
    "slice_gap": frozenset({"refuse", "skip", "resample"}),
    "tier": frozenset({"quick", "standard", "full"}),
    "unit": frozenset({"patient"}),
}
"""Parameters that may be written where their values are one of these words: no free text ever is."""

FINDING_NUMBERS = ("value", "low", "high", "n", "baseline", "control")
FLUSH_AT = 200


class Tracker:
    """One command's line in the store. Every call returns at once where tracking is off or has failed."""

    def __init__(self, command: str, params: Mapping[str, Any], *, private: bool, enabled: bool) -> None:
        self._command, self._params, self._private = command, allowed_params(params), private
        self._enabled = enabled
        self._client: Any = None
        self._runs: dict[str, str] = {}
        self._waiting: dict[str, list[tuple[str, float, int, int]]] = {}

    def metric(self, name: str, value: float | None, step: int | None = None) -> None:
        """Write one number; None is left out. It is private or not as the run is."""
        self._add(self._experiment, name, value, step)
        if sum(map(len, self._waiting.values())) >= FLUSH_AT:
            self._flush()

    def findings(self, findings: Sequence[Mapping[str, Any]]) -> None:
        """Write findings, with their provenance as tags, each where its provenance allows.

        Raises PrivacyError where a private finding comes to a run that is not private.
        """
        for finding in findings:
            provenance = str(finding.get("provenance"))
            if provenance not in SHAREABLE and not self._private:
                raise PrivacyError(
                    f"a finding of provenance {provenance!r} was about to be written where all may read: "
                    "open the tracking run as private"
                )
            experiment = SHARED if provenance in SHAREABLE else PRIVATE
            name = f"{finding.get('group', 'other')}/{finding['name']}"
            for key in FINDING_NUMBERS:
                self._add(experiment, name if key == "value" else f"{name}.{key}", finding.get(key), None)
            self._tag(experiment, f"provenance.{name}", provenance)
            if finding.get("verdict"):
                self._tag(experiment, f"verdict.{name}", str(finding["verdict"])[:200])
        self._flush()

    def figure(self, name: str, image: bytes, suffix: str = "svg") -> None:
        """Store a drawn figure under figures/."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{_key(name).replace('/', '-')}.{suffix}"
            path.write_bytes(image)
            self._call(lambda run: self._client.log_artifact(run, str(path), "figures"), self._experiment)

    def artifact(self, path: Path) -> None:
        """Store a file or folder; raises PrivacyError for a file of an internal folder in a run that is not private."""
        if not self._private and {"private", "internal"} & {path.name, path.parent.name}:
            raise PrivacyError("an internal file was about to be stored where all may read: track it as private")
        log = "log_artifacts" if path.is_dir() else "log_artifact"
        self._call(lambda run: getattr(self._client, log)(run, str(path)), self._experiment)

    def register(self, model_dir: Path) -> None:
        """Register the released model in RUN/model as a pyfunc that generates, under the name "medvae".

        Raises PrivacyError where RUN/privacy.json does not say that the run is releasable.
        """
        if not _releasable(model_dir.parent):
            raise PrivacyError(
                "this model carries no proof of privacy, so it is not registered where all may read: "
                "train with --dp-epsilon"
            )
        self._call(lambda run: _register(self._client, run, model_dir), SHARED)

    @property
    def _experiment(self) -> str:
        return PRIVATE if self._private else SHARED

    def _add(self, experiment: str, name: str, value: Any, step: int | None) -> None:
        if self._enabled and isinstance(value, int | float):
            row = (_key(name), float(value), int(time.time() * 1000), step or 0)
            self._waiting.setdefault(experiment, []).append(row)

    def _tag(self, experiment: str, name: str, value: str) -> None:
        self._call(lambda run: self._client.set_tag(run, _key(name), value), experiment)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for experiment, rows in waiting.items():
            self._call(partial(self._log, rows), experiment)

    def _log(self, rows: Sequence[tuple[str, float, int, int]], run: str) -> None:
        self._client.log_batch(run, metrics=_metrics(rows))

    def _call(self, work: Callable[[str], Any], experiment: str) -> None:
        """Do one thing with the store; on the first failure say so and be silent from then on."""
        if not self._enabled:
            return
        try:
            with _quiet():
                work(self._run_id(experiment))
        except Exception as error:  # whatever a store, a driver or a network raises: tracking never stops the work
            self._enabled = False
            print(
                f"medvae: MLflow could not be written ({type(error).__name__}), the command goes on without it: "
                "check MLFLOW_TRACKING_URI, or set MEDVAE_TRACKING=off",
                file=sys.stderr,
            )

    def _run_id(self, experiment: str) -> str:
        if self._client is None:
            self._client = _connect()
        if experiment not in self._runs:
            # MlflowClient and not mlflow.start_run, which would write user, host, command line and git state
            run = self._client.create_run(
                _experiment_id(self._client, experiment),
                run_name=self._command,
                tags={
                    "medvae.command": self._command,
                    "medvae.version": __version__,
                    "medvae.shareable": str(experiment == SHARED).lower(),
                    "mlflow.source.name": "medvae",
                    "mlflow.source.type": "LOCAL",
                    "mlflow.user": "medvae",
                },
            )
            self._runs[experiment] = run.info.run_id
            if self._params:
                self._client.log_batch(run.info.run_id, params=_params(self._params))
        return self._runs[experiment]

    def _open(self) -> None:
        self._call(lambda _: None, self._experiment)

    def _close(self, status: str) -> None:
        self._flush()
        for experiment in tuple(self._runs):
            self._call(lambda run: self._client.set_terminated(run, status), experiment)


@contextmanager
def run(command: str, params: Mapping[str, Any], *, private: bool) -> Iterator[Tracker]:
    """Track one command: `with run("train", config.model_dump(), private=True) as t: t.metric("loss", 1.2, step=3)`.

    private: whether its metrics and artifacts touch patients without protection. They then go to the experiment
    "medvae-private"; findings always go where their own provenance allows.
    """
    tracker = Tracker(command, params, private=private, enabled=enabled())
    tracker._open()
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker._close(status)


def enabled() -> bool:
    """Whether tracking is switched on."""
    return os.environ.get("MEDVAE_TRACKING", "on").strip().lower() not in ("off", "0", "false", "no")


def allowed_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Flatten nested parameters and keep those of the allow-list.

    >>> allowed_params({"dp_epsilon": 8.0, "labels": "/home/doe.csv", "recipe": {"name": "Doe", "dpsgd": {"steps": 3}}})
    {'dp_epsilon': '8.0', 'recipe.dpsgd.steps': '3'}
    """
    kept: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            if re.fullmatch(r"[a-z_]{1,30}", str(key)):
                kept |= {f"{key}.{name}": text for name, text in allowed_params(value).items()}
            continue
        values = value if isinstance(value, list | tuple) else [value]
        fits = (key in NUMBERS and all(isinstance(v, int | float) for v in values)) or (
            key in WORDS and all(v in WORDS[key] for v in values)
        )
        if fits and len(values) <= 8:
            kept[key] = " ".join(map(str, values))
    return kept


def _connect() -> Any:
    from mlflow import MlflowClient

    store = _store()
    return MlflowClient(tracking_uri=store, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or store)


def _store() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE


def _experiment_id(client: Any, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    local = _store().startswith("sqlite:")
    location = (Path("mlartifacts") / name).absolute().as_uri() if local else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except Exception:  # two commands started at once: the other one made it
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def _releasable(run_dir: Path) -> bool:
    try:
        return json.loads((run_dir / "privacy.json").read_text(encoding="utf-8")).get("releasable") is True
    except (OSError, ValueError, AttributeError):
        return False


def _register(client: Any, run_id: str, model_dir: Path) -> None:
    """Store safetensors and card with MLflow's description, and add a version with its aliases to the registry."""
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    card = json.loads((model_dir / "model.json").read_text(encoding="utf-8"))
    space = ImageSpace.from_json(card["space"])
    kinds = {"class": "string", "continuous": "double"}
    signature = ModelSignature(
        inputs=Schema([ColSpec(kinds[c.kind], c.name) for c in space.conditions]) if space.conditions else None,
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, *space.spatial_shape))]),
        params=ParamSchema([ParamSpec("seed", "long", 0)]),
    )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        mlflow.pyfunc.save_model(
            path=str(target),
            loader_module="medvae.pyfunc",
            data_path=str(model_dir),
            signature=signature,
            pip_requirements=[f"medvae-dp=={__version__}"],
        )
        client.log_artifacts(run_id, str(target), "model")
    with suppress(Exception):  # the name may exist already: that is what the next line needs
        client.create_registered_model(MODEL_NAME)
    source = f"{client.get_run(run_id).info.artifact_uri}/model"
    version = client.create_model_version(MODEL_NAME, source, run_id=run_id, await_creation_for=0).version
    client.set_registered_model_alias(MODEL_NAME, RELEASED, version)
    if CHAMPION not in client.get_registered_model(MODEL_NAME).aliases:
        client.set_registered_model_alias(MODEL_NAME, CHAMPION, version)


def _metrics(rows: Sequence[tuple[str, float, int, int]]) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(*row) for row in rows]


def _params(params: Mapping[str, str]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(key, value[:500]) for key, value in params.items()]


def _key(name: str) -> str:
    """Keep what MLflow allows in a key."""
    return re.sub(r"[^A-Za-z0-9_\-./ ]", "_", name).strip("./ ")[:200] or "unnamed"


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back MLflow's and Alembic's chatter, which would break the progress bar and --json."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  (sets its loggers' levels, so it comes before ours)

    names = ("mlflow", "alembic", "urllib3")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
