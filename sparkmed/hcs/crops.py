"""Single cells, cut out of their field around their centres.

    for crop in cut(array, find(array[dna, ..., 0], settings.nuclei).cells, settings.crops):
        crop.cell, crop.array              # (C, size, size, 1)

Centres come from the nucleus finder or from a table that another program made: see :func:`read`. What such a table says of a field
decides what is cut of it, so it becomes a part of the field when volumes are made: see :func:`joined`.
"""

import dataclasses
import io
import itertools
import math
import posixpath
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sparkmed import storage
from sparkmed.config import Cells, Crops, digest
from sparkmed.formats.instance import VolumeHeader, to_json
from sparkmed.hcs import nuclei, wells
from sparkmed.hcs.fields import CELL_BYTES, CENTRES, NAMELESS
from sparkmed.imaging import patches
from sparkmed.imaging.patches import PatchLocation
from sparkmed.imaging.volume import Volume
from sparkmed.rejection import InputError, Refused

FIELD_KEYS = (("image",), ("plate", "well", "site"))
"""What names a field in a table of centres."""
COLUMNS = ("cell", "x", "y")
_PREFIX = "metadata_"
_UNKNOWN_MM = 1.0  # size of a pixel where a field does not say it
_ROWS = 20_000  # of a row group: what is read to find a field


@dataclass(frozen=True, eq=False)
class Crop:
    """One cell: its id in the field, its centre along I and J in pixels, where it was cut; ``array`` is (C, size, size, 1) of the
    field's dtype."""

    cell: str
    x: float
    y: float
    location: PatchLocation
    array: np.ndarray


