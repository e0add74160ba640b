"""What tells who somebody is: collected from a DICOM data set before it is de-identified, looked for in what comes out.

A name counts whole and by each of its words of four letters or more (two in scripts other than Latin), wherever it stands; one of
three letters in several words counts whole and as words of their own; a single word of less, such as Li, does not count, since it
is in every text. Texts are compared as texts, each decoded by the character set of its own data set (a name also as UTF-8 where its
bytes are that): without regard to case, accents, ae for a-umlaut and, from six letters on, to what stands between the letters.
Identifiers, institutions and addresses count whole from four characters on; one of four or five digits only where no other digit
touches it, since such numbers are in every header; from seven digits on whatever stands between them. Numbers count by their value,
dates in any usual order of day, month (a number or a name) and year; of a birth date also with two digits of the year. UIDs count
as they are. What spells a name in another script or with letters that look alike is not found.
"""

import contextlib
import decimal
import re
import unicodedata
from collections.abc import Iterable, Iterator

from pydicom import Dataset
from pydicom.charset import convert_encodings, decode_bytes, python_encoding
from pydicom.config import strict_reading
from pydicom.datadict import DicomDictionary, tag_for_keyword
from pydicom.multival import MultiValue
from pydicom.uid import UID
from pydicom.valuerep import IS, TEXT_VR_DELIMS, DSfloat

from sparkmed.formats import confidentiality
from sparkmed.rejection import Refused

DEEP = 64
"""Sequences nested deeper than this are those of no real object, and pydicom's writer takes exponentially long to fail on them."""
DATE = re.compile(r"^(\d{4})\.?(\d{2})\.?(\d{2})$")
DATETIME = re.compile(r"^(\d{4})(\d{2})(\d{2})(\d{2}(?:\d{2}(?:\d{2}(?:\.\d{1,6})?)?)?(?:[+-]\d{4})?)?$")
TIME = re.compile(r"^\d{2}(?::?\d{2}(?::?\d{2}(?:\.\d{1,6})?)?)?$")
NUMBER = re.compile(r"^[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?$")
_WRITTEN = re.compile(
    r"(?=(?<![a-z0-9])(\d{1,4}|[a-z]{3,9})[^a-z0-9\0]{1,3}(\d{1,2}|[a-z]{3,9})[^a-z0-9\0]{1,3}(\d{4}|\d{1,2})(?![a-z0-9]))"
)
"""Day, month and year with something between them."""
_MONTHS = {
    month: n % 12 + 1
    for n, month in enumerate(
        "jan feb mar apr may jun jul aug sep oct nov dec "
        "jan feb mrz apr mai jun jul aug sep okt nov dez "
        "ene fev mar abr mai juin juil aou sept out nov dic".split()
    )
}
_BETWEEN_DIGITS = b"\0-./: "
_DOTTED = re.compile(r"(?<![0-9])[0-9]++(?:\.[0-9]++)+")
_MOST = 10_000
"""Spellings that are looked for in one object; one with more is refused, since that would take hours."""
_NUMBERS = frozenset({"DS", "IS"})
_STRUCTURED = frozenset({"UI", "DS", "IS"}) | confidentiality.TEMPORAL
"""Values of these VRs are judged by their form: digits that happen to be an identifier's mean nothing there."""
_BINARY = frozenset("OB OD OF OL OV OW UN AT FD FL SL SS SV UL US UV".split())
_DELIMITERS = TEXT_VR_DELIMS | set(b"\\^=")
"""Where a code extension ends (PS3.5 6.1.2.5.3)."""
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")
_ASCII = ["ascii"]
"""Encodings of a data set without SpecificCharacterSet."""
_LETTERS = str.maketrans({"ı": "i", "ł": "l", "ø": "o", "đ": "d", "æ": "a", "œ": "o"})
"""Letters that Unicode does not take apart."""
_IDENTIFIERS = frozenset(
    tag_for_keyword(k)
    for k in (
        "PatientID OtherPatientIDs IssuerOfPatientID PatientAddress PatientTelephoneNumbers PatientTelecomInformation "
        "MedicalRecordLocator InsurancePlanIdentification CountryOfResidence RegionOfResidence Occupation "
        "AccessionNumber StudyID AdmissionID IssuerOfAdmissionID ServiceEpisodeID IssuerOfServiceEpisodeID "
        "PlacerOrderNumberImagingServiceRequest FillerOrderNumberImagingServiceRequest RequestedProcedureID "
        "ScheduledProcedureStepID PerformedProcedureStepID SpecimenIdentifier SpecimenAccessionNumber ContainerIdentifier "
        "SlideIdentifier InstitutionName InstitutionAddress InstitutionalDepartmentName ReferringPhysicianAddress "
        "ReferringPhysicianTelephoneNumbers PersonAddress PersonTelephoneNumbers PersonTelecomInformation "
        "OrderCallbackPhoneNumber RequestingService HumanPerformerOrganization ResponsibleOrganization "
        "PatientInstitutionResidence ScheduledPatientInstitutionResidence CurrentPatientLocation PerformedLocation "
        "ClinicalTrialSubjectID ClinicalTrialSubjectReadingID ClinicalTrialSiteID ClinicalTrialSiteName "
        "ClinicalTrialSponsorName ClinicalTrialProtocolID "
        "DeviceSerialNumber StationName StationAETitle PerformedStationName PerformedStationAETitle ScheduledStationName "
        "ScheduledStationAETitle GantryID GeneratorID DetectorID PlateID CassetteID SourceSerialNumber LensSerialNumber "
        "UniqueDeviceIdentifier TreatmentMachineName RadiationMachineName CameraOwnerName XRayDetectorID XRaySourceID"
    ).split()
)
_NAMES = frozenset(tag for tag, (vr, *_) in DicomDictionary.items() if vr == "PN")
OF_AN_OBJECT = sorted(
    _IDENTIFIERS
    | _NAMES
    | {
        tag_for_keyword(k)
        for k in (
            "SpecificCharacterSet PatientBirthDate OtherPatientIDsSequence RequestAttributesSequence "
            "ReferringPhysicianIdentificationSequence PerformingPhysicianIdentificationSequence OperatorIdentificationSequence "
            "PhysiciansOfRecordIdentificationSequence ConsultingPhysicianIdentificationSequence AuthorObserverSequence "
            "ContributingEquipmentSequence"
        ).split()
    }
)
"""Tags of the elements at the top of an object that say whose it is and by whom, and of the sequences that do."""


