"""OME-TIFF: the pages of a file, each as a TIFF of its own that says what OME-XML says of it.

``TiffData`` of the OME model (2016-06; Goldberg et al. 2005, Genome Biology 6:R47) maps pages to channel, z and t of an image,
``Plate``, ``Well`` and ``WellSample`` map images to wells. A page is copied with its strips or tiles as they are, nothing is
decoded; its description is JSON with the facts of :func:`facts`. So what reads a picture reads a page, and its SHA-256 covers its
pixels and its place.

Of a set of files each holds the XML of all: only pages that the XML says to be in the file at hand are read. A file whose XML lies
in another one (``BinaryOnly``) has no pages here. A DTD is refused, so no entity is ever expanded.
"""

import contextlib
import functools
import io
import itertools
import json
import struct
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from xml.parsers import expat

import tifffile

from sparkmed.formats import raster
from sparkmed.rejection import Refused

SUFFIXES = tuple(f".ome.{end}" for end in ("tif", "tiff", "tf2", "tf8", "btf"))
"""Names of OME-TIFF end like this, says the specification."""
MOST_PAGES = 100_000
MOST_XML, MOST_ELEMENTS = 128 << 20, 1_000_000
"""Characters and elements of XML beyond which a file is refused."""
MOST_BYTES = 1 << 30
"""A page of more, as it is stored, is refused: it is copied in memory."""
ROWS, COLUMNS = 32, 48
"""Of a plate of 1536 wells."""
_MARK = '{"ome":'
_MICROMETRES = {"m": 1e6, "cm": 1e4, "mm": 1e3, "um": 1.0, "µm": 1.0, "μm": 1.0, "nm": 1e-3}
_OFFSETS, _COUNTS = (273, 324), (279, 325)  # of strips, of tiles
_KEPT = (256, 257, 258, 259, 262, 266, 274, 277, 278, 284, 317, 320, 322, 323, 338, 339, 347, 530, 532)
"""Tags on which pixels depend."""


@dataclass
class _Image:
    """One image of the XML, as far as it places pages."""

    channels: list[dict[str, str]] = field(default_factory=list)
    pixels: dict[str, str] = field(default_factory=dict)
    blocks: list[tuple[dict[str, str], str]] = field(default_factory=list)  # TiffData with the UUID of its file
    planes: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict)


class _Reader:
    """Handlers of an expat parser for what places pages."""

    def __init__(self):
        self.uuid, self.text, self.path = "", "", []
        self.images: dict[str, _Image] = {}
        self.wells: dict[str, dict[str, Any]] = {}  # by image
        self.plate: dict[str, str] = {}
        self.well: dict[str, str] = {}
        self.samples: list[tuple[int, str]] = []
        self.image = _Image()
        self.elements = 0
        self.parser = expat.ParserCreate("utf-8", " ")  # what the text says of its encoding was of its bytes
        self.parser.buffer_text = True
        self.parser.StartDoctypeDeclHandler = self.parser.EntityDeclHandler = self._doctype
        self.parser.StartElementHandler, self.parser.EndElementHandler = self._start, self._end
        self.parser.CharacterDataHandler = self._said

    def _doctype(self, *_):
        raise _broken("has a DTD or entities, which are not read")

    def _start(self, name: str, attributes: dict[str, str]):
        name = name.rpartition(" ")[2]
        self.path.append(name)
        self.elements += 1
        if self.elements > MOST_ELEMENTS:
            raise Refused("TOO_LARGE", f"an OME-TIFF of more than {MOST_ELEMENTS} elements of XML")
        if len(self.path) > 64:
            raise _broken("nests elements deeper than 64")
        above, self.text = self.path[-2] if len(self.path) > 1 else "", ""
        if name == "OME" and not above:
            self.uuid = attributes.get("UUID", "")
        elif name == "Plate":
            self.plate = attributes
        elif name == "Well" and above == "Plate":
            self.well, self.samples = attributes, []
        elif name == "WellSample":
            self.samples.append((_whole(attributes, "Index", len(self.samples)), ""))
        elif name == "ImageRef" and above == "WellSample":
            self.samples[-1] = (self.samples[-1][0], attributes.get("ID", ""))
        elif name == "Image" and above == "OME":
            self.image = self.images.setdefault(attributes.get("ID", ""), _Image())
        elif name == "Pixels":
            self.image.pixels = attributes
        elif name == "Channel" and above == "Pixels":
            self.image.channels.append(attributes)
        elif name == "TiffData":
            self.image.blocks.append((attributes, ""))
        elif name == "Plane" and above == "Pixels":
            self.image.planes[tuple(attributes.get(k, "0") for k in ("TheC", "TheZ", "TheT"))] = attributes

    def _end(self, name: str):
        name = self.path.pop()
        if name == "UUID" and self.path[-1:] == ["TiffData"]:
            self.image.blocks[-1] = (self.image.blocks[-1][0], self.text.strip())
        elif name == "Well" and self.path[-1:] == ["Plate"]:
            row, column = (_whole(self.well, k) + 1 for k in ("Row", "Column"))
            if row > ROWS or column > COLUMNS:
                raise _broken(f"has a well in row {row}, column {column}: a plate has at most {ROWS} x {COLUMNS}")
            plate = self.plate.get("Name") or self.plate.get("ExternalIdentifier")
            for sample, (_, image) in enumerate(sorted(self.samples), 1):
                place = {"plate": plate, "row": row, "column": column, "sample": sample}
                if image and self.wells.setdefault(image, place) != place:
                    raise _broken("puts one image into two wells")

    def _said(self, text: str):
        if len(self.path) > 1 and self.path[-1] == "UUID":
            self.text += text[:200]


