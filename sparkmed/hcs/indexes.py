"""Index files of vendors: what they say of each image of a plate, by its path relative to the index.

- Harmony (Opera Phenix, Operetta; Revvity): ``Index.idx.xml``, ``Index.xml``, ``Index.ref.xml``. Lengths are metres unless a
  ``Unit`` says otherwise. Up to version 5 an ``Image`` says everything itself; since version 6 what holds for a channel is in
  ``Maps``.
- CellVoyager (Yokogawa): ``MeasurementData.mlf`` has an element per image, positions in um; ``MeasurementDetail.mrf`` beside it has
  the pixel size (um) of each channel, the name of the plate, and which files are shading corrections.
- IN Cell (Cytiva): ``*.xdce``; its indices count from 0, where file names count from 1.
- MetaXpress (ImageXpress, Molecular Devices): ``*.HTD`` names no image: wells, the grid of sites, and the wavelengths' names.
- ``load_data.csv`` (CellProfiler, JUMP Cell Painting): a row per field, ``FileName_X`` and ``PathName_X`` (or ``URL_X``) per
  channel X, ``Metadata_Plate``, ``Metadata_Well``, ``Metadata_Site`` and others. ``Orig`` before a channel's name is dropped;
  illumination functions (``.npy``) are no images.

Elements and units are as OME Bio-Formats reads them, and as published plates have them. XML is read as a stream: nothing of an
element is kept but what a plane needs. A DTD is refused whatever it says, so no entity is ever expanded.
"""

import csv
import dataclasses
import gzip
import io
import posixpath
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO
from xml.parsers import expat

from sparkmed.hcs import wells
from sparkmed.hcs.filenames import Plane, channel_id, index_convention
from sparkmed.rejection import InputError, Refused

FORMAT = "plate_index"
"""Of the index in the catalog."""
MOST_IMAGES = 5_000_000
"""An index of more images is refused: a plate of 1536 wells, 25 sites, 10 channels and 10 planes has fewer."""
MOST_TEXT = 1 << 20
"""Characters and attributes of one element beyond which an index is refused."""
MOST_DEPTH = 64
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Listed:
    """What an index says of one image: pixel size (x, y) and position of the stage (x, y, z or None) in um, None when not known."""

    plane: Plane
    channel_name: str | None = None
    pixel_size_um: tuple[float, float] | None = None
    stage_um: tuple[float, float, float | None] | None = None


@dataclass(frozen=True)
class Index:
    """An index file, read.

    ``images`` is by the path of the image relative to the folder of the index (the whole path or URL where the index has one, as in
    a CSV). ``channels`` are the vendor's names of channels by id. An index that names no image (HTD) says instead which ``wells``
    were acquired, and how many ``sites`` there are at most. ``plates`` are the plates or barcodes that it names. ``path`` and
    ``uri`` are where it lies.
    """

    convention: str
    images: dict[str, Listed] = field(default_factory=dict)
    plates: tuple[str, ...] = ()
    channels: dict[str, str] = field(default_factory=dict)
    wells: frozenset[str] | None = None
    sites: int | None = None
    path: str = ""
    uri: str = ""


def read(path: str, stream: BinaryIO, detail: BinaryIO | None = None, uri: str = "") -> Index:
    """The index at ``path`` in the archive, whose name says of which vendor it is; ``detail`` is the ``.mrf`` beside an ``.mlf``.

    Raises ``BROKEN_INDEX`` when it is truncated, malformed, lacks what places an image, or has a DTD, and ``TOO_LARGE``.
    """
    name = posixpath.basename(path)
    convention = index_convention(name)
    if convention == "cellvoyager" and name.lower().endswith(".mlf"):
        index = cellvoyager(stream, detail)
    elif convention == "cellvoyager":
        raise InputError(f"index {path}: wanted MeasurementData.mlf, and MeasurementDetail.mrf as its detail")
    elif convention == "imagexpress":
        index = metaxpress(stream, name[: name.rfind(".")])
    elif convention:
        index = {"opera": harmony, "incell": incell, "csv": load_data}[convention](stream)
    else:
        raise InputError(f"index {path}: a name of no index file; wanted Index.idx.xml, *.mlf, *.xdce, *.HTD or load_data.csv")
    return dataclasses.replace(index, path=path, uri=uri or path)


# XML


@dataclass
class _Element:
    """An element with its attributes and text, and those of its descendants by their names; the last one of each name."""

    name: str
    attributes: dict[str, str]
    text: str = ""
    inner: dict[str, "_Element"] = field(default_factory=dict)

    def said(self, name: str) -> str:
        return self.inner[name].text.strip() if name in self.inner else ""

    def attribute(self, inner: str, name: str) -> str | None:
        return self.inner[inner].attributes.get(name) if inner in self.inner else None


