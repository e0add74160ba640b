import gzip

import nibabel as nib
import numpy as np
import pytest

from sparkmed.formats import nifti, read_archive
from sparkmed.imaging.volume import Volume

AFFINE = np.array([[-1.5, 0, 0.25, 10], [0, 2, 0, -20], [0.5, 0, 3, 30], [0, 0, 0, 1.0]])


def one(path):
    (volume,), rejections = read_archive(str(path))
    assert rejections == []
    return volume


def reason(path):
    volumes, (rejection,) = read_archive(str(path))
    assert volumes == []
    return rejection.reason


def save(path, array, affine=AFFINE, **header):
    image = nib.Nifti1Image(array, affine)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 4, 5, 6), (3, 4, 5, 6), (1, 4, 5, 1), (2, 1, 1, 1)])
@pytest.mark.parametrize("name", ["v.nii.gz", "v.nii"])
def test_write_and_read(tmp_path, dtype, shape, name):
    limits = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else np.finfo(dtype)
    array = np.resize(np.array([limits.min, limits.max, 1], dtype), shape)
    nifti.write(Volume(array, AFFINE), str(tmp_path / name))
    volume = one(tmp_path / name)
    assert volume.array.dtype == dtype
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_array_equal(volume.affine, AFFINE)
    peer = nib.load(tmp_path / name)
    np.testing.assert_array_equal(peer.affine, AFFINE)
    np.testing.assert_array_equal(np.asanyarray(peer.dataobj), array[0] if shape[0] == 1 else np.moveaxis(array, 0, -1))


def test_written_bytes_are_the_same_again(tmp_path):
    volume = Volume(np.arange(24, dtype=np.int16).reshape(1, 2, 3, 4), AFFINE)
    nifti.write(volume, str(tmp_path / "a.nii.gz"))
    nifti.write(Volume(volume.array.copy(order="F"), AFFINE), str(tmp_path / "b.nii.gz"))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_types_that_nifti_does_not_have(tmp_path):
    nifti.write(Volume(np.ones((1, 2, 2, 2), bool), np.eye(4)), str(tmp_path / "b.nii.gz"))
    assert one(tmp_path / "b.nii.gz").array.dtype == np.uint8
    nifti.write(Volume(np.full((1, 2, 2, 2), 0.5, np.float16), np.eye(4)), str(tmp_path / "h.nii.gz"))
    assert one(tmp_path / "h.nii.gz").array.dtype == np.float32
    with pytest.raises(ValueError, match="complex64"):
        nifti.write(Volume(np.ones((1, 2, 2, 2), np.complex64), np.eye(4)), str(tmp_path / "c.nii.gz"))


def test_long_axis_is_nifti_2(tmp_path):
    array = np.arange(40000, dtype=np.int32).reshape(1, 40000, 1, 1)
    affine = np.diag([0.1, 1, 1, 1.0])
    nifti.write(Volume(array, affine), str(tmp_path / "v.nii.gz"))
    assert isinstance(nib.load(tmp_path / "v.nii.gz"), nib.Nifti2Image)
    np.testing.assert_array_equal(one(tmp_path / "v.nii.gz").array, array)
    np.testing.assert_array_equal(one(tmp_path / "v.nii.gz").affine, affine)


def test_orthogonal_affine_is_in_both_forms(tmp_path):
    affine = np.diag([-1.0, 2, 3, 1])
    nifti.write(Volume(np.ones((1, 2, 2, 2), np.uint8), affine), str(tmp_path / "v.nii.gz"))
    header = nib.load(tmp_path / "v.nii.gz").header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 1)
    np.testing.assert_allclose(header.get_qform(), affine, atol=1e-6)


@pytest.mark.parametrize("dtype, wanted", [(np.uint8, np.float32), (np.int16, np.float32), (np.int32, np.float64)])
def test_scaling(tmp_path, dtype, wanted):
    stored = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    data = bytearray(nib.Nifti1Image(stored, AFFINE).to_bytes())
    data[112:120] = np.array([0.5, -3], "<f4").tobytes()
    (tmp_path / "v.nii").write_bytes(data)
    volume = one(tmp_path / "v.nii")
    assert volume.array.dtype == wanted
    np.testing.assert_array_equal(volume.array[0], stored * 0.5 - 3)


@pytest.mark.parametrize("slope", [0.0, np.nan, np.inf])
def test_slope_that_means_none(tmp_path, slope):
    data = bytearray(nib.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2), AFFINE).to_bytes())
    data[112:120] = np.array([slope, 5], "<f4").tobytes()
    (tmp_path / "v.nii").write_bytes(data)
    volume = one(tmp_path / "v.nii")
    assert volume.array.dtype == np.int16 and volume.array.max() == 7


def test_big_endian(tmp_path):
    array = np.arange(24, dtype=">i2").reshape(2, 3, 4)
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(array.dtype)
    image = nib.Nifti1Image(array, AFFINE, header)
    nib.save(image, tmp_path / "v.nii.gz")
    volume = one(tmp_path / "v.nii.gz")
    assert volume.array.dtype == np.dtype("=i2")
    np.testing.assert_array_equal(volume.array[0], array)


