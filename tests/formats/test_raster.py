import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from sparkmed.formats import read_archive

GRAY = np.arange(20, dtype=np.uint8).reshape(4, 5) * 12  # rows, columns
COLOUR = np.stack([GRAY, GRAY[::-1], 255 - GRAY], -1)


def one(path):
    (volume,), rejections = read_archive(str(path))
    assert rejections == []
    return volume


def reason(path):
    volumes, (rejection,) = read_archive(str(path))
    assert volumes == []
    return rejection.reason


@pytest.mark.parametrize("name", ["p.png", "p.tif"])
def test_columns_are_i_and_rows_are_j(tmp_path, name):
    Image.fromarray(GRAY).save(tmp_path / name)
    volume = one(tmp_path / name)
    assert volume.array.shape == (1, 5, 4, 1)
    np.testing.assert_array_equal(volume.array[0, :, :, 0], GRAY.T)
    np.testing.assert_array_equal(volume.affine, np.diag([-1, -1, 1, 1]))


@pytest.mark.parametrize("name", ["p.png", "p.tif"])
def test_colours_are_channels(tmp_path, name):
    Image.fromarray(COLOUR).save(tmp_path / name)
    np.testing.assert_array_equal(one(tmp_path / name).array[..., 0], COLOUR.transpose(2, 1, 0))


@pytest.mark.parametrize("name", ["p.png", "p.tif"])
def test_constant_alpha_is_dropped(tmp_path, name):
    opaque = np.dstack([COLOUR, np.full(GRAY.shape, 255, np.uint8)])
    Image.fromarray(opaque).save(tmp_path / name)
    np.testing.assert_array_equal(one(tmp_path / name).array[..., 0], COLOUR.transpose(2, 1, 0))
    opaque[0, 0, 3] = 7
    Image.fromarray(opaque).save(tmp_path / name)
    assert reason(tmp_path / name) == "ALPHA"


def test_jpeg(tmp_path):
    smooth = np.add.outer(np.arange(64), np.arange(48)).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "p.jpg", quality=95)
    volume = one(tmp_path / "p.jpg")
    assert volume.array.shape == (1, 48, 64, 1)
    assert np.abs(volume.array[0, :, :, 0].astype(int) - smooth.T).max() <= 3


def test_jpeg_lies_as_its_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (32, 1))).save(tmp_path / "p.jpg", exif=exif)
    volume = one(tmp_path / "p.jpg")
    assert volume.array.shape == (1, 32, 64, 1)
    assert volume.array[0, 0, 63, 0] > volume.array[0, 0, 0, 0] + 50  # what was left is up


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "uint32"])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}, {"tile": (16, 16)}])
def test_tiff_types(tmp_path, dtype, options):
    values = (GRAY * 3).astype(dtype)
    tifffile.imwrite(tmp_path / "p.tif", values, photometric="minisblack", **options)
    volume = one(tmp_path / "p.tif")
    assert volume.array.dtype == np.dtype(dtype) and volume.array.dtype.isnative
    np.testing.assert_array_equal(volume.array[0, :, :, 0], values.T)


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "packbits"])
def test_tiff_compressions_of_pillow(tmp_path, compression):
    flat = np.full((32, 48, 3), 77, np.uint8)
    Image.fromarray(flat).save(tmp_path / "p.tif", compression=compression)
    volume = one(tmp_path / "p.tif")
    assert volume.array.shape == (3, 48, 32, 1) and np.abs(volume.array.astype(int) - 77).max() <= 1


def test_tiff_planes(tmp_path):
    tifffile.imwrite(tmp_path / "p.tif", COLOUR.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(one(tmp_path / "p.tif").array[..., 0], COLOUR.transpose(2, 1, 0))


def test_tinted_palette_is_intensity(tmp_path):
    ramp = np.zeros((3, 256), np.uint16)
    ramp[1] = np.arange(256) * 257
    tifffile.imwrite(tmp_path / "p.tif", GRAY, photometric="palette", colormap=ramp)
    np.testing.assert_array_equal(one(tmp_path / "p.tif").array[0, :, :, 0], GRAY.T)
    tifffile.imwrite(tmp_path / "p.tif", GRAY, photometric="palette", colormap=ramp[:, ::-1])
    assert reason(tmp_path / "p.tif") == "BAD_TYPE"


def test_white_is_zero(tmp_path):
    tifffile.imwrite(tmp_path / "p.tif", 255 - GRAY, photometric="miniswhite")
    np.testing.assert_array_equal(one(tmp_path / "p.tif").array[0, :, :, 0], GRAY.T)


def test_png_depths(tmp_path):
    deep = GRAY.astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    volume = one(tmp_path / "deep.png")
    assert volume.array.dtype == np.uint16
    np.testing.assert_array_equal(volume.array[0, :, :, 0], deep.T)
    Image.fromarray(GRAY > 100).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(one(tmp_path / "bits.png").array[0, :, :, 0], (GRAY > 100).T)
    palette = Image.fromarray(GRAY % 3).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(tmp_path / "palette.png")
    assert one(tmp_path / "palette.png").array.shape == (3, 5, 4, 1)


def test_many_pages(tmp_path):
    tifffile.imwrite(tmp_path / "p.tif", np.stack([GRAY, GRAY]), photometric="minisblack")
    assert reason(tmp_path / "p.tif") == "MULTI_PAGE"
    Image.fromarray(GRAY).save(tmp_path / "p.png", save_all=True, append_images=[Image.fromarray(255 - GRAY)])
    (tmp_path / "p.tif").unlink()
    assert reason(tmp_path / "p.png") == "MULTI_PAGE"


def test_sixteen_bit_colour_png_is_not_halved(tmp_path):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    row = b"\0" + bytes(range(12))
    png = chunk(b"IHDR", struct.pack(">LLBBBBB", 2, 1, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "p.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    assert reason(tmp_path / "p.png") == "BAD_TYPE"


def test_claimed_giants(tmp_path):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    header = struct.pack(">LLBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    (tmp_path / "p.png").write_bytes(png)
    assert reason(tmp_path / "p.png") in ("TOO_LARGE", "TRUNCATED")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated(tmp_path, kind, share):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3)).astype(np.uint8)).save(out, kind)
    (tmp_path / "p").write_bytes(out.getvalue()[: int(len(out.getvalue()) * share)])
    assert reason(tmp_path / "p") in ("BROKEN_PICTURE", "TRUNCATED", "MULTI_PAGE")


def test_real_pictures(shared_data):
    path = shared_data / "radiographs/val/chst/abd0.png"
    np.testing.assert_array_equal(one(path).array[..., 0], np.asarray(Image.open(path).convert("RGB")).transpose(2, 1, 0))
    path = shared_data / "hcs_plate/images/Channel1-01-A-01.tif"
    np.testing.assert_array_equal(one(path).array[0, :, :, 0], tifffile.imread(path).T)


def test_tile_that_claims_a_giant(tmp_path):
    tifffile.imwrite(tmp_path / "p.tif", np.zeros((64, 64), np.uint8), tile=(32, 32), compression="zlib")
    with tifffile.TiffFile(tmp_path / "p.tif", mode="r+") as tiff:
        tiff.pages[0].tags["TileLength"].overwrite(40_000_000)
    assert reason(tmp_path / "p.tif") == "TRUNCATED"
