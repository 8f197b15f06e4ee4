"""A walk through codes as people look at it: a grid, a short film, and what each step is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from medvae.report.ink import GREY, INK
from medvae.synth.walk import Walk
from medvae.types import FloatArray

FRAME_MS = 120
LONGEST = 320  # pixels of a film's picture


def middle(image: FloatArray) -> FloatArray:
    """Return a 2D image (H, W) to look at: the image, or the middle slice of a volume (X, Y, Z), upright."""
    return image if image.ndim == 2 else np.asarray(image[:, :, image.shape[2] // 2].T[::-1])


def grid(walk: Walk, path: Path) -> None:
    """Draw one line a path: the images, and under them how uncertain the decoder is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths, steps = walk.images.shape[:2]
    top = max(float(walk.uncertainty.max()), 1e-6)
    figure, axes = plt.subplots(
        2 * paths, steps, figsize=(0.95 * steps + 1.3, 1.95 * paths + 0.5), squeeze=False, layout="constrained"
    )
    for index in range(paths):
        for step in range(steps):
            image, unsure = axes[2 * index, step], axes[2 * index + 1, step]
            image.imshow(middle(walk.images[index, step]), cmap="gray", vmin=0, vmax=1)
            drawn = unsure.imshow(middle(walk.uncertainty[index, step]), cmap="inferno", vmin=0, vmax=top)
        axes[2 * index, 0].set_ylabel(walk.names[index], rotation=0, ha="right", va="center", fontsize=8, color=INK)
        axes[2 * index + 1, 0].set_ylabel("uncertainty", rotation=0, ha="right", va="center", fontsize=7, color=GREY)
    for step, value in enumerate(walk.at):
        axes[0, step].set_title(f"{value:.3g}", fontsize=7)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
    figure.colorbar(drawn, ax=list(axes[:, -1]), shrink=0.4, label="standard deviation").ax.tick_params(labelsize=6)
    figure.supxlabel(walk.axis, fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def film(walk: Walk, path: Path) -> None:
    """Write an animated GIF that goes along every path at once, there and back."""
    from PIL import Image

    paths, steps = walk.images.shape[:2]
    columns = int(np.ceil(np.sqrt(paths)))
    frames = []
    for step in [*range(steps), *range(steps - 2, 0, -1)]:
        tiles = [middle(walk.images[index, step]) for index in range(paths)]
        frames.append(Image.fromarray(_enlarged(_tiled(tiles, columns))))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)


def _tiled(tiles: list[FloatArray], columns: int) -> npt.NDArray[np.uint8]:
    blank = np.ones_like(tiles[0])
    padded = tiles + [blank] * (-len(tiles) % columns)
    lines = [np.concatenate(padded[i : i + columns], axis=1) for i in range(0, len(padded), columns)]
    return np.asarray(np.rint(np.concatenate(lines).clip(0, 1) * 255), dtype=np.uint8)


def _enlarged(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Repeat pixels, so that small images can be seen without being smoothed."""
    factor = max(1, LONGEST // max(image.shape))
    return np.asarray(image.repeat(factor, 0).repeat(factor, 1), dtype=np.uint8)
