"""DICOM without identity: one object in, a proven copy out, or a refusal with a reason.

:func:`deidentify` applies :mod:`confidentiality` to every element, nested ones included, writes the result to memory, reads it
back and proves it clean by :mod:`identifiers`. Whatever goes wrong on the way, nothing comes out. Pixels and transfer syntax stay
as they are: what pixels may show is a matter of which objects are held back, what else may be in them that of :mod:`pixel_data`.
"""

import datetime
import hashlib
import hmac
import io
import re
import uuid
from dataclasses import dataclass, field

import pydicom
from pydicom import DataElement, Dataset
from pydicom.config import disable_value_validation, strict_reading
from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import empty_value_for_VR
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID

import sparkmed
from sparkmed import config
from sparkmed.formats import confidentiality, dicom, pixel_data
from sparkmed.formats.identifiers import (
    DATE,
    DATETIME,
    NUMBER,
    TIME,
    Identifiers,
    decoded,
    encodings,
    is_text,
    require_absent,
    require_none,
    texts,
    vr_of,
)
from sparkmed.imaging.splits import pseudonym
from sparkmed.rejection import Refused

STAGE = "deidentify"
IMPLEMENTATION_UID = "2.25.73172390289322941551698362834268810826"
DAYS = 3650
"""Dates go back by 1 to this many days."""
DUMMY = "DEIDENTIFIED"
_DUMMY_DATE = "19000101"
_DUMMIES = {
    **dict.fromkeys(("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"), DUMMY),
    **dict.fromkeys(("FD", "FL", "SL", "SS", "UL", "US", "SV", "UV"), 0),
    **dict.fromkeys(("OB", "OW", "OD", "OF", "OL", "OV", "UN"), b"\0" * 8),
    "AS": "000Y",
    "DA": _DUMMY_DATE,
    "DS": "0",
    "DT": f"{_DUMMY_DATE}000000",
    "IS": "0",
    "TM": "000000",
    "UR": "http://deidentified.invalid",
}
_FORMS = {"DS": NUMBER, "IS": NUMBER, "AS": re.compile(r"^\d{3}[DWMY]$")}
_CODES = {
    "basic": ("113100", "Basic Application Confidentiality Profile"),
    "dates": ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
    "device": ("113109", "Retain Device Identity Option"),
}
"""Codes of CID 7050 (PS3.16)."""
_SCREEN = re.compile(r"SCREEN[ _]?(SAVE|SHOT|CAPTURE)|DOSE[ _]INFO|CT_SOM\d PROT", re.IGNORECASE)
_CLASS = "1.2.840.10008.5.1.4.1.1."
_ULTRASOUND = re.compile(re.escape(_CLASS) + r"(3|3\.1|6|6\.\d)$")
_SECONDARY_CAPTURE = re.compile(re.escape(_CLASS) + r"7(\.\d)?$")
_DOCUMENT = re.compile(re.escape(_CLASS) + r"104(\.\d+)?$")
_REPORT = re.compile(re.escape(_CLASS) + r"88(\.\d+)*$")
_VOICE = re.compile(re.escape(_CLASS) + r"9\.4\.\d$")
_SEEN_BY_A_CAMERA = re.compile(re.escape(_CLASS) + r"77\.([12]|1\.[1-57-9](\.\d+)?)$")
"""Endoscopy, microscopy, photography, ophthalmology, dermoscopy: their cameras write a name into the picture unless told
otherwise."""


@dataclass(frozen=True)
class Deidentified:
    """A clean object: its bytes, where it goes (``subject/study/series/instance.dcm``), and which action met which tag."""

    data: bytes = field(repr=False)
    path: str
    actions: tuple[str, ...]


