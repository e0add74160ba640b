"""DICOM: the facts in a header, and the pixels of its frames.

Headers are parsed up to the pixel data and no further. Pixels come out as stored values times slope plus intercept, one
decoder per transfer syntax, named in :data:`DECODERS`. No exception but :class:`Refused` leaves this module, and no
message quotes a header value that could identify a person.
"""

import contextlib
import functools
import io
import logging
import re
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.pixels import apply_color_lut, get_decoder
from pydicom.tag import Tag
from pydicom.uid import UID

from sparkmed.formats import frames as frame_facts
from sparkmed.formats import identifiers, isolation, pet
from sparkmed.formats.header import Header, uid
from sparkmed.formats.instance import check_size, to_json
from sparkmed.rejection import Refused

DEFLATED = "1.2.840.10008.1.2.1.99"
DECODERS = {
    "1.2.840.10008.1.2": "",  # native: nothing to decode
    "1.2.840.10008.1.2.1": "",
    DEFLATED: "",
    "1.2.840.10008.1.2.2": "",
    "1.2.840.10008.1.2.5": "pylibjpeg",  # RLE
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG baseline
    "1.2.840.10008.1.2.4.51": "pillow",  # JPEG extended, 8 bit; 12 bit below
    "1.2.840.10008.1.2.4.57": "gdcm",  # JPEG lossless
    "1.2.840.10008.1.2.4.70": "gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",  # JPEG-LS
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",  # JPEG 2000
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
    "1.2.840.10008.1.2.4.201": "pylibjpeg",  # HTJ2K
    "1.2.840.10008.1.2.4.202": "pylibjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg",
}
"""Decoding plugin of pydicom by transfer syntax: the plugins differ by grey levels, so one is named and recorded."""

PROJECTIONS = frozenset({"CR", "DX", "MG", "RF", "XA", "IO", "PX", "RG"})
"""Modalities whose MONOCHROME1 is a way of showing (white is 0) and is inverted; elsewhere values are physical."""
SLICED = frozenset({"CT", "MR", "PT"})
"""Modalities whose images lie in space: without a position there is no volume."""

SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
"""Whole-slide microscopy."""
SECONDARY_CAPTURES = frozenset(f"1.2.840.10008.5.1.4.1.1.7{n}" for n in ("", ".1", ".2", ".3", ".4"))
_NOT_IMAGES = frozenset(
    {
        "1.2.840.10008.1.3.10",  # DICOMDIR
        "1.2.840.10008.5.1.4.1.1.66",  # raw data, registrations, fiducials, segmentations, surfaces
        "1.2.840.10008.5.1.4.1.1.66.1",
        "1.2.840.10008.5.1.4.1.1.66.2",
        "1.2.840.10008.5.1.4.1.1.66.3",
        "1.2.840.10008.5.1.4.1.1.66.4",
        "1.2.840.10008.5.1.4.1.1.66.5",
        "1.2.840.10008.5.1.4.1.1.66.6",
        "1.2.840.10008.5.1.4.1.1.66.7",
        "1.2.840.10008.5.1.4.1.1.30",  # parametric maps
        "1.2.840.10008.5.1.4.1.1.481.2",  # RT dose: a grid of its own scaling
    }
)
SEGMENTATIONS = {
    "1.2.840.10008.5.1.4.1.1.66.4": "dicom_seg",
    "1.2.840.10008.5.1.4.1.1.66.7": "dicom_seg",  # label map
    "1.2.840.10008.5.1.4.1.1.481.3": "rtstruct",
}
"""Objects that say what the voxels of another series are: module that reads them, by SOP class."""
_NOT_IMAGE_MODALITIES = frozenset({"SEG", "SR", "PR", "KO", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "ECG", "DOC", "REG", "FID"})

