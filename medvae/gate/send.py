"""A release's DICOM objects into a PACS: by STOW-RS or C-STORE, and only what still is what was signed.

Sending twice does no harm: an object keeps its UID. What a DICOMweb archive already holds is not sent again, so an
interrupted transfer goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medvae.errors import InputError, MissingPart, RunError
from medvae.gate.verify import verify
from medvae.pacs import AE_TITLE, TIMEOUT, DicomWeb, Dimse, parse, talking, web_client
from medvae.types import Progress

BATCH_BYTES = 32_000_000  # of one request: below the limits that web servers often set
_PAGE = 1000
_REFUSED = "of {total} objects the PACS refused {bad}: see its log, and send again, which is safe"


def send(release: Path, to: str, *, public_key: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Verify a release folder and send its DICOM objects to the PACS at `to`.

    Returns {"objects", "sent", "already_there"}. Raises VerificationFailed for a release that was altered, RunError
    for one without DICOM, ConfigError for an address, InputError where the PACS refuses or breaks off: sent objects
    stay there, and the same call goes on. Secrets: see medvae.pacs.
    """
    place = parse(to)
    verify(release, public_key=public_key)
    studies = [sorted(folder.glob("*.dcm")) for folder in sorted((release / "dicom").glob("SYN*"))]
    total = sum(map(len, studies))
    if not total:
        raise RunError("this release holds no DICOM: make one with `medvae release RUN -o RELEASE --format dicom`")
    sent = already = 0
    for was_there, now_sent in _by_dimse(place, studies) if isinstance(place, Dimse) else _by_web(place, studies):
        sent, already = sent + now_sent, already + was_there
        if progress is not None:
            progress(sent + already, total)
    return {"objects": total, "sent": sent, "already_there": already}


def _by_web(place: DicomWeb, studies: Sequence[Sequence[Path]]) -> Iterator[tuple[int, int]]:
    """Store one study after another; yield (already there, sent) as it goes."""
    import pydicom

    client = web_client(place)
    total = sum(map(len, studies))
    for files in studies:
        uids = {path: pydicom.dcmread(path, specific_tags=["SOPInstanceUID"]).SOPInstanceUID for path in files}
        study = str(pydicom.dcmread(files[0], specific_tags=["StudyInstanceUID"]).StudyInstanceUID)
        known = _known(client, study)
        missing = [path for path in files if uids[path] not in known]
        if len(missing) < len(files):
            yield len(files) - len(missing), 0
        for batch in _batches(missing):
            with talking():
                answer = client.store_instances([pydicom.dcmread(path) for path in batch], study)
            bad = len(answer.get("FailedSOPSequence") or ())
            if bad:
                raise InputError(_REFUSED.format(total=total, bad=bad))
            yield 0, len(batch)


def _known(client: Any, study: str) -> set[str]:
    """Return the UIDs of the study's objects that the archive holds; none where it cannot or will not say."""
    found: set[str] = set()
    try:
        with talking():
            while True:
                page = client.search_for_instances(study, limit=_PAGE, offset=len(found))
                new = {row["00080018"]["Value"][0] for row in page} - found
                found |= new
                if len(page) < _PAGE or not new:
                    return found
    except InputError:  # an archive need not offer searches; whether it can be reached at all, the sending will tell
        return found


def _batches(files: Sequence[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    size = 0
    for path in files:
        weight = path.stat().st_size
        if batch and size + weight > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(path)
        size += weight
    if batch:
        yield batch


def _by_dimse(place: Dimse, studies: Sequence[Sequence[Path]]) -> Iterator[tuple[int, int]]:
    """Store over one association; yield (0, 1) an object. C-STORE of a known object is harmless."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian

    try:
        from pynetdicom import AE
    except ImportError:
        raise MissingPart("talking to a PACS needs more packages: pip install 'medvae-dp[pacs]'") from None
    files = [path for study in studies for path in study]
    classes = {pydicom.dcmread(path, specific_tags=["SOPClassUID"]).SOPClassUID for path in files}
    entity = AE(ae_title=AE_TITLE)
    entity.connection_timeout, entity.acse_timeout, entity.dimse_timeout = TIMEOUT[0], TIMEOUT[0], TIMEOUT[1]
    for uid in sorted(classes):
        entity.add_requested_context(uid, ExplicitVRLittleEndian)
    with talking():
        association = entity.associate(place.host, place.port, ae_title=place.title)
    if not association.is_established:
        raise InputError("the DICOM node does not answer or refuses us: check host, port and AE titles on both sides")
    try:
        for path in files:
            with talking():
                status = association.send_c_store(path)
            # Warnings (Bxxx) mean stored with remarks, PS3.4 B.2.3.
            if "Status" not in status or (status.Status and status.Status >> 12 != 0xB):
                raise InputError("the DICOM node refused an object or broke off: see its log, and send again")
            yield 0, 1
    finally:
        association.release()
