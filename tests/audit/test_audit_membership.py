"""The attack breaks what leaks and spares what does not; its baseline and controls react to what they must."""

from __future__ import annotations

import math

import numpy as np
import pytest
from audit_world import phantom_scans

from medvae.audit import membership
from medvae.audit.calibrate import by_patient
from medvae.audit.control import ControlVAE, overfit
from medvae.audit.material import Scans, shrink
from medvae.audit.membership import Scores
from medvae.audit.neighbours import closer_to_training
from medvae.audit.whitebox import Scorable, scan_scores

RNG = np.random.default_rng


@pytest.fixture(scope="module", params=[2, 3])
def scans(request: pytest.FixtureRequest) -> Scans:
    return shrink(phantom_scans(request.param, 32, 3, 16), 16 if request.param == 2 else 8)


def primary(model: Scorable, scans: Scans) -> Scores:
    by = by_patient(scan_scores(model, scans, 8, 0)["likelihood"], scans.patient, "mean")
    return Scores(by[:16], by[16:])


def test_an_overfitted_vae_is_broken_and_an_untrained_one_is_not(scans: Scans) -> None:
    members = scans.of(np.arange(16))
    broken = membership.area(primary(overfit(members, 350, 0), scans), 0.95)
    spared = membership.area(primary(ControlVAE(scans.x[0].size, scans.condition.shape[1]), scans), 0.95)
    assert broken.value >= membership.BROKEN_AUC
    assert broken.low > 0.5
    assert spared.low <= 0.5 <= spared.high


