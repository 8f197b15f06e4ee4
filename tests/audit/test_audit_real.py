"""The positive controls on real cohorts: what is made to leak is broken, by every family of attacks that claims to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medvae.audit import closed_form_attack, copies, deep_attack, linear_scores, membership
from medvae.audit.attacks import CLOSED_FORM, DEEP, Pool, control_pool, make_pool
from medvae.audit.case import EFFORTS
from medvae.audit.embedding import embed
from medvae.audit.intervals import auc
from medvae.audit.material import load_scans
from medvae.audit.membership import Scores
from medvae.audit.risks import COMPARED, search_copies
from medvae.config import IngestConfig, Recipe
from medvae.train.rule import resolve
from medvae.vault.ingest import ingest
from medvae.vault.store import open_cohort

pytestmark = pytest.mark.slow
QUICK = EFFORTS["quick"]


@pytest.fixture(scope="module", params=["msd_hippocampus", "pneumoniamnist"])
def cohort(
    request: pytest.FixtureRequest, test_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    source = test_data(request.param)
    out = tmp_path_factory.mktemp("real") / "cohort"
    if request.param == "msd_hippocampus":
        config = IngestConfig(shape=(32, 48, 32), labels=source / "volumes.csv", conditions=("size_class",))
    else:
        source, config = source / "pneumoniamnist_trainval.npz", IngestConfig()
    ingest(source, out, config)
    return out


@pytest.fixture(scope="module")
def pool(cohort: Path) -> Pool:
    store, rng = open_cohort(cohort).reveal(), np.random.default_rng(0)
    train, held = (load_scans(store, split, QUICK.pool, rng) for split in ("train", "holdout"))
    return make_pool(train, held, QUICK.judged, rng)


def broken(scores: Scores) -> bool:
    found = membership.rate(scores, 0.01, 0.95)
    return auc(scores.members, scores.others) >= 0.95 and found.value is not None and found.value >= 0.5


def test_an_overfitted_vae_is_broken(pool: Pool) -> None:
    control = control_pool(pool, QUICK.control_patients, np.random.default_rng(1))
    assert control is not None
    found = deep_attack._control(control, QUICK.draws, QUICK.control_steps, 0)
    assert broken(found[DEEP[0].name])
    assert broken(found["likelihood, raw, mean"])


def test_a_closed_form_without_noise_is_broken(pool: Pool) -> None:
    control = control_pool(pool, QUICK.control_patients, np.random.default_rng(1))
    assert control is not None
    recipe = resolve(Recipe(), int(control.member.sum()), control.scans.space)
    full = linear_scores.cosines(control.scans.x)
    basis = recipe.moments.basis_shape
    assert basis is not None
    seen = linear_scores.coefficients(full, control.scans.condition, control.scans.space, basis)
    primary = closed_form_attack._control(control, full, seen, recipe, 0)[CLOSED_FORM[0].name]
    assert auc(primary.members, primary.others) >= membership.BROKEN_AUC


def test_the_blind_baseline_finds_nothing_between_train_and_holdout(pool: Pool) -> None:
    judged = pool.only_judged()
    means = membership.patient_means(embed(judged.scans.images), judged.scans.patient)
    found = membership.blind_baseline(means[judged.member], means[~judged.member], 0.95, 0)
    assert found.low <= 0.5 <= found.high


def test_planted_copies_are_found_without_false_flags(cohort: Path) -> None:
    store, rng = open_cohort(cohort).reveal(), np.random.default_rng(0)
    train, held = (load_scans(store, split, COMPARED, rng) for split in ("train", "holdout"))
    found = search_copies(held.images[:20], train, held, 0.95, 0)
    assert found.planted_found.value >= 0.99
    if found.false_flags is None:  # hippocampus: 200 scans cannot show one in a thousand
        assert "needs 1000" in found.words
    else:
        assert found.false_flags.value <= copies.FALSE_FLAGS
