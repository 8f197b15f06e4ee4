"""The grid all scans are brought to, chosen from the config and from public facts of the file format alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from medvae.config import IngestConfig
from medvae.errors import CohortError, ConfigError
from medvae.types import Condition, Intensity
from medvae.vault.preprocess import Grid
from medvae.vault.scan import MAX_VOXELS, Source

DEFAULT_SHAPES = {2: (64, 64), 3: (32, 32, 32)}
CT_WINDOW_HU = (-1000.0, 1000.0)
PERCENTILES = (1.0, 99.0)


def choose_grid(src: Source, config: IngestConfig) -> tuple[Grid, list[str]]:
    """Choose shape, spacing and intensity from the config and public facts of the format; say what was chosen."""
    notes = []
    shape = config.shape or src.shape or DEFAULT_SHAPES[src.dims]
    if len(shape) != src.dims:
        raise ConfigError(f"the scans are {src.dims}D and the shape has {len(shape)} numbers: give {src.dims}")
    if math.prod(shape) > MAX_VOXELS:
        raise ConfigError(f"the shape {'x'.join(map(str, shape))} has too many voxels: give at most {MAX_VOXELS:,}")
    if config.shape is None:
        notes.append(f"no shape was given: {'x'.join(map(str, shape))} is used")
    spacing = config.spacing_mm
    if spacing is not None and not src.spaced:
        raise ConfigError("the source tells no voxel size: leave --spacing-mm out")
    if spacing is not None and len(spacing) == 1:
        spacing = spacing * src.dims
    if spacing is not None and len(spacing) != src.dims:
        raise ConfigError(f"the scans are {src.dims}D and spacing_mm has {len(spacing)} numbers: give {src.dims}")
    if spacing is None:
        notes.append("no spacing was given: each field of view is resized to the shape, the spacing of 1 is nominal")
    return Grid(shape, spacing, _intensity(src, config)), notes


def _intensity(src: Source, config: IngestConfig) -> Intensity:
    """Return the rule: CT and 8-bit samples have a public window, all else takes the scan's own percentiles."""
    public = CT_WINDOW_HU if src.modality == "CT" else src.window
    mode = config.intensity
    if mode == "display":
        if src.layout != "dicom" or config.intensity_low is not None or config.intensity_high is not None:
            raise ConfigError("intensity display takes the window of DICOM headers: leave intensity_low and _high out")
        return Intensity("window", 0.0, 1.0)
    if mode == "auto":
        given = config.intensity_low is not None or config.intensity_high is not None
        mode = "window" if public is not None or given else "percentile"
    low, high = PERCENTILES if mode == "percentile" else public or (None, None)
    low = low if config.intensity_low is None else config.intensity_low
    high = high if config.intensity_high is None else config.intensity_high
    if low is None or high is None:
        raise ConfigError("an intensity window needs both ends: give intensity_low and intensity_high in raw units")
    ends_fit = math.isfinite(low) and math.isfinite(high) and low < high
    if not ends_fit or (mode == "percentile" and not (low >= 0 and high <= 100)):
        raise ConfigError(f"intensity_low {low:g} and intensity_high {high:g} are no range: give low below high")
    return Intensity("window" if mode == "window" else "percentile", low, high)


def common_modality(src: Source, conditions: Sequence[Condition]) -> str:
    """Return the modality of all scans. Mixed ones, and mixed BIDS suffixes, are used only as a condition."""
    names = {c.name for c in conditions}
    kinds = {s.attributes.get("suffix") for s in src.scans}
    if len(kinds) > 1 and "suffix" not in names:
        raise CohortError(
            f"the BIDS source holds {len(kinds)} kinds of image (suffixes): give one kind, or add the condition suffix"
        )
    if src.modality == "mixed" and "modality" not in names:
        raise CohortError("the source holds several modalities: give one of them, or add the condition modality")
    return "OT" if src.modality == "mixed" else src.modality
