"""The pixel data of one DICOM object: nothing in them but the image that the header describes.

A name may stand behind the last pixel, in a comment of a codestream, between fragments, in an offset table, or in bits that no
reader shows. :func:`require_image` refuses what is no part of the image (PS3.5 8.2 and annex A.4); comments of JPEG 2000, in which
nearly every encoder names itself, it hands back to be searched. :func:`hidden_bits` looks at the bits above those of the image.
"""

import bisect
import io
import math
import re
from collections.abc import Iterator

import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID

from sparkmed.formats import dicom, isolation
from sparkmed.rejection import Refused

ELEMENTS = {"PixelData": 0x7FE00010, "FloatPixelData": 0x7FE00008, "DoubleFloatPixelData": 0x7FE00009}
_OFFSETS, _LENGTHS = 0x7FE00001, 0x7FE00002
_PARAMETRIC_MAP = "1.2.840.10008.5.1.4.1.1.30"
_HAVE_PIXELS = re.compile(r"Image|Segmentation|Map Storage|RT Dose|US Volume|Tomography|Volume Analysis")
_ITEM = b"\xfe\xff\x00\xe0"
_RLE = "1.2.840.10008.1.2.5"
_PADDING = re.compile(rb"\0*|\xff")
_MARKER = re.compile(rb"\xff+[\x80-\xcf\xd8-\xfe]")
"""A marker behind entropy-coded bytes, of JPEG, where 00 follows an FF, and of JPEG-LS, where less than 80 does."""
_FRAMES = frozenset({*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7})
_KNOWN_SEGMENTS = (
    (0xE0, re.compile(rb"JFIF\0.{7}\0\0", re.DOTALL)),  # no thumbnail
    (0xEE, re.compile(rb"Adobe(\0[\x64\x65]|[\x64\x65]\0|)[\0-\x03\x40\x80\xc0]{3,5}", re.DOTALL)),
    (0xE8, re.compile(rb"mrfx.", re.DOTALL)),
    (0xE8, re.compile(rb"SPIFF\0.{24}", re.DOTALL)),
    (0xE8, re.compile(rb"\0\0\0\x01\xff\xd8")),  # the end of SPIFF's directory
)
"""Application segments that hold a few numbers about colours and resolution, and no picture."""
_ENCODERS = re.compile(
    r"Created by (GDCM/)?OpenJPEG version [\d.]+|Creator: JasPer Version [\d.]+|Kakadu-(vs?)?[\d.]+|OpenJPH Ver [\d.]+"
    r"|Kdu-Layer-Info: log_2\{Delta-D\(squared-error\)/Delta-L\(bytes\)\}, L\(bytes\)\n[\d\s.,e+-]*"
)
"""Comments that encoders of JPEG 2000 write."""


def element(dataset: Dataset) -> str | None:
    """Keyword of the one element that holds the image; raises ``HIDDEN_BYTES`` for a second, and for one of another class."""
    found = [k for k in ELEMENTS if k in dataset]
    if not found:
        if _OFFSETS in dataset or _LENGTHS in dataset:
            raise Refused("HIDDEN_BYTES", "an offset table without pixel data")
        return None
    sop_class = str(dataset.get("SOPClassUID", "")).strip(" \0")
    fits = sop_class == _PARAMETRIC_MAP or found == ["PixelData"] and _HAVE_PIXELS.search(UID(sop_class).name)
    if len(found) > 1 or not fits:
        raise Refused("HIDDEN_BYTES", f"{' and '.join(found)} in an object of a class that has none, or has one of them")
    return found[0]


