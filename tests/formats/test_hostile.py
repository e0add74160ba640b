"""Files that are made to do harm: each ends in the quarantine within seconds and bounded memory, and harms no other file.

Every file lies beside a good one. They are read in a process of its own, whose time and memory are measured.
"""

import gzip
import io
import lzma
import os
import struct
import tarfile
import zipfile
import zlib

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image
from pydicom.encaps import encapsulate as encapsulated_frames
from pydicom.uid import ImplicitVRLittleEndian

from . import bounded, dicoms

SECONDS, MB = 5, 300
PIXELS = np.arange(64 * 72, dtype=np.uint16).reshape(64, 72)
J2K, JPEG, JPEG_LOSSLESS, JPEG_LS, RLE = (f"1.2.840.10008.1.2.{n}" for n in ("4.90", "4.50", "4.70", "4.80", "5"))
DEFLATED = "1.2.840.10008.1.2.1.99"


def refused(folder, name, data, *codes, mb=MB):
    """Writes ``name`` beside a good file and reads both: the first is refused for one of ``codes``, the second is a volume."""
    if data is not None:
        (folder / name).write_bytes(data)
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(folder / "good.png")
    outcome = bounded.read(folder)
    assert not outcome.error, outcome.error
    assert outcome.volumes == ["good.png"], outcome
    assert outcome.reasons and set(outcome.reasons.values()) <= set(codes), outcome
    assert outcome.seconds < SECONDS and outcome.mb < mb, outcome
    assert not any(dicoms.SECRET in m for m in outcome.messages)


def explicit(tag: int, vr: str, value: bytes, length: int | None = None) -> bytes:
    """An element, little endian; ``length`` is what it claims."""
    length = len(value) if length is None else length
    long = vr in ("OB", "OW", "SQ", "UN", "UT", "OF", "OD", "UC", "UR", "OL")
    size = struct.pack("<HL", 0, length) if long else struct.pack("<H", length)
    return struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode() + size + value


