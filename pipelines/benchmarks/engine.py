"""Time and memory of one private step by the ways there are, against a plain step with the same settings.

    python pipelines/benchmarks/engine.py                              # all rows; --out FILE writes JSON
    python pipelines/benchmarks/engine.py --rows a c --threads 1 2     # some rows, on one and on two threads
    python pipelines/benchmarks/engine.py --settings bf16              # bfloat16 and channels_last, plain step too
    python pipelines/benchmarks/engine.py --settings compile           # the same models under torch.compile

A step is forward, backward, clip and sum; noise and weight update cost the same for every private way and are left out
(step.py has whole steps). Times are medians, in CPU seconds and by the wall, of steps that take turns in one process on
the same batch. Memory is the peak of two steps in a process of its own, above what it holds before them; large blocks
are then mapped one by one, so that it is what lives and not what the allocator keeps. "patient" has four scans a
patient. Opacus's `hooks` and `ghost` are wrong for some layers: docs/performance.md.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer
from step import make_space
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from medvae.config import DpSgdConfig, Recipe
from medvae.nets.build import build_model
from medvae.train.engine.memory import Limits
from medvae.train.engine.module import BookkeepingSampler
from medvae.train.gradient import FULL, Compute
from medvae.train.rule import resolve
from medvae.types import Batch

Step = Callable[[], object]
Inputs = tuple[Tensor, ...]
BOUND = 1.0
SETTINGS = {"fp32": FULL, "bf16": Compute(bf16=True, channels_last=True), "compile": FULL}
# vmap(grad) by so many scans at a time, as a whole batch of per-sample gradients would not fit.
VMAP_CHUNK = 8
MMAP_THRESHOLD, MMAP_BYTES = -3, 2**18


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
    """MONAI's AutoencoderKL; the noise comes from outside."""

    def __init__(self, dims: int, widths: tuple[int, ...], *, attention: bool) -> None:
        super().__init__()
        from monai.networks.nets import AutoencoderKL

        levels = len(widths)
        self.net = AutoencoderKL(
            dims, 1, 1, num_res_blocks=(1,) * levels, channels=widths, latent_channels=4, norm_num_groups=8,
            attention_levels=(*[False] * (levels - 1), attention), with_encoder_nonlocal_attn=attention,
            with_decoder_nonlocal_attn=attention,
        )  # fmt: skip

    def forward(self, x: Tensor, _condition: Tensor, noise: Tensor) -> Tensor:
        mean, sigma = self.net.encode(x)
        y = self.net.decode(mean + sigma * noise.view(mean.shape))
        kl = 0.5 * (mean.square() + sigma.square() - 1 - sigma.square().log()).flatten(1).sum(1)
        return (y - x).square().flatten(1).sum(1) + kl


def vae(shape: tuple[int, ...], widths: tuple[int, ...], batch: int) -> tuple[nn.Module, Inputs]:
    return ConvVAE(shape, widths), (torch.rand(batch, 1, *shape), torch.zeros(batch, 0), torch.randn(batch, 16))


def kl(shape: tuple[int, ...], widths: tuple[int, ...], batch: int, *, attention: bool) -> tuple[nn.Module, Inputs]:
    code = 4 * int(np.prod([n >> (len(widths) - 1) for n in shape]))
    inputs = (torch.rand(batch, 1, *shape), torch.zeros(batch, 0), torch.randn(batch, code))
    return KL(len(shape), widths, attention=attention), inputs


def recipe(shape: tuple[int, ...], masks: tuple[int, ...], patients: int, batch: int) -> tuple[nn.Module, Inputs]:
    """Return the model that the default recipe gives a hospital with so many patients."""
    space = make_space(shape, masks)
    model = build_model(space, resolve(Recipe(dpsgd=DpSgdConfig(enabled=True)), patients, space))
    with torch.no_grad():
        for parameter in model.parameters():  # off the start, where some gradients are zero
            parameter.add_(0.02 * torch.randn(parameter.shape))
    condition = torch.eye(2)[torch.arange(batch) % 2]
    return model, (torch.rand(batch, 1 + len(masks), *shape), condition, torch.randn(batch, model.latent_dim))


