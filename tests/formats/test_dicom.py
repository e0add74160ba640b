import io
import logging
import struct
import time
import warnings
import zlib

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from sparkmed import config, formats
from sparkmed.formats import Instance, Member, archive, dicom, read_archive, read_headers, read_instance
from sparkmed.rejection import Refused

from . import dicoms, enhanced

PIXELS = np.arange(30, dtype=np.uint16).reshape(5, 6) * 100


def member(data: bytes) -> Member:
    return Member("file:///x", "x", "file:///x", len(data), 0, len(data), lambda: data)


def instance(data) -> Instance:
    return read_instance(member(data if isinstance(data, bytes) else dicoms.encoded(data)))


def reason(data) -> str:
    """Why an object is refused, at once or when it would become a volume."""
    with pytest.raises(Refused) as e:
        raise Refused(*instance(data).facts.get("problem", ["", "nothing is wrong"]))
    assert dicoms.SECRET not in str(e.value)
    return e.value.reason


def array(tmp_path, *datasets) -> np.ndarray:
    (volume,), rejections = read_archive(str(dicoms.write(tmp_path, datasets)))
    assert rejections == []
    return volume.array


def test_header_of_a_slice():
    where = {"PixelSpacing": [2, 3], "ImagePositionPatient": [1, 2, 3], "SpacingBetweenSlices": 4}
    i = instance(dicoms.dataset(PIXELS, InstanceNumber=7, **where))
    assert (i.format, i.kind, i.modality, i.shape) == ("dicom", "image", "CT", (1, 6, 5, 1))
    assert (i.series_uid, i.transfer_syntax, i.sop_class) == ("1.2.3.4.5", "1.2.840.10008.1.2.1", dicoms.CT)
    assert i.affine == (-3, 0, 0, -1, 0, -2, 0, -2, 0, 0, 4, 3, 0, 0, 0, 1)
    assert i.facts["number"] == 7 and i.facts["type"] == ["ORIGINAL", "PRIMARY", "AXIAL"]


def test_identity_stays_in_memory(tmp_path, caplog):
    made = dicoms.series(dicoms.stack(), PatientBirthDate="16050116", InstitutionName=dicoms.SECRET, StationName=dicoms.SECRET)
    i = instance(made[0])
    assert i.patient == f"{dicoms.SECRET}-1605"
    assert dicoms.SECRET not in repr(i) + repr(i.row()) and "16050116" not in repr(i.row())
    headers, _ = read_headers(str(dicoms.write(tmp_path, made)))
    assert headers[0].patient == i.patient
    assert dicoms.SECRET not in repr(headers) + repr(headers[0].row()) + formats.inspect(str(tmp_path)) + caplog.text
    assert Instance.from_row(i.row()) == i and Instance.from_row(i.row()).patient == ""
    assert formats.VolumeHeader.from_row(headers[0].row()) == headers[0]


def test_name_stands_in_for_a_missing_id():
    assert instance(dicoms.dataset(PIXELS, PatientID=None)).patient == f"{dicoms.SECRET}^Don"
    assert instance(dicoms.dataset(PIXELS, PatientID="", PatientName="")).patient == ""


def test_codes_that_are_prose_are_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prose = f"{dicoms.SECRET}, a man of la Mancha!"
        i = instance(dicoms.dataset(PIXELS, Modality=prose, ImageType=["ORIGINAL", prose]))
    assert dicoms.SECRET not in repr(i) + i.header


