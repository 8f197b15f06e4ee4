"""The released decoder in one file, an ONNX graph or an HTML page that decodes by it, behind the gate of a release.

Both hold the decoder's weights, which are an output of the differentially private training: post-processing. A single
file carries the claim and the digest of the weights, and no signature; a bundle is signed (gate/bundle.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medvae.config import ReleaseConfig
from medvae.dp import tradeoff
from medvae.errors import ConfigError, RunError
from medvae.gate import certificate
from medvae.gate.evidence import Evidence
from medvae.gate.licences import Licence, licence_of
from medvae.gate.outcome import Check
from medvae.gate.release import judge
from medvae.synth.staging import write_durably
from medvae.synth.write_onnx import to_onnx
from medvae.synth.write_page import to_page

SYNTHETIC = "SYNTHETIC: no image that this decoder makes shows a person. Not for diagnosis or treatment."
KINDS = ("onnx", "page")


def export_decoder(
    kind: str, run: Path, out: Path, config: ReleaseConfig, report: Path | None = None
) -> dict[str, Any]:
    """Check a finished run as `release` does and write its decoder as the file `out`; return a summary.

    kind: "onnx", or "page" for a model of 2D images. Of config, title, licence and override are used. Raises as
    `release` does, ConfigError for what a file cannot be, and MissingPart without the packages of the extra `onnx`.
    """
    if config.key is not None:
        raise ConfigError("a single file holds no signature: leave out --key, or export a bundle")
    if out.exists():
        raise RunError(f"the output {out.name!r} exists: give the name of a new file")
    terms = licence_of(config.licence)
    evidence, checks, override = judge(run, config, report)
    if kind == "page" and evidence.space.spatial_dims != 2:
        raise ConfigError("a page shows 2D images, and this model makes volumes: export onnx or bundle")
    facts = _facts(evidence, config, terms, override)
    onnx, error = to_onnx(evidence.model, facts)
    content = onnx if kind == "onnx" else to_page(evidence.model, onnx, facts).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_durably(out.resolve(), content)
    return _summary(kind, evidence, checks, override, facts) | {"bytes": len(content), "max_abs_error": error}


def _facts(
    evidence: Evidence, config: ReleaseConfig, terms: Licence, override: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what the file says of itself: nothing of the run but its public claim."""
    claim = certificate.short_claim(evidence.privacy)
    return {
        "title": " ".join(config.title.split()) or "Synthetic medical images",
        "synthetic": SYNTHETIC,
        "claim": claim,
        "claim_words": certificate.claim_words(claim),
        "plain_words": tradeoff.plain_words(claim["epsilon"], claim["delta"], evidence.mechanisms),
        "license": terms.identifier,
        "license_text": terms.text,
        "weights_sha256": evidence.model.card["weights_sha256"],
        "tool": certificate.TOOL,
        **({} if override is None else {"override": dict(override)}),
    }


def _summary(
    kind: str,
    evidence: Evidence,
    checks: list[Check],
    override: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "formats": [kind],
        **certificate.short_claim(evidence.privacy),
        "weights_sha256": facts["weights_sha256"],
        "checks": [check.to_json() for check in checks],
        "override": override,
        "plain_words": facts["plain_words"],
    }
