"""Each kind of report rendered once a session, with the network cut off."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from report_samples import make_audit, make_certificate

from medvae.report.render import render_certificate, render_report


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of an internal and a public report and of a certificate."""
    base = tmp_path_factory.mktemp("reports")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a report asked for the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        for audience in ("internal", "public"):
            render_report(make_audit(audience), base / audience)
        render_certificate(make_certificate(), base / "certificate")
    return {name: base / name for name in ("internal", "public", "certificate")}
