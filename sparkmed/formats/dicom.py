"""DICOM: the facts in a header, and the pixels of one single-frame image.

Headers are parsed up to the pixel data and no further. Pixels come out as stored values times slope plus intercept, one
decoder per transfer syntax, named in :data:`DECODERS`. No exception but :class:`Refused` leaves this module, and no
message quotes a header value that could identify a person.
"""

import contextlib
import functools
import io
import logging
import math
import re
import struct
import warnings
import zlib

import numpy as np
import pydicom
from pydicom.pixels import apply_color_lut, get_decoder
from pydicom.uid import UID

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

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
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
_NOT_IMAGE_MODALITIES = frozenset({"SEG", "SR", "PR", "KO", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "ECG", "DOC", "REG", "FID"})

_HEADER_KEYWORDS = (
    "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID Modality ImageType PatientID PatientName "
    "InstanceNumber AcquisitionNumber TemporalPositionIdentifier TriggerTime FrameReferenceTime EchoTime EchoNumbers "
    "DiffusionBValue ImagePositionPatient ImageOrientationPatient FrameOfReferenceUID PixelSpacing ImagerPixelSpacing "
    "NominalScannedPixelSpacing SpacingBetweenSlices SliceThickness "
    "NumberOfFrames Rows Columns SamplesPerPixel PhotometricInterpretation BitsAllocated BitsStored HighBit PixelRepresentation "
    "RescaleSlope RescaleIntercept ModalityLUTSequence BurnedInAnnotation"
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
_TAGS = {k: pydicom.datadict.tag_for_keyword(k) for k in _HEADER_KEYWORDS}
_PIXEL_TAGS = [pydicom.datadict.tag_for_keyword(k) for k in _PIXEL_KEYWORDS]
_GROUP_STARTS = (b"\x02\x00", b"\x08\x00")
_CODE = re.compile(r"^[A-Za-z0-9_ .-]{1,64}$")
_INFLATE_LIMIT = 1 << 30


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
    except Refused:
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
        data = inflater.decompress(packed, _INFLATE_LIMIT)
    except zlib.error:
        raise Refused("BROKEN_DICOM", "the deflated data set is damaged") from None
    if inflater.unconsumed_tail:
        raise Refused("BOMB", f"{len(packed)} deflated bytes unpack to more than {_INFLATE_LIMIT}")
    if not inflater.eof:
        raise Refused("TRUNCATED", "the deflated data set ends early")
    plain = b"1.2.840.10008.1.2.1".ljust(len(DEFLATED), b"\0")
    return io.BytesIO(meta.replace(DEFLATED.encode(), plain, 1) + data), DEFLATED


class _Header:
    """The values of a data set, from the bytes as they stand: faster than pydicom's own conversion, and no warnings.

    Absent and empty elements are None; a value that is not what its element holds raises :class:`Refused`.
    """

    def __init__(self, dataset, little: bool):
        self.dataset = dataset
        self.order = "<" if little else ">"

    def __contains__(self, keyword: str) -> bool:
        return _TAGS[keyword] in self.dataset

    def _value(self, keyword: str) -> tuple[bytes, str | None]:
        element = self.dataset.get_item(_TAGS[keyword])
        if element is None or element.value is None:
            return b"", None
        if not isinstance(element.value, bytes):
            if not element.value:
                return b"", None
            raise Refused("BAD_VALUE", f"{keyword} holds no plain value")
        return element.value, element.VR

    def texts(self, keyword: str) -> list[str]:
        """Code strings and UIDs; what does not look like one is left empty."""
        value, _ = self._value(keyword)
        found = [t.strip(" \0") for t in value[:4096].decode("latin-1").split("\\")]
        return [t if _CODE.match(t) else "" for t in found] if value else []

    def text(self, keyword: str) -> str:
        return (self.texts(keyword) or [""])[0]

    def numbers(self, keyword: str, count: int | None = None) -> list[float] | None:
        """Finite numbers, ``count`` of them when given."""
        value, vr = self._value(keyword)
        binary = _BINARY.get(vr) or (_BINARY.get(_BINARY_KEYWORDS.get(keyword)) if vr in (None, "UN") else None)
        if not (value if binary else value.strip(b" \0\\")):
            return None
        try:
            if binary:
                found = [float(v) for (v,) in struct.iter_unpack(self.order + binary, value)]
            else:
                found = [float(v) for v in value.strip(b" \0").split(b"\\")]
        except (ValueError, struct.error):
            raise Refused("BAD_VALUE", f"{keyword} is not a number") from None
        if not all(map(math.isfinite, found)):
            raise Refused("BAD_VALUE", f"{keyword} is not finite")
        if count is not None and len(found) != count:
            raise Refused("BAD_GEOMETRY", f"{keyword} has {len(found)} values, wanted {count}")
        return found

    def number(self, keyword: str) -> float | None:
        found = self.numbers(keyword)
        return None if found is None else found[0]

    def integer(self, keyword: str, default: int | None = None) -> int | None:
        found = self.number(keyword)
        return default if found is None else int(found)


_BINARY = {"US": "H", "SS": "h", "UL": "L", "SL": "l", "FD": "d", "FL": "f"}
_BINARY_KEYWORDS = {
    **dict.fromkeys(("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit"), "US"),
    "PixelRepresentation": "US",
    "DiffusionBValue": "FD",
}


def _code(value) -> str:
    """A code string or UID; anything that does not look like one is left out."""
    text = str(value or "").strip(" \0")
    return text if _CODE.match(text) else ""


def read_header(stream, size: int) -> dict:
    """The fields of an :class:`Instance` that a DICOM object determines; ``size`` is its length in bytes.

    Raises :class:`Refused`: ``BROKEN_DICOM``, ``TRUNCATED``, ``NO_PIXEL_DATA``, ``BAD_VALUE``, ``BAD_GEOMETRY``,
    ``BAD_SHAPE``, ``PIXEL_LENGTH``, ``DEEP_NESTING``, ``TOO_LARGE``, ``BOMB``.
    """
    with _quiet():
        stream, deflated = _inflated(stream)
        if deflated:
            size = stream.getbuffer().nbytes
        ds = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=list(_TAGS.values()), force=True)
        stopped = stream.tell()
        element = stream.read(12)
        return _facts(ds, deflated, element, stopped, size)


