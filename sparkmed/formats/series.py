"""Series to volumes: which instances make one volume, in which order, on which grid; and why the others do not.

Nothing here reads headers or pixels. A slice is an image, a frame of a multi-frame object or a tile of a mosaic. A DICOM series is
split by what makes slices incomparable (class, image type, echo, colour), they are ordered by position along the slice normal, and
the result is a regular grid or a refusal. Several slices at each position are the channels of one volume when something in the
headers orders them.
"""

import contextlib
import dataclasses
import itertools
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.ndimage

from sparkmed.config import Volumes
from sparkmed.formats import copies, dicom
from sparkmed.formats.instance import MAX_VOLUME_BYTES, Instance, VolumeHeader, volume_header
from sparkmed.rejection import Refused, Rejection

STAGE = "volumes"
SAME_DIRECTION = 1e-3
"""Largest difference of a direction cosine between slices of one orientation (0.06 degrees)."""
FAR_APART = 5
"""Two acquisitions of a CT with a gap of more than so many slices between them are two scans."""
FEW_SLICES = 3
"""A series of several orientations is split when each has at least so many positions; fewer are strays."""
MOST_ORIENTATIONS = 64
"""A series of more orientations is refused: radial scans have some dozens."""
WIDEST_GAP = 4
"""Slices are interpolated where the widest gap is at most so many times the smallest: more is a hole."""
TILT_DEGREES = 0.5
"""Largest angle between the line of slice positions and the slice normal; more is a tilted gantry."""
SAME_POSITION = 0.01
"""Slices closer than this in mm along the normal, or than a tenth of a finer pixel, are at one position."""
MOST_PARTS = 256
"""A series of more kinds of images is refused: each slice has a header of its own."""

_CHANNEL_MODALITIES = frozenset({"MR", "PT", "NM"})
"""Modalities in which the instance number alone may order several images of one position."""


def tolerance(spacing: float) -> float:
    """Largest distance in mm of a slice from where a regular grid of this ``spacing`` (mm) has it.

    Headers round: 0.02 mm, or a tenth of a finer spacing, and 3 % of it.
    """
    return min(0.02, 0.1 * spacing) + 0.03 * spacing


def assemble(instances: Iterable[Instance], settings: Volumes | None = None) -> tuple[list[VolumeHeader], list[Rejection]]:
    """Volumes, and a rejection per source of which something is in none; the same whatever the order of ``instances``.

    ``settings`` say what is resampled to a regular grid, and whether PET becomes SUV; by default nothing is. The facts of a header
    name what sets it apart from other volumes of its series (``part``), the axis of its channels (``axis``, ``values``), and what
    was resampled. Segmentations come without a grid, which :mod:`segmentation` gives them once the images of all series are known.

    Reasons: ``NOT_AN_IMAGE``, ``DUPLICATE_INSTANCE``, ``CONFLICTING_INSTANCE``, ``LOCALIZER``, ``SUV_UNKNOWN``, ``MOSAIC``,
    ``MODALITY_LUT``, ``NO_DECODER``, ``MISSING_POSITION``, ``MISSING_SPACING``, ``MIXED_TIMES``, ``MIXED_RESCALE``,
    ``INTERLEAVED``, ``BAD_GEOMETRY``, ``FRAME_OF_REFERENCE``, ``MIXED_PATIENT``, ``MIXED_ORIENTATION``, ``MIXED_SPACING``,
    ``MIXED_SHAPE``, ``GANTRY_TILT``, ``MISSING_SLICE``, ``IRREGULAR_SPACING``, ``DUPLICATE_POSITION``, ``TOO_LARGE``,
    ``MULTI_PAGE``.
    """
    volumes: list[VolumeHeader] = []
    rejections: list[Rejection] = []
    segmentations: list[Instance] = []
    series: dict[tuple[str, ...], list[Instance]] = defaultdict(list)
    for instance in sorted(instances, key=lambda i: i.uri):
        if instance.kind == "segmentation":
            segmentations.append(instance)
        elif instance.kind != "image":
            rejections.append(_not_an_image(instance))
        elif instance.format == "dicom":
            series[series_key(instance)].append(instance)
        elif (ome := (facts := instance.facts).get("ome", {})).get("pages", 1) > 1 or "ngff" in ome:
            what = "a plane of an OME-Zarr plate" if "ngff" in ome else "a page of an OME-TIFF of several"
            message = f"{what}: such are read as fields of plates (plates in the config)"
            rejections.append(Rejection(instance.uri, STAGE, "MULTI_PAGE", message))
        else:
            volumes.append(volume_header([instance], instance.shape, instance.affine, facts))
    settings = settings or Volumes()
    for made, refused in [_segmentations(segmentations), *(_assemble_series(g, settings) for _, g in sorted(series.items()))]:
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


