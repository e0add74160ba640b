"""Segmentations (DICOM SEG and RTSTRUCT) on the grid of the images that they refer to.

A segmentation object names a series, so where it lies can be told only beside the images of that series: :func:`series.assemble`
makes headers without a grid, :func:`on_grid` gives them that of an image, and :class:`Canvas` is what their readers paint on.
No value is interpolated: a voxel of the object is a voxel of the image, or the object is refused. For an image that was resampled
to a regular grid that holds of its slices as they were acquired (:func:`acquired`), from which :func:`regular` takes the nearest.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparkmed.config import folded
from sparkmed.formats import dicom, identifiers, series
from sparkmed.formats.instance import VolumeHeader, to_json
from sparkmed.imaging import geometry
from sparkmed.imaging.geometry import Grid
from sparkmed.rejection import Refused, Rejection

FORMATS = frozenset(dicom.SEGMENTATIONS.values())
"""``VolumeHeader.format`` of a segmentation."""


WITHHELD = "\N{REPLACEMENT CHARACTER}"
"""Stands for the name of a segment that cannot be read, or that names the patient."""


def is_segmentation(header: VolumeHeader) -> bool:
    return header.format in FORMATS


def images_of(segmentation: VolumeHeader, images: Mapping[str, Sequence[VolumeHeader]]) -> list[VolumeHeader]:
    """The volumes that a segmentation refers to; ``images`` are volumes by SeriesInstanceUID.

    When a series UID is used in several studies, the segmentation's own study counts.
    """
    facts = segmentation.facts
    found = [image for uid in sorted({uid for uid, _ in facts["references"]}) for image in images.get(uid, ())]
    if len({image.facts.get("study") for image in found}) > 1:
        found = [image for image in found if image.facts.get("study") == facts.get("study")]
    return found


def by_series(headers: Iterable[VolumeHeader]) -> dict[str, list[VolumeHeader]]:
    """Image volumes by SeriesInstanceUID."""
    images: dict[str, list[VolumeHeader]] = defaultdict(list)
    for h in headers:
        if h.series_uid and not is_segmentation(h):
            images[h.series_uid].append(h)
    return images


def on_grid(segmentation: VolumeHeader, image: VolumeHeader, classes: Mapping[int, int] | None = None) -> VolumeHeader:
    """The header of a segmentation as a volume on the grid of ``image``: (segments, I, J, K), 1 where the segment is.

    With ``classes`` (class index by segment number) a class map (1, I, J, K) instead; other segments are background. Segments that
    name another frame of reference than the image's are left out. Raises :class:`Refused`: ``MIXED_PATIENT``,
    ``FRAME_OF_REFERENCE`` (also when no segment is left, or none of a class), ``LABEL_GRID_MISMATCH`` when a plane of it is none
    of the image's (as acquired, where it was resampled), ``LABEL_WITHOUT_SEGMENT``. What only its pixels or contours show is found
    when it is read.
    """
    facts = segmentation.facts
    if segmentation.patient and image.patient and segmentation.patient != image.patient:
        raise Refused("MIXED_PATIENT", "the segmentation is of another patient than the series that it refers to")
    frames = {frame for uid, frame in facts["references"] if uid == image.series_uid and frame}
    if frames and image.facts.get("frame") not in (*frames, None):
        raise Refused("FRAME_OF_REFERENCE", "the segmentation is in another frame of reference than the series that it refers to")
    if not facts["segments"]:
        raise Refused("LABEL_WITHOUT_SEGMENT", "the segmentation holds no segment")
    stacked = {k: image.facts[k] for k in ("resampled", "stacked") if k in image.facts}
    grid = acquired(stacked, Grid(image.affine, image.shape[1:]))
    for plane in facts.get("planes") or []:
        Plane.of(plane[:3], plane[3:9], plane[9:], facts["size"], grid)
    frame = image.facts.get("frame")
    here = [s for s in facts["segments"] if not frame or s.get("frame", frame) == frame]
    numbers = {s["number"] for s in here}
    elsewhere = [s["number"] for s in facts["segments"] if s["number"] not in numbers]
    lost = set((classes or {}).values()) - {c for n, c in (classes or {}).items() if n in numbers}
    if lost or not here:
        raise Refused("FRAME_OF_REFERENCE", f"{len(elsewhere)} segments are in another frame of reference than the series")
    keep: dict[str, Any] = {"segments": here, **stacked}
    if elsewhere:
        keep["elsewhere"] = elsewhere
    if classes:
        keep["segments"] = [{"number": s["number"]} for s in here]
        keep["classes"] = {str(n): c for n, c in sorted(classes.items()) if n in numbers}
    shape = (1 if classes else len(here), *image.shape[1:])
    content = json.dumps([segmentation.uid, image.affine, shape, keep.get("classes"), *elsewhere, *stacked.values()])
    uid = hashlib.sha256(content.encode()).hexdigest()[:32]
    return dataclasses.replace(segmentation, uid=uid, shape=shape, affine=image.affine, header=to_json(keep))


@dataclass(frozen=True, eq=False)
class Slices(Grid):
    """Slices that lie at uneven ``places``, in steps of a regular grid of this affine."""

    places: tuple[float, ...] = ()


def acquired(facts: Mapping[str, Any], grid: Grid) -> Grid:
    """Where the slices of an image of ``grid`` lay before it was resampled; ``facts`` are its own, or those of its segmentation."""
    stacked = facts.get("stacked")
    if not stacked:
        return grid
    shape = tuple(stacked["shape"][1:])
    if "places" in stacked:
        return Slices(grid.affine, shape, tuple(stacked["places"]))
    return Grid(stacked["affine"], shape)


def regular(array: np.ndarray, facts: Mapping[str, Any], grid: Grid) -> np.ndarray:
    """Labels (C, I, J, K) on :func:`acquired` slices on ``grid``, nearest neighbour; 0 where no slice reaches.

    Of a tilted gantry this undoes :func:`sliced` voxel for voxel, but for corners that no slice has. Of uneven spacing there are
    more planes than slices, and a plane takes the nearest slice.
    """
    slices = acquired(facts, grid)
    if slices is grid:
        return array
    if isinstance(slices, Slices):
        nearest = np.abs(np.subtract.outer(np.arange(grid.spatial_shape[2]), slices.places)).argmin(axis=1)
        return array[..., nearest]
    out = np.zeros((len(array), *grid.spatial_shape), array.dtype)
    for k, i, j in _shifts(slices, grid):
        out[:, i : i + array.shape[1], j : j + array.shape[2], k] = array[..., k]
    return out


def sliced(array: np.ndarray, facts: Mapping[str, Any], grid: Grid) -> np.ndarray:
    """(C, I, J, K) on ``grid`` as it lies on :func:`acquired` slices, nearest neighbour: what series.straightened did, undone."""
    slices = acquired(facts, grid)
    if slices is grid:
        return array
    if isinstance(slices, Slices):
        return array[..., np.clip(np.rint(slices.places).astype(int), 0, array.shape[3] - 1)]
    out = np.empty((len(array), *slices.spatial_shape), array.dtype)
    for k, i, j in _shifts(slices, grid):
        out[..., k] = array[:, i : i + out.shape[1], j : j + out.shape[2], k]
    return out


def _shifts(slices: Grid, grid: Grid) -> Iterator[tuple[int, int, int]]:
    """(k, i, j) of each tilted slice and the voxel of ``grid`` that its first one is; columns and rows keep size and direction."""
    to_grid, room = np.linalg.inv(grid.affine) @ slices.affine, np.subtract(grid.spatial_shape, slices.spatial_shape)[:2]
    for k in range(slices.spatial_shape[2]):
        i, j = np.clip(np.rint((to_grid @ [0, 0, k, 1])[:2]).astype(int), 0, room)
        yield k, int(i), int(j)


def index_of(points: np.ndarray, grid: Grid) -> np.ndarray:
    """(3, n) voxels of (4, n) points in RAS+ mm; of :class:`Slices` the third counts slices, and what lies between them is as many
    steps beside the nearest."""
    index = (np.linalg.inv(grid.affine) @ points)[:3]
    if isinstance(grid, Slices):
        nearest = np.abs(np.subtract.outer(index[2], grid.places)).argmin(axis=1)
        index[2] = nearest + index[2] - np.asarray(grid.places)[nearest]
    return index


def placed(headers: Sequence[VolumeHeader]) -> tuple[list[VolumeHeader], list[Rejection]]:
    """``headers`` with every segmentation on the grid of its images, once per different grid, and why the others have none.

    Reasons: those of :func:`on_grid`, ``LABEL_WITHOUT_IMAGE``.
    """
    images = by_series(headers)
    out, rejections = [h for h in headers if not is_segmentation(h)], []
    for h in headers:
        if not is_segmentation(h):
            continue
        fitting, problems = {}, []
        for image in images_of(h, images):
            try:
                fit = on_grid(h, image)
                fitting[fit.uid] = fit
            except Refused as e:
                problems.append(e)
        out += fitting.values()
        if not fitting:
            problem = problems[0] if problems else without_image(h)
            rejections += [problem.at(uri, series.STAGE) for uri in h.sources]
    return out, rejections


def without_image(segmentation: VolumeHeader) -> Refused:
    if not segmentation.facts["references"]:
        return Refused("LABEL_WITHOUT_IMAGE", "the segmentation refers to no series")
    return Refused("LABEL_WITHOUT_IMAGE", "the series that the segmentation refers to is not in the archive, or was refused")


class Legible:
    """Names in the segmentation object ``ds``: printable, Unicode NFC, at most 64 characters; :data:`WITHHELD` for one that cannot
    be decoded, or that says who somebody is: holds a word of the PatientName, the PatientID, or what
    :class:`~identifiers.Identifiers` finds of the object's other names, identifiers and places and of the birth date.

    Of a code name (digits, and neither ^ nor a blank between its parts) the words say nobody's name, only the whole does. Text
    without a declared character set is taken for UTF-8 where it is that, else for Latin-1.
    """

    def __init__(self, ds):
        self.ds = ds
        person = identifiers.of_an_object(ds)
        name, own = (_decoded(ds.get(k), ds).casefold() for k in ("PatientName", "PatientID"))
        code_name = re.search(r"\d", name) and not re.search(r"[\^ ]", name)
        self.parts = {own, name} if code_name else {own, *_words(name)}
        if code_name:
            del person["PatientName"]
        try:
            self.known = identifiers.Identifiers(person)
        except Refused:  # what cannot be read cannot be looked for
            self.known = None

    def __call__(self, value) -> str:
        text = _decoded(value, self.ds)
        if not text.isprintable() or WITHHELD in text or (text and self.known is None):
            return WITHHELD
        said, words = text.casefold(), _words(text.casefold())
        for part in self.parts:
            if len(part) > 1 and (part in words or (len(part.encode()) > 3 and part in said)):
                return WITHHELD
        return WITHHELD if text and self.known.found_in(text) else text[:64].strip()


def _decoded(value, ds) -> str:
    text = "\\".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value or "")
    if not ds.get("SpecificCharacterSet"):
        with contextlib.suppress(UnicodeError):
            text = text.encode("latin-1").decode()
    return unicodedata.normalize("NFC", " ".join(text.strip(" \0").split()))


def _words(text: str) -> set[str]:
    return set(re.split(r"[\W_]+", text))


def numbered(segments: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Segments in the order of their numbers, of which each is there and once; raises ``BAD_VALUE``."""
    found = sorted(segments, key=lambda s: s["number"] or 0)
    numbers = [s["number"] for s in found]
    if None in numbers or len(set(numbers)) < len(numbers):
        raise Refused("BAD_VALUE", f"{len(numbers)} segments have {len(set(numbers) - {None})} numbers")
    return found


