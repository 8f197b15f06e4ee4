"""Writes a report as one self-contained HTML page and as a tagged PDF of the same page, from its JSON alone.

Offline: the HTML holds its styles and figures, and the PDF writer may open data URIs and its own fonts only.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medvae.errors import MissingPart
from medvae.report.view import audit_view, certificate_view, exact_or_text, moment, tone
from medvae.report.words import EVIDENCE_NOTE, GLOSSARY, PROVENANCE, exact, number, sentence

FRONT_PAGES = 2
"""What a board reads; where it does not fit, it is set in smaller type."""
TEMPLATES = Path(__file__).parent / "templates"
FACES = (
    ("Report Sans", "normal", "normal", "DejaVuSans.ttf"),
    ("Report Sans", "bold", "normal", "DejaVuSans-Bold.ttf"),
    ("Report Mono", "normal", "normal", "DejaVuSansMono.ttf"),
)


def render_report(audit: Mapping[str, Any], folder: Path) -> None:
    """Write audit.html and audit.pdf into `folder` from the content of audit.json.

    Raises RunError where it is no audit, PrivacyError where a public report holds a private number, and
    MissingPart where the PDF's system libraries are not installed (before anything is written).
    """
    _write(folder, "audit", "audit.html.j2", audit_view(audit))


def render_certificate(certificate: Mapping[str, Any], folder: Path) -> None:
    """Write certificate.html and certificate.pdf into `folder` from the content of certificate.json.

    Raises RunError where it holds no claim, and MissingPart as `render_report` does.
    """
    _write(folder, "certificate", "certificate.html.j2", certificate_view(certificate))


def require_pdf() -> Any:
    """Return WeasyPrint, or raise MissingPart naming what to install; long commands call this first."""
    try:
        import weasyprint
    except OSError:
        raise MissingPart(
            "the PDF cannot be written because the system library Pango is missing: "
            "install it with `apt-get install libpango-1.0-0 libpangoft2-1.0-0 libharfbuzz-subset0`"
        ) from None
    except ImportError:
        raise MissingPart("the PDF cannot be written because WeasyPrint is missing: pip install weasyprint") from None
    return weasyprint


def _page(template: str, view: Mapping[str, Any], viewer: Mapping[str, Any] | None) -> str:
    """Fill a template. The one script of a page is the viewer's, and its policy lets no other run and nothing load."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "viewer.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

    def shown(value: Any) -> Markup:
        return Markup('<data value="{}">{}</data>').format("null" if value is None else exact(value), number(value))

    environment.filters.update(num=shown, exact=exact_or_text, words=sentence, tone=tone, moment=moment)
    environment.globals.update(
        viewer=viewer,
        viewer_js=Markup(script),  # our own file, and the only script
        script_source=Markup(f"'sha256-{digest}'" if viewer else "'none'"),
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),  # our own file, no markup in it
        glossary=GLOSSARY,
        provenance=PROVENANCE,
        evidence_note=EVIDENCE_NOTE,
    )
    return environment.get_template(template).render(view=view)


def _write(folder: Path, name: str, template: str, view: Mapping[str, Any]) -> None:
    """Write the page and its print, which has no viewer: paper has no sliders."""
    viewer = view.get("viewer")
    html = _page(template, view, viewer)
    pdf = _pdf(_page(template, view, None) if viewer else html)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / f"{name}.html", html.encode())
    _replace(folder / f"{name}.pdf", pdf)


def _pdf(html: str) -> bytes:
    """Print the page as PDF/UA-1: tagged, with its language, alternative texts and embedded fonts."""
    weasyprint = require_pdf()
    from weasyprint.text.fonts import FontConfiguration

    fonts = FontConfiguration()
    fetcher = weasyprint.urls.URLFetcher(allowed_protocols={"data"})
    faces = weasyprint.CSS(
        string=_faces(),
        font_config=fonts,
        url_fetcher=weasyprint.urls.URLFetcher(allowed_protocols={"file"}),
    )

    def laid_out(page: str) -> Any:
        return weasyprint.HTML(string=page, url_fetcher=fetcher).render(font_config=fonts, stylesheets=[faces])

    document = laid_out(html)
    if _front_pages(document) > FRONT_PAGES:
        document = laid_out(html.replace("<body>", '<body class="tight">', 1))
    content: bytes = document.write_pdf(
        pdf_variant="pdf/ua-1", pdf_identifier=hashlib.sha256(html.encode()).digest()[:16]
    )
    return content


def _front_pages(document: Any) -> int:
    """Count the pages before the appendix; 0 where there is none."""
    starts = [place[0] for label, place, _, _ in document.make_bookmark_tree() if label == "Appendix"]
    return int(starts[0]) if starts else 0


def _faces() -> str:
    """Name the fonts that matplotlib ships, so that a machine without fonts prints the same page."""
    import matplotlib as mpl

    base = Path(mpl.get_data_path()) / "fonts" / "ttf"
    return "\n".join(
        f'@font-face {{ font-family: "{family}"; font-weight: {weight}; font-style: {style}; '
        f"src: url({(base / file).as_uri()}); }}"
        for family, weight, style, file in FACES
    )


def _replace(path: Path, content: bytes) -> None:
    """Write beside the target and rename, so that no half-written report is ever found."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