def _segmentations(instances: Iterable[Instance]) -> tuple[list[VolumeHeader], list[Rejection]]:
    """Headers without a grid, of shape (segments, 0, 0, 0), one per object; a copy of an object is refused."""
    volumes, rejections = [], []
    by_uid: dict[str, list[Instance]] = defaultdict(list)
    for i in instances:
        by_uid[i.sop_uid or i.sha256].append(i)
    for same in by_uid.values():
        first, *others = same
        if any(i.facts != first.facts for i in others):
            message = f"{len(same)} segmentations that differ have the same SOPInstanceUID"
            rejections += [Rejection(i.uri, STAGE, "CONFLICTING_INSTANCE", message) for i in same]
            continue
        message = "a copy of an instance that is used once"
        rejections += [Rejection(i.uri, STAGE, "DUPLICATE_INSTANCE", message) for i in others]
        header = volume_header([first], (len(first.facts["segments"]), 0, 0, 0), (), first.facts)
        volumes.append(dataclasses.replace(header, format=dicom.SEGMENTATIONS[first.sop_class]))
    return volumes, rejections


class _Slice:
    """A frame of an instance (the only one of most), beside its parsed facts."""

    def __init__(self, instance: Instance, facts: dict[str, Any], frame: int = 0):
        self.instance, self.facts, self.frame = instance, facts, frame
        self.position = facts.get("position")
        self.orientation = facts.get("orientation")
        self.located = self.position is not None and self.orientation is not None

    @classmethod
    def all_of(cls, instance: Instance) -> list["_Slice"]:
        facts = instance.facts
        by_frame = facts.pop("per_frame", {})
        common = {k: v for k, v in facts.items() if k not in by_frame}
        own = ({k: v[n] for k, v in by_frame.items() if v[n] is not None} for n in range(instance.shape[3]))
        return [cls(instance, common | some, n) for n, some in enumerate(own)]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, I, J)"""
        return self.instance.shape[:3]

    @property
    def order(self) -> tuple:
        """Where it stands as it came: instance number, dimensions as the object ranks them, frame."""
        return self.facts.get("number") or 0, self.facts.get("index") or [], self.instance.uri, self.frame


def _refuse(slices: Iterable[_Slice], refused: Refused) -> list[Rejection]:
    """One rejection per source; it says so when only some of its frames are meant."""
    slices = list(slices)
    frames = Counter(s.instance.uri for s in slices)
    whole = {s.instance.uri: s.instance.shape[3] for s in slices}
    return [
        refused.at(uri, STAGE)
        if n >= whole[uri]
        else Rejection(uri, STAGE, refused.reason, f"{n} of {whole[uri]} frames: {refused.message}")
        for uri, n in frames.items()
    ]


def _assemble_series(instances: list[Instance], settings: Volumes) -> tuple[list[VolumeHeader], list[Rejection]]:
    """Volumes and rejections of the images of one DICOM series."""
    unique, rejections = copies.once(instances)
    slices = {i.uri: _Slice.all_of(i) for i in unique}
    problems = {uri: next((p for p in map(_unusable, some) if p), None) for uri, some in slices.items()}
    objects = Counter(u for i in unique if not problems[i.uri] and (u := i.facts.get("concatenation", [""])[0]))
    usable, lost = [], _conflicting(instances, unique)
    for i in unique:
        problem = problems[i.uri] or _unfinished(i, objects)
        if problem:
            rejections += _refuse(slices[i.uri], problem)
            lost += [] if problem.reason in _NO_SLICE else [(s, problem.reason) for s in slices[i.uri]]
        else:
            usable += slices[i.uri]
    if not usable:
        return [], rejections
    try:
        stacks, pictures = _divide(usable)
    except Refused as e:
        return [], rejections + _refuse(usable, e)
    drafts = [_picture(p) for p in pictures]
    for stack in stacks:
        try:
            _require_whole(stack, lost)
            drafts += _volumes(stack, settings)
        except Refused as e:
            rejections += _refuse(stack, e)
    volumes = []
    drafts, others = _one_level(drafts, settings.slide_level)
    rejections += others
    for draft, part in zip(drafts, _parts(drafts), strict=True):
        try:
            volumes.append(_header(draft, {**draft.facts, "part": part or None}, settings))
        except Refused as e:
            rejections += _refuse(itertools.chain.from_iterable(draft.times), e)
    return volumes, _one_each(rejections)


_NO_SLICE = frozenset({"LOCALIZER", "SLIDE_LABEL", "MOSAIC"})
"""Reasons for which an image is none of the slices of its series."""


def _conflicting(instances: list[Instance], unique: list[Instance]) -> list[tuple[_Slice, str]]:
    """The slices that no copy of an instance is used for."""
    used = {i.sop_uid or i.sha256 for i in unique}
    unused = [i for i in instances if (i.sop_uid or i.sha256) not in used]
    return [(s, "CONFLICTING_INSTANCE") for i in unused for s in _Slice.all_of(i)]


def _require_whole(stack: list[_Slice], lost: list[tuple[_Slice, str]]):
    """A stack of which slices were refused is no volume: one that lacks its ends would look like a right one."""
    first = stack[0]
    own = [why for s, why in lost if s.located and _part(s) == _part(first) and _parallel(s, first)]
    if own:
        reasons = ", ".join(sorted(set(own)))
        raise Refused("MISSING_SLICE", f"slices that were refused belong to it: {len(own)} ({reasons})")


def _one_each(rejections: list[Rejection]) -> list[Rejection]:
    """One rejection per source: frames of one object that are refused for several reasons have the first, and all messages."""
    by_uri: dict[str, list[Rejection]] = defaultdict(list)
    for r in rejections:
        by_uri[r.uri].append(r)
    return [dataclasses.replace(same[0], message="; ".join(r.message for r in same)) for same in by_uri.values()]


@dataclass(frozen=True)
class _Draft:
    """A volume to be: slices time by time, from the first along the normal to the last, and their grid."""

    times: list[list[_Slice]]
    affine: np.ndarray
    facts: dict[str, Any]


def _one_level(drafts: list[_Draft], level: int | None) -> tuple[list[_Draft], list[Rejection]]:
    """Of a slide's pyramid the ``level`` that is asked for, 0 being the finest, and why not the others."""
    pyramid = sorted({tuple(m) for d in drafts if (m := d.times[0][0].facts.get("matrix"))}, reverse=True)
    if level is None or not pyramid:
        return drafts, []
    wanted = pyramid[min(level, len(pyramid) - 1)]
    kept = [d for d in drafts if tuple(d.times[0][0].facts.get("matrix", ())) in ((), wanted)]
    listed = ", ".join(f"{c} x {r}" for c, r in pyramid)
    refused = Refused("OTHER_LEVEL", f"another level of the slide is used; levels: {listed}")
    left = [s for d in drafts if not any(d is k for k in kept) for s in d.times[0]]
    return kept, _refuse(left, refused)