def test_nothing_is_said_about_odd_values(caplog):
    data = dicoms.encoded(dicoms.dataset(PIXELS, PatientID=f"{dicoms.SECRET}")).replace(b"1.2.3.4.5\0", b"Quixote-1\0")
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("error")
        instance(data)
    assert dicoms.SECRET not in caplog.text
    assert logging.getLogger("pydicom").level != logging.CRITICAL + 1


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"])
def test_native_syntaxes(tmp_path, syntax):
    ds = dicoms.dataset(PIXELS)
    out = io.BytesIO()
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax.endswith(".2.2"):
        ds.PixelData = PIXELS.astype(">u2").tobytes()
        ds["PixelData"].VR = "OW"
    implicit, little = syntax == "1.2.840.10008.1.2", not syntax.endswith(".2.2")
    pydicom.dcmwrite(out, ds, implicit_vr=implicit, little_endian=little, enforce_file_format=True)
    i = instance(out.getvalue())
    assert i.transfer_syntax == syntax
    (tmp_path / "x.dcm").write_bytes(out.getvalue())
    (volume,), _ = read_archive(str(tmp_path))
    np.testing.assert_array_equal(volume.array[0, :, :, 0], PIXELS.T)


def test_without_preamble(tmp_path):
    data = dicoms.encoded(dicoms.dataset(PIXELS))
    (tmp_path / "x").write_bytes(data[132:])
    (volume,), _ = read_archive(str(tmp_path))
    np.testing.assert_array_equal(volume.array[0, :, :, 0], PIXELS.T)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32"])
def test_integer_types(tmp_path, dtype):
    limits = np.iinfo(dtype)
    pixels = np.array([[limits.min, limits.max], [1, 0]], dtype)
    read = array(tmp_path, dicoms.dataset(pixels))
    assert read.dtype == dtype
    np.testing.assert_array_equal(read[0, :, :, 0], pixels.T)


def test_unused_high_bits_are_not_values(tmp_path):
    pixels = PIXELS | 0xF000  # an overlay in the bits above the stored 12
    np.testing.assert_array_equal(array(tmp_path, dicoms.dataset(pixels, BitsStored=12))[0, :, :, 0], PIXELS.T)


def test_signed_twelve_bits(tmp_path):
    values = np.array([[-2048, -1], [0, 2047]], np.int16)
    read = array(tmp_path, dicoms.dataset((values & 0xFFF).astype(np.int16), BitsStored=12))
    assert read.dtype == np.int16
    np.testing.assert_array_equal(read[0, :, :, 0], values.T)


def test_shifted_high_bit_is_refused():
    assert reason(dicoms.dataset(PIXELS, BitsStored=12, HighBit=15)) == "BAD_TYPE"


def test_float_pixels(tmp_path):
    ds = dicoms.dataset(PIXELS, BitsAllocated=32, BitsStored=32)
    values = PIXELS.astype(np.float32) / 7
    del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation
    ds.FloatPixelData = values.tobytes()
    read = array(tmp_path, ds)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read[0, :, :, 0], values.T)


@pytest.mark.parametrize("planar", [0, 1])
def test_colours(tmp_path, planar):
    pixels = np.arange(90, dtype=np.uint8).reshape(5, 6, 3)
    ds = dicoms.dataset(pixels, PlanarConfiguration=planar)
    if planar:
        ds.PixelData = pixels.transpose(2, 0, 1).tobytes()
    np.testing.assert_array_equal(array(tmp_path, ds)[..., 0], pixels.transpose(2, 1, 0))


def test_luminance_and_chroma_become_red_green_blue(tmp_path):
    gray = np.full((4, 4, 3), 128, np.uint8)
    gray[..., 0] = np.arange(16).reshape(4, 4) * 10
    read = array(tmp_path, dicoms.dataset(gray, PhotometricInterpretation="YBR_FULL"))
    for channel in read[..., 0]:
        np.testing.assert_array_equal(channel, gray[..., 0].T)


def test_palette(tmp_path):
    ds = dicoms.dataset(np.array([[0, 1], [2, 1]], np.uint8), PhotometricInterpretation="PALETTE COLOR")
    for name, values in (("Red", [10, 20, 30]), ("Green", [1, 2, 3]), ("Blue", [0, 255, 7])):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [3, 0, 8])
        setattr(ds, f"{name}PaletteColorLookupTableData", bytes(values) + b"\0")
    read = array(tmp_path, ds)
    np.testing.assert_array_equal(read[:, 0, 0, 0], [10, 1, 0])
    np.testing.assert_array_equal(read[:, 0, 1, 0], [30, 3, 7])
    np.testing.assert_array_equal(read[:, 1, 1, 0], [20, 2, 255])