def of_an_object(dataset: Dataset) -> Dataset:
    """The elements of :data:`OF_AN_OBJECT` alone, as they were read."""
    found = Dataset()
    for tag in OF_AN_OBJECT:
        if tag in dataset:
            found[tag] = dataset.get_item(tag)
    return found


def texts(dataset: Dataset, tag: int) -> list[str]:
    """The values of a text element, UID, number or date; of bytes that are no text, as Latin-1."""
    element = dataset.get_item(tag)
    value = element.value
    if isinstance(value, bytes):
        return [v.strip(" \0") for v in value.decode("latin-1").split("\\")]
    values = value if isinstance(value, MultiValue | list | tuple) else [] if value is None else [value]
    spelt = (getattr(v, "original_string", v) if isinstance(v, DSfloat | IS) else v for v in values)
    return [str(v).strip(" \0") for v in spelt]


def vr_of(element) -> str:
    """The VR that the file gives an element, or else the standard's."""
    return element.VR if element.VR not in (None, "UN") else confidentiality.dictionary_vr(element.tag)


def encodings(dataset: Dataset, inherited: list[str] = _ASCII) -> list[str]:
    """Python's names of the encodings of a data set's texts; of ``inherited`` for an item that does not name its own.

    Raises ``BAD_VALUE`` for a character set that the standard does not have (PS3.3 C.12.1.1.2). The default repertoire is ASCII.
    """
    tag = 0x00080005
    if tag not in dataset or not any(values := texts(dataset, tag)):
        return inherited
    terms = [re.sub(r"^ISO.IR.(\d+)$", r"ISO_IR \1", re.sub(r"^ISO.2022.IR.(\d+)$", r"ISO 2022 IR \1", v)) for v in values]
    if not all(t in python_encoding for t in terms):
        raise Refused("BAD_VALUE", f"{confidentiality.label(tag)} names a character set that is unknown")
    return ["ascii" if e == "iso8859" else e for e in convert_encodings(terms)]


