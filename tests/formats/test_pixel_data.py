import io
import struct

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from formats import dicoms
from formats.dicoms import SECRET
from sparkmed import config
from sparkmed.formats.deidentify import deidentify
from sparkmed.rejection import Refused

KEY = b"0123456789abcdef0123456789abcdef"
PIXELS = np.arange(4096, dtype=np.uint16).reshape(64, 64)
NAME = f"{SECRET}^Don ".encode()


def refusal(ds, **settings):
    with pytest.raises(Refused) as e:
        deidentify(dicoms.encoded(ds), KEY, config.Deidentify(**settings))
    assert SECRET.lower() not in e.value.message.lower()
    return e.value.reason


def jpeg(after_start=b"", **options):
    out = io.BytesIO()
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(out, "JPEG", **options)
    return out.getvalue()[:2] + after_start + out.getvalue()[2:]


def segment(marker, data):
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def encapsulated(value, syntax=JPEGBaseline8Bit, **elements):
    ds = dicoms.dataset(np.zeros((6, 8), np.uint8), **elements)
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = value
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return ds


def compressed(syntax, pixels=PIXELS, **elements):
    ds = dicoms.dataset(pixels)
    ds.compress(syntax, generate_instance_uid=False)
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


@pytest.mark.parametrize(
    "value",
    [
        encapsulate([jpeg()]),
        encapsulate([jpeg()], has_bot=False),
        encapsulate([jpeg()], fragments_per_frame=3),
        encapsulate([jpeg() + b"\0" * 6]),
        encapsulate([jpeg(segment(0xEE, b"Adobe\0\x64\0\0\0\0\0"))]),
        encapsulate([jpeg(progressive=True)]),
    ],
)
def test_an_image_in_fragments_passes(value):
    assert deidentify(dicoms.encoded(encapsulated(value)), KEY).data


@pytest.mark.parametrize(
    "value",
    [
        encapsulate([jpeg(segment(0xFE, NAME))]),
        encapsulate([jpeg(segment(0xE1, b"Exif\0\0" + NAME))]),
        encapsulate([jpeg(segment(0xE0, b"JFIF\0" + NAME))]),
        encapsulate([jpeg(segment(0xDB, b"\3" + (NAME * 8)[:64]))]),  # a table that nothing uses
        encapsulate([jpeg(segment(0xDB, b"\0" + (NAME * 8)[:64]))]),  # one that the next replaces
        encapsulate([jpeg(segment(0xC4, NAME))]),
        encapsulate([jpeg(segment(0xC4, b"\x13" + bytes([0] * 6 + [7] + [0] * 9) + b"Quixote"))]),
        encapsulate([jpeg(segment(0xDD, b"\0\0" + NAME))]),
        encapsulate([jpeg(segment(0xEE, b"Adobe\0dPanzas"))]),
        encapsulate([jpeg(segment(0xF8, b"\2" + NAME))]),
        encapsulate([jpeg(NAME)]),
        encapsulate([jpeg() + NAME]),
        encapsulate([jpeg() + jpeg()]),
        encapsulate([jpeg(), NAME]),
        encapsulate([jpeg(), NAME], has_bot=False),
        encapsulate([NAME, jpeg()], has_bot=False),
        encapsulate([jpeg()[:-2]]),
        b"\xfe\xff\x00\xe0" + struct.pack("<I", len(NAME)) + NAME + encapsulate([jpeg()], has_bot=False)[8:],
        b"\xfe\xff\x00\xe0" + struct.pack("<I", 4) + b"Quix" + encapsulate([jpeg()], has_bot=False)[8:],
        encapsulate([jpeg()]) + NAME,
    ],
)
def test_what_is_no_part_of_the_image_is_refused(value):
    assert refusal(encapsulated(value)) == "HIDDEN_BYTES"


def test_extended_offset_tables_must_be_those_of_the_fragments():
    value, offsets, lengths = encapsulate_extended([jpeg(), jpeg()])
    ds = encapsulated(value, NumberOfFrames=2, ExtendedOffsetTable=offsets, ExtendedOffsetTableLengths=lengths)
    assert deidentify(dicoms.encoded(ds), KEY).data
    for tables in ((b"Quixote!" * 2, lengths), (offsets, b"Quixote!" * 2), (offsets + offsets, lengths), (offsets, b"")):
        ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = tables
        assert refusal(ds) == "HIDDEN_BYTES"
    native = dicoms.dataset(PIXELS, ExtendedOffsetTable=b"Quixote!")
    assert refusal(native) == "HIDDEN_BYTES"


def test_a_second_pixel_element_is_refused_and_a_nested_one_goes():
    for tag, vr in ((0x7FE00008, "OF"), (0x7FE00009, "OD")):
        ds = dicoms.dataset(PIXELS)
        ds.add_new(tag, vr, NAME.ljust(16))
        assert refusal(ds) == "HIDDEN_BYTES"
        del ds.PixelData
        assert refusal(ds) in ("HIDDEN_BYTES", "NO_PIXEL_DATA")
    plan = dicoms.dataset(PIXELS, SOPClassUID="1.2.840.10008.5.1.4.1.1.481.5", Modality="RTPLAN")
    assert refusal(plan) == "HIDDEN_BYTES"
    inner = Dataset()
    inner.add_new(0x7FE00010, "OW", NAME + b" ")
    out = deidentify(dicoms.encoded(dicoms.dataset(PIXELS, AnatomicRegionSequence=Sequence([inner]))), KEY)
    assert NAME not in out.data


