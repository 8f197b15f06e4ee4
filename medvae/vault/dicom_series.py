"""From the images of one series to stacks that are volumes: by orientation, and where places repeat, by what differs.

A series may hold several echoes, b-values, time points or acquisitions, each a volume of its own. They are told apart
only where they must be: where images of one orientation share a place, or where only the parts are evenly spaced. So a
tag that happens to vary along a plain volume does not tear it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from medvae.vault.dicom_geometry import SAME_PLACE, geometry, heights, same_direction
from medvae.vault.dicom_header import MARK_TAGS, Frame
from medvae.vault.scan import Rules, Unusable

Same = Callable[[Frame, Frame], bool]


def stacks(frames: Sequence[Frame], same_pixels: Same) -> tuple[list[list[Frame]], list[Frame]]:
    """Return the images of one series as stacks, and those left out as copies of an image at the same place.

    `same_pixels` decodes and compares two images; it is asked only where nothing else tells them apart.
    """
    found: list[list[Frame]] = []
    copies: list[Frame] = []
    for group in _by_direction(frames):
        for part in _split(group):
            kept, dropped = _without_copies(part, same_pixels)
            found.append(kept)
            copies += dropped
    return found, copies


def _by_direction(frames: Sequence[Frame]) -> list[list[Frame]]:
    groups: list[list[Frame]] = []
    for frame in frames:
        group = next((g for g in groups if same_direction(g[0], frame)), None)
        if group is None:
            groups.append([frame])
        else:
            group.append(frame)
    return groups


def _split(frames: list[Frame], since: int = 0) -> list[list[Frame]]:
    """Split by the first tag that makes it better, and go on with its parts."""
    if len(frames) < 2 or any(f.position is None or f.orientation is None for f in frames):
        return [frames]
    repeats = _repeats(frames)
    if not repeats and _stackable(frames):
        return [frames]
    for tag in range(since, len(MARK_TAGS)):
        parts: dict[str, list[Frame]] = defaultdict(list)
        for frame in frames:
            parts[frame.marks[tag] if frame.marks else ""].append(frame)
        if len(parts) < 2:
            continue
        groups = list(parts.values())
        better = sum(map(_repeats, groups)) < repeats if repeats else all(len(g) > 1 and _stackable(g) for g in groups)
        if better:
            return [part for group in groups for part in _split(group, tag + 1)]
    return [frames]


def _repeats(frames: Sequence[Frame]) -> int:
    """Count the images that share a place along the normal with another one."""
    return int((np.diff(np.sort(heights(frames))) <= SAME_PLACE).sum())


def _stackable(frames: Sequence[Frame]) -> bool:
    try:
        geometry(frames, Rules(slice_gap="refuse"))
    except Unusable:
        return False
    return True


def _without_copies(frames: list[Frame], same_pixels: Same) -> tuple[list[Frame], list[Frame]]:
    """Drop images that show the same pixels as another at the same place; any other repeat stays, to be refused."""
    if len(frames) < 2 or any(f.position is None or f.orientation is None for f in frames) or not _repeats(frames):
        return frames, []
    height = heights(frames)
    kept: list[Frame] = []
    copies: list[Frame] = []
    last: tuple[float, Frame] | None = None
    for i in np.argsort(height, kind="stable"):
        frame = frames[int(i)]
        if last is not None and height[i] - last[0] <= SAME_PLACE and same_pixels(last[1], frame):
            copies.append(frame)
            continue
        last = (float(height[i]), frame)
        kept.append(frame)
    return kept, copies