def decoded(dataset: Dataset, tag: int, codecs: list[str]) -> str:
    """The text of an element, all values of it; UnicodeError where it does not follow ``codecs`` or holds control characters."""
    value = dataset.get_item(tag).value
    if isinstance(value, bytes):
        try:
            with strict_reading():
                text = decode_bytes(value, codecs, _DELIMITERS)
        except ValueError:  # of an escape sequence too
            raise UnicodeError("a text of another encoding") from None
    else:
        text = "\\".join(texts(dataset, tag))
    text = text.strip(" \0")
    if _CONTROLS.search(text):
        raise UnicodeError("control characters")
    return text


def is_text(vr: str) -> bool:
    """Whether values of this VR are neither bytes nor judged by their form."""
    return vr not in _BINARY and vr not in _STRUCTURED and vr != "SQ"


def leaves(dataset: Dataset, codecs: list[str] = _ASCII, depth: int = 0) -> Iterator[tuple[Dataset, int, str, list[str]]]:
    """(data set, tag, VR, :func:`encodings`) of every element that is no sequence, nested ones included; ``DEEP_NESTING`` below
    :data:`DEEP`."""
    if depth > DEEP:
        raise Refused("DEEP_NESTING", f"sequences are nested more than {DEEP} deep")
    codecs = encodings(dataset, codecs)
    for tag in list(dataset.keys()):
        vr = vr_of(dataset.get_item(tag))
        if vr == "SQ":
            for item in dataset[tag].value or ():
                yield from leaves(item, codecs, depth + 1)
        else:
            yield dataset, tag, vr, codecs


def _forms(text: str) -> tuple[str, str, str]:
    """What is compared of a text: without case and accents; also with ae, oe, ue as a, o, u; also letters and digits alone.

    >>> _forms("M\u00fcller-Lo\u00eb, Gro\u00df")
    ('muller-loe, gross', 'muller-lo, gross', 'mullerlogross')
    """
    folded = text.lower()
    if not text.isascii():
        taken_apart = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
        folded = "".join(c for c in taken_apart if not unicodedata.combining(c) and unicodedata.category(c) != "Cf")
        folded = unicodedata.normalize("NFKC", folded).translate(_LETTERS)
    reduced = re.sub("([aou])e", r"\1", folded)
    return folded, reduced, re.sub(r"[^\w\0]|_", "", reduced)


def _folded(text: str) -> str:
    return _forms(text)[0]


def _is_foreign(text: str) -> bool:
    """Of a script other than Latin, where two characters are a name."""
    text = unicodedata.normalize("NFKC", text)
    return any(map(str.isalpha, text)) and not re.search("[a-zA-Z\x80-\u024f]", text)


def _dates(first: str, second: str, last: str) -> Iterator[tuple[int, int, int]]:
    """(year, month, day) that three parts of a text may be.

    >>> list(_dates("5", "mar", "1962"))
    [(5, 3, 1962), (1962, 3, 5)]
    """
    for year, month, day in ((first, second, last), (last, second, first), (last, first, second)):
        number = int(month) if month.isdigit() else _MONTHS.get(month[:3]) or _MONTHS.get(month[:4])
        if number and year.isdigit() and day.isdigit():
            yield int(year), number, int(day)


