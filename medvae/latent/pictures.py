"""Pictures of what was made from real scans; as private as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.types import FloatArray

COLOURS = ("#1f4e79", "#b4500f", "#3b7a57", "#6b7280", "#1c2733", "#8c6d1f", "#7a3b69", "#2b7f8c")
MARKERS = "osD^vPX*"


def middle(image: FloatArray) -> FloatArray:
    """Return a 2D image (H, W) to look at: the image, or the middle slice of a volume (X, Y, Z), upright."""
    return image if image.ndim == 2 else np.asarray(image[:, :, image.shape[2] // 2].T[::-1])


def rows_of_images(path: Path, rows: Sequence[tuple[str, FloatArray]], maps: Sequence[str] = ()) -> None:
    """Draw one row of images (N, *spatial) a name, in grey from 0 to 1; rows named in `maps` in colour, with a bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = max(len(images) for _, images in rows)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.2 * columns + 1.4, 1.25 * len(rows)), squeeze=False, layout="constrained"
    )
    for (name, images), line in zip(rows, axes, strict=True):
        top = max(float(images.max()), 1e-6)
        for index, axis in enumerate(line):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
            if index < len(images):
                coloured = name in maps
                drawn = axis.imshow(
                    middle(images[index]), cmap="inferno" if coloured else "gray", vmin=0, vmax=top if coloured else 1
                )
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        if name in maps:
            figure.colorbar(drawn, ax=list(line), shrink=0.8).ax.tick_params(labelsize=6)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def scatter(path: Path, points: FloatArray, groups: Sequence[Any], title: str) -> None:
    """Draw points (N, 2), one colour and marker a group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(4.8, 4.0), layout="constrained")
    names = sorted({str(g) for g in groups})
    which = np.asarray([names.index(str(g)) for g in groups])
    for index, name in enumerate(names):
        some = points[which == index]
        axis.scatter(
            some[:, 0],
            some[:, 1],
            s=9,
            alpha=0.7,
            linewidths=0,
            label=name.replace("$", "")[:40],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
        )
    axis.tick_params(labelsize=7)
    axis.set_xlabel("first principal axis of the codes", fontsize=8)
    axis.set_ylabel("second", fontsize=8)
    axis.set_title(title, fontsize=9)
    if 1 < len(names) <= 12:
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def histogram(path: Path, groups: Sequence[tuple[str, npt.NDArray[np.float64]]], line: float, label: str) -> None:
    """Draw the distributions of scores, and the threshold as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(4.8, 2.8), layout="constrained")
    together = np.concatenate([values for _, values in groups])
    edges = np.linspace(float(together.min()), float(together.max()) + 1e-9, 31)
    for index, (name, values) in enumerate(groups):
        hatch = "" if index == 0 else "///"
        axis.hist(values, edges, alpha=0.6, label=f"{name} ({len(values)})", color=COLOURS[index], hatch=hatch)
    axis.axvline(line, color=COLOURS[4], linestyle="--", linewidth=1, label="threshold")
    axis.tick_params(labelsize=7)
    axis.set_xlabel(label, fontsize=8)
    axis.set_ylabel("patients", fontsize=8)
    figure.legend(loc="outside upper center", ncols=3, fontsize=7, frameon=False)  # above: bars may be anywhere
    figure.savefig(path, dpi=150)
    plt.close(figure)
