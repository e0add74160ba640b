"""Series to volumes: which instances make one volume, in which order, on which grid; and why the others do not.

Nothing here reads pixels. A DICOM series is split by what makes images incomparable (class, image type, echo, colour), its
slices are ordered by position along the slice normal, and the result is a regular grid or a refusal. Several images at each
position are the channels of one volume when something in the headers orders them.
"""

import itertools
import posixpath
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from sparkmed.formats import dicom
from sparkmed.formats.instance import MAX_VOLUME_BYTES, Instance, VolumeHeader, volume_header
from sparkmed.rejection import Refused, Rejection

STAGE = "volumes"
SAME_DIRECTION = 1e-3
"""Largest difference of a direction cosine between slices of one orientation (0.06 degrees)."""
FEW_SLICES = 3
"""A series of several orientations is split when each has at least so many positions; fewer are strays."""
TILT_DEGREES = 0.5
"""Largest angle between the line of slice positions and the slice normal; more is a tilted gantry."""
SAME_POSITION = 0.01
"""Slices closer than this in mm along the normal are at one position."""

_CHANNEL_MODALITIES = frozenset({"MR", "PT", "NM"})
"""Modalities in which the instance number alone may order several images of one position."""


def tolerance(spacing: float) -> float:
    """Largest distance in mm of a slice from where a regular grid of this ``spacing`` (mm) has it.

    Headers round: 0.02 mm, and 3 % of the spacing.
    """
    return 0.02 + 0.03 * spacing


def assemble(instances: Iterable[Instance]) -> tuple[list[VolumeHeader], list[Rejection]]:
    """Volumes, and one rejection per source that is in none; the same whatever the order of ``instances``.

    Reasons: ``NOT_AN_IMAGE``, ``DUPLICATE_INSTANCE``, ``CONFLICTING_INSTANCE``, ``LOCALIZER``,
    ``MULTI_FRAME``, ``MOSAIC``, ``MODALITY_LUT``, ``NO_DECODER``, ``MISSING_POSITION``, ``MISSING_SPACING``,
    ``BAD_GEOMETRY``, ``FRAME_OF_REFERENCE``, ``MIXED_PATIENT``, ``MIXED_ORIENTATION``, ``MIXED_SPACING``, ``MIXED_SHAPE``,
    ``GANTRY_TILT``, ``MISSING_SLICE``, ``IRREGULAR_SPACING``, ``DUPLICATE_POSITION``, ``TOO_LARGE``.
    """
    volumes: list[VolumeHeader] = []
    rejections: list[Rejection] = []
    series: dict[tuple[str, ...], list[Instance]] = defaultdict(list)
    for instance in sorted(instances, key=lambda i: i.uri):
        if instance.kind != "image":
            rejections.append(_not_an_image(instance))
        elif instance.format == "dicom":
            series[series_key(instance)].append(instance)
        else:
            volumes.append(volume_header([instance], instance.shape, instance.affine, instance.facts))
    for _, group in sorted(series.items()):
        made, refused = _assemble_series(group)
        volumes += made
        rejections += refused
    return sorted(volumes, key=lambda v: (v.series_uid, v.sources)), sorted(rejections, key=lambda r: r.uri)


def series_key(instance: Instance) -> tuple[str, ...]:
    """What images of one series have in common; without a SeriesInstanceUID (anonymised away) it is their folder."""
    folder = "" if instance.series_uid else posixpath.dirname(instance.path)
    return instance.facts.get("study", ""), instance.series_uid, folder


def _not_an_image(instance: Instance) -> Rejection:
    name = dicom.UID(instance.sop_class).name if instance.sop_class else instance.modality or "no SOP class"
    return Rejection(instance.uri, STAGE, "NOT_AN_IMAGE", f"a DICOM object that holds no image ({name})")


class _Slice:
    """An instance beside its parsed facts."""

    def __init__(self, instance: Instance):
        self.instance = instance
        self.facts = instance.facts
        self.position = self.facts.get("position")
        self.orientation = self.facts.get("orientation")
        self.located = self.position is not None and self.orientation is not None


def _refuse(slices: Iterable[_Slice], refused: Refused) -> list[Rejection]:
    return [refused.at(s.instance.uri, STAGE) for s in slices]


def _assemble_series(instances: list[Instance]) -> tuple[list[VolumeHeader], list[Rejection]]:
    """Volumes and rejections of the images of one DICOM series."""
    volumes: list[VolumeHeader] = []
    slices, rejections = _once([_Slice(i) for i in instances])
    usable = []
    for s in slices:
        problem = _unusable(s)
        if problem:
            rejections.append(problem.at(s.instance.uri, STAGE))
        else:
            usable.append(s)
    if not usable:
        return volumes, rejections
    try:
        stacks, pictures = _divide(usable)
    except Refused as e:
        return volumes, rejections + _refuse(usable, e)
    for s in pictures:
        volumes.append(_picture(s))
    for stack in stacks:
        try:
            volumes += _volumes(stack)
        except Refused as e:
            rejections += _refuse(stack, e)
    return volumes, rejections


