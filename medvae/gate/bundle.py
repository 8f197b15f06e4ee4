"""A MONAI Bundle of the released generator: the weights themselves, behind the same gate as a synthetic cohort.

The weights are an output of the differentially private training that the certificate describes, encoder included, so
handing them on is post-processing. Nothing else of a run goes in: the bundle is made from the evidence of the gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from medvae.config import ReleaseConfig
from medvae.gate import canary, card, certificate, sign
from medvae.gate.evidence import Evidence
from medvae.gate.licences import Licence, licence_of
from medvae.gate.release import Render, certify, judge, seal, write_audit, write_json
from medvae.synth.staging import staged_folder
from medvae.synth.store import write_release

FORMAT = "bundle"
_VERSIONS = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}


def export_bundle(
    run: Path,
    out: Path,
    config: ReleaseConfig,
    report: Path | None = None,
    render: Render | None = None,
    render_audit: Render | None = None,
) -> dict[str, Any]:
    """Check a finished run as `release` does and write a MONAI Bundle into `out`; return a summary.

    `python -m monai.bundle run --config_file configs/inference.json` in it generates volumes; `medvae verify` checks
    it. Of config, title, licence, key and override are used. Raises as `release` does.
    """
    terms = licence_of(config.licence)
    evidence, checks, override = judge(run, config, report)
    planted = canary.published(run, evidence.mechanisms, evidence.privacy["delta"])
    key = sign.signing_key(config.key, run)
    with staged_folder(out.resolve(), durable=True) as folder:
        proof = certify(evidence, checks, config, key, override, count=0, formats=(FORMAT,), conditions="none")
        claim = certificate.claim_words(proof["claim"])
        write_release(folder / "models", evidence.model)
        for name in ("configs", "docs", "privacy"):
            (folder / name).mkdir()
        write_json(folder / "configs" / "metadata.json", _metadata(evidence, proof, claim, terms))
        write_json(folder / "configs" / "inference.json", _inference())
        write_json(folder / "privacy" / "certificate.json", proof)
        if render is not None:
            render(proof, folder / "privacy")
        if planted is not None:
            write_json(folder / canary.FILE, planted)
        if report is not None:
            write_audit(report / "public", folder / "audit", override, render_audit)
        (folder / "docs" / "README.md").write_text(_readme(proof, evidence, claim), encoding="utf-8")
        (folder / "LICENSE").write_text(card.licence(proof, terms), encoding="utf-8")
        files = seal(folder, proof, key)
    return {
        "formats": [FORMAT],
        **certificate.short_claim(evidence.privacy),
        "files": files,
        "key_id": proof["signer"]["key_id"],
        "checks": proof["checks"],
        "override": proof["override"],
        "plain_words": proof["plain_words"],
    }


def _metadata(evidence: Evidence, proof: Mapping[str, Any], claim: str, terms: Licence) -> dict[str, Any]:
    space = evidence.space
    outputs = {"0": "image", "1": "mask label"} if space.mask_labels else {"0": "image"}
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "version": "1.0.0",
        "changelog": {"1.0.0": "released"},
        **{key: metadata.version(package) for package, key in _VERSIONS.items()},
        "required_packages_version": {"medvae-dp": certificate.TOOL["version"]},
        "supported_apps": {},
        "name": proof["title"],
        "task": "Generation of synthetic medical images",
        "description": f"A conditional generator trained under {claim}. No image it makes shows a person.",
        "authors": f"The signer of this bundle, key {proof['signer']['key_id']}",
        "copyright": f"Copyright {proof['created'][:4]}, the institution that signed this bundle",
        "license": terms.identifier,
        "data_type": "nifti",
        "intended_use": "Software development, teaching, research on methods; not diagnosis or treatment",
        "privacy": {**certificate.short_claim(evidence.privacy), "certificate": "privacy/certificate.json"},
        "conditions": {c.name: c.to_json() for c in space.conditions},
        "network_data_format": {
            # The network takes a vector of conditions: channels without space, in MONAI's words.
            "inputs": {
                "image": {
                    "type": "embedding",
                    "format": "conditions",
                    "num_channels": space.condition_width,
                    "spatial_shape": [],
                    "dtype": "float32",
                    "value_range": [0, 1],
                    "is_patch_data": False,
                    "channel_def": {str(i): name for i, name in enumerate(_columns(evidence))},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": space.modality,
                    "num_channels": len(outputs),
                    "spatial_shape": list(space.spatial_shape),
                    "dtype": "float32",
                    "value_range": [0, max(1, *space.mask_labels, 1)],
                    "is_patch_data": False,
                    "channel_def": outputs,
                }
            },
        },
    }


def _columns(evidence: Evidence) -> list[str]:
    return [n for c in evidence.space.conditions for n in ([f"{c.name}={k}" for k in c.classes] or [c.name])]


def _inference() -> dict[str, Any]:
    return {
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/generated'",
        "count": 8,
        "seed": 0,
        "formats": ["nifti"],
        "network_def": {"_target_": "medvae.synth.network.Generator", "folder": "$@bundle_root + '/models'"},
        "network": "@network_def",
        "initialize": [],
        "run": ["$write_volumes(@network, @output_dir, @count, @seed, @formats)"],
        "finalize": [],
        "imports": ["$from medvae.synth.network import write_volumes"],
    }


def _readme(proof: Mapping[str, Any], evidence: Evidence, claim: str) -> str:
    space = evidence.space
    size = " x ".join(str(n) for n in space.spatial_shape)
    lines = [
        f"# {proof['title']}: generator",
        "",
        f"A generator of synthetic {space.modality} images of {size}, trained with {claim}. What that means:",
        "",
        *(f"- {line}" for line in (*proof["plain_words"], *proof["limits"])),
        "",
        "## Use",
        "",
        "With `monai`, `fire` and `medvae-dp` installed, from the bundle's folder:",
        "",
        "```",
        "python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json",
        "python -m monai.bundle run --config_file configs/inference.json --count 100 --seed 7 --output_dir elsewhere",
        "```",
        "",
        "Volumes are written to `generated/`. `medvae verify FOLDER` checks files, signature and the claim; do so "
        "before you generate into the folder, or generate elsewhere.",
    ]
    return "\n".join(lines) + "\n"
