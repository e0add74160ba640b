"""NIfTI-1 and NIfTI-2, plain or gzipped: header from the first bytes, voxels as stored with their scaling, and back."""

import gzip
import io
import math
import zlib

import nibabel as nib
import numpy as np

from sparkmed import storage
from sparkmed.formats.instance import check_size, to_json
from sparkmed.imaging.volume import Volume
from sparkmed.rejection import Refused

GZIP_MAGIC = b"\x1f\x8b"
_HEAD = 544
"""Bytes that hold a NIfTI-2 header and the extension flag (a NIfTI-1 header has 348 + 4)."""
_FLAT = 1 << 30
_RATIO = 1000
"""A gzipped image may be empty, but none of more bytes than the first has this many times those that it is packed in."""
_UNIT_MM = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001}
_COLOURS = {128: 3, 2304: 4}
_RUN = 4 << 20
"""Bytes of slices that are read, and turned from the file's order to ours, at a time."""


def head(data: bytes) -> bytes:
    """The first bytes of what may be a NIfTI file, ungzipped."""
    if data[:2] != GZIP_MAGIC:
        return data[:_HEAD]
    try:
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(data[: 64 << 10], _HEAD)
    except zlib.error:
        return b""


def recognise(start: bytes) -> bool:
    """True when ``start`` (ungzipped) begins a single-file NIfTI, or the header of a pair."""
    return start[344:348] in (b"n+1\0", b"ni1\0") or start[4:8] in (b"n+2\0", b"ni2\0")


def _header(start: bytes) -> nib.Nifti1Header:
    if start[344:347] == b"ni1" or start[4:7] == b"ni2":
        raise Refused("NIFTI_PAIR", "the header of a .hdr/.img pair; only single-file NIfTI is read")
    two = start[4:7] == b"n+2"
    size = 540 if two else 348
    if len(start) < size:
        raise Refused("TRUNCATED", f"{len(start)} bytes of a NIfTI header of {size}")
    try:
        return (nib.Nifti2Header if two else nib.Nifti1Header)(start[:size], check=False)
    except Exception as e:
        raise Refused("BROKEN_NIFTI", f"the NIfTI header cannot be parsed ({type(e).__name__})") from None


def _shape(header) -> tuple[tuple[int, ...], tuple[int, int, int, int]]:
    """Shape on disk, and (C, I, J, K)."""
    dim = [int(n) for n in header["dim"]]
    if not 1 <= dim[0] <= 7 or any(n < 1 for n in dim[1 : dim[0] + 1]):
        raise Refused("BAD_SHAPE", f"the NIfTI dimensions are {dim}")
    shape = tuple(dim[1 : dim[0] + 1])
    i, j, k, t, *more = (*shape, *(1,) * 7)[:7]
    channels = t
    if any(n > 1 for n in more):  # a vector per voxel lies in dimension 5
        if t > 1 or any(n > 1 for n in more[1:]):
            raise Refused("TOO_MANY_DIMENSIONS", f"an array of {shape}; wanted at most I, J, K and one axis of channels")
        channels = more[0]
    return shape, (channels, i, j, k)


def _affine(header) -> np.ndarray:
    """(4, 4) float64 in mm: sform, else qform, else nibabel's centred one."""
    try:
        affine = np.asarray(header.get_best_affine(), np.float64)
        unit = _UNIT_MM.get(header.get_xyzt_units()[0], 1.0)
    except Exception as e:
        raise Refused("BAD_AFFINE", f"the NIfTI header has no usable affine ({type(e).__name__})") from None
    affine[:3] *= unit
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise Refused("BAD_AFFINE", "the affine of the NIfTI header is not finite or not invertible")
    return affine


def _dtype(header) -> np.dtype:
    code = int(header["datatype"])
    try:
        dtype = header.get_data_dtype()
    except Exception:
        raise Refused("BAD_TYPE", f"NIfTI datatype {code} is not known") from None
    if code not in _COLOURS and (dtype.kind not in "iuf" or dtype.itemsize > 8):
        raise Refused("BAD_TYPE", f"NIfTI datatype {code} ({dtype.name}) is not a real number of up to 64 bits")
    return dtype


def _checked(start: bytes, size: int, compressed: bool):
    """(header, type on disk, shape on disk, (C, I, J, K), offset of the voxels) of what the header claims in ``size`` bytes."""
    header = _header(start)
    dtype = _dtype(header)
    disk, shape = _shape(header)
    try:
        offset = int(header.get_data_offset())
    except (ValueError, OverflowError):
        raise Refused("BROKEN_NIFTI", "the offset of the voxels is not a number") from None
    if offset < 0 or offset > (1 << 32):
        raise Refused("BROKEN_NIFTI", f"the voxels begin at byte {offset}")
    offset = max(offset, len(header.binaryblock) + 4)
    check_size(shape, dtype.itemsize, size if compressed else max(size - offset, 0), compressed)
    claimed = math.prod(shape) * dtype.itemsize
    if compressed and claimed > max(_FLAT, _RATIO * size):
        raise Refused("BOMB", f"{size} gzipped bytes claim to hold {claimed}")
    if _COLOURS.get(int(header["datatype"])):
        if shape[0] > 1:
            raise Refused("TOO_MANY_DIMENSIONS", f"colours in an array of {disk}")
        shape = (3, *shape[1:])
    return header, dtype, disk, shape, offset