def require_image(dataset: Dataset, syntax: str) -> list[bytes]:
    """Raise unless the pixel data are the image that the header describes and nothing else; comments of its codestreams.

    ``PIXEL_LENGTH`` for more or fewer bytes, ``HIDDEN_BYTES`` for what an encapsulation or a codestream holds besides the image,
    ``NO_DECODER`` for a compression that cannot be looked into, ``BAD_VALUE`` for a header that does not say the size.
    """
    keyword = element(dataset)
    if keyword is None:
        return []
    compressed = UID(syntax).is_encapsulated
    if dataset[keyword].is_undefined_length != compressed:
        raise Refused("PIXEL_LENGTH", "pixel data of undefined length are compressed, others are not")
    if not compressed:
        _require_length(dataset, keyword)
        return []
    if not dicom.DECODERS.get(syntax):
        raise Refused("NO_DECODER", f"transfer syntax {syntax} is not decoded, so nobody can tell what is in the pixel data")
    rows, columns, samples, allocated, frames = _sizes(dataset, "Rows", "Columns", "SamplesPerPixel", "BitsAllocated")
    comments: list[bytes] = []
    for frame in _frames(dataset, frames):
        if syntax == _RLE:
            _require_runs(frame, rows * columns, samples * allocated // 8)
            continue
        found, precision, more = _codestream(frame, syntax)
        if found != (rows, columns, samples) or precision > allocated:
            raise Refused("PIXEL_LENGTH", f"a codestream of {found}, the header says {(rows, columns, samples)}")
        comments += more
    return comments


def codestreams(dataset: Dataset) -> bytes:
    """The bytes of all fragments, one after the other; none of native pixels."""
    if "PixelData" not in dataset or not dataset["PixelData"].is_undefined_length:
        return b""
    return b"".join(f for _, f in _fragments(dataset.PixelData)[1:])


def _sizes(dataset: Dataset, *keywords: str) -> list[int]:
    """Values of the elements, and the number of frames."""
    values = [*(dataset.get(k) for k in keywords), dataset.get("NumberOfFrames") or 1]
    if not all(isinstance(n, int) and n > 0 for n in values):
        raise Refused("BAD_VALUE", "what says the size of the pixels is missing or no number")
    return values


def _require_length(dataset: Dataset, keyword: str):
    """Raise ``PIXEL_LENGTH`` for native pixels that are more than the image, where anything could be written, or fewer."""
    if _OFFSETS in dataset or _LENGTHS in dataset:
        raise Refused("HIDDEN_BYTES", "an offset table of pixels that are not compressed")
    if keyword == "PixelData":
        sizes = _sizes(dataset, "Rows", "Columns", "SamplesPerPixel", "BitsAllocated")
    else:
        sizes = [*_sizes(dataset, "Rows", "Columns"), 32 if keyword == "FloatPixelData" else 64]
    if dataset.get("PhotometricInterpretation") == "YBR_FULL_422":
        sizes[2] = 2  # two of three samples are stored
    wanted, found = -(-math.prod(sizes) // 8), len(dataset[keyword].value)
    if found not in (wanted, wanted + wanted % 2):
        raise Refused("PIXEL_LENGTH", f"{found} bytes of pixels, the header says {wanted}")


def _fragments(value: bytes) -> list[tuple[int, bytes]]:
    """(offset from the first fragment, bytes) of each item, the basic offset table first (PS3.5 A.4)."""
    found, at, first = [], 0, 0
    while at < len(value):
        length = int.from_bytes(value[at + 4 : at + 8], "little")
        if value[at : at + 4] != _ITEM or at + 8 + length > len(value):
            raise Refused("HIDDEN_BYTES", "bytes between the fragments of the pixel data")
        found.append((at - first, value[at + 8 : at + 8 + length]))
        at += 8 + length
        first = first or at
    if len(found) < 2:
        raise Refused("NO_PIXEL_DATA", "compressed pixel data without a fragment")
    return found


def _frames(dataset: Dataset, count: int) -> Iterator[bytes]:
    """The codestream of each frame; raises ``HIDDEN_BYTES`` where fragments and offset tables do not fit the frames."""
    (_, table), *fragments = _fragments(dataset.PixelData)
    places = [at for at, _ in fragments]
    starts = np.frombuffer(table, "<u4").tolist() if len(table) == 4 * count else []
    if table and not starts:
        raise Refused("HIDDEN_BYTES", f"an offset table of {len(table)} bytes for {count} frames")
    extended = [t in dataset and dataset[t].value or b"" for t in (_OFFSETS, _LENGTHS)]
    if any(extended):
        lengths = [len(f) for _, f in fragments]
        if any(len(v) != 8 * count for v in extended) or table or len(fragments) != count:
            raise Refused("HIDDEN_BYTES", f"an extended offset table that is not one of {count} frames")
        offsets, sizes = (np.frombuffer(v, "<u8").tolist() for v in extended)
        if offsets != places or any(n not in (size, size - 1) for n, size in zip(sizes, lengths, strict=True)):
            raise Refused("HIDDEN_BYTES", "an extended offset table that is not one of the fragments")
    if not starts:
        starts = [0] if count == 1 else places
    if len(starts) != count or starts[0] != 0 or sorted(set(starts)) != starts or not set(starts) <= set(places):
        raise Refused("HIDDEN_BYTES", f"{len(fragments)} fragments that are not those of {count} frames")
    for start, end in zip(starts, [*starts[1:], math.inf], strict=True):
        yield b"".join(f for _, f in fragments[bisect.bisect_left(places, start) : bisect.bisect_left(places, end)])


def _require_runs(frame: bytes, pixels: int, planes: int):
    """Raise ``HIDDEN_BYTES`` unless a frame of run lengths (PS3.5 G) is its header and ``planes`` segments of ``pixels`` bytes."""
    from rle.rle import decode_segment

    header = np.frombuffer(frame[:64].ljust(64, b"\0"), "<u4").tolist()
    offsets = header[1 : planes + 1]
    if header[0] != planes or offsets[:1] != [64] or sorted(offsets) != offsets or any(header[planes + 1 :]):
        raise Refused("HIDDEN_BYTES", f"the header of a run-length frame is not one of {planes} segments")
    for start, end in zip(offsets, [*offsets[1:], len(frame)], strict=True):
        with dicom._decoding("pylibjpeg"):
            length = len(decode_segment(frame[start:end]))
        if length not in (pixels, pixels + 1):  # a byte of padding may look like one more
            raise Refused("HIDDEN_BYTES", f"a segment of {length} bytes for {pixels} pixels")


def _codestream(frame: bytes, syntax: str) -> tuple[tuple[int, int, int], int, list[bytes]]:
    """((rows, columns, samples), precision in bits, comments) of a frame of JPEG or JPEG 2000, walked to its end."""
    shape, precision, comments, end = (_jpeg_2000 if ".4.9" in syntax or ".4.20" in syntax else _jpeg)(frame)
    if end is None or not _PADDING.fullmatch(frame, end):
        raise Refused("HIDDEN_BYTES", "bytes behind the end of a codestream, or none that ends it")
    return shape, precision, comments


def _jpeg(frame: bytes):
    """JPEG and JPEG-LS (ISO/IEC 10918-1 B, 14495-1 C)."""
    shape, precision, at = None, 0, 2
    tables = _Tables()
    if frame[:2] != b"\xff\xd8":
        raise Refused("HIDDEN_BYTES", "a fragment that does not begin as JPEG")
    while True:
        while frame[at : at + 2] == b"\xff\xff":
            at += 1
        if at + 2 > len(frame) or frame[at] != 0xFF:
            return shape, precision, [], None
        marker = frame[at + 1]
        if marker == 0xD9:
            tables.require_used()
            return shape, precision, [], at + 2
        length = _number(frame, at + 2, 2)
        segment = frame[at + 4 : at + 2 + length]
        if marker in _FRAMES and shape is None and len(segment) >= 6 and len(segment) == 6 + 3 * segment[5]:
            precision, shape = segment[0], (_number(segment, 1, 2), _number(segment, 3, 2), segment[5])
            tables.frame(marker, segment)
        elif marker in _READERS:
            if not _READERS[marker](tables, segment):
                raise Refused("HIDDEN_BYTES", f"a JPEG segment that is not what its marker says (marker {marker:02X})")
        elif not any(marker == known and form.fullmatch(segment) for known, form in _KNOWN_SEGMENTS):
            raise Refused("HIDDEN_BYTES", f"a JPEG comment or application segment (marker {marker:02X})")
        at += 2 + length
        if marker == 0xDA:
            following = _MARKER.search(frame, at)
            at = following.end() - 2 if following else len(frame)


class _Tables:
    """The tables of a JPEG codestream, each of which a frame or a scan must use, and the segments that hold them.

    What an encoder has no reason to write, somebody may have written a text in. Each reader tells whether a segment is as
    ISO/IEC 10918-1 B.2 (14495-1 C.2 for JPEG-LS) has it.
    """

    def __init__(self):
        self.unused: dict[tuple[str, int], bytes] = {}
        self.quantizers: list[int] = []
        self.kind = 0

    def require_used(self):
        if self.unused:
            raise Refused("HIDDEN_BYTES", f"{len(self.unused)} tables of a JPEG codestream that nothing uses")

    def _define(self, name: str, number: int, content: bytes) -> bool:
        if self.unused.setdefault((name, number), content) != content:  # replaced before anything used it
            return False
        return number < 4

    def frame(self, marker: int, segment: bytes):
        self.kind, self.quantizers = marker, [segment[n] for n in range(8, len(segment), 3)]

    def quantization(self, segment: bytes) -> bool:
        while segment:
            wide, number = divmod(segment[0], 16)
            size = 1 + 64 * (1 + wide)
            if wide > 1 or len(segment) < size or not self._define("quantization", number, segment[1:size]):
                return False
            segment = segment[size:]
        return True

    def huffman(self, segment: bytes) -> bool:
        while segment:
            alternating, number = divmod(segment[0], 16)
            counts = segment[1:17]
            size = 17 + sum(counts)
            codes, values = sum(n << (16 - bits) for bits, n in enumerate(counts, start=1)), segment[17:size]
            if alternating > 1 or len(segment) < size or codes > 1 << 16 or len(set(values)) < len(values):
                return False
            if not alternating and max(values, default=0) > 16 or not self._define("AC" if alternating else "DC", number, values):
                return False
            segment = segment[size:]
        return True

    def arithmetic(self, segment: bytes) -> bool:
        return len(segment) in (2, 4, 6, 8, 10, 12, 14, 16) and all(n & 0xEF < 4 for n in segment[::2])

    def interval(self, segment: bytes) -> bool:
        return len(segment) == 2

    def scan(self, segment: bytes) -> bool:
        if not segment or len(segment) != 4 + 2 * segment[0]:
            return False
        for dc, ac in (divmod(n, 16) for n in segment[2 : 2 + 2 * segment[0] : 2]):
            self.unused.pop(("DC", dc), None)
            self.unused.pop(("AC", ac), None)
        for number in self.quantizers:
            self.unused.pop(("quantization", number), None)
        return True

    def parameters(self, segment: bytes) -> bool:
        if len(segment) != 11 or segment[0] != 1:
            return False
        largest, *thresholds = (_number(segment, n, 2) for n in range(1, 9, 2))
        return sorted(thresholds) == thresholds and thresholds[-1] <= (largest or 0xFFFF)


_READERS = {
    0xC4: _Tables.huffman,
    0xCC: _Tables.arithmetic,
    0xDA: _Tables.scan,
    0xDB: _Tables.quantization,
    0xDD: _Tables.interval,
    0xF8: _Tables.parameters,
}


def _jpeg_2000(frame: bytes):
    """JPEG 2000 and its high-throughput variant (ISO/IEC 15444-1 A)."""
    if frame[:4] != b"\xff\x4f\xff\x51":
        raise Refused("HIDDEN_BYTES", "a fragment that is no bare codestream of JPEG 2000")
    width, height, left, top = (_number(frame, 8 + 4 * n, 4) for n in range(4))
    samples, precision = _number(frame, 40, 2), (frame[42] & 0x7F) + 1
    shape, comments, at, tiles, listed = (height - top, width - left, samples), [], 2, [], b""
    while True:
        marker = frame[at : at + 2]
        if marker == b"\xff\xd9":
            if listed and listed not in (b"".join(p + n for p, n in tiles), b"".join(n for _, n in tiles)):
                raise Refused("HIDDEN_BYTES", "a list of tiles in a codestream that is not that of its tiles")
            return shape, precision, comments, at + 2
        if at + 12 > len(frame) or marker[0] != 0xFF:
            return shape, precision, comments, None
        if marker == b"\xff\x90":
            whole = _number(frame, at + 6, 4)
            end = at + whole if whole else frame.rfind(b"\xff\xd9")  # 0: the last one, up to the end of the codestream
            if _number(frame, at + 2, 2) != 10 or end <= at + 12:
                return shape, precision, comments, None
            comments += _tile(frame[at + 12 : end], samples)
            tiles.append((frame[at + 4 : at + 6], (end - at).to_bytes(4, "big")))
            at = end
            continue
        segment = frame[at + 4 : at + 2 + _number(frame, at + 2, 2)]
        if marker[1] == 0x55 and not tiles:
            listed += _listed(segment)
        else:
            _require_known(marker[1], segment, samples, comments)
        at += 4 + len(segment)


def _require_known(marker: int, segment: bytes, samples: int, comments: list[bytes]):
    """Raise ``HIDDEN_BYTES`` unless a segment is one of the standard's that decoding takes, as long as the standard has it, or a
    comment of an encoder, which goes into ``comments``."""
    size, wide = len(segment), 1 + (samples > 256)
    if marker == 0x64:
        text = segment[2:].rstrip(b"\0 .\n").decode("latin-1")
        if segment[:2] != b"\0\1" or not _ENCODERS.fullmatch(text):
            raise Refused("HIDDEN_BYTES", "a comment in a JPEG 2000 codestream that no known encoder writes")
        comments.append(segment[2:])
        return
    if marker == 0x51:
        fits = size == 36 + 3 * samples
    elif marker == 0x50:
        fits = size >= 4 and size == 4 + 2 * int.from_bytes(segment[:4], "big").bit_count()
    elif marker == 0x52:
        fits = size >= 10 and size == 10 + (segment[0] & 1) * (segment[5] + 1)
    elif marker == 0x53:
        fits = size >= 6 + wide and size == 6 + wide + (segment[wide] & 1) * (segment[wide + 1] + 1)
    elif marker in (0x5C, 0x5D):
        values = segment[wide:] if marker == 0x5D else segment
        steps, style = len(values) - 1, values[0] & 0x1F if values else 3
        fits = steps == 2 if style == 1 else style in (0, 2) and steps % (style or 1) == 0 and steps // (style or 1) % 3 == 1
        fits = fits and steps <= 97 * (style or 1)
    elif marker == 0x5E:
        fits = size == 2 + wide
    else:
        fits = marker == 0x5F and size > 0 and size % (5 + 2 * wide) == 0
    if not fits:
        raise Refused(
            "HIDDEN_BYTES", f"a JPEG 2000 segment that decoding does not take, or of another length (marker {marker:02X})"
        )


def _listed(segment: bytes) -> bytes:
    """Entries of a TLM segment (ISO/IEC 15444-1 A.7.1): number of a tile in two bytes, or none, and length of its part in four."""
    kind, entries = segment[1] if len(segment) > 1 else 0, segment[2:]
    size = {0x40: 4, 0x50: 5, 0x60: 6}.get(kind, 0)
    if size and len(entries) % size == 0:
        return entries if size != 5 else b"".join(b"\0" + entries[n : n + 5] for n in range(0, len(entries), 5))
    raise Refused("HIDDEN_BYTES", "a list of tiles in a codestream that is none")


def _tile(part: bytes, samples: int) -> list[bytes]:
    """The comments of a part of a tile behind its first segment, up to its end."""
    comments, packets, at = [], b"", 0
    while part[at : at + 2] != b"\xff\x93":
        if part[at : at + 1] != b"\xff":
            raise Refused("HIDDEN_BYTES", "a part of a tile without data")
        segment = part[at + 4 : at + 2 + _number(part, at + 2, 2)]
        if part[at + 1] == 0x58:
            packets += segment[1:]
        elif part[at + 1] == 0x51:
            raise Refused("HIDDEN_BYTES", "a second header in a codestream")
        else:
            _require_known(part[at + 1], segment, samples, comments)
        at += 4 + len(segment)
    if packets:  # lengths of packets, seven bits to a byte (A.7.3)
        total, value = 0, 0
        for byte in packets:
            value = value << 7 | byte & 0x7F
            if byte < 0x80:
                total, value = total + value, 0
        if total != len(part) - at - 2:
            raise Refused("HIDDEN_BYTES", "lengths of packets in a codestream that are not those of its packets")
    return comments


def _number(data: bytes, at: int, size: int) -> int:
    if at + size > len(data):
        raise Refused("BROKEN_PIXELS", "a codestream ends within a marker segment")
    return int.from_bytes(data[at : at + size], "big")


def hidden_bits(dataset: Dataset, syntax: str) -> str:
    """Why bits of the pixels that are no part of the image may hold an overlay, or ``""`` (PS3.5 8.1.2).

    Compressed pixels are decoded where their codestream has more bits than the image; raises what
    :func:`dicom.read_frames` raises when they cannot be.
    """
    for tag in list(dataset.keys()):
        if tag >> 24 == 0x60 and tag & 0xFFFF == 0x0010 and (tag & 0xFFFF0000 | 0x3000) not in dataset:
            return "an overlay lies in the bits of the pixels"
    allocated, stored, high = (dataset.get(k) for k in ("BitsAllocated", "BitsStored", "HighBit"))
    if "PixelData" not in dataset or allocated not in (8, 16, 32) or not stored or stored >= allocated or high is None:
        return ""
    low = high + 1 - stored
    if low < 0 or high >= allocated:
        return "BitsStored and HighBit do not fit BitsAllocated"
    signed = bool(dataset.get("PixelRepresentation"))
    for values in _words(dataset, syntax, allocated, stored):
        if _has_other_bits(values, stored, low, signed):
            return "bits of the pixels beyond those of the image are set, as an overlay would set them"
    return ""


def _words(dataset: Dataset, syntax: str, allocated: int, stored: int) -> Iterator[np.ndarray]:
    """The pixels as unsigned numbers of ``allocated`` bits, none for codestreams of no more bits than the image."""
    data, word = dataset.PixelData, f"u{allocated // 8}"
    if not dataset["PixelData"].is_undefined_length:
        order = "<" if dataset.original_encoding[1] else ">"
        yield np.frombuffer(data, order + word, len(data) // (allocated // 8)).astype(word)
        return
    frames = dataset.get("NumberOfFrames") or 1
    if syntax != _RLE and all(_codestream(f, syntax)[1] <= stored for f in _frames(dataset, frames)):
        return
    probe = Dataset()
    for keyword in ("Rows", "Columns", "SamplesPerPixel", "PlanarConfiguration", "BitsAllocated", "NumberOfFrames"):
        if keyword in dataset:
            probe[keyword] = dataset[keyword]
    probe["PixelData"] = dataset["PixelData"]
    probe.PhotometricInterpretation = "RGB" if dataset.get("SamplesPerPixel") == 3 else "MONOCHROME2"
    probe.BitsStored, probe.HighBit, probe.PixelRepresentation = allocated, allocated - 1, 0
    probe.file_meta = FileMetaDataset()
    probe.file_meta.TransferSyntaxUID = UID(syntax)
    out = io.BytesIO()
    probe.save_as(out, implicit_vr=False, little_endian=True)
    header = {"frames": frames, "bits": allocated, "allocated": allocated}
    what = f"{dicom.decoder(syntax, header) or 'pydicom'}, of pixels whose hidden bits are looked at"
    for array in isolation.decode_each(dicom.read_frames, out.getvalue(), header, syntax, list(range(frames)), what=what):
        yield np.ascontiguousarray(array).view(word)


def _has_other_bits(values: np.ndarray, stored: int, low: int, signed: bool) -> bool:
    mask = ((1 << stored) - 1) << low
    if not np.any(values & ~np.array(mask, values.dtype)):
        return False
    if signed and low == 0:  # negative numbers fill the bits above theirs
        numbers = values.view(f"i{values.itemsize}")
        shift = 8 * values.itemsize - stored
        return not np.array_equal((numbers << shift) >> shift, numbers)
    return True