_APART = (
    "series", "matrix", "type", "component", "echo", "echo_number", "b", "acquisition", "temporal", "time_offset",
    "trigger", "stack", "orientation",
)  # fmt: skip
"""Facts that may set volumes of one series apart."""


def _parts(drafts: list[_Draft]) -> list[dict[str, Any]]:
    """What sets each volume of a series apart from the others: the facts that are equal within all of them and differ between."""
    slices = [list(itertools.chain.from_iterable(d.times)) for d in drafts]
    names = [*_APART, *sorted({n for some in slices for n in some[0].facts if n.startswith("dim:")})]
    found: list[dict[str, Any]] = [{} for _ in drafts]
    for name in names:
        told = len(set(map(repr, found)))
        if told == len(drafts):
            break
        values = [some[0].facts.get(name) for some in slices]
        if all(v == values[0] for v in values) or any(
            s.facts.get(name) != v for some, v in zip(slices, values, strict=True) for s in some
        ):
            continue
        more = [part | ({} if v is None else {name: v}) for part, v in zip(found, values, strict=True)]
        if len(set(map(repr, more))) > told:
            found = more
    if len(drafts) > 1 and drafts[0].times[0][0].instance.sop_class != drafts[-1].times[0][0].instance.sop_class:
        for part, some in zip(found, slices, strict=True):
            part["sop_class"] = some[0].instance.sop_class
    return found


def _unusable(s: _Slice) -> Refused | None:
    """Why an image by itself cannot be part of a volume."""
    i, facts = s.instance, s.facts
    kinds = facts.get("type", [])
    if "problem" in facts:
        return Refused(*facts["problem"])
    if i.sop_class == dicom.SLIDE and {"LABEL", "OVERVIEW"} & set(kinds):
        return Refused("SLIDE_LABEL", "a picture of a slide's label, which names the patient")
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