class _Reader:
    """Handlers of an expat parser that keep the elements of the ``wanted`` names until they are taken."""

    def __init__(self, root: str | None, wanted: frozenset[str]):
        self.root, self.wanted = root, wanted
        self.done: list[_Element] = []
        self.path: list[_Element | None] = []  # None: of no interest
        self.outer: _Element | None = None
        self.size = 0
        self.parser = expat.ParserCreate(namespace_separator=" ")
        self.parser.buffer_text = True
        self.parser.StartDoctypeDeclHandler = self._doctype
        self.parser.EntityDeclHandler = self._doctype
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text

    def _doctype(self, *_):
        raise Refused("BROKEN_INDEX", "an index with a DTD or entities is not read")

    def _start(self, name: str, attributes: dict[str, str]):
        name = name.rpartition(" ")[2]
        if not self.path and self.root and name != self.root:
            raise Refused("BROKEN_INDEX", f"the root is <{name[:40]}>, wanted <{self.root}>")
        if len(self.path) >= MOST_DEPTH:
            raise Refused("BROKEN_INDEX", f"elements are nested deeper than {MOST_DEPTH}")
        element = None
        if self.outer is not None or name in self.wanted:
            element = _Element(name, {k.rpartition(" ")[2]: v for k, v in attributes.items()})
            self._count(len(name) + sum(len(k) + len(v) for k, v in attributes.items()))
            if self.outer is None:
                self.outer = element
            else:
                self.outer.inner[name] = element
        self.path.append(element)

    def _end(self, name: str):
        element = self.path.pop()
        if element is not None and element is self.outer:
            self.done.append(element)
            self.outer, self.size = None, 0

    def _text(self, text: str):
        element = self.path[-1] if self.path else None
        if element is not None:
            self._count(len(text))
            element.text += text

    def _count(self, more: int):
        self.size += more
        if self.size > MOST_TEXT:
            raise Refused(
                "BROKEN_INDEX", f"an element <{self.outer.name if self.outer else ''}> of more than {MOST_TEXT} characters"
            )


def _elements(stream: BinaryIO, root: str | None, *wanted: str) -> Iterator[_Element]:
    """The elements of these names below ``root`` (None: any), outermost only, one after the other."""
    reader = _Reader(root, frozenset(wanted))
    try:
        while True:
            chunk = stream.read(_CHUNK)
            reader.parser.Parse(chunk, not chunk)
            yield from reader.done
            reader.done.clear()
            if not chunk:
                return
    except (expat.ExpatError, ValueError, LookupError) as e:
        raise Refused("BROKEN_INDEX", f"not well-formed XML, or it ends too early ({e})") from None


# values

_WHOLE = re.compile(r"\s*[0-9]{1,9}\s*", re.ASCII)


def _whole(text: str | None, what: str) -> int:
    if not _WHOLE.fullmatch(text or ""):
        raise Refused("BROKEN_INDEX", f"{what} of an image is {(text or '')[:40]!r}, wanted a whole number")
    return int(text or "")


def _number(text: str | None, what: str) -> float | None:
    """None when the index says nothing; a length that cannot be one is refused."""
    if text is None or not text.strip():
        return None
    try:
        value = float(text) if "_" not in text else float("nan")
    except ValueError:
        value = float("nan")
    if not abs(value) < 1e9:
        raise Refused("BROKEN_INDEX", f"{what} is {text[:40]!r}, wanted a number")
    return value


_MICROMETRES = {"m": 1e6, "mm": 1e3, "um": 1.0, "µm": 1.0, "μm": 1.0, "nm": 1e-3}


def _metres(element: _Element, name: str) -> float | None:
    """um of a length that an element of this name in ``element`` gives in metres or its own ``Unit``."""
    value = _number(element.said(name), name)
    unit = element.attribute(name, "Unit") or "m"
    if unit not in _MICROMETRES:
        raise Refused("BROKEN_INDEX", f"{name} is in {unit[:40]!r}, a unit that is not known")
    return None if value is None else value * _MICROMETRES[unit]


def _size(x: float | None, y: float | None) -> tuple[float, float] | None:
    """A pixel size of 0 or less is what an index says that does not know it."""
    return (x, y) if x is not None and y is not None and x > 0 and y > 0 else None


def _stage(x: float | None, y: float | None, z: float | None) -> tuple[float, float, float | None] | None:
    return None if x is None or y is None else (x, y, z)


