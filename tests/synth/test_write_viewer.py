"""The viewer page in a headless Chromium: a volume is drawn, its mask with it, and nothing is asked from outside."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medvae.errors import RunError
from medvae.synth import write_viewer as module
from medvae.synth.write_viewer import write_viewer
from medvae.types import Intensity, SyntheticCohort

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
FLAGS = [
    *("--headless=new", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    *("--disable-background-networking", "--window-size=800,600", "--virtual-time-budget=10000"),
]
PROBE = """
addEventListener("securitypolicyviolation", e => { document.body.dataset.refused = e.blockedURI; });
new MutationObserver((_, me) => {
  me.disconnect();
  document.body.dataset.fetched = JSON.stringify(
    performance.getEntriesByType("resource").map(e => e.name).filter(n => !/^(data|blob):/.test(n)));
}).observe(document.body, { attributes: true, attributeFilter: ["data-shown"] });
"""
Maker = Callable[..., SyntheticCohort]


def ball(make_cohort: Maker, masks: bool = True) -> SyntheticCohort:
    """Two volumes: one with a bright ball, the second one dark; the ball's core is masked."""
    cohort = make_cohort((32, 32, 32), "MR", Intensity("percentile", 1, 99), 2, masks)
    axes = np.meshgrid(*[np.linspace(-1, 1, 32)] * 3, indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes))
    images = np.stack([(radius < 0.8) * 0.8, np.zeros_like(radius)]).astype(np.float32)
    labels = np.stack([radius < 0.3, np.zeros_like(radius)]).astype(np.uint8) if masks else None
    space = replace(cohort.space, spacing_mm=(2.0, 2.0, 2.0), mask_labels=(1,) if masks else ())
    return replace(cohort, images=images, masks=labels, space=space)


def chromium(page: Path, *more: str) -> str:
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [str(CHROMIUM), *FLAGS, profile, *more, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


def picture(page: Path) -> np.ndarray:
    """A screenshot (600, 800, 3), below the page's head."""
    from PIL import Image

    chromium(page, f"--screenshot={page.parent / 'shot.png'}")
    return np.asarray(Image.open(page.parent / "shot.png").convert("RGB")).astype(int)[200:]


def scans(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="scans">(.*?)</script>', page, flags=re.S)
    assert found is not None
    return json.loads(found[1])


@browser
def test_a_volume_and_its_mask_are_drawn(tmp_path: Path, make_cohort: Maker, claim: dict[str, object]) -> None:
    write_viewer(ball(make_cohort), tmp_path, claim)
    shot = picture(tmp_path / "viewer.html")
    spread = shot.max(axis=2) - shot.min(axis=2)
    grey = (spread < 12) & (shot.min(axis=2) > 150)
    red = (shot[..., 0] > 150) & (spread > 60)
    assert grey.sum() > 5_000  # three planes of a ball at 0.8 of white
    assert red.sum() > 500
    # The first plane lies left: its ball is as wide as it is high.
    rows, columns = np.nonzero(grey[:, :200])
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 0.15 * np.ptp(rows)


@browser
def test_a_dark_volume_is_dark(tmp_path: Path, make_cohort: Maker) -> None:
    cohort = ball(make_cohort, masks=False)
    write_viewer(replace(cohort, images=cohort.images[::-1]), tmp_path)
    shot = picture(tmp_path / "viewer.html")
    assert ((shot.max(axis=2) - shot.min(axis=2) < 12) & (shot.min(axis=2) > 150)).sum() < 500


@browser
def test_a_flat_image_is_drawn(tmp_path: Path, make_cohort: Maker) -> None:
    cohort = make_cohort((24, 32), "DX", Intensity("window", 0, 255), 1, False)
    images = np.zeros_like(cohort.images)
    images[:, :, :16] = 0.9  # the left half of the picture
    write_viewer(replace(cohort, images=images), tmp_path)
    bright = picture(tmp_path / "viewer.html").min(axis=2) > 180
    assert bright[:, :400].sum() > 20_000
    assert bright[:, 440:].sum() < 0.05 * bright[:, :400].sum()


@browser
def test_nothing_is_asked_from_outside(tmp_path: Path, make_cohort: Maker) -> None:
    write_viewer(ball(make_cohort), tmp_path)
    page = tmp_path / "viewer.html"
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    text = page.read_text(encoding="utf-8").replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    page.write_text(text.replace("<main><canvas", f"<script>{PROBE}</script><main><canvas"), encoding="utf-8")
    seen = chromium(page, "--dump-dom")
    assert 'data-shown="0"' in seen
    assert 'data-fetched="[]"' in seen
    assert "data-refused=" not in seen


@browser
def test_a_foreign_script_does_not_run(tmp_path: Path, make_cohort: Maker) -> None:
    write_viewer(ball(make_cohort), tmp_path)
    page = tmp_path / "viewer.html"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", '<script>document.body.dataset.foreign = "1"</script></body>'))
    assert "data-foreign" not in chromium(page, "--dump-dom")


def test_the_page_holds_the_scans_and_their_words(tmp_path: Path, make_cohort: Maker, claim: dict[str, object]) -> None:
    cohort = ball(make_cohort)
    rows = tuple({**row, "lesion": "</script><b>"} for row in cohort.conditions)
    assert write_viewer(replace(cohort, conditions=rows), tmp_path, claim) == ["viewer.html"]
    page = (tmp_path / "viewer.html").read_text(encoding="utf-8")
    assert "epsilon=8, delta=1e-05" in page
    assert "None shows a person" in page
    assert "The first 2 of 2 are shown" in page
    assert "<b>" not in page
    assert "BSD 2-Clause License" in page
    held = scans(page)["scans"]
    for index, scan in enumerate(held):
        image = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(scan["image"])))
        assert np.abs(np.asarray(image.dataobj) / 255 - cohort.images[index]).max() <= 0.5 / 255 + 1e-6
        mask = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(scan["mask"])))
        np.testing.assert_array_equal(np.asarray(mask.dataobj), cohort.masks[index])


def test_a_page_holds_what_a_browser_can_bear(tmp_path: Path, make_cohort: Maker, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_SCANS", 3)
    write_viewer(make_cohort(count=5), tmp_path / "a")
    assert "The first 3 of 5 are shown" in (tmp_path / "a" / "viewer.html").read_text()
    monkeypatch.setattr(module, "MAX_CHARACTERS", 1)
    write_viewer(make_cohort(count=5), tmp_path / "b")
    assert "The first 1 of 5 are shown" in (tmp_path / "b" / "viewer.html").read_text()
    with pytest.raises(RunError, match="exists"):
        write_viewer(make_cohort(count=1), tmp_path / "b")