def deidentify(data: bytes, key: bytes, settings: config.Deidentify | None = None) -> Deidentified:
    """A DICOM file without identity, the same bytes each time.

    PatientName and PatientID become the subject's pseudonym (:func:`splits.pseudonym` of PatientID, or else of PatientName, as in
    the catalog; of the study's UID when there is neither). A UID becomes 2.25 and an HMAC of it under ``key``; those of the
    standard stay. Raises :class:`Refused` and nothing else:

    - ``NOT_DICOM``, ``BROKEN_DICOM``, ``TRUNCATED``, ``NO_PIXEL_DATA``, ``UNKNOWN_SYNTAX``, ``MISSING_UID`` and
      more for what is not whole;
    - ``PIXEL_LENGTH``, ``HIDDEN_BYTES``, ``NO_DECODER`` for pixel data that are not the image alone;
    - ``BURNED_IN``, ``ULTRASOUND``, ``SECONDARY_CAPTURE``, ``SCREEN_SAVE``, ``HIDDEN_BITS`` unless ``settings.allow`` names it;
    - ``DOCUMENT``, ``STRUCTURED_REPORT``, ``ANNOTATION``, ``VOICE``, ``PRIVATE_CLASS`` for what the profile leaves nothing of;
    - ``NOT_CLEAN`` when the copy cannot be proven clean.
    """
    settings = settings or config.Deidentify()
    require_dicom(data[: 64 << 10])
    with dicom._quiet(), disable_value_validation():
        dataset, syntax = _read(data)
        comments = _hold_back(dataset, syntax, settings)
        kept = confidentiality.DEVICE if settings.device == "kept" else frozenset()
        known = Identifiers(dataset, kept)
        pixels = _pixels(dataset)
        work = _Work.on(dataset, key, settings)
        path = work.path(dataset)
        work.clean(dataset)
        work.mark(dataset)
        out = _encode(dataset, syntax)
        _prove(out, syntax, pixels, comments, known, work)
    return Deidentified(out, path, tuple(sorted(work.actions)))


def require_dicom(head: bytes):
    """Raise ``EMPTY`` or ``NOT_DICOM`` unless the first bytes of a file are those of a DICOM object."""
    if not head:
        raise Refused("EMPTY", "the file has no bytes")
    if not dicom.recognise(head):
        raise Refused("NOT_DICOM", "only DICOM files are de-identified")


def _read(data: bytes) -> tuple[pydicom.FileDataset, str]:
    """(whole data set, transfer syntax); what ends early or does not parse raises."""
    stream, deflated = dicom._inflated(io.BytesIO(data))
    with strict_reading():  # else pydicom takes the end of the file for the end of whatever is cut off there
        try:
            dataset = pydicom.dcmread(stream, force=True)
        except (EOFError, OSError):
            raise Refused("TRUNCATED", "the file ends within an element") from None
    for element in dataset.elements():
        length = getattr(element, "length", None)
        if length not in (None, 0xFFFFFFFF) and length != len(element.value or b""):
            raise Refused(
                "TRUNCATED", f"{confidentiality.label(element.tag)} claims {length} bytes, {len(element.value)} are there"
            )
    syntax = deflated or str(dataset.file_meta.get("TransferSyntaxUID", "")).strip(" \0")
    if not syntax:
        implicit, little = dataset.original_encoding
        syntax = pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
        syntax = str(syntax if little else pydicom.uid.ExplicitVRBigEndian)
    uid = UID(syntax)
    if uid.is_private or not uid.is_transfer_syntax:
        raise Refused("UNKNOWN_SYNTAX", "the transfer syntax is private or unknown")
    return dataset, syntax


def _text(dataset: Dataset, keyword: str) -> str:
    tag = pydicom.datadict.tag_for_keyword(keyword)
    return ([*texts(dataset, tag), ""] if tag in dataset else [""])[0]


