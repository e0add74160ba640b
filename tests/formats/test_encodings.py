"""Every transfer syntax and way of encapsulation gives the voxels that were encoded; the decoder is on record."""

import base64
import io

import gdcm
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate, encapsulate_extended

from sparkmed.formats import dicom, read_archive, read_headers, read_volume

from . import dicoms, enhanced, test_conversion
from .dicoms import OBLIQUE, classic, phantom
from .judges import Expected, by_dcm2niix, matched

BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
RLE = "1.2.840.10008.1.2.5"
BASELINE, EXTENDED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
LOSSLESS, LOSSLESS_FIRST = "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"
JPEG_LS, JPEG_LS_NEAR = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"
J2K_LOSSLESS, J2K = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"
HTJ2K = ("1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203")

SHAPE = (36, 34, 3)
"""JPEG 2000 is not written below 32 x 32 by the encoder at hand."""
RAMP = np.arange(120, dtype=np.uint16).reshape(10, 12) * 7 + 300
RAMP_HTJ2K = base64.b64decode(
    "/0//UQApQAAAAAAMAAAACgAAAAAAAAAAAAACAAAAAgAAAAAAAAAAAAABDwEB/1AACAACAAAADP9SAAwAAgABAAUEBEAB/1wAEyCQmJigmJigmJigmJiYkJCY"
    "/2QAFwABT3BlbkpQSCBWZXIgMC4xNC4wLv+QAAoAAAAAAGsAAf+TwAATAMf6BQd0AADAAAlgAATA9gCHdABe/QKHdADAAAjgAASgG3MAc/4yMwDAAAngAATA"
    "3v2M/st1AHPmCndUAMAAFRAABXAkyd0jp0J2AKampqampvQQ3iEBvrgA/9k="
)
"""RAMP as a reversible HTJ2K codestream, RPCL order, of OpenJPH 0.14.0: nothing at hand encodes it."""


def native(ds, syntax: str) -> bytes:
    """The file of ``ds`` in a native transfer syntax."""
    out = io.BytesIO()
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax == BIG_ENDIAN:
        ds.PixelData = np.frombuffer(ds.PixelData, f"<u{ds.BitsAllocated // 8}").byteswap().tobytes()
        ds["PixelData"].VR = "OB" if ds.BitsAllocated == 8 else "OW"
    implicit, little = syntax == "1.2.840.10008.1.2", syntax != BIG_ENDIAN
    pydicom.dcmwrite(out, ds, implicit_vr=implicit, little_endian=little, enforce_file_format=True)
    return out.getvalue()


def by_gdcm(ds, syntax: str, tmp_path) -> bytes:
    """The file of ``ds`` in JPEG lossless."""
    source, out = tmp_path / "native.tmp", tmp_path / "jpeg.tmp"
    source.write_bytes(dicoms.encoded(ds))
    reader = gdcm.ImageReader()
    reader.SetFileName(str(source))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    kinds = {LOSSLESS: gdcm.TransferSyntax.JPEGLosslessProcess14, LOSSLESS_FIRST: gdcm.TransferSyntax.JPEGLosslessProcess14_1}
    change.SetTransferSyntax(gdcm.TransferSyntax(kinds[syntax]))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(out))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    coded = pydicom.dcmread(out)
    assert coded.file_meta.TransferSyntaxUID == syntax
    ds.PixelData = coded.PixelData
    ds["PixelData"].VR = "OB"
    ds.file_meta.TransferSyntaxUID = syntax
    source.unlink()
    out.unlink()
    return dicoms.encoded(ds)


def jpeg(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=98, subsampling=0)
    return out.getvalue()


