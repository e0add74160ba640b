"""The frames of one DICOM object: where each lies, and what tells it from the others.

Enhanced objects say so in functional groups (PS3.3 C.7.6.16), nuclear medicine in vectors (C.8.4.8), a Siemens mosaic in a
private header. All of them end as the same facts per frame, so that a frame is a slice like any other for
:mod:`sparkmed.formats.series`.
"""

import math
from typing import Any

import numpy as np
from pydicom.datadict import keyword_for_tag

from sparkmed.formats.header import Header, code
from sparkmed.rejection import Refused


def _diffusion_direction(item: Header) -> list[float] | None:
    inner = item.item("DiffusionGradientDirectionSequence")
    return inner.numbers("DiffusionGradientOrientation", 3) if inner else None


_GROUPS = {
    "PlanePositionSequence": {"position": lambda i: i.numbers("ImagePositionPatient", 3)},
    "PlaneOrientationSequence": {"orientation": lambda i: i.numbers("ImageOrientationPatient", 6)},
    "PixelMeasuresSequence": {
        "spacing": lambda i: i.numbers("PixelSpacing", 2),
        "gap": lambda i: i.number("SpacingBetweenSlices"),
        "thickness": lambda i: i.number("SliceThickness"),
    },
    "PixelValueTransformationSequence": {
        "slope": lambda i: i.number("RescaleSlope"),
        "intercept": lambda i: i.number("RescaleIntercept"),
    },
    "FrameContentSequence": {
        "stack": lambda i: i.mark("StackID"),
        "temporal": lambda i: i.integer("TemporalPositionIndex"),
        "acquisition": lambda i: i.integer("FrameAcquisitionNumber"),
        "index": lambda i: i.integers("DimensionIndexValues"),
    },
    "TemporalPositionSequence": {"time_offset": lambda i: i.number("TemporalPositionTimeOffset")},
    "CardiacSynchronizationSequence": {"trigger": lambda i: i.number("NominalCardiacTriggerDelayTime")},
    "MREchoSequence": {"echo": lambda i: i.number("EffectiveEchoTime")},
    "MRDiffusionSequence": {"b": lambda i: i.number("DiffusionBValue"), "direction": _diffusion_direction},
    **{
        name: {
            "type": lambda i: i.texts("FrameType") or None,
            "component": lambda i: i.text("ComplexImageComponent") or None,
        }
        for name in (
            "MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence", "XAXRFFrameCharacteristicsSequence",
        )
    },
}  # fmt: skip
"""Facts by functional group: PS3.3 C.7.6.16.2 and, for MR, CT and PET, C.8.13 to C.8.22."""

_PLACED = {"StackID", "InStackPositionNumber", "ImagePositionPatient", "TemporalPositionIndex", "ImageOrientationPatient"}
"""Dimensions that have a fact of their own."""


def functional_groups(h: Header, frames: int) -> list[dict[str, Any]]:
    """Facts of each frame of an enhanced object, empty for another; groups of a frame go before the shared ones.

    A dimension without a fact of its own is ``dim:<keyword>``. Raises ``BAD_SHAPE`` when the groups are not one per frame.
    """
    per_frame, shared = h.items("PerFrameFunctionalGroupsSequence"), h.item("SharedFunctionalGroupsSequence")
    if not per_frame and shared is None:
        return []
    if per_frame and len(per_frame) != frames:
        raise Refused("BAD_SHAPE", f"functional groups of {len(per_frame)} frames for {frames} frames")
    common = _facts(shared) if shared else {}
    dimensions = [_dimension(item) for item in h.items("DimensionIndexSequence")]
    found = []
    for item in per_frame or [None] * frames:
        facts = common | (_facts(item) if item else {})
        index = facts.get("index") or []
        if len(index) == len(dimensions):
            facts |= {f"dim:{name}": v for name, v in zip(dimensions, index, strict=True) if name not in _PLACED}
        found.append(facts)
    return found


def _facts(groups: Header) -> dict[str, Any]:
    found = {}
    for name, readers in _GROUPS.items():
        item = groups.item(name)
        if item:
            found |= {fact: value for fact, read in readers.items() if (value := read(item)) is not None}
    return found


def _dimension(item: Header) -> str:
    pointer = item.tag_value("DimensionIndexPointer")
    return keyword_for_tag(pointer) or f"{pointer:08x}"