_HEADER_KEYWORDS = (
    "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID Modality ImageType PatientID PatientName "
    "Manufacturer ManufacturerModelName "
    "SeriesNumber InstanceNumber AcquisitionNumber TemporalPositionIdentifier TriggerTime FrameReferenceTime EchoTime EchoNumbers "
    "DiffusionBValue ImagePositionPatient ImageOrientationPatient FrameOfReferenceUID PixelSpacing ImagerPixelSpacing "
    "NominalScannedPixelSpacing SpacingBetweenSlices SliceThickness "
    "NumberOfFrames Rows Columns SamplesPerPixel PhotometricInterpretation BitsAllocated BitsStored HighBit PixelRepresentation "
    "RescaleSlope RescaleIntercept RescaleType ModalityLUTSequence "
    "BurnedInAnnotation ComplexImageComponent DiffusionGradientOrientation "
    "SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence DimensionIndexSequence "
    "DetectorInformationSequence SliceVector TimeSlotVector EnergyWindowVector DetectorVector PhaseVector RotationVector "
    "AngularViewVector "
    "TotalPixelMatrixColumns TotalPixelMatrixRows TotalPixelMatrixFocalPlanes NumberOfOpticalPaths ImageOrientationSlide "
    "TotalPixelMatrixOriginSequence DimensionOrganizationType "
    "Units SUVType CorrectedImage DecayCorrection PatientWeight RadiopharmaceuticalInformationSequence "
    "SeriesDate SeriesTime AcquisitionDate AcquisitionTime AcquisitionDateTime "
    "TimezoneOffsetFromUTC ConcatenationUID InConcatenationTotalNumber"
).split()
_PIXEL_KEYWORDS = (
    "SOPInstanceUID NumberOfFrames Rows Columns SamplesPerPixel PhotometricInterpretation PlanarConfiguration "
    "BitsAllocated BitsStored HighBit PixelRepresentation "
    "RedPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableDescriptor "
    "BluePaletteColorLookupTableDescriptor RedPaletteColorLookupTableData GreenPaletteColorLookupTableData "
    "BluePaletteColorLookupTableData SegmentedRedPaletteColorLookupTableData SegmentedGreenPaletteColorLookupTableData "
    "SegmentedBluePaletteColorLookupTableData PixelData FloatPixelData DoubleFloatPixelData ExtendedOffsetTable "
    "ExtendedOffsetTableLengths"
).split()
_OWNER = tuple(
    Tag(k)
    for k in (
        "SpecificCharacterSet PatientName PatientID OtherPatientNames OtherPatientIDs PatientBirthDate AccessionNumber "
        "ReferringPhysicianName OperatorsName PerformingPhysicianName InstitutionName"
    ).split()
)
"""Elements that say whose an image is, by which its other values are judged."""
_PRIVATE = (0x0019100A, 0x0019100C, 0x0019100E, 0x00291010, 0x0043102F, 0x00431039, 0x20011003, 0x70531000)
"""Of vendors that say there what the standard has no element for, or had none; as they lie in the first block of their group."""
_BLOCKS = range(0x10, 0x13)
_HEADER_TAGS = (
    [Tag(k) for k in _HEADER_KEYWORDS]
    + [*_OWNER]
    + [Tag(t) for p in _PRIVATE for b in _BLOCKS for t in (p & 0xFFFF0000 | b, p & 0xFFFF0000 | b << 8 | p & 0xFF)]
)
_PIXEL_TAGS = [pydicom.datadict.tag_for_keyword(k) for k in _PIXEL_KEYWORDS]
_GROUP_STARTS = (b"\x02\x00", b"\x08\x00")
_INTERLEAVED = re.compile(r"\.4\.(5|7|9|20)\d+$")
"""JPEG and JPEG 2000: samples of a pixel lie together (PS3.5 8.2.1, 8.2.4)."""
_INFLATE_LIMIT = 64 << 20
_INFLATE_RATIO = 100
"""A deflated data set of more bytes than that, and of more than this many times what it is packed in, is refused."""
_MOST_AT_ONCE = 256 << 20
"""Bytes of a file on storage that are read in one piece: no element before the pixel data is larger."""


def recognise(head: bytes) -> bool:
    """True when the first bytes of a file are those of a DICOM object, with or without its preamble."""
    if head[128:132] == b"DICM":
        return True
    if head[:4] == b"\0\x08\0\x05" and head[4:6] == b"CS":  # big endian
        return True
    if head[:2] not in _GROUP_STARTS or len(head) < 16:
        return False
    element, vr = int.from_bytes(head[2:4], "little"), head[4:6]
    known = pydicom.datadict.dictionary_has_tag(int.from_bytes(head[:2], "little") << 16 | element)
    length = int.from_bytes(head[4:8], "little")
    return known and (vr.decode("latin-1") in pydicom.valuerep.VR.__members__ or length <= 4096)