def encoded(ds, syntax: str, tmp_path) -> bytes:
    """The file of ``ds`` in any transfer syntax."""
    if syntax in (BASELINE, EXTENDED):
        ds.PixelData = encapsulate([jpeg(ds.pixel_array)])
        ds["PixelData"].VR = "OB"
        ds.file_meta.TransferSyntaxUID = syntax
        return dicoms.encoded(ds)
    if syntax in (LOSSLESS, LOSSLESS_FIRST):
        return by_gdcm(ds, syntax, tmp_path)
    if syntax in (RLE, JPEG_LS, J2K_LOSSLESS):
        ds.compress(syntax, generate_instance_uid=False)
        return dicoms.encoded(ds)
    if syntax == JPEG_LS_NEAR:
        ds.compress(syntax, jls_error=2, generate_instance_uid=False)
        return dicoms.encoded(ds)
    if syntax == J2K:
        ds.compress(syntax, j2k_psnr=[70], generate_instance_uid=False)
        return dicoms.encoded(ds)
    return native(ds, syntax)


def written(tmp_path, made, syntax):
    folder = tmp_path / "in"
    folder.mkdir()
    for n, ds in enumerate(made):
        (folder / f"{n:03d}.dcm").write_bytes(encoded(ds, syntax, tmp_path))
    return folder


def read(folder):
    """(volume, facts) of a folder that becomes one volume and nothing else."""
    (header,), rejections = read_headers(str(folder))
    assert rejections == []
    return read_volume(header), header.facts


NATIVE = ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", DEFLATED, BIG_ENDIAN]
COMPRESSED = [RLE, LOSSLESS, LOSSLESS_FIRST, JPEG_LS, J2K_LOSSLESS]
UNDERSTOOD = [s for s in NATIVE + COMPRESSED if s != DEFLATED]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
@pytest.mark.parametrize("syntax", NATIVE + COMPRESSED)
def test_bit_identical(tmp_path, syntax, dtype):
    voxels = phantom(shape=SHAPE)
    voxels = (
        (voxels % 251).astype(np.uint8)
        if dtype is np.uint8
        else (voxels.astype(np.int32) - 300 * (dtype is np.int16)).astype(dtype)
    )
    volume, facts = read(written(tmp_path, classic(voxels), syntax))
    np.testing.assert_array_equal(volume.array, voxels)
    assert facts["decoders"] == [dicom.DECODERS[syntax] or "native"]
    assert facts["syntaxes"] == [syntax]


@pytest.mark.parametrize("syntax", UNDERSTOOD)
def test_peer(tmp_path, syntax):
    """dcm2niix decodes them to the same voxels (it knows no deflated files and no HTJ2K)."""
    voxels = phantom(shape=SHAPE)
    folder = written(tmp_path, classic(voxels), syntax)
    result = by_dcm2niix(folder, tmp_path / "out")
    matched([Expected(voxels, OBLIQUE.affine)], list(result.values()), list(result))


@pytest.mark.parametrize("syntax, error", [(BASELINE, 8), (EXTENDED, 8), (JPEG_LS_NEAR, 2), (J2K, 2)])
def test_lossy(tmp_path, syntax, error):
    smooth = np.add.outer(np.add.outer(np.arange(36) * 3, np.arange(34) * 2), np.arange(3) * 9).astype(np.uint8)[None]
    volume, facts = read(written(tmp_path, classic(smooth), syntax))
    assert np.abs(volume.array.astype(int) - smooth).max() <= error
    assert facts["decoders"] == [dicom.DECODERS[syntax]]


@pytest.mark.parametrize("syntax", HTJ2K)
def test_high_throughput(tmp_path, syntax):
    made = classic(np.repeat(RAMP.T[None, ..., None], 3, -1))
    for ds in made:
        ds.PixelData = encapsulate([RAMP_HTJ2K])
        ds["PixelData"].VR = "OB"
        ds.file_meta.TransferSyntaxUID = syntax
    volume, facts = read(dicoms.write(tmp_path, made))
    np.testing.assert_array_equal(volume.array[0], np.repeat(RAMP.T[..., None], 3, -1))
    assert facts["decoders"] == [dicom.DECODERS[syntax]]


def test_twelve_bits_of_extended_jpeg_are_right_or_refused(shared_data):
    """Two pixels that several decoders agree on (pydicom's own tests use them)."""
    volumes, rejections = read_archive(str(shared_data / "dicom/pydicom_test_files/test_files/JPGExtended.dcm"))
    assert [r.reason for r in rejections] == ["NO_DECODER"] * (not volumes)
    for volume in volumes:
        assert (volume.array[0, 140, 420, 0], volume.array[0, 120, 230, 0]) == (244, 95)