def locations(centres: pd.DataFrame, shape: tuple[int, ...], settings: Crops) -> list[tuple[str, float, float, PatchLocation]]:
    """(cell, x, y, where) of the crops that are cut of a field of ``shape`` (C, I, J, 1), in the order of ``centres``.

    The pixel nearest to the centre, of two the further, is pixel ``size // 2`` of the crop. A crop that would reach beyond the
    field is left out unless ``settings.border`` is ``padded``. Raises :class:`Refused` ``CENTRE_OUTSIDE`` when a centre is no place
    in the field, and ``TWO_CELLS`` when two rows have one id.
    """
    size, found = settings.size, []
    cells = centres["cell"].astype(str)
    if cells.duplicated().any():
        raise Refused("TWO_CELLS", f"cell {cells[cells.duplicated()].iloc[0]} is in the field twice")
    for cell, x, y in zip(cells, centres["x"].astype(float), centres["y"].astype(float), strict=True):
        if not (-0.5 <= x < shape[1] - 0.5 and -0.5 <= y < shape[2] - 0.5):
            raise Refused("CENTRE_OUTSIDE", f"cell {cell} lies at ({x:g}, {y:g}), the field is of {shape[1]} x {shape[2]} pixels")
        start = [math.floor(at + 0.5) - size // 2 for at in (x, y)]
        inside = all(s >= 0 and s + size <= n for s, n in zip(start, shape[1:3], strict=True))
        if inside or settings.border == "padded":
            found.append((cell, x, y, PatchLocation((start[0], start[1], 0), (size, size, 1))))
    return found


def cut(array: np.ndarray, centres: pd.DataFrame, settings: Crops) -> Iterator[Crop]:
    """The crops of one field (C, I, J, 1); ``centres`` has columns ``cell``, ``x`` and ``y``. Raises as :func:`locations` does."""
    if array.ndim != 4 or array.shape[3] != 1:
        raise InputError(f"a field is (C, I, J, 1), got shape {array.shape}")
    for cell, x, y, location in locations(centres, array.shape, settings):
        yield Crop(cell, x, y, location, patches.extract(array, location))


def nuclei_of(volume: Volume, cells: Cells) -> pd.DataFrame:
    """The nuclei that the finder sees in a field: ``cell``, ``x`` and ``y``, and the rest of :data:`nuclei.COLUMNS`.

    Raises :class:`Refused` ``CHANNELS``, ``MISSING_SPACING`` where lengths are in um and the size of a pixel is not known, and as
    :func:`nuclei.find`.
    """
    if cells.channel >= len(volume.array):
        raise Refused("CHANNELS", f"image has {len(volume.array)} channels, nuclei are looked for in number {cells.channel + 1}")
    known = volume.spacing[0] != _UNKNOWN_MM
    if cells.nuclei.diameter is not None and cells.nuclei.unit == "um" and not known:
        raise Refused("MISSING_SPACING", "the field does not say how large its pixels are, and nuclei.unit is um")
    return nuclei.find(volume.array[cells.channel, ..., 0], cells.nuclei, 1000 * volume.spacing[0] if known else None).cells


def located(volume: Volume, cells: Cells, centres: pd.DataFrame | None = None) -> list[tuple[str, float, float, PatchLocation]]:
    """:func:`locations` in a field as it is stored, but for the light and scale of its plate; ``centres`` are wanted when they come
    from a table. There is one at least: raises :class:`Refused` ``NO_CELLS``, and as :func:`nuclei_of` and :func:`locations`."""
    if volume.array.shape[3] != 1:
        raise Refused("FIELD_SHAPE", f"cells are cut out of fields (C, I, J, 1), the image is {volume.array.shape}")
    if cells.listed and (centres is None or not set(COLUMNS) <= set(centres.columns)):
        raise InputError("cells of this kind come from a table: wanted centres with columns cell, x and y")
    if not cells.listed and centres is not None:
        raise InputError("cells of this kind are found in the field itself: wanted no centres")
    if centres is None:
        centres = nuclei_of(volume, cells)
    there = locations(centres, volume.array.shape, cells.crops)
    if not there:
        kept = f", the crop of {cells.crops.size} pixels of none lies inside the field" if len(centres) else ""
        raise Refused("NO_CELLS", f"{len(centres)} cells are there{kept}")
    return there


def joined(headers: Sequence[VolumeHeader], table: pd.DataFrame, folder: str) -> tuple[list[VolumeHeader], int]:
    """The headers of fields with the fact which cells a table lists of them, and a uid of that too; and how many rows of the table
    are of no field.

    ``table`` is :func:`checked`. A well counts in any spelling; a field whose files name no plate is of plate ``plate``, without a
    site it is site 1. The centres lie in ``folder``, a file per plate under a digest of what is in it; the fact has its URL
    (``file``), what the field goes by there (``field``), and how many ``cells`` it has, maybe 0. Raises :class:`InputError` when
    what the table says is of several fields, or all of it of none.
    """
    if table.empty:
        raise InputError("table of cells: it has no row")
    at = _of_fields(table, headers)
    strays = int((at < 0).sum())
    if strays == len(table):
        row = table.iloc[0]
        key = ", ".join(f"{k} {row[k]}" for k in table.columns if k not in COLUMNS)
        raise InputError(f"table of cells: none of its {len(table)} rows is of a field that is there; the first is of {key}")
    rows = table[list(COLUMNS)].assign(at=at)[at >= 0].sort_values(["at", "cell"], kind="stable")
    by_field = dict(iter(rows.groupby("at")))
    contents = [digest([by_field[n][c].tolist() for c in COLUMNS] if n in by_field else []) for n in range(len(headers))]
    plates: dict[str, list[int]] = defaultdict(list)
    for n, header in enumerate(headers):
        plates[_plate(header)].append(n)
    facts: dict[int, dict] = {n: {"cells": 0} for n in range(len(headers))}
    for members in plates.values():
        members = sorted((n for n in members if n in by_field), key=lambda n: headers[n].uid)
        if not members:
            continue
        file = storage.absolute(storage.join(folder, f"{digest([[headers[n].uid, contents[n]] for n in members])[:32]}.parquet"))
        _write(pd.concat([by_field[n].assign(field=headers[n].uid) for n in members]), file)  # anew: the vacuum goes by its age
        facts |= {n: {"file": file, "field": headers[n].uid, "cells": len(by_field[n])} for n in members}
    made = [
        dataclasses.replace(h, uid=digest(h.uid, contents[n])[:32], header=to_json(h.facts | {CENTRES: facts[n]}))
        for n, h in enumerate(headers)
    ]
    return made, strays


def listed(header: VolumeHeader) -> pd.DataFrame:
    """The centres that a table lists of a field: ``cell``, ``x`` and ``y``, by cell. Raises :class:`Refused` ``NO_CENTRES``,
    ``UNREADABLE``."""
    fact = header.facts.get(CENTRES)
    if fact is None:
        raise Refused("NO_CENTRES", "the volumes stage has joined no table of cells with the field")
    if not fact["cells"]:
        raise Refused("NO_CENTRES", "the table of cells has no row of the field")
    try:
        with storage.open(fact["file"]) as file:
            rows = pq.read_table(file, columns=list(COLUMNS), filters=[("field", "=", fact["field"])])
    except (OSError, ValueError) as e:  # and pyarrow's ArrowInvalid
        raise Refused("UNREADABLE", f"the centres of the cells cannot be read ({type(e).__name__})") from None
    if rows.num_rows != fact["cells"]:
        raise Refused("UNREADABLE", f"the file of centres has {rows.num_rows} cells of the field, wanted {fact['cells']}")
    return rows.to_pandas()


def _write(rows: pd.DataFrame, url: str):
    schema = pa.schema([("field", pa.string()), ("cell", pa.string()), ("x", pa.float64()), ("y", pa.float64())])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pandas(rows, schema, preserve_index=False), buffer, compression="zstd", row_group_size=_ROWS)
    storage.write_bytes(url, buffer.getvalue())