def _unfinished(instance: Instance, objects: Counter) -> Refused | None:
    """Why a part of a concatenation is no volume: other parts are missing (PS3.3 C.7.6.16.2.2.4)."""
    uid, total = instance.facts.get("concatenation", ("", 0))
    if not uid or not total or objects[uid] == total:
        return None
    return Refused("MISSING_SLICE", f"{objects[uid]} of the {total} objects that one image was cut into")


def _divide(slices: list[_Slice]) -> tuple[list[list[_Slice]], list[list[_Slice]]]:
    """Stacks of slices that may be one volume each, and pictures without a place in space (with their frames); raises for the whole
    series."""
    if len({s.instance.patient for s in slices} - {""}) > 1:
        raise Refused("MIXED_PATIENT", "one SeriesInstanceUID for several patients")
    located = [s for s in slices if s.located]
    lost = [s for s in slices if not s.located]
    spatial = any(s.instance.modality in dicom.SLICED and s.instance.sop_class not in dicom.SECONDARY_CAPTURES for s in lost)
    if lost and (located or spatial):
        raise Refused("MISSING_POSITION", f"{len(lost)} of {len(slices)} images have no position or orientation")
    if not located:
        return [], [list(frames) for _, frames in itertools.groupby(lost, key=lambda s: s.instance.uri)]
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
        _require_apart(list(parts.values()))
    return stacks, []


def _require_apart(parts: list[list[_Slice]]):
    """Parts that are a regular grid together, each place taken once, are one volume whose headers differ by mistake."""
    if len(parts) > MOST_PARTS:
        raise Refused("INTERLEAVED", f"images of {len(parts)} kinds in one series, more than {MOST_PARTS}")
    alike: dict[Any, list[list[_Slice]]] = defaultdict(list)
    for part in parts:
        if "matrix" not in part[0].facts:
            alike[part[0].facts.get("stack"), part[0].shape].append(part)
    for some in alike.values():
        places = [np.sort([_normal(some[0][0]) @ s.position for s in part]) for part in some]
        for chosen in [range(len(some))] * (len(some) > 2) + list(itertools.combinations(range(len(some)), 2)):
            if _evenly(np.sort(np.concatenate([places[n] for n in chosen]))):
                _require_no_grid([some[n] for n in chosen])


def _evenly(places: np.ndarray) -> bool:
    """Whether the gaps between three places or more are nearly alike: quick, for it is asked of all pairs of parts."""
    gaps = np.diff(places)
    return len(gaps) > 1 and gaps.min() > 0.5 * gaps.max()


def _require_no_grid(parts: list[list[_Slice]]):
    both = _by_position([s for part in parts for s in part])
    if len(both) == sum(map(len, parts)) and _is_grid([p[0] for p in both]):
        counts = " and ".join(str(len(p)) for p in parts[:4]) + (" and more" if len(parts) > 4 else "")
        differing = [n for n in _APART if len({repr(p[0].facts.get(n)) for p in parts}) > 1] or ["colour"]
        message = f"{counts} slices that are one regular grid together differ in {', '.join(differing)}"
        raise Refused("INTERLEAVED", message)


def _is_grid(slices: list[_Slice]) -> bool:
    with contextlib.suppress(Refused):
        _grid(slices)
        return True
    return False


def _normal(s: _Slice) -> np.ndarray:
    """Unit normal of a slice in LPS: row direction x column direction."""
    normal = np.cross(s.orientation[:3], s.orientation[3:])
    return normal / np.linalg.norm(normal)


def _parallel(a: _Slice, b: _Slice) -> bool:
    return bool(np.abs(np.subtract(a.orientation, b.orientation)).max() <= SAME_DIRECTION)


def _by_orientation(slices: list[_Slice]) -> list[list[_Slice]]:
    groups: list[list[_Slice]] = []
    for s in slices:
        for group in groups:
            if _parallel(s, group[0]):
                group.append(s)
                break
        else:
            if len(groups) == MOST_ORIENTATIONS:
                raise Refused("MIXED_ORIENTATION", f"more than {MOST_ORIENTATIONS} orientations in one series")
            groups.append([s])
    return groups


def _part(s: _Slice) -> tuple:
    """What splits a series into volumes of its own: class, image type, series number, echo, colour."""
    f = s.facts
    return (
        s.instance.sop_class,
        tuple(f.get("type", ())),
        f.get("component"),
        f.get("series"),
        f.get("stack"),
        repr(f.get("matrix")),
        f.get("echo"),
        f.get("echo_number"),
        s.shape[0],
        f.get("photometric") == "PALETTE COLOR",
    )