@pytest.mark.parametrize("modality, inverted", [("CR", True), ("DX", True), ("MG", True), ("CT", False), ("MR", False)])
def test_inverted_shades(tmp_path, modality, inverted):
    values = PIXELS % 4096
    ds = dicoms.dataset(values, PhotometricInterpretation="MONOCHROME1", Modality=modality, BitsStored=12)
    expected = 4095 - values if inverted else values
    np.testing.assert_array_equal(array(tmp_path, ds)[0, :, :, 0], expected.T)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_lossless_syntaxes(tmp_path, syntax, dtype):
    pixels = np.random.default_rng(0).integers(-500 if dtype is np.int16 else 0, 3000, (64, 72)).astype(dtype)
    made = dicoms.series(np.stack([pixels.T] * 3, -1), RescaleSlope=1, RescaleIntercept=-1024)
    for ds in made:
        ds.compress(syntax, generate_instance_uid=False)
    headers, _ = read_headers(str(dicoms.write(tmp_path, made)))
    assert headers[0].facts["decoders"] == [dicom.DECODERS[syntax]]
    volume = formats.read_volume(headers[0])
    np.testing.assert_array_equal(volume.array[0], np.stack([pixels.T] * 3, -1).astype(int) - 1024)


def test_same_image_in_nine_syntaxes(shared_data):
    """One instance in nine encodings is one instance; its pixels are those of every encoding."""
    decoded = []
    for file in sorted((shared_data / "dicom/dcm_qa_ts/In").iterdir()):
        i = instance(file.read_bytes())
        decoded += dicom.read_frames(file.read_bytes(), i.facts, i.transfer_syntax, [0])
    assert len(decoded) == 9 and all(np.array_equal(d, decoded[0]) for d in decoded)


@pytest.mark.parametrize("sop_class, name, said", [
    ("1.2.840.10008.5.1.4.1.1.88.11", "SR", "Basic Text SR Storage"),
    ("1.2.840.10008.5.1.4.1.1.104.1", "DOC", "Encapsulated PDF Storage"),
    ("1.2.840.10008.5.1.4.1.1.9.1.1", "ECG", "12-lead ECG Waveform Storage"),
    ("1.2.840.10008.5.1.4.1.1.11.1", "PR", "Grayscale Softcopy Presentation State Storage"),
    ("1.2.840.10008.1.3.10", "", "Media Storage Directory Storage"),
    ("1.2.840.10008.5.1.4.1.1.481.2", "RTDOSE", "RT Dose Storage"),
])  # fmt: skip
def test_objects_that_are_no_images(tmp_path, sop_class, name, said):
    ds = dicoms.dataset(PIXELS, SOPClassUID=sop_class, Modality=name or None)
    if name != "RTDOSE":
        for element in ("PixelData", "Rows", "Columns", "BitsAllocated"):
            delattr(ds, element)
    assert instance(ds).kind == "other"
    volumes, (rejection,) = read_archive(str(dicoms.write(tmp_path, [ds])))
    assert volumes == [] and rejection.reason == "NOT_AN_IMAGE" and said in rejection.message


@pytest.mark.parametrize("elements, code", [
    ({"NumberOfFrames": 3, "Rows": 1, "Columns": 10}, "DUPLICATE_POSITION"),
    ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]}, "MOSAIC"),
    ({"RescaleSlope": 0, "RescaleIntercept": 5}, "BAD_VALUE"),
])  # fmt: skip
def test_images_that_are_no_volume(tmp_path, elements, code):
    volumes, (rejection,) = read_archive(str(dicoms.write(tmp_path, [dicoms.dataset(PIXELS, **elements)])))
    assert (volumes, rejection.reason) == ([], code)