def _plate(header: VolumeHeader) -> str:
    return str(header.facts.get("plate") or NAMELESS)


def _of_fields(table: pd.DataFrame, headers: Sequence[VolumeHeader]) -> np.ndarray:
    """(rows,) which header each row of a table is of, -1: of none."""
    fields: dict[Hashable, list[int]] = defaultdict(list)
    if "image" in table.columns:
        names = table["image"].to_list()
        wanted: dict[str, list[str]] = defaultdict(list)
        for name in dict.fromkeys(names):
            wanted[posixpath.basename(name)].append(name)
        for n, header in enumerate(headers):
            for path in header.source_paths:
                for name in wanted.get(posixpath.basename(path), ()):
                    if f"/{path}".endswith(f"/{name.removeprefix('/')}") and fields[name][-1:] != [n]:
                        fields[name].append(n)
    else:
        spelt = {text: _well(text) for text in table["well"].unique()}
        sites = {text: text.lstrip("0") or "0" if text.isdigit() else text for text in table["site"].unique()}
        if "0" in sites.values() and all(h.facts.get("site", 1) != 0 for h in headers):
            raise InputError(
                "table of cells: site 0, and no field is one: sites are counted from 1, of OME-Zarr and OME-TIFF in the order "
                "of the well's list"
            )
        names = list(zip(table["plate"], table["well"].map(spelt), table["site"].map(sites), strict=True))
        for n, header in enumerate(headers):
            facts = header.facts
            fields[_plate(header), facts.get("well"), str(facts.get("site", 1))].append(n)
    for name in dict.fromkeys(names):
        if len(fields.get(name, ())) > 1:
            key, several = (f"image {name}" if isinstance(name, str) else "plate {}, well {}, site {}".format(*name)), fields[name]
            paths = " and ".join(headers[n].source_paths[0] for n in several[:2])
            raise InputError(f"table of cells: {key} is of {len(several)} fields, such as {paths}: name them by path, as image")
    return np.array([fields[name][0] if name in fields else -1 for name in names], np.int64)


def _well(text: str) -> str:
    try:
        return wells.name(*wells.parse(text))
    except Refused:
        return text


