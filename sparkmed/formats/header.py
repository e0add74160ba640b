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
tag = functools.cache(tag_for_keyword)


@functools.cache
def _dictionary_vr(keyword: str) -> str:
    return dictionary_VR(tag(keyword))


def code(value) -> str:
    """A code string or UID; anything that does not look like one is left out."""
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
        """Code strings and UIDs; what does not look like one is left empty."""
        value, _ = self._value(keyword)
        found = [t.strip(" \0") for t in value[:4096].decode("latin-1").split("\\")]
        return [t if _CODE.match(t) else "" for t in found] if value else []

    def text(self, keyword: str) -> str:
        return (self.texts(keyword) or [""])[0]

    def uid(self, keyword: str) -> str:
        """As :func:`uid`."""
        return uid(self._value(keyword)[0].decode("latin-1"))

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