def _identity(s: _Slice) -> tuple:
    """What two encodings of one instance have in common."""
    names = ("number", "acquisition", "temporal", "echo", "b", "type", "position", "orientation", "spacing")
    return s.instance.shape, *(s.facts.get(n) for n in names)


def _once(slices: list[_Slice]) -> tuple[list[_Slice], list[Rejection]]:
    """Each SOP instance once. A second copy is listed; two different images under one UID are both refused."""
    by_uid: dict[str, list[_Slice]] = defaultdict(list)
    for s in slices:
        by_uid[s.instance.sop_uid or s.instance.sha256].append(s)
    kept, rejections = [], []
    for same in by_uid.values():
        first, *others = sorted(same, key=lambda s: (_lossy(s), s.instance.uri))
        if all(_identity(s) == _identity(first) for s in others):
            kept.append(first)
            message = "a copy of an instance that is used once"
            rejections += _refuse(others, Refused("DUPLICATE_INSTANCE", message))
        else:
            message = f"{len(same)} different images have the same SOPInstanceUID"
            rejections += _refuse(same, Refused("CONFLICTING_INSTANCE", message))
    return sorted(kept, key=lambda s: s.instance.uri), rejections


_LOSSY = (".4.50", ".4.51", ".4.81", ".4.91", ".4.203")


def _lossy(s: _Slice) -> bool:
    return s.instance.transfer_syntax.endswith(_LOSSY)


def _unusable(s: _Slice) -> Refused | None:
    """Why an image by itself cannot be part of a volume."""
    i, facts = s.instance, s.facts
    kinds = facts.get("type", [])
    if facts.get("frames", 1) > 1:
        return Refused("MULTI_FRAME", f"{facts['frames']} frames in one object; multi-frame images are not read yet")
    if "MOSAIC" in kinds:
        return Refused("MOSAIC", "a Siemens mosaic of slices; mosaics are not read yet")
    if "LOCALIZER" in kinds:
        return Refused("LOCALIZER", "a localizer is no part of a volume")
    if facts.get("lut"):
        return Refused("MODALITY_LUT", "a modality lookup table; only slope and intercept are read")
    if facts.get("slope") == 0:
        return Refused("BAD_VALUE", "the rescale slope is 0")
    try:
        dicom.decoder(i.transfer_syntax, facts)
    except Refused as e:
        return e
    if s.located:
        row, column = np.asarray(s.orientation[:3]), np.asarray(s.orientation[3:])
        off = max(abs(row @ row - 1), abs(column @ column - 1), abs(row @ column))
        if off > 1e-3:
            return Refused("BAD_GEOMETRY", f"the direction cosines are off by {off:.3g} from two orthogonal unit vectors")
        if facts.get("spacing") is None:
            return Refused("MISSING_SPACING", "an image in space without PixelSpacing")
    spacing = facts.get("spacing")
    if spacing is not None and min(spacing) <= 0:
        return Refused("BAD_GEOMETRY", f"pixel spacing {spacing[0]:g} x {spacing[1]:g} mm")
    return None


def _divide(slices: list[_Slice]) -> tuple[list[list[_Slice]], list[_Slice]]:
    """Stacks of slices that may be one volume each, and pictures without a place in space; raises for the whole series."""
    if len({s.instance.patient for s in slices} - {""}) > 1:
        raise Refused("MIXED_PATIENT", "one SeriesInstanceUID for several patients")
    located = [s for s in slices if s.located]
    lost = [s for s in slices if not s.located]
    spatial = any(s.instance.modality in dicom.SLICED and s.instance.sop_class != dicom._SECONDARY_CAPTURE for s in lost)
    if lost and (located or spatial):
        raise Refused("MISSING_POSITION", f"{len(lost)} of {len(slices)} images have no position or orientation")
    if not located:
        return [], lost
    frames = {s.facts["frame"] for s in located if "frame" in s.facts}
    if len(frames) > 1:
        raise Refused("FRAME_OF_REFERENCE", f"{len(frames)} frames of reference in one series")
    turned = _by_orientation(located)
    few = min(len({tuple(s.position) for s in group}) for group in turned)
    if len(turned) > 1 and few < FEW_SLICES:
        counts = "; ".join(f"{len(g)} images of normal ({', '.join(f'{x:.3f}' for x in _normal(g[0]))})" for g in turned[:4])
        raise Refused("MIXED_ORIENTATION", f"{len(turned)} orientations in one series: {counts}")
    stacks = []
    for group in turned:
        parts: dict[Any, list[_Slice]] = defaultdict(list)
        for s in group:
            parts[_part(s)].append(s)
        stacks += parts.values()
    return stacks, []


