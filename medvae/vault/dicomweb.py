"""Scans from a PACS by DICOMweb: fetched into a private folder beside the cohort, then ingested like any DICOM tree.

A series is kept whole or not at all, so that an interrupted fetch goes on where it stopped. What another search left is
removed first, and the folder once the cohort is made.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from medvae.errors import CohortError, ConfigError, InputError
from medvae.pacs import TIMEOUT, DicomWeb, is_address, parse, talking, web_client, web_session
from medvae.types import Progress
from medvae.vault.dicomweb_parts import save_objects

_STUDY, _SERIES = "0020000D", "0020000E"
_PAGE = 100
MOST_FOUND = 1_000_000  # studies of a search, and series of a study
RESERVE = 2**30  # bytes of the disk that a fetch leaves free
CHUNK = 2**18  # bytes held of an object
# As stored: what the archive does not decode, we do.
_ORIGINAL = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
_BUSY = (408, 429, 503, 504)
_WAITS = (0.4, 0.8)  # seconds
_UID_FORM = re.compile(r"[0-9][0-9.]{0,63}")  # it becomes part of an address


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
    session = web_session(place)
    client = web_client(place, session)
    with talking():
        studies = [_uid(row, _STUDY) for row in _pages(client.search_for_studies, search_filters=dict(place.query))]
        series = [
            (study, _uid(row, _SERIES))
            for study in studies
            for row in _pages(client.search_for_series, study_instance_uid=study)
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
            _fetch_series(session, f"{place.url}/studies/{study}/series/{uid}", target)
        if progress is not None:
            progress(done, len(series))


def _wanted(row: Any, place: DicomWeb) -> bool:
    """Of a study found by its modality, other series (reports, maps) stay where they are."""
    asked = dict(place.query).get("ModalitiesInStudy")
    return asked is None or row.get("00080060", {}).get("Value", [asked])[0] in asked.split(",")


def _fetch_series(session: Any, url: str, target: Path) -> None:
    """Write a series below `target`, whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    try:
        with talking(), _answer(session, url) as answer:
            room = shutil.disk_usage(partial).free - RESERVE
            save_objects(answer.headers["Content-Type"], _within(answer.iter_content(CHUNK), room), partial)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            target.parent.rmdir()  # if no series is whole


def _answer(session: Any, url: str) -> Any:
    """Return the archive's answer, of which only the head was read; a busy archive is asked again."""
    for wait in (*_WAITS, None):
        answer = session.get(url, headers=_ORIGINAL, stream=True, timeout=TIMEOUT)
        if answer.status_code not in _BUSY or wait is None:
            break
        answer.close()
        time.sleep(wait)
    if answer.status_code >= 400:
        answer.close()
    answer.raise_for_status()
    return answer


def _within(pieces: Iterable[bytes], room: int) -> Iterator[bytes]:
    """Yield the pieces while they fit on the disk, so that an answer without an end has one."""
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            raise InputError(
                f"the PACS sends a series that leaves less than {RESERVE // 2**30} GiB of this disk free, or one "
                "without an end: give an output folder on a larger disk, or narrow the search"
            )
        yield piece


def _pages(search: Any, **asked: Any) -> Iterator[Any]:
    """Yield all results of a search, a page at a time; an archive that ignores the offset ends it."""
    offset, last = 0, None
    while offset < MOST_FOUND:
        page = search(limit=_PAGE, offset=offset, **asked)
        if not page or page == last:
            return
        yield from page
        if len(page) < _PAGE:
            return
        offset, last = offset + len(page), page
    raise InputError(f"the PACS finds more than {MOST_FOUND:,} studies or series, or never ends: narrow the search")


def _uid(row: Any, tag: str) -> str:
    uid = str(row[tag]["Value"][0])
    if not _UID_FORM.fullmatch(uid):
        raise ValueError("not an identifier")
    return uid


def _name(uid: str) -> str:
    return hashlib.sha256(uid.encode()).hexdigest()[:32]
