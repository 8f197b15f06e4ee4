"""The decoder outside of torch: the exported graph decodes and samples as the model does, in every variant."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from decoders import VARIANTS, make_release
from scipy.stats import kstest, norm

from medvae.errors import MissingPart, RunError
from medvae.nets.build import load_release
from medvae.synth import write_onnx
from medvae.synth.write_onnx import decoder_of, to_onnx

ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not here: pip install 'medvae-dp[onnx]'")
FACTS = {"synthetic": "SYNTHETIC", "claim": {"epsilon": 8.0, "delta": 1e-5}}


def given(name: str, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and encoded conditions that a table would give."""
    generator = torch.Generator().manual_seed(3)
    parts = [torch.zeros(count, 0)]
    for c in VARIANTS[name][2]:
        if c.kind == "class":
            parts.append(torch.eye(c.width)[torch.randint(0, c.width, (count,), generator=generator)])
        else:
            parts.append(2 * torch.rand(count, 1, generator=generator) - 1)
    return torch.randn(count, size, generator=generator), torch.cat(parts, dim=1)


FEW = ("closed form", "mixture", "no condition", "all, 2D", "all, 3D")  # each export takes seconds


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS])
def test_the_graph_decodes_as_the_model_does(name):
    release = make_release(name)
    model = load_release(release)
    blob, error = to_onnx(release, FACTS)
    assert error < 1e-5
    session = ort.InferenceSession(blob, providers=["CPUExecutionProvider"])
    notes = session.get_modelmeta().custom_metadata_map
    assert json.loads(notes["claim"])["epsilon"] == 8.0
    assert json.loads(notes["spacing_mm"]) == list(release.space.spacing_mm)
    assert list(json.loads(notes["conditions"])) == [c.name for c in release.space.conditions]
    assert b".py" not in blob  # no stack trace of the machine that exported it
    for count in (1, 4):
        z, condition = given(name, count, int(notes["code_size"]))
        feeds = {"z": z.numpy(), **({"condition": condition.numpy()} if condition.shape[1] else {})}
        found = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
        assert ("mask" in found) == bool(release.space.mask_labels)
        if decoder_of(release).closed_form:
            continue  # no codes: what it draws is compared below
        with torch.inference_mode():
            wanted = model.decode(z[:, : model.latent_dim], condition).numpy()
        assert np.ptp(wanted) > 0.05
        np.testing.assert_allclose(found["image"], wanted[:, 0], atol=1e-5)
        if "mask" in found:
            np.testing.assert_allclose(found["mask"], wanted[:, 1:], atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_decoder_gives_what_the_model_gives(name):
    release = make_release(name)
    model, decoder = load_release(release), decoder_of(release)
    z, condition = given(name, 5, decoder.code_size)
    with torch.inference_mode():
        image, mask, prior = decoder(z, condition)
        if not decoder.closed_form:
            wanted = model.decode(z[:, : model.latent_dim], condition)
            torch.testing.assert_close(torch.cat([image[:, None], mask], dim=1), wanted, atol=1e-5, rtol=0)
        assert prior.shape == z.shape
        again, _, _ = decoder(prior, condition)
    assert again.shape == image.shape


@pytest.mark.parametrize("name", ["attention", "all, 2D", "all, 3D", "closed form"])
def test_the_prior_of_the_graph_is_the_models(name):
    release = make_release(name)
    model, decoder = load_release(release), decoder_of(release)
    z, condition = given(name, 5, decoder.code_size)
    with torch.inference_mode():
        torch.testing.assert_close(decoder(z, condition)[2], model.prior_sample(condition, z), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["mixture", "mixture and network", "flow", "gaussian codes", "mixture of codes"])
def test_sampling_by_the_decoder_has_the_models_distribution(name):
    """Projections of 3,000 samples each, by the decoder and by `draw`: Kolmogorov-Smirnov, false alarms below 1e-5."""
    release = make_release(name)
    model, decoder = load_release(release), decoder_of(release)
    rows = torch.eye(decoder.model.space.condition_width)[:1].repeat(3000, 1)
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        wanted = model.draw(rows, generator)
        z = torch.randn(3000, decoder.code_size, generator=generator)
        image, mask, _ = decoder(decoder(z, rows)[2], rows)
        centre, _, _ = decoder(decoder(torch.zeros_like(z), rows)[2], rows)
    found = torch.cat([image[:, None], mask], dim=1)
    for _ in range(4):
        look = torch.randn(found[0].shape, generator=generator)
        a, b, still = ((part * look).flatten(1).sum(1).numpy() for part in (found, wanted, centre[:, None]))
        assert kstest(a, b).pvalue > 1e-6
        assert kstest(still, b).pvalue < 1e-6  # the test sees a decoder that draws nothing


def test_components_are_drawn_as_often_as_they_weigh():
    release = make_release("mixture")
    draw = decoder_of(release).drawn
    assert draw is not None
    shares = norm.cdf(draw.quantiles.double().numpy())
    weights = draw.mixture.weights.double().numpy()
    wanted = np.cumsum(weights / weights.sum(1, keepdims=True), axis=1)[:, :-1]
    np.testing.assert_allclose(shares, wanted, atol=1e-6)


def test_a_graph_that_differs_is_not_written(monkeypatch):
    exported = write_onnx._exported

    def spoiled(graph, *example):
        proto = exported(graph, *example)
        graph.decoder.model.decoder.last.conv.bias.add_(0.01)
        return proto

    monkeypatch.setattr(write_onnx, "_exported", spoiled)
    with pytest.raises(RunError, match="differs from the model by"):
        to_onnx(make_release("attention"), FACTS)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingPart, match=r"onnxscript is missing: pip install 'medvae-dp\[onnx\]'"):
        to_onnx(make_release("attention"), FACTS)