def _broken(what: str) -> Refused:
    return Refused("BROKEN_PICTURE", f"the OME-XML of the file {what}")


def _whole(attributes: dict[str, str], name: str, default: int | None = None) -> int:
    text = attributes.get(name)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.strip().isdigit()) or len(text) > 9:
        raise _broken(f"has {name} {(text or '')[:40]!r}, wanted a whole number")
    return int(text)


def _length(attributes: dict[str, str], name: str, unit: str = "") -> float | None:
    """um, or None where the unit is no length of this world (``reference frame``, ``pixel``) or nothing is said."""
    scale = _MICROMETRES.get(attributes.get(f"{name}Unit", unit))
    try:
        value = float(attributes.get(name, "nan"))
    except ValueError:
        raise _broken(f"has {name} {attributes[name][:40]!r}, wanted a number") from None
    return value * scale if scale and abs(value) < 1e9 else None


@functools.lru_cache(2)  # fields of one file are read one after the other
def _pages(text: str, count: int) -> dict[int, dict[str, Any]]:
    """What XML says of the pages of a TIFF of ``count`` pages, by their number."""
    reader = _Reader()
    if "<OME" not in text[:4096]:
        return {}
    if len(text) > MOST_XML:
        raise Refused("TOO_LARGE", f"an OME-TIFF with more than {MOST_XML} characters of XML")
    try:
        reader.parser.Parse(text.encode(), True)
    except (expat.ExpatError, ValueError, LookupError) as e:
        raise _broken(f"is not well-formed ({e})") from None
    found: dict[int, dict[str, Any]] = {}
    for name, image in reader.images.items():
        sizes = {a: _whole(image.pixels, f"Size{a}") for a in "CZT"} if image.pixels else {}
        if not sizes:
            continue
        samples = {_whole(channel, "SamplesPerPixel", 1) for channel in image.channels} or {1}
        if len(samples) > 1:
            raise _broken("has channels of different SamplesPerPixel in one image")
        sizes["C"] //= max(*samples, 1)
        order = image.pixels.get("DimensionOrder", "XYCZT")[2:]
        if sorted(order) != ["C", "T", "Z"] or min(sizes.values()) < 1:
            raise _broken(f"has an image of order {order[:10]!r} and sizes {sizes}")
        for number, at in _numbered(image, sizes, order, reader.uuid, count):
            if number in found:
                raise _broken(f"puts page {number + 1} into two places")
            found[number] = {k: v for k, v in (reader.wells.get(name, {}) | _of_plane(image, sizes, at)).items() if v is not None}
    return found


