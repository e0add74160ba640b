"""RTSTRUCT: contours in the planes of an image (PS3.3 A.19, C.8.8.6) as voxels."""

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pydicom

from sparkmed.formats import dicom, identifiers
from sparkmed.formats.header import uid
from sparkmed.formats.segmentation import Canvas, Legible, index_of, numbered, tolerances
from sparkmed.imaging import geometry
from sparkmed.imaging.geometry import Grid
from sparkmed.rejection import Refused

_XOR = "CLOSEDPLANAR_XOR"
_CLOSED = ("CLOSED_PLANAR", _XOR)
_WITHOUT_INSIDE = ("POINT", "OPEN_PLANAR", "OPEN_NONPLANAR")
_EDGES = 4096
"""Edges of a polygon that are looked at in one go: their crossings with all rows are held."""


def read_facts(stream) -> dict[str, Any]:
    """Facts of an RTSTRUCT for its :class:`Instance`: ``segments`` (number, label and frame of reference of each ROI),
    ``references`` (pairs of SeriesInstanceUID and FrameOfReferenceUID), ``content`` (digest of its contours). Names as
    :class:`~segmentation.Legible` has them. Raises ``BAD_VALUE``."""
    with dicom._quiet():
        stream, _ = dicom._inflated(stream)
        tags = ["StructureSetROISequence", "ReferencedFrameOfReferenceSequence", "ROIContourSequence"]
        ds = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=[*tags, *identifiers.OF_AN_OBJECT], force=True)
        legible = Legible(ds)
        segments = [
            {"number": _number(r.get("ROINumber")), "label": legible(r.get("ROIName"))}
            | ({"frame": frame} if (frame := uid(r.get("ReferencedFrameOfReferenceUID"))) else {})
            for r in ds.get(tags[0]) or []
        ]
        references = [
            (uid(series.get("SeriesInstanceUID")), uid(frame.get("FrameOfReferenceUID")))
            for frame in ds.get(tags[1]) or []
            for study in frame.get("RTReferencedStudySequence") or []
            for series in study.get("RTReferencedSeriesSequence") or []
        ]
        content = hashlib.sha256()
        for roi in ds.get(tags[2]) or []:
            content.update(f"ROI {_number(roi.get('ReferencedROINumber'))}".encode())
            for contour in roi.get("ContourSequence") or []:
                content.update(_stored(contour) + b"\n")
        return {
            "segments": numbered(segments),
            "references": sorted(r for r in set(references) if r[0]),
            "content": content.hexdigest()[:16],
        }


def read_array(data: bytes, facts: Mapping[str, Any], grid: Grid) -> np.ndarray:
    """The ROIs of an RTSTRUCT painted on ``grid`` as :class:`~sparkmed.formats.segmentation.Canvas` says.

    A voxel is in a ROI when its centre is inside an odd number of its closed contours of that slice, so a contour inside another
    is a hole; a centre on an edge is inside at the lower ends of I and J only, so neighbours that share an edge share no voxel.
    For CLOSEDPLANAR_XOR the standard has it so (PS3.3 C.8.8.6.3). For CLOSED_PLANAR, whose holes it cuts by a keyhole, planning
    systems write holes in the same way; there the same contour twice counts once, and contours that cross are refused, since
    they are one area to the standard and a hole where they overlap to those systems. What reaches over the border of a slice is cut
    off. Points and open contours have no inside and are passed over. Raises :class:`Refused` ``LABEL_GRID_MISMATCH`` with the
    distance in mm for a contour in no slice of the image, ``BAD_VALUE``.
    """
    with dicom._quiet():
        stream, _ = dicom._inflated(io.BytesIO(data))
        ds = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=["ROIContourSequence"], force=True)
        canvas = Canvas(facts, grid)
        for roi in ds.get("ROIContourSequence") or []:
            number = _number(roi.get("ReferencedROINumber"))
            if not canvas.wants(number):
                continue
            slices: dict[int, list[np.ndarray]] = defaultdict(list)
            kinds = {_kind(contour) for contour in roi.get("ContourSequence") or []}
            for contour in roi.get("ContourSequence") or []:
                if _kind(contour) in _CLOSED:
                    k, polygon = _in_slice(_points(contour), grid)
                    slices[k].append(polygon)
            for k, polygons in slices.items():
                fill = inside if kinds & {*_CLOSED} == {_XOR} else _nested
                canvas.paint(number, (slice(None), slice(None), k), fill(polygons, grid.spatial_shape[:2]))
        return canvas.finished()


