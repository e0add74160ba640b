"""DICOM SEG: segments on the grid of their images, and label maps back to the hospital (PS3.3 A.51, C.8.20)."""

import hashlib
import io
import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels import get_decoder, pack_bits
from pydicom.sr.coding import Code
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
from pydicom.valuerep import DA, TM

import sparkmed
from sparkmed import storage
from sparkmed.config import Segment
from sparkmed.formats import archive, dicom, identifiers, segmentation
from sparkmed.formats.header import code, uid
from sparkmed.formats.instance import VolumeHeader, check_size
from sparkmed.formats.segmentation import Canvas, Legible, Plane, numbered
from sparkmed.imaging import geometry
from sparkmed.imaging.geometry import Grid
from sparkmed.imaging.volume import Volume
from sparkmed.rejection import InputError, Refused

MANUFACTURER = "sparkmed"
_FACT_TAGS = (
    "Manufacturer Rows Columns FrameOfReferenceUID SegmentSequence "
    "ReferencedSeriesSequence StudiesContainingOtherReferencedInstancesSequence "
    "SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence"
).split()


def read_facts(stream) -> dict[str, Any]:
    """Facts of a SEG for its :class:`Instance`: ``segments`` (number, label, codes of category and property type), ``references``
    (pairs of SeriesInstanceUID and FrameOfReferenceUID), ``size`` (columns, rows), ``planes`` (position, orientation and spacing of
    its outermost frames), ``content`` (digest of its pixels as stored), ``predicted`` when :func:`write` made it. Names as
    :class:`~segmentation.Legible` has them. Raises ``BAD_VALUE``, ``NO_PIXEL_DATA``."""
    with dicom._quiet():
        stream, _ = dicom._inflated(stream)
        ds = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=[*_FACT_TAGS, *identifiers.OF_AN_OBJECT], force=True)
        start, element = stream.tell(), dicom._pixel_element(stream.read(12), *ds.original_encoding)
        if element is None:
            raise Refused("NO_PIXEL_DATA", "a SEG without pixel data")
        content, left = hashlib.sha256(), element[1]
        stream.seek(start + element[2])
        while left and (piece := stream.read(min(left, 1 << 20))):
            content.update(piece)
            left -= len(piece)
        legible = Legible(ds)
        segments = [
            {
                "number": int(s.SegmentNumber),
                "label": legible(s.get("SegmentLabel")),
                "category": _codes(s, "SegmentedPropertyCategoryCodeSequence", legible),
                "property": _codes(s, "SegmentedPropertyTypeCodeSequence", legible),
            }
            for s in ds.get("SegmentSequence") or []
            if s.get("SegmentNumber")  # the background of a label map
        ]
        series = list(ds.get("ReferencedSeriesSequence") or [])
        for study in ds.get("StudiesContainingOtherReferencedInstancesSequence") or []:
            series += study.get("ReferencedSeriesSequence") or []
        uids = {uid(s.get("SeriesInstanceUID")) for s in series} - {""}
        planes = [p for _, p in _frames(ds) if p is not None]
        if planes:
            normal = np.cross(planes[0][3:6], planes[0][6:9])
            along = [float(np.dot(p[:3], normal)) for p in planes]
            planes = [planes[int(np.argmin(along))], planes[int(np.argmax(along))]]
        return {
            "segments": numbered(segments),
            "references": sorted((series, uid(ds.get("FrameOfReferenceUID"))) for series in uids),
            "size": [_needed(ds, "Columns"), _needed(ds, "Rows")],
            "planes": planes,
            "predicted": ds.get("Manufacturer") == MANUFACTURER or None,
            "content": content.hexdigest()[:16],
        }


def _needed(ds: Dataset, keyword: str) -> int:
    """A positive number, or a reason."""
    value = ds.get(keyword)
    if not isinstance(value, int) or value <= 0:
        raise Refused("BAD_VALUE", f"the SEG has no {keyword}" if value is None else f"{keyword} of the SEG is no number above 0")
    return int(value)


def _codes(segment: Dataset, keyword: str, legible: Legible) -> list[str] | None:
    """(value, scheme, meaning) of a code."""
    for item in segment.get(keyword) or []:
        value = item.get("CodeValue") or item.get("LongCodeValue") or item.get("URNCodeValue")
        return [legible(value), legible(code(item.get("CodingSchemeDesignator"))), legible(item.get("CodeMeaning"))]
    return None