def names(segment: Mapping[str, Any]) -> list[str]:
    """What a segment goes by: its label; else the meaning of the code of its type; else the value of that code."""
    value, _, meaning = segment.get("property") or ("", "", "")
    return [name for name in (segment.get("label", ""), meaning, value) if name]


def named(segments: Sequence[Mapping[str, Any]], wanted: Mapping[str, int]) -> dict[int, int]:
    """Class index by segment number, of the segments that ``wanted`` (class index by :func:`~sparkmed.config.folded` name) names.

    Raises ``LABEL_UNREADABLE`` when a name is :data:`WITHHELD`: it may be one that is wanted.

    >>> named([{"number": 3, "label": "Left Kidney"}, {"number": 4, "property": ["10200004", "SCT", "Liver"]}], {"liver": 1})
    {4: 1}
    """
    withheld = sum(WITHHELD in names(s) for s in segments)
    if withheld:
        message = f"names of {withheld} of {len(segments)} segments cannot be read, or name the patient"
        raise Refused("LABEL_UNREADABLE", message)
    classes = ((s["number"], [wanted[n] for n in map(folded, names(s)) if n in wanted]) for s in segments)
    return {number: found[0] for number, found in classes if found}


def merged(labels: Sequence[VolumeHeader]) -> VolumeHeader:
    """The header of one class map of several headers of :func:`on_grid` for one image, each of classes of its own."""
    if len(labels) == 1:
        return labels[0]
    lists = {n: tuple(x for h in labels for x in getattr(h, n)) for n in ("sources", "source_paths", "source_sha256")}
    uid = hashlib.sha256(json.dumps([h.uid for h in labels]).encode()).hexdigest()[:32]
    parts = [{"format": h.format, **h.facts} for h in labels]
    return dataclasses.replace(labels[0], uid=uid, header=to_json({"parts": parts}), **lists)