# ---- many frames, many fragments


@pytest.mark.parametrize("syntax", [RLE, JPEG_LS, J2K_LOSSLESS])
@pytest.mark.parametrize("table", ["basic", "none", "extended"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_frames_in_fragments(tmp_path, syntax, table, pieces):
    """Frames of an enhanced object with or without offset tables, each in one or several fragments."""
    if syntax == RLE and pieces > 1:
        pytest.skip("an RLE frame is one fragment: PS3.5 A.4.2")
    if table == "extended" and pieces > 1:
        pytest.skip("with extended offsets each frame is one fragment: PS3.3 C.7.6.3.1.8")
    voxels = phantom(2, SHAPE)
    made = enhanced.frames(voxels, temporal=lambda c, k: c + 1)
    ds = enhanced.enhanced(enhanced.shuffled(made), dimensions=("stack", "temporal", "place"))
    ds.compress(syntax, generate_instance_uid=False)
    coded = list(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=6))
    if table == "extended":
        ds.PixelData, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = encapsulate_extended(coded)
    else:
        ds.PixelData = encapsulate(coded, fragments_per_frame=pieces, has_bot=table == "basic")
    ds["PixelData"].VR = "OB"
    volume, _ = read(dicoms.write(tmp_path, [ds]))
    matched([Expected(voxels, OBLIQUE.affine)], [(volume.array, volume.affine)], ["one"])


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("table", [True, False])
def test_slices_in_fragments(tmp_path, pieces, table):
    voxels = phantom(shape=SHAPE)
    made = classic(voxels)
    for ds in made:
        ds.compress(J2K_LOSSLESS, generate_instance_uid=False)
        (frame,) = pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1)
        ds.PixelData = encapsulate([frame], fragments_per_frame=pieces, has_bot=table)
        ds["PixelData"].VR = "OB"
    np.testing.assert_array_equal(read(dicoms.write(tmp_path, made))[0].array, voxels)


@pytest.mark.parametrize("syntax", NATIVE + [RLE, J2K_LOSSLESS])
def test_enhanced_objects(tmp_path, syntax):
    voxels = phantom(2, SHAPE)
    made = enhanced.frames(voxels, temporal=lambda c, k: c + 1, slope=2, intercept=-5)
    ds = enhanced.enhanced(enhanced.shuffled(made), dimensions=("stack", "temporal", "place"))
    volume, facts = read(written(tmp_path, [ds], syntax))
    wanted = [Expected(voxels * 2.0 - 5, OBLIQUE.affine)]
    matched(wanted, [(volume.array, volume.affine)], ["one"])
    assert facts["decoders"] == [dicom.DECODERS[syntax] or "native"]


@pytest.mark.parametrize("syntax", NATIVE + COMPRESSED)
def test_mosaics(tmp_path, syntax):
    """The private header keeps its own byte order and has no VR of its own in implicit files."""
    voxels = phantom(shape=SHAPE)
    volume, _ = read(written(tmp_path, enhanced.mosaic(voxels), syntax))
    wanted = [Expected(voxels, OBLIQUE.affine)]
    matched(wanted, [(volume.array, volume.affine)], ["one"])


def stretched(ds):
    """The same with every sequence and item of undefined length."""
    for element in ds:
        if element.VR == "SQ":
            element.is_undefined_length = True
            for item in element.value:
                item.is_undefined_length_sequence_item = True
                stretched(item)
    return ds


@pytest.mark.parametrize("syntax", NATIVE)
def test_sequences_of_undefined_length(tmp_path, syntax):
    voxels = phantom(2, SHAPE)
    made = enhanced.frames(voxels, temporal=lambda c, k: c + 1, slope=2, intercept=-5, b=500)
    ds = stretched(enhanced.enhanced(made, dimensions=("stack", "temporal", "place"), share=False, decoy=True))
    volume, _ = read(written(tmp_path, [ds], syntax))
    wanted = [Expected(voxels * 2.0 - 5, OBLIQUE.affine)]
    matched(wanted, [(volume.array, volume.affine)], ["one"])