def test_unknown_transfer_syntax(tmp_path):
    ds = dicoms.dataset(PIXELS)
    data = dicoms.encoded(ds).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.99999.1.2.1\0")
    (tmp_path / "x").write_bytes(data)
    _, (rejection,) = read_archive(str(tmp_path))
    assert rejection.reason == "NO_DECODER"


@pytest.mark.parametrize("elements, code", [
    ({"Rows": 65535, "Columns": 65535, "NumberOfFrames": 10000}, "TOO_LARGE"),
    ({"Rows": 6, "Columns": 6}, "TRUNCATED"),
    ({"Rows": 2}, "PIXEL_LENGTH"),
    ({"Rows": 0}, "BAD_SHAPE"),
    ({"Rows": None}, "BAD_SHAPE"),
    ({"SamplesPerPixel": 7}, "BAD_SHAPE"),
    ({"NumberOfFrames": -3}, "BAD_SHAPE"),
    ({"BitsAllocated": 12}, "BAD_TYPE"),
    ({"BitsStored": 17}, "BAD_TYPE"),
    ({"BitsAllocated": None}, "BAD_TYPE"),
    ({"ImagePositionPatient": [1, 2]}, "BAD_GEOMETRY"),
])  # fmt: skip
def test_headers_that_lie(elements, code):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert reason(dicoms.dataset(PIXELS, **elements)) == code


@pytest.mark.parametrize("text", [b"nan", b"inf", b"abc", b"1e9999", b"1\\2\\x"])
def test_numbers_that_are_none(text):
    data = dicoms.encoded(dicoms.dataset(PIXELS, SliceThickness="77777777"))
    assert reason(data.replace(b"77777777", text.ljust(8))) == "BAD_VALUE"


def test_compressed_pixels_that_lie(tmp_path):
    ds = dicoms.dataset(np.zeros((64, 72), np.uint16))
    ds.compress("1.2.840.10008.1.2.4.90", generate_instance_uid=False)
    ds.Rows = 65
    _, (rejection,) = read_archive(str(dicoms.write(tmp_path, [ds])))
    assert (rejection.reason, "64 x 72" in rejection.message) == ("BROKEN_PIXELS", True)
    ds.Rows = ds.Columns = 60000
    assert reason(ds) == "TRUNCATED"


def test_changed_after_it_was_catalogued(tmp_path):
    made = dicoms.series(dicoms.stack())
    headers, _ = read_headers(str(dicoms.write(tmp_path, made)))
    made[1].PixelData = bytes(len(made[1].PixelData))
    dicoms.write(tmp_path, made)
    with pytest.raises(Refused, match="CHANGED: source 2 of 4"):
        formats.read_volume(headers[0])
    (tmp_path / "002.dcm").unlink()
    with pytest.raises(Refused):
        formats.read_volume(headers[0])


@pytest.mark.parametrize("depth", [50, 1500])
@pytest.mark.parametrize("undefined", [True, False])
def test_nested_sequences(depth, undefined):
    item = b""
    for _ in range(depth):
        if undefined:
            item = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff" + item
            item += b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
        else:
            item = b"\xfe\xff\0\xe0" + struct.pack("<L", len(item)) + item
            item = b"\x08\0\x40\x11SQ\0\0" + struct.pack("<L", len(item)) + item
    data = dicoms.encoded(dicoms.dataset(PIXELS))
    at = data.index(b"\x10\0\x10\0PN")
    start = time.perf_counter()
    try:
        assert instance(data[:at] + item + data[at:]).shape == (1, 6, 5, 1)
    except Refused as e:
        assert e.reason == "DEEP_NESTING"
    assert time.perf_counter() - start < 5


