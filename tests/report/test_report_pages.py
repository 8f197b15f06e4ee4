"""The pages as a board sees them: two pages first, figures drawn, nothing cut or fetched, hostile text harmless."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_samples import make_audit, make_certificate

from medvae.errors import MissingPart, PrivacyError, RunError
from medvae.report import render
from medvae.report.series import arrange
from medvae.report.view import audit_view

VIEWER = (render.TEMPLATES / "viewer.js").read_text(encoding="utf-8")
REPORTS = [("internal", "audit"), ("public", "audit"), ("certificate", "certificate")]


def scripts(html: str) -> list[str]:
    return re.findall(r"<script>(.*?)</script>", html, flags=re.S)


@cache
def pages(path: Path) -> list[str]:
    from pypdf import PdfReader

    return [page.extract_text() for page in PdfReader(path).pages]


@pytest.mark.parametrize(("name", "file"), REPORTS)
def test_the_html_stands_alone(rendered: dict[str, Path], name: str, file: str) -> None:
    html = (rendered[name] / f"{file}.html").read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href|action|data|poster)\s*=\s*["']([^"']*)""", html)
    assert all(source.startswith("data:") for source in sources)
    assert scripts(html) == ([VIEWER] if file == "audit" else [])
    digest = base64.b64encode(hashlib.sha256(VIEWER.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if file == "audit" else "'none'"
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}" in html
    assert "<link" not in html
    assert "@import" not in html
    assert re.findall(r"url\((?!data:)", html) == []


@pytest.mark.parametrize("audience", ["internal", "public"])
def test_two_pages_to_decide_from(rendered: dict[str, Path], audience: str) -> None:
    first, second, appendix, *_ = pages(rendered[audience] / "audit.pdf")
    for words in ("CONDITIONAL", "In plain words", "Proven, by mathematics", "Tested, by measurement"):
        assert words in first
    front = first + second
    for words in (
        "share under an agreement", "77 of 1,000 patients", "an attacker could do", "What was not tested",
        "Attacks with shadow models.", "Risks that remain", "Review due", "Data protection officer",
        "not a legal determination",
    ):  # fmt: skip
        assert words in " ".join(front.split())
    assert "Appendix" in appendix
    assert ("INTERNAL" if audience == "internal" else "PUBLIC") in first
    assert "A hologram" in "".join(pages(rendered[audience] / "audit.pdf"))


def test_the_certificate_has_two_pages(rendered: dict[str, Path]) -> None:
    first, second = pages(rendered["certificate"] / "certificate.pdf")
    assert "medvae verify" in first
    assert "9.123" in first
    assert "✕ failed" in first
    assert "9.1234567" in second


@pytest.mark.parametrize(("name", "file"), REPORTS)
def test_the_pdf_is_tagged_described_and_carries_its_fonts(rendered: dict[str, Path], name: str, file: str) -> None:
    from pypdf import PdfReader

    reader = PdfReader(rendered[name] / f"{file}.pdf")
    root = reader.trailer["/Root"]
    assert root["/MarkInfo"]["/Marked"]
    assert root["/Lang"] == "en"
    assert reader.metadata is not None
    assert reader.metadata.title
    assert b"pdfuaid" in (reader.xmp_metadata.stream.get_data() if reader.xmp_metadata else b"")
    fonts = {str(f.get_object()["/BaseFont"]) for page in reader.pages for f in page["/Resources"]["/Font"].values()}
    assert fonts
    assert all("+Report-" in font for font in fonts), fonts
    figures = [o for o in _objects(reader) if o.get("/S") == "/Figure"]
    assert len(figures) >= {"internal": 8, "public": 4, "certificate": 0}[name]
    assert all(str(f.get("/Alt", "")).strip() for f in figures)


def _objects(reader: Any) -> list[Any]:
    found = (reader.get_object(i) for i in range(1, int(reader.trailer["/Size"])))
    return [o for o in found if isinstance(o, dict)]


@pytest.mark.skipif(shutil.which("pdftoppm") is None, reason="no pdftoppm here")
@pytest.mark.parametrize(("name", "file"), REPORTS)
def test_nothing_is_cut_at_the_edge(rendered: dict[str, Path], tmp_path: Path, name: str, file: str) -> None:
    from PIL import Image

    command = ["pdftoppm", "-r", "40", "-gray", str(rendered[name] / f"{file}.pdf"), str(tmp_path / "page")]
    subprocess.run(command, check=True, timeout=60)
    sheets = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("page*"))]
    assert len(sheets) >= 2
    margin = int(40 * 9 / 25.4)  # 9 mm; the page's own margin is 14
    for sheet in sheets:
        assert sheet.min() < 100
        assert min(sheet[:, :margin].min(), sheet[:, -margin:].min(), sheet[:margin].min()) > 240


HOSTILE = "<script>alert(1)</script>\"'><img src=http://evil.test/x>{{7*191}}{% raw %}$\\frac{&amp;</style>"


def poison(value: Any) -> Any:
    """Put hostile text into every string that is not one of the words a report acts on."""
    acted_on = ("private", "public", "dp", "internal", "privacy", "fidelity", "utility", "curve", "bars", "hologram")
    if isinstance(value, dict):
        return {k: poison(v) if k != "png_base64" else v for k, v in value.items()}
    if isinstance(value, list):
        return [poison(v) for v in value]
    return HOSTILE if isinstance(value, str) and value not in acted_on else value


