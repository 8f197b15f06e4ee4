"""What a step needs of memory, and how a budget is kept: by splitting a batch between patients, or by recomputing."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from medvae.errors import ConfigError
from medvae.types import Batch

GIB = 2**30
# Memory that the gradients of one part of a batch may take, in bytes: more gains nothing once the caches are full.
KEPT_BYTES = 32 * 2**20
# Activations of one part of a batch, in bytes, where no budget is given.
PART_BYTES = 512 * 2**20
# Bytes a parameter takes besides the gradients by patient: weight, average, two moments, sum, gradient, noise in
# float64 and what adding it takes.
STATE_BYTES = 6 * 4 + 2 * 8
# What the libraries take for themselves on a first step: compiled kernels, work areas, threads.
LIBRARY_BYTES = 64 * 2**20
# What allocators lose: blocks that are free and too small for what comes next.
SLACK = 1.25


@dataclass(frozen=True)
class Need:
    """Bytes of a step. scan: activations of one scan, forward and backward; gradient: of one patient; state: fixed."""

    scan: int
    gradient: int
    state: int

    def patient(self, scans: int) -> int:
        """Return what a step on one patient with so many scans takes at least."""
        return self.state + scans * self.scan + self.gradient


@dataclass(frozen=True)
class Limits:
    """How a batch is split. A patient is never split.

    scans: at most so many a part, but for a patient with more; kept: bytes of gradients by which patients are split;
    room: bytes of gradients that may be kept in a part; above it, they are recomputed once the factors are known.
    """

    scans: int
    kept: int = KEPT_BYTES
    room: float = float("inf")


def measure(model: nn.Module, batch: Batch, latent: Tensor) -> Need:
    """Return what a step with a model takes, from one forward pass on a few made-up scans (B, ...).

    Activations are what autograd keeps, and at the fullest moment of the backward pass three more of the largest.
    """
    parameters = list(model.parameters())
    own = {t.untyped_storage().data_ptr() for t in (*parameters, *model.buffers())}
    sizes: dict[int, int] = {}
    largest = 0

    def note(t: Tensor) -> Tensor:
        nonlocal largest
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            largest = max(largest, t.numel() * t.element_size())
        return t

    device = parameters[0].device
    inputs = (*(torch.from_numpy(a).to(device) for a in (batch.x, batch.condition)), latent.to(device))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        kept = model(*inputs)  # alive until here, so that no address is met twice
    del kept
    scans = len(batch.patient)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return Need(
        -(-int(SLACK * (sum(sizes.values()) + 3 * largest)) // scans),
        4 * trained,
        STATE_BYTES * trained + LIBRARY_BYTES,
    )


def limits(need: Need, memory_gib: float | None, scans_per_patient: int, device: torch.device) -> Limits:
    """Return how to split a batch so that the process (on a GPU: its tensors) stays within `memory_gib`.

    Raises ConfigError where one patient with `scans_per_patient` scans does not fit: a patient is never split.
    """
    if memory_gib is None:
        return Limits(max(1, PART_BYTES // need.scan))
    used = resident_bytes(device)
    free = memory_gib * GIB - used
    if free < need.patient(scans_per_patient):
        raise ConfigError(
            f"memory_gib is {memory_gib:g}, of which {used / GIB:.2f} GiB are in use before training, and one patient "
            f"of {scans_per_patient} scans needs {need.patient(scans_per_patient) / GIB:.2f} GiB: give at least "
            f"{(used + need.patient(scans_per_patient)) / GIB:.2f}, or lower dpsgd.scans_per_patient"
        )
    free -= need.state
    keeping = int(free // (need.scan + need.gradient))
    # Where gradients are recomputed, the gradients of the layers' outputs wait for the factors.
    recomputing = int(free // (2 * need.scan))
    if keeping < 2 * scans_per_patient and recomputing >= max(4 * scans_per_patient, 2 * keeping):
        half = max(scans_per_patient, recomputing // 2)
        return Limits(half, kept=sys.maxsize, room=free - 2 * half * need.scan)
    return Limits(max(1, keeping), kept=max(need.gradient, min(KEPT_BYTES, keeping * need.gradient)))


def resident_bytes(device: torch.device) -> int:
    """Return the memory in use: of this process, or on a GPU of its tensors."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that was in use so far.

    Linux keeps it by address space in /proc; getrusage(2) there counts what a parent held before the program began.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = [
            x for x in status.read_text(encoding="ascii", errors="replace").splitlines() if x.startswith("VmHWM")
        ]
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
