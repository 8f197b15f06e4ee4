"""A conditional VAE under patient-level differential privacy, as a scikit-learn estimator over arrays of scans.

It trains by `medvae.api.train`: the same DP-SGD or closed form, accounting and ledger as a run from a cohort folder.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted

from medvae.config import Recipe, TrainConfig, build, load_recipe
from medvae.errors import BudgetExceeded, ConfigError, InputError
from medvae.types import Condition, FloatArray, ImageSpace, Intensity

if TYPE_CHECKING:
    from medvae.dp.ledger import Ledger
    from medvae.nets.cvae import ConditionalVAE

Floats = npt.NDArray[np.float64]
LABEL = "label"
AT_ONCE = 256


class PrivateConditionalVAE(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """A VAE, or with `classes` a conditional VAE, whose weights are (epsilon, delta)-DP for the unit patient.

    Every fit spends. `folder` holds one ledger for all fits that name it, clones and refits included, and the sum of
    their epsilons (by composition, whatever rows each saw) may not go over `budget`. Without a budget it is `epsilon`:
    one fit, and a second is refused with BudgetExceeded before it reads a scan. A cross-validation with k folds and a
    refit over m settings therefore needs a budget for k m + 1 fits, and says what it really cost: `ledger_spent()`.
    Choosing by the scores of private scans is itself not covered by any epsilon.

    What `transform`, `score_samples` and `inverse_transform` return for real scans is as private as those scans. Only
    the weights, and so `sample`, are covered by `privacy_`.

    Parameters
    ----------
    epsilon, delta : of one fit; delta None is chosen from the number of patients as `medvae train` does.
    folder : private folder for the ledger, the scans and the runs; it is made. Required by `fit`.
    budget : epsilon that all fits in `folder` may spend together; None is that of the first fit.
    recipe : pipeline file, mapping or `medvae.config.Recipe`; None is the default.
    image_shape : shape of a scan where X holds rows of numbers, (n, features); None where X is (n, *shape).
    classes : public names of all classes. With them `fit`, `transform` and the rest need y.
    random_state : seed of the network's start and of the draws of `score_samples` and `sample`; never of privacy noise.

    Attributes
    ----------
    privacy_ : the claim, as RUN/privacy.json holds it. run_ : the run folder. model_ : the released torch module.
    n_features_in_, image_shape_, classes_ : of what was fitted.
    """

    def __init__(
        self,
        epsilon: float = 8.0,
        delta: float | None = None,
        *,
        folder: str | Path | None = None,
        budget: float | None = None,
        recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
        image_shape: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
        random_state: int = 0,
    ) -> None:
        self.epsilon = epsilon
        self.delta = delta
        self.folder = folder
        self.budget = budget
        self.recipe = recipe
        self.image_shape = image_shape
        self.classes = classes
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, groups: Any = None) -> PrivateConditionalVAE:  # noqa: N803
        """Train on scans X in [0, 1], (n, *shape) or (n, features), and charge the ledger.

        y: (n,) classes, used only with `classes`; groups: (n,) the patient of each scan, in whatever names. Without
        groups it is refused: pass np.arange(n) where every scan is of another patient. Raises InputError or ConfigError
        for what cannot be used, BudgetExceeded where the ledger has no room.
        """
        from medvae import api
        from medvae.nets.build import load_release
        from medvae.synth.store import read_release

        scans = self._scans(X, self._shape(X))
        patient = _patients(groups, len(scans))
        condition = self._conditions(y, len(scans), self.classes)
        config = build(
            TrainConfig, dp_epsilon=self.epsilon, dp_delta=self.delta, recipe=_recipe(self.recipe),
            seed=self.random_state,
        )  # fmt: skip
        folder = _private(self.folder)
        space = self._space(scans.shape[1:])
        self._set_budget(folder, len(np.unique(patient)))
        place = Path(tempfile.mkdtemp(prefix="fit-", dir=folder))
        try:
            _write_cohort(place / "cohort", folder, space, scans, condition, patient)
            claim = api.train(place / "cohort", place / "run", config)
        except BudgetExceeded:
            limit = _ledger(folder).budget()
            raise BudgetExceeded(
                f"with this fit the fits in this folder would go over their budget of epsilon "
                f"{0 if limit is None else limit.epsilon:g} together: set budget= to what they may spend in all"
            ) from None
        finally:
            if not (place / "run" / "privacy.json").is_file():
                shutil.rmtree(place)  # the scans; a charge stays in the folder's ledger
        self.run_ = place / "run"
        self.privacy_ = {key: value for key, value in claim.items() if key != "run"}
        self.model_: ConditionalVAE = load_release(read_release(self.run_ / "model"))
        self.image_shape_ = scans.shape[1:]
        self.n_features_in_ = int(np.prod(self.image_shape_))
        self._flat = np.ndim(X) == 2
        self._n_features_out = self.model_.latent_dim
        if self.classes is not None:
            self.classes_ = np.asarray(self.classes)
        return self

    def transform(self, X: Any, y: Any = None) -> FloatArray:  # noqa: N803
        """Return the mean codes (n, latent_dim) of scans. Private where they are real."""
        import torch

        with torch.inference_mode():
            return np.concatenate([self.model_.encode(x, c)[0].numpy() for x, c in self._batches(X, y)])

    def inverse_transform(self, Z: Any, y: Any = None) -> FloatArray:  # noqa: N803
        """Return the mean images of codes (n, latent_dim), in the layout of the X that was fitted."""
        import torch

        check_is_fitted(self)
        codes = check_array(Z, dtype=np.float32)
        if codes.shape[1] != self.model_.latent_dim:
            raise InputError(f"codes have {self.model_.latent_dim} numbers each (given: {codes.shape[1]})")
        condition = torch.from_numpy(self._conditions(y, len(codes), self.classes))
        with torch.inference_mode():
            images = self.model_.decode(torch.from_numpy(codes), condition)[:, 0].numpy()
        return self._layout(images)

    def score_samples(self, X: Any, y: Any = None) -> Floats:  # noqa: N803
        """Return a lower bound of log p(x | c) in nats a pixel, (n,): low is strange. Private where scans are real.

        By importance weights (Burda et al. 2016); its negative is the score of `medvae score`.
        """
        from medvae.latent.anomaly import score

        parts = [score(self.model_, x.numpy(), c.numpy(), self.random_state) for x, c in self._batches(X, y)]
        return np.asarray(-np.concatenate(parts))

    def score(self, X: Any, y: Any = None) -> float:  # noqa: N803
        """Return the mean of `score_samples`. On real scans it is a private statistic."""
        return float(self.score_samples(X, y).mean())

    def sample(self, n_samples: int = 1, y: Any = None) -> FloatArray:
        """Return synthetic images as `medvae release` draws them, in the layout of X; y: (n_samples,) classes.

        Post-processing of the private model, and so covered by `privacy_`. With `classes` and no y, in equal numbers.
        """
        from medvae.synth.sample import generate, spread_conditions
        from medvae.synth.store import read_release

        check_is_fitted(self)
        if n_samples < 1:
            raise InputError(f"n_samples is at least 1 (given: {n_samples})")
        release = read_release(self.run_ / "model")
        rows = spread_conditions(release.space, n_samples, self.random_state)
        if y is not None:
            self._conditions(y, n_samples, self.classes)  # one sentence for what does not fit
            rows = [{LABEL: str(value)} for value in np.asarray(y)] if self.classes is not None else rows
        return self._layout(generate(release, rows, self.random_state).images)

    def ledger_spent(self) -> float:
        """Return the epsilon of all fits in `folder` together, at the delta of this one."""
        check_is_fitted(self)
        return _ledger(_private(self.folder)).spent(self.privacy_["delta"])

    def _shape(self, X: Any) -> tuple[int, ...]:  # noqa: N803
        shape = np.shape(X)[1:] if self.image_shape is None else tuple(int(n) for n in self.image_shape)
        if len(shape) not in (2, 3):
            raise InputError(
                f"a scan has two or three axes (given: {len(shape)}): give X as (n, *shape), or set image_shape"
            )
        return shape

    def _scans(self, X: Any, shape: tuple[int, ...]) -> FloatArray:  # noqa: N803
        """Return scans (n, *shape) float32 in [0, 1]; the scale is public, since nothing is estimated here."""
        scans = np.asarray(check_array(X, dtype=np.float32, allow_nd=True))
        if int(np.prod(scans.shape[1:])) != int(np.prod(shape)):
            raise InputError(f"X has {np.prod(scans.shape[1:])} features a scan, and {shape} has {np.prod(shape)}")
        if scans.min() < 0 or scans.max() > 1:
            raise InputError("X goes beyond [0, 1]: scale it by constants first, not by the scans' own extremes")
        return scans.reshape(len(scans), *shape)

    def _batches(self, X: Any, y: Any) -> Any:  # noqa: N803
        """Yield scans (B, 1, *shape) and conditions (B, K) as tensors."""
        import torch

        check_is_fitted(self)
        scans = self._scans(X, self.image_shape_)
        condition = self._conditions(y, len(scans), self.classes)
        for start in range(0, len(scans), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            yield torch.from_numpy(scans[rows][:, None].copy()), torch.from_numpy(condition[rows])

    def _conditions(self, y: Any, count: int, classes: Sequence[str] | None) -> FloatArray:
        """Return encoded conditions (count, K); without `classes` there are none, and y is not looked at."""
        if classes is None:
            return np.zeros((count, 0), dtype=np.float32)
        names = tuple(str(name) for name in classes)
        if y is None:
            raise InputError("this VAE is conditional: give y, the class of each scan")
        values = [str(value) for value in np.asarray(y).ravel()]
        if len(values) != count:
            raise InputError(f"y has {len(values)} classes for {count} scans: give one a scan")
        if any(value not in names for value in values):
            raise InputError(f"y holds a class that is none of the public ones: {', '.join(names)}")
        return np.eye(len(names), dtype=np.float32)[[names.index(value) for value in values]]

    def _space(self, shape: tuple[int, ...]) -> ImageSpace:
        conditions: tuple[Condition, ...] = ()
        if self.classes is not None:
            names = tuple(str(name) for name in self.classes)
            if len(set(names)) != len(names) or len(names) < 2:
                raise ConfigError("classes are two public names or more, each once")
            conditions = (Condition(LABEL, "class", names),)
        return ImageSpace(shape, (1.0,) * len(shape), "OT", Intensity("window", 0.0, 1.0), conditions)

    def _layout(self, images: FloatArray) -> FloatArray:
        return images.reshape(len(images), -1) if self._flat else images

    def _set_budget(self, folder: Path, patients: int) -> None:
        """Set the folder's budget: where one is asked for, and at the first fit."""
        from medvae.dp.delta import check_delta, default_delta

        ledger = _ledger(folder)
        now, wanted = ledger.budget(), self.epsilon if self.budget is None else self.budget
        if np.isinf(wanted) or (now is not None and (self.budget is None or now.epsilon == self.budget)):
            return
        delta = self.delta or (now.delta if now is not None else default_delta(patients))
        check_delta(delta, patients)
        ledger.set_budget(wanted, delta)


