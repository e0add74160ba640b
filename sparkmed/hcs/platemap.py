"""Plate maps: what is in each well, from CSV or TSV tables of a row per well, and the barcodes that join plates with maps.

Columns go by the names that the config gives, else by usual ones (those of the LINCS and JUMP Cell Painting maps), in any case and
with or without ``Metadata_``. Cells that are blank, ``NA``, ``N/A``, ``NaN``, ``null`` or ``None`` say nothing. What is wrong with
a well is told when the well is asked for, so that the images of all other wells stay.
"""

import csv
import difflib
import io
import math
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sparkmed.config import PlateMaps
from sparkmed.hcs import wells
from sparkmed.rejection import InputError, Refused, Rejection

STAGE = "volumes"
USUAL = {
    "plate": ("plate_map_name", "plate_map", "platemap", "compound_plate_barcode", "plate", "plate_id"),
    "well": ("well_position", "well", "well_id", "well_name"),
    "row": ("row", "well_row"),
    "column": ("column", "col", "well_column", "well_col"),
    "compound": ("inchikey", "broad_sample", "compound", "compound_id", "jcp2022", "sample_id"),
    "concentration": ("mmoles_per_liter", "concentration", "dose"),
    "unit": ("concentration_unit", "concentration_units", "dose_unit", "unit", "units"),
    "solvent": ("solvent", "vehicle"),
    "control": ("control_type", "control", "pert_type"),
    "moa": ("moa", "mechanism_of_action"),
    "cell_line": ("cell_line", "cell_id", "cell_type"),
    "replicate": ("replicate", "replicate_id"),
}
"""Usual names of columns by ours, the first of several being taken."""
_UNITS = {"mmoles_per_liter": "mM"}
"""Units that the name of a column says."""
_CONTROLS = {
    "negcon": "negative", "negative": "negative", "negative_control": "negative",
    "poscon": "positive", "positive": "positive", "positive_control": "positive",
    "poscon_cp": "positive", "poscon_diverse": "positive", "poscon_orf": "positive",
    "empty": "empty", "trt": "treated", "treated": "treated", "treatment": "treated",
}  # fmt: skip
_NOTHING = frozenset({"", "na", "n/a", "nan", "null", "none"})
_BARCODES = (("assay_plate_barcode", "barcode", "plate"), ("plate_map_name", "platemap", "plate_map"))


@dataclass(frozen=True)
class Entry:
    """What one well of a plate map holds.

    ``compound`` is an InChIKey or another id, ``concentration`` in ``unit``; ``control`` is ``negative``, ``positive``, ``empty``,
    or None for a treated well. What the table does not say is None; ``others`` are its further columns.
    """

    plate_map: str
    well: str
    row: int
    column: int
    compound: str | None = None
    concentration: float | None = None
    unit: str | None = None
    solvent: str | None = None
    control: str | None = None
    moa: str | None = None
    cell_line: str | None = None
    replicate: str | None = None
    others: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Maps:
    """Plate maps by name and well, and the name of the map by the barcode of the plate (None: a plate is named as its map).

    ``every`` is the one map that holds for every plate: the only table, where it names no plate and there are no barcodes.
    """

    wells: Mapping[str, Mapping[str, Entry | Refused]]
    barcodes: Mapping[str, str | Refused] | None = None
    every: str | None = None


def read(
    tables: Iterable[tuple[str, bytes]], settings: PlateMaps, barcodes: bytes | None = None, size: int = 1536
) -> tuple[Maps, list[Rejection]]:
    """The maps of ``tables``, (URI or path, bytes) each, and a rejection per table or row that cannot be read.

    A table may hold several maps; one without a column for the plate is named as its file. ``size`` is the number of wells of a
    plate. Reasons: ``BROKEN_PLATEMAP``, and ``BAD_WELL`` for a row that no well of a plate is. Raises ``BROKEN_PLATEMAP`` for a
    table of barcodes that cannot be read, and :class:`InputError` when the config names a column that a table lacks.
    """
    rejections: list[Rejection] = []
    found: dict[str, dict[str, Entry | Refused]] = {}
    tables = list(tables)
    nameless = len(tables) == 1 and barcodes is None and "plate" not in settings.constants
    for uri, data in tables:
        try:
            rows, known, others = _table(data, settings, uri)
        except Refused as e:
            rejections.append(e.at(uri, STAGE))
            continue
        nameless = nameless and "plate" not in known
        stem = posixpath.basename(uri).removesuffix(".gz").rpartition(".")[0] or posixpath.basename(uri)
        for cells in rows:
            try:
                _add(found, cells, known, others, settings, stem, size)
            except Refused as e:
                rejections.append(e.at(uri, STAGE))
    every = next(iter(found), None) if nameless else None
    return Maps(found, None if barcodes is None else _read_barcodes(barcodes), every), rejections


