"""The pages in a headless Chromium: figures drawn, the viewer shows volumes, nothing runs or loads but what is ours."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from board_samples import SHAPE, make_viewer
from report_samples import make_audit

from medvae.report import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    *("--disable-background-networking", "--dump-dom"),
]
PROBE = """
addEventListener("load", () => {
  const images = [...document.images];
  document.body.dataset.probe = JSON.stringify({
    images: images.length,
    empty: images.filter(i => !i.naturalWidth).map(i => i.alt),
    mute: images.filter(i => !i.alt.trim()).length,
    fetched: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    ...VIEWER
  });
});
"""
VIEWER = """(() => {
  const byId = name => document.getElementById("viewer-" + name);
  const canvas = byId("canvas");
  if (!canvas) return {};
  const at = (x, y) => canvas.getContext("2d").getImageData(x * 320, y * 320, 1, 1).data[0];
  const look = () => ({ said: byId("said").textContent, corners: [at(.3, .3), at(.7, .3), at(.3, .7), at(.7, .7)] });
  const set = (name, value) => {
    byId(name).value = value;
    for (const kind of ["input", "change"]) byId(name).dispatchEvent(new Event(kind, { bubbles: true }));
    return look();
  };
  const seen = { start: look() };
  if (byId("axis")) {
    seen.low = set("slice", 0);
    seen.high = set("slice", 99);
    seen.axis = set("axis", "0");
    seen.slices = byId("slice").max;
  }
  seen.bright = set("light", 120);
  seen.other = set("scan", 1);
  seen.named = [...document.querySelectorAll(".controls input, .controls select")].every(i => i.labels.length === 1);
  return { viewer: seen };
})()"""


def look(html: str, folder: Path, allow: bool = True) -> dict[str, Any] | None:
    """Open a page with our probe in it; without `allow` the page's own policy must stop it."""
    probe = PROBE.replace("VIEWER", VIEWER)
    digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
    if allow:
        html = re.sub(r"script-src ('none')?", f"script-src 'sha256-{digest}' ", html, count=1)
    page = folder / "page.html"
    page.write_text(html.replace("</body>", f"<script>{probe}</script></body>"), encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert "</html>" in done.stdout, done.stderr[-500:]
    return json.loads(found[1].replace("&quot;", '"')) if found else None


@pytest.mark.parametrize(("name", "file"), [("internal", "audit"), ("public", "audit"), ("certificate", "certificate")])
def test_chromium_draws_every_figure_and_fetches_nothing(
    rendered: dict[str, Path], tmp_path: Path, name: str, file: str
) -> None:
    probe = look((rendered[name] / f"{file}.html").read_text(encoding="utf-8"), tmp_path)
    assert probe is not None
    assert probe["images"] >= {"internal": 8, "public": 5, "certificate": 0}[name]
    assert (probe["empty"], probe["mute"], probe["fetched"], probe["wide"]) == ([], 0, [], 0)
    assert ("viewer" in probe) == (file == "audit")


def test_the_viewer_shows_the_volumes_as_its_sliders_say(rendered: dict[str, Path], tmp_path: Path) -> None:
    """The first volume is bright in the upper half of every axis: above right in an axial cut, which is drawn as
    axis one to the right and axis two upwards. The second volume is dark."""
    probe = look((rendered["public"] / "audit.html").read_text(encoding="utf-8"), tmp_path)
    assert probe is not None
    seen = probe["viewer"]
    assert seen["start"]["said"] == "synthetic scan 1: size small, slice 3 of 5"
    assert seen["start"]["corners"] == [0, 200, 0, 0]
    assert seen["low"]["corners"] == [0, 0, 0, 0]
    assert seen["high"] == {"said": "synthetic scan 1: size small, slice 5 of 5", "corners": [0, 200, 0, 0]}
    assert seen["axis"] == {"said": f"synthetic scan 1: size small, slice 4 of {SHAPE[0]}", "corners": [0, 200, 0, 0]}
    assert seen["slices"] == str(SHAPE[0] - 1)
    assert seen["bright"]["corners"] == [0, 240, 0, 0]
    assert seen["other"]["said"].startswith("synthetic scan 2: size large")
    assert seen["other"]["corners"] == [0, 0, 0, 0]
    assert seen["named"]


def test_a_flat_scan_is_shown_as_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "_pdf", lambda html: b"")
    render.render_report(make_audit("public") | {"viewer": make_viewer((8, 8))}, tmp_path)
    probe = look((tmp_path / "audit.html").read_text(encoding="utf-8"), tmp_path)
    assert probe is not None
    assert probe["viewer"]["start"] == {"said": "synthetic scan 1: size small", "corners": [0, 0, 0, 200]}
    assert probe["viewer"]["other"]["corners"] == [0, 0, 0, 0]


def test_a_script_that_is_not_ours_does_not_run(rendered: dict[str, Path], tmp_path: Path) -> None:
    assert look((rendered["public"] / "audit.html").read_text(encoding="utf-8"), tmp_path, allow=False) is None