class Identifiers:
    """What identifies somebody in one data set. Never shown, never stored; a hit is reported by the tags alone."""

    def __init__(self, dataset: Dataset, kept: frozenset[int] = frozenset()):
        """Collected from ``dataset``; elements of tags in ``kept`` are not, since they are meant to stay.

        An element counts by the VR that the file gives it, and by the standard's.
        """
        self._texts: tuple[dict[str, int], ...] = ({}, {}, {})
        self._bytes: dict[bytes, int] = {}
        self._numbers: dict[str, int] = {}
        self._dates: dict[tuple[int, int, int], int] = {}
        self._born: dict[str, int] = {}
        self._phrases: dict[str, int] = {}
        self._uids: dict[str, int] = {}
        for part, tag, vr, codecs in leaves(dataset):
            vrs = {vr, confidentiality.dictionary_vr(tag)}
            if tag in kept or tag >> 16 == 0x7FE0:
                continue
            if "PN" in vrs:
                for text in _readings(part, tag, codecs):
                    self._add_name(text, tag, codecs)
            if tag in _IDENTIFIERS:
                for text in _readings(part, tag, codecs):
                    if len(text.strip()) >= 4:
                        self._add(text.strip(), tag, codecs)
            if vrs & {"DA", "DT"}:
                for value in texts(part, tag):
                    match = DATE.match(value[:10]) or DATE.match(value[:8])
                    if match:
                        year, month, day = match.groups()
                        self._numbers |= dict.fromkeys((year + month + day, day + month + year, month + day + year), tag)
                        self._dates[int(year), int(month), int(day)] = tag
                        if tag == 0x00100030:
                            short = year[2:]
                            self._dates[int(short), int(month), int(day)] = tag
                            self._born |= dict.fromkeys((short + month + day, day + month + short, month + day + short), tag)

    def __repr__(self):
        return f"Identifiers({len(self._texts[0]) + len(self._numbers) + len(self._uids)})"

    def add_uid(self, uid: str, tag: int):
        """A UID that was replaced."""
        if len(uid) >= 10:
            self._uids[uid] = tag

    def discard(self, values: Iterable[str]):
        """Values that come out on purpose, such as dummies; those are not taken for a leak."""
        for value in values:
            self._bytes.pop(value.lower().encode(), None)
            for known, form in zip(self._texts, _forms(value), strict=True):
                known.pop(form, None)

    def _add_name(self, text: str, tag: int, codecs: list[str]):
        for group in text.split("="):  # alphabetic, ideographic, phonetic
            words = [w for w in re.split(r"[\^\s,.;:/()_\-]+", group) if w]
            joined = "".join(words)
            if len(words) > 1 and len(joined) == 3 and not _is_foreign(joined):
                self._phrases |= {r"[\W_]+".join(map(re.escape, map(_folded, w))): tag for w in (words, words[1::-1])}
            if len(joined) >= 4 or (len(joined) >= 2 and _is_foreign(joined)):
                for joint in ("^", " ", ", ", ""):
                    self._add(joint.join(words), tag, codecs)
                    self._add(joint.join(words[1::-1]), tag, codecs) if len(words) > 1 else None
            for word in words:
                if len(word) >= 4 or (len(word) >= 2 and _is_foreign(word)):
                    self._add(word, tag, codecs)

    def _add(self, text: str, tag: int, codecs: list[str]):
        if len(text) < 4 and text.isascii():
            return
        if text.isdigit() and text.isascii():
            self._numbers |= {n: tag for n in (text, text.lstrip("0")) if len(n) >= 4}
            return
        if len(self._texts[0]) > _MOST or len(text) > _MOST:
            raise Refused("NOT_CLEAN", "more or longer names and identifiers than can be looked for")
        for known, form, shortest in zip(self._texts, _forms(text), (2, 4, 6), strict=True):
            if len(form) >= shortest:
                known[form] = tag
        for spelling in {text, text.lower(), text.upper()}:
            for encoding in {"utf-8", "latin-1", "utf-16-le", "utf-16-be", *codecs}:
                try:
                    self._bytes[spelling.encode(encoding).lower()] = tag
                except UnicodeEncodeError:
                    pass

    def found_in(self, text: str) -> int | None:
        """The tag whose value occurs in the text, None when none does."""
        forms = _forms(text)
        for known, form in zip(self._texts, forms, strict=True):
            for part, tag in known.items():
                if part in form:
                    return tag
        folded, _, squeezed = forms
        for number, tag in self._numbers.items():
            if len(number) >= 7 and number in squeezed:
                return tag
            if number in folded and (len(number) >= 6 or re.search(rf"(?<![0-9])(?<![0-9]\.){number}(?!\.?[0-9])", folded)):
                return tag
        for short, tag in self._born.items():
            if short in folded and re.search(rf"(?<![0-9]){short}(?![0-9])", folded):
                return tag
        for phrase, tag in self._phrases.items():
            if re.search(rf"(?<![^\W_]){phrase}(?![^\W_])", folded):
                return tag
        for match in _WRITTEN.finditer(folded) if self._dates else ():
            found = next((d for d in _dates(*match.groups()) if d in self._dates), None)
            if found:
                return self._dates[found]
        if self._uids:
            for match in _DOTTED.finditer(folded):
                parts = match[0].split(".")  # a series' UID is often its study's with more behind it
                for n in range(2, len(parts) + 1):
                    tag = self._uids.get(".".join(parts[:n]))
                    if tag is not None:
                        return tag
        return None

    def found_in_bytes(self, value: bytes, shortest: int = 4) -> int | None:
        """The tag whose value occurs in bytes that are no text, in any encoding that may be; values of fewer bytes than
        ``shortest`` are not looked for, since by chance they occur wherever there are many bytes."""
        low = value.lower()
        digits = ((n.encode(), tag) for n, tag in self._numbers.items() if len(n) >= 6)
        uids = ((u.encode(), tag) for u, tag in self._uids.items())
        for part, tag in (*self._bytes.items(), *digits, *uids):
            if len(part) >= shortest and part in low:
                return tag
        bare = value.translate(None, _BETWEEN_DIGITS)
        return next((tag for n, tag in self._numbers.items() if len(n) >= 8 and n.encode() in bare), None)

    def has_number(self, text: str) -> int | None:
        """The tag whose value is this number of six digits or more, however it is written."""
        number = decimal.Decimal(text)
        whole = str(abs(int(number))) if number.adjusted() < 64 and number == int(number) else ""
        return next((self._numbers[n] for n in (text, whole) if len(n) >= 6 and n in self._numbers), None)