def entry(maps: Maps, plate: str | None, well: str) -> Entry:
    """What is in a well of a plate, which is named by its barcode, or by its map where there are no barcodes; of any plate, where
    one map holds for every one.

    Raises ``UNKNOWN_BARCODE`` (with the nearest known), ``NO_ENTRY``, ``TWO_ENTRIES``, ``EMPTY_SAMPLE`` or ``BAD_ENTRY``.
    """
    name = maps.every if maps.every is not None else plate or ""
    if maps.barcodes is not None:
        known = maps.barcodes.get(name)
        if known is None:
            raise Refused("UNKNOWN_BARCODE", f"no plate map for the barcode {name!r}{_nearest(name, maps.barcodes)}")
        if isinstance(known, Refused):
            raise known
        if known not in maps.wells:
            raise Refused("UNKNOWN_BARCODE", f"plate {name} has the map {known!r}, which no table is{_nearest(known, maps.wells)}")
        name = known
    elif name not in maps.wells:
        raise Refused("UNKNOWN_BARCODE", f"no plate map is named {name!r}{_nearest(name, maps.wells)}")
    found = maps.wells[name].get(wells.name(*wells.parse(well)))
    if found is None:
        raise Refused("NO_ENTRY", f"plate map {name} has no well {well}")
    if isinstance(found, Refused):
        raise found
    return found


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.0)
    return f"; the nearest is {near[0]!r}" if near else ""