def implicit(tag: int, value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<HHL", tag >> 16, tag & 0xFFFF, len(value) if length is None else length) + value


def before_patient(element: bytes, **elements) -> bytes:
    """A good file with ``element`` before the patient's name."""
    data = dicoms.encoded(dicoms.dataset(PIXELS, **elements))
    at = data.index(b"\x10\0\x10\0")
    return data[:at] + element + data[at:]


def with_pixels(pixels: bytes, length: int, syntax=None, **elements) -> bytes:
    """A file whose pixel data are these bytes under that length."""
    ds = dicoms.dataset(PIXELS, **elements)
    del ds.PixelData
    data = dicoms.encoded(ds)
    if syntax:
        old = b"1.2.840.10008.1.2.1\0"
        head, rest = data.split(b"\x02\0\x10\0UI", 1)
        value = syntax.encode() + b"\0" * (len(syntax) % 2)
        rest = rest[2 + len(old) :]
        head = head[:140] + struct.pack("<L", struct.unpack("<L", head[140:144])[0] + len(value) - len(old)) + head[144:]
        data = head + b"\x02\0\x10\0UI" + struct.pack("<H", len(value)) + value + rest
    return data + explicit(0x7FE00010, "OB" if length == 0xFFFFFFFF else "OW", pixels, length)


def encapsulate(frames: list[bytes]) -> bytes:
    """Frames as the value of encapsulated pixel data, with its delimiter."""
    return encapsulated_frames(frames) + implicit(0xFFFEE0DD, b"")


def nested(depth: int, is_explicit: bool, undefined: bool, tag: int = 0x00081140) -> bytes:
    """A sequence of one item that holds a sequence, and so on."""
    starts, ends, size = [], [], 0
    for _ in range(depth):
        if undefined:
            ends.append(implicit(0xFFFEE00D, b"") + implicit(0xFFFEE0DD, b""))
            item, sequence = implicit(0xFFFEE000, b"", 0xFFFFFFFF), 0xFFFFFFFF
        else:
            item = implicit(0xFFFEE000, b"", size)
            sequence = size + 8
        start = explicit(tag, "SQ", b"", sequence) if is_explicit else implicit(tag, b"", sequence)
        starts.append(start + item)
        size += len(starts[-1])
    return b"".join(reversed(starts)) + b"".join(ends)


# DICOM


@pytest.mark.parametrize("syntax", [None, J2K, JPEG, RLE])
def test_a_header_that_claims_43_tebibytes(tmp_path, syntax):
    lie = {"Rows": 65535, "Columns": 65535, "NumberOfFrames": 10000}
    frame = encapsulate([b"\xff\x4f\xff\x51" + bytes(100)])
    data = with_pixels(frame, 0xFFFFFFFF, syntax, **lie) if syntax else with_pixels(bytes(9216), 9216, **lie)
    refused(tmp_path, "x.dcm", data, "TOO_LARGE")


@pytest.mark.parametrize("depth", [1000, 20000])
@pytest.mark.parametrize("undefined", [True, False])
@pytest.mark.parametrize("is_explicit", [True, False])
def test_sequences_nested_a_thousand_deep(tmp_path, depth, undefined, is_explicit):
    """A file is refused, or its sequence is passed over and its image is whole."""
    syntax = {} if is_explicit else {"TransferSyntaxUID": ImplicitVRLittleEndian}
    (tmp_path / "x.dcm").write_bytes(before_patient(nested(depth, is_explicit, undefined), **syntax))
    outcome = bounded.read(tmp_path)
    assert not outcome.error, outcome.error
    assert (outcome.volumes, outcome.reasons) in ((["x.dcm"], {}), ([], {"x.dcm": "DEEP_NESTING"})), outcome
    assert outcome.seconds < SECONDS and outcome.mb < MB, outcome


@pytest.mark.parametrize("undefined", [True, False])
@pytest.mark.parametrize("tag", [0x00283000, 0x00091010, 0x00081140])
def test_nested_sequences_of_elements_that_are_read_and_private_and_without_a_type(tmp_path, tag, undefined):
    data = before_patient(explicit(tag, "UN", nested(3000, False, undefined, tag), 0xFFFFFFFF if undefined else None))
    (tmp_path / "x.dcm").write_bytes(data)
    outcome = bounded.read(tmp_path)
    assert not outcome.error and outcome.seconds < SECONDS and outcome.mb < MB, outcome
    assert len(outcome.volumes) + len(outcome.reasons) == 1, outcome


LENGTHS = {
    "none": (b"", 0),
    "too short": (bytes(9000), 9000),
    "too short by one": (bytes(9215), 9215),
    "not all there": (bytes(9000), 9216),
    "a frame too many": (bytes(2 * 9216), 2 * 9216),
    "4 GiB": (bytes(9216), 0xFFFFFFFE),
    "undefined": (bytes(9216), 0xFFFFFFFF),
    "undefined and encapsulated": (encapsulate([bytes(9216)]), 0xFFFFFFFF),
    "undefined and without end": (encapsulated_frames([bytes(9216)]), 0xFFFFFFFF),
}


@pytest.mark.parametrize("lie", LENGTHS)
def test_a_pixel_length_that_lies(tmp_path, lie):
    refused(tmp_path, "x.dcm", with_pixels(*LENGTHS[lie]), "TRUNCATED", "PIXEL_LENGTH", "BROKEN_PIXELS")


@pytest.mark.parametrize("big, length", [(False, 0x7FFFFFFF), (True, 0x7FFFFFFF), (False, 0xFFFFFFFE)])
@pytest.mark.parametrize(
    "tag, vr", [(0x00091010, "UN"), (0x00091010, "OB"), (0x00081140, "SQ"), (0x00080005, "UN"), (0x0008103E, "UT")]
)
def test_an_element_that_claims_gigabytes(tmp_path, tag, vr, length, big):
    """In a small file, and in one that is too large to be read at once."""
    data = before_patient(explicit(tag, vr, b"", length))
    (tmp_path / "x.dcm").write_bytes(data)
    if big:
        os.truncate(tmp_path / "x.dcm", 400 << 20)  # a sparse file
    refused(tmp_path, "x.dcm", None, "TRUNCATED", "BROKEN_DICOM", "NO_PIXEL_DATA", "BAD_SHAPE", "TOO_LARGE")


def test_a_million_elements(tmp_path):
    data = before_patient(b"".join(explicit(0x00090000 + n % 65536, "LO", b"") for n in range(500_000)))
    (tmp_path / "x.dcm").write_bytes(data)
    outcome = bounded.read(tmp_path)
    assert not outcome.error and outcome.seconds < SECONDS and outcome.mb < MB, outcome


@pytest.mark.parametrize("syntax", [RLE, J2K, JPEG, JPEG_LOSSLESS, JPEG_LS])
@pytest.mark.parametrize("size", [0, 2])
def test_a_million_fragments(tmp_path, syntax, size):
    fragments = implicit(0xFFFEE000, b"") + implicit(0xFFFEE000, bytes(size)) * 1_000_000 + implicit(0xFFFEE0DD, b"")
    refused(tmp_path, "x.dcm", with_pixels(fragments, 0xFFFFFFFF, syntax), "BROKEN_PIXELS", "TRUNCATED")


def start_of_frame(marker: int, rows: int, columns: int, components: int = 1, precision: int = 8) -> bytes:
    """The beginning of a JPEG of these claims, with little behind it."""
    parts = b"".join(bytes([c + 1 & 255, 0x11, 0]) for c in range(components))
    frame = struct.pack(">BHHB", precision, rows, columns, components & 255) + parts
    scan = struct.pack(">BB", 1, 1) + b"\0\0\x3f\0"
    return b"\xff\xd8\xff" + bytes([marker]) + struct.pack(">H", len(frame) + 2) + frame + b"\xff\xda\0\x08" + scan + bytes(500)


@pytest.mark.parametrize("syntax, marker", [(JPEG, 0xC0), (JPEG, 0xC2), (JPEG_LOSSLESS, 0xC3), (JPEG_LS, 0xF7)])
@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("components", [1, 255])
def test_a_jpeg_that_claims_a_giant(tmp_path, syntax, marker, honest, components):
    """A giant that the header of the object confirms, and one that it does not know of."""
    size = {"Rows": 65500, "Columns": 65500} if honest else {}
    bits = {"BitsAllocated": 8, "BitsStored": 8}
    data = with_pixels(encapsulate([start_of_frame(marker, 65500, 65500, components)]), 0xFFFFFFFF, syntax, **size, **bits)
    refused(tmp_path, "x.dcm", data, "TRUNCATED", "BROKEN_PIXELS")


@pytest.mark.parametrize("syntax", [J2K, JPEG, JPEG_LOSSLESS, JPEG_LS])
def test_a_second_frame_that_claims_a_giant(tmp_path, syntax):
    marker = {JPEG: 0xC0, JPEG_LOSSLESS: 0xC3, JPEG_LS: 0xF7}.get(syntax)
    frames = [
        codestream(side, side, (side, side), bits=8) if syntax == J2K else start_of_frame(marker, side, side)
        for side in (64, 65500)
    ]
    elements = {"Rows": 64, "Columns": 64, "BitsAllocated": 8, "BitsStored": 8, "NumberOfFrames": 2,
                "Modality": "OT", "ImagePositionPatient": None, "ImageOrientationPatient": None}  # fmt: skip
    data = with_pixels(encapsulate(frames), 0xFFFFFFFF, syntax, **elements)
    refused(tmp_path, "x.dcm", data, "BROKEN_PIXELS")


@pytest.mark.parametrize("components", [3, 255])
@pytest.mark.parametrize("syntax, marker", [(JPEG, 0xC0), (JPEG_LOSSLESS, 0xC3), (JPEG_LS, 0xF7)])
def test_a_jpeg_of_many_components(tmp_path, syntax, marker, components):
    data = with_pixels(encapsulate([start_of_frame(marker, 2000, 2000, components)]), 0xFFFFFFFF, syntax, Rows=2000, Columns=2000,
                       BitsAllocated=8, BitsStored=8)  # fmt: skip
    refused(tmp_path, "x.dcm", data, "BROKEN_PIXELS")


def codestream(columns: int, rows: int, tile: tuple[int, int], components: int = 1, bits: int = 16) -> bytes:
    """The beginning of a JPEG 2000 codestream (ISO 15444-1 A.5.1) of these claims."""
    parts = bytes([bits - 1, 1, 1]) * components
    size = struct.pack(">HHLLLLLLLLH", 38 + 3 * components, 0, columns, rows, 0, 0, *tile, 0, 0, components) + parts
    coding = b"\xff\x52" + struct.pack(">HBBHBBBBBB", 12, 0, 0, 1, 0, 5, 4, 4, 0, 1)
    quantization = b"\xff\x5c" + struct.pack(">HB", 19, 0x40) + bytes([0x40] * 16)
    tile_part = b"\xff\x90" + struct.pack(">HHLBB", 10, 0, 14, 0, 1) + b"\xff\x93"
    return b"\xff\x4f\xff\x51" + size + coding + quantization + tile_part + b"\xff\xd9"


@pytest.mark.parametrize(
    "tile, components", [((2, 3), 1), ((512, 512), 16384), ((512, 512), 3), ((1 << 31, 1 << 31), 1), ((0, 0), 1)]
)
@pytest.mark.parametrize("syntax", [J2K, "1.2.840.10008.1.2.4.201"])
def test_a_jpeg_2000_of_many_tiles_and_components(tmp_path, syntax, tile, components):
    frame = encapsulate([codestream(512, 512, tile, components)])
    refused(tmp_path, "x.dcm", with_pixels(frame, 0xFFFFFFFF, syntax, Rows=512, Columns=512), "BROKEN_PIXELS", mb=500)


@pytest.mark.parametrize("syntax", [JPEG, RLE])
def test_a_million_frames_in_no_bytes(tmp_path, syntax):
    elements = {"Rows": 1, "Columns": 1, "BitsAllocated": 8, "BitsStored": 8, "NumberOfFrames": 1_000_000}
    refused(tmp_path, "x.dcm", with_pixels(encapsulate([bytes(64)]), 0xFFFFFFFF, syntax, **elements), "TRUNCATED")


@pytest.mark.parametrize("length", [0, 1, 7, 0xFFFFFFFF])
def test_a_jpeg_2000_in_boxes_without_an_end(tmp_path, length):
    """Found by fuzzing: pydicom looks for ever behind a box of no length."""
    box = struct.pack(">L4s", 12, b"jP  ") + b"\r\n\x87\n" + struct.pack(">L4s", length, b"free")
    frame = encapsulate([box + codestream(64, 64, (64, 64))])
    refused(tmp_path, "x.dcm", with_pixels(frame, 0xFFFFFFFF, J2K, Rows=64, Columns=64), "BROKEN_PIXELS")


@pytest.fixture(scope="module")
def gibibyte() -> bytes:
    """1100 MiB of zeros, deflated a thousand to one."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = bytes(1 << 20)
    return b"".join(packer.compress(piece) for _ in range(1100)) + packer.flush()


def in_zlib(deflated: bytes) -> bytes:
    return b"\x78\xda" + deflated + bytes(4)


def test_a_deflated_object_that_is_a_bomb(tmp_path, gibibyte):
    data = dicoms.encoded(dicoms.dataset(PIXELS, TransferSyntaxUID=DEFLATED))
    end = 144 + int.from_bytes(data[140:144], "little")
    refused(tmp_path, "x.dcm", data[:end] + gibibyte, "BOMB")


# archives


def stored_in_zip(name: str, packed: bytes, size: int, crc: int = 0) -> bytes:
    """A zip of one deflated member that claims ``size``."""
    local = struct.pack("<4sHHHHHLLLHH", b"PK\3\4", 20, 0, 8, 0, 33, crc, len(packed), size, len(name), 0) + name.encode()
    central = struct.pack(
        "<4sHHHHHHLLLHHHHHLL", b"PK\1\2", 20, 20, 0, 8, 0, 33, crc, len(packed), size, len(name), 0, 0, 0, 0, 0, 0
    )
    central += name.encode()
    end = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 1, 1, len(central), len(local) + len(packed), 0)
    return local + packed + central + end


@pytest.mark.parametrize("claims", [1100 << 20, 1000])
def test_a_zip_bomb(tmp_path, gibibyte, claims):
    refused(tmp_path, "x.zip", stored_in_zip("x.dcm", gibibyte, claims), "BOMB", "BROKEN_ARCHIVE")


def test_a_zip_bomb_in_a_zip_in_a_zip(tmp_path, gibibyte):
    data = stored_in_zip("x.dcm", gibibyte, 1100 << 20)
    for _ in range(3):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("x.zip", data)
        data = out.getvalue()
    refused(tmp_path, "x.zip", data, "NESTED_ARCHIVE")


def test_a_zip_that_claims_a_million_members(tmp_path):
    end = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 65535, 65535, 0xFFFFFFF0, 0, 0)
    refused(tmp_path, "x.zip", end, "BROKEN_ARCHIVE", "EMPTY_ARCHIVE")


def test_a_tar_bomb(tmp_path):
    head = tarfile.TarInfo("x.dcm")
    head.size = 3 << 30
    packed = gzip.compress(head.tobuf()) + gzip.compress(bytes(64 << 20)) * 48
    refused(tmp_path, "x.tar.gz", packed, "BOMB")


@pytest.mark.parametrize("name", [b"path", b"comment", b"size"])
def test_a_tar_whose_extended_header_is_a_bomb(tmp_path, name):
    head = tarfile.TarInfo("pax")
    head.type, head.size = tarfile.XHDTYPE, 3 << 30
    packed = gzip.compress(head.tobuf() + b"3221225472 " + name + b"=") + gzip.compress(bytes(64 << 20)) * 48
    refused(tmp_path, "x.tar.gz", packed, "BOMB", "BROKEN_ARCHIVE")


def test_a_link_out_of_the_folder(tmp_path):
    folder = tmp_path / "archive"
    folder.mkdir()
    (tmp_path / "secret.dcm").write_bytes(dicoms.encoded(dicoms.dataset(PIXELS)))
    (folder / "x.dcm").symlink_to("../secret.dcm")
    refused(folder, "x.dcm", None, "LINK")


def test_a_link_to_an_endless_device(tmp_path):
    (tmp_path / "x.dcm").symlink_to("/dev/zero")
    refused(tmp_path, "x.dcm", None, "LINK")


def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "x.dcm")
    refused(tmp_path, "x.dcm", None, "SPECIAL_FILE")


# NIfTI


def nifti_header(shape, dtype=np.uint8, offset: float = 352) -> bytearray:
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header["dim"] = [len(shape), *shape, *(1,) * (7 - len(shape))]
    header["magic"], header["vox_offset"] = b"n+1", offset
    header.set_sform(np.eye(4), 1)
    return bytearray(header.binaryblock + bytes(4))


def test_a_gzipped_image_that_is_a_bomb(tmp_path):
    """Eight gibibytes of zeros, as its header says."""
    packed = gzip.compress(bytes(nifti_header((2048, 2048, 2048)))) + gzip.compress(bytes(64 << 20)) * 128
    refused(tmp_path, "x.nii.gz", packed, "BOMB", "TRUNCATED", "TOO_LARGE")


def test_a_small_image_before_a_bomb(tmp_path):
    packed = gzip.compress(bytes(nifti_header((2, 2, 2))) + bytes(8)) + gzip.compress(bytes(64 << 20)) * 48
    (tmp_path / "x.nii.gz").write_bytes(packed)
    outcome = bounded.read(tmp_path)
    assert outcome.volumes == ["x.nii.gz"] and outcome.seconds < SECONDS and outcome.mb < MB, outcome


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shape, offset", [((32767,) * 7, 352), ((32767, 32767, 3), 352), ((2, 2, 2), 4e9), ((2, 2, 2), np.inf)])
def test_an_image_that_claims_a_giant(tmp_path, shape, offset, packed):
    data = bytes(nifti_header(shape, offset=offset)) + bytes(8)
    name = "x.nii.gz" if packed else "x.nii"
    codes = ("TRUNCATED", "TOO_LARGE", "TOO_MANY_DIMENSIONS", "BROKEN_NIFTI")
    refused(tmp_path, name, gzip.compress(data) if packed else data, *codes)


# pictures


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def png(columns: int, rows: int, *chunks: bytes, colour: int = 0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">LLBBBBB", columns, rows, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8000, 60000, 2**31 - 1])
def test_a_png_that_claims_a_giant(tmp_path, side):
    refused(
        tmp_path, "x.png", png(side, side, chunk(b"IDAT", zlib.compress(bytes(100)))), "TRUNCATED", "TOO_LARGE", "BROKEN_PICTURE"
    )


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_a_png_whose_text_is_a_bomb(tmp_path, kind, gibibyte):
    bomb = in_zlib(gibibyte)
    text = b"key\0\1\0\0\0" + bomb if kind == b"iTXt" else b"key\0\0" + bomb
    data = png(4, 5, chunk(kind, text), chunk(b"IDAT", zlib.compress(bytes(25))))
    (tmp_path / "x.png").write_bytes(data)
    outcome = bounded.read(tmp_path)
    assert not outcome.error and outcome.seconds < SECONDS and outcome.mb < MB, outcome


def test_a_png_of_more_rows_than_it_says(tmp_path, gibibyte):
    (tmp_path / "x.png").write_bytes(png(4, 5, chunk(b"IDAT", in_zlib(gibibyte))))
    outcome = bounded.read(tmp_path)
    assert not outcome.error and outcome.seconds < SECONDS and outcome.mb < MB, outcome


def tiff(tags: dict[int, tuple[int, int, int]], data: bytes, following: int = 0) -> bytes:
    """A TIFF of one directory at byte 8: (type, count, value) by tag; ``data`` begins at byte 8 + 2 + 12 n + 4."""
    entries = b"".join(struct.pack("<HHLL", tag, *value) for tag, value in sorted(tags.items()))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + struct.pack("<L", following) + data


def tiff_tags(columns: int, rows: int, size: int, compression: int = 8) -> dict[int, tuple[int, int, int]]:
    at = 8 + 2 + 12 * 9 + 4
    return {256: (4, 1, columns), 257: (4, 1, rows), 258: (3, 1, 8), 259: (3, 1, compression), 262: (3, 1, 1), 273: (4, 1, at),
            277: (3, 1, 1), 278: (4, 1, rows), 279: (4, 1, size)}  # fmt: skip


@pytest.mark.parametrize("side", [20000, 200000, 2**32 - 1])
def test_a_tiff_that_claims_a_giant(tmp_path, side):
    data = zlib.compress(bytes(100))
    refused(tmp_path, "x.tif", tiff(tiff_tags(side, side, len(data)), data), "TRUNCATED", "TOO_LARGE", "BROKEN_PICTURE")


@pytest.mark.parametrize("compression", [8, 34925])
def test_a_tiff_whose_strip_is_a_bomb(tmp_path, gibibyte, compression):
    """Pixels of a small picture, and then a gibibyte of zeros."""
    bomb = in_zlib(gibibyte) if compression == 8 else lzma.compress(bytes(400 << 20), preset=0)
    refused(tmp_path, "x.tif", tiff(tiff_tags(40, 50, len(bomb), compression), bomb), "BOMB")


def test_a_tiff_whose_pages_go_round(tmp_path):
    """Its one page is read."""
    data = zlib.compress(bytes(2000))
    (tmp_path / "x.tif").write_bytes(tiff(tiff_tags(40, 50, len(data)), data, 8))
    outcome = bounded.read(tmp_path)
    assert not outcome.error and outcome.seconds < SECONDS and outcome.mb < MB, outcome


@pytest.mark.parametrize("tag", [270, 273, 279, 320, 700, 34665])
@pytest.mark.parametrize("count", [10**6, 2**31, 2**32 - 1])
def test_a_tiff_of_a_tag_that_claims_gigabytes(tmp_path, tag, count):
    data = zlib.compress(bytes(2000))
    tags = tiff_tags(40, 50, len(data)) | {tag: (4, count, 100)}
    (tmp_path / "x.tif").write_bytes(tiff(tags, data))
    outcome = bounded.read(tmp_path)
    assert not outcome.error and outcome.seconds < SECONDS and outcome.mb < MB, outcome
    assert len(outcome.volumes) + len(outcome.reasons) == 1, outcome


def test_a_tiff_of_a_million_pages(tmp_path):
    with tifffile.TiffWriter(tmp_path / "x.tif") as out:
        out.write(np.zeros((3000, 2, 2), np.uint8), metadata=None, contiguous=False, photometric="minisblack")
    refused(tmp_path, "x.tif", None, "MULTI_PAGE")


def test_a_jpeg_picture_that_claims_a_giant(tmp_path):
    refused(tmp_path, "x.jpg", start_of_frame(0xC0, 65500, 65500, 3), "TRUNCATED", "TOO_LARGE")
    (tmp_path / "x.jpg").write_bytes(start_of_frame(0xC2, 8000, 8000, 1))
    refused(tmp_path, "x.jpg", None, "BROKEN_PICTURE", "TRUNCATED")