def _normal(s: _Slice) -> np.ndarray:
    """Unit normal of a slice in LPS: row direction x column direction."""
    normal = np.cross(s.orientation[:3], s.orientation[3:])
    return normal / np.linalg.norm(normal)


def _by_orientation(slices: list[_Slice]) -> list[list[_Slice]]:
    groups: list[list[_Slice]] = []
    for s in slices:
        for group in groups:
            if np.abs(np.subtract(s.orientation, group[0].orientation)).max() <= SAME_DIRECTION:
                group.append(s)
                break
        else:
            groups.append([s])
    return groups


def _part(s: _Slice) -> tuple:
    """What splits a series into volumes of its own: class, image type, echo, colour."""
    f = s.facts
    return (
        s.instance.sop_class,
        tuple(f.get("type", ())),
        f.get("echo"),
        f.get("echo_number"),
        s.instance.shape[0],
        f.get("photometric") == "PALETTE COLOR",
    )


def _picture(s: _Slice) -> VolumeHeader:
    """A 2-D image without a place in space: columns to the left, rows down, spacing where the header has one."""
    spacing = s.facts.get("spacing") or [1.0, 1.0]
    affine = dicom.slice_affine([0, 0, 0], [1, 0, 0, 0, 1, 0], spacing, [0, 0, 1])
    return _header([[s]], affine, {})


def _volumes(stack: list[_Slice]) -> list[VolumeHeader]:
    """The volumes of slices that differ in position, and maybe in time or acquisition; raises :class:`Refused`."""
    shapes = {s.instance.shape for s in stack}
    if len(shapes) > 1:
        listed = ", ".join(f"{n[1]} x {n[2]}" for n in sorted(shapes))
        raise Refused("MIXED_SHAPE", f"images of {len(shapes)} sizes in one series: {listed}")
    spacings = np.array([s.facts["spacing"] for s in stack])
    if np.ptp(spacings, axis=0).max() > 1e-4 * spacings.min():
        raise Refused("MIXED_SPACING", f"pixel spacing from {spacings.min():g} to {spacings.max():g} mm in one series")
    positions = _by_position(stack)
    counts = {len(p) for p in positions}
    if counts == {1}:
        ordered = [p[0] for p in positions]
        return [_header([ordered], _grid(ordered), {})]
    if len(positions) == 1:
        raise Refused("DUPLICATE_POSITION", f"{len(stack)} images at one position and no others")
    if len(counts) > 1:
        raise Refused("DUPLICATE_POSITION", f"from {min(counts)} to {max(counts)} images at each of {len(positions)} positions")
    axis, times = _times(positions)
    if axis == "acquisition" and stack[0].instance.modality == "CT":
        return [_header([t], _grid(t), {}) for t in times]
    affine = _grid(times[0])
    for t in times[1:]:
        if np.abs(_grid(t) - affine).max() > 1e-3:
            raise Refused("IRREGULAR_SPACING", "the grid moves from time to time")
    return [_header(times, affine, {"axis": axis, "values": [t[0].facts[axis] for t in times]})]


def _by_position(stack: list[_Slice]) -> list[list[_Slice]]:
    """Slices of one orientation grouped by their place along the normal, ascending."""
    normal = _normal(stack[0])
    places = sorted(((float(normal @ s.position), s) for s in stack), key=lambda p: (p[0], p[1].instance.uri))
    groups: list[list[_Slice]] = []
    last = None
    for place, s in places:
        if last is not None and place - last <= SAME_POSITION:
            groups[-1].append(s)
        else:
            groups.append([s])
            last = place
    return groups


_AXES = ("temporal", "frame_time", "acquisition", "trigger", "b")
"""Facts that may order several images at one position, the most telling first."""


def _times(positions: list[list[_Slice]]) -> tuple[str, list[list[_Slice]]]:
    """(name of the axis, slices time by time) of positions that hold the same number of images each.

    The axis is the first fact that takes as many values as there are images at a position, each once at every position;
    else the instance number, if it runs time by time or position by position.
    """
    count = len(positions[0])
    everything = list(itertools.chain.from_iterable(positions))
    for axis in _AXES:
        values = {s.facts.get(axis) for s in everything}
        if None in values or len(values) != count:
            continue
        ordered = [sorted(p, key=lambda s: s.facts[axis]) for p in positions]
        if all(len({s.facts[axis] for s in p}) == count for p in ordered):
            return axis, [list(t) for t in zip(*ordered, strict=True)]
    numbers = [s.facts.get("number") for s in everything]
    modality = everything[0].instance.modality
    if modality in _CHANNEL_MODALITIES and None not in numbers and len(set(numbers)) == len(numbers):
        ordered = [sorted(p, key=lambda s: s.facts["number"]) for p in positions]
        times = [list(t) for t in zip(*ordered, strict=True)]
        if _blocks(times) or _blocks(ordered):
            return "number", times
    message = f"{count} images at each of {len(positions)} positions, and nothing in the headers orders them"
    raise Refused("DUPLICATE_POSITION", message)