@contextlib.contextmanager
def _quiet():
    """No warning or log line of the DICOM library: they may quote values. Whatever it raises is a :class:`Refused`."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Refused, isolation.Unavailable):
        raise
    except RecursionError:
        raise Refused("DEEP_NESTING", "sequences are nested too deep to be read") from None
    except MemoryError:
        raise Refused("TOO_LARGE", "the header claims more than the memory holds") from None
    except Exception as e:
        raise Refused("BROKEN_DICOM", f"the DICOM object cannot be parsed ({type(e).__name__})") from None
    finally:
        logger.setLevel(level)


def _inflated(stream):
    """``stream``, or an undeflated copy of it when its transfer syntax is deflated; ``None`` or the syntax's UID."""
    head = stream.read(1024)
    stream.seek(0)
    if head[128:132] != b"DICM" or DEFLATED.encode() not in head:
        return stream, None
    if head[132:136] != b"\x02\x00\x00\x00":
        raise Refused("BROKEN_DICOM", "a deflated object without the length of its meta group")
    end = 144 + int.from_bytes(head[140:144], "little")
    meta = stream.read(end)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    packed = stream.read()
    try:
        data = inflater.decompress(packed, max(_INFLATE_LIMIT, _INFLATE_RATIO * len(packed)))
    except zlib.error:
        raise Refused("BROKEN_DICOM", "the deflated data set is damaged") from None
    if inflater.unconsumed_tail:
        raise Refused("BOMB", f"{len(packed)} deflated bytes unpack to more than {len(data)}")
    if not inflater.eof:
        raise Refused("TRUNCATED", "the deflated data set ends early")
    plain = b"1.2.840.10008.1.2.1".ljust(len(DEFLATED), b"\0")
    return io.BytesIO(meta.replace(DEFLATED.encode(), plain, 1) + data), DEFLATED


class _Sparing:
    """A file on storage of which no piece is read that only a header's claim makes so large."""

    def __init__(self, stream):
        self.stream, self.seek, self.tell = stream, stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST_AT_ONCE:
            raise Refused("TOO_LARGE", f"an element before the pixel data has more than {_MOST_AT_ONCE} bytes")
        return self.stream.read(size)


_RESCALE_TYPES = frozenset({"HU", "HU_MOD", "OD", "US", "MGML", "Z_EFF", "ED", "EDW", "PCT"})
"""Defined terms of PS3.3 C.11.1.1.2: others are free text."""


def read_header(stream, size: int) -> dict:
    """The fields of an :class:`Instance` that a DICOM object determines; ``size`` is its length in bytes.

    An image whose pixels are cut off has the fact ``problem``. Raises :class:`Refused`: ``BROKEN_DICOM``, ``TRUNCATED`` (of
    several frames), ``NO_PIXEL_DATA``, ``BAD_VALUE``, ``BAD_GEOMETRY``, ``BAD_SHAPE``, ``PIXEL_LENGTH``, ``DEEP_NESTING``,
    ``TOO_LARGE``, ``BOMB``.
    """
    with _quiet():
        stream, deflated = _inflated(stream if isinstance(stream, io.BytesIO) else _Sparing(stream))
        if deflated:
            size = stream.getbuffer().nbytes
        ds = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=_HEADER_TAGS, force=True)
        stopped = stream.tell()
        element = stream.read(12)
        return _facts(ds, deflated, element, stopped, size)


def _facts(ds, deflated: str | None, element: bytes, stopped: int, size: int) -> dict:
    implicit, little = ds.original_encoding
    h = Header(ds, little)
    syntax = deflated or uid(ds.file_meta.get("TransferSyntaxUID"))
    if not syntax:
        syntax = str(pydicom.uid.ImplicitVRLittleEndian if implicit else
                     pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian)  # fmt: skip
    sop_class = h.uid("SOPClassUID") or uid(ds.file_meta.get("MediaStorageSOPClassUID"))
    modality = h.text("Modality")
    if not sop_class and not modality and "Rows" not in h:
        raise Refused("BROKEN_DICOM", "neither a SOP class nor a modality nor an image: not a whole DICOM object")
    study = h.uid("StudyInstanceUID") or None
    fields = {
        "format": "dicom",
        "kind": "segmentation" if sop_class in SEGMENTATIONS else "other",
        "modality": modality,
        "series_uid": h.uid("SeriesInstanceUID"),
        "sop_uid": h.uid("SOPInstanceUID"),
        "sop_class": sop_class,
        "transfer_syntax": syntax,
        "shape": (0, 0, 0, 0),
        "affine": None,
        "patient": str(ds.get("PatientID") or ds.get("PatientName") or "").strip(),
        "header": to_json({"study": study}),
    }
    name = _class_name(sop_class)
    if sop_class in _NOT_IMAGES or modality in _NOT_IMAGE_MODALITIES or (name and "Image" not in name):
        return fields
    pixels = _pixel_element(element, implicit, little)
    if pixels is None:
        if stopped > size:
            raise Refused("TRUNCATED", f"an element before the pixel data ends {stopped - size} bytes behind the end of the file")
        if "Rows" in h or "Image" in name:
            raise Refused("NO_PIXEL_DATA", "an image object without pixel data")
        return fields
    layout = _layout(h, pixels, syntax, stopped, size)
    return fields | _image(h, layout, {"study": study, **_slice_facts(h, pixels), **layout.facts}, sop_class)


