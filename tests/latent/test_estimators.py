"""The scikit-learn estimator: its conventions, a pipeline, and every fit charged to one ledger."""

from __future__ import annotations

import stat

import numpy as np
import pytest
import torch
from sklearn import config_context
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks as checks

from medvae.dp.accounting import pld_epsilon
from medvae.errors import BudgetExceeded, ConfigError, InputError, MedvaeError
from medvae.estimators import PrivateConditionalVAE
from medvae.types import Mechanism

RECIPE = {
    "model": {"latent_dim": 4, "channels": (4,), "norm_groups": 2},
    "moments": {"basis_shape": (6, 6), "coarse_shape": (4, 4)},
    "mixture": {"enabled": False},
    "dpsgd": {"enabled": False},
    "canaries": {"enabled": False},
}
APPLY = (
    "check_no_attributes_set_in_init", "check_get_params_invariance", "check_set_params", "check_estimators_unfitted",
    "check_parameters_default_constructible", "check_estimator_repr", "check_estimator_cloneable", "check_mixin_order",
    "check_do_not_raise_errors_in_init_or_set_params", "check_estimator_tags_renamed",
)  # fmt: skip


def phantoms(count: int = 240, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two scans a patient with a bright bar that lies or stands, its class; a little noise."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(count // 2), 2)
    y = np.repeat(rng.permutation(count // 2) % 2, 2)
    X = 0.3 + 0.05 * rng.standard_normal((count, 12, 12))
    X[y == 0, 4:8] += 0.4
    X[y == 1, :, 4:8] += 0.4
    return X.clip(0, 1), np.asarray(["lies", "stands"])[y], np.asarray([f"patient {p}" for p in patient])


def make(folder, **given) -> PrivateConditionalVAE:
    """Much more epsilon than a release would spend: 120 patients show no direction of variation at 8."""
    return PrivateConditionalVAE(**{"epsilon": 400.0, "folder": folder, "recipe": RECIPE, **given})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fits") / "private"
    X, y, groups = phantoms()
    return make(folder).fit(X, y, groups=groups), X, y, groups


@pytest.mark.parametrize("name", APPLY)
def test_the_checks_of_sklearn_that_apply(name):
    check = getattr(checks, name)
    check("PrivateConditionalVAE", PrivateConditionalVAE())


def test_a_pipeline_reads_the_class_from_codes(tmp_path):
    X, y, groups = phantoms()
    probe = make_pipeline(make(tmp_path, image_shape=(12, 12)), LogisticRegression())
    probe.fit(X.reshape(len(X), -1), y, privateconditionalvae__groups=groups)
    fresh, truth, _ = phantoms(seed=1)
    assert probe.score(fresh.reshape(len(fresh), -1), truth) > 0.95
    assert probe.score(fresh.reshape(len(fresh), -1), np.roll(truth, 1)[::-1]) < 0.8
    names = probe[:-1].get_feature_names_out()
    assert list(names) == [f"privateconditionalvae{j}" for j in range(4)]


def test_the_claim_is_a_patients_and_the_ledgers(fitted):
    vae, X, _, _ = fitted
    assert vae.privacy_["patients"] == len(X) // 2  # two scans each: the unit is the patient
    assert vae.privacy_["epsilon"] <= 400
    charged = [Mechanism.from_json(m) for m in vae.privacy_["mechanisms"]]
    assert vae.ledger_spent() == pytest.approx(pld_epsilon(charged, vae.privacy_["delta"]))
    folder = vae.run_.parents[1]
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((vae.run_.parent).stat().st_mode) == 0o700


def test_codes_go_there_and_back(fitted):
    vae, X, _, _ = fitted
    codes = vae.transform(X)
    assert codes.shape == (len(X), 4)
    back = vae.inverse_transform(codes)
    assert back.shape == X.shape
    assert np.square(back - X).mean() < 0.6 * np.square(X - X.mean(0)).mean()  # the mean image would give 1


def test_strange_scans_score_low(fitted):
    vae, _, _, _ = fitted
    normal = phantoms(seed=3)[0][:40]
    strange = normal.copy()
    strange[:, 0:4, 0:4] = 1.0
    assert vae.score_samples(normal).min() > vae.score_samples(strange).max()
    assert vae.score(normal) == pytest.approx(vae.score_samples(normal).mean())
    np.testing.assert_array_equal(vae.score_samples(normal), vae.score_samples(normal))


def test_a_second_fit_is_refused_until_the_budget_allows_it(tmp_path):
    X, _, groups = phantoms(80)
    first = make(tmp_path, epsilon=8.0).fit(X, groups=groups)
    one = first.ledger_spent()
    for again in (first, clone(first)):
        with pytest.raises(BudgetExceeded, match="budget of epsilon 8 together: set budget="):
            again.fit(X, groups=groups)
    assert first.ledger_spent() == one
    assert len(list(tmp_path.glob("fit-*"))) == 1  # no copy of the scans is left behind
    second = clone(first).set_params(budget=20.0).fit(X[:60], groups=groups[:60])
    assert one < second.ledger_spent() <= 20
    runs = [Mechanism.from_json(m) for m in (*first.privacy_["mechanisms"], *second.privacy_["mechanisms"])]
    assert second.ledger_spent() == pytest.approx(pld_epsilon(runs, second.privacy_["delta"]))


def test_cross_validation_pays_for_every_fit(tmp_path):
    X, _, groups = phantoms(80)
    grid = {"epsilon": [4.0, 6.0]}
    with config_context(enable_metadata_routing=True):
        vae = make(tmp_path, budget=40.0).set_fit_request(groups=True)
        search = GridSearchCV(vae, grid, cv=GroupKFold(2), error_score="raise").fit(X, groups=groups)
    assert len(list(tmp_path.glob("fit-*"))) == 5  # 2 settings, 2 folds, and once more at the end
    assert 6 < search.best_estimator_.ledger_spent() <= 40
    with config_context(enable_metadata_routing=True):
        poor = make(tmp_path / "poor").set_fit_request(groups=True)
        search = GridSearchCV(poor, grid, cv=GroupKFold(2), error_score="raise")
        with pytest.raises(BudgetExceeded):
            search.fit(X, groups=groups)


def test_with_classes_it_is_conditional(tmp_path):
    X, y, groups = phantoms()
    vae = make(tmp_path, classes=("lies", "stands")).fit(X, y, groups=groups)
    assert list(vae.classes_) == ["lies", "stands"]
    made = vae.sample(6, ["lies"] * 3 + ["stands"] * 3)
    lies = made[:, 4:8].mean((1, 2)) > made[:, :, 4:8].mean((1, 2))
    assert lies.tolist() == [True] * 3 + [False] * 3
    assert (
        vae.score_samples(X[:20], y[:20]).mean() > vae.score_samples(X[:20], y[::-1][:20]).mean()
        or (y[:20] == y[::-1][:20]).all()
    )
    with pytest.raises(InputError, match="conditional: give y"):
        vae.transform(X)
    with pytest.raises(InputError, match="none of the public ones"):
        vae.transform(X[:1], ["sits"])


STEPS = {"enabled": True, "steps": 6, "sample_rate": 0.2}
NETWORKS = {
    "closed form and network": ({"dpsgd": STEPS}, ("lies", "stands")),
    "attention and critic": (
        {"dpsgd": STEPS, "moments": {"enabled": False}, "model": {"attention": True, "adversary": 0.1}},
        ("lies", "stands"),
    ),
    "field": (
        {"dpsgd": STEPS, "moments": {"enabled": False}, "model": {"latent": "field", "field": {"channels": 2}}},
        None,
    ),
    "M2": (
        {"dpsgd": STEPS, "moments": {"enabled": False}, "model": {"semi_supervised": True}},
        ("lies", "stands", "missing"),
    ),
    "SRL": ({"dpsgd": STEPS, "moments": {"enabled": False}, "robust": {"enabled": True, "steps": 3}}, None),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_and_variants_are_trained_and_charged_too(name, tmp_path):
    chosen, classes = NETWORKS[name]
    recipe = {**RECIPE, **chosen, "model": {**RECIPE["model"], **chosen.get("model", {})}}
    X, y, groups = phantoms(80)
    if classes is None:
        y = None
    elif "missing" in classes:
        y = np.where(np.arange(len(y)) % 4 < 2, y, "missing")
    vae = make(tmp_path, epsilon=8.0, recipe=recipe, classes=classes).fit(X, y, groups=groups)
    names = {m["name"] for m in vae.privacy_["mechanisms"]}
    assert "dpsgd" in names
    assert ("robust" in names) == (name == "SRL")
    assert vae.ledger_spent() == pytest.approx(vae.privacy_["epsilon"], rel=1e-3)
    assert vae.privacy_["epsilon"] <= 8
    codes = vae.transform(X, y)
    assert codes.shape == (len(X), vae.model_.latent_dim)
    assert vae.inverse_transform(codes, y).shape == vae.sample(len(X), y).shape == X.shape
    assert np.isfinite(vae.score_samples(X, y)).all()
    if name == "M2":
        assert vae.model_.label_probabilities(torch.from_numpy(np.float32(X[:, None]))).shape == (len(X), 2)


def test_samples_are_those_of_a_release(fitted):
    from medvae.synth.sample import generate
    from medvae.synth.store import read_release

    vae, _, _, _ = fitted
    made = vae.sample(3)
    assert made.shape == (3, 12, 12)
    np.testing.assert_array_equal(made, generate(read_release(vae.run_ / "model"), [{}] * 3, 0).images)


def test_before_it_is_fitted_it_says_so(tmp_path):
    X, _, _ = phantoms(8)
    for use in ("transform", "score_samples", "score", "inverse_transform"):
        with pytest.raises(NotFittedError):
            getattr(make(tmp_path), use)(X.reshape(8, -1))
    with pytest.raises(NotFittedError):
        make(tmp_path).sample(1)


X, Y, GROUPS = phantoms(8)
BAD = (
    ({}, {"X": X}, "give groups"),
    ({}, {"X": X, "groups": GROUPS[:3]}, "groups has 3 patients for 8 scans"),
    ({"folder": None}, {"X": X, "groups": GROUPS}, "no folder is given"),
    ({}, {"X": X + 1, "groups": GROUPS}, "goes beyond"),
    ({}, {"X": X.reshape(8, -1), "groups": GROUPS}, "two or three axes"),
    ({"image_shape": (5, 5)}, {"X": X.reshape(8, -1), "groups": GROUPS}, "144 features"),
    ({"classes": ("lies",)}, {"X": X, "y": ["lies"] * 8, "groups": GROUPS}, "two public names"),
    ({"classes": ("a", "b")}, {"X": X, "y": Y, "groups": GROUPS}, "none of the public ones"),
    ({"classes": ("a", "b")}, {"X": X, "groups": GROUPS}, "give y"),
    ({"epsilon": -1.0}, {"X": X, "groups": GROUPS}, "epsilon must be above zero"),
    ({"recipe": {"nonsense": 1}}, {"X": X, "groups": GROUPS}, "unknown config key"),
)


@pytest.mark.parametrize(("params", "given", "says"), BAD)
def test_bad_input_is_one_sentence_and_leaves_no_scan(params, given, says, tmp_path):
    with pytest.raises(InputError, match=says) as refused:
        make(**{"folder": tmp_path / "f", **params}).fit(**given)
    assert isinstance(refused.value, MedvaeError)
    assert refused.value.exit_code == ConfigError.exit_code == 2
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("f/fit-*"))