def _place(row: int, column: int) -> tuple[str, int, int]:
    """(well, row, column)"""
    try:
        wells.within(row, column)
    except Refused as e:
        raise Refused("BROKEN_INDEX", e.message) from None
    return wells.name(row, column), row, column


def _relative(path: str) -> str:
    """A path with forward slashes, normalised; URLs and paths of a drive as they are."""
    path = path.strip().replace("\\", "/")
    return path if "://" in path else posixpath.normpath(path)


def _add(images: dict[str, Listed], path: str, listed: Listed):
    key = _relative(path)
    if images.setdefault(key, listed) != listed:
        raise Refused("BROKEN_INDEX", f"{key[-80:]} is two different images")
    if len(images) > MOST_IMAGES:
        raise Refused("TOO_LARGE", f"an index of more than {MOST_IMAGES} images")


def _of_images(index: Index) -> Index:
    if not any(listed.plane.kind in ("image", "projection") for listed in index.images.values()):
        raise Refused("BROKEN_INDEX", "the index names no image")
    return index


# vendors


def harmony(stream: BinaryIO) -> Index:
    """``Index.idx.xml`` of any version; see the module."""
    common: dict[str, _Element] = {}  # what holds for a channel
    rows: dict[str, tuple] = {}
    plates: dict[str, None] = {}
    for e in _elements(stream, "EvaluationInputData", "Plate", "Entry", "Image"):
        if e.name == "Plate" and (e.said("PlateID") or e.said("Name")):
            plates.setdefault(e.said("PlateID") or e.said("Name"))
        elif e.name == "Entry" and (channel := channel_id(e.attributes.get("ChannelID"))):
            told = {k: v for k, v in e.inner.items() if k in ("ChannelName", "ImageResolutionX", "ImageResolutionY")}
            common.setdefault(channel, _Element("Entry", {})).inner.update(told)
        elif e.name == "Image" and e.said("URL"):  # wells list their images too, by id only; one that failed has no URL
            path, row = _relative(e.said("URL")), _harmony_image(e)
            if rows.setdefault(path, row) != row:
                raise Refused("BROKEN_INDEX", f"{path[-80:]} is two different images")
            if len(rows) > MOST_IMAGES:
                raise Refused("TOO_LARGE", f"an index of more than {MOST_IMAGES} images")
    first = 1 if any(row[1][2] == 0 for row in rows.values()) else 0  # up to version 6 times count from 0, in file names from 1
    plate = next(iter(plates)) if len(plates) == 1 else None
    images: dict[str, Listed] = {}
    names: dict[str, str] = {}
    for path, (place, (site, z, t), channel, name, size, stage) in rows.items():
        entry = common.get(channel)
        name = name or (entry.said("ChannelName") if entry else "") or None
        if entry and size is None:
            size = _size(_metres(entry, "ImageResolutionX"), _metres(entry, "ImageResolutionY"))
        if name:
            names[channel] = name
        images[path] = Listed(Plane("image", "opera", plate, *place, site, z, t + first, channel), name, size, stage)
    return _of_images(Index("opera", images, tuple(plates), names))


def _harmony_image(e: _Element) -> tuple:
    """(place, (field, plane, time point), channel, its name, pixel size, position)"""
    place = _place(_whole(e.said("Row"), "Row"), _whole(e.said("Col"), "Col"))
    defaults = {"FieldID": "", "PlaneID": "1", "TimepointID": "0"}
    numbers = tuple(_whole(e.said(k) or default, k) for k, default in defaults.items())
    channel = channel_id(e.said("ChannelID"))
    if channel is None:
        raise Refused("BROKEN_INDEX", "an image has no ChannelID")
    size = _size(_metres(e, "ImageResolutionX"), _metres(e, "ImageResolutionY"))
    z = _metres(e, "AbsPositionZ")
    stage = _stage(_metres(e, "PositionX"), _metres(e, "PositionY"), _metres(e, "PositionZ") if z is None else z)
    return place, numbers, channel, e.said("ChannelName") or None, size, stage