def test_fourth_and_fifth_axis_are_channels(tmp_path):
    array = np.arange(2 * 3 * 4 * 5, dtype=np.int16).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(one(save(tmp_path / "t.nii.gz", array)).array, np.moveaxis(array, -1, 0))
    np.testing.assert_array_equal(one(save(tmp_path / "v.nii.gz", array[:, :, :, None])).array, np.moveaxis(array, -1, 0))
    assert one(save(tmp_path / "p.nii.gz", array[:, :, 0, 0])).array.shape == (1, 2, 3, 1)
    assert reason(save(tmp_path / "x.nii.gz", np.zeros((2, 2, 2, 2, 2), np.int16))) == "TOO_MANY_DIMENSIONS"


def test_colours(tmp_path):
    array = np.zeros((2, 3, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    array["G"] = np.arange(24).reshape(2, 3, 4)
    volume = one(save(tmp_path / "c.nii.gz", array))
    np.testing.assert_array_equal(volume.array[1], array["G"])
    assert volume.array.shape == (3, 2, 3, 4) and volume.array[[0, 2]].max() == 0


def test_neither_sform_nor_qform(tmp_path):
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.uint8), None)
    image.header.set_zooms((2, 3, 4))
    nib.save(image, tmp_path / "v.nii.gz")
    np.testing.assert_array_equal(one(tmp_path / "v.nii.gz").affine, nib.load(tmp_path / "v.nii.gz").affine)


def test_units_become_millimetres(tmp_path):
    save(tmp_path / "m.nii.gz", np.zeros((2, 2, 2), np.uint8), np.diag([500.0, 500, 2000, 1]), xyzt_units=3)
    np.testing.assert_allclose(one(tmp_path / "m.nii.gz").affine, np.diag([0.5, 0.5, 2, 1]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(tmp_path, value):
    array = np.zeros((2, 2, 2), np.float32)
    array[1, 1] = value
    volumes, (rejection,) = read_archive(str(save(tmp_path / "v.nii.gz", array)))
    assert (rejection.reason, rejection.message) == ("NON_FINITE", "2 of 8 voxels are NaN or infinite")


@pytest.mark.parametrize("edit, expected", [
    ({42: b"\xff\x7f\xff\x7f\xff\x7f\xff\x7f"}, "TOO_LARGE"),  # 32767^4 voxels
    ({42: b"\xff\x7f"}, "TRUNCATED"),
    ({42: b"\0\0"}, "BAD_SHAPE"),
    ({42: b"\xff\xff"}, "BAD_SHAPE"),
    ({40: b"\x09\0"}, "BAD_SHAPE"),
    ({70: b"\x20\0"}, "BAD_TYPE"),  # complex64
    ({70: b"\x01\0"}, "BAD_TYPE"),  # bits
    ({70: b"\x99\x09"}, "BAD_TYPE"),
    ({280: b"\0\0\xc0\x7f"}, "BAD_AFFINE"),  # NaN
    ({280: bytes(48)}, "BAD_AFFINE"),
    ({108: b"\0\0\x80\x4f"}, "TRUNCATED"),  # voxels at byte 2^32
    ({108: b"\0\0\xc0\x7f"}, "BROKEN_NIFTI"),
    ({344: b"ni1\0"}, "NIFTI_PAIR"),
    ({344: b"nope"}, "UNKNOWN_FORMAT"),
])  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_headers_that_lie(tmp_path, edit, expected, packed):
    data = bytearray(nib.Nifti1Image(np.zeros((4, 5, 6, 2), np.int16), AFFINE).to_bytes())
    for at, value in edit.items():
        data[at : at + len(value)] = value
    path = tmp_path / ("v.nii.gz" if packed else "v.nii")
    path.write_bytes(gzip.compress(bytes(data)) if packed else data)
    assert reason(path) == expected


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_truncated(tmp_path, packed, share):
    data = nib.Nifti1Image(np.random.default_rng(0).integers(0, 9999, (9, 9, 9)).astype(np.int16), AFFINE).to_bytes()
    data = gzip.compress(data) if packed else data
    (tmp_path / "v").write_bytes(data[: int(len(data) * share)])
    assert reason(tmp_path / "v") in ("TRUNCATED", "UNKNOWN_FORMAT")


def test_damaged_gzip(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 9999, (20, 20, 20)).astype(np.int16)
    data = bytearray(gzip.compress(nib.Nifti1Image(voxels, AFFINE).to_bytes()))
    data[-6] ^= 255  # the checksum
    (tmp_path / "v.nii.gz").write_bytes(data)
    assert reason(tmp_path / "v.nii.gz") == "TRUNCATED"


def test_real_files(shared_data):
    for path in (shared_data / "dicom/totalseg/example_ct_sm.nii.gz", shared_data / "hippocampus/imagesTr/hippocampus_001.nii.gz"):
        volume, peer = one(path), nib.load(path)
        np.testing.assert_array_equal(volume.array[0], np.asanyarray(peer.dataobj))
        np.testing.assert_array_equal(volume.affine, peer.affine)