def nuclear(h: Header, frames: int) -> list[dict[str, Any]]:
    """Facts of each frame of a nuclear medicine object by its vectors: place along the normal, time, energy window.

    A reconstruction has the place of its first slice in the detector information, the others follow along the normal at
    the signed distance between slices (PS3.3 C.8.4.15).
    """
    detector = h.item("DetectorInformationSequence")
    vectors = {
        "slice": "SliceVector", "temporal": "TimeSlotVector", "dim:energy": "EnergyWindowVector", "dim:detector": "DetectorVector",
        "dim:phase": "PhaseVector", "dim:rotation": "RotationVector", "dim:angle": "AngularViewVector",
    }  # fmt: skip
    found: list[dict[str, Any]] = [{} for _ in range(frames)]
    for fact, keyword in vectors.items():
        values = h.integers(keyword)
        if values is None:
            continue
        if len(values) != frames:
            raise Refused("BAD_SHAPE", f"{keyword} has {len(values)} values for {frames} frames")
        for facts, value in zip(found, values, strict=True):
            facts[fact] = value
    position = detector.numbers("ImagePositionPatient", 3) if detector else None
    orientation = detector.numbers("ImageOrientationPatient", 6) if detector else None
    gap = h.number("SpacingBetweenSlices") or h.number("SliceThickness")
    if position and orientation and gap and all("slice" in f for f in found):
        normal = np.cross(orientation[:3], orientation[3:])
        for facts in found:
            facts["position"] = (np.asarray(position) + normal * gap * (facts["slice"] - 1)).tolist()
            facts["orientation"] = orientation
    for facts in found:
        facts.pop("slice", None)
    return found