def test_comments_of_jpeg_2000_are_searched():
    ds = compressed(JPEG2000Lossless)
    stream = bytearray(next(generate_frames(ds.PixelData, number_of_frames=1)))
    at = stream.index(b"\xff\x64") if b"\xff\x64" in stream else stream.index(b"\xff\x90")
    for text, reason in (
        (b"Kakadu-v8", ""),
        (b"Created by OpenJPEG version 2.5.0", ""),
        (b"Kakadu-19470929", "NOT_CLEAN"),
        (b"of Dulcinea", "HIDDEN_BYTES"),
        (b"Kakadu-v8 " + NAME, "HIDDEN_BYTES"),
    ):
        made = bytes(stream[:at]) + segment(0x64, b"\0\1" + text) + bytes(stream[at:])
        ds.PixelData = encapsulate([made])
        ds["PixelData"].is_undefined_length, ds.PatientBirthDate = True, "19470929"
        if not reason:
            assert deidentify(dicoms.encoded(ds), KEY).data
        else:
            assert refusal(ds) == reason, text
    ds.PixelData = encapsulate([bytes(stream) + NAME])
    ds["PixelData"].is_undefined_length = True
    assert refusal(ds) == "HIDDEN_BYTES"


@pytest.mark.parametrize("marker", [0x31, 0x50, 0x55, 0x57, 0x58, 0x5E, 0x5F, 0x60, 0x61, 0x63, 0x75, 0x52, 0x5C, 0x5D])
@pytest.mark.parametrize("within", [False, True])
def test_segments_of_jpeg_2000_that_decoding_does_not_take_are_refused(marker, within):
    ds = compressed(JPEG2000Lossless)
    stream = next(generate_frames(ds.PixelData, number_of_frames=1))
    more, at = segment(marker, b"Dulcinea del Toboso"), stream.index(b"\xff\x90")
    made = stream[:at] + more + stream[at:]
    if within:  # the header of a tile
        length = int.from_bytes(stream[at + 6 : at + 10], "big") + len(more)
        made = stream[: at + 6] + length.to_bytes(4, "big") + stream[at + 10 : at + 12] + more + stream[at + 12 :]
    ds.PixelData = encapsulate([made])
    ds["PixelData"].is_undefined_length = True
    assert refusal(ds) == "HIDDEN_BYTES"


def test_lists_of_tiles_and_packets_must_be_theirs():
    ds = compressed(JPEG2000Lossless)
    stream = next(generate_frames(ds.PixelData, number_of_frames=1)).rstrip(b"\0")
    at, data = stream.index(b"\xff\x90"), stream.index(b"\xff\x93") + 2
    length, packets = len(stream) - 2 - at, len(stream) - 2 - data
    coded = bytes([0x80 | packets >> 14, 0x80 | packets >> 7 & 0x7F, packets & 0x7F])
    for wrong in (0, 1):
        lengths = segment(0x58, b"\0" + coded)
        more = length + len(lengths)
        tiles = segment(0x55, b"\0\x40" + (more + wrong).to_bytes(4, "big"))
        head = stream[at : at + 6] + more.to_bytes(4, "big") + stream[at + 10 : data - 2]
        ds.PixelData = encapsulate([stream[:at] + tiles + head + lengths + stream[data - 2 :]])
        ds["PixelData"].is_undefined_length = True
        if wrong:
            assert refusal(ds) == "HIDDEN_BYTES"
        else:
            assert deidentify(dicoms.encoded(ds), KEY).data


def test_an_identifier_within_the_entropy_coded_bytes_is_found():
    data = jpeg()
    assert refusal(encapsulated(encapsulate([data[:-2] + SECRET.encode() + data[-2:]]))) == "NOT_CLEAN"


def test_a_codestream_of_another_size_is_refused():
    ds = encapsulated(encapsulate([jpeg()]))
    ds.Rows = 5
    assert refusal(ds) == "PIXEL_LENGTH"


def test_run_lengths_hold_no_more_than_their_pixels():
    ds = compressed(RLELossless)
    assert deidentify(dicoms.encoded(ds), KEY).data
    frame = ds.PixelData[16 + 4 * (ds.PixelData[4] == 4) :]
    for wrong in (frame + b"\x0d" + NAME, frame[:16] + NAME.ljust(16, b"\0") + frame[32:]):
        ds.PixelData = encapsulate([wrong])
        ds["PixelData"].is_undefined_length = True
        assert refusal(ds) in ("HIDDEN_BYTES", "BROKEN_PIXELS")


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_hidden_bits_of_compressed_pixels_are_found(syntax):
    hiding = PIXELS.copy()
    hiding[::2] |= 0xF000
    ds = compressed(syntax, hiding, BitsStored=12, HighBit=11)
    assert refusal(ds) == "HIDDEN_BITS"
    assert deidentify(dicoms.encoded(ds), KEY, config.Deidentify(allow=["hidden_bits"])).data
    assert deidentify(dicoms.encoded(compressed(syntax, PIXELS, BitsStored=12, HighBit=11)), KEY).data


def test_a_compression_that_cannot_be_looked_into_is_refused():
    assert refusal(encapsulated(encapsulate([b"\0\0\1\xb3"]), "1.2.840.10008.1.2.4.100")) == "NO_DECODER"
