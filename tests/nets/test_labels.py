"""The semi-supervised VAE (M2): its loss against the definition, what it learns of few labels, whom it charges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_variants import SHAPES, batch, space, variant

from medvae.config import IngestConfig, ModelConfig, Recipe, TrainConfig, build
from medvae.errors import ConfigError
from medvae.nets.build import load_release
from medvae.nets.cvae import ConditionalVAE
from medvae.synth.store import read_release
from medvae.train.gradient import PlainSampler
from medvae.train.run import train
from medvae.vault.ingest import ingest

STEPS = {"enabled": True, "steps": 3, "sample_rate": 0.5, "learning_rate": 1e-3}
RECIPE = {
    "model": {"semi_supervised": True, "latent_dim": 2, "channels": (4,)},
    "moments": {"enabled": False},
    "dpsgd": STEPS,
    "canaries": {"enabled": False},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_the_papers(shape):
    model, _ = variant("semi_supervised", shape)
    made, latent = batch(model, (1,) * 9)
    x, condition = torch.from_numpy(made.x), torch.from_numpy(made.condition)
    missing = condition[:, 2] == 1
    assert 0 < int(missing.sum()) < 9
    with torch.no_grad():
        found = model(x, condition, latent) * x[0].numel()
        q = model.label_probabilities(x)
        each = [model.elbo(x, torch.eye(3)[[k]].expand(9, -1), latent)["loss"] + math.log(2) for k in (0, 1)]
    for i in range(9):
        if missing[i]:
            expected = sum(float(q[i, k] * (each[k][i] + q[i, k].log())) for k in (0, 1))
        else:
            k = int(condition[i].argmax())
            expected = float(each[k][i] - 2.0 * q[i, k].log())
        assert float(found[i]) == pytest.approx(expected, rel=1e-5)


def test_a_label_does_not_reach_the_loss_of_a_scan_that_lacks_it():
    model, _ = variant("semi_supervised", SHAPES[0])
    made, latent = batch(model, (1, 1))
    unknown = np.tile(np.asarray([[0, 0, 1]], dtype=np.float32), (2, 1))
    sums, _ = PlainSampler(model, max_scans=8).clipped_sum(made._replace(condition=unknown), latent)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    moved = dict(zip(names, sums, strict=True))
    # The column of the missing class is nobody's class: no scan moves it, in the prior as in the decoder.
    assert float(moved["prior.condition.weight"][:, 2].abs().max()) == 0
    assert float(moved["prior.condition.weight"][:, :2].abs().min()) > 0
    assert float(moved["decoder.films.0.project.weight"][:, 2].abs().max()) == 0
    assert float(moved["labels.logits.weight"].abs().max()) > 0


def test_few_labels_and_many_scans_without_teach_the_classes():
    torch.manual_seed(0)
    where = space(8, 8, missing=True)
    model = ConditionalVAE(where, ModelConfig(latent_dim=2, channels=(8,), semi_supervised=True))
    truth = torch.arange(120) % 2
    x = torch.rand(120, 2, 8, 8) * 0.2
    x[:, 0, :, :4] += 0.6 * (truth == 0)[:, None, None]
    x[:, 0, :, 4:] += 0.6 * (truth == 1)[:, None, None]
    condition = torch.eye(3)[torch.where(torch.arange(120) < 10, truth, 2)]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(x, condition, torch.randn(120, 2)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        right = (model.label_probabilities(x[10:]).argmax(1) == truth[10:]).float().mean()
    assert float(right) > 0.95


def test_a_missing_label_stands_for_all_classes_and_is_drawn_as_one():
    model, _ = variant("semi_supervised", SHAPES[0])
    unknown, even = torch.tensor([[0.0, 0, 1]]), torch.tensor([[0.5, 0.5, 0]])
    z = torch.randn(1, model.latent_dim)
    with torch.no_grad():
        assert torch.equal(model.prior_mean(unknown), model.prior_mean(even))
        assert torch.equal(model.decode(z, unknown), model.decode(z, even))
        labels = model.labels
        assert labels is not None
        drawn = labels.drawn(unknown.expand(200, -1), torch.Generator().manual_seed(0))
    assert set(map(tuple, drawn.tolist())) == {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)}


def test_without_missing_labels_or_with_the_closed_form_it_is_refused():
    with pytest.raises(ConfigError, match="semi_supervised needs a condition with missing labels"):
        ConditionalVAE(space(8, 8), ModelConfig(latent_dim=2, channels=(4,), semi_supervised=True))
    with pytest.raises(ConfigError, match="missing labels"):
        build(Recipe, model={"semi_supervised": True})
    with pytest.raises(ConfigError, match="no classifier"):
        variant("attention", SHAPES[0])[0].label_probabilities(torch.zeros(1, 2, *SHAPES[0]))


def test_patients_without_a_label_are_trained_on_and_charged(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = tmp_path / "images"
    images.mkdir()
    rows = ["patient_id,file,side"]
    for i, k in enumerate(labels):
        Image.fromarray(rng.integers(0, 255, (12, 12), dtype=np.uint8)).save(images / f"{i}.png")
        rows.append(f"p{i},{i}.png,{('a', 'b', '')[k]}")
    (images / "labels.csv").write_text("\n".join(rows) + "\n")
    info = ingest(images, tmp_path / "cohort", build(IngestConfig, conditions=("side",), missing="class", holdout=0.2))
    assert info is not None
    config = build(TrainConfig, dp_epsilon=8.0, recipe=build(Recipe, **RECIPE), noise_source="seeded")
    claim = train(tmp_path / "cohort", tmp_path / "run", config)
    assert claim["epsilon"] <= 8
    model = load_release(read_release(tmp_path / "run" / "model"))
    assert model.labels is not None
    assert model.space.conditions[0].classes == ("a", "b", "missing")
