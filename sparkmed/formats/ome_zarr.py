"""OME-Zarr plates: where the planes of their fields are, and each of them as bytes of its own.

Of OME-NGFF 0.4 (on Zarr v2) and 0.5 (on Zarr v3), https://ngff.openmicroscopy.org: ``plate`` (section plate-md) names wells,
``well`` (well-md) the images of a well, ``multiscales`` (multiscale-md) the axes, scale and arrays of an image, of which the first
is the full resolution, and ``omero`` (omero-md) its channels. Lower resolutions, labels and tables are no fields.

A plane is one (t, c, z) of the array of an image, named ``A/1/0/0?t=0&c=1&z=4`` by the path of the array below the plate and the
axes that it has, counted from 0. Its bytes are a head in JSON and the chunks that hold it, as they are stored and row by row: what
:func:`read_array` reads with the package ``zarr``, and what its SHA-256 is of. Of the array's metadata the head has what pixels
depend on, and not where in the array the plane lies: a plane stays the same one when the array grows. Of a shard only the chunks
of the plane are read. Nothing is decoded before :func:`read_array`.

Zarr takes a chunk that is not there for one of the fill value. So does nobody here: a chunk that was never written because it is
all 0 cannot be told from one that was lost on the way, and a plane without it is refused.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import posixpath
import re
import struct
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from sparkmed import storage
from sparkmed.formats.instance import check_size
from sparkmed.rejection import Refused

SUFFIXES = (".zarr",)
"""A folder of such a name is one Zarr hierarchy."""
VERSIONS = {"0.4": 2, "0.5": 3}
"""Of Zarr, by that of OME-NGFF."""
ROWS, COLUMNS = 32, 48
"""Of a plate of 1536 wells."""
MAGIC = b"\x89ZARRPLANE\r\n\x1a\n"
"""How the bytes of a plane begin."""
MOST_METADATA = 64 << 20
"""Bytes of JSON beyond which metadata are refused."""
MOST_IMAGES, MOST_PLANES, MOST_CHUNKS = 10_000, 100_000, 65_536
"""Images of a well, planes of an image and chunks of a plane beyond which they are refused."""
MOST_BYTES = 1 << 30
"""A plane or a chunk of more, unpacked, is refused, and a plane whose chunks hold twice as much."""
KEPT = 128 << 20
"""Bytes of chunks of several planes that are kept for the next plane."""

_NAME = re.compile(r"[\w+-][\w.+-]*", re.ASCII)
_PLANE = re.compile(r"([\w.+/-]+)(?:\?([tcz0-9=&]+))?", re.ASCII)
_TYPE = re.compile(r"[<>|][biuf][1248]")
_TYPES = frozenset({"bool", *(f"{sign}int{n}" for sign in ("", "u") for n in (8, 16, 32, 64)), "float16", "float32", "float64"})
_MICROMETRES = {"angstrom": 1e-4, "nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}
_KINDS = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
_PACKED = {"blosc": "blosc", "zstd": "zstd", "zlib": "gzip", "gzip": "gzip"}
OF_GROUPS = frozenset({".zgroup", ".zattrs", ".zmetadata", "zarr.json"})
"""Files of a Zarr group."""
_OTHERS = frozenset({"OME", "labels", "tables"})
"""Folders of a plate that are no rows: of bioformats2raw and of Fractal."""
_NOT_THERE = 2**64 - 1


def is_installed() -> bool:
    """Whether the package that decodes is there."""
    return importlib.util.find_spec("zarr") is not None


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
class _Array:
    """An array, as far as its planes are cut out of it; of one in shards the chunks are those within."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    packed: str  # a value of _PACKED, or "" for plain
    checksum: bool
    metadata: dict[str, Any]  # without the shape
    key: tuple[str, str] = ("", ".")  # what a chunk's key begins with, and what is between its numbers
    shards: tuple[int, ...] = ()
    index: tuple[bool, bool] = (False, False)  # whether the index of a shard is at its start, and whether it has a checksum

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunks) * self.dtype.itemsize

    @property
    def plane_bytes(self) -> int:
        return math.prod(self.shape[-2:]) * self.dtype.itemsize

    @property
    def grid(self) -> tuple[int, int]:
        """Chunks of a plane along rows and columns."""
        return tuple(-(-n // c) for n, c in zip(self.shape[-2:], self.chunks[-2:], strict=True))

    def require_bounded(self):
        if max(self.chunk_bytes, self.plane_bytes) > MOST_BYTES or math.prod(self.grid) * self.chunk_bytes > 2 * MOST_BYTES:
            raise Refused("TOO_LARGE", f"an array of shape {_short(self.shape)} in chunks of {_short(self.chunks)}, of "
                                       f"{self.dtype}; planes and chunks of {MOST_BYTES} bytes are the limit")  # fmt: skip
        if math.prod(self.grid) > MOST_CHUNKS:
            raise Refused("TOO_LARGE", f"a plane of {math.prod(self.grid)} chunks, the limit is {MOST_CHUNKS}")


@dataclass(frozen=True)
class _Layout:
    name: str | None
    version: str
    rows: list[str]
    wells: list[tuple[str, int, int]]  # path, row and column from 1
    acquisitions: list[int]
    refused: list[tuple[str, Refused]] = field(default_factory=list)


# metadata


def _broken(what: str) -> Refused:
    return Refused("BROKEN_ZARR", what)


@contextlib.contextmanager
def _understood(what: str):
    """Whatever metadata of unexpected kinds raise becomes a :class:`Refused`."""
    try:
        yield
    except Refused:
        raise
    except (MemoryError, RecursionError, Exception) as e:
        raise _broken(f"{what} cannot be understood ({type(e).__name__})") from None


def _json(data: bytes, name: str) -> dict[str, Any]:
    if len(data) > MOST_METADATA:
        raise Refused("TOO_LARGE", f"{name} has more than {MOST_METADATA} bytes")
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        raise _broken(f"{name} is no JSON") from None
    return _of_kind(parsed, dict, f"{name} holds")


def _of_kind(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}
        raise _broken(f"{what} {json.dumps(value)[:40]}, wanted {names[kind]}")
    return value


def _short(value: Any) -> str:
    return repr(value)[:80]


def _require_version(version: Any, zarr: int):
    """``version`` may be absent where the specification is content with the plate's."""
    if version is not None and VERSIONS.get(version if isinstance(version, str) else "") != zarr:
        raise Refused("OTHER_VERSION", f"OME-NGFF {_short(version)} on Zarr v{zarr}; 0.4 on v2 and 0.5 on v3 are read")


def _require_name(name: Any, what: str, depth: int = 1) -> str:
    """A path below a group, whose components are plain names."""
    parts = _of_kind(name, str, f"{what} has the path").split("/")
    if ".." in parts or name.startswith(("/", "\\")):
        raise Refused("ESCAPES_FOLDER", f"{what} has the path {name[:80]!r}, which leads out of its group")
    if len(parts) > depth or not all(_NAME.fullmatch(part) for part in parts):
        raise _broken(f"{what} has the path {name[:80]!r}, wanted a name of letters, digits, _ and -")
    return name


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
        listed = _of_kind(said.get(what), list, f"the plate has {what}")
        names[what] = [_require_name(_of_kind(one, dict, f"{what} hold").get("name"), f"one of the {what}") for one in listed]
        if len(set(names[what])) < len(names[what]):
            raise _broken(f"{what} of the plate have a name twice")
    rows = _numbers(names["rows"], _row)
    columns = _numbers(names["columns"], lambda n: int(n) if n.isdigit() else 0)
    wells, refused = [], []
    listed = _of_kind(said.get("wells"), list, "the plate has wells")
    if not 1 <= len(listed) <= ROWS * COLUMNS:
        raise _broken(f"the plate lists {len(listed)} wells, wanted 1 to {ROWS * COLUMNS}")
    paths = Counter(one.get("path") for one in listed if isinstance(one, dict) and isinstance(one.get("path"), str))
    for path, times in paths.items():
        if times > 1:
            refused.append((_naming(path), _broken(f"the plate lists the well {times} times")))
    for number, one in enumerate(listed):
        path = one.get("path") if isinstance(one, dict) else None
        if isinstance(path, str) and paths[path] > 1:
            continue
        try:
            with _understood(f"well {number + 1} of the plate"):
                row, column = _well_of(one, names)
                if rows[row] > ROWS or columns[column] > COLUMNS:
                    where = f"row {rows[row]}, column {columns[column]}"
                    raise Refused("BAD_WELL", f"a well in {where}: a plate has at most {ROWS} x {COLUMNS}")
                wells.append((path, rows[row], columns[column]))
        except Refused as e:
            refused.append((_naming(path, f"wells[{number}]"), e))
    acquisitions = [_of_kind(a.get("id"), int, "an acquisition has the id") for a in said.get("acquisitions") or []]
    name = said.get("name")
    if name is not None:
        _of_kind(name, str, "the plate has the name")
    return _Layout(name or None, version, names["rows"], sorted(wells), acquisitions, refused)


def _well_of(one: dict[str, Any], names: dict[str, list[str]]) -> tuple[int, int]:
    """(row, column) of a well as places in the lists of the plate."""
    path = _require_name(one.get("path"), "a well", 2)
    row, _, column = path.partition("/")
    for what, said in (("rows", row), ("columns", column)):
        if said not in names[what]:
            raise _broken(f"the well {path} is in none of the plate's {what}")
    found = names["rows"].index(row), names["columns"].index(column)
    for key, at in zip(("rowIndex", "columnIndex"), found, strict=True):
        if key in one and one[key] != at:
            raise _broken(f"the well {path} has {key} {_short(one[key])}, its path says {at}")
    return found


def _naming(path: Any, otherwise: str = "") -> str:
    """How something is named that is refused: by its path, if that may stand in a URI."""
    plain = isinstance(path, str) and len(path) < 200 and all(_NAME.fullmatch(part) for part in path.split("/"))
    return path if plain else otherwise


def _image(said: dict[str, Any], zarr: int) -> tuple[str, list[str], dict[str, Any], list[str | None] | None]:
    """Path of the array, axes, what is the same for all planes (facts of :class:`Plane`; ``z`` is step and origin in um), and the
    labels of channels."""
    scales = _of_kind(said.get("multiscales"), list, "the image has multiscales")
    if not scales:
        raise _broken("the image has no multiscales")
    first = _of_kind(scales[0], dict, "multiscales hold")
    _require_version(first.get("version"), zarr)
    listed = [_of_kind(a, dict, "axes hold") for a in _of_kind(first.get("axes"), list, "the image has axes")]
    axes = [_of_kind(a.get("name"), str, "an axis has the name") for a in listed]
    known = "".join(a for a in "tczyx" if a in axes)
    kinds = all(a.get("type") in (None, _KINDS.get(a["name"])) for a in listed)
    if list(known) != axes or known[-2:] != "yx" or not kinds:
        raise Refused("BAD_AXES", f"axes {_short(axes)}, wanted y and x and before them any of t, c, z in this order")
    levels = _of_kind(first.get("datasets"), list, "the image has datasets")
    if not levels:
        raise _broken("the image has no datasets")
    level = _of_kind(levels[0], dict, "datasets hold")
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
        channels = _of_kind(said["omero"]["channels"], list, "omero has channels")
        labels = [c.get("label") if isinstance(c, dict) and isinstance(c.get("label"), str) else None for c in channels]
    return path, axes, facts, labels


def _um(value: float | None, unit: float | None) -> float | None:
    """um, or None where a length or its unit is not said, or is none of this world."""
    return value * unit if value is not None and unit and abs(value * unit) < 1e9 else None


def _placed(steps: list[Any], count: int) -> tuple[list[float | None], list[float | None]]:
    """Size of a step and place of the first one along each axis, after scales and translations in their order; None: not said."""
    scale: list[float | None] = [None] * count
    shift: list[float | None] = [None] * count
    for step in itertools.chain.from_iterable(_of_kind(s, list, "coordinateTransformations are") for s in steps if s is not None):
        kind = _of_kind(step, dict, "coordinateTransformations hold").get("type")
        if kind == "identity":
            continue
        values = step.get(kind) if kind in ("scale", "translation") else None
        numbers = isinstance(values, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
        if not numbers or len(values) != count or (kind == "scale" and min(values) <= 0):
            raise _broken(f"a coordinate transformation {json.dumps(step)[:80]}, wanted scale or translation of {count} numbers")
        if kind == "scale":
            scale = [v if s is None else s * v for s, v in zip(scale, values, strict=True)]
            shift = [None if t is None else t * v for t, v in zip(shift, values, strict=True)]
        else:
            shift = [v + (t or 0.0) for t, v in zip(shift, values, strict=True)]
    return scale, shift


def _array(said: dict[str, Any]) -> _Array:
    """Raises ``BROKEN_ZARR``, ``BAD_TYPE``, ``NO_DECODER``, ``TOO_LARGE``."""
    with _understood("the metadata of the array"):
        array = {2: _array_2, 3: _array_3}.get(said.get("zarr_format"), _no_array)(said)
        for what in ("chunks", "shards"):
            if getattr(array, what) and len(getattr(array, what)) != len(array.shape):
                raise _broken(f"an array of shape {_short(array.shape)} in {what} of {_short(getattr(array, what))}")
        if array.shards and any(s % c for s, c in zip(array.shards, array.chunks, strict=True)):
            raise _broken(f"shards of {_short(array.shards)} do not hold whole chunks of {_short(array.chunks)}")
        if not 2 <= len(array.shape) <= 5:
            raise _broken(f"an array of shape {_short(array.shape)}, wanted 2 to 5 axes")
        array.require_bounded()
        return array


def _no_array(said: dict[str, Any]):
    raise _broken(f"the array has zarr_format {_short(said.get('zarr_format'))}, wanted 2 or 3")


def _lengths(value: Any, what: str) -> tuple[int, ...]:
    found = tuple(_of_kind(n, int, f"{what} of the array holds") for n in _of_kind(value, list, f"{what} of the array is"))
    if not all(1 <= n < 2**40 for n in found):
        raise _broken(f"{what} of the array is {_short(list(found))}")
    return found


def _separator(value: Any) -> str:
    if value not in (".", "/"):
        raise _broken(f"numbers of chunks are separated by {_short(value)}, wanted . or /")
    return value


def _array_2(said: dict[str, Any]) -> _Array:
    """Zarr v2, https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html"""
    text, compressor = said.get("dtype"), said.get("compressor")
    if not isinstance(text, str) or not _TYPE.fullmatch(text):
        raise Refused("BAD_TYPE", f"an array of dtype {_short(text)}, wanted numbers")
    if said.get("filters"):
        raise Refused("NO_DECODER", f"filters {json.dumps(said['filters'])[:80]} are not read")
    kind = _of_kind(compressor, dict, "the compressor is").get("id") if compressor is not None else None
    if compressor is not None and kind not in _PACKED:
        raise Refused("NO_DECODER", f"compressor {_short(kind)}, wanted one of {', '.join(_PACKED)} or none")
    if said.get("order", "C") not in ("C", "F"):
        raise _broken(f"the array has order {_short(said['order'])}")
    dtype, chunks = np.dtype(text), _lengths(said.get("chunks"), "chunks")
    metadata = {"zarr_format": 2, "chunks": list(chunks), "dtype": text, "compressor": compressor, "order": said.get("order", "C"),
                "filters": None, "fill_value": False if dtype.kind == "b" else 0, "dimension_separator": "."}  # fmt: skip
    key = "", _separator(said.get("dimension_separator", "."))
    return _Array(_lengths(said.get("shape"), "shape"), chunks, dtype, _PACKED.get(kind, ""), False, metadata, key)


def _array_3(said: dict[str, Any]) -> _Array:
    """Zarr v3 core and sharding, https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html"""
    if said.get("node_type") != "array":
        raise _broken("a Zarr group where an array is expected")
    if not isinstance(said.get("data_type"), str) or said["data_type"] not in _TYPES:
        raise Refused("BAD_TYPE", f"an array of data type {_short(said.get('data_type'))}, wanted numbers")
    grid, keys = said.get("chunk_grid") or {}, said.get("chunk_key_encoding") or {"name": "default"}
    if grid.get("name") != "regular" or said.get("storage_transformers"):
        raise Refused("NO_DECODER", f"an array in chunks of kind {_short(grid.get('name'))}, wanted regular ones")
    chunks = _lengths(grid["configuration"].get("chunk_shape"), "chunk_shape")
    default = {"default": "/", "v2": "."}.get(keys.get("name"))
    if default is None:
        raise Refused("NO_DECODER", f"chunks with keys of kind {_short(keys.get('name'))}, wanted default or v2")
    separator = _separator((keys.get("configuration") or {}).get("separator", default))
    key = "c" + separator if keys["name"] == "default" else "", separator
    shards, index = (), (False, False)
    codecs = [_of_kind(c, dict, "codecs hold") for c in _of_kind(said.get("codecs"), list, "codecs are")]
    if [c.get("name") for c in codecs] == ["sharding_indexed"]:
        inner = codecs[0].get("configuration") or {}
        shards, chunks = chunks, _lengths(inner.get("chunk_shape"), "chunk_shape of shards")
        codecs = [_of_kind(c, dict, "codecs hold") for c in _of_kind(inner.get("codecs"), list, "codecs are")]
        of_index = [(c.get("name"), (c.get("configuration") or {}).get("endian")) for c in inner.get("index_codecs") or []]
        if of_index not in ([("bytes", "little")], [("bytes", "little"), ("crc32c", None)]):
            raise Refused("NO_DECODER", "shards whose index is packed in another way than little-endian numbers with a crc32c")
        index = inner.get("index_location", "end") == "start", len(of_index) == 2
    names = [c.get("name") for c in codecs]
    rest = names[names.index("bytes") + 1 :] if names.count("bytes") == 1 else [None]
    packed = "".join(_PACKED.get(n, "") for n in rest[:1] if n != "zlib")
    tail = rest[1:] if packed else rest
    if names[: len(names) - len(rest) - 1] not in ([], ["transpose"]) or tail not in ([], ["crc32c"]):
        listed = ", ".join(_short(n) for n in names[:8])
        raise Refused(
            "NO_DECODER", f"codecs {listed}; read are transpose, bytes, one of blosc, zstd, gzip, crc32c, and shards of them"
        )
    dtype = np.dtype(said["data_type"])
    metadata = {"zarr_format": 3, "node_type": "array", "data_type": said["data_type"], "codecs": codecs,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
                "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
                "fill_value": {"b": False, "f": 0.0}.get(dtype.kind, 0)}  # fmt: skip
    shape = _lengths(said.get("shape"), "shape")
    return _Array(shape, chunks, dtype, packed, bool(tail), metadata, key, shards, index)


# the hierarchy


class Plate:
    """The planes of the OME-Zarr plate below ``url``, and their bytes.

    Metadata and chunks are read when they are asked for; a local link is not followed.
    """

    def __init__(self, url: str):
        self.url, self.zarr = storage.absolute(url), 0
        local = storage.local_path(url)
        self._real = local and os.path.realpath(local)
        self._arrays: dict[str, _Array] = {}
        self._indexes: OrderedDict[str, np.ndarray | None] = OrderedDict()
        self._chunks: OrderedDict[str, bytes | None] = OrderedDict()

    def planes(self, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[str, Plane | Refused]]:
        """(name, plane) of all planes, and (path, why) of what is none; ``part`` (n, of) are those of every ``of``-th well from the
        ``n``-th on, and what is to be said of the plate as a whole comes with part 0, under the name "".

        Only metadata are read. Reasons: ``BROKEN_ZARR``, ``NOT_A_PLATE``, ``OTHER_VERSION``, ``ESCAPES_FOLDER``, ``BAD_WELL``,
        ``MISSING_FILE`` (a well, image or array that is named and not there), ``NOT_IN_INDEX`` (a folder that nothing names),
        ``UNKNOWN_FORMAT`` (a file that is nothing of a plate), ``BAD_AXES``, ``BAD_TYPE``, ``NO_DECODER``, ``TOO_LARGE``, ``LINK``,
        ``UNREADABLE``.
        """
        try:
            with _understood("the metadata of the plate"):
                plate = self._read_plate()
        except Refused as e:
            if part[0] == 0:
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

        Raises ``MISSING_CHUNK``, ``TRUNCATED``, ``BOMB``, ``BROKEN_PICTURE``, and what :meth:`planes` says of arrays.
        """
        found = _PLANE.fullmatch(name)
        given = dict(one.partition("=")[::2] for one in (found[2] or "").split("&")) if found and found[2] else {}
        if not found or not all(n.isdigit() and len(n) < 10 for n in given.values()):
            raise Refused("UNREADABLE", "the name of the plane is none")
        path = _require_name(found[1], "the plane", 8)
        array = self._array_at(path)
        at = tuple(int(given[a]) for a in "tcz" if a in given)
        if array is None or len(at) + 2 != len(array.shape) or any(n >= most for n, most in zip(at, array.shape, strict=False)):
            raise Refused("UNREADABLE", "the plane is not in the plate any more")
        return self._bytes(path, array, at)

    # metadata

    def _require_no_link(self, paths: list[str]):
        for path in paths if self._real else ():
            if os.path.realpath(os.path.join(self._real, path)) != os.path.join(self._real, path):
                raise Refused("LINK", "a link inside a Zarr is not followed")

    def _fetch(self, paths: list[str], most: int) -> list[bytes | None]:
        self._require_no_link(paths)
        try:
            return storage.read_each([storage.join(self.url, p) for p in paths], most)
        except (OSError, ValueError) as e:
            raise Refused("UNREADABLE", f"the file cannot be read: {type(e).__name__}") from None

    def _attributes(self, paths: list[str]) -> list[dict[str, Any] | Refused | None]:
        """OME metadata of groups, why they cannot be read, or None for one that is not there."""
        name = "zarr.json" if self.zarr == 3 else ".zattrs"
        try:
            fetched = self._fetch([posixpath.join(p, name) for p in paths], MOST_METADATA + 1)
        except Refused as e:
            if len(paths) > 1:  # one of them need not be the fault of all
                return [found for p in paths for found in self._attributes([p])]
            return [e]
        found: list[dict[str, Any] | Refused | None] = []
        for data in fetched:
            try:
                found.append(None if data is None else self._of_group(_json(data, name)))
            except Refused as e:
                found.append(e)
        return found

    def _of_group(self, said: dict[str, Any]) -> dict[str, Any]:
        if self.zarr == 2:
            return said
        if said.get("zarr_format") != 3 or said.get("node_type") != "group":
            raise _broken("a Zarr array where a group is expected")
        ome = _of_kind(_of_kind(said.get("attributes", {}), dict, "attributes are").get("ome", {}), dict, "ome is")
        _require_version(ome.get("version"), 3)
        return ome

    def _read_plate(self) -> _Layout:
        new, old = self._fetch(["zarr.json", ".zattrs"], MOST_METADATA + 1)
        if new is None and old is None:
            raise _broken("neither zarr.json nor .zattrs is at its top: it was not copied whole, or is no group")
        self.zarr = 3 if new is not None else 2
        said = self._of_group(_json(new if new is not None else old, "zarr.json" if new is not None else ".zattrs"))
        plate = said.get("plate")
        if plate is None:
            what = (
                "an image" if "multiscales" in said else "a collection of images" if "bioformats2raw.layout" in said else "a group"
            )
            raise Refused("NOT_A_PLATE", f"{what} without the metadata of a plate; of OME-Zarr only plates are read")
        _of_kind(plate, dict, "the plate is")
        _require_version(plate.get("version"), self.zarr)
        return _plate(plate, {v: k for k, v in VERSIONS.items()}[self.zarr])

    def _unnamed(self, path: str, named: set[str]) -> Iterator[tuple[str, Refused]]:
        """What is in a group and is named by nothing."""
        try:
            listing = storage.folder(storage.join(self.url, path) if path else self.url)
        except OSError as e:
            yield path, Refused("UNREADABLE", f"the folder cannot be listed: {type(e).__name__}")
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
            with _understood("the metadata of the well"):
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
                with _understood("the metadata of the image"):
                    planes = self._planes(where, found[name], more)
            except Refused as e:
                yield where, e
                continue
            yield from planes
        yield from self._unnamed(path, set(names))

    def _images(self, said: dict[str, Any], plate: _Layout) -> list[tuple[int, str | None, int | None | Refused]]:
        """(place in the list from 1, path, acquisition) of the images of a well, or why an image is none."""
        well = _of_kind(said.get("well"), dict, "the group of the well has the well")
        _require_version(well.get("version"), self.zarr)
        images = _of_kind(well.get("images"), list, "the well has images")
        if not images:
            raise _broken("the well has no images")
        if len(images) > MOST_IMAGES:
            raise Refused("TOO_LARGE", f"a well of {len(images)} images, the limit is {MOST_IMAGES}")
        times = Counter(i["path"] for i in images if isinstance(i, dict) and isinstance(i.get("path"), str))
        found: list[tuple[int, str | None, int | None | Refused]] = []
        for number, image in enumerate(images, 1):
            name = None
            try:
                name = _require_name(_of_kind(image, dict, "images hold").get("path"), "an image of the well")
                acquisition = image.get("acquisition")
                if times[name] > 1:
                    raise _broken(f"the well lists the image {times[name]} times")
                if acquisition is not None and plate.acquisitions and acquisition not in plate.acquisitions:
                    raise _broken(f"the image is of acquisition {_short(acquisition)}, the plate has {_short(plate.acquisitions)}")
                found.append((number, name, acquisition if isinstance(acquisition, int) else None))
            except Refused as e:
                if name is None or name not in {n for _, n, _ in found}:
                    found.append((number, name, e))
        return found

    def _planes(self, path: str, said: dict[str, Any], facts: dict[str, Any]) -> Iterator[tuple[str, Plane]]:
        level, axes, lengths, labels = _image(said, self.zarr)
        array = self._array_at(f"{path}/{level}")
        if array is None:
            raise Refused("MISSING_FILE", f"the image names the array {level}, but it is not there")
        if len(array.shape) != len(axes):
            raise _broken(f"an array of shape {_short(array.shape)}, the image has the axes {', '.join(axes)}")
        sizes = dict(zip(axes, array.shape, strict=True))
        if math.prod(array.shape[:-2]) > MOST_PLANES:
            raise Refused("TOO_LARGE", f"an image of shape {_short(array.shape)}: more than {MOST_PLANES} planes")
        if labels is not None and len(labels) != sizes.get("c", 1):
            raise _broken(f"omero names {len(labels)} channels, the image has {sizes.get('c', 1)}")
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

    # pixels

    def _array_at(self, path: str) -> _Array | None:
        if path not in self._arrays:
            new, old = self._fetch([f"{path}/zarr.json", f"{path}/.zarray"], MOST_METADATA + 1)
            if new is None and old is None:
                return None
            array = _array(_json(new if new is not None else old, "zarr.json" if new is not None else ".zarray"))
            if len(self._arrays) > 1000:
                self._arrays.clear()
            self._arrays[path] = array
        return self._arrays[path]

    def _bytes(self, path: str, array: _Array, at: tuple[int, ...]) -> bytes:
        lead = tuple(n // c for n, c in zip(at, array.chunks, strict=False))
        numbers = [(*lead, *place) for place in itertools.product(*map(range, array.grid))]
        chunks = self._stored(path, array, numbers)
        absent = sum(c is None for c in chunks)
        if absent:
            message = f"{absent} of the {len(chunks)} chunks of the plane are not there; Zarr would take them for the fill value"
            raise Refused("MISSING_CHUNK", f"{message}. If they are empty, have them written (write_empty_chunks)")
        for chunk in chunks:
            _require_whole(chunk, array)
        within = [n % c for n, c in zip(at, array.chunks, strict=False)]
        shape = [*array.chunks[:-2], *array.shape[-2:]]
        head = {"array": array.metadata | {"shape": shape}, "at": within, "bytes": [len(c) for c in chunks]}
        text = json.dumps(head, separators=(",", ":"), sort_keys=True).encode()
        return b"".join([MAGIC, struct.pack(">I", len(text)), text, *chunks])

    def _stored(self, path: str, array: _Array, numbers: list[tuple[int, ...]]) -> list[bytes | None]:
        """Chunks as they are stored, by their numbers; those of several planes are kept for the next one."""
        names = [f"{path}/{'.'.join(map(str, n))}" for n in numbers]
        lacking = [(name, n) for name, n in zip(names, numbers, strict=True) if name not in self._chunks]
        most = array.chunk_bytes + (array.chunk_bytes >> 3) + 65_536
        read = self._of_shards if array.shards else self._of_files
        fresh = dict(zip((name for name, _ in lacking), read(path, array, [n for _, n in lacking], most), strict=True))
        if any(c is not None and len(c) > most for c in fresh.values()):
            raise Refused("BOMB", f"a chunk of more than {most} bytes, which holds {array.chunk_bytes} when it is unpacked")
        chunks = [fresh[name] if name in fresh else self._chunks[name] for name in names]
        if max(array.chunks[:-2], default=1) > 1:
            self._chunks.update(fresh)
            size = sum(len(c or b"") for c in self._chunks.values())
            while size > KEPT or len(self._chunks) > MOST_CHUNKS:
                size -= len(self._chunks.popitem(last=False)[1] or b"")
        return chunks

    def _of_files(self, path: str, array: _Array, numbers: list[tuple[int, ...]], most: int) -> list[bytes | None]:
        prefix, separator = array.key
        return self._fetch([f"{path}/{prefix}{separator.join(map(str, n))}" for n in numbers], most + 1)

    def _of_shards(self, path: str, array: _Array, numbers: list[tuple[int, ...]], most: int) -> list[bytes | None]:
        """Chunks within shards: ranges of their bytes, as their indexes say (sharding codec 1.0 of Zarr v3)."""
        prefix, separator = array.key
        within = [s // c for s, c in zip(array.shards, array.chunks, strict=True)]
        ranges: list[tuple[str, int, int] | None] = []
        for number in numbers:
            outer, inner = zip(*(divmod(n, w) for n, w in zip(number, within, strict=True)), strict=True)
            key = f"{path}/{prefix}{separator.join(map(str, outer))}"
            index = self._index(key, array, math.prod(within))
            start, count = (int(n) for n in index[np.ravel_multi_index(inner, within)]) if index is not None else (_NOT_THERE,) * 2
            if start == count == _NOT_THERE:
                ranges.append(None)
                continue
            if count > most:
                raise Refused("BOMB", f"a chunk of {count} bytes in a shard, which holds {array.chunk_bytes} when it is unpacked")
            ranges.append((storage.join(self.url, key), start, start + count))
        try:
            data = iter(storage.read_ranges([r for r in ranges if r is not None]))
        except EOFError:
            raise Refused("TRUNCATED", "a shard ends before a chunk that its index names") from None
        except (OSError, ValueError, OverflowError) as e:
            raise Refused("UNREADABLE", f"the file cannot be read: {type(e).__name__}") from None
        return [None if r is None else next(data) for r in ranges]

    def _index(self, key: str, array: _Array, count: int) -> np.ndarray | None:
        """(chunks, 2) start and bytes of the chunks of a shard, None when there is no such shard."""
        if key in self._indexes:
            return self._indexes[key]
        at_start, checksum = array.index
        size = 16 * count + 4 * checksum
        if size > MOST_METADATA:
            raise Refused("TOO_LARGE", f"a shard of {count} chunks")
        self._require_no_link([key])
        try:
            with storage.open(storage.join(self.url, key)) as stream:
                length = stream.seek(0, os.SEEK_END)
                stream.seek(0 if at_start else max(length - size, 0))
                data = stream.read(size)
        except (FileNotFoundError, NotADirectoryError):
            data = None
        except (OSError, ValueError) as e:
            raise Refused("UNREADABLE", f"the file cannot be read: {type(e).__name__}") from None
        if data is not None and len(data) < size:
            raise Refused("TRUNCATED", f"a shard of {length} bytes, its index alone has {size}")
        if data is not None and checksum:
            import google_crc32c

            if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
                raise Refused("TRUNCATED", "the index of a shard does not have its checksum: the shard was cut or changed")
        index = None
        if data is not None:
            index = np.frombuffer(data, "<u8", 2 * count).reshape(count, 2)
            starts, counts = index[(index != _NOT_THERE).any(1)].T
            if (counts > length).any() or (starts > length - counts).any():
                raise Refused("TRUNCATED", f"a shard of {length} bytes, its index names chunks beyond")
        self._indexes[key] = index
        while len(self._indexes) > 64:
            self._indexes.popitem(last=False)
        return index


# the bytes of a plane


def _require_whole(chunk: bytes, array: _Array):
    """Raise ``TRUNCATED``, ``BOMB`` or ``BROKEN_PICTURE`` for a chunk that says itself that it is not what the array is made of."""
    wanted = array.chunk_bytes
    chunk = chunk[:-4] if array.checksum else chunk
    exact = True
    if not chunk:
        raise Refused("TRUNCATED", "a chunk has no bytes")
    if array.packed == "blosc":
        if len(chunk) < 16 or (count := int.from_bytes(chunk[12:16], "little")) > len(chunk):
            raise Refused("TRUNCATED", f"a chunk has {len(chunk)} bytes" + (f" of {count}" if len(chunk) >= 16 else ""))
        found = int.from_bytes(chunk[4:8], "little")
    elif array.packed == "zstd":
        found, exact = _zstd_size(chunk)
    elif array.packed:
        return  # deflate does not say
    else:
        found = len(chunk)
        if found < wanted:
            raise Refused("TRUNCATED", f"a chunk has {found} of {wanted} bytes")
    if found > (wanted if exact else 4 * wanted + (1 << 20)):
        raise Refused("BOMB", f"a chunk of {wanted} bytes unpacks to {found}")
    if exact and found < wanted:
        raise Refused("BROKEN_PICTURE", f"a chunk unpacks to {found} bytes, the array has chunks of {wanted}")


def _zstd_size(data: bytes) -> tuple[int, bool]:
    """Bytes that frames of RFC 8878 unpack to, and whether they say so; else what their blocks may unpack to at most."""
    at, total, exact = 0, 0, True
    while at + 6 <= len(data):
        magic = int.from_bytes(data[at : at + 4], "little")
        if magic & 0xFFFFFFF0 == 0x184D2A50:  # to be skipped
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
            continue
        if magic != 0xFD2FB528:
            raise Refused("BROKEN_PICTURE", "a chunk is not what its compressor writes")
        said = data[at + 4]
        single, length = said >> 5 & 1, (said >> 5 & 1, 2, 4, 8)[said >> 6]
        at += 5 + (1 - single) + (0, 1, 2, 4)[said & 3]
        claimed = int.from_bytes(data[at : at + length], "little") + (256 if length == 2 else 0)
        at, most, last = at + length, 0, False
        while not last and at + 3 <= len(data):
            block = int.from_bytes(data[at : at + 3], "little")
            last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
            at += 3 + (1 if kind == 1 else size)
            most += size if kind < 2 else 1 << 17
        at += 4 * (said >> 2 & 1)
        if not last or at > len(data):
            raise Refused("TRUNCATED", f"a chunk of {len(data)} bytes ends before its data do")
        total, exact = total + (claimed if length else most), exact and bool(length)
    if at < len(data) or not data:
        raise Refused("TRUNCATED", f"a chunk of {len(data)} bytes ends before its data do")
    return total, exact


def _head(stream: BinaryIO, size: int) -> tuple[_Array, tuple[int, ...], list[int], int]:
    """(array of the one chunk deep that the plane is in, place in it, bytes of the chunks, where the first one starts)"""
    start = stream.read(len(MAGIC) + 4)
    length = int.from_bytes(start[len(MAGIC) :], "big")
    if not start.startswith(MAGIC) or length > MOST_METADATA:
        raise Refused("BROKEN_PICTURE", "not a plane of a Zarr")
    with _understood("the head of the plane"):
        said = _json(stream.read(length), "the head of the plane")
        array, counts = _array(said["array"]), list(_lengths(said["bytes"], "bytes"))
        at = tuple(_of_kind(n, int, "at holds") for n in said["at"])
        lead = list(zip(at, array.shape[:-2], array.chunks[:-2], strict=True))
    if array.shards or any(n != c or not 0 <= a < c for a, n, c in lead) or len(counts) != math.prod(array.grid):
        raise Refused("BROKEN_PICTURE", "the head of the plane contradicts itself")
    first = len(start) + length
    if first + sum(counts) != size:
        raise Refused("TRUNCATED", f"a plane of {size} bytes, its head says {first + sum(counts)}")
    return array, at, counts, first


def read_header(stream: BinaryIO, size: int) -> tuple[tuple[int, int, int, int], str]:
    """Shape (1, I = x, J = y, 1) and type with packing of a plane from its bytes; raises :class:`Refused`."""
    array, *_ = _head(stream, size)
    rows, columns = array.shape[-2:]
    check_size((columns, rows), array.dtype.itemsize, size, True)
    return (1, columns, rows, 1), f"{array.dtype.name} {array.packed}".strip()


def read_array(stream: BinaryIO, size: int) -> np.ndarray:
    """(rows, columns) of a plane from its bytes. Raises ``BOMB`` and what :func:`read_header` does; anything that cannot be decoded
    raises whatever the decoder does."""
    array, at, counts, first = _head(stream, size)
    stream.seek(first)
    from zarr import open_array
    from zarr.buffer import cpu
    from zarr.storage import MemoryStore

    name = "zarr.json" if array.metadata["zarr_format"] == 3 else ".zarray"
    stored = {name: json.dumps(array.metadata | {"shape": list(array.shape)}).encode()}
    for place, count in zip(itertools.product(*map(range, array.grid)), counts, strict=True):
        chunk = stream.read(count)
        _require_whole(chunk, array)
        if array.packed == "gzip":
            _require_bounded(chunk[:-4] if array.checksum else chunk, array.chunk_bytes)
        stored[".".join(map(str, (*(0 for _ in at), *place)))] = chunk
    store = MemoryStore({k: cpu.Buffer.from_bytes(v) for k, v in stored.items()}, read_only=True)
    return np.asarray(open_array(store=store, mode="r", zarr_format=array.metadata["zarr_format"])[at])


def _require_bounded(packed: bytes, wanted: int):
    """Raise ``BOMB`` for deflated bytes that unpack to more than ``wanted``."""
    size = 0
    while packed and size <= wanted:
        unpack = zlib.decompressobj(47)  # with the head of zlib or of gzip; several members may follow each other
        while packed and size <= wanted:
            size += len(unpack.decompress(packed, 1 << 20))
            packed = unpack.unconsumed_tail
        packed = unpack.unused_data
    if size > wanted:
        raise Refused("BOMB", f"a chunk of {wanted} bytes unpacks to more")