def _blocks(groups: list[list[_Slice]]) -> bool:
    """True when the instance numbers of the groups do not interleave."""
    ranges = sorted((min(n), max(n)) for n in ([s.facts["number"] for s in g] for g in groups))
    return all(a[1] < b[0] for a, b in itertools.pairwise(ranges))


def _grid(slices: list[_Slice]) -> np.ndarray:
    """(4, 4) RAS+ affine of slices ordered along their normal; raises when they are not a regular grid."""
    first, n = slices[0], len(slices)
    orientation, spacing = first.orientation, first.facts["spacing"]
    normal = _normal(first)
    if n == 1:
        step = normal * (abs(first.facts.get("gap") or 0) or abs(first.facts.get("thickness") or 0) or 1.0)
        return dicom.slice_affine(first.position, orientation, spacing, step)
    positions = np.array([s.position for s in slices], np.float64)
    step = (positions[-1] - positions[0]) / (n - 1)
    along = positions @ normal
    gaps = np.diff(along)
    typical = float(np.median(gaps))
    mean = float(step @ normal)
    expected = along[0] + mean * np.arange(n)
    if np.abs(along - expected).max() > tolerance(min(typical, mean)):
        smallest = float(gaps.min())
        units = gaps / smallest
        if np.abs(units - np.round(units)).max() * smallest <= 2 * tolerance(smallest) and round(units.max()) > 1:
            missing = int(np.round(units).sum()) - (n - 1)
            raise Refused("MISSING_SLICE", f"{missing} of {n + missing} slices are missing: "
                                           f"gaps from {gaps.min():.4g} to {gaps.max():.4g} mm")  # fmt: skip
        raise Refused("IRREGULAR_SPACING", f"slice gaps from {gaps.min():.4g} to {gaps.max():.4g} mm, expected uniform spacing")
    sideways = step - normal * mean
    angle = float(np.degrees(np.arctan2(np.linalg.norm(sideways), mean)))
    if angle > TILT_DEGREES:
        raise Refused("GANTRY_TILT", f"slices are stacked {angle:.2f} degrees off their normal")
    off_line = np.abs(positions - (positions[0] + np.arange(n)[:, None] * step)).max()
    if off_line > tolerance(mean):
        raise Refused("IRREGULAR_SPACING", f"slice positions are up to {off_line:.3g} mm beside their line")
    return dicom.slice_affine(positions[0], orientation, spacing, step)


_PIXEL_FACTS = ("slope", "intercept", "photometric", "bits", "allocated", "signed", "float", "frames")


def _header(times: list[list[_Slice]], affine: np.ndarray, facts: dict[str, Any]) -> VolumeHeader:
    """Header of a volume of C = len(times) times (or of colours, at one time)."""
    ordered = list(itertools.chain.from_iterable(times))
    channels, columns, rows, _ = ordered[0].instance.shape
    if channels > 1 and len(times) > 1:
        raise Refused("TOO_MANY_DIMENSIONS", f"{len(times)} times of {channels} colours")
    shape = (channels * len(times), columns, rows, len(times[0]))
    dtype = dicom.real_world_type([s.facts for s in ordered])
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if size > MAX_VOLUME_BYTES:
        raise Refused("TOO_LARGE", f"a volume of {shape} is {size} bytes, the limit is {MAX_VOLUME_BYTES}")
    pixels = [{k: s.facts[k] for k in _PIXEL_FACTS if k in s.facts} for s in ordered]
    syntaxes = [s.instance.transfer_syntax for s in ordered]
    decoders = sorted({dicom.decoder(s.instance.transfer_syntax, s.facts) or "native" for s in ordered})
    facts = {
        **facts,
        "dtype": dtype.name,
        "pixels": pixels[:1] if all(p == pixels[0] for p in pixels) else pixels,
        "syntaxes": syntaxes[:1] if len(set(syntaxes)) == 1 else syntaxes,
        "decoders": decoders,
        "type": ordered[0].facts.get("type"),
        "echo": ordered[0].facts.get("echo"),
        "burned_in": True if any(s.facts.get("burned_in") for s in ordered) else None,
    }
    return volume_header([s.instance for s in ordered], shape, affine.ravel().tolist(), facts)
