"""OME-Zarr plates: where the planes of their fields are, and each of them as bytes of its own.

Of OME-NGFF 0.4 (on Zarr v2) and 0.5 (on Zarr v3), https://ngff.openmicroscopy.org: ``plate`` (section plate-md) names wells,
``well`` (well-md) the images of a well, ``multiscales`` (multiscale-md) the axes, scale and arrays of an image, of which the first
is the full resolution, and ``omero`` (omero-md) its channels. Lower resolutions, labels and tables are no fields.

A plane is one (t, c, z) of the array of an image, named ``A/1/0/0?t=0&c=1&z=4`` by the path of the array below the plate and the
axes that it has, counted from 0. Its bytes and their SHA-256 are of its chunks as they are stored: see :mod:`zarr_array`.

Zarr takes a chunk that is not there for one of the fill value. Here a plane without it is refused: a chunk that was never written
because it is all 0 cannot be told from one that was lost on the way.
"""

import functools
import itertools
import json
import math
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sparkmed import storage
from sparkmed.formats import zarr_array
from sparkmed.formats.ome import COLUMNS, ROWS
from sparkmed.formats.zarr_array import broken, json_object, of_kind, short, understood
from sparkmed.reasons import PASSING
from sparkmed.rejection import Refused

SUFFIXES = (".zarr",)
"""A folder of such a name is one Zarr hierarchy."""
VERSIONS = {"0.4": 2, "0.5": 3}
"""Of Zarr, by that of OME-NGFF."""
MOST_IMAGES, MOST_PLANES = 10_000, 100_000
"""Images of a well and planes of an image beyond which they are refused."""
_FETCHED = 16
"""Files of metadata that are held at a time."""