@dataclass(frozen=True)
class _Layout:
    """How pixels are stored; ``cut`` is why not all of them are there."""

    rows: int
    columns: int
    frames: int
    samples: int
    allocated: int
    stored: int
    photometric: str
    cut: list[str] | None = None

    @property
    def facts(self) -> dict:
        return {
            "frames": None if self.frames == 1 else self.frames,
            "photometric": self.photometric,
            "allocated": self.allocated,
            "bits": self.stored,
            "problem": self.cut,
        }


def _layout(h: Header, pixels: tuple[int, int, int], syntax: str, stopped: int, size: int) -> _Layout:
    rows, columns = h.integer("Rows"), h.integer("Columns")
    frames, samples = h.integer("NumberOfFrames", 1), h.integer("SamplesPerPixel", 1)
    allocated = h.integer("BitsAllocated", {0x7FE00008: 32, 0x7FE00009: 64}.get(pixels[0]))
    stored = h.integer("BitsStored", allocated)
    if not rows or not columns or samples not in (1, 3) or frames < 1:
        raise Refused("BAD_SHAPE", f"pixel data of {rows} rows, {columns} columns, {samples} samples, {frames} frames")
    if allocated not in (1, 8, 16, 32, 64) or not 1 <= stored <= allocated:
        raise Refused("BAD_TYPE", f"pixel data of {stored} bits stored in {allocated}")
    if not DECODERS.get(syntax) and h.integer("HighBit", stored - 1) != stored - 1:
        raise Refused("BAD_TYPE", f"the high bit is {h.integer('HighBit')}, wanted {stored - 1} for {stored} bits stored")
    if pixels[1] == 0xFFFFFFFF and DECODERS.get(syntax) == "":
        raise Refused("PIXEL_LENGTH", "pixel data of undefined length in a transfer syntax without compression")
    photometric = h.text("PhotometricInterpretation")
    cut = None
    try:
        _check_pixel_length(pixels, rows, columns, frames, samples, allocated, photometric, stopped, size)
    except Refused as e:
        if e.reason != "TRUNCATED" or frames > 1:
            raise
        cut = [e.reason, e.message]  # a slice that its series must be known to lack
    return _Layout(rows, columns, frames, samples, allocated, stored, photometric, cut)


def _slice_facts(h: Header, pixels: tuple[int, int, int]) -> dict:
    """What an image says about where it lies, what it is of its series, and what its pixels mean."""
    concatenation = [h.uid("ConcatenationUID"), h.integer("InConcatenationTotalNumber", 0)]
    return {
        "scanner": _scanner(h),
        "series": h.integer("SeriesNumber"),
        "number": h.integer("InstanceNumber"),
        "acquisition": h.integer("AcquisitionNumber"),
        "temporal": h.integer("TemporalPositionIdentifier"),
        "trigger": h.number("TriggerTime"),
        "frame_time": h.number("FrameReferenceTime"),
        "time": _time_of_day(h.plain("AcquisitionTime") or h.plain("AcquisitionDateTime")[8:]),
        "echo": h.number("EchoTime"),
        "echo_number": h.integer("EchoNumbers"),
        "b": _b_value(h),
        "direction": h.numbers("DiffusionGradientOrientation") or h.private(0x0019100E, "SIEMENS MR HEADER", "FD"),
        "type": h.texts("ImageType") or None,
        "component": h.text("ComplexImageComponent") or _ge_component(h),
        "frame": h.uid("FrameOfReferenceUID") or None,
        "position": h.numbers("ImagePositionPatient", 3),
        "orientation": h.numbers("ImageOrientationPatient", 6),
        "spacing": h.numbers("PixelSpacing", 2) or h.numbers("ImagerPixelSpacing", 2) or h.numbers("NominalScannedPixelSpacing", 2),
        "gap": h.number("SpacingBetweenSlices"),
        "thickness": h.number("SliceThickness"),
        "signed": bool(h.integer("PixelRepresentation", 0)),
        "float": pixels[0] != 0x7FE00010 or None,
        "slope": h.number("RescaleSlope"),
        "intercept": h.number("RescaleIntercept"),
        "rescale_type": kind if (kind := h.text("RescaleType")) in _RESCALE_TYPES else None,
        "lut": "ModalityLUTSequence" in h or None,
        "burned_in": h.text("BurnedInAnnotation") == "YES" or None,
        "concatenation": concatenation if "ConcatenationUID" in h else None,
    }