@pytest.mark.parametrize("vendor", ["Siemens", "GE", "Philips"])
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", BIG_ENDIAN, "UN"])
def test_private_weights(tmp_path, syntax, vendor):
    """Private b-values in files that do not say their type, and in the other byte order."""
    made = test_conversion.CASES[f"b-values of {vendor}"].write()
    (expected,) = test_conversion.CASES[f"b-values of {vendor}"].volumes()
    tag, kind = {"Siemens": (0x0019100C, str), "GE": (0x00431039, str), "Philips": (0x20011003, float)}[vendor]
    if syntax == "UN":
        for ds in made:
            value = ds[tag].value
            texts = value if vendor == "GE" else [value]
            data = np.float32(value).tobytes() if kind is float else "\\".join(str(int(v)) for v in texts).encode()
            del ds[tag]
            ds.add_new(tag, "UN", data + b" " * (len(data) % 2))
        folder = dicoms.write(tmp_path / "in", made)
    else:
        folder = written(tmp_path, made, syntax)
    volume, facts = read(folder)
    matched([expected], [(volume.array, volume.affine)], ["one"])
    assert (facts["axis"], facts["values"]) == ("b", [0, 500, 1000])


@pytest.mark.parametrize("syntax", [JPEG_LS, J2K_LOSSLESS])
def test_frame_that_is_missing(tmp_path, syntax):
    """One frame of six that is not there is no volume, and no other frame is shown in its place."""
    ds = enhanced.enhanced(enhanced.frames(phantom(2, SHAPE), temporal=lambda c, k: c + 1))
    ds.compress(syntax, generate_instance_uid=False)
    coded = list(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=6))
    ds.PixelData = encapsulate(coded[:5])
    ds["PixelData"].VR = "OB"
    volumes, rejections = read_archive(str(dicoms.write(tmp_path, [ds])))
    assert volumes == [] and len(rejections) == 1


# ---- colours, shades, bits


def painted(pixels: np.ndarray, **elements):
    """A picture without a place in space."""
    nowhere = dict.fromkeys(("ImagePositionPatient", "ImageOrientationPatient"))
    return dicoms.dataset(pixels, **nowhere | {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "Modality": "OT"} | elements)


COLOURS = (np.arange(34 * 36 * 3).reshape(34, 36, 3) * 37 % 256).astype(np.uint8)


def from_ybr(ybr: np.ndarray) -> np.ndarray:
    """PS3.3 C.7.6.3.1.2: red, green, blue of full-range YBR."""
    y, b, r = (ybr[..., n].astype(float) - (128 if n else 0) for n in range(3))
    rgb = np.stack([y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b], -1)
    return np.clip(np.round(rgb), 0, 255)


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("syntax", [*NATIVE, RLE, JPEG_LS, J2K_LOSSLESS])
def test_red_green_blue(tmp_path, syntax, planar):
    """Planes or pixels in native files; a compressed one is planes or not by its syntax, whatever the header says."""
    ds = painted(COLOURS)
    if syntax in NATIVE and planar:
        ds.PixelData = COLOURS.transpose(2, 0, 1).tobytes()
    elif planar:
        ds.compress(syntax, generate_instance_uid=False)
    ds.PlanarConfiguration = planar
    if syntax in NATIVE or not planar:
        folder = written(tmp_path, [ds], syntax)
    else:
        folder = dicoms.write(tmp_path / "in", [ds])
    volume, _ = read(folder)
    np.testing.assert_array_equal(volume.array[..., 0], COLOURS.transpose(2, 1, 0))


