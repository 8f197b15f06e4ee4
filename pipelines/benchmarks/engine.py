"""Time and memory of one private step by the ways there are, against a plain step.

    python pipelines/benchmarks/engine.py                     # table; --json FILE writes the numbers too
    python pipelines/benchmarks/engine.py --quick             # fewer turns

A step is forward, backward, clip and sum; noise and weight update cost the same for every private way and are left out.
Times are medians of CPU seconds of steps that take turns in one process, on the same batch. Memory is the peak of a
process of its own, above its start. "patient" has four scans a patient. `hooks` and `ghost` are wrong for some layers.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer
from step import in_child, make_space
from torch import Tensor, nn

from medvae.config import Recipe
from medvae.nets.build import build_model
from medvae.train.engine.module import BookkeepingSampler
from medvae.train.rule import resolve
from medvae.types import Batch

Step = Callable[[], object]
BOUND = 1.0


class ConvVAE(nn.Module):
    """Strided convolutions down, transposed ones up, GroupNorm between, a Gaussian code."""

    def __init__(self, shape: tuple[int, ...], widths: tuple[int, ...], latent: int = 16) -> None:
        super().__init__()
        conv, up = {2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}[len(shape)]
        kernel = 4 if len(shape) == 2 else 3
        down, back = [], []
        for a, b in zip((1, *widths), widths, strict=False):
            down += [conv(a, b, kernel, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
        for a, b in zip(widths[::-1], widths[-2::-1], strict=False):
            back += [up(a, b, 4, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
        self.down = nn.Sequential(*down, conv(widths[-1], widths[-1], 3, padding=1), nn.SiLU())
        self.inner = (widths[-1], *(n >> len(widths) for n in shape))
        self.code = nn.Linear(int(np.prod(self.inner)), 2 * latent)
        self.start = nn.Linear(latent, int(np.prod(self.inner)))
        self.up = nn.Sequential(*back, up(widths[0], 1, 4, stride=2, padding=1))

    def forward(self, x: Tensor, _condition: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = self.code(self.down(x).flatten(1)).chunk(2, dim=1)
        y = self.up(self.start(mean + noise * torch.exp(0.5 * log_variance)).view(-1, *self.inner))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return (y - x).square().flatten(1).sum(1) + kl


class KL(nn.Module):
    """MONAI's AutoencoderKL without attention; the noise comes from outside."""

    def __init__(self) -> None:
        super().__init__()
        from monai.networks.nets import AutoencoderKL

        self.net = AutoencoderKL(
            2, 1, 1, num_res_blocks=(1, 1, 1), channels=(16, 32, 32), attention_levels=(False,) * 3, latent_channels=4,
            norm_num_groups=8, with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
        )  # fmt: skip

    def forward(self, x: Tensor, _condition: Tensor, noise: Tensor) -> Tensor:
        mean, sigma = self.net.encode(x)
        y = self.net.decode(mean + sigma * noise.view(mean.shape))
        kl = 0.5 * (mean.square() + sigma.square() - 1 - sigma.square().log()).flatten(1).sum(1)
        return (y - x).square().flatten(1).sum(1) + kl


def product(shape: tuple[int, ...], masks: tuple[int, ...], patients: int) -> nn.Module:
    """The model that the rule chooses for a cohort of this size."""
    space = make_space(shape, masks)
    return build_model(space, resolve(Recipe(), patients, space))


def rows() -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    """Yield a name, a model and its inputs."""
    torch.manual_seed(0)
    for name, shape, widths, batch in (
        ("a: 2D 64x64", (64, 64), (32, 64, 128), 64),
        ("b: 3D 32x48x32", (32, 48, 32), (16, 32, 64), 8),
    ):
        yield (
            name,
            ConvVAE(shape, widths),
            (torch.rand(batch, 1, *shape), torch.zeros(batch, 0), torch.randn(batch, 16)),
        )
    yield "c: AutoencoderKL 2D 64x64", KL(), (torch.rand(8, 1, 64, 64), torch.zeros(8, 0), torch.randn(8, 4 * 16 * 16))
    for name, shape, masks, patients, batch in (
        ("product 2D 28x28", (28, 28), (), 3000, 128),
        ("product 2D 64x64", (64, 64), (), 3000, 64),
        ("product 3D 32x48x32, 2 masks", (32, 48, 32), (1, 2), 200, 16),
    ):
        model = product(shape, masks, patients)
        with torch.no_grad():
            for parameter in model.parameters():  # off the start, where some gradients are zero
                parameter.add_(0.02 * torch.randn(parameter.shape))
        condition = torch.eye(2)[torch.arange(batch) % 2]
        yield name, model, (torch.rand(batch, 1 + len(masks), *shape), condition, torch.randn(batch, model.latent_dim))