def _numbered(image: _Image, sizes: dict[str, int], order: str, uuid: str, count: int):
    """(page, indices of its plane) of the blocks of one image that are in this file."""
    most = sizes["C"] * sizes["Z"] * sizes["T"]
    if not uuid and len({owner for _, owner in image.blocks}) > 1:
        raise _broken("is of several files, and does not say which of them this one is")
    for block, owner in image.blocks:
        if owner and uuid and owner != uuid:
            continue
        first = {a: _whole(block, f"First{a}", 0) for a in "CZT"}
        at, step = 0, 1
        for a in order:
            at, step = at + first[a] * step, step * sizes[a]
        if any(first[a] >= sizes[a] for a in "CZT"):
            raise _broken(f"has a plane {first} of an image of {sizes}")
        start = _whole(block, "IFD", 0)
        rest = min(most - at, count - start) if owner else most - at
        planes = _whole(block, "PlaneCount", _whole(block, "NumPlanes", 1 if "IFD" in block else rest))
        if at + planes > most or start + planes > count:
            raise _broken(f"names {planes} pages from page {start + 1} on, the file has {count}")
        for n in range(planes):
            rest, indices = at + n, {}
            for a in order:
                rest, indices[a] = divmod(rest, sizes[a])
            yield start + n, indices


def _of_plane(image: _Image, sizes: dict[str, int], at: dict[str, int]) -> dict[str, Any]:
    channel = image.channels[at["C"]] if at["C"] < len(image.channels) else {}
    size = [_length(image.pixels, f"PhysicalSize{a}", "µm") for a in "XY"]
    plane = image.planes.get(tuple(str(at[a]) for a in "CZT"), {})
    x, y, z = (_length(plane, f"Position{a}") for a in "XYZ")
    return {
        **{a.lower(): at[a] + 1 for a in "CZT" if sizes[a] > 1},
        "channel": channel.get("Name") or None,
        "pixel_size_um": size if all(s and s > 0 for s in size) else None,
        "stage_um": None if x is None or y is None else [x, y, z],
    }


def facts(stream: BinaryIO) -> dict[str, Any]:
    """What a TIFF of one page says of itself as a page of OME-TIFF; empty when it is none.

    ``plate``, ``row`` and ``column`` (from 1) of the well, ``sample`` (place of the image among those of its well, from 1), ``c``,
    ``z`` and ``t`` (from 1; absent where the image has only one), ``channel`` (name), ``pixel_size_um`` (x, y), ``stage_um`` (x, y,
    z or None), ``pages`` of the file where it has several. What nobody says is absent, also where the XML cannot be understood.
    """
    with raster.quiet():
        description = tifffile.TiffFile(stream).pages[0].description or ""
    try:
        said = json.loads(description) if description.startswith(_MARK) else {"ome": _pages(description, 1).get(0, {})}
        return said["ome"] if _is_sound(said["ome"]) else {}
    except (Refused, ValueError, RecursionError):
        return {}


def _is_sound(said: Any) -> bool:
    """Whether facts are what we write; anybody may write a description."""
    kinds = {"plate": str, "channel": str, "pixel_size_um": list, "stage_um": list}
    whole = ("row", "column", "sample", "c", "z", "t", "pages")
    return (
        isinstance(said, dict)
        and all(isinstance(v, kinds.get(k, int)) and (k in kinds or k in whole) for k, v in said.items())
        and ("row" in said) == ("column" in said)
        and 1 <= said.get("row", 1) <= ROWS
        and 1 <= said.get("column", 1) <= COLUMNS
        and all(x is None or isinstance(x, float | int) for k in ("pixel_size_um", "stage_um") for x in said.get(k, ()))
        and len(said.get("pixel_size_um", "ab")) == 2
        and len(said.get("stage_um", "abc")) == 3
    )