def _image(h: Header, layout: _Layout, header: dict, sop_class: str) -> dict:
    """The fields of an :class:`Instance` that an image adds to those of any object; ``header`` is filled up."""
    rows, columns, frames = layout.rows, layout.columns, layout.frames
    modality = h.text("Modality")
    slide = sop_class == SLIDE and "TotalPixelMatrixColumns" in h
    by_frame = frame_facts.slide(h, frames, rows, columns) if slide else frame_facts.functional_groups(h, frames)
    if not by_frame and frames > 1 and modality == "NM":
        by_frame = frame_facts.nuclear(h, frames)
    if "MOSAIC" in (header["type"] or ()) and frames == 1 and not by_frame:
        try:
            header["mosaic"], by_frame = frame_facts.mosaic(h, header, rows, columns)
            rows, columns = rows // header["mosaic"], columns // header["mosaic"]
        except Refused as e:
            header["problem"] = [e.reason, e.message]
    if modality == "PT":
        header["pet_units"] = h.text("Units") or None
        try:
            header["suv"], header["suv_by"] = pet.suv_factor(h)
        except Refused as e:
            header["suv_problem"] = e.message
    _withhold(h, [header, *by_frame])
    same, differing = frame_facts.folded(by_frame)
    header |= same | {"per_frame": differing or None}
    count = max(frames, len(by_frame))
    if slide:  # all frames are one picture
        (columns, rows), count = header["matrix"], 1
    shape = (3 if layout.photometric == "PALETTE COLOR" else layout.samples, columns, rows, count)
    return {"kind": "image", "shape": shape, "affine": _slice_affine(header), "header": to_json(header)}


_COMMON = frozenset(
    "ORIGINAL DERIVED MIXED PRIMARY SECONDARY AXIAL LOCALIZER VOLUME LABEL OVERVIEW NONE OTHER MPR M P R I ND NORM".split()
)
"""Values of the image type that name nobody."""


def _withhold(h: Header, facts: list[dict]):
    """Leave out of the image types what names somebody: vendors have values of their own there, so the standard cannot tell."""
    for some in facts:
        if some.get("type") and not _COMMON.issuperset(some["type"]):
            some["type"] = list(_withheld(_owner(h), tuple(some["type"])))


def _owner(h: Header) -> tuple[tuple[int, bytes], ...]:
    return tuple((t, h.elements[t].value) for t in _OWNER if t in h.elements and isinstance(h.elements[t].value, bytes))


@functools.lru_cache(1024)
def _withheld(owner: tuple[tuple[int, bytes], ...], values: tuple[str, ...]) -> tuple[str, ...]:
    dataset = pydicom.Dataset()
    for tag, value in owner:
        dataset[tag] = RawDataElement(Tag(tag), pydicom.datadict.dictionary_VR(tag), len(value), value, 0, False, True)
    try:
        known = identifiers.Identifiers(dataset)
    except Refused:
        return tuple(v if v in _COMMON else "" for v in values)
    return tuple("" if known.found_in(v) else v for v in values)


def _scanner(h: Header) -> str | None:
    """Manufacturer and model, which identify nobody by PS3.15 Table E.1-1; None when they hold what names somebody."""
    found = re.sub(r"[^ -~]", "", f"{h.plain('Manufacturer')} {h.plain('ManufacturerModelName')}")
    words = " ".join(found.split())[:64].strip()
    return _withheld(_owner(h), (words,))[0] or None if words else None


def _b_value(h: Header) -> float | None:
    """Diffusion b in s/mm2: the standard's element or that of Siemens, GE or Philips."""
    siemens, philips = h.private(0x0019100C, "SIEMENS MR HEADER"), h.private(0x20011003, "Philips Imaging DD 001", "FL")
    ge = h.private(0x00431039, "GEMS_PARM_01")
    found = [h.number("DiffusionBValue"), *(v[0] for v in (siemens, philips) if v), *([ge[0] % 100_000] if ge else [])]
    return next((float(v) for v in found if v is not None), None)


def _time_of_day(text: str) -> float | None:
    """Seconds of HHMMSS.FFFFFF; no date, which is nobody's business here."""
    text = text.replace(":", "")
    if len(text) < 6 or not (text[:6].isdigit() and text.replace(".", "", 1).isdigit()):
        return None
    return int(text[:2]) * 3600 + int(text[2:4]) * 60 + float(text[4:])


def _ge_component(h: Header) -> str | None:
    """GE names magnitude, phase, real and imaginary images in an element of its own."""
    found = h.private(0x0043102F, "GEMS_PARM_01", "SS")
    return {0: None, 1: "PHASE", 2: "REAL", 3: "IMAGINARY"}.get(int(found[0])) if found else None