def _picture(frames: list[_Slice]) -> _Draft:
    """A picture without a place in space: columns to the left, rows down, spacing where the header has one; frames are channels."""
    spacing = frames[0].facts.get("spacing") or [1.0, 1.0]
    affine = dicom.slice_affine([0, 0, 0], [1, 0, 0, 0, 1, 0], spacing, [0, 0, 1])
    facts = {"axis": "frame", "values": [s.frame + 1 for s in frames]} if len(frames) > 1 else {}
    return _Draft([[s] for s in frames], affine, facts)


def _volumes(stack: list[_Slice], settings: Volumes) -> list[_Draft]:
    """The volumes of slices that differ in position, and maybe in time or acquisition; raises :class:`Refused`."""
    shapes = {s.shape for s in stack}
    if len(shapes) > 1:
        listed = ", ".join(f"{n[1]} x {n[2]}" for n in sorted(shapes))
        raise Refused("MIXED_SHAPE", f"images of {len(shapes)} sizes in one series: {listed}")
    spacings = np.array([s.facts["spacing"] for s in stack])
    if np.ptp(spacings, axis=0).max() > 1e-4 * spacings.min():
        raise Refused("MIXED_SPACING", f"pixel spacing from {spacings.min():g} to {spacings.max():g} mm in one series")
    _require_one_scale(stack)
    scans = _scans(stack)
    if len(scans) > 1:
        return [d for scan in scans for d in _volumes(scan, settings)]
    try:
        return _regular(stack)
    except Refused as e:
        resampled = _resampled(stack, e.reason, settings)
        if resampled is None:
            raise
        return [resampled]


def _require_one_scale(stack: list[_Slice]):
    """Values of one volume are on one scale: a rescale on all slices or none, one unit."""
    rescaled = sum("slope" in s.facts for s in stack)
    if 0 < rescaled < len(stack):
        raise Refused("MIXED_RESCALE", f"{rescaled} of {len(stack)} images say how values are rescaled")
    units = {s.facts.get("pet_units") for s in stack}
    types = {s.facts.get("rescale_type") for s in stack} - {None}
    for several in (units, types):
        if len(several) > 1:
            raise Refused("MIXED_RESCALE", f"images in units of {', '.join(sorted(u or 'nothing named' for u in several))}")


def _scans(stack: list[_Slice]) -> list[list[_Slice]]:
    """The scans of a CT by acquisition number, when they are of one region or of regions far apart; else all as one.

    Acquisitions that follow each other, as of a table that moves step by step, are one scan: a slice that is missing between them
    would not be seen otherwise.
    """
    if stack[0].instance.modality != "CT":
        return [stack]
    parts: dict[Any, list[_Slice]] = defaultdict(list)
    for s in stack:
        parts[s.facts.get("acquisition")].append(s)
    places = {a: [float(_normal(stack[0]) @ p[0].position) for p in _by_position(part)] for a, part in parts.items()}
    if len(parts) == 1 or None in parts or min(map(len, places.values())) < FEW_SLICES:
        return [stack]
    step = max(float(np.median(np.diff(p))) for p in places.values())
    ends = sorted((p[0], p[-1]) for p in places.values())
    gaps = [b[0] - a[1] for a, b in itertools.pairwise(ends)]
    if all(gap < -step / 4 or gap > FAR_APART * step for gap in gaps):
        return [parts[a] for a in sorted(parts)]
    return [stack]


def _regular(stack: list[_Slice]) -> list[_Draft]:
    """One volume, or one per acquisition of a CT; raises when the slices are no regular grid or nothing orders those of a place."""
    positions = _by_position(stack)
    counts = {len(p) for p in positions}
    if counts == {1}:
        ordered = [p[0] for p in positions]
        grid = _grid(ordered)
        for fact in ("b", "direction", "temporal", "time_offset", *_dimensions(ordered)):
            values = {repr(np.round(v, 3).tolist()) if isinstance(v := s.facts.get(fact), list) else v for s in ordered}
            if len(values) > 1 and not _counts_slices(fact, ordered):
                raise Refused("MIXED_TIMES", f"slices of {len(values)} values of {fact} where one volume would be")
        return [_Draft([ordered], grid, {})]
    if len(counts) > 1:
        raise Refused("DUPLICATE_POSITION", f"from {min(counts)} to {max(counts)} images at each of {len(positions)} positions")
    axis, times = _times(positions)
    if len(positions) == 1 and (axis == "number" or stack[0].instance.modality == "CT"):
        raise Refused("DUPLICATE_POSITION", f"{len(stack)} images at one position and no others")
    if axis == "acquisition" and stack[0].instance.modality == "CT":
        return [_Draft([t], _grid(t), {}) for t in times]
    affine, shape = _grid(times[0]), stack[0].shape
    corners = np.array([[i, j, k, 1] for i in (0, shape[1] - 1) for j in (0, shape[2] - 1) for k in (0, len(positions) - 1)])
    for t in times[1:]:
        moved = float(np.abs(((_grid(t) - affine) @ corners.T)[:3]).max())
        if moved > tolerance(float(np.linalg.norm(affine[:3, 2]))):
            raise Refused("IRREGULAR_SPACING", f"the grid moves by {moved:.3g} mm from time to time")
    facts = {"axis": axis, "values": [_along(t, axis) for t in times]}
    others = {name: [t[0].facts.get(name) for t in times] for name in ("b", "direction") if name != axis}
    return [_Draft(times, affine, facts | {n: v for n, v in others.items() if len(set(map(repr, v))) > 1})]


