"""Single cells, cut out of their field around their centres.

    for crop in cut(array, find(array[dna, ..., 0], settings.nuclei).cells, settings.crops):
        crop.cell, crop.array              # (C, size, size, 1)

Centres come from the nucleus finder or from a table that another program made: see :func:`read`.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sparkmed import storage
from sparkmed.config import Crops
from sparkmed.imaging import patches
from sparkmed.imaging.patches import PatchLocation
from sparkmed.rejection import InputError, Refused

FIELD_KEYS = (("image",), ("plate", "well", "site"))
"""What names a field in a table of centres."""
_PREFIX = "metadata_"


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


def read(url: str) -> pd.DataFrame:
    """The centres in a CSV or Parquet file: see :func:`checked`. Raises :class:`InputError`."""
    try:
        data = io.BytesIO(storage.read_bytes(url))
        table = pd.read_parquet(data) if url.endswith((".parquet", ".pq")) else pd.read_csv(data, dtype=str, encoding="utf-8-sig")
    except OSError as e:
        raise InputError(f"table of cells {url}: {getattr(e, 'strerror', None) or type(e).__name__}") from None
    except (ValueError, pd.errors.ParserError) as e:  # of pandas, and of pyarrow's ArrowInvalid
        raise InputError(f"table of cells {url} is neither CSV nor Parquet ({type(e).__name__})") from None
    return checked(table, url)


def checked(table: pd.DataFrame, name: str = "table of cells") -> pd.DataFrame:
    """``table`` with columns ``image``, or ``plate``, ``well`` and ``site``, and ``cell`` (all text), ``x`` and ``y`` (float64,
    pixels along I and J, 0 being the centre of the first).

    Names count in any case, and with CellProfiler's prefix ``Metadata_``; further columns are left out. Without ``cell`` the cells
    of a field are numbered in the order of their rows, from 1. Raises :class:`InputError` that names the columns or the first row
    that is wrong: no place, one that is no number, a field that is not said, two rows of one cell or at one place.
    """
    columns = {str(c).strip().lower().removeprefix(_PREFIX): c for c in table.columns}
    key = next((k for k in FIELD_KEYS if set(k) <= set(columns)), None)
    if key is None or not {"x", "y"} <= set(columns):
        raise InputError(f"{name}: wanted columns x, y, and image or plate, well and site; got {[str(c) for c in table.columns]}")
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