ROWS: dict[str, tuple[str, Callable[[], tuple[nn.Module, Inputs]]]] = {
    "a": ("convolutional VAE 2D 64x64, batch 64", lambda: vae((64, 64), (32, 64, 128), 64)),
    "b": ("convolutional VAE 3D 32x48x32, batch 8", lambda: vae((32, 48, 32), (16, 32, 64), 8)),
    "c": ("AutoencoderKL 2D 64x64, batch 8", lambda: kl((64, 64), (16, 32, 32), 8, attention=False)),
    "d": ("AutoencoderKL with attention 2D 64x64, batch 8", lambda: kl((64, 64), (16, 32, 32), 8, attention=True)),
    "e": ("AutoencoderKL with attention 3D 16x24x16, batch 4", lambda: kl((16, 24, 16), (16, 32), 4, attention=True)),
    "f": ("default recipe 2D 28x28, 3,000 patients, batch 128", lambda: recipe((28, 28), (), 3000, 128)),
    "g": ("default recipe 2D 64x64, 3,000 patients, batch 64", lambda: recipe((64, 64), (), 3000, 64)),
    "h": ("default recipe 3D 32x48x32, 2 masks, batch 16", lambda: recipe((32, 48, 32), (1, 2), 500, 16)),
}


def plain(model: nn.Module, inputs: Inputs, compute: Compute, *, compiled: bool = False) -> Step:
    if compute.channels_last:
        model = model.to(memory_format=torch.channels_last if inputs[0].dim() == 4 else torch.channels_last_3d)
    call = torch.compile(model) if compiled else model

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with compute.precision("cpu"):
            losses = call(compute.laid_out(inputs[0]), *inputs[1:])
        losses.float().sum().backward()

    return step


def engine(model: nn.Module, inputs: Inputs, scans: int, compute: Compute, *, compiled: bool = False) -> Step:
    sampler = BookkeepingSampler(model, max_grad_norm=BOUND, limits=Limits(10**6), compute=compute)
    if compiled:
        model.compile()
    x, condition, noise = inputs
    batch = Batch(x.numpy(), condition.numpy(), np.arange(len(x)) // scans)
    return lambda: sampler.clipped_sum(batch, noise)


def opacus(model: nn.Module, inputs: Inputs, *, functorch: bool) -> Step:
    module = GradSampleModule(model, loss_reduction="sum", force_functorch=functorch)
    inner = torch.optim.SGD(module.parameters(), lr=0.0)
    optimizer = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=BOUND, expected_batch_size=1)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        module(*inputs).sum().backward()
        optimizer.clip_and_accumulate()

    return step


def ghost(model: nn.Module, inputs: Inputs) -> Step:
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


def whole_vmap(model: nn.Module, inputs: Inputs) -> Step:
    """torch.func's per-sample gradients, a few scans at a time."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    by_scan = vmap(grad(lambda w, *one: functional_call(model, w, tuple(t[None] for t in one)).sum()), (None, 0, 0, 0))

    def step() -> None:
        totals = None
        for part in zip(*(t.split(VMAP_CHUNK) for t in inputs), strict=True):
            found = list(by_scan(weights, *part).values())
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in found]).norm(dim=0)
            factor = (BOUND / norms.clamp(min=1e-30)).clamp(max=1.0)
            sums = [torch.tensordot(factor, g, dims=1) for g in found]
            totals = sums if totals is None else [a + b for a, b in zip(totals, sums, strict=True)]

    return step


def ways(settings: str) -> dict[str, Callable[[nn.Module, Inputs], Step]]:
    """Return the ways to take a step with these settings; the others know no other precision than the model's."""
    compute = SETTINGS[settings]
    found: dict[str, Callable[[nn.Module, Inputs], Step]] = {
        "plain": lambda m, i: plain(m, i, compute),
        "engine, patient": lambda m, i: engine(m, i, 4, compute),
        "engine, sample": lambda m, i: engine(m, i, 1, compute),
    }
    if settings == "compile":
        found["plain, compiled"] = lambda m, i: plain(m, i, compute, compiled=True)
        found["engine, patient, compiled"] = lambda m, i: engine(m, i, 4, compute, compiled=True)
    if settings == "fp32":
        found["functorch"] = lambda m, i: opacus(m, i, functorch=True)
        found["hooks"] = lambda m, i: opacus(m, i, functorch=False)
        found["ghost"] = ghost
        found["vmap(grad)"] = whole_vmap
    return found