def _hold_back(dataset: Dataset, syntax: str, settings: config.Deidentify) -> list[bytes]:
    """Raise for objects that the profile leaves nothing of, for pixel data that are not the image alone, and for pixels that may
    show a name and were not asked for; comments of the pixels' codestreams."""
    sop_class, modality = _text(dataset, "SOPClassUID"), _text(dataset, "Modality")
    media = str(dataset.file_meta.get("MediaStorageSOPClassUID", ""))
    if "DirectoryRecordSequence" in dataset or media == "1.2.840.10008.1.3.10":
        raise Refused("NOT_DICOM", "a DICOMDIR lists files by their old names and is no object of a patient")
    missing = [k for k in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID") if not _text(dataset, k)]
    if missing:
        raise Refused("MISSING_UID", f"no {' and no '.join(missing)}")
    if not sop_class.startswith(_CLASS) or UID(sop_class).name == sop_class:
        raise Refused("PRIVATE_CLASS", "the SOP class is none of the standard's classes of objects of a patient")
    if _DOCUMENT.match(sop_class) or "EncapsulatedDocument" in dataset:
        raise Refused("DOCUMENT", "the profile removes an encapsulated document, and nothing else is in the object")
    if _REPORT.match(sop_class) or "ContentSequence" in dataset or modality in ("SR", "KO"):
        raise Refused("STRUCTURED_REPORT", "the profile removes the content of a report, and nothing else is in the object")
    if _VOICE.match(sop_class):
        raise Refused("VOICE", "a recorded voice identifies who speaks")
    if ("Rows" in dataset or "Image" in UID(sop_class).name) and not _pixels(dataset):  # cut off between two elements
        raise Refused("NO_PIXEL_DATA", "an image object without pixel data")
    comments = pixel_data.require_image(dataset, syntax)
    if "GraphicAnnotationSequence" in dataset:
        raise Refused("ANNOTATION", "texts and graphics drawn onto an image may name the patient")
    refusals = {
        "burned_in": _burned_in(dataset, sop_class),
        "ultrasound": (_ULTRASOUND.match(sop_class) or modality in ("US", "IVUS")) and "ultrasound images show who is examined",
        "secondary_capture": _captured(dataset, sop_class) and "a secondary capture may show anything that a screen or paper shows",
        "screen_save": _SCREEN.search(" ".join(_texts(dataset, "ImageType"))) and "the image type says that it is a screen",
        "hidden_bits": "hidden_bits" not in settings.allow and pixel_data.hidden_bits(dataset, syntax),
    }
    for reason, message in refusals.items():
        if message and reason not in settings.allow:
            raise Refused(reason.upper(), f"{message}; deidentify.allow=[{reason}] lets it pass")
    return comments


def _texts(dataset: Dataset, keyword: str) -> list[str]:
    tag = pydicom.datadict.tag_for_keyword(keyword)
    return texts(dataset, tag) if tag in dataset else []


def _captured(dataset: Dataset, sop_class: str) -> bool:
    """Secondary capture by class, or by a conversion that is not the synthesis of an image (PS3.3 C.8.6.1)."""
    return bool(_SECONDARY_CAPTURE.match(sop_class)) or _text(dataset, "ConversionType") not in ("", "SYN")


def _burned_in(dataset: Dataset, sop_class: str) -> str:
    stated = _text(dataset, "BurnedInAnnotation").upper()
    if stated == "YES":
        return "BurnedInAnnotation is YES"
    labelled = _text(dataset, "SpecimenLabelInImage").upper() == "YES" or {"LABEL", "OVERVIEW"} & set(_texts(dataset, "ImageType"))
    if labelled and (sop_class == dicom.SLIDE or "SpecimenLabelInImage" in dataset):
        return "a picture of a slide's label, which names the patient"
    if stated != "NO" and _SEEN_BY_A_CAMERA.match(sop_class):
        return "BurnedInAnnotation does not say NO, as a camera's image must"
    return ""


def _pixels(dataset: Dataset) -> list[bytes]:
    return [dataset[k].value for k in pixel_data.ELEMENTS if k in dataset]


@dataclass
class _Work:
    """One object being de-identified: the subject, and what happened so far."""

    key: bytes
    settings: config.Deidentify
    subject: str
    offset: datetime.timedelta
    actions: set[str] = field(default_factory=set)
    dates: set[str] = field(default_factory=lambda: {_DUMMY_DATE})
    """Eight digits of each date that comes out."""
    uids: dict[str, int] = field(default_factory=dict)
    """Replaced UIDs with the tag that they were found under."""

    @classmethod
    def on(cls, dataset: Dataset, key: bytes, settings: config.Deidentify) -> "_Work":
        patient = str(dataset.get("PatientID") or dataset.get("PatientName") or "").strip()  # as the catalog reads it
        patient = patient.strip(" \0") or f"study {_text(dataset, 'StudyInstanceUID')}"
        return cls(key, settings, pseudonym(patient, key), datetime.timedelta(days=days_back(patient, key)))

    def path(self, dataset: Dataset) -> str:
        names = [new_uid(_text(dataset, k), self.key) for k in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")]
        return "/".join([self.subject, *names]) + ".dcm"

    def clean(self, dataset: Dataset, inherited: list[str] | None = None):
        """Apply the profile to every element, in place; ``inherited`` are the encodings of the data set that an item lies in."""
        codecs = encodings(dataset, inherited) if inherited else encodings(dataset)
        for tag in list(dataset.keys()):
            element = dataset.get_item(tag)
            if element.VR == "UN" and not tag.is_private:
                element = dataset[tag]  # as the VR that the standard knows (PS3.5 6.2.2)
            letter = confidentiality.action(int(tag), element.VR, self.settings)
            vr = confidentiality.dictionary_vr(tag)
            nested_pixels = inherited and tag >> 16 == 0x7FE0
            if letter == "K" and vr != "SQ" and (nested_pixels or not _well_formed(dataset, tag, vr, codecs)):
                letter = "X"
            if letter in "KU" and vr == "SQ":
                for item in dataset[tag].value or ():
                    self.clean(item, codecs)
                continue
            if letter == "K":
                continue
            if letter == "C":
                letter = self._shift(dataset, tag, vr)
            elif letter == "U":
                dataset[tag] = DataElement(tag, "UI", [self._replaced(u, tag) if u else "" for u in texts(dataset, tag)])
            if letter == "X":
                del dataset[tag]
            elif letter == "Z":
                dataset[tag] = DataElement(tag, vr, Sequence() if vr == "SQ" else empty_value_for_VR(vr))
            elif letter == "D":
                patient = _text(dataset, "PatientID") if tag == 0x00100020 else ""
                dataset[tag] = DataElement(tag, vr, pseudonym(patient, self.key) if patient else _DUMMIES[vr])
            self.actions.add(f"{confidentiality.label(tag)} {letter}")

    def _replaced(self, uid: str, tag: int) -> str:
        replacement = new_uid(uid, self.key)
        if replacement != uid:
            self.uids[uid] = tag
        return replacement

    def _shift(self, dataset: Dataset, tag: int, vr: str) -> str:
        """Move the dates of an element; the letter of what was done: what is no whole date loses its value."""
        moved = []
        for text in texts(dataset, tag):
            match = {"DA": DATE, "DT": DATETIME, "TM": TIME}[vr].match(text)
            if vr == "TM" and (match or not text):
                moved.append(text)
                continue
            try:
                day = datetime.date(*(int(n) for n in match.groups()[:3])) - self.offset if match else None
            except (ValueError, OverflowError):
                day = None
            if day is None and text:
                return confidentiality.without_option(tag)
            moved.append(f"{day:%Y%m%d}".zfill(8) + (match[4] or "" if vr == "DT" else "") if day else "")
            self.dates.add(moved[-1][:8])
        dataset[tag] = DataElement(tag, vr, moved)
        return "C"

    def mark(self, dataset: Dataset):
        """Say whose object it is now and what was done."""
        for name, values in self.own.items():
            vr = confidentiality.dictionary_vr(name)
            dataset[name] = DataElement(name, vr, values)
        dataset.DeidentificationMethodCodeSequence = Sequence([_code(*_CODES[c]) for c in self._codes])

    @property
    def own(self) -> dict[int, list[str]]:
        """Values by tag that are written on purpose."""
        values = {
            "PatientName": self.subject,
            "PatientID": self.subject,
            "PatientIdentityRemoved": "YES",
            "DeidentificationMethod": f"sparkmed {sparkmed.__version__}, PS3.15 {confidentiality.EDITION} Basic Profile",
            "LongitudinalTemporalInformationModified": "MODIFIED" if self.settings.dates == "shifted" else "REMOVED",
        }
        return {pydicom.datadict.tag_for_keyword(k): [v] for k, v in values.items()}

    @property
    def _codes(self) -> list[str]:
        return ["basic"] + ["dates"] * (self.settings.dates == "shifted") + ["device"] * (self.settings.device == "kept")


def _well_formed(dataset: Dataset, tag: int, vr: str, codecs: list[str]) -> bool:
    """Whether values that must be numbers or an age are, and texts can be read."""
    if is_text(vr):
        try:
            decoded(dataset, tag, codecs)
        except UnicodeError:
            return False
    form = _FORMS.get(vr)
    return form is None or all(form.match(t) for t in texts(dataset, tag) if t)


def new_uid(uid: str, key: bytes) -> str:
    """2.25 and a UUID (PS3.5 B.2) that is an HMAC-SHA256 of ``uid`` under ``key``; a UID that the standard defines stays."""
    if UID(uid).name != uid:
        return uid
    digest = hmac.new(key, b"uid\0" + uid.encode(), hashlib.sha256).digest()
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"


def days_back(patient: str, key: bytes) -> int:
    """By how many days the dates of a patient go back: 1 to :data:`DAYS`, a function of the identifier and the key."""
    digest = hmac.new(key, b"days\0" + patient.encode(), hashlib.sha256).digest()
    return 1 + int.from_bytes(digest[:8], "big") % DAYS


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item


def _encode(dataset: pydicom.FileDataset, syntax: str) -> bytes:
    """The bytes of a file with a meta group of our own and an empty preamble."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = _text(dataset, "SOPClassUID")
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = syntax
    meta.ImplementationClassUID = IMPLEMENTATION_UID
    meta.ImplementationVersionName = f"SPARKMED {sparkmed.__version__}"[:16]
    dataset.file_meta, dataset.preamble = meta, b"\0" * 128
    out = io.BytesIO()
    pydicom.dcmwrite(out, dataset, enforce_file_format=True)
    return out.getvalue()


def _prove(out: bytes, syntax: str, pixels: list[bytes], comments: list[bytes], known: Identifiers, work: _Work):
    """Read the written bytes back and raise ``NOT_CLEAN`` unless everything that must have happened has."""
    dataset, found = _read(out)
    if found != syntax or _pixels(dataset) != pixels or out[:128].strip(b"\0"):
        raise Refused("NOT_CLEAN", "the written object does not have the pixels and the encoding of its source")
    _require_applied(dataset, work.settings)
    for uid, tag in work.uids.items():
        known.add_uid(uid, tag)
    known.discard([DUMMY, work.subject])
    codes = dataset.pop("DeidentificationMethodCodeSequence").value
    if [c.CodeValue for c in codes] != [_CODES[c][0] for c in work._codes]:
        raise Refused("NOT_CLEAN", "the written object does not say what was done")
    image = pixel_data.ELEMENTS.get(pixel_data.element(dataset))
    require_absent(known, dataset, work.own, work.dates, set(work.uids), image)
    require_none(known.found_in(b"\0".join(comments).decode("latin-1")), image)
    require_none(known.found_in_bytes(pixel_data.codestreams(dataset), shortest=6), image)
    require_absent(known, dataset.file_meta, {}, set(), set(work.uids))


def _require_applied(dataset: Dataset, settings: config.Deidentify, top: bool = True):
    for tag in list(dataset.keys()):
        element = dataset.get_item(tag)
        vr = vr_of(element)
        letter = confidentiality.action(int(tag), element.VR, settings)
        if letter == "C" and not any(texts(dataset, tag)):
            letter = "Z"
        empty = not (len(dataset[tag].value or ()) if vr == "SQ" else any(texts(dataset, tag)))
        ours = top and keyword_for_tag(tag) == "PatientName"
        if letter == "X" or letter == "Z" and not empty and not ours:
            raise Refused("NOT_CLEAN", f"{confidentiality.label(tag)} is still there")
        if letter == "D" and not _is_dummy(dataset, tag):
            raise Refused("NOT_CLEAN", f"{confidentiality.label(tag)} is not the dummy that it should be")
        if vr == "SQ":
            for item in dataset[tag].value or ():
                _require_applied(item, settings, False)


def _is_dummy(dataset: Dataset, tag: int) -> bool:
    if tag == 0x00100020 and re.fullmatch(r"sub-[0-9a-f]{16}", _text(dataset, "PatientID")):
        return True
    return dataset[tag].value == DataElement(tag, confidentiality.dictionary_vr(tag), _DUMMIES[dataset[tag].VR]).value