def _readings(dataset: Dataset, tag: int, codecs: list[str]) -> list[str]:
    """The values of a text element; as several encodings have it where they do not follow ``codecs``."""
    value = dataset.get_item(tag).value
    if not isinstance(value, bytes):
        return texts(dataset, tag)
    found = []
    if not value.isascii():  # declared as another character set, and yet UTF-8
        with contextlib.suppress(UnicodeError):
            found.append(value.decode())
    try:
        found.append(decoded(dataset, tag, codecs))
    except UnicodeError:
        for encoding in ("utf-8", "latin-1"):
            with contextlib.suppress(UnicodeError):
                found.append(value.decode(encoding))
    return [v.strip(" \0") for text in found for v in text.split("\\")]


def require_absent(
    identifiers: Identifiers,
    dataset: Dataset,
    own: dict[int, list[str]],
    dates: set[str],
    uids: set[str],
    pixels: int | None = None,
):
    """Raise ``NOT_CLEAN`` when a data set still holds what identifies somebody, naming the two tags and no value.

    ``own`` are the elements at the top that were written on purpose, with their values; ``dates`` the eight digits of each
    date that may occur; ``uids`` the UIDs that must not. Numbers, dates and UIDs are judged by their form and value, texts by
    what occurs in them, all else by its bytes. ``pixels`` is the element at the top that is not looked at.
    """
    gathered, places = [], []
    for part, tag, vr, codecs in leaves(dataset):
        if part is dataset and (tag == pixels or own.get(tag) == texts(part, tag)):
            continue
        if vr in _STRUCTURED:
            for text in texts(part, tag):
                if text and not _is_harmless(text, vr, identifiers, dates, uids):
                    raise Refused("NOT_CLEAN", f"{confidentiality.label(tag)} holds a value that must not leave")
        elif is_text(vr):
            try:
                gathered.append(decoded(part, tag, codecs))
            except UnicodeError:
                raise Refused("NOT_CLEAN", f"{confidentiality.label(tag)} holds a text that cannot be decoded") from None
            places.append(tag)
        else:
            value = part.get_item(tag).value
            require_none(identifiers.found_in_bytes(value if isinstance(value, bytes) else str(value).encode()), tag)
    if identifiers.found_in("\0".join(gathered)) is None:
        return
    for value, tag in zip(gathered, places, strict=True):
        require_none(identifiers.found_in(value), tag)
    raise Refused("NOT_CLEAN", "an identifying value occurs across elements")


def require_none(source: int | None, tag: int):
    """Raise ``NOT_CLEAN`` when a value of the element ``source`` was found in the element ``tag``."""
    if source is not None:
        message = f"{confidentiality.label(tag)} would be kept and holds a value of {confidentiality.label(source)}"
        raise Refused("NOT_CLEAN", message)


def _is_harmless(text: str, vr: str, identifiers: Identifiers, dates: set[str], uids: set[str]) -> bool:
    if vr == "UI":
        return text not in uids and (text.startswith("2.25.") or UID(text).name != text)
    if vr in _NUMBERS:
        return bool(NUMBER.match(text)) and identifiers.has_number(text) is None
    if vr == "TM":
        return bool(TIME.match(text))
    match = (DATE if vr == "DA" else DATETIME).match(text)
    return bool(match) and "".join(match.groups()[:3]) in dates