def _counts_slices(fact: str, ordered: list[_Slice]) -> bool:
    """Whether a dimension only numbers the slices, by a name that is not the standard's."""
    return fact.startswith("dim:") and len({s.facts.get(fact) for s in ordered}) == len(ordered)


def _along(time: list[_Slice], axis: str):
    """The value, or values, of one time on an axis ``a`` or ``a+b``."""
    names = axis.split("+")
    values = [time[0].facts.get(name) for name in names]
    return values if len(names) > 1 else values[0]


def _dimensions(stack: list[_Slice]) -> list[str]:
    """Dimensions of a multi-frame object that are no fact of their own."""
    return sorted({name for s in stack for name in s.facts if name.startswith("dim:")})


def _by_position(stack: list[_Slice]) -> list[list[_Slice]]:
    """Slices of one orientation grouped by their place along the normal, ascending."""
    normal, same = _normal(stack[0]), min(SAME_POSITION, 0.1 * min(stack[0].facts["spacing"]))
    places = sorted(((float(normal @ s.position), s) for s in stack), key=lambda p: (p[0], p[1].instance.uri))
    groups: list[list[_Slice]] = []
    last = None
    for place, s in places:
        if last is not None and place - last <= same:
            groups[-1].append(s)
        else:
            groups.append([s])
            last = place
    return groups


_AXES = ("temporal", "time_offset", "frame_time", "acquisition", "trigger", "b")
"""Facts that may order several slices at one position, the most telling first."""


def _times(positions: list[list[_Slice]]) -> tuple[str, list[list[_Slice]]]:
    """(name of the axis, slices time by time) of positions that hold the same number of slices each.

    The axis is the first fact that takes as many values as there are slices at a position, each once at every position; else
    several facts that do so together (``b+direction``), in the order of the object's dimensions or of the instance numbers; else
    the instance number, if it runs time by time or position by position.
    """
    count = len(positions[0])
    everything = list(itertools.chain.from_iterable(positions))
    dimensions = _dimensions(everything)
    shared_number = ("number",) if any(s.instance.shape[3] > 1 for s in everything) else ()
    for axis in _AXES:
        times = _ordered(positions, axis)
        if times:
            return axis, times
    together = [a for a in (*_AXES, "direction", *dimensions) if 1 < len({repr(s.facts.get(a)) for s in everything}) <= count]
    keys = [{repr([s.facts.get(a) for a in together]): s for s in p} for p in positions]
    if together and len(keys[0]) == count and all(k.keys() == keys[0].keys() for k in keys):
        first = sorted(keys[0], key=lambda k: min(by_key[k].order for by_key in keys))
        name = "b" if "b" in together else "+".join(together)
        return name, [[by_key[k] for by_key in keys] for k in first]
    for axis in (*shared_number, "time"):
        times = _ordered(positions, axis)
        if times:
            return axis, times
    numbers = [s.facts.get("number") for s in everything]
    modality = everything[0].instance.modality
    if modality in _CHANNEL_MODALITIES and None not in numbers and len(set(numbers)) == len(numbers):
        ordered = [sorted(p, key=lambda s: s.facts["number"]) for p in positions]
        times = [list(t) for t in zip(*ordered, strict=True)]
        if _blocks(times) or _blocks(ordered):
            return "number", times
    message = f"{count} images at each of {len(positions)} positions, and nothing in the headers orders them"
    raise Refused("DUPLICATE_POSITION", message)