@pytest.mark.parametrize("syntax", [BASELINE, LOSSLESS, LOSSLESS_FIRST])
@pytest.mark.parametrize("planar", [0, 1])
def test_colours_in_jpeg(tmp_path, syntax, planar):
    """JPEG holds pixels: a header that speaks of planes (real archives have them) does not scramble the colours."""
    smooth = np.stack([np.add.outer(np.arange(16) * 9, np.arange(16) * n) for n in (1, 4, 6)], -1).astype(np.uint8)
    ds = painted(smooth)
    if syntax == BASELINE:
        ds.PhotometricInterpretation = "YBR_FULL_422"
        ds.PixelData = encapsulate([jpeg(smooth)])
        ds["PixelData"].VR = "OB"
        ds.file_meta.TransferSyntaxUID = BASELINE
    else:
        by_gdcm(ds, syntax, tmp_path)
    ds.PlanarConfiguration = planar
    volume, _ = read(dicoms.write(tmp_path / "in", [ds]))
    assert np.abs(volume.array[..., 0].astype(int) - smooth.transpose(2, 1, 0)).max() <= (10 if syntax == BASELINE else 0)


def test_full_range_chroma(tmp_path):
    volume, _ = read(dicoms.write(tmp_path, [painted(COLOURS, PhotometricInterpretation="YBR_FULL")]))
    np.testing.assert_allclose(volume.array[..., 0], from_ybr(COLOURS).transpose(2, 1, 0), atol=1)


def test_chroma_of_every_other_column(tmp_path):
    """YBR_FULL_422 is stored Y1 Y2 Cb Cr: two columns share their chroma (PS3.3 C.7.6.3.1.2)."""
    ybr = COLOURS.copy()
    ybr[:, 1::2, 1:] = ybr[:, ::2, 1:]
    pairs = np.stack([ybr[:, ::2, 0], ybr[:, 1::2, 0], ybr[:, ::2, 1], ybr[:, ::2, 2]], -1)
    ds = painted(COLOURS, PhotometricInterpretation="YBR_FULL_422")
    ds.PixelData = pairs.tobytes()
    volume, _ = read(dicoms.write(tmp_path, [ds]))
    np.testing.assert_allclose(volume.array[..., 0], from_ybr(ybr).transpose(2, 1, 0), atol=1)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("first", [0, 20])
def test_palettes(tmp_path, bits, first):
    """Indices below the first mapped value take the first colour, those behind the last the last (PS3.3 C.7.6.3.1.5)."""
    tables = (np.arange(3 * 100).reshape(3, 100) * (1 if bits == 8 else 211)).astype(np.uint8 if bits == 8 else np.uint16)
    pixels = (np.arange(120).reshape(10, 12) * 3 % 160).astype(np.uint8)
    ds = painted(pixels, PhotometricInterpretation="PALETTE COLOR")
    for colour, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        setattr(ds, f"{colour}PaletteColorLookupTableDescriptor", [100, first, bits])
        setattr(ds, f"{colour}PaletteColorLookupTableData", table.tobytes())
    volume, _ = read(dicoms.write(tmp_path, [ds]))
    wanted = tables[:, np.clip(pixels.astype(int) - first, 0, 99)]
    np.testing.assert_array_equal(volume.array[..., 0], wanted.transpose(0, 2, 1))


def test_segmented_palette(tmp_path):
    """A discrete, a linear and an indirect segment (PS3.3 C.7.9.2)."""
    pixels = np.array([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], np.uint8)
    # discrete: 2 values 100, 300; linear: 4 values up to 700; indirect: the 1 linear segment at byte 8 again is not needed here
    segments = np.array([0, 2, 100, 300, 1, 4, 700, 0, 4, 5, 6, 7, 8], np.uint16)
    ds = painted(pixels, PhotometricInterpretation="PALETTE COLOR")
    for colour in ("Red", "Green", "Blue"):
        setattr(ds, f"{colour}PaletteColorLookupTableDescriptor", [10, 0, 16])
        setattr(ds, f"Segmented{colour}PaletteColorLookupTableData", segments.tobytes())
    volume, _ = read(dicoms.write(tmp_path, [ds]))
    wanted = np.array([100, 300, 400, 500, 600, 700, 5, 6, 7, 8])[pixels]
    for channel in volume.array[..., 0]:
        np.testing.assert_array_equal(channel, wanted.T)