def _rows(data: bytes) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of a table whose cells are parted by tabs, semicolons or commas."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused("BROKEN_PLATEMAP", "the table is no text in UTF-8") from None
    if "\0" in text:
        raise Refused("BROKEN_PLATEMAP", "the table holds zero bytes")
    first = text.lstrip("\r\n").partition("\n")[0]
    delimiter = max("\t,;", key=first.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    table: list[list[str]] = []
    try:
        for cells in rows:
            cells = [c.strip() for c in cells]
            if not any(cells):
                continue
            if table and len(cells) != len(table[0]):
                message = f"line {rows.line_num} has {len(cells)} cells, the header {len(table[0])}"
                raise Refused("BROKEN_PLATEMAP", message)
            table.append(cells)
    except csv.Error as e:
        raise Refused("BROKEN_PLATEMAP", f"line {rows.line_num}: {e}") from None
    if len(table) < 2:
        raise Refused("BROKEN_PLATEMAP", "the table has no rows")
    header = table[0]
    twice = sorted({h for h in header if header.count(h) > 1})
    if twice:
        raise Refused("BROKEN_PLATEMAP", f"a column occurs twice: {', '.join(map(repr, twice))}")
    return header, table[1:]


def _usual(header: str) -> str:
    return header.strip().lower().removeprefix("metadata_").replace(" ", "_")


def _table(data: bytes, settings: PlateMaps, uri: str) -> tuple[list[dict[str, str]], dict[str, str], list[str]]:
    """Rows by header, the header of each of our columns, and the other headers."""
    header, rows = _rows(data)
    known: dict[str, str] = {}
    for ours, theirs in settings.columns.items():
        if theirs not in header:
            near = difflib.get_close_matches(theirs, header, 1, 0.0)
            raise InputError(f"plate map {uri} has no column {theirs!r} for {ours}; did you mean {near[0]!r}?")
        known[ours] = theirs
    by_usual = {_usual(h): h for h in reversed(header)}
    taken = set(known.values())
    for ours, usual in USUAL.items():
        if ours in known or ours in settings.constants:
            continue
        found = next((by_usual[u] for u in usual if u in by_usual and by_usual[u] not in taken), None)
        if found is not None:
            known[ours] = found
    if "well" not in known and not {"row", "column"} <= set(known):
        raise Refused("BROKEN_PLATEMAP", f"no column for the well, or for row and column, among {', '.join(header)[:200]}")
    if "well" in known and "well" not in settings.columns and {"row", "column"} <= set(settings.columns):
        del known["well"]
    if "well" in known:
        for ours in {"row", "column"} - set(settings.columns):
            known.pop(ours, None)
    others = [h for h in header if h not in set(known.values())]
    return [dict(zip(header, cells, strict=True)) for cells in rows], known, others


def _add(
    found: dict[str, dict[str, Entry | Refused]],
    cells: dict[str, str],
    known: dict[str, str],
    others: list[str],
    settings: PlateMaps,
    stem: str,
    size: int,
):
    said = {k: v for k, v in settings.constants.items() if not _is_nothing(v)}
    said |= {ours: cells[theirs] for ours, theirs in known.items() if not _is_nothing(cells[theirs])}
    plate = said.get("plate") or stem
    by_well = found.setdefault(plate, {})
    try:
        if "well" in known:
            row, column = wells.parse(said.get("well", ""), size)
        else:
            number = said.get("column", "")
            column = int(number) if number.isascii() and number.isdigit() and len(number) < 4 else 0
            row, column = wells.within(wells.row_number(said.get("row", "")), column, size)
    except Refused as e:
        raise Refused(e.reason, f"plate map {plate}: {e.message}") from None
    well = wells.name(row, column)
    if well in by_well:
        by_well[well] = Refused("TWO_ENTRIES", f"plate map {plate} has more than one entry for the well {well}")
        return
    try:
        by_well[well] = _entry(said, known, settings, (plate, well, row, column), {h: cells[h] for h in others})
    except Refused as e:
        by_well[well] = Refused(e.reason, f"plate map {plate}, well {well}: {e.message}")


def _is_nothing(text: str) -> bool:
    return text.strip().lower() in _NOTHING


def _entry(said: dict[str, str], known: dict[str, str], settings: PlateMaps, place: tuple, others: dict[str, str]) -> Entry:
    compound, solvent = said.get("compound"), said.get("solvent")
    control = _control(said, known, settings)
    concentration = None
    if "concentration" in said:
        try:
            concentration = float(said["concentration"].replace("_", "?"))  # Python reads 1_0 as 10
        except ValueError:
            concentration = math.nan
        if not 0 <= concentration < math.inf:
            raise Refused("BAD_ENTRY", f"a concentration of {said['concentration'][:40]!r}, wanted a number that is not negative")
    unit = said.get("unit") or _UNITS.get(_usual(known.get("concentration", "")))
    rest = {k: said.get(k) for k in ("moa", "cell_line", "replicate")}
    return Entry(
        *place, compound, concentration, unit if concentration is not None else None, solvent,
        None if control == "treated" else control, **rest, others=others,
    )  # fmt: skip


def _control(said: dict[str, str], known: dict[str, str], settings: PlateMaps) -> str | None:
    """A ``Treatment`` of the config or None: by the column of controls, else by the solvent of a well without a compound."""
    value = said.get("control")
    kind = None
    if value is not None:
        kind = settings.controls.get(value) or _CONTROLS.get(value.lower())
        if kind is None:
            raise Refused("BAD_ENTRY", f"a control of kind {value[:40]!r}, which controls of the config do not name")
    if "compound" in said or "compound" not in known or kind not in (None, "treated"):
        return kind
    solvent = said.get("solvent", "")
    by_solvent = {k.strip().lower(): v for k, v in settings.blank.items()}
    if solvent.lower() not in by_solvent:
        what = f"only the solvent {solvent[:40]}" if solvent else "neither a compound nor a solvent"
        raise Refused("EMPTY_SAMPLE", f"{what}; blank of the config says what such a well is, and does not name it")
    return by_solvent[solvent.lower()]


def _read_barcodes(data: bytes) -> dict[str, str | Refused]:
    header, rows = _rows(data)
    usual = [_usual(h) for h in header]
    places = [next((usual.index(name) for name in names if name in usual), None) for names in _BARCODES]
    if None in places or places[0] == places[1]:
        raise Refused("BROKEN_PLATEMAP", f"no columns Assay_Plate_Barcode and Plate_Map_Name among {', '.join(header)[:200]}")
    found: dict[str, str | Refused] = {}
    for cells in rows:
        barcode, name = (cells[n] for n in places)
        if _is_nothing(barcode):
            continue
        if _is_nothing(name):
            found[barcode] = Refused("UNKNOWN_BARCODE", f"the table of barcodes names no map for {barcode}")
        elif found.setdefault(barcode, name) != name:
            found[barcode] = Refused("TWO_ENTRIES", f"the table of barcodes has more than one map for {barcode}")
    return found
