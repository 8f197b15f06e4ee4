"""Croissant metadata (MLCommons Croissant 1.0, responsible-AI vocabulary 1.0): what machines read of a release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medvae.gate.certificate import TOOL
from medvae.types import Condition

_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_SETS = {
    "nifti": ("nifti/**/*.nii.gz", "application/gzip", "Images and masks as NIfTI"),
    "dicom": ("dicom/**/*.dcm", "application/dicom", "Images, and masks as segmentation objects, as DICOM"),
    "huggingface": ("huggingface/data/*", "application/octet-stream", "Images, masks and their table for `datasets`"),
    "png": ("png/*.png", "image/png", "Pictures to look at; volumes as three middle slices"),
}


def croissant(
    certificate: Mapping[str, Any], conditions: tuple[Condition, ...], sums: Mapping[str, str], claim: str, licence: str
) -> dict[str, Any]:
    """Return croissant.json. sums: digests of the files named in it; claim: epsilon in words."""
    title, release = certificate["title"], certificate["release"]
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": title,
        "description": f"{release['count']} synthetic medical images, made under {claim}. No image shows a person.",
        "url": "./README.md",
        "version": "1.0.0",
        "datePublished": certificate["created"],
        "license": licence,
        "creator": {
            "@type": "sc:Organization",
            "name": f"The signer of this release ({certificate['signer']['key_id']})",
        },
        "citeAs": f"{title} (synthetic, {claim}), {certificate['created']}",
        "keywords": ["synthetic data", "medical imaging", "differential privacy"],
        "isLiveDataset": False,
        **_responsible(certificate, claim),
        "distribution": _distribution(release["formats"], sums),
        "recordSet": [_participants(conditions)],
    }


def _responsible(certificate: Mapping[str, Any], claim: str) -> dict[str, Any]:
    return {
        "rai:dataCollection": "Drawn from a conditional variational autoencoder trained on patients' scans at the data "
        "holder's site. Nothing was acquired for this dataset and no acquired pixel was copied.",
        "rai:dataCollectionType": ["Others"],
        "rai:dataCollectionRawData": "The training scans stay with the data holder and are not part of this dataset.",
        "rai:dataManipulationProtocol": f"Generator trained with {claim}; images are post-processing of it. "
        f"Made by medvae-dp {TOOL['version']}.",
        "rai:dataAnnotationProtocol": "Labels and masks are conditions asked of the generator or generated with the "
        "image; no person annotated them.",
        "rai:personalSensitiveInformation": [
            "Derived from health data of patients under differential privacy; holds no record of a person.",
            *certificate["plain_words"],
        ],
        "rai:dataUseCases": ["Software development, teaching, and research on methods; not diagnosis or treatment."],
        "rai:dataLimitations": [
            "Fine detail and rare findings are lost or blurred by the noise that privacy needs.",
            *certificate["limits"],
        ],
        "rai:dataBiases": [
            f"Conditions: {certificate['release']['conditions']}. Their frequencies are not those of the cohort.",
            "Groups with few patients are reproduced worse than large ones.",
        ],
        "rai:dataSocialImpact": "Lets work on medical images start without access to patients' scans; conclusions need "
        "confirmation on real data.",
        "rai:dataReleaseMaintenancePlan": "Static and signed: any change is a new release with its own certificate.",
    }


def _distribution(formats: Sequence[str], sums: Mapping[str, str]) -> list[dict[str, Any]]:
    files = {"participants.tsv": "text/tab-separated-values", "privacy/certificate.json": "application/json"}
    if "npz" in formats:
        files["cohort.npz"] = "application/zip"
    objects: list[dict[str, Any]] = [
        {
            "@type": "cr:FileObject",
            "@id": name,
            "name": name.replace("/", "-"),
            "contentUrl": name,
            "encodingFormat": kind,
            "sha256": sums[name],
        }
        for name, kind in files.items()
    ]
    for kind in (f for f in formats if f in _SETS):
        includes, encoding, words = _SETS[kind]
        objects.append(
            {
                "@type": "cr:FileSet",
                "@id": f"{kind}-files",
                "name": f"{kind}-files",
                "description": words,
                "encodingFormat": encoding,
                "includes": includes,
            }
        )
    return objects


def _participants(conditions: tuple[Condition, ...]) -> dict[str, Any]:
    fields = [_field("participant_id", "sc:Text", "A synthetic participant, who never existed")]
    fields += [
        _field(c.name, "sc:Text" if c.kind == "class" else "sc:Float", f"The {c.name} asked of the generator")
        for c in conditions
    ]
    return {"@type": "cr:RecordSet", "@id": "participants", "name": "participants", "field": fields}


def _field(column: str, kind: str, words: str) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"participants/{column}",
        "name": column,
        "description": words,
        "dataType": kind,
        "source": {"fileObject": {"@id": "participants.tsv"}, "extract": {"column": column}},
    }