def _patients(groups: Any, count: int) -> npt.NDArray[np.int64]:
    """Return patient numbers (count,) from 0 on."""
    if groups is None:
        raise InputError(
            "privacy is a patient's: give groups, the patient of each scan, or np.arange(len(X)) where each scan is of "
            "another patient"
        )
    given = np.asarray(groups).ravel()
    if len(given) != count:
        raise InputError(f"groups has {len(given)} patients for {count} scans: give one a scan")
    return np.unique(given, return_inverse=True)[1].astype(np.int64)


def _recipe(given: Recipe | Mapping[str, Any] | str | Path | None) -> Recipe:
    if given is None or isinstance(given, Recipe):
        return given or Recipe()
    if isinstance(given, Mapping):
        made: Recipe = build(Recipe, **given)
        return made
    return load_recipe(Path(given))


def _private(folder: str | Path | None) -> Path:
    """Return the folder, made and closed to other users, with the random key that names its ledger."""
    if folder is None:
        raise ConfigError(
            "no folder is given: every fit spends epsilon, and folder= is where a private ledger remembers it"
        )
    path = Path(folder)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with open(path / "key", "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(secrets.token_bytes(32))
    except FileExistsError:
        pass
    return path.resolve()


def _ledger(folder: Path) -> Ledger:
    from medvae.dp.ledger_place import open_ledger

    return open_ledger(folder)


def _write_cohort(
    cohort: Path,
    folder: Path,
    space: ImageSpace,
    scans: FloatArray,
    condition: FloatArray,
    patient: npt.NDArray[np.int64],
) -> None:
    """Write a cohort of training patients only, whose ledger is the folder's."""
    from medvae.dp.ledger_place import ADDRESS
    from medvae.vault.store import SCHEMA, CohortWriter

    patients = int(patient.max()) + 1
    with CohortWriter(cohort, space.spatial_shape, masks=False) as writer:
        for image, one, encoded in zip(scans, patient, condition, strict=True):
            writer.append(image, None, int(one), encoded)
        facts = {"schema": SCHEMA, "patients": patients, "images": len(scans), "space": space.to_json(), "masks": False}
        split = {"train": list(range(patients)), "holdout": []}
        writer.finish({**facts, "split": split}, dict.fromkeys(range(patients), "train"))
    (cohort / "key").write_bytes((folder / "key").read_bytes())
    if not os.environ.get(ADDRESS):
        _ledger(folder)
        (cohort / "ledger.db").symlink_to(folder / "ledger.db")