def test_deflated_bomb(monkeypatch):
    monkeypatch.setattr(dicom, "_INFLATE_LIMIT", 64 << 20)
    ds = dicoms.dataset(PIXELS)
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    data = dicoms.encoded(ds)
    end = 144 + int.from_bytes(data[140:144], "little")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join(packer.compress(bytes(1 << 24)) for _ in range(5)) + packer.flush()
    assert reason(data[:end] + packed) == "BOMB"


def test_sequence_of_modality_tables(tmp_path):
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [2, 0, 16], b"\0\0\1\0"
    item.ModalityLUTType = "HU"
    item["LUTDescriptor"].VR = "US"
    item["LUTData"].VR = "OW"
    ds = dicoms.dataset(PIXELS, ModalityLUTSequence=Sequence([item]))
    _, (rejection,) = read_archive(str(dicoms.write(tmp_path, [ds])))
    assert rejection.reason == "MODALITY_LUT"


WHOLE = dicoms.encoded(dicoms.dataset(PIXELS))


@pytest.mark.parametrize("length", [0, 1, 100, 131, 132, 140, 200, 300, 500, len(WHOLE) - 61, len(WHOLE) - 1])
def test_truncated(length):
    assert reason(WHOLE[:length]) in ("EMPTY", "UNKNOWN_FORMAT", "BROKEN_DICOM", "TRUNCATED", "NO_PIXEL_DATA")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(132, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=12), st.integers(0, 60))
def test_any_bytes_end_in_an_instance_or_a_refusal(edits, cut):
    data = bytearray(WHOLE)
    for at, value in edits:
        data[at] = value
    data = bytes(data[: len(data) - cut])
    try:
        i = instance(data)
        headers, rejections = formats.assemble([i])
        assert len(headers) + len(rejections) == 1
        for h in headers:
            (stored,) = dicom.read_frames(data, h.facts["pixels"][0], h.facts["syntaxes"][0], [0])
            dicom.real_world(stored, h.facts["pixels"][0], h.modality, np.dtype(h.facts["dtype"]))
    except Refused as e:
        assert e.reason.isupper() and " " not in e.reason


STARTS = [b"", bytes(128) + b"DICM", b"\x08\0\x05\0CS", b"\x89PNG\r\n\x1a\n", b"II*\0", b"\xff\xd8\xff", b"\x1f\x8b\x08"]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(STARTS))
def test_any_file_at_all(tail, start):
    try:
        instance(start + tail)
    except Refused as e:
        assert e.reason.isupper()


def test_odd_files_of_pydicom(shared_data):
    """Every file is a source or refused; the pixels that pydicom's own reading gives are the same ones."""
    folder = shared_data / "dicom/pydicom_test_files"
    volumes, rejections = read_archive(str(folder))
    files = {f"file://{p}" for p in folder.rglob("*") if p.is_file()}
    named = [s for v in volumes for s in v.sources] + [r.uri for r in rejections]
    assert len(named) == len(set(named)) and set(named) == files
    expected = {"MR_truncated.dcm": "TRUNCATED", "examples_ybr_color.dcm": "TOO_MANY_DIMENSIONS", "rtplan.dump": "UNKNOWN_FORMAT"}
    others = ("rtplan.dcm", "waveform_ecg.dcm", "DICOMDIR", "reportsi.dcm")
    expected |= dict.fromkeys(others, "NOT_AN_IMAGE")
    expected |= {"liver_1frame.dcm": "LABEL_WITHOUT_IMAGE", "liver_expb_1frame.dcm": "DUPLICATE_INSTANCE"}
    expected |= {"rtstruct.dcm": "LABEL_WITHOUT_IMAGE"}
    reasons = {r.uri.rsplit("/")[-1]: r.reason for r in rejections}
    assert {n: reasons[n] for n in expected} == expected
    assert len(volumes) >= 48
    by_name = {v.sources[0].rsplit("/")[-1]: v for v in volumes}
    ct = pydicom.dcmread(folder / "test_files/CT_small.dcm")
    expected = ct.pixel_array.astype(int) + int(ct.RescaleIntercept)
    np.testing.assert_array_equal(by_name["CT_small.dcm"].array[0, :, :, 0].T, expected)