def cellvoyager(stream: BinaryIO, detail: BinaryIO | None = None) -> Index:
    """``MeasurementData.mlf`` and its ``MeasurementDetail.mrf``; records of errors are no images, projections are told apart."""
    sizes: dict[str, tuple[float, float] | None] = {}
    plates: list[str] = []
    images: dict[str, Listed] = {}
    if detail is not None:
        for element in _elements(detail, "MeasurementDetail", "MeasurementChannel", "MeasurementSamplePlate"):
            said = element.attributes
            if element.name == "MeasurementSamplePlate":
                plates += [said["Name"]] if said.get("Name") else []
                continue
            size = (_number(said.get(f"{axis}PixelDimension"), f"{axis}PixelDimension") for axis in ("Horizontal", "Vertical"))
            sizes[channel_id(said.get("Ch")) or ""] = _size(*size)
            if (said.get("ShadingCorrectionSource") or "").strip():
                _add(images, said["ShadingCorrectionSource"], Listed(Plane("correction", "cellvoyager")))
    plate = plates[0] if len(plates) == 1 else None
    for element in _elements(stream, "MeasurementData", "MeasurementRecord"):
        said = element.attributes
        if said.get("Type") != "IMG" or not element.text.strip():
            continue
        kind = "projection" if (said.get("ZImageProcessing") or "").strip().lower() not in ("", "none") else "image"
        place = _place(_whole(said.get("Row"), "Row"), _whole(said.get("Column"), "Column"))
        numbers = (_whole(said.get(k), k) for k in ("FieldIndex", "ZIndex", "TimePoint"))
        channel = channel_id(said.get("Ch"))
        plane = Plane(kind, "cellvoyager", plate, *place, *numbers, channel)
        stage = _stage(*(_number(said.get(k), k) for k in "XYZ"))
        _add(images, element.text, Listed(plane, None, sizes.get(channel or ""), stage))
    return _of_images(Index("cellvoyager", images, tuple(plates)))


def incell(stream: BinaryIO) -> Index:
    """``*.xdce``; a channel is ``excitation - emission``, as in file names."""
    found: list[tuple[str, Plane, tuple | None]] = []
    thumbnails, offsets = [], []
    size = None
    for e in _elements(stream, None, "ObjectiveCalibration", "offset_point", "Image"):
        if e.name == "ObjectiveCalibration":
            size = _size(*(_number(e.attributes.get(k), k) for k in ("pixel_width", "pixel_height")))
            continue
        if e.name == "offset_point":
            offsets.append(tuple(_number(e.attributes.get(k), k) for k in "xy"))
            continue
        path = e.attributes.get("filename") or ""
        if not path.strip():
            raise Refused("BROKEN_INDEX", "an image has no filename")
        place = _place(_whole(e.attribute("Row", "number"), "Row"), _whole(e.attribute("Column", "number"), "Column"))
        keys = ("field_index", "z_index", "time_index")
        numbers = [_whole(e.attribute("Identifier", k), k) + 1 for k in keys]
        filters = [(e.attribute(k, "name") or "").strip() for k in ("ExcitationFilter", "EmissionFilter")]
        channel = " - ".join(filters) if all(filters) else None
        at = [_number(e.attribute("PlatePosition_um", k), k) for k in "xy"]
        stage = _stage(*at, _number(e.attribute("FocusPosition", "z"), "z"))
        found.append((path, Plane("image", "incell", None, *place, *numbers, channel), stage))
        if len(found) > MOST_IMAGES:
            raise Refused("TOO_LARGE", f"an index of more than {MOST_IMAGES} images")
        if (e.attributes.get("thumbnail") or "").strip():
            thumbnails.append(e.attributes["thumbnail"])
    images: dict[str, Listed] = {}
    for path, plane, stage in found:
        if stage is None and plane.site is not None and plane.site <= len(offsets):
            stage = _stage(*offsets[plane.site - 1], None)
        _add(images, path, Listed(plane, plane.channel, size, stage))
    for path in thumbnails:
        images.setdefault(_relative(path), Listed(Plane("thumbnail", "incell")))
    return _of_images(Index("incell", images, (), {p.channel: p.channel for _, p, _ in found if p.channel}))


def metaxpress(stream: BinaryIO, name: str = "") -> Index:
    """``*.HTD``; ``name`` is that of the file, which is the plate's. Lines are ``"Key", value, value``."""
    text = _decoded(stream, 1 << 24, "cp1252")
    said: dict[str, list[str]] = {}
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if row and row[0].strip():
            said.setdefault(row[0].strip(), [v.strip() for v in row[1:]])

    def count(key: str) -> int:
        if not said.get(key):
            raise Refused("BROKEN_INDEX", f"the HTD does not say {key}: it is none, or ends too early")
        return _whole(said[key][0], key)

    rows, columns, waves = count("YWells"), count("XWells"), count("NWavelengths")
    if not (1 <= rows <= 32 and 1 <= columns <= 48 and 0 <= waves <= 99):
        raise Refused("BROKEN_INDEX", f"the HTD has {rows} x {columns} wells and {waves} wavelengths")
    acquired = set()
    for row in range(1, rows + 1):
        flags = said.get(f"WellsSelection{row}", [])
        if len(flags) < columns:
            raise Refused("BROKEN_INDEX", f"WellsSelection{row} of the HTD has {len(flags)} of {columns} values")
        acquired |= {wells.name(row, column + 1) for column in range(columns) if flags[column].upper() == "TRUE"}
    several = said.get("Sites", ["TRUE"])[0].upper() == "TRUE" and "XSites" in said
    sites = count("XSites") * count("YSites") if several else 1
    names = {str(n): (said.get(f"WaveName{n}") or [""])[0] for n in range(1, waves + 1)}
    if not all(names.values()):
        raise Refused("BROKEN_INDEX", f"the HTD names {sum(map(bool, names.values()))} of {waves} wavelengths")
    return Index("imagexpress", {}, (name,) if name else (), names, frozenset(acquired), sites)