def _ordered(positions: list[list[_Slice]], axis: str) -> list[list[_Slice]] | None:
    """Slices time by time if ``axis`` takes as many values as there are slices at a position, each once at every position."""
    count, values = len(positions[0]), {s.facts.get(axis) for p in positions for s in p}
    if None in values or len(values) != count or any(len({s.facts[axis] for s in p}) < count for p in positions):
        return None
    night = axis == "time" and max(values) - min(values) > 43_200  # a scan across midnight, for none takes half a day

    def place(s):
        return s.facts[axis] + (86_400 if night and s.facts[axis] < 43_200 else 0)

    return [list(t) for t in zip(*(sorted(p, key=place) for p in positions), strict=True)]


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
    apart = first.facts.get("gap")
    thick = first.facts.get("thickness") or 0
    if first.instance.modality == "MR" and apart and abs(apart) >= 0.99 * thick and round(mean / abs(apart)) > 1:
        times = mean / abs(apart)
        if abs(times - round(times)) < 0.02:
            raise Refused("MISSING_SLICE", f"slices {mean:.4g} mm apart, where the header has them {abs(apart):.4g} mm apart")
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


_PIXEL_FACTS = ("slope", "intercept", "photometric", "bits", "allocated", "signed", "float", "frames", "mosaic", "matrix", "tiles")


def _header(draft: _Draft, facts: dict[str, Any], settings: Volumes) -> VolumeHeader:
    """Header of a volume of one channel per time (or of colours, at one time)."""
    times, ordered = draft.times, list(itertools.chain.from_iterable(draft.times))
    channels, columns, rows = ordered[0].shape
    if channels > 1 and len(times) > 1:
        raise Refused("TOO_MANY_DIMENSIONS", f"{len(times)} times of {channels} colours")
    shape = (channels * len(times), columns, rows, len(times[0]))
    pixels = [{k: s.facts[k] for k in _PIXEL_FACTS if k in s.facts} for s in ordered]
    if settings.suv and ordered[0].instance.modality == "PT":
        pixels = _in_suv(pixels, ordered)
        facts["units"] = "SUVbw"
    dtype = dicom.real_world_type(pixels)
    stacked = facts.get("stacked")
    if stacked:
        stacked["shape"], shape = shape, (shape[0], *stacked.pop("shape"))
    for size in {shape, tuple(stacked["shape"]) if stacked else shape}:
        nbytes = int(np.prod(size, dtype=object)) * dtype.itemsize
        if nbytes > MAX_VOLUME_BYTES:
            raise Refused("TOO_LARGE", f"a volume of {size} is {nbytes} bytes, the limit is {MAX_VOLUME_BYTES}")
    sources = list({s.instance.uri: s.instance for s in ordered}.values())
    number = {i.uri: n for n, i in enumerate(sources)}
    frames = [[number[s.instance.uri], s.frame] for s in ordered]
    syntaxes = [i.transfer_syntax for i in sources]
    facts = {
        **facts,
        "dtype": dtype.name,
        "frames": None if frames == [[n, 0] for n in range(len(sources))] else frames,
        "pixels": pixels[:1] if all(p == pixels[0] for p in pixels) else pixels,
        "syntaxes": syntaxes[:1] if len(set(syntaxes)) == 1 else syntaxes,
        "decoders": sorted({dicom.decoder(s.instance.transfer_syntax, s.facts) or "native" for s in ordered}),
        "study": ordered[0].facts.get("study"),
        "scanner": ordered[0].facts.get("scanner"),
        "frame": ordered[0].facts.get("frame"),
        "type": ordered[0].facts.get("type"),
        "echo": ordered[0].facts.get("echo"),
        "suv": ordered[0].facts.get("suv"),
        "burned_in": True if any(s.facts.get("burned_in") for s in ordered) else None,
    }
    return volume_header(sources, shape, draft.affine.ravel().tolist(), facts)


def _in_suv(pixels: list[dict], slices: list[_Slice]) -> list[dict]:
    """The same pixels with a rescale that ends at SUVbw."""
    factors = {s.facts.get("suv") for s in slices}
    by_acquisition = any(s.facts.get("suv_by") for s in slices)
    if None in factors:
        problem = next(s.facts.get("suv_problem") for s in slices if s.facts.get("suv") is None)
        raise Refused("SUV_UNKNOWN", problem or "no SUV: the header does not say how to")
    if max(factors) > 1.001 * min(factors) and not by_acquisition:
        raise Refused("SUV_UNKNOWN", f"no SUV: its factor runs from {min(factors):g} to {max(factors):g} in one volume")
    scaled = []
    for one in pixels:
        slope, intercept = dicom.rescale(one)
        scaled.append(one | {"slope": slope * min(factors), "intercept": intercept * min(factors)})
    return scaled