def peak_mib(make: Callable[[nn.Module, Inputs], Step], row: str) -> float:
    """Return the peak of two steps in a forked process, above what it held before them; NaN where they fail."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        value = float("nan")
        try:
            ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, MMAP_BYTES)
            torch.manual_seed(0)
            step = make(*ROWS[row][1]())
            before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            step()
            step()
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            value = (int(status["VmHWM"].split()[0]) * 1024 - before) / 2**20
        except Exception:  # Opacus fails in ways of its own, layer by layer
            value = float("nan")
        finally:
            os.write(write, json.dumps(value).encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return float(json.loads(text))


def times(makers: dict[str, Callable[[nn.Module, Inputs], Step]], row: str, turns: int) -> dict[str, dict[str, float]]:
    """Return a way's median CPU and wall seconds of steps that take turns; NaN for one that cannot run the model."""
    torch.manual_seed(0)
    model, inputs = ROWS[row][1]()
    steps: dict[str, Step] = {}
    for way, make in makers.items():
        try:
            step = make(copy.deepcopy(model), inputs)
            for _ in range(3):
                step()
            steps[way] = step
        except Exception as error:
            print(f"  {row}, {way}: {type(error).__name__}", flush=True)
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in makers}
    for _ in range(turns):
        for way, step in steps.items():
            begun = time.process_time(), time.perf_counter()
            step()
            taken[way].append((time.process_time() - begun[0], time.perf_counter() - begun[1]))
    return {
        way: {
            name: statistics.median(t[i] for t in values) if values else float("nan")
            for i, name in enumerate(("cpu_s", "wall_s"))
        }
        for way, values in taken.items()
    }


def print_row(row: str, found: dict[str, dict[str, float]], threads: int, memory: bool) -> None:
    plain = found["plain"]
    cells = []
    for way in list(found)[1:]:
        names = ("cpu_s", "wall_s", "peak_mib") if memory else ("cpu_s", "wall_s")
        ratios = [found[way][n] / plain[n] for n in names]
        cells.append("fails" if ratios[0] != ratios[0] else ", ".join(f"{r:.2f}" for r in ratios))
    title = f"{row}: {ROWS[row][0]}" + (f", {threads} threads" if threads > 1 else "")
    print(f"| {title} | {plain['cpu_s']:.3f} | " + " | ".join(cells) + " |", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="only these, beside plain")
    parser.add_argument("--settings", choices=list(SETTINGS), default="fp32")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[nn.Module, Inputs], Step]] = {
        way: make for way, make in ways(options.settings).items() if way == "plain" or way in (options.ways or [way])
    }
    # Memory first, while this process has none to give away that a child would find free.
    rows: Iterable[str] = options.rows
    memory = {} if options.no_memory else {r: {w: peak_mib(make, r) for w, make in makers.items()} for r in rows}
    kind = "CPU time, wall time" + ("" if options.no_memory else ", peak memory")
    print(f"ratios to the plain step with the same settings ({options.settings}): {kind}")
    print("| row | plain, CPU s | " + " | ".join(list(makers)[1:]) + " |\n|---" + "|---" * len(makers) + "|")
    table = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for row in options.rows:
            found = times(makers, row, options.turns)
            for way, value in memory.get(row, {}).items():
                found[way]["peak_mib"] = value
            print_row(row, found, threads, bool(memory))
            table.append({"row": row, "model": ROWS[row][0], "threads": threads, "ways": found})
    if options.out:
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        content = {"machine": machine, "settings": options.settings, "turns": options.turns, "rows": table}
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