def read(url: str) -> pd.DataFrame:
    """The centres in a CSV or Parquet file: see :func:`checked`. Raises :class:`InputError`."""
    try:
        data = io.BytesIO(storage.read_bytes(url))
        if url.endswith((".parquet", ".pq")):
            there = pq.read_schema(data).names
            table = pq.read_table(data, columns=list(filter(_is_wanted, there))).to_pandas()
        else:
            there = pd.read_csv(data, dtype=str, encoding="utf-8-sig", nrows=0).columns.tolist()
            data.seek(0)
            table = pd.read_csv(data, dtype=str, encoding="utf-8-sig", usecols=_is_wanted)
    except OSError as e:
        raise InputError(f"table of cells {url}: {getattr(e, 'strerror', None) or type(e).__name__}") from None
    except (ValueError, pd.errors.ParserError) as e:  # of pandas, and of pyarrow's ArrowInvalid
        raise InputError(f"table of cells {url} is neither CSV nor Parquet ({type(e).__name__})") from None
    return checked(table, url, there)


def _is_wanted(column: str) -> bool:
    """Whether a column is one of those that :func:`checked` keeps: CellProfiler's tables have hundreds."""
    return _plain(column) in {*COLUMNS, *itertools.chain(*FIELD_KEYS)}


def _plain(column) -> str:
    return str(column).strip().lower().removeprefix(_PREFIX)


def checked(table: pd.DataFrame, name: str = "table of cells", there: Sequence[str] = ()) -> pd.DataFrame:
    """``table`` with columns ``image``, or ``plate``, ``well`` and ``site``, and ``cell`` (all text), ``x`` and ``y`` (float64,
    pixels along I and J, 0 being the centre of the first).

    Names count in any case, and with CellProfiler's prefix ``Metadata_``; further columns are left out. Without ``cell`` the cells
    of a field are numbered in the order of their rows, from 1. Raises :class:`InputError` that names the columns or the first row
    that is wrong: no place, one that is no number, a field that is not said, two rows of one cell or at one place.
    """
    columns = {_plain(c): c for c in table.columns}
    key = next((k for k in FIELD_KEYS if set(k) <= set(columns)), None)
    if key is None or not {"x", "y"} <= set(columns):
        got = [str(c) for c in (there or table.columns)]
        raise InputError(f"{name}: wanted columns x, y, and image or plate, well and site; got {got}")
    found = pd.DataFrame({c: table[columns[c]] for c in (*key, "x", "y")}).reset_index(drop=True)
    for c in ("x", "y"):
        found[c] = pd.to_numeric(found[c], errors="coerce").astype(np.float64)
        _require(np.isfinite(found[c]), name, f"{c} is no number", table[columns[c]])
    for c in key:
        text = _texts(found[c])
        _require(text != "", name, f"{c} is blank", table[columns[c]])
        found[c] = text
    if "cell" in columns:
        found.insert(len(key), "cell", _texts(table[columns["cell"]].reset_index(drop=True)))
        _require(found["cell"] != "", name, "cell is blank", table[columns["cell"]])
    else:
        found.insert(len(key), "cell", (found.groupby(list(key), sort=False).cumcount() + 1).astype(str))
    fits = found["cell"].map(lambda cell: len(cell.encode()) <= CELL_BYTES)
    _require(fits, name, f"the id of the cell is longer than {CELL_BYTES} bytes", found["cell"])
    _require(~found.duplicated([*key, "cell"]), name, "the cell is there twice", found["cell"])
    _require(~found.duplicated([*key, "x", "y"]), name, "another cell lies at the same place", found["cell"])
    return found


def _texts(values: pd.Series) -> pd.Series:
    """As text without blanks around it, whole numbers without a fraction; "" where there is nothing."""
    if values.dtype.kind == "f" and (values.dropna() % 1 == 0).all():
        values = values.astype("Int64")  # pandas reads whole numbers with gaps as fractions
    return values.astype("string").fillna("").str.strip().astype(object)


def _require(right: pd.Series, name: str, problem: str, values: pd.Series):
    wrong = np.flatnonzero(~np.asarray(right, bool))
    if wrong.size:
        more = f", and {wrong.size - 1} rows more" if wrong.size > 1 else ""
        raise InputError(f"{name}: row {wrong[0] + 1}: {problem} ({values.iloc[wrong[0]]!r}){more}")