@functools.lru_cache(1024)
def _class_name(sop_class: str) -> str:
    """The standard's name of a SOP class, empty when it is not in the dictionary."""
    name = UID(sop_class).name if sop_class else ""
    return "" if name == sop_class else name


def _slice_affine(header: dict) -> tuple[float, ...] | None:
    """RAS+ affine of one slice as 16 numbers, None when the header does not say where it lies."""
    position, orientation, spacing = (header.get(name) for name in ("position", "orientation", "spacing"))
    if not (position and orientation and spacing) or min(spacing) <= 0:
        return None
    (a, b, c), (d, e, f) = orientation[:3], orientation[3:]
    normal = (b * f - c * e, c * d - a * f, a * e - b * d)
    if sum(x * x for x in normal) < 0.5:
        return None
    thick = abs(header["gap"] or header["thickness"] or 1.0)
    affine = slice_affine(position, orientation, spacing, [x * thick for x in normal])
    return tuple(affine.ravel().tolist())


def slice_affine(position, orientation, spacing, step) -> np.ndarray:
    """(4, 4) RAS+ affine of slices ``step`` apart: PS3.3 C.7.6.2.1.1, columns as i, rows as j.

    ``position``, ``orientation`` (row direction, then column direction) and ``step`` are in DICOM's LPS frame in mm,
    ``spacing`` is PixelSpacing: (between rows, between columns) in mm.

    >>> slice_affine([1, 2, 3], [1, 0, 0, 0, 1, 0], [0.5, 0.25], [0, 0, 2]).tolist()[0]
    [-0.25, 0.0, 0.0, -1.0]
    """
    affine = np.eye(4)
    affine[:3, 0] = np.asarray(orientation[:3], np.float64) * spacing[1]
    affine[:3, 1] = np.asarray(orientation[3:], np.float64) * spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = position
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine + 0.0


def _pixel_element(element: bytes, implicit: bool, little: bool) -> tuple[int, int, int] | None:
    """(tag, length of the value, length of the element's own header) of the element at which reading stopped."""
    if len(element) < 8:
        return None
    order = "little" if little else "big"
    tag = int.from_bytes(element[:2], order) << 16 | int.from_bytes(element[2:4], order)
    if tag not in (0x7FE00010, 0x7FE00008, 0x7FE00009):
        return None
    if implicit or not element[4:6].isalpha():
        return tag, int.from_bytes(element[4:8], order), 8
    if element[4:6] in (b"OB", b"OW", b"OF", b"OD", b"UN", b"OL"):
        return tag, int.from_bytes(element[8:12], order), 12
    return tag, int.from_bytes(element[6:8], order), 8


def _check_pixel_length(tag, rows, columns, frames, samples, allocated, photometric, stopped, size):
    """Pixel data must be all there, and no more than a header of another image would explain."""
    _, length, own = tag
    available = max(size - stopped - own, 0)
    if length == 0xFFFFFFFF:
        check_size((rows, columns, frames, samples), allocated / 8, available, True)
        if 8 * frames > available:
            raise Refused("TRUNCATED", f"{frames} frames in {available} bytes: each takes 8 at the least")
        return
    share = 2 / 3 if photometric == "YBR_FULL_422" else 1  # chroma is stored for every other column
    check_size((rows, columns, frames, samples), allocated / 8 * share, min(length, available), False)
    frame = rows * columns * samples * allocated / 8 * share
    if length >= (frames + 1) * frame and length - frames * frame >= 2:
        raise Refused("PIXEL_LENGTH", f"{length} bytes of pixels, the header wants {frames * frame:.0f} for {frames} frames")


