"""The values of a DICOM data set, from the bytes as they stand: faster than pydicom's own conversion, and no warnings."""

import functools
import hashlib
import math
import re
import struct

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.sequence import Sequence

from sparkmed.rejection import Refused

_CODE = re.compile(r"^[A-Za-z0-9_ .-]{1,64}$")
_UID = re.compile(r"^[0-9.]{1,64}$")
_BINARY = {"US": "H", "SS": "h", "UL": "L", "SL": "l", "FD": "d", "FL": "f"}
TERMS = {
    "Modality": "AR AS ASMT AU BDUS BI BMD CD CF CFM CP CR CS CT CTPROTOCOL DD DF DG DM DMS DOC DS DX EC ECG EEG EMG EOG EPS ES FA "
    "FID FS GM HC HD IO IOL IVOCT IVUS KER KO LEN LP LS M3D MA MG MR MS NM OAM OCT OP OPM OPMREF OPR OPT OPTBSV OPTENF OPV OSS OT "
    "PA PLAN POS PR PT PX REG RESP RF RG RTDOSE RTIMAGE RTINTENT RTPLAN RTRAD RTRECORD RTSEGANN RTSTRUCT RWV SEG SM SMR SR SRF ST "
    "STAIN TEXTUREMAP TG US VA VF XA XAPROTOCOL XC",
    "PhotometricInterpretation": "MONOCHROME1 MONOCHROME2 RGB HSV ARGB CMYK YBR_FULL YBR_FULL_422 YBR_PARTIAL_422 YBR_PARTIAL_420 "
    "YBR_ICT YBR_RCT XYB",
    "ComplexImageComponent": "MAGNITUDE PHASE REAL IMAGINARY MIXED",
    "Units": "CNTS NONE CM2 CM2ML PCNT CPS BQML MGMINML UMOLMINML MLMING MLG 1CM UMOLML PROPCNTS PROPCPS MLMINML MLML GML STDDEV",
    "SUVType": "BSA BW LBM LBMJAMES128 LBMJANMA IBW",
    "DecayCorrection": "NONE START ADMIN",
    "BurnedInAnnotation": "YES NO",
}
TERMS = {keyword: frozenset(terms.split()) for keyword, terms in TERMS.items()}
"""Defined terms of the standard by element (PS3.3), retired ones included; a value that is none of them is not shown, for whatever
somebody wrote there may be a name."""
TERMS["PhotometricInterpretation"] |= {"PALETTE COLOR"}
tag = functools.cache(tag_for_keyword)


@functools.cache
def _dictionary_vr(keyword: str) -> str:
    return dictionary_VR(tag(keyword))


def code(value) -> str:
    """A code string; anything that does not look like one is left out."""
    text = str(value or "").strip(" \0")
    return text if _CODE.match(text) else ""


def uid(value) -> str:
    """A UID; one that is none by its form becomes a digest, so that two of them stay two, and "" when there is none."""
    text = str(value or "").strip(" \0")
    return text if not text or _UID.match(text) else f"not-a-uid-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


