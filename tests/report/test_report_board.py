"""The board's part: its numbers in all three forms, its provenance, its look in grey, and two pages whatever comes."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_samples import make_audit
from test_report_numbers import pdf_text, tokens

from medvae.errors import PrivacyError
from medvae.report import render
from medvae.report.frameworks import CROSSWALK, ISO_27559, NIST_800_226
from medvae.report.view import audit_view
from medvae.report.words import exact, number

CSS = (render.TEMPLATES / "report.css").read_text(encoding="utf-8")


def numbers(value: Any) -> Iterator[float]:
    """Yield every number below a JSON value."""
    if isinstance(value, dict):
        for part in value.values():
            yield from numbers(part)
    elif isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


@pytest.mark.parametrize("audience", ["internal", "public"])
def test_the_boards_numbers_stand_in_html_and_pdf_as_in_the_json(rendered: dict[str, Path], audience: str) -> None:
    board = make_audit(audience)["board"]
    html = (rendered[audience] / "audit.html").read_text(encoding="utf-8")
    words = tokens(pdf_text(rendered[audience] / "audit.pdf"))
    whole = [board["ladder"]["rows"], board["ledger"]["rows"], board["canary"]["results"], board["ledger"]["budget"]]
    for value in (v for part in whole for v in numbers(part) if v not in (0.95, 1e-05)):
        assert f">{exact(value)}<" in html or f" {exact(value)}<" in html, value
        assert exact(value) in words, value
    front = [{k: r[k] for k in ("value", "low", "high", "blind_guess", "proven_limit")} for r in board["risks"]]
    for value in numbers([front, {k: (board["subgroup"] or {}).get(k) for k in ("value", "low", "high")}]):
        assert f'<data value="{exact(value)}">{number(value)}</data>' in html
        assert number(value) in words


@pytest.mark.parametrize("audience", ["internal", "public"])
def test_no_number_in_the_pages_is_missing_in_the_json(rendered: dict[str, Path], audience: str) -> None:
    known = set(numbers(make_audit(audience)))
    html = (rendered[audience] / "audit.html").read_text(encoding="utf-8")
    shown = [float(v) for v in re.findall(r'<data value="([^"]+)">', html) if v != "null"]
    assert len(shown) > 10
    assert [v for v in shown if v not in known] == []


def test_what_the_board_reads_is_on_two_pages(rendered: dict[str, Path]) -> None:
    from pypdf import PdfReader

    for audience in ("internal", "public"):
        pages = [" ".join(p.extract_text().split()) for p in PdfReader(rendered[audience] / "audit.pdf").pages]
        first, second, third, rest = pages[0], pages[1], pages[2], " ".join(pages[2:])
        for words in ("CONDITIONAL", "How far proof and tests lie apart", "Singling out", "Linkability", "Inference"):
            assert words in first, words
        assert "A fault of the programme up to epsilon 11.23 would probably have stayed unseen" in first
        assert ("Worst subgroup of 4 tested: size small" in first) == (audience == "internal")
        for words in ("Budget spent", "What was not tested", "Risks that remain", "Review due: 2027-01-05", "Chair"):
            assert words in second, words
        assert third.startswith("Appendix")
        for row in (*ISO_27559, *NIST_800_226, *CROSSWALK):
            assert "".join(row[0].split()) in "".join(rest.split()), row[0]  # a cell may break its words
        for words in ("Data sheet", "Model card", "Controls", "not a legal determination"):
            assert words in rest


def test_a_longer_front_is_set_smaller_and_still_two_pages(tmp_path: Path) -> None:
    from pypdf import PdfReader

    audit = make_audit("internal")
    audit["summary"] = [f"Sentence {i} says more than usual about what an attacker could do. " * 2 for i in range(9)]
    audit["not_tested"] = [
        f"thing {i}, which nobody looked at, though it was asked for and may matter" for i in range(9)
    ]
    audit["decision"]["reasons"] = [f"reason {i}: one more point that has to be settled first" for i in range(6)]
    render.render_report(audit, tmp_path)
    pages = [page.extract_text() for page in PdfReader(tmp_path / "audit.pdf").pages]
    assert pages[2].startswith("Appendix")
    assert "2 more in the appendix" in pages[0]
    assert "reason 5" in pages[2]


@pytest.mark.parametrize("key", ["ladder", "ledger", "subgroup", "canary", "rung", "risk", "viewer", "attacks"])
def test_a_public_report_refuses_a_private_part(tmp_path: Path, key: str) -> None:
    audit = copy.deepcopy(make_audit("public"))
    if key == "rung":
        audit["board"]["ladder"]["rows"][0]["provenance"] = "private"
    elif key == "risk":
        audit["board"]["risks"][0]["provenance"] = "private"
    elif key in ("viewer", "attacks"):
        audit[key] = {**(audit.get(key) or {}), "provenance": "private"}
    else:
        audit["board"][key] = {**(audit["board"][key] or {}), "provenance": "private"}
    with pytest.raises(PrivacyError, match="private"):
        render.render_report(audit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_override_is_in_the_decision_box() -> None:
    audit = make_audit("public")
    audit["decision"]["override"] = {"reason": "a false alarm, says the board", "overridden": ["canaries: accusation"]}
    html = render._page("audit.html.j2", audit_view(audit), None)
    assert "Overridden by the data holder" in html
    assert "a false alarm, says the board" in html
    assert "canaries: accusation" in html


@pytest.mark.parametrize(
    ("verdict", "words"),
    [("PASS", "nothing seen on planted patients"), ("REFUTED", "REFUTED"), ("NOT_MEASURABLE", "gave no result")],
)
def test_every_outcome_of_the_canaries_has_its_words(verdict: str, words: str) -> None:
    audit = make_audit("public")
    audit["board"]["canary"]["verdict"] = verdict
    assert words in render._page("audit.html.j2", audit_view(audit), None)


def test_without_canaries_the_report_says_that_it_is_blind() -> None:
    audit = make_audit("public")
    rows = [row for row in audit["board"]["ladder"]["rows"] if row["kind"] == "claim"]
    audit["board"] |= {"canary": None, "ladder": audit["board"]["ladder"] | {"rows": rows, "words": "It saw nothing."}}
    html = render._page("audit.html.j2", audit_view(audit), None)
    assert "was not run, so a fault of the programme would not have been seen" in html
    assert "It saw nothing." in html


def luminance(color: str) -> float:
    """Relative luminance of #rgb or #rrggbb (WCAG 2.2)."""
    digits = color.lstrip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_every_colour_of_text_has_the_contrast_of_wcag_aa() -> None:
    named = dict(re.findall(r"--(\w+): (#[0-9a-f]+)", CSS))
    written = re.findall(r"(?<![-\w])color: (?:var\(--(\w+)\)|(#[0-9a-f]+))", CSS)
    texts = {named[name] if name else color for name, color in written} - {"#fff"}
    assert len(texts) >= 4
    for color in texts:
        for ground in ("#ffffff", named["wash"]):
            assert contrast(color, ground) >= 4.5, color
    boxes = [*re.findall(r"\.verdict \{ background: (#[0-9a-f]+)", CSS), named["ink"]]
    assert len(boxes) == 4
    assert all(contrast("#fff", box) >= 4.5 for box in boxes)


def test_curves_differ_in_grey_by_line_and_by_light() -> None:
    from medvae.report.ink import STYLES

    lines = [str(line) for _, line in STYLES]
    assert len(set(lines)) == len(lines)
    assert all(contrast(color, "#ffffff") >= 3 for color, _ in STYLES)  # WCAG 1.4.11, graphical objects


@pytest.mark.skipif(shutil.which("pdftoppm") is None, reason="no pdftoppm here")
def test_in_grey_every_decision_still_reads(rendered: dict[str, Path], tmp_path: Path) -> None:
    """Printed in grey, the white word on the decision's dark box keeps its contrast."""
    from PIL import Image

    command = ["pdftoppm", "-r", "60", "-gray", "-f", "1", "-l", "1", str(rendered["public"] / "audit.pdf")]
    subprocess.run([*command, str(tmp_path / "page")], check=True, timeout=60)
    sheet = np.asarray(Image.open(next(tmp_path.glob("page*"))))
    box = sheet[int(0.12 * len(sheet)) : int(0.15 * len(sheet)), int(0.08 * sheet.shape[1]) : int(0.3 * sheet.shape[1])]
    assert np.median(box) < 110
    assert box.max() > 200