def together(maps: Iterable[np.ndarray]) -> np.ndarray:
    """One class map of those of :func:`merged` headers; raises ``LABEL_OVERLAP`` when they share voxels."""
    whole, shared = None, 0
    for array in maps:
        if whole is not None:
            shared += int(np.count_nonzero((whole != 0) & (array != 0)))
        whole = array if whole is None else np.maximum(whole, array)
    if shared:
        raise Refused("LABEL_OVERLAP", f"segments of different classes overlap in {shared} voxels")
    return whole


@dataclass(frozen=True)
class Plane:
    """Where a frame of (columns, rows) lies on a grid of (I, J, K) voxels: one index is a number, two are ranges."""

    index: tuple[int | slice, int | slice, int | slice]
    flips: tuple[slice, slice]
    turned: bool

    @classmethod
    def of(cls, position, orientation, spacing, size, grid: Grid) -> "Plane":
        """The plane of a frame with this ImagePositionPatient, ImageOrientationPatient and PixelSpacing (PS3.3 C.7.6.2.1.1).

        ``size`` is (columns, rows). Its pixels must be voxels of ``grid``, in any orientation. Raises :class:`Refused`
        ``LABEL_GRID_MISMATCH`` with the distance in mm when one is further than :func:`tolerances` from a voxel.
        """
        normal = np.cross(orientation[:3], orientation[3:])
        place = dicom.slice_affine(position, orientation, spacing, normal)
        frame = np.linalg.inv(grid.affine) @ place
        frame[:3, 3:] = index_of(place[:, 3:], grid)
        steps, start = np.rint(frame[:3, :2]), np.rint(frame[:3, 3])
        axes = np.abs(steps).argmax(axis=0)
        across = isinstance(grid, Slices) and 2 in axes  # uneven slices hold no frame that cuts them
        if not (np.abs(steps).sum(axis=0) == 1).all() or axes[0] == axes[1] or across:
            pixel, voxel = (" x ".join(f"{s:.4g}" for s in steps) for steps in (spacing[::-1], geometry.spacing(grid.affine)))
            message = f"a frame of {pixel} mm pixels does not lie along the {voxel} mm voxels of the image"
            raise Refused("LABEL_GRID_MISMATCH", message)
        last = np.array(size) - 1
        corners = np.array([[0, 0], [last[0], 0], [0, last[1]], last], np.float64).T  # (2, 4)
        nearest = start[:, None] + steps @ corners
        away = np.abs(frame[:3, 3:] + frame[:3, :2] @ corners - nearest).max(axis=1) * geometry.spacing(grid.affine)
        limits = tolerances(grid)
        if (away > limits).any():
            worst = int(np.argmax(away - limits))
            message = f"a frame lies {away[worst]:.3g} mm beside the voxels of the image, tolerance {limits[worst]:.2g} mm"
            raise Refused("LABEL_GRID_MISMATCH", message)
        low, high = nearest.min(axis=1), nearest.max(axis=1)
        if (low < 0).any() or (high >= grid.spatial_shape).any():
            reach = ", ".join(f"{a:.6g} to {b:.6g}" for a, b in zip(low, high, strict=True))
            raise Refused("LABEL_GRID_MISMATCH", f"a frame covers voxels {reach} of an image of {grid.spatial_shape} voxels")
        index: list[int | slice] = [int(n) for n in low]
        for axis, count in zip(axes, size, strict=True):
            index[axis] = slice(int(low[axis]), int(low[axis]) + int(count))
        flips = tuple(slice(None, None, int(steps[axis, n])) for n, axis in enumerate(axes))
        return cls(tuple(index), flips, bool(axes[0] > axes[1]))

    def turn(self, frame: np.ndarray) -> np.ndarray:
        """(columns, rows) of a frame as the voxels at ``index``."""
        frame = frame[self.flips]
        return frame.T if self.turned else frame


