"""Standardised uptake values: the factor from stored PET values to SUVbw in g/ml, from the header of one image.

The rules are those that QIBA publishes for vendor-neutral SUV (FDG-PET/CT profile, appendix on SUV): the dose decays from
injection to the start of the scan unless the scanner says that it corrected to injection.
"""

import datetime
import re

from sparkmed.formats.header import Header
from sparkmed.rejection import Refused

LEAST_DOSE = 3e4
"""Bq per kg of body weight below which a dose is none, or was written in kBq: a thousandth of what is usual is 5e3."""
HALF_LIVES = {
    ("77004003", "C-111A1"): 6586.2,  # F-18
    ("40565003", "C-105A1"): 1221.8,  # C-11
    ("21576001", "C-107A1"): 597.9,  # N-13
    ("129504001", "C-B1038"): 122.24,  # O-15
    ("35337001", "C-131A3"): 4062.6,  # Ga-68
    ("3932008", "C-127A2"): 45721.0,  # Cu-64
    ("79197006", "C-159A2"): 75.45,  # Rb-82
    ("63360001", "C-168A4"): 282280.0,  # Zr-89
    ("40937006", "C-114A5"): 360800.0,  # I-124
}
"""Seconds by the nuclide's codes of PS3.16 CID 4020, in SNOMED CT and SRT; of the Decay Data Evaluation Project."""


def suv_factor(h: Header) -> tuple[float, str | None]:
    """SUVbw = factor x (value after rescale), and ``acquisition`` when the time of this image's acquisition stands for the start of
    the scan: of a series the smallest factor then counts, that of its first image.

    Raises :class:`Refused` ``SUV_UNKNOWN`` that says what the header lacks.
    """
    units = h.text("Units")
    if units == "GML" and h.text("SUVType") in ("", "BW"):
        return 1.0, None
    if units == "CNTS":
        philips = h.private(0x70531000, "Philips PET Private Group")
        if philips and philips[0] > 0:
            return philips[0], None
        raise _unknown("units are counts and there is no factor of the vendor")
    if units != "BQML":
        kind = h.text("SUVType")
        raise _unknown(f"units are {units or 'not named'}{f' of type {kind}' if kind else ''}, wanted BQML, GML of type BW or CNTS")
    corrected = h.texts("CorrectedImage")
    if "ATTN" not in corrected or "DECY" not in corrected:
        raise _unknown("the image is not corrected for attenuation and decay")
    weight = h.number("PatientWeight")
    if not weight or not 0 < weight < 1000:
        raise _unknown("there is no patient weight in kg")
    drugs = h.items("RadiopharmaceuticalInformationSequence")
    if len(drugs) > 1:
        raise _unknown(f"there are {len(drugs)} radiopharmaceuticals")
    drug = drugs[0] if drugs else None
    dose = drug.number("RadionuclideTotalDose") if drug else None
    half_life = drug.number("RadionuclideHalfLife") if drug else None
    if not dose or dose < 1e5 or dose / weight < LEAST_DOSE:
        raise _unknown("there is no injected dose in Bq, or it is in another unit")
    reference = h.text("DecayCorrection")
    if reference == "ADMIN":
        return 1000 * weight / dose, None
    if reference != "START":
        raise _unknown(f"decay is corrected to {reference or 'nobody knows when'}, wanted START or ADMIN")
    if not half_life or half_life <= 0:
        raise _unknown("there is no half-life")
    known = _nuclide(drug)
    if known and abs(half_life / known - 1) > 0.05:
        raise _unknown(f"the half-life is {half_life:g} s, that of the nuclide named is {known:g} s")
    start, by = _start(h)
    lives = _uptake_seconds(start, drug, _zone(h.plain("TimezoneOffsetFromUTC"))) / half_life
    if lives > 20:
        raise _unknown(f"the scan starts {lives:.0f} half-lives after the injection")
    return 1000 * weight / (dose * 2**-lives), by


def _start(h: Header) -> tuple[datetime.datetime, str | None]:
    """When the scan started: with the series, unless that was made later from other images."""
    series = _moment(h.plain("SeriesDate"), h.plain("SeriesTime"))
    acquired = _moment(h.plain("AcquisitionDate"), h.plain("AcquisitionTime"))
    if series is None or acquired is None:
        raise _unknown("series or acquisition have no date and time")
    return (series, None) if series <= acquired else (acquired, "acquisition")


def _uptake_seconds(start: datetime.datetime, drug: Header, zone: datetime.timedelta | None) -> float:
    """From injection to the start of the scan."""
    moment = drug.plain("RadiopharmaceuticalStartDateTime")
    whole, zones = _moment_of(moment), (_zone(moment), zone)
    if whole is not None and zones[0] is not None:  # else it is in the zone of the scanner
        whole = None if zones[1] is None else whole + zones[1] - zones[0]
    clock = _moment(start.strftime("%Y%m%d"), drug.plain("RadiopharmaceuticalStartTime"))
    if clock is not None and clock - start > datetime.timedelta(hours=12):  # before midnight
        clock -= datetime.timedelta(days=1)
    if whole is not None and clock is not None and zones[0] is None:
        apart = abs((whole - clock).total_seconds()) % 86_400
        if min(apart, 86_400 - apart) > 60:
            raise _unknown(f"two times of injection are {min(apart, 86_400 - apart) / 60:.0f} minutes apart")
    injected = clock if whole is None else whole
    if injected is None:
        raise _unknown("there is no time of injection")
    seconds = (start - injected).total_seconds()
    if seconds < 0:
        raise _unknown(f"the scan starts {-seconds:.0f} s before the time of injection")
    return seconds


def _nuclide(drug: Header) -> float | None:
    """Half-life in seconds of the radionuclide that is named, None when it is none of :data:`HALF_LIVES`."""
    named = {i.text("CodeValue") for i in drug.items("RadionuclideCodeSequence")}
    return next((seconds for codes, seconds in HALF_LIVES.items() if named & set(codes)), None)


def _moment(date: str, time: str) -> datetime.datetime | None:
    return _moment_of(date + time) if date and time else None


def _moment_of(text: str) -> datetime.datetime | None:
    """DICOM's YYYYMMDDHHMMSS.FFFFFF, its end left out or not, without its time zone."""
    whole, _, fraction = text.split("+")[0].split("-")[0].replace(":", "").partition(".")
    try:
        moment = datetime.datetime.strptime(whole.ljust(14, "0"), "%Y%m%d%H%M%S")
    except ValueError:
        return None
    return moment + datetime.timedelta(microseconds=int(fraction[:6].ljust(6, "0")) if fraction.isdigit() else 0)


def _zone(text: str) -> datetime.timedelta | None:
    """The offset from UTC at the end of a moment, or alone."""
    found = re.search(r"([+-])(\d\d)(\d\d)$", text)
    if not found:
        return None
    offset = datetime.timedelta(hours=int(found[2]), minutes=int(found[3]))
    return offset if found[1] == "+" else -offset


def _unknown(why: str) -> Refused:
    return Refused("SUV_UNKNOWN", f"no SUV: {why}")
