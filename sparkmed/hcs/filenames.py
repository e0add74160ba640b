"""File names of plates: the path of an image to the plane that it shows, by the convention of the vendor.

Numbers of sites, z-planes and times are the vendor's, as written (Cellomics counts fields from 0); an id of a channel that is a
number loses its leading zeros, so that ``C01`` and ``ch1`` are the channel ``1``. What a name does not say is None.

- ``imagexpress`` (MetaXpress, Molecular Devices): ``PLATE_A01_s1_w1<UUID>.tif``, ``_thumb`` before the UUID marks a thumbnail.
  Folders ``TimePoint_n`` and ``ZStep_n`` give t and z; ``ZStep_0`` holds projections. Plate: before the well, else the first folder
  above that is neither of the two. Also ``PLATE_t0_C05_s0_w0_z0.tif`` of MetaXpress Acquire, which counts from 0.
- ``opera`` (Opera Phenix, Operetta; Harmony, Revvity): ``r01c01f01p01-ch1sk1fk1fl1.tiff`` with row, column, field, plane, channel
  and slow kinetic (time); from Harmony 7 on ``-ch01t01``. Plate: the folder above ``Images`` (and ``r01c01``), without
  ``__<date>-Measurement n``.
- ``cellvoyager`` (CV7000/8000, CQ1, Yokogawa): ``PLATE_A01_T0001F001L01A01Z01C01.tif``, t, field, z and channel. ``DC_*`` and
  ``SC_*`` are dark and shading corrections. Plate: before the well, else the folder.
- ``cellomics`` (ArrayScan, CellInsight; Thermo Fisher): ``PLATE_A01f00d0.TIF``, field and channel. Plate: before the well.
- ``incell`` (IN Cell Analyzer, Cytiva): ``A - 01(fld 1 wv DAPI - DAPI z 2 - time 1 - 20 ms).tif``; the channel is ``DAPI - DAPI``:
  excitation, emission. Plate: before the well, else the folder.
- ``sbs`` (as in BBBC013 and CellProfiler's examples): ``Channel1-01-A-01.tif``: channel, number of the image, row, column. Plate:
  the folder, or the one above if it is called ``images``.

The forms of names are those that OME Bio-Formats and CellProfiler document for these vendors. Files that open as something else
than an image are not looked at; a user's pattern of named groups stands for every other convention.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

from sparkmed.config import plane_pattern
from sparkmed.hcs import wells
from sparkmed.rejection import InputError, Refused


@dataclass(frozen=True, slots=True)
class Plane:
    """What one image file of a plate shows, or what else the file is.

    ``kind`` is ``image``, ``thumbnail``, ``projection`` (over z), ``correction`` (an illumination or dark image), ``index`` (of the
    vendor), or None for a name of no convention. ``row`` and ``column`` count from 1.
    """

    kind: str | None = None
    convention: str | None = None
    plate: str | None = None
    well: str | None = None
    row: int | None = None
    column: int | None = None
    site: int | None = None
    z: int | None = None
    t: int | None = None
    channel: str | None = None
    batch: str | None = None


UNKNOWN = Plane()
_UUID = r"[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}"
_IMAGE = r"(?:\.ome)?\.(?:tiff?|png|jpe?g)"
_N = "[0-9]{1,9}"
_WELL = r"([a-z]{1,2}[0-9]{2})"


def _compiled(text: str) -> re.Pattern[str]:
    return re.compile(text, re.ASCII | re.IGNORECASE)


_IMAGEXPRESS = _compiled(
    rf"(?:(.+?)_)??(?:t({_N})_)?{_WELL}(?:_s({_N}))?(?:_w([0-9]{{1,2}}?))?(?:_z({_N}))?(_thumb)?({_UUID})?{_IMAGE}"
)
_OPERA = _compiled(rf"r([0-9]{{2,3}})c([0-9]{{2,3}})f({_N})p({_N})-ch({_N})(?:sk({_N})fk{_N}fl{_N}|t({_N}))?{_IMAGE}")
_CELLVOYAGER = _compiled(rf"(?:(.+)_)?{_WELL}_T({_N})F({_N})L{_N}A{_N}Z({_N})C({_N}){_IMAGE}")
_CORRECTION = _compiled(r"(?:DC|SC)_.+\.(?:tiff?|png)")
_CELLOMICS = _compiled(rf"(.+)_{_WELL}f([0-9]{{2,4}})d([0-9]{{1,2}}){_IMAGE}")
_INCELL = _compiled(
    rf"(?:(.+)_)?([a-z]{{1,2}}) - ([0-9]{{1,2}})\(fld ({_N})(?: wv ([^()]+?))??(?: wix {_N})?(?: z ({_N}))?"
    rf"(?:[ -]+time ({_N})(?: - [0-9.]+ ms)?)?\)(_thumb)?{_IMAGE}"
)
_SBS = _compiled(rf"Channel({_N})-{_N}-([a-z]{{1,2}})-([0-9]{{1,3}}){_IMAGE}")
_STEP = _compiled(rf"(TimePoint|ZStep)_({_N})")
_WELL_FOLDER = _compiled(rf"r{_N}c{_N}")
_ARCHIVE = _compiled(r"(?:\.(?:zip|tar|tgz|tar\.[a-z0-9]+)|(?:\.ome)?\.zarr)$")
"""A plate may come as one archive, which is a folder of the paths inside."""
_MEASUREMENT = re.compile(r"(.+?)__[0-9]{4}-[0-9]{2}-[0-9]{2}T.*", re.ASCII)


@functools.lru_cache(8192)
def _well(text: str) -> tuple[str, int, int]:
    """(canonical name, row, column)"""
    row, column = wells.parse(text)
    return wells.name(row, column), row, column


@functools.lru_cache(8192)
def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


@functools.lru_cache(8192)
def channel_id(text: str | None) -> str | None:
    """
    >>> channel_id("01"), channel_id("DAPI - DAPI"), channel_id("")
    ('1', 'DAPI - DAPI', None)
    """
    text = (text or "").strip()
    return (text.lstrip("0") or "0" if text.isascii() and text.isdigit() else text) or None


@functools.lru_cache(4096)
def _steps(folder: str) -> tuple[str | None, int | None, int | None]:
    """(plate, t, z) that folders of MetaXpress tell."""
    numbers: dict[str, int] = {}
    parts = folder.split("/") if folder else []
    while parts and (found := _STEP.fullmatch(parts[-1])):
        numbers[found[1].lower()] = int(found[2])
        parts.pop()
    return (_ARCHIVE.sub("", parts[-1]) or None) if parts else None, numbers.get("timepoint"), numbers.get("zstep")


@functools.lru_cache(4096)
def plate_folder(folder: str) -> str:
    """The folder of a plate, given one of its images: without ``TimePoint_1/ZStep_1`` and ``Images/r01c01``, up to ``P1.zarr``.

    >>> plate_folder("screen/P1/TimePoint_1/ZStep_2"), plate_folder("screen/P1/Images"), plate_folder("P1.zarr/A/1")
    ('screen/P1', 'screen/P1', 'P1.zarr')
    """
    parts = folder.split("/")
    for n, part in enumerate(parts, 1):
        if part.lower().endswith(".zarr"):
            return "/".join(parts[:n])
    while parts and (_STEP.fullmatch(parts[-1]) or _WELL_FOLDER.fullmatch(parts[-1])):
        parts.pop()
    if parts and parts[-1].lower() == "images":
        parts.pop()
    return "/".join(parts)


@functools.lru_cache(4096)
def folder_plate(folder: str) -> str | None:
    """The name of a plate, given the folder of one of its images; None for the archive's own folder.

    >>> folder_plate("BR00116991__2020-11-05T19_51_35-Measurement1/Images"), folder_plate("")
    ('BR00116991', None)
    """
    last = _ARCHIVE.sub("", plate_folder(folder).rpartition("/")[2])
    found = _MEASUREMENT.fullmatch(last)
    return (found[1] if found else last) or None


def _imagexpress(folder: str, name: str) -> Plane:
    found = _IMAGEXPRESS.fullmatch(name)
    if not found:
        return UNKNOWN
    plate, t, well, site, wave, z, thumbnail, uuid = found.groups()
    if site is None and wave is None and uuid is None:
        return UNKNOWN  # plate_A01.tif may be anybody's
    above, t_folder, z_folder = _steps(folder)
    kind = "thumbnail" if thumbnail else "projection" if z_folder == 0 else "image"
    z = _number(z) if z is not None else z_folder if z_folder != 0 else None
    t = _number(t) if t is not None else t_folder
    return Plane(kind, "imagexpress", plate or above, *_well(well), _number(site), z, t, channel_id(wave))


def _opera(folder: str, name: str) -> Plane:
    found = _OPERA.fullmatch(name)
    if not found:
        return UNKNOWN
    row, column, field, plane, channel, slow, time = found.groups()
    place = _well(f"r{row}c{column}")
    return Plane("image", "opera", folder_plate(folder), *place, int(field), int(plane), _number(slow or time), channel_id(channel))


def _cellvoyager(folder: str, name: str) -> Plane:
    found = _CELLVOYAGER.fullmatch(name)
    if not found:
        return Plane("correction", "cellvoyager", folder_plate(folder)) if _CORRECTION.fullmatch(name) else UNKNOWN
    plate, well, t, field, z, channel = found.groups()
    plate = plate or folder_plate(folder)
    return Plane("image", "cellvoyager", plate, *_well(well), _number(field), _number(z), _number(t), channel_id(channel))


def _cellomics(folder: str, name: str) -> Plane:
    found = _CELLOMICS.fullmatch(name)
    if not found:
        return UNKNOWN
    plate, well, field, channel = found.groups()
    return Plane("image", "cellomics", plate, *_well(well), int(field), None, None, channel_id(channel))


def _incell(folder: str, name: str) -> Plane:
    found = _INCELL.fullmatch(name)
    if not found:
        return UNKNOWN
    plate, row, column, field, wave, z, time, thumbnail = found.groups()
    kind, plate = "thumbnail" if thumbnail else "image", plate or folder_plate(folder)
    return Plane(kind, "incell", plate, *_well(row + column), int(field), _number(z), _number(time), channel_id(wave))


def _sbs(folder: str, name: str) -> Plane:
    found = _SBS.fullmatch(name)
    if not found:
        return UNKNOWN
    channel, row, column = found.groups()
    return Plane("image", "sbs", folder_plate(folder), *_well(row + column), channel=channel_id(channel))


_READERS: dict[str, tuple[Callable[[str], bool], Callable[[str, str], Plane]]] = {
    "incell": (lambda name: "(fld " in name, _incell),
    "opera": (lambda name: "-ch" in name and name[:1] in "rR", _opera),
    "sbs": (lambda name: name[:7].lower() == "channel", _sbs),
    "cellvoyager": (lambda name: "_T" in name or name[:3] in ("DC_", "SC_"), _cellvoyager),
    "imagexpress": (lambda name: True, _imagexpress),
    "cellomics": (lambda name: True, _cellomics),
}
"""A test that is cheap, and the reader, in the order in which they are tried."""
_INDEXES = {".mlf": "cellvoyager", ".mrf": "cellvoyager", ".xdce": "incell", ".htd": "imagexpress"}


def index_convention(name: str) -> str | None:
    """Whose index a file of this name is: ``opera``, ``cellvoyager``, ``incell``, ``imagexpress``, ``csv``, or None.

    >>> index_convention("Index.idx.xml"), index_convention("MeasurementData.mlf"), index_convention("load_data.csv")
    ('opera', 'cellvoyager', 'csv')
    """
    lower = name.lower()
    if lower in ("index.idx.xml", "index.xml", "index.ref.xml"):
        return "opera"
    if lower.startswith("load_data") and lower.endswith((".csv", ".csv.gz")):
        return "csv"
    return _INDEXES.get(lower[lower.rfind(".") :]) if "." in lower else None


def parse(path: str, convention: str | None = None, pattern: str | None = None) -> Plane:
    """The plane that the file at ``path`` (relative, with forward slashes) shows, by its name and folders.

    By one ``convention``, or whichever fits; or by a ``pattern`` of named groups (see ``plates.pattern`` in the config; one that
    takes exponential time does so). Raises ``BAD_WELL`` when the name places the image beyond a plate of 1536 wells, and
    :class:`InputError` for an unknown convention or group.

    >>> p = parse("BR00116991__2020-11-05T19_51_35-Measurement1/Images/r16c24f09p01-ch5sk1fk1fl1.tiff")
    >>> p.plate, p.well, p.site, p.z, p.t, p.channel
    ('BR00116991', 'P24', 9, 1, 1, '5')
    """
    folder, _, name = path.rpartition("/")
    if pattern is not None:
        return _by_pattern(path, folder, name, pattern)
    if convention is not None and convention not in _READERS:
        raise InputError(f"convention {convention!r}: wanted one of {', '.join(_READERS)}")
    for key, (may_be, read) in _READERS.items():
        if convention in (None, key) and may_be(name):
            plane = read(folder, name)
            if plane is not UNKNOWN:
                return plane
    vendor = index_convention(name)
    return Plane("index", vendor, folder_plate(folder)) if vendor else UNKNOWN


_compiled_pattern = functools.lru_cache(64)(plane_pattern)


def _by_pattern(path: str, folder: str, name: str, pattern: str) -> Plane:
    found = _compiled_pattern(pattern).fullmatch(path if "/" in pattern else name)
    if not found:
        vendor = index_convention(name)
        return Plane("index", vendor, folder_plate(folder)) if vendor else UNKNOWN
    said = {k: v.strip() for k, v in found.groupdict().items() if v and v.strip()}
    try:
        numbers = [int(said[k]) if k in said else None for k in ("site", "z", "t")]
        place = _well(said["well"]) if "well" in said else _well(f"r{wells.row_number(said['row'])}c{int(said['column'])}")
    except KeyError as e:
        raise Refused("BAD_WELL", f"the pattern finds no {e.args[0]} in the name") from None
    except ValueError:
        raise Refused("BAD_NAME", "the pattern finds a site, z, t or column that is no whole number") from None
    plate = said.get("plate") or folder_plate(folder)
    return Plane("image", "pattern", plate, *place, *numbers, channel_id(said.get("channel")), said.get("batch"))