def plain(model: nn.Module, inputs: tuple[Tensor, ...]) -> Step:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(*inputs).sum().backward()

    return step


def engine(model: nn.Module, inputs: tuple[Tensor, ...], scans: int) -> Step:
    sampler = BookkeepingSampler(model, max_grad_norm=BOUND, max_scans=10**6)
    x, condition, noise = inputs
    batch = Batch(x.numpy(), condition.numpy(), np.arange(len(x)) // scans)
    return lambda: sampler.clipped_sum(batch, noise)


def opacus(model: nn.Module, inputs: tuple[Tensor, ...], *, functorch: bool) -> Step:
    module = GradSampleModule(model, loss_reduction="sum", force_functorch=functorch)
    inner = torch.optim.SGD(module.parameters(), lr=0.0)
    optimizer = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=BOUND, expected_batch_size=1)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        module(*inputs).sum().backward()
        optimizer.clip_and_accumulate()

    return step


def ghost(model: nn.Module, inputs: tuple[Tensor, ...]) -> Step:
    module = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=BOUND)

    def step() -> None:
        module.zero_grad(set_to_none=True)
        losses = module(*inputs)
        losses.sum().backward(retain_graph=True)
        factor = module.get_clipping_coef()
        module.zero_grad(set_to_none=True)
        module.disable_hooks()
        (factor * losses).sum().backward()
        module.enable_hooks()

    return step


WAYS: dict[str, Callable[[nn.Module, tuple[Tensor, ...]], Step]] = {
    "plain": plain,
    "engine, sample": lambda model, inputs: engine(model, inputs, 1),
    "engine, patient": lambda model, inputs: engine(model, inputs, 4),
    "functorch": lambda model, inputs: opacus(model, inputs, functorch=True),
    "hooks": lambda model, inputs: opacus(model, inputs, functorch=False),
    "ghost": ghost,
}


def peak(way: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Take two steps; to be run in a process of its own."""
    step = WAYS[way](model, inputs)
    step()
    step()
    return {}


def times(model: nn.Module, inputs: tuple[Tensor, ...], turns: int) -> dict[str, float]:
    """Return the median CPU seconds of a step a way; NaN for a way that cannot run the model."""
    steps, found = {}, {}
    for way, make in WAYS.items():
        try:
            steps[way] = make(copy.deepcopy(model), inputs)
            steps[way]()
            steps[way]()
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError):
            steps.pop(way, None)  # Opacus fails in ways of its own, layer by layer
            found[way] = float("nan")
    taken: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(turns):
        for way, step in steps.items():
            begun = time.process_time()
            step()
            taken[way].append(time.process_time() - begun)
    return found | {way: statistics.median(values) for way, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print("| row | parameters | plain step, s | " + " | ".join(f"{w}: time, memory" for w in list(WAYS)[1:]) + " |")
    print("|---" * (len(WAYS) + 2) + "|")
    table = []
    # Memory first, while this process has none to give away that a child would find free.
    peaks = [{way: in_child(peak, way, model, inputs)["peak_mib"] for way in WAYS} for _, model, inputs in rows()]
    for memory, (name, model, inputs) in zip(peaks, rows(), strict=True):
        seconds = times(model, inputs, 3 if options.quick else 11)
        ran = [way for way in WAYS if seconds[way] == seconds[way]]
        count = sum(p.numel() for p in model.parameters())
        table.append(
            {"row": name, "parameters": count, "batch": len(inputs[0]), "seconds": seconds, "peak_mib": memory}
        )
        ratios = [
            f"{seconds[w] / seconds['plain']:.2f}, {memory[w] / memory['plain']:.2f}" if w in ran else "fails"
            for w in list(WAYS)[1:]
        ]
        print(f"| {name}, batch {len(inputs[0])} | {count:,} | {seconds['plain']:.3f} | " + " | ".join(ratios) + " |")
    if options.json:
        machine = {"processor": platform.processor(), "threads": options.threads, "torch": torch.__version__}
        options.json.write_text(json.dumps({"machine": machine, "rows": table}, indent=2))


if __name__ == "__main__":
    main()