def _frames(ds: Dataset) -> Iterator[tuple[int | None, list[float] | None]]:
    """Per frame its segment number (None in a label map), and its position, orientation and spacing in one list (None without)."""
    shared = (ds.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    for own in ds.get("PerFrameFunctionalGroupsSequence") or []:

        def value(group: str, keyword: str, own=own):
            item = (own.get(group) or shared.get(group) or [Dataset()])[0]
            return item.get(keyword)

        number = value("SegmentIdentificationSequence", "ReferencedSegmentNumber")
        position = value("PlanePositionSequence", "ImagePositionPatient")
        orientation = value("PlaneOrientationSequence", "ImageOrientationPatient")
        spacing = value("PixelMeasuresSequence", "PixelSpacing")
        plane = [float(x) for part in (position, orientation, spacing) for x in part or ()]
        if position is None and orientation is None:
            plane = []
        if plane and (len(plane) != 11 or not np.isfinite(plane).all() or min(plane[9:]) <= 0):
            raise Refused("BAD_GEOMETRY", "a frame of the SEG lacks its position, orientation or spacing")
        yield None if number is None else int(number), plane or None


def read_array(data: bytes, facts: Mapping[str, Any], grid: Grid) -> np.ndarray:
    """The segments of a SEG painted on ``grid`` as :class:`~sparkmed.formats.segmentation.Canvas` says.

    Frames go where their own plane position says; voxels without a frame are 0. In a ``FRACTIONAL`` SEG a voxel is of a segment
    from half of MaximumFractionalValue on, probability and occupancy alike. Frames without a position belong to an image of one
    slice. Raises :class:`Refused` ``LABEL_GRID_MISMATCH``, ``LABEL_OVERLAP``, ``BAD_GEOMETRY``, ``BAD_VALUE``,
    ``DUPLICATE_POSITION``, ``NO_DECODER``, ``TRUNCATED``, ``PIXEL_LENGTH``, ``BROKEN_PIXELS``.
    """
    canvas, painted = Canvas(facts, grid), set()
    with dicom._quiet():
        stream, _ = dicom._inflated(io.BytesIO(data))
        ds = pydicom.dcmread(stream, force=True)
        size = _needed(ds, "Columns"), _needed(ds, "Rows")
        frames = list(_frames(ds))
        kind = ds.get("SegmentationType")
        if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
            raise Refused("BAD_VALUE", "SegmentationType is none of BINARY, FRACTIONAL and LABELMAP")
        labelmap = kind == "LABELMAP"
        half = _needed(ds, "MaximumFractionalValue") / 2 if kind == "FRACTIONAL" else 0.5
        for pixels, (number, plane) in zip(_pixels(ds, size, len(frames)), frames, strict=True):
            where = _single(size, grid) if plane is None else Plane.of(plane[:3], plane[3:9], plane[9:], size, grid)
            if not labelmap and number is None:
                raise Refused("BAD_VALUE", "a frame of the SEG names no segment")
            if kind == "BINARY" and pixels.max() > 1:
                raise Refused("BAD_VALUE", f"a pixel of a BINARY SEG is {pixels.max()}")
            place = number, str(where.index)
            if place in painted:
                raise Refused("DUPLICATE_POSITION", "two frames of one segment lie at one position")
            painted.add(place)
            for n in np.unique(pixels[pixels > 0]).tolist() if labelmap else [number]:
                if canvas.wants(n):
                    canvas.paint(n, where.index, where.turn(pixels == n if labelmap else pixels >= half))
    return canvas.finished()


def _pixels(ds: Dataset, size: tuple[int, int], count: int) -> Iterator[np.ndarray]:
    """(columns, rows) stored values, frame by frame."""
    frames = int(ds.get("NumberOfFrames") or 1)
    if frames != count:
        raise Refused("BAD_VALUE", f"{frames} frames, but functional groups for {count}")
    syntax = ds.file_meta.get("TransferSyntaxUID")
    if not syntax:
        syntax = ImplicitVRLittleEndian if ds.original_encoding[0] else ExplicitVRLittleEndian
    plugin = dicom.decoder(syntax, {"bits": _needed(ds, "BitsStored")})
    allocated, voxels = _needed(ds, "BitsAllocated"), size[0] * size[1]
    check_size((count, *size), allocated / 8, len(ds.PixelData), bool(plugin))
    excess = len(ds.PixelData) - (count * voxels * allocated + 7) // 8
    if not plugin and excess > 1:  # one byte of padding; more means that frames do not lie where the header has them
        raise Refused(
            "PIXEL_LENGTH", f"{len(ds.PixelData)} bytes of pixels, {excess} more than the header wants for {count} frames"
        )
    if plugin:
        yield from _decoded(ds, syntax, plugin, size)
    elif allocated == 1:  # a frame may begin within a byte, where pydicom 3 cannot follow
        packed = np.frombuffer(ds.PixelData, np.uint8)
        if not ds.original_encoding[1] and ds["PixelData"].VR == "OW":  # words, low byte last
            packed = packed[: len(packed) // 2 * 2].reshape(-1, 2)[:, ::-1].reshape(-1)
        for start in range(0, count * voxels, voxels):
            bits = np.unpackbits(packed[start // 8 : (start + voxels + 7) // 8], bitorder="little")
            yield bits[start % 8 : start % 8 + voxels].reshape(size[::-1]).T
    elif allocated in (8, 16):
        dtype = np.dtype(f"{'<' if ds.original_encoding[1] else '>'}u{allocated // 8}")
        yield from np.frombuffer(ds.PixelData, dtype, count * voxels).reshape(count, *size[::-1]).transpose(0, 2, 1)
    else:
        raise Refused("BAD_TYPE", f"a SEG of {allocated} bits per voxel, wanted 1, 8 or 16")


def _decoded(ds: Dataset, syntax: str, plugin: str, size: tuple[int, int]) -> Iterator[np.ndarray]:
    frames = get_decoder(UID(syntax)).iter_array(ds, raw=True, decoding_plugin=plugin)
    while True:
        try:
            array, _ = next(frames)
        except StopIteration:
            return
        except Exception as e:
            raise Refused("BROKEN_PIXELS", f"{plugin} cannot decode the pixel data ({type(e).__name__})") from None
        if array.shape != size[::-1]:
            raise Refused("BROKEN_PIXELS", f"a frame of the SEG decodes to {array.shape}, wanted {size[::-1]}")
        yield array.T


def _single(size: tuple[int, int], grid: Grid) -> Plane:
    """The plane of a frame without a place in space."""
    if (*size, 1) != tuple(grid.spatial_shape):
        raise Refused("LABEL_GRID_MISMATCH", f"a frame of {size} pixels without a position for an image of {grid.spatial_shape}")
    return Plane((slice(None), slice(None), 0), (slice(None), slice(None)), False)


def read(url: str, image: VolumeHeader) -> Volume:
    """The segments of the SEG at ``url`` on the grid of ``image``: (segments, I, J, K) uint8, 1 where the segment is, in the order
    of their numbers. Raises :class:`Refused` as :func:`read_array`."""
    data = storage.read_bytes(url)
    grid = Grid(image.affine, image.shape[1:])
    array = read_array(data, read_facts(io.BytesIO(data)), segmentation.acquired(image.facts, grid))
    array = segmentation.regular(array, image.facts, grid)
    return Volume(array, grid.affine, modality="SEG", sources=(storage.absolute(url),))


# writing


def derived_uid(*parts: str) -> str:
    """A UID that is a pure function of ``parts`` (PS3.5 B.2)."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"


def require_source(source: VolumeHeader):
    """Raise :class:`Refused` ``SEG_SOURCE`` when no SEG can be written for an image, as far as its header tells."""
    if source.format != "dicom":
        raise Refused("SEG_SOURCE", f"a DICOM SEG refers to a DICOM series, this image is {source.format}")
    if source.shape[0] != 1:
        raise Refused("SEG_SOURCE", f"a DICOM SEG is of an image of one channel, this has {source.shape[0]} (colours or times)")
    if any("mosaic" in one for one in source.facts["pixels"]):
        raise Refused("SEG_SOURCE", "a DICOM SEG cannot lie on the slices of a Siemens mosaic, which are no frames of it")
    if not source.series_uid:
        raise Refused("SEG_SOURCE", "the source has no SeriesInstanceUID that a SEG could refer to")


def write(
    labels: Volume,
    source: VolumeHeader,
    url: str,
    segments: Mapping[str, Segment],
    seg_type: str = "BINARY",
    probabilities: Volume | None = None,
    *,
    identity: str,
    model: str,
    version: str = "1",
) -> str:
    """Write a label map as DICOM SEG of ``source`` to ``url``; its SOPInstanceUID.

    ``labels`` is (1, I, J, K) on the grid of ``source``; ``segments`` say in order what 1, 2, ... are, by name. ``seg_type`` is
    ``BINARY``, ``LABELMAP`` or ``FRACTIONAL`` (``probabilities`` (1 + segments, I, J, K) in steps of 1/255). The SEG has patient
    and study of the source, refers to its instances and has their very positions. All UIDs and dates are functions of ``identity``
    and the source: writing it again gives the same bytes. Frames without a segment are left out, unless all are.

    An image that was resampled to a regular grid (``volumes.resample_tilt``, ``resample_spacing``) has its SEG on the slices as
    they were acquired: each of their voxels takes the nearest of ``labels``. Reading it back gives for a tilted gantry ``labels``,
    but for the corners of the regular grid that no slice has; for uneven spacing each plane that of the nearest slice. A series
    without FrameOfReferenceUID, as some anonymisers leave it, gets one in its SEG that is a function of its SeriesInstanceUID.
    Texts are written in UTF-8; dates, times and a sex that DICOM does not know are left out.

    Raises :class:`Refused` ``SEG_SOURCE`` for a source that no SEG can be of, ``CHANGED``, ``UNREADABLE``; :class:`InputError` for
    labels on another grid or of other values.
    """
    require_source(source)
    grid = Grid(source.affine, source.shape[1:])
    if len(labels.array) != 1 or not geometry.same_grid(grid, labels):
        raise InputError(f"labels of shape {labels.array.shape} are not on the grid of the source, {source.shape}")
    if labels.array.size and not 0 <= int(labels.array.min()) <= int(labels.array.max()) <= len(segments):
        raise InputError(f"labels reach {labels.array.max()}, but {len(segments)} segments are described")
    # a copy, for highdicom 0.28 scales what it is given in place
    array = labels.array.astype(np.uint8 if len(segments) < 256 else np.uint16)
    array = segmentation.sliced(array, source.facts, grid)[0].transpose(2, 1, 0)
    if seg_type == "FRACTIONAL" and probabilities is not None:
        if probabilities.array.shape != (1 + len(segments), *labels.spatial_shape):
            raise InputError(f"probabilities of shape {probabilities.array.shape} for {len(segments)} segments and a background")
        array = segmentation.sliced(np.clip(probabilities.array[1:], 0, 1), source.facts, grid).transpose(3, 2, 1, 0)
    images = _headers(source)
    frames = _own_frames(source) if _frame_count(images[0]) > 1 else None
    storage.write_bytes(url, _encoded(images, frames, array, segments, seg_type, identity, model, version))
    return derived_uid(identity, "instance")


def _headers(source: VolumeHeader) -> list[Dataset]:
    """The headers of the source's instances in the order of the slices, ready to be referred to."""
    images: list[Dataset] = [Dataset()] * len(source.sources)
    with dicom._quiet():
        for position, data in archive.read_many(source.sources):
            if hashlib.sha256(data).hexdigest() != source.source_sha256[position]:
                raise Refused("CHANGED", f"source {position + 1} of {len(images)} is not the file that was catalogued")
            stream, _ = dicom._inflated(io.BytesIO(data))
            images[position] = pydicom.dcmread(stream, stop_before_pixels=True, force=True)
    first = images[0]
    for image in images:
        for keyword in ("SOPClassUID", "SOPInstanceUID"):  # some anonymisers leave them in the meta group only
            if not image.get(keyword):
                setattr(image, keyword, image.file_meta.get(f"MediaStorage{keyword}"))
        if not all(image.get(k) for k in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")):
            raise Refused("SEG_SOURCE", "an instance of the source lacks a UID that a SEG refers to")
        if "ImageOrientationPatient" in first:  # the same but for rounding, or it were no volume
            image.ImageOrientationPatient = first.ImageOrientationPatient
        if source.shape[3] > 1 and not image.get("FrameOfReferenceUID"):
            image.FrameOfReferenceUID = derived_uid(source.series_uid, "frame of reference")
    with dicom._quiet():
        _mend(first)
    first.SpecificCharacterSet = "ISO_IR 192"
    if first.get("PatientSex") not in ("M", "F", "O"):
        first.PatientSex = None
    for keyword in _TYPE_2:
        if keyword not in first:
            setattr(first, keyword, None)
    if _frame_count(first) > 1:
        _share(first, _own_frames(source)[0])
    elif first.get("SliceThickness") is None:
        first.SliceThickness = f"{geometry.spacing(np.reshape(source.affine, (4, 4)))[2]:.10g}"
    return images


def _mend(header: Dataset):
    """Make what highdicom copies of a header such that it can: texts in UTF-8, and nothing that is not what its element holds."""
    for tag in [t for t in header.keys() if t.group < 0x5000]:  # no functional groups
        try:
            element = header[tag]
            if element.VR == "SQ":
                for item in element.value:
                    _mend(item)
            elif element.VR == "PN":  # else the bytes of the source are kept
                element.value = [str(n) for n in element.value] if element.VM > 1 else str(element.value)
            elif element.VR in _CHECKED and element.value:
                _CHECKED[element.VR](element.value)
        except Exception:
            del header[tag]


_CHECKED = {"DA": DA, "TM": TM}


def _own_frames(source: VolumeHeader) -> list[int]:
    """Frames of a multi-frame source in the order of the slices, from 0."""
    return [frame for _, frame in source.facts.get("frames") or [[0, 0]]]


def _frame_count(image: Dataset) -> int:
    return int(image.get("NumberOfFrames") or 1)


def _share(image: Dataset, frame: int):
    """Make orientation and spacing of a frame those of all: highdicom looks for them there, some vendors write them per frame, and
    frames of another orientation are no part of the volume."""
    shared, each = image.get("SharedFunctionalGroupsSequence"), image.get("PerFrameFunctionalGroupsSequence")
    if not shared or not each:
        raise Refused("SEG_SOURCE", "a multi-frame source without functional groups")
    for group in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
        if group in each[frame]:
            setattr(shared[0], group, each[frame].get(group))


_TYPE_2 = "PatientID PatientName PatientBirthDate PatientSex AccessionNumber StudyID StudyDate StudyTime".split()


def _encoded(images, frames, array, segments, seg_type, identity, model, version) -> bytes:
    import highdicom as hd  # slow to load, and only writers need it

    first = images[0]
    date = next((first.get(k) for k in ("ContentDate", "SeriesDate", "StudyDate") if first.get(k)), "19000101")
    time = next((first.get(k) for k in ("ContentTime", "SeriesTime", "StudyTime") if first.get(k)), "000000")
    algorithm = hd.AlgorithmIdentificationSequence(model[:64], Code("123110", "DCM", "Artificial Intelligence"), version[:64])
    described = [
        hd.seg.SegmentDescription(n, name[:64], Code(*s.category), Code(*s.type), "AUTOMATIC", algorithm)
        for n, (name, s) in enumerate(segments.items(), start=1)
    ]
    with dicom._quiet():
        try:
            seg = hd.seg.Segmentation(
                images,
                array,
                seg_type,
                described,
                series_instance_uid=derived_uid(identity, "series"),
                series_number=max(int(first.get("SeriesNumber") or 0), 0) + 1000,
                sop_instance_uid=derived_uid(identity, "instance"),
                instance_number=1,
                manufacturer=MANUFACTURER,
                manufacturer_model_name=model[:64],
                software_versions=sparkmed.__version__,
                device_serial_number=version[:64],
                series_description=f"{model} {version}"[:64],
                content_label="SEGMENTATION",
                content_date=date,
                content_time=time,
                plane_positions=frames and [hd.PlanePositionSequence("PATIENT", _position(first, n)) for n in frames],
            )
        except (ValueError, TypeError, AttributeError, KeyError) as e:
            raise Refused("SEG_SOURCE", f"no SEG can be written for the headers of this series ({type(e).__name__})") from None
        if frames:
            _keep_references(seg, frames)
        if seg_type == "BINARY" and (pixels := seg.Rows * seg.Columns) < 8:  # highdicom 0.28 begins a byte for each such frame
            packed = np.frombuffer(seg.PixelData, np.uint8)[: seg.NumberOfFrames, None]
            seg.PixelData = pack_bits(np.unpackbits(packed, axis=1, count=pixels, bitorder="little"))
        seg.InstanceCreationDate, seg.InstanceCreationTime = date, time
        for item in seg.get("ContributingEquipmentSequence", []):
            item.ContributionDateTime = date + time
        organisation = derived_uid(identity, "dimensions")
        for item in (*seg.DimensionOrganizationSequence, *seg.get("DimensionIndexSequence", [])):
            item.DimensionOrganizationUID = organisation
        if seg_type != "BINARY":  # by a named encoder: that of gdcm, which comes first, kills the process on frames of odd size
            seg.compress(RLELossless, encoding_plugin="pylibjpeg", generate_instance_uid=False)
        out = io.BytesIO()
        seg.save_as(out, enforce_file_format=True)
        return out.getvalue()


def _position(image: Dataset, frame: int) -> list[float]:
    shared, own = image.SharedFunctionalGroupsSequence[0], image.PerFrameFunctionalGroupsSequence[frame]
    return [float(x) for x in (own.get("PlanePositionSequence") or shared.PlanePositionSequence)[0].ImagePositionPatient]


def _keep_references(seg: Dataset, frames: list[int]):
    """Of the frames at one place, say of several echoes, only those of the volume are sources."""
    for frame in seg.PerFrameFunctionalGroupsSequence:
        for derivation in frame.get("DerivationImageSequence") or []:
            own = [s for s in derivation.SourceImageSequence if int(s.ReferencedFrameNumber) - 1 in frames]
            derivation.SourceImageSequence = own