def _kind(contour) -> str:
    kind = contour.get("ContourGeometricType")
    if kind not in (*_CLOSED, *_WITHOUT_INSIDE):
        raise Refused("BAD_VALUE", "ContourGeometricType of a contour is missing or none of the standard's")
    return kind


def _nested(polygons: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """:func:`inside` of polygons each of which lies within another or beside it; raises ``BAD_VALUE`` for two that cross. Those
    with the same corners are one."""
    own = list({np.sort(p.view([("i", float), ("j", float)]), axis=0).tobytes(): p for p in polygons}.values())
    if len(own) == 1:
        return inside(own, shape)
    innermost, filled = np.zeros(shape, np.int32), np.zeros(shape, bool)
    masks = sorted((inside([p], shape) for p in own), key=np.count_nonzero, reverse=True)
    for n, mask in enumerate(masks, start=1):
        around = innermost[mask]
        if around.size and (around != around[0]).any():
            raise Refused("BAD_VALUE", "two CLOSED_PLANAR contours of one ROI cross, and nothing says what is inside")
        innermost[mask] = n
        filled ^= mask
    return filled


def _number(value) -> int | None:
    return None if value is None or value == "" else int(value)


def _stored(contour) -> bytes:
    """Coordinates as text: parsing them value by value takes the library seconds."""
    element = contour.get_item("ContourData")
    return b"" if element is None or not element.value else element.value.strip(b" \0")


def _points(contour) -> np.ndarray:
    """(n, 3) mm in DICOM's LPS."""
    numbers = _stored(contour)
    points = np.array(numbers.split(b"\\") if numbers else [], np.float64)
    if points.size % 3 or points.size < 9 or not np.isfinite(points).all():
        raise Refused("BAD_VALUE", f"a closed contour of {points.size} coordinates, wanted three for each of three points or more")
    return points.reshape(-1, 3)


def _in_slice(points: np.ndarray, grid: Grid) -> tuple[int, np.ndarray]:
    """The slice of a contour, and its (n, 2) corners in voxels along I and J."""
    index = index_of(geometry.lps_to_ras(np.vstack([points.T, np.ones(len(points))])), grid)
    k = int(np.rint(np.clip(np.median(index[2]), 0, grid.spatial_shape[2] - 1)))
    away = float(np.abs(index[2] - k).max()) * geometry.spacing(grid.affine)[2]
    limit = tolerances(grid)[2]
    if away > limit:
        raise Refused("LABEL_GRID_MISMATCH", f"a contour lies up to {away:.3g} mm off the nearest slice, tolerance {limit:.2g} mm")
    return k, np.ascontiguousarray(index[:2].T)


def inside(polygons: Iterable[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """(I, J) boolean: the points (i, j) that are inside an odd number of ``polygons``, each (n, 2) corners in order.

    Even-odd rule along I: an edge from below row j to it or above toggles all i at or beyond where it crosses.

    >>> inside([np.array([[0, 0], [2, 0], [2, 2], [0, 2]])], (3, 3)).astype(int).tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    """
    count, rows = shape
    toggles = np.zeros((count + 1) * rows, np.int64)
    for polygon in polygons:
        ends = np.roll(polygon, -1, axis=0)
        for first in range(0, len(polygon), _EDGES):
            a, b = polygon[first : first + _EDGES], ends[first : first + _EDGES]
            low, high = (np.clip(np.ceil(f(a[:, 1], b[:, 1])), 0, rows).astype(int) for f in (np.minimum, np.maximum))
            crossed = high - low
            edge = np.repeat(np.arange(len(a)), crossed)
            j = np.arange(len(edge)) - np.repeat(np.cumsum(crossed) - crossed, crossed) + low[edge]
            (x0, y0), (x1, y1) = a[edge].T, b[edge].T
            i = np.clip(np.ceil(x0 + (j - y0) * (x1 - x0) / (y1 - y0)), 0, count).astype(int)
            toggles += np.bincount(i * rows + j, minlength=len(toggles))
    return np.cumsum(toggles.reshape(count + 1, rows), axis=0)[:count] % 2 == 1