_NAME = re.compile(r"[\w+-][\w.+-]*", re.ASCII)
_PLANE = re.compile(r"([\w.+/-]+)(?:\?([tcz0-9=&]+))?", re.ASCII)
_MICROMETRES = {"angstrom": 1e-4, "nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}
_KINDS = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
OF_GROUPS = frozenset({".zgroup", ".zattrs", ".zmetadata", "zarr.json"})
"""Files of a Zarr group."""
_OTHERS = frozenset({"OME", "labels", "tables"})
"""Folders of a plate that are no rows: of bioformats2raw and of Fractal."""


@dataclass(frozen=True)
class Plane:
    """A plane of a plate: ``path`` of its image, what the metadata say of it, bytes unpacked.

    ``facts`` are those of :func:`sparkmed.formats.ome.facts`: ``plate``, ``row``, ``column``, ``sample`` (place of the image in the
    list of its well, whatever its acquisition), ``c``, ``z``, ``t``, ``channel``, ``pixel_size_um``, ``stage_um``; also ``ngff``
    (the version) and ``acquisition`` (its id). What nobody says is absent.
    """

    path: str
    facts: dict[str, Any]
    nbytes: int


@dataclass(frozen=True)
class _Layout:
    name: str | None
    version: str
    rows: list[str]
    wells: list[tuple[str, int, int]]  # path, row and column from 1
    acquisitions: list[int]
    refused: list[tuple[str, Refused]] = field(default_factory=list)


# metadata


def _require_version(version: Any, zarr: int):
    """``version`` may be absent where the specification is content with the plate's."""
    if version is not None and VERSIONS.get(version if isinstance(version, str) else "") != zarr:
        raise Refused("OTHER_VERSION", f"OME-NGFF {short(version)} on Zarr v{zarr}; 0.4 on v2 and 0.5 on v3 are read")


def _require_name(name: Any, what: str, depth: int = 1) -> str:
    """A path below a group, whose components are plain names."""
    parts = of_kind(name, str, f"{what} has the path").split("/")
    if ".." in parts or name.startswith(("/", "\\")):
        raise Refused("ESCAPES_FOLDER", f"{what} has the path {name[:80]!r}, which leads out of its group")
    if len(parts) > depth or not all(_NAME.fullmatch(part) for part in parts):
        raise broken(f"{what} has the path {name[:80]!r}, wanted a name of letters, digits, _ and -")
    return name


def _text(value: Any, what: str) -> str:
    """A text that can be written."""
    if len(of_kind(value, str, what)) > 200:
        raise broken(f"{what} {json.dumps(value)[:40]}... of {len(value)} characters")
    return storage.spelt(value)


def _row(name: str) -> int:
    """The row that letters or digits mean, 0 for others."""
    if name.isdigit():
        return int(name)
    return functools.reduce(lambda n, c: 26 * n + ord(c) - 64, name.upper(), 0) if name.isalpha() and len(name) <= 2 else 0


def _numbers(names: list[str], number) -> list[int]:
    """The places on the plate, from 1, of rows or columns of these names.

    The specification says that the place in the list is it, but some writers list only what was acquired: names count where all of
    them are places.

    >>> _numbers(["B", "D"], _row), _numbers(["0", "1"], _row), _numbers(["top", "low"], _row)
    ([2, 4], [1, 2], [1, 2])
    """
    found = [number(n) if n.isascii() and len(n) < 10 else 0 for n in names]
    return found if min(found, default=0) > 0 and len(set(found)) == len(found) else list(range(1, len(names) + 1))


def _plate(said: dict[str, Any], version: str) -> _Layout:
    names = {}
    for what in ("rows", "columns"):
        listed = of_kind(said.get(what), list, f"the plate has {what}")
        names[what] = [_require_name(of_kind(one, dict, f"{what} hold").get("name"), f"one of the {what}") for one in listed]
        if len(set(names[what])) < len(names[what]):
            raise broken(f"{what} of the plate have a name twice")
    rows = _numbers(names["rows"], _row)
    columns = _numbers(names["columns"], lambda n: int(n) if n.isdigit() else 0)
    wells, refused = [], []
    listed = of_kind(said.get("wells"), list, "the plate has wells")
    if not 1 <= len(listed) <= ROWS * COLUMNS:
        raise broken(f"the plate lists {len(listed)} wells, wanted 1 to {ROWS * COLUMNS}")
    paths = Counter(one.get("path") for one in listed if isinstance(one, dict) and isinstance(one.get("path"), str))
    for path, times in paths.items():
        if times > 1:
            refused.append((_naming(path), broken(f"the plate lists the well {times} times")))
    for number, one in enumerate(listed):
        path = one.get("path") if isinstance(one, dict) else None
        if isinstance(path, str) and paths[path] > 1:
            continue
        try:
            with understood(f"well {number + 1} of the plate"):
                row, column = _well_of(one, names)
                if rows[row] > ROWS or columns[column] > COLUMNS:
                    where = f"row {rows[row]}, column {columns[column]}"
                    raise Refused("BAD_WELL", f"a well in {where}: a plate has at most {ROWS} x {COLUMNS}")
                wells.append((path, rows[row], columns[column]))
        except Refused as e:
            refused.append((_naming(path, f"wells[{number}]"), e))
    acquisitions = [of_kind(a.get("id"), int, "an acquisition has the id") for a in said.get("acquisitions") or []]
    name = said.get("name")
    name = None if name is None else _text(name, "the plate has the name")
    return _Layout(name or None, version, names["rows"], sorted(wells), acquisitions, refused)


def _well_of(one: dict[str, Any], names: dict[str, list[str]]) -> tuple[int, int]:
    """(row, column) of a well as places in the lists of the plate."""
    path = _require_name(one.get("path"), "a well", 2)
    row, _, column = path.partition("/")
    for what, said in (("rows", row), ("columns", column)):
        if said not in names[what]:
            raise broken(f"the well {path} is in none of the plate's {what}")
    found = names["rows"].index(row), names["columns"].index(column)
    for key, at in zip(("rowIndex", "columnIndex"), found, strict=True):
        if key in one and one[key] != at:
            raise broken(f"the well {path} has {key} {short(one[key])}, its path says {at}")
    return found


def _naming(path: Any, otherwise: str = "") -> str:
    """How something is named that is refused: by its path, if that may stand in a URI."""
    plain = isinstance(path, str) and len(path) < 200 and all(_NAME.fullmatch(part) for part in path.split("/"))
    return path if plain else otherwise


def _image(said: dict[str, Any], zarr: int) -> tuple[str, list[str], dict[str, Any], list[str | None] | None]:
    """Path of the array, axes, what is the same for all planes (facts of :class:`Plane`; ``z`` is step and origin in um), and the
    labels of channels."""
    scales = of_kind(said.get("multiscales"), list, "the image has multiscales")
    if not scales:
        raise broken("the image has no multiscales")
    first = of_kind(scales[0], dict, "multiscales hold")
    _require_version(first.get("version"), zarr)
    listed = [of_kind(a, dict, "axes hold") for a in of_kind(first.get("axes"), list, "the image has axes")]
    axes = [of_kind(a.get("name"), str, "an axis has the name") for a in listed]
    known = "".join(a for a in "tczyx" if a in axes)
    kinds = all(a.get("type") in (None, _KINDS.get(a["name"])) for a in listed)
    if list(known) != axes or known[-2:] != "yx" or not kinds:
        raise Refused("BAD_AXES", f"axes {short(axes)}, wanted y and x and before them any of t, c, z in this order")
    levels = of_kind(first.get("datasets"), list, "the image has datasets")
    if not levels:
        raise broken("the image has no datasets")
    level = of_kind(levels[0], dict, "datasets hold")
    path = _require_name(level.get("path"), "the array of the image", 4)
    scale, shift = _placed([level.get("coordinateTransformations"), first.get("coordinateTransformations")], len(axes))
    units = [_MICROMETRES.get(a.get("unit")) if isinstance(a.get("unit"), str) else None for a in listed]
    size, origin = ({a: _um(v, u) for a, v, u in zip(axes, values, units, strict=True)} for values in (scale, shift))
    facts: dict[str, Any] = {}
    if size["x"] and size["y"]:
        facts["pixel_size_um"] = [size["x"], size["y"]]
    if origin["x"] is not None and origin["y"] is not None:
        facts["stage_um"] = [origin["x"], origin["y"], None]
        facts["z"] = (size.get("z"), origin.get("z"))
    labels = None
    if isinstance(said.get("omero"), dict) and said["omero"].get("channels"):
        channels = of_kind(said["omero"]["channels"], list, "omero has channels")
        labels = [c.get("label") if isinstance(c, dict) and isinstance(c.get("label"), str) else None for c in channels]
        labels = [label and _text(label, "a channel has the label") for label in labels]
    return path, axes, facts, labels


def _um(value: float | None, unit: float | None) -> float | None:
    """um, or None where a length or its unit is not said, or is none of this world."""
    return value * unit if value is not None and unit and abs(value * unit) < 1e9 else None


def _placed(steps: list[Any], count: int) -> tuple[list[float | None], list[float | None]]:
    """Size of a step and place of the first one along each axis, after scales and translations in their order; None: not said."""
    scale: list[float | None] = [None] * count
    shift: list[float | None] = [None] * count
    for step in itertools.chain.from_iterable(of_kind(s, list, "coordinateTransformations are") for s in steps if s is not None):
        kind = of_kind(step, dict, "coordinateTransformations hold").get("type")
        if kind == "identity":
            continue
        values = step.get(kind) if kind in ("scale", "translation") else None
        numbers = isinstance(values, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
        if not numbers or len(values) != count or (kind == "scale" and min(values) <= 0):
            raise broken(f"a coordinate transformation {json.dumps(step)[:80]}, wanted scale or translation of {count} numbers")
        if kind == "scale":
            scale = [v if s is None else s * v for s, v in zip(scale, values, strict=True)]
            shift = [None if t is None else t * v for t, v in zip(shift, values, strict=True)]
        else:
            shift = [v + (t or 0.0) for t, v in zip(shift, values, strict=True)]
    return scale, shift


# the hierarchy


class Plate:
    """The planes of the OME-Zarr plate below ``url``, and their bytes; read when they are asked for."""

    def __init__(self, url: str):
        self.store, self.zarr = zarr_array.Store(url), 0

    def planes(self, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[str, Plane | Refused]]:
        """(name, plane) of all planes, and (path, why) of what is none; ``part`` (n, of) are those of every ``of``-th well from the
        ``n``-th on, and what is to be said of the plate as a whole comes with part 0, under the name "".

        Only metadata are read. Reasons: ``BROKEN_ZARR``, ``NOT_A_PLATE``, ``OTHER_VERSION``, ``ESCAPES_FOLDER``, ``BAD_WELL``,
        ``MISSING_FILE`` (a well, image or array that is named and not there), ``NOT_IN_INDEX`` (a folder that nothing names),
        ``UNKNOWN_FORMAT`` (a file that is nothing of a plate), ``BAD_AXES``, ``BAD_TYPE``, ``NO_DECODER``, ``TOO_LARGE``, ``LINK``,
        ``UNREADABLE``.
        """
        try:
            with understood("the metadata of the plate"):
                plate = self._read_plate()
        except Refused as e:
            if part[0] == 0 or e.reason in PASSING:  # what may pass need not have failed in part 0
                yield "", e
            return
        if part[0] == 0:
            yield from plate.refused
            yield from self._unnamed("", {*plate.rows, *_OTHERS})
            listed = [path for path, *_ in plate.wells] + [path for path, _ in plate.refused]
            for row in plate.rows:
                yield from self._unnamed(row, {path.partition("/")[2] for path in listed if path.startswith(row + "/")})
        for path, row, column in plate.wells[part[0] :: part[1]]:
            yield from self._well(plate, path, {"plate": plate.name, "row": row, "column": column, "ngff": plate.version})

    def read(self, name: str) -> bytes:
        """The bytes of a plane by its name.

        Raises what :meth:`zarr_array.Store.plane` does.
        """
        found = _PLANE.fullmatch(name)
        given = dict(one.partition("=")[::2] for one in (found[2] or "").split("&")) if found and found[2] else {}
        if not found or not all(n.isdigit() and len(n) < 10 for n in given.values()):
            raise Refused("UNREADABLE", "the name of the plane is none")
        return self.store.plane(_require_name(found[1], "the plane", 8), tuple(int(given[a]) for a in "tcz" if a in given))

    # metadata

    def _attributes(self, paths: list[str]) -> list[dict[str, Any] | Refused | None]:
        """OME metadata of groups, why they cannot be read, or None for one that is not there."""
        name = "zarr.json" if self.zarr == 3 else ".zattrs"
        if len(paths) > _FETCHED:
            groups = (paths[n : n + _FETCHED] for n in range(0, len(paths), _FETCHED))
            return [found for some in groups for found in self._attributes(some)]
        try:
            fetched = self.store.fetch([posixpath.join(p, name) for p in paths], zarr_array.MOST_METADATA + 1)
        except Refused as e:
            if len(paths) > 1:  # one of them need not be the fault of all
                return [found for p in paths for found in self._attributes([p])]
            return [e]
        found: list[dict[str, Any] | Refused | None] = []
        for data in fetched:
            try:
                with understood("the metadata of a group"):
                    found.append(None if data is None else self._of_group(json_object(data, name)))
            except Refused as e:
                found.append(e)
        return found

    def _of_group(self, said: dict[str, Any]) -> dict[str, Any]:
        if self.zarr == 2:
            return said
        if said.get("zarr_format") != 3 or said.get("node_type") != "group":
            raise broken("a Zarr array where a group is expected")
        ome = of_kind(of_kind(said.get("attributes", {}), dict, "attributes are").get("ome", {}), dict, "ome is")
        _require_version(ome.get("version"), 3)
        return ome

    def _read_plate(self) -> _Layout:
        new, old = self.store.fetch(["zarr.json", ".zattrs"], zarr_array.MOST_METADATA + 1)
        if new is None and old is None:
            raise broken("neither zarr.json nor .zattrs is at its top: it was not copied whole, or is no group")
        self.zarr = 3 if new is not None else 2
        said = self._of_group(json_object(new, "zarr.json") if new is not None else json_object(old, ".zattrs"))
        plate = said.get("plate")
        if plate is None:
            what = (
                "an image" if "multiscales" in said else "a collection of images" if "bioformats2raw.layout" in said else "a group"
            )
            raise Refused("NOT_A_PLATE", f"{what} without the metadata of a plate; of OME-Zarr only plates are read")
        of_kind(plate, dict, "the plate is")
        _require_version(plate.get("version"), self.zarr)
        return _plate(plate, {v: k for k, v in VERSIONS.items()}[self.zarr])

    def _unnamed(self, path: str, named: set[str]) -> Iterator[tuple[str, Refused]]:
        """What is in a group and is named by nothing."""
        try:
            listing = self.store.folder(path)
        except Refused as e:
            yield path, e
            return
        for name, inner in listing:
            where = posixpath.join(path, storage.spelt(name))
            if inner and name not in named:
                yield where, Refused("NOT_IN_INDEX", "the metadata of the plate do not name the folder")
            elif not inner and name not in OF_GROUPS and name not in named:
                yield where, Refused("UNKNOWN_FORMAT", "a file that is no part of an OME-Zarr plate")

    def _well(self, plate: _Layout, path: str, facts: dict[str, Any]) -> Iterator[tuple[str, Plane | Refused]]:
        (said,) = self._attributes([path])
        try:
            if isinstance(said, Refused):
                raise said
            if said is None:
                raise Refused("MISSING_FILE", "the plate names the well, but it is not there")
            with understood("the metadata of the well"):
                images = self._images(said, plate)
        except Refused as e:
            yield path, e
            return
        names = [name for _, name, _ in images if name]
        found = dict(zip(names, self._attributes([f"{path}/{name}" for name in names]), strict=True))
        for number, name, outcome in images:
            where = f"{path}/{name}" if name else path
            if isinstance(outcome, Refused):
                yield where, outcome
                continue
            more = facts | {"sample": number, "acquisition": outcome}
            try:
                if isinstance(found[name], Refused):
                    raise found[name]
                if found[name] is None:
                    raise Refused("MISSING_FILE", "the well names the image, but it is not there")
                with understood("the metadata of the image"):
                    planes = self._planes(where, found[name], more)
            except Refused as e:
                yield where, e
                continue
            yield from planes
        yield from self._unnamed(path, set(names))

    def _images(self, said: dict[str, Any], plate: _Layout) -> list[tuple[int, str | None, int | None | Refused]]:
        """(place in the list from 1, path, acquisition) of the images of a well, or why an image is none."""
        well = of_kind(said.get("well"), dict, "the group of the well has the well")
        _require_version(well.get("version"), self.zarr)
        images = of_kind(well.get("images"), list, "the well has images")
        if not images:
            raise broken("the well has no images")
        if len(images) > MOST_IMAGES:
            raise Refused("TOO_LARGE", f"a well of {len(images)} images, the limit is {MOST_IMAGES}")
        times = Counter(i["path"] for i in images if isinstance(i, dict) and isinstance(i.get("path"), str))
        found: list[tuple[int, str | None, int | None | Refused]] = []
        for number, image in enumerate(images, 1):
            name = None
            try:
                name = _require_name(of_kind(image, dict, "images hold").get("path"), "an image of the well")
                acquisition = image.get("acquisition")
                if times[name] > 1:
                    raise broken(f"the well lists the image {times[name]} times")
                if acquisition is not None and plate.acquisitions and acquisition not in plate.acquisitions:
                    raise broken(f"the image is of acquisition {short(acquisition)}, the plate has {short(plate.acquisitions)}")
                found.append((number, name, acquisition if isinstance(acquisition, int) else None))
            except Refused as e:
                if name is None or name not in {n for _, n, _ in found}:
                    found.append((number, name, e))
        return found

    def _planes(self, path: str, said: dict[str, Any], facts: dict[str, Any]) -> Iterator[tuple[str, Plane]]:
        level, axes, lengths, labels = _image(said, self.zarr)
        array = self.store.array(f"{path}/{level}")
        if array is None:
            raise Refused("MISSING_FILE", f"the image names the array {level}, but it is not there")
        if len(array.shape) != len(axes):
            raise broken(f"an array of shape {short(array.shape)}, the image has the axes {', '.join(axes)}")
        sizes = dict(zip(axes, array.shape, strict=True))
        if math.prod(array.shape[:-2]) > MOST_PLANES:
            raise Refused("TOO_LARGE", f"an image of shape {short(array.shape)}: more than {MOST_PLANES} planes")
        if labels is not None and len(labels) != sizes.get("c", 1):
            raise broken(f"omero names {len(labels)} channels, the image has {sizes.get('c', 1)}")
        step = lengths.pop("z", (None, None))

        def plane(at: dict[str, int]) -> Plane:
            own = facts | lengths | {a: n + 1 for a, n in at.items() if sizes[a] > 1}
            own["channel"] = labels[at.get("c", 0)] or None if labels else None
            if None not in step:
                own["stage_um"] = [*lengths["stage_um"][:2], step[1] + at["z"] * step[0]]
            return Plane(path, {k: v for k, v in own.items() if v is not None}, array.plane_bytes)

        def named() -> Iterator[tuple[str, Plane]]:
            for numbers in itertools.product(*map(range, array.shape[:-2])):
                at = dict(zip(axes, numbers, strict=False))
                query = "&".join(f"{a}={n}" for a, n in at.items())
                yield f"{path}/{level}" + (f"?{query}" if query else ""), plane(at)

        return named()