def tolerances(grid: Grid) -> np.ndarray:
    """(3,) mm by which a plane may lie beside the voxels of ``grid`` along I, J, K: rounding, never a shift that matters.

    :func:`~sparkmed.imaging.geometry.grid_tolerance`; along K as much as slices of a series may lie off their regular grid.
    """
    common, step = geometry.grid_tolerance(grid), geometry.spacing(grid.affine)[2]
    return np.array([common, common, max(common, min(series.tolerance(step), 0.25 * step))])


class Canvas:
    """The voxels of a segmentation as they are painted, segment by segment.

    ``facts`` are those of a header of :func:`on_grid`: one channel per segment, or a class map.
    """

    def __init__(self, facts: Mapping[str, Any], grid: Grid):
        classes = facts.get("classes")
        self.value = {int(n): c for n, c in classes.items()} if classes else None
        self.channel = {s["number"]: 0 if classes else c for c, s in enumerate(facts["segments"])}
        self.elsewhere = frozenset(facts.get("elsewhere") or ())
        most = max(self.value.values()) if classes else 1
        dtype = np.uint8 if most < 256 else np.uint16
        self.array = np.zeros((1 if classes else len(self.channel), *grid.spatial_shape), dtype)
        self.clash: np.ndarray | None = None

    def wants(self, number: int) -> bool:
        """Whether a segment is painted at all; raises ``BAD_VALUE`` for one that the object does not describe."""
        if number in self.elsewhere:
            return False
        if number not in self.channel:
            raise Refused("BAD_VALUE", f"segment {number} has pixels but no description")
        return self.value is None or number in self.value

    def paint(self, number: int, index: tuple, mask: np.ndarray):
        """Add the boolean ``mask`` at ``index`` (of I, J, K) to a segment."""
        voxels = self.array[self.channel[number]][index]
        value = 1 if self.value is None else self.value[number]
        if self.value is not None:
            other = mask & (voxels != 0) & (voxels != value)
            if other.any():
                if self.clash is None:
                    self.clash = np.zeros(self.array.shape[1:], bool)
                self.clash[index] |= other
        voxels[mask] = value

    def finished(self) -> np.ndarray:
        """(C, I, J, K); raises ``LABEL_OVERLAP`` when segments of different classes share voxels."""
        if self.clash is not None:
            count = int(np.count_nonzero(self.clash))
            raise Refused("LABEL_OVERLAP", f"segments of different classes overlap in {count} voxels")
        return self.array
