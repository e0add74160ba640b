"""PNG, JPEG, TIFF, and a plane of a Zarr: one picture of one page, as (C, I = column, J = row, 1)."""

import contextlib
import io
import logging
import lzma
import warnings
import zlib

import numpy as np
import tifffile
from PIL import Image

from sparkmed.formats import zarr_array
from sparkmed.formats.instance import check_size, to_json
from sparkmed.rejection import Refused

AFFINE = (-1.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
"""One unit per pixel, columns to the left and rows to the back as in DICOM: a picture knows no millimetres."""

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "I": 1, "I;16": 1, "I;16B": 1, "F": 1, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "YCbCr": 3}
_EXIF_ORIENTATION = 0x0112
_SLACK = 1 << 20
_DEFLATE_RATIO = 1032
"""The most that deflate makes of one byte."""


def recognise(head: bytes) -> str:
    """``png``, ``jpeg``, ``tiff``, ``zarr`` or ``""``."""
    if head.startswith(_PNG):
        return "png"
    if head.startswith(_JPEG):
        return "jpeg"
    if head.startswith(zarr_array.MAGIC):
        return "zarr"
    return "tiff" if head.startswith(_TIFF) else ""


@contextlib.contextmanager
def quiet():
    """No warning or log line of the picture libraries; whatever they raise is a :class:`Refused`."""
    logger = logging.getLogger("tifffile")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Refused:
        raise
    except (MemoryError, Image.DecompressionBombError):
        raise Refused("TOO_LARGE", "the picture claims more pixels than are read") from None
    except Exception as e:
        raise Refused("BROKEN_PICTURE", f"the picture cannot be read ({type(e).__name__})") from None
    finally:
        logger.setLevel(level)


def _open(stream) -> Image.Image:
    image = Image.open(stream, formats=("PNG", "JPEG", "MPO"))
    if image.mode not in _CHANNELS:
        raise Refused("BAD_TYPE", f"pixels of mode {image.mode}")
    if image.format == "PNG":
        if getattr(image, "n_frames", 1) > 1:
            raise Refused("MULTI_PAGE", f"{image.n_frames} frames; one picture per file is read")
        stream.seek(24)
        bits, colour = stream.read(2)
        if bits == 16 and colour not in (0,):  # the library would halve the bits without a word
            raise Refused("BAD_TYPE", "16-bit colour PNG is not read")
        image.info["depth"] = bits
    return image


def _shape(image: Image.Image) -> tuple[int, int, int, int]:
    width, height = image.size
    if image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8):
        width, height = height, width
    return _CHANNELS[image.mode], width, height, 1


def _tiff_page(stream) -> tifffile.TiffPage:
    tiff = tifffile.TiffFile(stream)
    if len(tiff.pages) != 1:
        named = "; OME-TIFF is known by a name that ends with .ome.tif and by XML that places its pages" if tiff.is_ome else ""
        raise Refused("MULTI_PAGE", f"{len(tiff.pages)} pages; one picture per file is read{named}")
    page = tiff.pages[0]
    if page.dtype is None or page.dtype.kind not in "iufb":
        raise Refused("BAD_TYPE", f"TIFF samples of type {page.dtype}")
    if page.axes not in ("YX", "YXS", "SYX") or (page.ndim == 3 and page.samplesperpixel not in (1, 2, 3, 4)):
        raise Refused("MULTI_PAGE", f"a TIFF of axes {page.axes} and shape {page.shape}; one picture per file is read")
    ramp = page.photometric.name == "PALETTE" and _is_ramp(page.colormap)
    if page.photometric.name not in ("MINISBLACK", "MINISWHITE", "RGB", "YCBCR") and not ramp:
        raise Refused("BAD_TYPE", f"TIFF colours of kind {page.photometric.name}")
    available = tiff.filehandle.size
    check_size((page.imagewidth, page.imagelength, page.samplesperpixel), page.dtype.itemsize, available, True)
    if page.is_tiled:
        check_size((page.tilewidth, page.tilelength, page.samplesperpixel), page.dtype.itemsize, available, True)
    return page


def _is_ramp(colormap) -> bool:
    """True when a palette only tints intensities, as microscopes write it: every colour a multiple of the index, or none."""
    if colormap is None or len(colormap) != 3:
        return False
    ramp = np.linspace(0, 1, colormap.shape[1])
    return all(np.abs(c - ramp * c[-1]).max() <= 512 for c in np.asarray(colormap, np.float64))


def _tiff_shape(page: tifffile.TiffPage) -> tuple[int, int, int, int]:
    samples = page.samplesperpixel
    return 3 if samples >= 3 else 1, page.imagewidth, page.imagelength, 1