def test_likelihood_is_the_importance_weighted_bound() -> None:
    """Against a linear Gaussian model, whose likelihood is known: more draws come close to it, and one is the ELBO."""
    import torch

    class Linear:
        latent_dim = 1

        def kl_to_prior(self, mean: torch.Tensor, log_variance: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
            return 0.5 * ((mean - 0.2).square() + log_variance.exp() - 1 - log_variance).sum(1)

        def log_prior(self, z: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
            return -0.5 * ((z - 0.2).square() + math.log(2 * math.pi)).sum(1)

        def encode(self, x: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.flatten(1).mean(1, keepdim=True) * 0.5 + 0.3, torch.full((len(x), 1), -0.3)

        def reconstruction(self, x: torch.Tensor, z: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
            return (0.5 * (x.flatten(1) - z).square() + 0.5 * math.log(2 * math.pi)).sum(1)

    base = phantom_scans(2, 3, 0, 16)
    x = RNG(0).normal(size=(3, 1, 1, 2)).astype(np.float32)
    tiny = Scans(x, base.condition[:3], np.arange(3), base.space)
    flat = x.reshape(3, 2).astype(np.float64) - 0.2
    covariance = np.eye(2) + 1  # unit noise plus one shared unit code
    exact = -0.5 * np.einsum("ni,ij,nj->n", flat, np.linalg.inv(covariance), flat)
    exact = exact - 0.5 * np.log(np.linalg.det(covariance)) - math.log(2 * math.pi)
    many = scan_scores(Linear(), tiny, 4000, 0)
    np.testing.assert_allclose(many["likelihood"], exact, atol=0.02)
    assert (many["elbo"] < many["likelihood"]).all()


@pytest.mark.parametrize("latent", ["vector", "field"])
def test_the_prior_of_the_scores_is_the_models_own(latent: str) -> None:
    """Against the network's own importance weights and ELBO, with codes that a random field ties together."""
    import torch

    from medvae.config import FieldConfig, ModelConfig, MomentsConfig, Recipe
    from medvae.nets.build import build_model
    from medvae.train.rule import resolve

    scans, draws = phantom_scans(2, 4, 0, 16), 5
    field = FieldConfig(channels=2, range=1.5, variance=2.0)
    model = ModelConfig(latent=latent, field=field, latent_dim=None if latent == "field" else 6, channels=(8, 8))
    net = build_model(scans.space, resolve(Recipe(model=model, moments=MomentsConfig(enabled=False)), 50, scans.space))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    net.eval()
    found = scan_scores(net, scans, draws, seed=3)
    x, condition = torch.from_numpy(scans.x), torch.from_numpy(scans.condition)
    noise = torch.randn(draws, net.latent_dim, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        rows = [code.expand(len(x), -1) for code in noise]
        weights = torch.stack([net.log_weight(x, condition, row) for row in rows])
        parts = [net.elbo(x, condition, row) for row in rows]
    expected = torch.logsumexp(weights, 0) - math.log(draws)
    np.testing.assert_allclose(found["likelihood"], expected.numpy(), rtol=1e-4)
    np.testing.assert_allclose(found["latent"], parts[0]["kl"].numpy(), rtol=1e-4)
    elbo = -sum(p["reconstruction"] + p["kl"] for p in parts).numpy() / draws
    np.testing.assert_allclose(found["elbo"], elbo, rtol=1e-4)


def test_few_constant_or_infinite_scores_give_no_number() -> None:
    few = Scores(np.arange(7.0), np.arange(20.0))
    assert "7 patients" in membership.measurable(few)
    assert "needs at least 8" in membership.measurable(few)
    assert "same" in membership.measurable(Scores(np.ones(9), np.ones(9)))
    assert "finite" in membership.measurable(Scores(np.full(9, np.nan), np.ones(9)))
    assert membership.measurable(Scores(np.arange(9.0), np.arange(9.0))) == ""


def test_rate_needs_one_over_fpr_non_members() -> None:
    rng = RNG(1)
    short = membership.rate(Scores(rng.normal(size=99), rng.normal(size=99)), 0.01, 0.95)
    assert short.value is None
    assert short.needs == 100
    enough = membership.rate(Scores(rng.normal(3, 1, 200), rng.normal(size=200)), 0.01, 0.95)
    assert enough.value is not None
    assert enough.realised is not None
    assert enough.realised <= 0.01
    assert abs(enough.value - 0.75) < 0.15  # Phi(3 - 2.33)


def gaussian_bound(mu: float) -> membership.Bound:
    from scipy.stats import norm

    return lambda fpr: norm.cdf(norm.ppf(fpr) + mu)


def test_excess_accuses_a_leak_and_spares_a_model_at_its_bound() -> None:
    rng, bound = RNG(2), gaussian_bound(1.0)
    loud = {"s": Scores(rng.normal(4, 1, 100), rng.normal(size=100))}
    assert membership.excess(loud, "s", bound, 0.95) > 0
    accused = 0
    for _ in range(400):  # the worst model that the claim allows
        honest = {str(i): Scores(rng.normal(1, 1, 60), rng.normal(size=60)) for i in range(3)}
        accused += membership.excess(honest, "0", bound, 0.95) > 0
    assert accused / 400 <= 0.05


def test_blind_baseline_finds_a_planted_shift() -> None:
    rng = RNG(3)
    members, others = rng.normal(size=(40, 90)), rng.normal(size=(40, 90))
    others[:, :5] += 1.2
    found = membership.blind_baseline(members, others, 0.95, 0)
    assert found.low > 0.5
    assert found.value > 0.75


def test_blind_baseline_raises_few_false_alarms() -> None:
    rng, alarms = RNG(4), 0
    for i in range(100):
        x = rng.normal(size=(30, 20)) @ rng.normal(size=(20, 20))
        found = membership.blind_baseline(x[:15], x[15:], 0.95, i)
        alarms += not found.low <= 0.5 <= found.high
    assert alarms / 100 <= 0.12


def test_negative_control_is_quiet_on_random_splits() -> None:
    found = membership.false_alarms(RNG(5).normal(size=60), 0.95, 0)
    assert found.value <= 0.12


def test_roc_ends_at_its_corners_and_rises() -> None:
    rng = RNG(6)
    fpr, tpr = membership.roc(Scores(rng.normal(1, 1, 30), rng.normal(size=20)))
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()


def test_closest_record_finds_copies_of_training_rows() -> None:
    rng = RNG(7)
    train, holdout = rng.normal(size=(50, 8)), rng.normal(size=(50, 8))
    copies = train[:40] + 1e-3 * rng.normal(size=(40, 8))
    assert closer_to_training(copies, train, holdout, 0.95).value == 1.0
    fresh = closer_to_training(rng.normal(size=(400, 8)), train, holdout, 0.95)
    assert 0.3 < fresh.value < 0.7