def read_frames(data: bytes, header: dict, syntax: str, wanted: list[int]) -> Iterator[np.ndarray]:
    """Stored values (C, I, J) of the ``wanted`` frames of an image, ascending, in its own integer or float type; colours become
    RGB. The frames of a mosaic are its tiles; those of a whole slide are one picture together, white where none lies.

    ``header`` is the instance's own facts, ``syntax`` its transfer syntax. Raises :class:`Refused`: ``NO_DECODER``,
    ``CHANGED`` (the bytes are not those that were catalogued), ``BROKEN_PIXELS``.
    """
    plugin, edge = decoder(syntax, header), header.get("mosaic", 1)
    with _quiet():
        stream, _ = _inflated(io.BytesIO(data))
        ds = pydicom.dcmread(stream, specific_tags=_PIXEL_TAGS, force=True)
        if int(ds.get("NumberOfFrames") or 1) != header.get("frames", 1):
            raise Refused("CHANGED", "the number of frames is not the catalogued one")
        if plugin:
            _check_codestream(ds, syntax, header.get("frames", 1))
    if "matrix" in header:
        wanted = list(range(header.get("frames", 1)))
    arrays, picture, number = _decoded(ds, syntax, plugin, header, wanted if edge == 1 else [0]), None, 0
    while True:
        with _quiet(), _decoding(plugin):
            array = next(arrays, None)
        if array is None:
            if picture is not None:
                yield picture
            return
        array = array.T[None] if array.ndim == 2 else array.transpose(2, 1, 0)
        if "matrix" in header:
            columns, rows = header["matrix"]
            if picture is None:
                picture = np.full((len(array), columns, rows), stored_range(header)[1], array.dtype)
            i, j = header["tiles"][number]
            place = picture[:, i : i + array.shape[1], j : j + array.shape[2]]
            place[...] = array[:, : place.shape[1], : place.shape[2]]
            number += 1
        elif edge == 1:
            yield array
        else:
            columns, rows = array.shape[1] // edge, array.shape[2] // edge
            for down, right in (divmod(tile, edge) for tile in wanted):
                yield array[:, right * columns : (right + 1) * columns, down * rows : (down + 1) * rows]