def read_header(start: bytes, size: int, compressed: bool) -> dict:
    """The fields of an :class:`Instance` that a NIfTI file determines.

    ``start`` holds the first 544 bytes, ungzipped; ``size`` is the length of the file. Raises :class:`Refused`.
    """
    header, dtype, _, shape, _ = _checked(start, size, compressed)
    affine = _affine(header)
    return {
        "format": "nifti",
        "kind": "image",
        "modality": "",
        "series_uid": "",
        "sop_uid": "",
        "sop_class": "",
        "transfer_syntax": "gzip" if compressed else "",
        "shape": shape,
        "affine": tuple(affine.ravel().tolist()),
        "patient": "",
        "header": to_json({"dtype": dtype.name if dtype.names is None else "rgb"}),
    }


def read_array(data: bytes) -> np.ndarray:
    """(C, I, J, K) values of a NIfTI file after ``scl_slope`` and ``scl_inter``.

    Without scaling the stored type is kept; with it float32, or float64 when stored values have more than 24 bits.
    Raises :class:`Refused`, among them ``NON_FINITE`` when a voxel is NaN or infinite: one such voxel poisons every
    mean, and a label cannot hold it.
    """
    compressed = data[:2] == GZIP_MAGIC
    header, dtype, disk, shape, offset = _checked(head(data), len(data), compressed)
    wanted = offset + int(np.prod(disk, dtype=object)) * dtype.itemsize
    if not compressed:
        if len(data) < wanted:
            raise Refused("TRUNCATED", f"{len(data)} of {wanted} bytes")
        return _finite(_values(io.BytesIO(data), offset, header, dtype, disk, shape))
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as f:
            array = _values(f, offset, header, dtype, disk, shape)
            f.read(1)  # reaching the end checks the checksum
    except (OSError, EOFError, zlib.error):
        raise Refused("TRUNCATED", "the gzip stream is damaged or ends early") from None
    return _finite(array)


def _values(stream, offset: int, header, dtype: np.dtype, disk: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """(C, I, J, K) scaled values of the stream, some slices at a time: what is stored is not held beside them."""
    for start in range(0, offset, _RUN):
        _exactly(stream, min(_RUN, offset - start))
    slope, inter = _scaling(header)
    scaled = (slope, inter) != (1.0, 0.0) and not dtype.names
    wide = dtype.itemsize > 3 and not (dtype.kind == "f" and dtype.itemsize == 4)
    kept = np.dtype(np.uint8) if dtype.names else dtype.newbyteorder("=")
    array = np.empty(shape, (np.float64 if wide else np.float32) if scaled else kept)
    i, j, k = shape[1:]
    run, alpha = max(1, _RUN // (i * j * dtype.itemsize)), set()
    # F order on disk: the channel axis is the slowest there and the first here
    for c in range(1 if dtype.names else shape[0]):
        for start in range(0, k, run):
            many = min(run, k - start)
            found = np.frombuffer(_exactly(stream, many * i * j * dtype.itemsize), dtype).reshape(many, j, i).T
            to = (..., slice(start, start + many))
            if dtype.names:
                for n, name in enumerate("RGB"):
                    array[n][to] = found[name]
                alpha |= set(np.unique(found["A"]).tolist()) if "A" in dtype.names else set()
            else:
                array[c][to] = found.astype(np.float64) * slope + inter if scaled else found
    if len(alpha) > 1:
        raise Refused("ALPHA", "transparency varies within the image")
    return array


def _exactly(stream, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _finite(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "f":
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            raise Refused("NON_FINITE", f"{bad} of {array.size} voxels are NaN or infinite")
    return array


def _scaling(header) -> tuple[float, float]:
    """(slope, intercept); a slope of 0 or NaN means none (nifti1.h, scl_slope)."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        return 1.0, 0.0
    if not np.isfinite(inter):
        raise Refused("BROKEN_NIFTI", "scl_inter is not finite")
    return slope, inter


def write(volume: Volume, url: str):
    """Write ``volume`` as NIfTI, gzipped unless ``url`` ends with ``.nii``; the same volume gives the same bytes.

    Channels become the fourth axis. The type is kept (bool as uint8, float16 as float32). The affine is stored as sform,
    and as qform too when it has no shear; NIfTI-1 holds it in float32. An axis longer than 32767 makes it NIfTI-2.
    The file appears whole or not at all.
    """
    array = volume.array
    if array.dtype == bool:
        array = array.astype(np.uint8)
    elif array.dtype == np.float16:
        array = array.astype(np.float32)
    if array.dtype.kind not in "iuf" or array.dtype.itemsize > 8:
        raise ValueError(f"NIfTI holds real numbers of up to 64 bits, got {array.dtype}")
    array = array[0] if array.shape[0] == 1 else np.moveaxis(array, 0, -1)
    header = (nib.Nifti2Header if max(array.shape) > 32767 else nib.Nifti1Header)()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_sform(volume.affine, 1)
    matrix = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    header.set_zooms((*volume.spacing, *(1.0,) * (array.ndim - 3)))
    if np.abs(matrix.T @ matrix - np.eye(3)).max() < 1e-6:
        header.set_qform(volume.affine, 1)
    header.set_xyzt_units("mm")
    header.set_slope_inter(1, 0)
    two = isinstance(header, nib.Nifti2Header)
    header["magic"] = b"n+2\0\r\n\x1a\n" if two else b"n+1"
    offset = 544 if two else 352
    header.set_data_offset(offset)
    data = header.binaryblock.ljust(offset, b"\0") + array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes(order="F")
    if not url.endswith(".nii"):
        data = gzip.compress(data, 3, mtime=0)
    storage.write_bytes(url, data)