def _facts(ds, deflated: str | None, element: bytes, stopped: int, size: int) -> dict:
    implicit, little = ds.original_encoding
    h = _Header(ds, little)
    syntax = deflated or _code(ds.file_meta.get("TransferSyntaxUID"))
    if not syntax:
        syntax = str(pydicom.uid.ImplicitVRLittleEndian if implicit else
                     pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian)  # fmt: skip
    sop_class = h.text("SOPClassUID") or _code(ds.file_meta.get("MediaStorageSOPClassUID"))
    modality = h.text("Modality")
    if not sop_class and not modality and "Rows" not in h:
        raise Refused("BROKEN_DICOM", "neither a SOP class nor a modality nor an image: not a whole DICOM object")
    study = h.text("StudyInstanceUID") or None
    fields = {
        "format": "dicom",
        "kind": "other",
        "modality": modality,
        "series_uid": h.text("SeriesInstanceUID"),
        "sop_uid": h.text("SOPInstanceUID"),
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
    photometric = h.text("PhotometricInterpretation")
    _check_pixel_length(pixels, rows, columns, frames, samples, allocated, photometric, stopped, size)
    spacing = h.numbers("PixelSpacing", 2) or h.numbers("ImagerPixelSpacing", 2) or h.numbers("NominalScannedPixelSpacing", 2)
    header = {
        "study": study,
        "number": h.integer("InstanceNumber"),
        "acquisition": h.integer("AcquisitionNumber"),
        "temporal": h.integer("TemporalPositionIdentifier"),
        "trigger": h.number("TriggerTime"),
        "frame_time": h.number("FrameReferenceTime"),
        "echo": h.number("EchoTime"),
        "echo_number": h.integer("EchoNumbers"),
        "b": h.number("DiffusionBValue"),
        "type": h.texts("ImageType") or None,
        "frame": h.text("FrameOfReferenceUID") or None,
        "position": h.numbers("ImagePositionPatient", 3),
        "orientation": h.numbers("ImageOrientationPatient", 6),
        "spacing": spacing,
        "gap": h.number("SpacingBetweenSlices"),
        "thickness": h.number("SliceThickness"),
        "frames": None if frames == 1 else frames,
        "photometric": photometric,
        "allocated": allocated,
        "bits": stored,
        "signed": bool(h.integer("PixelRepresentation", 0)),
        "float": pixels[0] != 0x7FE00010 or None,
        "slope": h.number("RescaleSlope"),
        "intercept": h.number("RescaleIntercept"),
        "lut": "ModalityLUTSequence" in h or None,
        "burned_in": h.text("BurnedInAnnotation") == "YES" or None,
    }
    shape = (3 if photometric == "PALETTE COLOR" else samples, columns, rows, frames)
    fields.update(kind="image", shape=shape, affine=_slice_affine(header), header=to_json(header))
    return fields


@functools.lru_cache(1024)
def _class_name(sop_class: str) -> str:
    """The standard's name of a SOP class, empty when it is not in the dictionary."""
    name = UID(sop_class).name if sop_class else ""
    return "" if name == sop_class else name


def _slice_affine(header: dict) -> tuple[float, ...] | None:
    """RAS+ affine of one slice as 16 numbers, None when the header does not say where it lies."""
    position, orientation, spacing = header["position"], header["orientation"], header["spacing"]
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
        return
    share = 2 / 3 if photometric == "YBR_FULL_422" else 1  # chroma is stored for every other column
    check_size((rows, columns, frames, samples), allocated / 8 * share, min(length, available), False)
    frame = rows * columns * samples * allocated / 8 * share
    if length >= (frames + 1) * frame and length - frames * frame >= 2:
        raise Refused("PIXEL_LENGTH", f"{length} bytes of pixels, the header wants {frames * frame:.0f} for {frames} frames")


def read_pixels(data: bytes, header: dict, syntax: str) -> np.ndarray:
    """Stored values (C, I, J) of a single-frame image in its own integer or float type; colours become RGB.

    ``header`` is the instance's own facts, ``syntax`` its transfer syntax. Raises :class:`Refused`: ``NO_DECODER``,
    ``CHANGED`` (the bytes are not those that were catalogued), ``BROKEN_PIXELS``.
    """
    plugin = decoder(syntax, header)
    with _quiet():
        stream, _ = _inflated(io.BytesIO(data))
        ds = pydicom.dcmread(stream, specific_tags=_PIXEL_TAGS, force=True)
        if int(ds.get("NumberOfFrames") or 1) != header.get("frames", 1):
            raise Refused("CHANGED", "the number of frames is not the catalogued one")
        if plugin:
            _check_codestream(ds, syntax)
        try:
            array = _decode(ds, syntax, plugin, header)
        except (Refused, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as e:  # a panic of a decoder in Rust is no Exception
            raise Refused("BROKEN_PIXELS", f"{plugin or 'pydicom'} cannot decode the pixel data ({type(e).__name__})") from None
    if array.ndim == 2:
        return array.T[None]
    return array.transpose(2, 1, 0)


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


def _decode(ds, syntax: str, plugin: str, header: dict) -> np.ndarray:
    """(rows, columns) or (rows, columns, 3)."""
    uid = UID(pydicom.uid.ExplicitVRLittleEndian if syntax == DEFLATED else syntax)
    if uid not in pydicom.uid.AllTransferSyntaxes or not uid.is_transfer_syntax:
        raise Refused("NO_DECODER", f"transfer syntax {syntax} is not decoded")
    arguments = {"decoding_plugin": plugin} if plugin else {}
    array, _ = get_decoder(uid).as_array(ds, allow_excess_frames=False, **arguments)
    if header.get("photometric") == "PALETTE COLOR":
        return _painted(array, ds)
    return array


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


def _check_codestream(ds, syntax: str):
    """The first frame of a compressed image must have the size that the header claims: decoders trust one or the other."""
    from pydicom.encaps import get_frame

    frame = get_frame(ds.PixelData, 0, number_of_frames=1)
    if ".4.9" in syntax or ".4.20" in syntax:
        size = _j2k_size(frame)
    elif ".4." in syntax:
        size = _jpeg_size(frame)
    else:
        return
    if size is None:
        raise Refused("BROKEN_PIXELS", "no image header in the compressed pixel data")
    if size != (ds.Rows, ds.Columns):
        raise Refused("BROKEN_PIXELS", f"the compressed image is {size[0]} x {size[1]}, the header says {ds.Rows} x {ds.Columns}")


def _j2k_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) of a JPEG 2000 codestream: its SIZ segment, ISO 15444-1 A.5.1."""
    start = frame.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(frame) < start + 24:
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