@pytest.fixture
def html_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Render HTML only: the PDF is the same page and takes seconds."""
    monkeypatch.setattr(render, "_pdf", lambda html: b"")

    def make(content: dict[str, Any], certificate: bool = False) -> str:
        write, name = (render.render_certificate, "certificate") if certificate else (render.render_report, "audit")
        write(content, tmp_path)
        return (tmp_path / f"{name}.html").read_text(encoding="utf-8")

    return make


@pytest.mark.parametrize("certificate", [False, True])
def test_hostile_text_stays_text(html_of: Callable[..., str], certificate: bool) -> None:
    audit = poison(make_audit("internal"))
    audit["figures"][HOSTILE] = {"kind": "curve", "provenance": "dp", "title": HOSTILE, "data": {"series": HOSTILE}}
    html = html_of(poison(make_certificate()) if certificate else audit, certificate)
    assert "&lt;script&gt;" in html
    assert scripts(html) == ([] if certificate else [VIEWER])
    assert html.count("<script") == len(scripts(html))
    assert "1337" not in html
    assert "<img src=http" not in html
    assert html.count("</style>") == 1


def test_the_same_json_gives_the_same_bytes(html_of: Callable[..., str]) -> None:
    assert html_of(make_audit("public")) == html_of(make_audit("public"))


@pytest.mark.parametrize("audience", ["public", "", None, "Internal"])
@pytest.mark.parametrize("part", ["findings", "figures"])
def test_a_public_report_refuses_what_is_private(tmp_path: Path, audience: Any, part: str) -> None:
    audit, private = make_audit("public"), make_audit("internal")
    audit = audit | {part: private[part], "audience": audience}
    with pytest.raises(PrivacyError, match="private"):
        render.render_report(audit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("provenance", [None, "unheard-of"])
def test_an_unknown_provenance_is_private(tmp_path: Path, provenance: Any) -> None:
    audit = make_audit("public")
    audit["findings"].append(audit["findings"][0] | {"provenance": provenance})
    with pytest.raises(PrivacyError):
        render.render_report(audit, tmp_path)


def test_no_privacy_is_said_so(html_of: Callable[..., str]) -> None:
    audit = make_audit("internal") | {"figures": {}}
    audit["claim"] = audit["claim"] | {"epsilon": None, "mechanisms": []}
    audit["decision"] = {"verdict": "DO NOT RELEASE", "reasons": ["the model was trained without noise"]}
    html = html_of(audit)
    assert "No noise was added in training" in html
    assert 'class="decision refuse"' in html
    assert "ε =" not in html


@pytest.mark.parametrize(
    ("verdict", "style"),
    [("RELEASE", "release"), ("CONDITIONAL", "conditional"), ("DO NOT RELEASE", "refuse"), ("PERHAPS", "conditional")],
)
def test_the_decision_has_its_own_look_and_words(html_of: Callable[..., str], verdict: str, style: str) -> None:
    html = html_of(make_audit("public") | {"figures": {}, "decision": {"verdict": verdict, "reasons": []}})
    assert f'class="decision {style}"' in html
    assert verdict in html


@pytest.mark.parametrize(("audience", "series"), [("internal", 2), ("public", 1)])
def test_the_attack_and_the_proof_share_one_figure_inside_only(audience: str, series: int) -> None:
    figures = make_audit(audience)["figures"]
    arranged = arrange({name: figures[name] for name in ("proven curve", "empirical roc") if name in figures})
    assert list(arranged) == ["roc"]
    labels = [s["label"] for s in arranged["roc"]["data"]["series"]]
    assert labels == ["proven limit", "attack on this model"][:series]
    assert arranged["roc"]["provenance"] == ("private" if audience == "internal" else "public")


def test_what_went_badly_is_on_the_front() -> None:
    audit = make_audit("internal") | {"figures": {}}
    extra = [dict(audit["findings"][0], name=f"limit {i}") for i in range(9)]
    audit["findings"] = [*extra, dict(audit["findings"][1], verdict="INVALID: the groups differ")]
    group = audit_view(audit)["groups"][0]
    assert group["front"][0]["verdict"].startswith("INVALID")
    assert group["more"] == 10 - len(group["front"])


@pytest.mark.parametrize("missing", ["figures", "not_tested", "decision", "tier", "tool", "created"])
def test_a_thin_audit_still_renders(html_of: Callable[..., str], missing: str) -> None:
    audit = make_audit("public") | {"figures": {}}
    del audit[missing]
    assert "May these synthetic scans leave the building?" in html_of(audit)


def test_what_is_no_audit_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not an audit\.json"):
        render.render_report({"schema": "x"}, tmp_path)
    with pytest.raises(RunError, match=r"not a certificate\.json"):
        render.render_certificate({"schema": "x"}, tmp_path)


@pytest.mark.parametrize(("error", "words"), [(OSError, "apt-get install libpango"), (ImportError, "pip install")])
def test_a_missing_part_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], words: str
) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "weasyprint":
                raise error("cannot load library 'libpango-1.0-0'")

    monkeypatch.delitem(sys.modules, "weasyprint", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(MissingPart, match=words):
        render.render_report(make_audit("public"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(render, "_pdf", lambda html: b"")
    monkeypatch.setattr(render.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        render.render_report(make_audit("public"), tmp_path)
    assert list(tmp_path.iterdir()) == []
