"""BIDS data sets: a participant's label is the patient, sessions add scans and values, derivatives give masks."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from medvae.errors import CohortError
from medvae.vault.discover import Found, strangers
from medvae.vault.layouts import readers
from medvae.vault.scan import Rules, Scan, Source, stem
from medvae.vault.table import MISSING, read_table

# Entities that tell derived files of one image apart (BIDS 1.9, appendix "entities").
DERIVED_ENTITIES = frozenset({"desc", "label", "space", "res", "den", "seg", "atlas", "hemi", "from", "to", "mode"})
MRI_SUFFIXES = frozenset({"T1w", "T2w", "FLAIR", "PDw", "T2starw", "T1map", "T2map", "inplaneT1", "inplaneT2"})
Core = frozenset[tuple[str, str]]


def bids_source(found: Found, rules: Rules = Rules()) -> Source:  # noqa: B008 - frozen
    """List the images of a BIDS data set. The session is an attribute, and so are the columns of sessions.tsv."""
    images: list[tuple[Path, dict[str, str], str]] = []
    masks: dict[Core, Path] = {}
    skipped = strangers(found)
    for path in found.files:
        entities, suffix = _entities(path)
        if suffix in {"mask", "dseg"}:
            core = frozenset((k, v) for k, v in entities.items() if k not in DERIVED_ENTITIES)
            if core in masks:
                raise CohortError("several masks belong to one image of the BIDS source: keep one mask an image")
            masks[core] = path
        elif found.parts(path)[0].startswith("sub-"):
            images.append((path, entities, suffix))
        else:
            skipped.leave("further channel", found.name(path))
    sessions = _sessions(found)
    scans: list[Scan] = []
    for path, entities, suffix in images:
        mask = masks.pop(frozenset(entities.items()), None)
        patient = found.parts(path)[0]
        session = f"ses-{entities['ses']}" if "ses" in entities else ""
        attributes = {"suffix": suffix, **sessions.get((patient, session), {})}
        if session:
            attributes["session"] = session
        for read in readers(path, mask, rules):
            scans.append(Scan((found.name(path),), read, patient, attributes, has_mask=mask is not None))
    for path in masks.values():
        skipped.leave("mask without an image", found.name(path))
    suffixes = {s for _, _, s in images}
    modality = "MR" if suffixes and suffixes <= MRI_SUFFIXES else "CT" if suffixes == {"ct"} else "OT"
    table = next((t for t in found.tables if found.name(t) == "participants.tsv"), None)
    return Source("bids", 3, scans, modality, spaced=True, table=table, skipped=skipped)


def _entities(path: Path) -> tuple[dict[str, str], str]:
    *parts, suffix = stem(path.name).split("_")
    return dict(p.split("-", 1) for p in parts if "-" in p), suffix


def _sessions(found: Found) -> dict[tuple[str, str], dict[str, str]]:
    """Return the values that sub-*_sessions.tsv give each session; a table that cannot be read gives none."""
    values: dict[tuple[str, str], dict[str, str]] = {}
    for path in found.tables:
        if not path.name.endswith("_sessions.tsv"):
            continue
        with suppress(CohortError):
            table = read_table(path)
            key = table.column(("sessionid",))
            for row in table.rows if key is not None else ():
                given = {c: v for c, v in zip(table.columns, row, strict=True) if v.lower() not in MISSING}
                values[found.parts(path)[0], row[key]] = given  # type: ignore[index]
    return values
