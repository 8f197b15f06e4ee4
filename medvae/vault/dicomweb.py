"""Scans from a PACS by DICOMweb: fetched into a private folder beside the cohort, then ingested like any DICOM tree.

A series is kept whole or not at all, so that an interrupted fetch goes on where it stopped. What another search left is
removed first, and the folder once the cohort is made.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medvae.errors import CohortError, ConfigError
from medvae.pacs import DicomWeb, is_address, parse, talking, web_client
from medvae.types import Progress

_STUDY, _SERIES = "0020000D", "0020000E"
_PAGE = 100
_ORIGINAL = (("application/dicom", "*"),)  # as stored: what the archive does not decode, we do


@contextmanager
def local_source(source: Path | str, out: Path, progress: Progress | None = None) -> Iterator[Path]:
    """Yield a folder that holds the source: itself, or what the PACS at that address gave.

    The address may end in a search by QIDO-RS, such as ?ModalitiesInStudy=MR&StudyDate=20200101-20201231.
    Raises ConfigError for an address, InputError where the PACS refuses or breaks off (the same call goes on), and
    CohortError where it finds no study.
    """
    if not is_address(str(source)):
        yield Path(source)
        return
    place = parse(str(source))
    if not isinstance(place, DicomWeb):
        raise ConfigError("scans are fetched by DICOMweb: give dicomweb://HOST/PATH")
    folder = out.resolve().with_name(f".{out.resolve().name}.fetched")
    _fetch(place, folder, progress)
    yield folder
    shutil.rmtree(folder)


def _fetch(place: DicomWeb, folder: Path, progress: Progress | None) -> None:
    client = web_client(place)
    with talking():
        studies = list(_pages(client.search_for_studies, search_filters=dict(place.query)))
        series = [
            (_uid(study, _STUDY), _uid(row, _SERIES))
            for study in studies
            for row in _pages(client.search_for_series, study_instance_uid=_uid(study, _STUDY))
            if _wanted(row, place)
        ]
    if not series:
        raise CohortError("the PACS finds no series for this search: check the words after the question mark")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    wanted = {_name(uid) for _, uid in series}
    for left in folder.iterdir():  # of another search, or of a series that broke off
        if left.name not in wanted:
            shutil.rmtree(left)
    for done, (study, uid) in enumerate(series, start=1):
        target = folder / _name(uid)
        if not target.exists():
            _fetch_series(client, study, uid, target)
        if progress is not None:
            progress(done, len(series))


def _wanted(row: Any, place: DicomWeb) -> bool:
    """Of a study found by its modality, other series (reports, maps) stay where they are."""
    asked = dict(place.query).get("ModalitiesInStudy")
    return asked is None or row.get("00080060", {}).get("Value", [asked])[0] in asked.split(",")


def _fetch_series(client: Any, study: str, series: str, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    with talking():
        # File names are digests: an identifier of the archive must not become a path.
        for instance in client.iter_series(study, series, media_types=_ORIGINAL):
            instance.save_as(partial / f"{_name(str(instance.SOPInstanceUID))}.dcm", enforce_file_format=True)
    partial.replace(target)


def _pages(search: Any, **asked: Any) -> Iterator[Any]:
    """Yield all results of a search, a page at a time; an archive that ignores the offset ends it."""
    offset, last = 0, None
    while True:
        page = search(limit=_PAGE, offset=offset, **asked)
        if not page or page == last:
            return
        yield from page
        if len(page) < _PAGE:
            return
        offset, last = offset + len(page), page


def _uid(row: Any, tag: str) -> str:
    return str(row[tag]["Value"][0])


def _name(uid: str) -> str:
    return hashlib.sha256(uid.encode()).hexdigest()[:32]
