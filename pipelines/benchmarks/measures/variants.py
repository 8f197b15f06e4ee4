"""Variants against the VAE that they vary: attention, VAE-GAN, SRL-VAE."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from measures.cells import Case, Measure, Work
from measures.data import Images, cohort, pneumonia, split
from measures.training import Fitted, fit, network, rebuilt
from medvae.audit.embedding import embed
from medvae.audit.fidelity import frechet, gaussian_of
from medvae.nets.cvae import ConditionalVAE
from medvae.nets.robust import attack
from medvae.synth.sample import generate
from medvae.types import Batch
from medvae.vault.store import CohortStore

SCANS, FEW, ATTACKED = 4708, 1500, 200
LONGER, TIMES = ", longer", 4
RADII = (0.0, 0.03, 0.06, 0.1)


def trained(case: Case, seed: int, work: Work, model: dict[str, Any], **more: Any) -> tuple[Fitted, CohortStore]:
    """Train a variant on PneumoniaMNIST without labels; one that ends in LONGER for TIMES as many steps."""
    images = {k: v for k, v in pneumonia(work.data).items() if k.endswith("images")}
    images["train_images"] = images["train_images"][np.random.default_rng(seed).permutation(SCANS)[:FEW]]
    folder, store = cohort(work.out / "cohorts" / f"PneumoniaMNIST-{FEW}-{seed}", images)
    times = TIMES if case["variant"].endswith(LONGER) else 1
    return fit(folder, network(case["epsilon"], model, FEW, times, **more), case["epsilon"], seed), store


def run_attention(case: Case, seed: int, work: Work) -> dict[str, float]:
    """Return the held-out error, and the number of parameters."""
    model: dict[str, Any] = {"channels": (17, 34)}
    if _plain(case) == "attention":
        model = {"attention": True}
    model |= {"norm_groups": 1}  # else 17 and 34 channels, which four groups do not divide, are normalised otherwise
    fitted, store = trained(case, seed, work, model)
    held = split(store, "holdout")
    error = float(np.square(rebuilt(fitted.model, held) - held.x[:, 0]).mean())
    return {"MSE x 1000": 1000 * error, "parameters": sum(p.numel() for p in fitted.model.parameters())}


def run_gan(case: Case, seed: int, work: Work) -> dict[str, float]:
    """Return how far samples are from held-out images: in fine frequencies, and in the shipped embedding."""
    weight = {"VAE": 0.0, "VAE-GAN 0.1": 0.1, "VAE-GAN 1": 1.0}[_plain(case)]
    fitted, store = trained(case, seed, work, {"adversary": weight})
    held = split(store, "holdout")
    made = generate(fitted.release, [{}] * len(held.x), seed).images
    error = float(np.square(rebuilt(fitted.model, held) - held.x[:, 0]).mean())
    gaussians = [gaussian_of(f, np.ones(len(f))) for f in map(embed, (made, held.x[:, 0]))]
    return {
        "spectrum gap (dB)": abs(fine_power(made) - fine_power(held.x[:, 0])),
        "Fréchet": frechet(*gaussians[0], *gaussians[1]),
        "MSE x 1000": 1000 * error,
    }


def fine_power(images: Images) -> float:
    """Return the mean power in dB of images (N, h, w) above half of the Nyquist frequency."""
    power = np.square(np.abs(np.fft.fft2(images - images.mean((1, 2), keepdims=True)))).mean(0)
    axes = (np.fft.fftfreq(n) for n in images.shape[1:])
    return float(10 * np.log10(power[np.hypot(*np.meshgrid(*axes, indexing="ij")) > 0.25].mean()))


def run_srl(case: Case, seed: int, work: Work) -> dict[str, float]:
    """Return the error of reconstructions of attacked scans, by the size of the attack, and the cost of training."""
    more = {} if case["variant"] == "VAE" else {"robust": {"enabled": True, "steps": 40, "learning_rate": 2e-3}}
    fitted, store = trained(case, seed, work, {}, **more)
    held = split(store, "holdout")
    held = held._replace(x=held.x[:ATTACKED], condition=held.condition[:ATTACKED])
    errors = {f"MSE x 1000 at {radius:g}": 1000 * _attacked(fitted.model, held, radius) for radius in RADII}
    return {**errors, "CPU s": fitted.cpu_s}


def _attacked(model: ConditionalVAE, batch: Batch, radius: float) -> float:
    moved = batch.x
    if radius:
        moved = attack(model, torch.from_numpy(batch.x), torch.from_numpy(batch.condition), radius, 10).numpy()
    return float(np.square(rebuilt(model, batch._replace(x=moved)) - batch.x[:, 0]).mean())


def _plain(case: Case) -> str:
    return case["variant"].removesuffix(LONGER)


def _cases(*variants: str) -> tuple[Case, ...]:
    return tuple({"variant": v, "epsilon": e} for v in variants for e in ("none", "8"))


def _longer(*variants: str) -> tuple[Case, ...]:
    return tuple({"variant": v + LONGER, "epsilon": "none"} for v in variants)


ON = (
    f"{FEW:,} images of PneumoniaMNIST, 16 codes, a network without the closed form; 250 steps of 64 scans, at epsilon "
    "8 80 of an eighth."
)
ATTENTION = Measure(
    "attention",
    "Attention against none",
    f"{ON} Held-out error at nearly equal numbers of parameters: the network without attention is wider. One group "
    f"of normalisation in both. Longer: {TIMES} times the steps.",
    (*_cases("none", "attention"), *_longer("none", "attention")),
    run_attention,
)
GAN = Measure(
    "gan",
    "VAE-GAN against VAE",
    f"{ON} Gap in mean power above half the Nyquist frequency, and Fréchet distance in the shipped embedding, of 524 "
    "samples to the 524 validation images. The critic shares the one clipped gradient, so it costs no second budget. "
    f"Longer: {TIMES} times the steps.",
    (*_cases("VAE", "VAE-GAN 0.1", "VAE-GAN 1"), *_longer("VAE", "VAE-GAN 0.1")),
    run_gan,
)
SRL = Measure(
    "srl",
    "SRL-VAE against VAE under attack",
    f"{ON} SRL-VAE: 40 further steps of an eighth of the scans, attacked with radius 0.03. {ATTACKED} "
    "validation images, attacked by 10 steps of projected gradient ascent on the model itself; 0 is clean.",
    _cases("VAE", "SRL-VAE"),
    run_srl,
)