def read_header(stream, size: int, kind: str) -> dict:
    """The fields of an :class:`Instance` that a picture determines; raises :class:`Refused`."""
    with quiet():
        if kind == "tiff":
            page = _tiff_page(stream)
            shape, mode = _tiff_shape(page), f"{page.photometric.name} {page.dtype.name}"
        elif kind == "zarr":
            shape, mode = zarr_array.read_header(stream, size)
        else:
            image = _open(stream)
            shape, mode = _shape(image), image.mode
            check_size(shape, 4 if mode in "IF" else 1, size, True)
    return {
        "format": "raster",
        "kind": "image",
        "modality": "",
        "series_uid": "",
        "sop_uid": "",
        "sop_class": "",
        "transfer_syntax": kind,
        "shape": shape,
        "affine": AFFINE,
        "patient": "",
        "header": to_json({"mode": mode}),
    }


def read_array(data: bytes) -> np.ndarray:
    """(C, I, J, 1) stored values of a picture; a bilevel or palette picture gives 0/1 or its colours.

    Transparency that is the same everywhere is dropped, otherwise ``ALPHA``; raises :class:`Refused`.
    """
    kind = recognise(data[:16])
    with quiet():
        array = {"tiff": _tiff, "zarr": _zarr}.get(kind, _picture)(data)
    array = np.ascontiguousarray(array.transpose(2, 1, 0)[..., None])
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        raise Refused("NON_FINITE", f"{bad} of {array.size} pixels are NaN or infinite")
    return array


def _picture(data: bytes) -> np.ndarray:
    """(rows, columns, C)."""
    from PIL import ImageOps

    image = _open(io.BytesIO(data))
    check_size(_shape(image), 1, len(data), True)
    depth = image.info.get("depth", 8)
    image = ImageOps.exif_transpose(image)
    if image.mode in ("P", "PA") or (image.mode == "RGB" and "transparency" in image.info):
        image = image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
    elif image.mode == "YCbCr":
        image = image.convert("RGB")
    array = np.asarray(image)
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if array.ndim == 2:
        array = array[..., None]
    if depth in (2, 4) and image.mode == "L":  # the library spreads them over 0..255
        array = array // (255 // (2**depth - 1))
    if image.mode == "I" and depth == 16:
        array = array.astype(np.uint16)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    return _without_alpha(array)


def _zarr(data: bytes) -> np.ndarray:
    """(rows, columns, 1)."""
    array = zarr_array.read_array(io.BytesIO(data), len(data))[..., None]
    if array.dtype == bool:
        array = array.astype(np.uint8)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _without_alpha(array: np.ndarray) -> np.ndarray:
    if array.shape[2] in (2, 4):
        alpha = array[..., -1]
        if not (alpha == alpha.flat[0]).all():
            raise Refused("ALPHA", "transparency varies within the picture")
        array = array[..., :-1]
    return array


def _tiff(data: bytes) -> np.ndarray:
    """(rows, columns, C)."""
    page = _tiff_page(io.BytesIO(data))
    _check_segments(page, data)
    try:
        array = page.asarray()
    except ValueError as e:
        if "imagecodecs" not in str(e):
            raise
        array = _tiff_by_pillow(data, page)  # tifffile leaves this compression to a package which is not here
    if array.ndim == 2:
        array = array[..., None]
    elif page.axes == "SYX":
        array = array.transpose(1, 2, 0)
    if array.shape != (page.imagelength, page.imagewidth, page.samplesperpixel):
        raise Refused("BROKEN_PICTURE", f"decoded to {array.shape}")
    if array.dtype == bool:
        array = array.astype(np.uint8)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if page.photometric.name == "MINISWHITE":
        top = 1 if page.bitspersample == 1 else np.iinfo(array.dtype).max
        array = top - array
    return _without_alpha(array)


def _check_segments(page: tifffile.TiffPage, data: bytes):
    """Raises ``BOMB`` for a strip or tile that unpacks to more than the whole picture: the library unpacks it whole."""
    most = page.nbytes + _SLACK
    for start, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        packed, size = data[start : start + count], 0
        if page.compression in (8, 32946) and count * _DEFLATE_RATIO > most:
            unpack = zlib.decompressobj()
            while packed and size <= most:
                size += len(unpack.decompress(packed, _SLACK))
                packed = unpack.unconsumed_tail
        elif page.compression == 34925:
            unpack = lzma.LZMADecompressor()
            while not unpack.eof and not (size and unpack.needs_input) and size <= most:
                size += len(unpack.decompress(packed if not size else b"", _SLACK))
        if size > most:
            raise Refused("BOMB", f"{count} bytes of a picture of {page.nbytes} unpack to more than {most}")


def _tiff_by_pillow(data: bytes, page: tifffile.TiffPage) -> np.ndarray:
    image = Image.open(io.BytesIO(data), formats=("TIFF",))
    array = np.asarray(image.convert("RGB") if image.mode == "YCbCr" else image)
    if array.dtype.itemsize != page.dtype.itemsize or array.dtype.kind != page.dtype.kind:
        raise Refused("BAD_TYPE", f"TIFF compression {page.compression.name} of {page.dtype.name} samples is not decoded")
    return array