def test_one_bit(tmp_path):
    """Bits are packed from the lowest on, rows run over the ends of bytes (PS3.5 8.1.1)."""
    bits = np.random.default_rng(1).integers(0, 2, (7, 9)).astype(np.uint8)
    ds = painted(bits)
    ds.BitsAllocated = ds.BitsStored = 1
    ds.HighBit = 0
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    ds.PixelData = packed + b"\0" * (len(packed) % 2)
    volume, _ = read(dicoms.write(tmp_path, [ds]))
    np.testing.assert_array_equal(volume.array[0, :, :, 0], bits.T)


@pytest.mark.parametrize("bits", [1, 8])
def test_pictures_of_many_frames(tmp_path, bits):
    """Frames without a place are the channels of one volume."""
    pixels = np.random.default_rng(1).integers(0, 2 if bits == 1 else 256, (4, 7, 9)).astype(np.uint8)
    ds = painted(pixels[0], NumberOfFrames=4, SOPClassUID=f"1.2.840.10008.5.1.4.1.1.7.{1 if bits == 1 else 2}")
    ds.PixelData = pixels.tobytes()
    if bits == 1:
        ds.BitsAllocated = ds.BitsStored = 1
        ds.HighBit = 0
        ds.PixelData = np.packbits(pixels.ravel(), bitorder="little").tobytes()
    ds.PixelData += b"\0" * (len(ds.PixelData) % 2)
    volume, facts = read(dicoms.write(tmp_path, [ds]))
    np.testing.assert_array_equal(volume.array[..., 0], pixels.transpose(0, 2, 1))
    assert facts["axis"] == "frame"


def test_colours_of_many_frames(tmp_path):
    ds = painted(COLOURS, NumberOfFrames=2)
    ds.PixelData = COLOURS.tobytes() * 2
    volumes, rejections = read_archive(str(dicoms.write(tmp_path, [ds])))
    assert volumes == [] and [r.reason for r in rejections] == ["TOO_MANY_DIMENSIONS"]
    assert "2" in rejections[0].message and "3" in rejections[0].message


@pytest.mark.parametrize("kind", ["Float", "DoubleFloat"])
def test_floats(tmp_path, kind):
    values = phantom(shape=SHAPE).astype(np.float32 if kind == "Float" else np.float64) / 7 - 20
    made = classic(phantom(shape=SHAPE))
    for k, ds in enumerate(made):
        del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation
        ds.BitsAllocated = values.itemsize * 8
        setattr(ds, f"{kind}PixelData", np.ascontiguousarray(values[0, :, :, k].T).tobytes())
    volume, _ = read(dicoms.write(tmp_path, made))
    assert volume.array.dtype == values.dtype
    np.testing.assert_array_equal(volume.array, values)


@pytest.mark.parametrize("stored, high", [(12, 15), (12, 13), (10, 15)])
def test_high_bit_elsewhere(tmp_path, stored, high):
    """Shifted values (retired, but in old archives) are shifted back or refused: never taken as they are."""
    voxels = phantom(shape=SHAPE) % (1 << stored)
    made = classic((voxels.astype(np.uint32) << (high + 1 - stored)).astype(np.uint16), BitsStored=stored, HighBit=high)
    volumes, rejections = read_archive(str(dicoms.write(tmp_path, made)))
    assert {r.reason for r in rejections} <= {"BAD_TYPE"} and len(volumes) + len(rejections) in (1, 3)
    for volume in volumes:
        np.testing.assert_array_equal(volume.array, voxels)


@pytest.mark.parametrize("modality", ["CR", "DX", "MG"])
@pytest.mark.parametrize("signed", [False, True])
def test_shades_of_projections(tmp_path, modality, signed):
    """White is 0 in MONOCHROME1: a projection is turned round within its stored bits."""
    pixels = phantom(shape=SHAPE)[0, :, :, 0].T.astype(np.int16 if signed else np.uint16) - 2000 * signed
    nowhere = {"SOPClassUID": dicoms.CR, "Modality": modality, "BitsStored": 12}
    ds = painted(pixels, PhotometricInterpretation="MONOCHROME1", **nowhere)
    volume, _ = read(dicoms.write(tmp_path, [ds]))
    low, high = (-2048, 2047) if signed else (0, 4095)
    np.testing.assert_array_equal(volume.array[0, :, :, 0], (low + high - pixels.astype(int)).T)
