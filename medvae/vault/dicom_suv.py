"""PET in standardised uptake values by body weight, where the standard tags suffice.

SUVbw = activity concentration (Bq/ml) * body weight (g) / dose (Bq) at the images' reference time: QIBA's
vendor-neutral pseudo-code (qibawiki.rsna.org, "Standardized Uptake Value"). Private tags are unread, so that images in
CNTS or PROPCPS stay in the units of the file.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Any

SUV_TAGS = (
    "Units", "DecayCorrection", "CorrectedImage", "PatientWeight", "SeriesDate", "SeriesTime", "AcquisitionDate",
    "AcquisitionTime", "RadiopharmaceuticalInformationSequence",
)  # fmt: skip
LONGEST = timedelta(days=1)  # from injection to scan: anything longer is a wrong clock


def suv_factor(ds: Any) -> float | None:
    """Return what turns the file's units into SUVbw (g/ml), 1 where they are that already, None where tags lack."""
    if ds.get("Modality") != "PT":
        return None
    units = str(ds.get("Units") or "").upper()
    if units == "GML":
        return 1.0
    corrected = {str(v).upper() for v in (ds.get("CorrectedImage") or ())}
    if units != "BQML" or not {"ATTN", "DECY"} <= corrected:
        return None
    weight = float(ds.get("PatientWeight") or 0)
    dose = _dose(ds)
    if not 0 < weight < 1000 or dose is None:
        return None
    factor = weight * 1000 / dose
    return factor if math.isfinite(factor) and factor > 0 else None


def _dose(ds: Any) -> float | None:
    """Return the dose in Bq, decayed to the time that the images are corrected to."""
    given = (ds.get("RadiopharmaceuticalInformationSequence") or [None])[0]
    if given is None:
        return None
    dose, half_life = float(given.get("RadionuclideTotalDose") or 0), float(given.get("RadionuclideHalfLife") or 0)
    if dose <= 0:
        return None
    way = str(ds.get("DecayCorrection") or "").upper()
    if way == "ADMIN":
        return dose
    scanned = _moment(ds.get("SeriesDate"), ds.get("SeriesTime"))
    acquired = _moment(ds.get("AcquisitionDate"), ds.get("AcquisitionTime"))
    if scanned is not None and acquired is not None and scanned > acquired:
        return None  # a series made later, whose time is not the scan's
    injected = _injected(given, scanned)
    if way != "START" or half_life <= 0 or scanned is None or injected is None:
        return None
    waited = scanned - injected
    if not timedelta(0) <= waited <= LONGEST:
        return None
    return float(dose * 2 ** (-waited.total_seconds() / half_life))


def _injected(given: Any, scanned: datetime | None) -> datetime | None:
    whole = str(given.get("RadiopharmaceuticalStartDateTime") or "")
    if len(whole) >= 14:
        return _moment(whole[:8], whole[8:].split("+")[0].split("-")[0])
    if scanned is None:
        return None
    moment = _moment(scanned.strftime("%Y%m%d"), given.get("RadiopharmaceuticalStartTime"))
    # The tag holds no date: an injection after the scan by the clock was the day before.
    return moment - timedelta(days=1) if moment is not None and moment > scanned else moment


def _moment(date: Any, time: Any) -> datetime | None:
    text = f"{date or ''} {str(time or '').split('.')[0][:6]:0<6}"
    try:
        return datetime.strptime(text, "%Y%m%d %H%M%S") if time else None
    except ValueError:
        return None