def test_member_of_an_archive_is_read_once(tmp_path):
    reads = []
    data = dicoms.encoded(dicoms.dataset(PIXELS))
    m = Member("file:///x", "x", "file:///x", len(data), 0, len(data), lambda: reads.append(1) or data)
    read_instance(m)
    assert reads == [1] and archive.kind(m.path) == ""


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90"])
def test_damaged_frames(tmp_path, syntax, share):
    """The RLE decoder panics on some of these, which is no Exception."""
    ds = dicoms.dataset(np.random.default_rng(0).integers(0, 3000, (64, 72)).astype(np.uint16))
    ds.compress(syntax, generate_instance_uid=False)
    data = bytearray(dicoms.encoded(ds))
    start = data.index(b"\xe0\x7f\x10\0OB") + 100
    at = start + int((len(data) - start) * share)
    data[at : at + 400] = b"\x81\xff" * 200
    (tmp_path / "x.dcm").write_bytes(data)
    volumes, rejections = read_archive(str(tmp_path))
    assert len(volumes) + len(rejections) == 1
    assert {r.reason for r in rejections} <= {"BROKEN_PIXELS"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "planted",
    [
        {"ImageType": ["DERIVED", "PRIMARY", dicoms.SECRET.upper()]},
        {"ImageType": ["DERIVED", "PRIMARY", "CERVANTES"], "ReferringPhysicianName": "Cervantes^Miguel"},
        {"Modality": dicoms.SECRET.upper()},
        {"PhotometricInterpretation": dicoms.SECRET.upper()},
        {"ComplexImageComponent": dicoms.SECRET.upper()},
        {"SOPClassUID": f"1.2.{dicoms.SECRET}"},
        {"TransferSyntaxUID": f"1.2.{dicoms.SECRET}"},
        {"FrameOfReferenceUID": dicoms.SECRET},
        {"SOPClassUID": dicoms.PET, "Modality": "PT", "Units": dicoms.SECRET.upper()},
        {"SOPClassUID": dicoms.PET, "Modality": "PT", "Units": "GML", "SUVType": dicoms.SECRET.upper()},
    ],
)
def test_names_in_codes_reach_no_table(tmp_path, planted):
    ds = dicoms.dataset(np.zeros((4, 4), np.uint16), **planted)
    dicoms.write(tmp_path, [ds])
    headers, rejections = read_headers(str(tmp_path), settings=config.Volumes(suv=True))
    said = str([h.row() for h in headers] + [(r.reason, r.message) for r in rejections]).lower()
    assert len(headers) + len(rejections) == 1
    assert dicoms.SECRET.lower() not in said and "cervantes" not in said


def test_names_in_stacks_reach_no_table():
    ds = enhanced.enhanced(enhanced.frames(dicoms.phantom(), stack=lambda c, k: dicoms.SECRET))
    assert dicoms.SECRET not in str(instance(ds).row())


def test_a_type_that_names_nobody_is_kept(tmp_path):
    ds = dicoms.dataset(np.zeros((4, 4), np.uint16), ImageType=["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"])
    (header,), _ = read_headers(str(dicoms.write(tmp_path, [ds])))
    assert header.facts["type"] == ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"]


@pytest.mark.parametrize(
    ("elements", "scanner"),
    [
        ({"Manufacturer": "SIEMENS", "ManufacturerModelName": "SOMATOM  Definition"}, "SIEMENS SOMATOM Definition"),
        ({"Manufacturer": f"for {dicoms.SECRET}"}, None),
        ({"Manufacturer": ""}, None),
    ],
)
def test_the_scanner_is_a_fact_unless_it_names_the_patient(tmp_path, elements, scanner):
    ((header,), _) = formats.read_headers(str(dicoms.write(tmp_path, dicoms.series(dicoms.stack(), **elements))))
    assert header.facts.get("scanner") == scanner