class Pages:
    """The pages of a TIFF that its OME-XML places, by their numbers; none when it is no OME-TIFF, or has one page only.

    ``stream`` is seekable; only what is asked for is read. Raises ``BROKEN_PICTURE`` where the XML or the TIFF is broken, and
    ``TOO_LARGE``.
    """

    def __init__(self, stream: BinaryIO):
        self._stream, self._places = stream, {}
        if stream.read(2) not in (b"II", b"MM"):
            return
        stream.seek(0)
        with raster.quiet():
            self._tiff = tifffile.TiffFile(stream)
            with contextlib.suppress(IndexError):
                self._tiff.pages.get(MOST_PAGES)  # before the length, which of a chain without an end is never known
                raise Refused("TOO_LARGE", f"an OME-TIFF of more than {MOST_PAGES} pages")
            if len(self._tiff.pages) > 1:
                self._places = _pages(self._tiff.pages[0].description or "", len(self._tiff.pages))

    @property
    def numbers(self) -> list[int]:
        return sorted(self._places)

    @property
    def homeless(self) -> list[int]:
        """Pages of an OME-TIFF that its XML does not place."""
        return [n for n in range(len(self._tiff.pages)) if n not in self._places] if self._places else []

    def page(self, number: int) -> bytes:
        """A page as a TIFF of its own; the same bytes every time. Raises ``UNREADABLE``, ``TRUNCATED``, ``TOO_LARGE`` too."""
        if number not in self._places:
            raise Refused("UNREADABLE", "the page is not in the file any more")
        said = {"ome": self._places[number] | {"pages": len(self._tiff.pages)}}
        text = json.dumps(said, separators=(",", ":"), sort_keys=True)
        with raster.quiet():
            return _alone(self._stream, self._tiff, self._tiff.pages[number], text)


def _alone(stream: BinaryIO, tiff: tifffile.TiffFile, one: tifffile.TiffPage, description: str) -> bytes:
    """A classic TIFF of one page with the tags that pixels depend on, in the byte order of the file."""

    def read(start: int, count: int) -> bytes:
        if start + count > size:
            raise Refused("TRUNCATED", f"page {one.index + 1} ends at byte {start + count}, the file has {size}")
        stream.seek(start)
        return stream.read(count)

    order, size, stored = tiff.byteorder, stream.seek(0, io.SEEK_END), sum(one.databytecounts)
    if stored > size or min(one.databytecounts, default=0) < 0:
        raise Refused("TRUNCATED", f"page {one.index + 1} claims {stored} bytes of pixels, the file has {size}")
    if stored > MOST_BYTES:
        raise Refused("TOO_LARGE", f"page {one.index + 1} has {stored} bytes, the limit is {MOST_BYTES}")
    segments = [read(*of) for of in zip(one.dataoffsets, one.databytecounts, strict=True)]
    entries: list[tuple[int, int, int, bytes]] = []  # tag, type, count, value
    for tag in one.tags.values():
        if tag.code in _KEPT:
            raw = read(tag.valueoffset, tag.valuebytecount)
            if tag.dtype in (16, 17):  # of BigTIFF
                raw = struct.pack(f"{order}{tag.count}I", *(tag.value if isinstance(tag.value, tuple) else (tag.value,)))
            entries.append((tag.code, 4 if tag.dtype in (16, 17) else int(tag.dtype), tag.count, raw))
    text = description.encode("ascii") + b"\0"
    kind = int(one.is_tiled)
    entries += [(270, 2, len(text), text), (_OFFSETS[kind], 4, len(segments), bytes(4 * len(segments)))]
    entries.append((_COUNTS[kind], 4, len(segments), struct.pack(f"{order}{len(segments)}I", *map(len, segments))))
    entries.sort()
    at = 8 + 2 + 12 * len(entries) + 4
    places = []
    for *_, value in entries:
        places.append(at)
        at += (len(value) + 1) // 2 * 2 if len(value) > 4 else 0
    starts = list(itertools.accumulate(map(len, segments), initial=at))
    head, values = [], []
    for (code, dtype, count, value), place in zip(entries, places, strict=True):
        if code == _OFFSETS[kind]:
            value = struct.pack(f"{order}{len(segments)}I", *starts[:-1])
        inline = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(f"{order}I", place)
        head.append(struct.pack(f"{order}HHI", code, dtype, count) + inline)
        values.append(value + b"\0" * (len(value) % 2) if len(value) > 4 else b"")
    magic = b"II" if order == "<" else b"MM"
    start = magic + struct.pack(f"{order}HIH", 42, 8, len(entries))
    return b"".join([start, *head, bytes(4), *values, *segments])