def _resampled(stack: list[_Slice], reason: str, settings: Volumes) -> _Draft | None:
    """A volume that is resampled to a regular grid when it is read, if that is asked for.

    A tilted gantry: slices move within their plane until they stand on their normal, the grid grows to hold them all. Variable
    spacing: equal gaps of about the smallest, from the first slice to the last.
    """
    positions = _by_position(stack)
    if any(len(p) > 1 for p in positions):
        return None
    ordered = [p[0] for p in positions]
    first, n = ordered[0], len(ordered)
    _, columns, rows = first.shape
    normal, spacing = _normal(first), first.facts["spacing"]
    places = np.array([s.position for s in ordered], np.float64)
    along = (places - places[0]) @ normal
    if n < 2 or np.diff(along).max() > WIDEST_GAP * np.diff(along).min():
        return None
    step = (places[-1] - places[0]) / (n - 1)
    off_line = np.abs(places - (places[0] + np.arange(n)[:, None] * step)).max()
    if reason == "GANTRY_TILT" and settings.resample_tilt and off_line <= tolerance(float(step @ normal)):
        gap = float(step @ normal)
        sideways = step - normal * gap
        units = (np.asarray(first.orientation[:3]) * spacing[1], np.asarray(first.orientation[3:]) * spacing[0])
        shift = np.array([sideways @ u / (u @ u) for u in units]) * (n - 1)  # of the last slice, in columns and rows
        low, high = np.floor(np.minimum(0, shift)), np.ceil(np.maximum(0, shift))
        origin = places[0] + low[0] * units[0] + low[1] * units[1]
        shape = (columns + int(high[0] - low[0]), rows + int(high[1] - low[1]), n)
        affine = dicom.slice_affine(origin, first.orientation, spacing, normal * gap)
        before = dicom.slice_affine(places[0], first.orientation, spacing, step)
        stacked = {"shape": shape, "affine": before.ravel().tolist()}
        return _Draft([ordered], affine, {"resampled": "tilt", "stacked": stacked})
    straight = np.abs(places - places[0] - along[:, None] * normal).max() <= tolerance(float(np.diff(along).min()))
    if reason == "IRREGULAR_SPACING" and settings.resample_spacing and straight:
        planes = round(along[-1] / np.diff(along).min()) + 1
        gap = float(along[-1]) / (planes - 1)
        affine = dicom.slice_affine(places[0], first.orientation, spacing, normal * gap)
        stacked = {"shape": (columns, rows, planes), "places": (along / gap).tolist()}
        return _Draft([ordered], affine, {"resampled": "spacing", "stacked": stacked})
    return None


def straightened(array: np.ndarray, header: VolumeHeader) -> np.ndarray:
    """Stacked slices (C, I, J, K) on the regular grid of their header, linearly; beyond them the smallest value."""
    stacked = header.facts["stacked"]
    out = np.full(header.shape, array.min(), array.dtype)
    if "places" in stacked:
        places = np.asarray(stacked["places"])
        for k in range(header.shape[3]):
            upper = int(np.clip(np.searchsorted(places, k), 1, len(places) - 1))
            weight = float(np.clip((k - places[upper - 1]) / (places[upper] - places[upper - 1]), 0, 1))
            out[..., k] = _blend(array[..., upper - 1], array[..., upper], weight, array.dtype)
        return out
    to_stack = np.linalg.inv(np.reshape(stacked["affine"], (4, 4))) @ np.reshape(header.affine, (4, 4))
    for k in range(header.shape[3]):
        moved = (to_stack @ [0, 0, k, 1])[:2]  # columns and rows keep their size and direction
        whole = np.rint(moved)
        moved = np.where(np.abs(moved - whole) < 1e-6, whole, moved)  # else rounding takes the edge for outside
        for c in range(header.shape[0]):
            plane = array[c, :, :, k].astype(np.float64)
            plane = scipy.ndimage.affine_transform(plane, (1, 1), moved, out.shape[1:3], order=1, cval=float(array.min()))
            out[c, :, :, k] = np.rint(plane) if array.dtype.kind in "iu" else plane
    return out


def _blend(a: np.ndarray, b: np.ndarray, weight: float, dtype: np.dtype) -> np.ndarray:
    mixed = a * (1 - weight) + b * weight
    return np.rint(mixed).astype(dtype) if dtype.kind in "iu" else mixed.astype(dtype)