@contextlib.contextmanager
def _decoding(plugin: str):
    try:
        yield
    except (Refused, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as e:  # a panic of a decoder in Rust is no Exception
        raise Refused("BROKEN_PIXELS", f"{plugin or 'pydicom'} cannot decode the pixel data ({type(e).__name__})") from None


def decoder(syntax: str, header: dict) -> str:
    """Name of the decoding plugin for ``syntax``, empty when pixels are native; raises ``NO_DECODER``."""
    if syntax not in DECODERS:
        raise Refused("NO_DECODER", f"transfer syntax {syntax} is not decoded")
    plugin = DECODERS[syntax]
    if syntax.endswith(".4.51") and header.get("bits", 8) > 8:
        plugin = "pylibjpeg"
    if plugin and plugin not in get_decoder(UID(syntax)).available_plugins:
        extra = "; install sparkmed[gpl-codecs] for 12-bit JPEG" if syntax.endswith(".4.51") else ""
        raise Refused("NO_DECODER", f"transfer syntax {syntax} wants the decoder {plugin}, which is not installed{extra}")
    return plugin


def _decoded(ds, syntax: str, plugin: str, header: dict, wanted: list[int]) -> Iterator[np.ndarray]:
    """(rows, columns) or (rows, columns, 3) of each of the ``wanted`` frames."""
    uid = UID(pydicom.uid.ExplicitVRLittleEndian if syntax == DEFLATED else syntax)
    if uid not in pydicom.uid.AllTransferSyntaxes or not uid.is_transfer_syntax:
        raise Refused("NO_DECODER", f"transfer syntax {syntax} is not decoded")
    arguments = {"decoding_plugin": plugin} if plugin else {}
    get = get_decoder(uid)
    if _INTERLEAVED.search(syntax) and "PlanarConfiguration" in ds:
        ds.PlanarConfiguration = 0  # so the standard has it, whatever the header says
    if header.get("frames", 1) > 1 and header.get("allocated") == 1:  # frames need not begin at a byte
        whole = get.as_array(ds, **arguments)[0]
        arrays = (whole[n] for n in wanted)
    elif header.get("frames", 1) == 1:
        arrays = [get.as_array(ds, allow_excess_frames=False, **arguments)[0]]
    else:
        arrays = (array for array, _ in get.iter_array(ds, indices=wanted, **arguments))
    for array in arrays:
        yield _painted(array, ds) if header.get("photometric") == "PALETTE COLOR" else array


def _painted(array: np.ndarray, ds) -> np.ndarray:
    """(rows, columns, 3) colours of palette indices: PS3.3 C.7.6.3.1.5."""
    if "SegmentedRedPaletteColorLookupTableData" in ds:
        return apply_color_lut(array, ds)[..., :3]
    planes = []
    for colour in ("Red", "Green", "Blue"):
        entries, first, _ = ds[f"{colour}PaletteColorLookupTableDescriptor"].value
        entries = entries or 65536
        table = ds[f"{colour}PaletteColorLookupTableData"].value
        wide = len(table) >= 2 * entries
        table = np.frombuffer(table, ("<u2" if ds.original_encoding[1] else ">u2") if wide else "u1", entries)
        planes.append(table[np.clip(array.astype(np.int64) - first, 0, entries - 1)])
    return np.stack(planes, -1)


def _check_codestream(ds, syntax: str, frames: int):
    """Each frame of a compressed image must have the size that the header claims: decoders trust one or the other."""
    from pydicom.encaps import generate_frames

    if ".4.9" in syntax or ".4.20" in syntax:
        size_of = _j2k_size
    elif ".4." in syntax:
        size_of = _jpeg_size
    else:
        return
    offsets = (ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths) if "ExtendedOffsetTable" in ds else None
    for frame in generate_frames(ds.PixelData, number_of_frames=frames, extended_offsets=offsets):
        size = size_of(frame)
        if size is None:
            raise Refused("BROKEN_PIXELS", "no image header in the compressed pixel data")
        if size != (ds.Rows, ds.Columns):
            raise Refused("BROKEN_PIXELS", f"a compressed image is {size[0]} x {size[1]}, the header says {ds.Rows} x {ds.Columns}")


def _j2k_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) of a JPEG 2000 codestream: its SIZ segment, ISO 15444-1 A.5.1."""
    start = 0
    if (
        frame[4:8] == b"jP  "
    ):  # in boxes, which the standard forbids; one without a length has no end (pydicom looks for it for ever)
        while frame[start + 4 : start + 8] != b"jp2c":
            length = int.from_bytes(frame[start : start + 4], "big")
            if length < 8 or start + length > len(frame):
                return None
            start += length
        start += 8
    if frame[start : start + 4] != b"\xff\x4f\xff\x51" or len(frame) < start + 24:
        return None
    x1, y1, x0, y0 = (int.from_bytes(frame[start + n : start + n + 4], "big") for n in (8, 12, 16, 20))
    return y1 - y0, x1 - x0


def _jpeg_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) of a JPEG or JPEG-LS codestream: its frame header, ISO 10918-1 B.2.2."""
    at = 2
    while at + 9 <= len(frame):
        if frame[at] != 0xFF:
            return None
        marker = frame[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:
            at += 2
        else:
            at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None


def stored_range(header: dict) -> tuple[int, int]:
    """Smallest and largest stored value that the header's bits can hold.

    >>> stored_range({"bits": 12, "signed": True})
    (-2048, 2047)
    """
    bits = header["bits"]
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if header["signed"] else (0, (1 << bits) - 1)


def real_world_type(headers: list[dict]) -> np.dtype:
    """Type of a volume whose images have these facts, wide enough for every value after rescale.

    Without rescale the stored type; with integer steps of 1 the smallest integer type; else float32, or float64
    when stored values have more than 24 bits.
    """
    if any(h.get("float") for h in headers):
        return np.dtype(np.float64 if any(h["allocated"] == 64 for h in headers) else np.float32)
    wide = max(h["bits"] for h in headers) > 24
    low, high = 0, 0
    for h in headers:
        slope, intercept = rescale(h)
        if slope != 1 or intercept != int(intercept):
            return np.dtype(np.float64 if wide else np.float32)
        smallest, largest = stored_range(h)
        if h.get("photometric") == "PALETTE COLOR":
            smallest, largest = 0, 65535
        low, high = min(low, smallest + int(intercept)), max(high, largest + int(intercept))
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"):
        limits = np.iinfo(name)
        if limits.min <= low and high <= limits.max:
            return np.dtype(name)
    return np.dtype(np.float64)


def rescale(header: dict) -> tuple[float, float]:
    """(slope, intercept) of the modality rescale; colours have none."""
    slope, intercept = header.get("slope"), header.get("intercept")
    return (1.0 if slope is None else slope), (0.0 if intercept is None else intercept)


def real_world(stored: np.ndarray, header: dict, modality: str, dtype: np.dtype) -> np.ndarray:
    """Stored values as real-world values of ``dtype``: MONOCHROME1 of projections inverted, then slope and intercept.

    Raises ``BROKEN_PIXELS`` when a value is outside of what the header's bits can hold.
    """
    slope, intercept = rescale(header)
    inverted = header.get("photometric") == "MONOCHROME1" and modality in PROJECTIONS and not header.get("float")
    if inverted:
        low, high = stored_range(header)
        stored = (low + high) - stored.astype(np.int64)
    if np.issubdtype(dtype, np.integer):
        offset, limits = int(intercept), np.iinfo(dtype)
        if offset == 0 and np.can_cast(stored.dtype, dtype, "safe"):
            return stored
        smallest, largest = int(stored.min()) + offset, int(stored.max()) + offset
        if smallest < limits.min or largest > limits.max:
            message = f"values from {smallest} to {largest}, the header's bits allow {limits.min} to {limits.max}"
            raise Refused("BROKEN_PIXELS", message)
        return stored.astype(dtype) + np.int64(offset).astype(dtype)  # wraps twice, so the sum is right
    if slope == 1 and intercept == 0:
        return stored
    return stored.astype(np.float64) * slope + intercept