def mosaic(h: Header, facts: dict[str, Any], rows: int, columns: int) -> tuple[int, list[dict[str, Any]]]:
    """(tiles along an edge, facts of each tile) of a Siemens mosaic: slices of one volume, row by row in one square image.

    The image position is that of a single image as large as the mosaic around the same centre; slices follow along the
    normal that the private header names. Raises ``MOSAIC`` when that header does not say how many slices there are.
    """
    csa = csa_values(h.private_bytes(0x00291010, "SIEMENS CSA HEADER"))
    count = csa.get("NumberOfImagesInMosaic") or h.private(0x0019100A, "SIEMENS MR HEADER", "US")
    if not count or not 1 <= count[0] <= 10_000:
        raise Refused("MOSAIC", "a Siemens mosaic whose private header does not say how many slices it holds")
    position, orientation, spacing = facts["position"], facts["orientation"], facts["spacing"]
    tiles = int(count[0])
    edge = math.isqrt(tiles - 1) + 1
    if rows % edge or columns % edge:
        raise Refused("MOSAIC", f"a mosaic of {rows} rows and {columns} columns cannot hold {tiles} tiles in rows of {edge}")
    if not (position and orientation and spacing):
        return edge, [{} for _ in range(tiles)]
    along_row, along_column = np.asarray(orientation[:3]), np.asarray(orientation[3:])
    normal = np.cross(along_row, along_column)
    direction = csa.get("SliceNormalVector")
    if direction and len(direction) == 3 and float(normal @ direction) < 0:
        normal = -normal
    gap = abs(facts["gap"] or facts["thickness"] or 0)
    if tiles > 1 and (not gap or not direction):
        raise Refused("MOSAIC", "a Siemens mosaic that does not say how far apart its slices are, or in which direction")
    first = np.asarray(position, np.float64)
    first = first + along_row * spacing[1] * (columns - columns // edge) / 2 + along_column * spacing[0] * (rows - rows // edge) / 2
    return edge, [{"position": (first + normal * gap * n).tolist()} for n in range(tiles)]


def csa_values(data: bytes) -> dict[str, list[float]]:
    """The numeric values of a Siemens CSA header (SV10), as nibabel documents it; empty when it is none.

    >>> csa_values(b"")
    {}
    """
    found: dict[str, list[float]] = {}
    if data[:4] != b"SV10" or len(data) < 16:
        return found
    count, at = int.from_bytes(data[8:12], "little"), 16
    for _ in range(min(count, 1000)):
        if at + 84 > len(data):
            break
        name = data[at : at + 64].split(b"\0")[0].decode("latin-1")
        items = int.from_bytes(data[at + 76 : at + 80], "little")
        at += 84
        values = []
        for _ in range(min(items, 10_000)):
            length = int.from_bytes(data[at + 4 : at + 8], "little")
            at += 16
            text = data[at : at + length].split(b"\0")[0].strip()
            at += -(-length // 4) * 4
            if at > len(data) + 4:
                return found
            if text:
                values.append(text)
        try:
            numbers = [float(v) for v in values]
        except ValueError:
            continue
        if numbers and all(map(math.isfinite, numbers)):
            found[code(name)] = numbers
    return found


def slide(h: Header, frames: int, rows: int, columns: int) -> list[dict[str, Any]]:
    """Facts of a level of a whole slide, one for all of its frames: PS3.3 C.8.12.4. ``matrix`` is (columns, rows) of the whole
    picture, ``tiles`` the column and row at which each frame begins; the place is that of the first pixel on the slide."""
    matrix = h.integer("TotalPixelMatrixColumns"), h.integer("TotalPixelMatrixRows")
    layers = (h.integer("TotalPixelMatrixFocalPlanes", 1) or 1) * (h.integer("NumberOfOpticalPaths", 1) or 1)
    if layers > 1:
        raise Refused("TOO_MANY_DIMENSIONS", f"a slide of {layers} focal planes or optical paths")
    if not all(matrix) or min(matrix) < 1:
        raise Refused("BAD_SHAPE", f"a slide of {matrix[0]} columns and {matrix[1]} rows")
    if "ConcatenationUID" in h:
        raise Refused("SLIDE_IN_PARTS", "a level of a slide that is cut into several objects")
    if min(matrix) * max(matrix) > (64 << 20) + 256 * frames * rows * columns:
        raise Refused("TOO_LARGE", f"a slide of {matrix[0]} x {matrix[1]} pixels, of which there are {frames} tiles")
    placed = [item.item("PlanePositionSlideSequence") for item in h.items("PerFrameFunctionalGroupsSequence")]
    if placed and not all(placed) and any(placed):
        raise Refused("BAD_SHAPE", f"{sum(p is None for p in placed)} of {len(placed)} tiles do not say where they lie")
    if placed and all(placed):
        names = ("ColumnPositionInTotalImagePixelMatrix", "RowPositionInTotalImagePixelMatrix")
        tiles = [[(item.integer(n) or 0) - 1 for n in names] for item in placed]
    else:  # TILED_FULL: row by row
        across = -(-matrix[0] // columns)
        tiles = [[columns * (n % across), rows * (n // across)] for n in range(frames)]
        if frames != across * -(-matrix[1] // rows):
            raise Refused("BAD_SHAPE", f"{frames} tiles, the slide takes {across} x {-(-matrix[1] // rows)}")
    if len(set(map(tuple, tiles))) < len(tiles):
        raise Refused("TOO_MANY_DIMENSIONS", "several tiles of a slide lie at one place: focal planes or optical paths")
    inside = all(0 <= i < matrix[0] and 0 <= j < matrix[1] for i, j in tiles)
    if len(tiles) != frames or not inside:
        raise Refused("BAD_SHAPE", f"{len(tiles)} places for {frames} tiles, or one beyond {matrix[0]} x {matrix[1]} pixels")
    shared, origin = h.item("SharedFunctionalGroupsSequence"), h.item("TotalPixelMatrixOriginSequence")
    facts = _facts(shared) if shared else {}
    offsets = [origin.number(f"{axis}OffsetInSlideCoordinateSystem") for axis in "XY"] if origin else [None]
    if None not in offsets:
        facts |= {"position": [*offsets, 0.0], "orientation": h.numbers("ImageOrientationSlide", 6)}
    return [facts | {"matrix": list(matrix), "tiles": tiles}]


def folded(frames: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, list]]:
    """(facts that are equal in all frames, the others as a list over frames); None where a frame lacks one.

    >>> folded([{"echo": 3.0, "b": 0.0}, {"echo": 3.0}])
    ({'echo': 3.0}, {'b': [0.0, None]})
    """
    same, differing = {}, {}
    for name in dict.fromkeys(name for f in frames for name in f):
        values = [f.get(name) for f in frames]
        if all(v == values[0] for v in values):
            same[name] = values[0]
        else:
            differing[name] = values
    return same, differing