class Header:
    """A data set, or an item of a sequence, by keyword.

    Absent and empty elements are None; a value that is not what its element holds raises :class:`Refused`.
    """

    def __init__(self, dataset, little: bool):
        self.dataset = dataset
        self.elements = dict(dataset.items())  # unconverted: a plain dictionary is several times faster to ask
        self.order = "<" if little else ">"

    def __contains__(self, keyword: str) -> bool:
        return tag(keyword) in self.elements

    def _value(self, keyword: str) -> tuple[bytes, str | None]:
        return self._raw(tag(keyword), keyword)

    def _raw(self, number: int, name: str) -> tuple[bytes, str | None]:
        element = self.elements.get(number)
        if element is None or element.value is None:
            return b"", None
        if not isinstance(element.value, bytes):
            if not element.value:
                return b"", None
            raise Refused("BAD_VALUE", f"{name} holds no plain value")
        return element.value, element.VR

    def texts(self, keyword: str) -> list[str]:
        """Code strings; what does not look like one is left empty, what is none of :data:`TERMS` is "?"."""
        value, _ = self._value(keyword)
        found = [t.strip(" \0") for t in value[:4096].decode("latin-1").split("\\")]
        terms = TERMS.get(keyword)
        if terms:
            found = [t if not t or t in terms else "?" for t in found]
        return [t if _CODE.match(t) or t == "?" else "" for t in found] if value else []

    def text(self, keyword: str) -> str:
        return (self.texts(keyword) or [""])[0]

    def uid(self, keyword: str) -> str:
        """As :func:`uid`."""
        return uid(self._value(keyword)[0].decode("latin-1"))

    def mark(self, keyword: str) -> str | None:
        """What tells groups apart: a number of at most four digits, else a digest of whatever is there."""
        text = self._value(keyword)[0].decode("latin-1").strip(" \0")
        plain = len(text) <= 4 and text.isdigit() and text.isascii()
        return text if plain else f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}" if text else None

    def plain(self, keyword: str) -> str:
        """A value of printable characters as it is: dates and times."""
        value, _ = self._value(keyword)
        return value[:64].decode("latin-1").strip(" \0")

    def numbers(self, keyword: str, count: int | None = None) -> list[float] | None:
        """Finite numbers, ``count`` of them when given."""
        value, vr = self._value(keyword)
        if vr in (None, "UN"):
            vr = _dictionary_vr(keyword)
        return self._parsed(keyword, value, _BINARY.get(vr), count)

    def private(self, number: int, creator: str, binary: str | None = None) -> list[float] | None:
        """The numbers of a private element (gggg,xxee), ``number`` being that of block 10, in the block that a ``creator`` of this
        beginning reserves: PS3.5 7.8.1. ``binary`` is the VR that the vendor gives it, for data sets without VRs; None: text.
        """
        value, vr = self._raw(self._place(number, creator), "a private element")
        if vr in (None, "UN"):
            vr = binary
        try:
            return self._parsed("a private element", value, _BINARY.get(vr), None)
        except Refused:
            return None  # a vendor's business: nothing is known of it then

    def private_bytes(self, number: int, creator: str) -> bytes:
        return self._raw(self._place(number, creator), "a private element")[0]

    def _place(self, number: int, creator: str) -> int:
        """Where a private element of block 10 lies in this data set; 0 when nobody reserved a block for it."""
        for creator_at in self._creators.get(number >> 16, ()):
            if self._raw(creator_at, "a private creator")[0].startswith(creator.encode()):
                return number & 0xFFFF0000 | (creator_at & 0xFF) << 8 | number & 0xFF
        return 0

    @functools.cached_property
    def _creators(self) -> dict[int, list[int]]:
        """Tags that reserve private blocks, by group."""
        found: dict[int, list[int]] = {}
        for number in self.elements:
            if number & 0x10000 and 0x10 <= number & 0xFFFF <= 0xFF:
                found.setdefault(number >> 16, []).append(number)
        return found

    def _parsed(self, name: str, value: bytes, binary: str | None, count: int | None) -> list[float] | None:
        if not (value if binary else value.strip(b" \0\\")):
            return None
        try:
            if binary:
                found = [float(v) for (v,) in struct.iter_unpack(self.order + binary, value)]
            else:
                found = [float(v) for v in value.strip(b" \0").split(b"\\")]
        except (ValueError, struct.error):
            raise Refused("BAD_VALUE", f"{name} is not a number") from None
        if not all(map(math.isfinite, found)):
            raise Refused("BAD_VALUE", f"{name} is not finite")
        if count is not None and len(found) != count:
            raise Refused("BAD_GEOMETRY", f"{name} has {len(found)} values, wanted {count}")
        return found

    def number(self, keyword: str) -> float | None:
        found = self.numbers(keyword)
        return None if found is None else found[0]

    def integer(self, keyword: str, default: int | None = None) -> int | None:
        found = self.number(keyword)
        return default if found is None else int(found)

    def integers(self, keyword: str) -> list[int] | None:
        found = self.numbers(keyword)
        return None if found is None else [int(v) for v in found]

    def tag_value(self, keyword: str) -> int:
        """The tag that an element names: group and element in one number, 0 when there is none."""
        value, _ = self._value(keyword)
        order = "little" if self.order == "<" else "big"
        return int.from_bytes(value[:2], order) << 16 | int.from_bytes(value[2:4], order)

    def items(self, keyword: str) -> list["Header"]:
        """The items of a sequence; none when it is absent or no sequence."""
        number = tag(keyword)
        if number not in self.elements:
            return []
        value = self.dataset[number].value
        return [Header(item, self.order == "<") for item in value] if isinstance(value, Sequence) else []

    def item(self, keyword: str) -> "Header | None":
        """The first item of a sequence."""
        return next(iter(self.items(keyword)), None)
