"""The numbers of HTML, PDF and JSON are the same, to the digit."""

from __future__ import annotations

import json
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import make_audit, make_certificate

from medvae.report.words import exact, number, sentence

NUMERIC = ("value", "low", "high", "n", "baseline", "control")


class Page(HTMLParser):
    """Collects <data> elements and the cells of the table of all findings."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.data: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self._value: str | None = None
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "data":
            self._value = named["value"]
        if tag == "tr":
            self._cell = False
            if "data-finding" in named:
                self.rows.append([])
                self._cell = True
        if tag == "td" and self._cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr":
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._value is not None:
            self.data.append((self._value, data))
            self._value = None
        elif self._cell and self.rows[-1]:
            self.rows[-1][-1] += data


@cache
def pdf_text(path: Path) -> str:
    from pypdf import PdfReader

    return "\n".join(page.extract_text() for page in PdfReader(path).pages)


def tokens(text: str) -> set[str]:
    return set(re.findall(r"[^\s(),;]+", text))


@pytest.mark.parametrize("audience", ["internal", "public"])
def test_every_finding_stands_in_html_and_pdf_as_in_the_json(rendered: dict[str, Path], audience: str) -> None:
    findings = make_audit(audience)["findings"]
    rows = Page((rendered[audience] / "audit.html").read_text(encoding="utf-8")).rows
    words = tokens(pdf_text(rendered[audience] / "audit.pdf"))
    assert len(rows) == len(findings)
    for row, finding in zip(rows, findings, strict=True):
        for cell, key in zip(row[2:8], NUMERIC, strict=True):
            assert (None if cell == "–" else json.loads(cell)) == finding[key]
            assert cell in words


@pytest.mark.parametrize("audience", ["internal", "public"])
def test_short_numbers_are_the_exact_ones_shortened(rendered: dict[str, Path], audience: str) -> None:
    page = Page((rendered[audience] / "audit.html").read_text(encoding="utf-8"))
    words = tokens(pdf_text(rendered[audience] / "audit.pdf"))
    assert len(page.data) > 5
    for full, short in page.data:
        assert short == number(json.loads(full))
        assert set(short.split()) <= words


def test_the_claim_stands_to_the_last_digit_in_report_and_certificate(rendered: dict[str, Path]) -> None:
    claim = make_certificate()["claim"]
    event = claim["mechanisms"][1]["event"]
    for name, file in (("internal", "audit"), ("public", "audit"), ("certificate", "certificate")):
        html = (rendered[name] / f"{file}.html").read_text(encoding="utf-8")
        words = tokens(pdf_text(rendered[name] / f"{file}.pdf"))
        for value in (*(claim[k] for k in ("epsilon", "delta", "noise_multiplier", "steps")), event["count"], 31.25):
            assert f">{exact(value)}<" in html
            assert exact(value) in words
        assert claim["weights_sha256"] in html


def test_epsilon_is_never_alone(rendered: dict[str, Path]) -> None:
    for name, file in (("public", "audit"), ("certificate", "certificate")):
        from pypdf import PdfReader

        first = PdfReader(rendered[name] / f"{file}.pdf").pages[0].extract_text()
        for part in ("7.998", "0.00001", "patient", "add-remove", "pld"):
            assert part in first


@given(st.floats(min_value=1e-7, max_value=1e8) | st.floats(min_value=-1e8, max_value=-1e-7))
def test_a_short_number_reads_back_within_half_a_thousandth(value: float) -> None:
    text = number(value)
    assert "e" not in text
    assert float(text) == pytest.approx(value, rel=5e-4)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_an_exact_number_reads_back_exactly(value: float) -> None:
    assert json.loads(exact(value)) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (8.0, "8"), (0.0, "0"), (131, "131"), (12345.678, "12350"), (1e-5, "0.00001"),
     (3.21e-12, "3.21e-12"), (float("inf"), "unbounded"), (float("nan"), "not a number"),
     (None, "not measured"), (True, "yes"), ("a", "a")],
)  # fmt: skip
def test_number(value: Any, text: str) -> None:
    assert number(value) == text


def test_names_become_words() -> None:
    assert sentence("frechet_distance") == "Fréchet distance"
    assert sentence("membership, elbo, auc") == "Membership, ELBO, AUC"
    assert sentence("ms_ssim tpr") == "MS-SSIM TPR"