_ILLUMINATION = (".npy", ".mat", ".npz")


def load_data(stream: BinaryIO) -> Index:
    """A CSV of fields with a column per channel; see the module. A path may be absolute, or of another machine."""
    rows = csv.reader(io.StringIO(_decoded(stream, 1 << 28, "utf-8-sig"), newline=""), strict=True)
    images: dict[str, Listed] = {}
    plates: dict[str, None] = {}
    try:
        header = [h.strip().removeprefix("Image_") for h in next(rows, [])]
        if len(set(header)) < len(header):
            raise Refused("BROKEN_INDEX", f"a column occurs twice: {', '.join(sorted({h for h in header if header.count(h) > 1}))}")
        channels = [h.partition("_")[2] for h in header if h.startswith("FileName_")]
        channels += [c for h in header if h.startswith("URL_") and (c := h[4:]) not in channels]
        if not channels:
            raise Refused("BROKEN_INDEX", "no column FileName_<channel> or URL_<channel>")
        for cells in rows:
            if any(cells) and len(cells) != len(header):
                raise Refused("BROKEN_INDEX", f"{len(cells)} cells, where the header has {len(header)}")
            if any(cells):
                _add_field(images, plates, dict(zip(header, map(str.strip, cells), strict=True)), channels)
    except csv.Error as e:
        raise Refused("BROKEN_INDEX", f"line {rows.line_num}: {e}") from None
    except Refused as e:
        reason = "TOO_LARGE" if e.reason == "TOO_LARGE" else "BROKEN_INDEX"
        raise Refused(reason, f"line {rows.line_num}: {e.message}") from None
    names = dict.fromkeys(i.channel_name for i in images.values() if i.channel_name)
    return _of_images(Index("csv", images, tuple(plates), {n: n for n in names}))


def _add_field(images: dict[str, Listed], plates: dict[str, None], said: dict[str, str], channels: Iterable[str]):
    def metadata(*names: str) -> str | None:
        return next((v for n in names if (v := said.get(f"Metadata_{n}"))), None)

    well = metadata("Well", "well_position")
    if well is None:
        row, column = metadata("Row") or "", metadata("Col", "Column")
        place = _place(wells.row_number(row), _whole(column, "Metadata_Col"))
    else:
        place = _place(*wells.parse(well))
    numbers = (
        None if v is None else _whole(v, name)
        for name, v in (
            ("Metadata_Site", metadata("Site", "FieldID", "Field")),
            ("Metadata_Z", metadata("Z", "PlaneID", "Plane")),
            ("Metadata_T", metadata("T", "Timepoint")),
        )
    )
    plate = metadata("Plate", "Assay_Plate_Barcode", "Barcode")
    if plate:
        plates.setdefault(plate)
    plane = Plane("image", "csv", plate, *place, *numbers, None, metadata("Batch"))
    for channel in channels:
        file, folder, url = (said.get(f"{k}_{channel}") or "" for k in ("FileName", "PathName", "URL"))
        path = url or (f"{folder.rstrip('/')}/{file}" if folder and file else file)
        if path and not path.lower().endswith(_ILLUMINATION):
            _add(images, path, Listed(plane, channel.removeprefix("Orig")))


def _decoded(stream: BinaryIO, limit: int, encoding: str) -> str:
    data = stream.read(limit + 1)
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(limit + 1)
        except (OSError, EOFError, zlib.error) as e:
            raise Refused("BROKEN_INDEX", f"the compressed index cannot be read ({type(e).__name__})") from None
    if len(data) > limit:
        raise Refused("TOO_LARGE", f"an index of more than {limit} bytes")
    try:
        text = data.decode(encoding, "strict" if encoding.startswith("utf") else "replace")
    except UnicodeDecodeError:
        raise Refused("BROKEN_INDEX", "the index is no text in UTF-8") from None
    if "\0" in text:
        raise Refused("BROKEN_INDEX", "the index holds zero bytes")
    return text
