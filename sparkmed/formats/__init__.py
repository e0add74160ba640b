"""Files in, files out: members of archives, headers, series, voxels.

    volumes, rejections = read_archive("folder or URL")

is the whole path in one process; the Spark stages call its parts: :func:`archive.members`, :func:`read_instance`,
:func:`series.assemble`, :func:`read_volume`.
"""

import hashlib
import io

import numpy as np

from sparkmed import config, storage
from sparkmed.formats import archive, dicom, nifti, raster, series
from sparkmed.formats.archive import Member, members
from sparkmed.formats.instance import MAX_VOLUME_BYTES, Instance, VolumeHeader
from sparkmed.formats.series import assemble
from sparkmed.imaging.volume import Volume
from sparkmed.rejection import Refused, Rejection

__all__ = ["Instance", "Member", "VolumeHeader", "assemble", "inspect", "members", "read_archive", "read_instance", "read_volume"]


def read_instance(member: Member) -> Instance:
    """What the headers of one file say, with the SHA-256 of its bytes; no pixel is decoded.

    Raises :class:`Refused` and nothing else, whatever the bytes are. Reasons beside those of :mod:`dicom`, :mod:`nifti`
    and :mod:`raster`: ``EMPTY``, ``UNKNOWN_FORMAT``, ``UNREADABLE``, and those of :mod:`archive`.
    """
    try:
        with member.open() as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            fields = _read_header(stream, size)
    except Refused:
        raise
    except OSError as e:
        raise Refused("UNREADABLE", f"the file cannot be read ({type(e).__name__})") from None
    except (MemoryError, RecursionError, Exception) as e:
        raise Refused("BROKEN_FILE", f"the file cannot be parsed ({type(e).__name__})") from None
    return Instance(
        uri=member.uri,
        path=member.path,
        container=member.container,
        file_size=member.file_size,
        file_mtime_ns=member.file_mtime_ns,
        bytes=size,
        sha256=sha256,
        **fields,
    )


def _read_header(stream, size: int) -> dict:
    """Fields of an :class:`Instance` by the content of the file, whatever its name."""
    if size == 0:
        raise Refused("EMPTY", "the file has no bytes")
    start = stream.read(64 << 10)
    stream.seek(0)
    if dicom.recognise(start):
        return dicom.read_header(stream, size)
    picture = raster.recognise(start)
    if picture:
        return raster.read_header(stream, size, picture)
    head = nifti.head(start)
    if nifti.recognise(head):
        return nifti.read_header(head, size, start[:2] == nifti.GZIP_MAGIC)
    raise Refused("UNKNOWN_FORMAT", "not a DICOM, NIfTI, PNG, JPEG or TIFF file")


def read_volume(header: VolumeHeader) -> Volume:
    """The voxels of a volume as real-world values on their grid.

    Sources are read from where they lie, each container once, and must still have the catalogued SHA-256 (``CHANGED``).
    DICOM: integers when rescale adds integers, else float32 (float64 for more than 24 bits). NIfTI and pictures: see
    :func:`nifti.read_array` and :func:`raster.read_array`. Raises :class:`Refused` and nothing else.
    """
    try:
        size = int(np.prod(header.shape, dtype=object))
        if size > MAX_VOLUME_BYTES:
            raise Refused("TOO_LARGE", f"a volume of {header.shape} voxels")
        array = _read_dicom(header) if header.format == "dicom" else _read_single(header)
        affine = np.array(header.affine, np.float64).reshape(4, 4)
        return Volume(array, affine, header.series_uid, header.modality, header.sources)
    except Refused:
        raise
    except (MemoryError, RecursionError, Exception) as e:
        raise Refused("BROKEN_FILE", f"the voxels cannot be read ({type(e).__name__})") from None


def _sources(header: VolumeHeader):
    """(position, bytes) of the sources, each checked against its digest."""
    for position, data in archive.read_many(header.sources):
        if hashlib.sha256(data).hexdigest() != header.source_sha256[position]:
            raise Refused("CHANGED", f"source {position + 1} of {len(header.sources)} is not the file that was catalogued")
        yield position, data


def _read_single(header: VolumeHeader) -> np.ndarray:
    read = {"nifti": nifti.read_array, "raster": raster.read_array}[header.format]
    ((_, data),) = _sources(header)
    array = read(data)
    if array.shape != tuple(header.shape):
        raise Refused("BAD_SHAPE", f"voxels of shape {array.shape}, the header says {tuple(header.shape)}")
    return array


def _read_dicom(header: VolumeHeader) -> np.ndarray:
    facts = header.facts
    channels, columns, rows, slices = header.shape
    times = len(header.sources) // slices
    array = np.empty((times, slices, channels // times, rows, columns), np.dtype(facts["dtype"]))  # as slices come
    pixels, syntaxes = facts["pixels"], facts["syntaxes"]
    for position, data in _sources(header):
        one = pixels[position if len(pixels) > 1 else 0]
        stored = dicom.read_pixels(data, one, syntaxes[position if len(syntaxes) > 1 else 0])
        if stored.shape != (channels // times, columns, rows):
            raise Refused("BAD_SHAPE", f"image {position + 1} of {len(header.sources)} decodes to {stored.shape}")
        values = dicom.real_world(stored, one, header.modality, array.dtype)
        array[position // slices, position % slices] = values.transpose(0, 2, 1)
    if array.dtype.kind == "f":
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            raise Refused("NON_FINITE", f"{bad} of {array.size} voxels are NaN or infinite")
    return array.transpose(0, 2, 4, 3, 1).reshape(header.shape)


def read_headers(url: str, limits: config.Catalog | None = None) -> tuple[list[VolumeHeader], list[Rejection]]:
    """What the files below ``url`` would make: volumes without their voxels, and refusals."""
    instances, rejections = [], []
    for file in storage.walk(url):
        for member in members(file, limits):
            if isinstance(member, Rejection):
                rejections.append(member)
                continue
            try:
                instances.append(read_instance(member))
            except Refused as e:
                rejections.append(e.at(member.uri, archive.STAGE))
    headers, refused = assemble(instances)
    return headers, rejections + refused


def read_archive(url: str, limits: config.Catalog | None = None) -> tuple[list[Volume], list[Rejection]]:
    """All volumes below ``url`` (a folder, a file, any storage URL) and why the other files are none.

    Every file is a source of exactly one volume or has a rejection. All volumes are held in memory.
    """
    headers, rejections = read_headers(url, limits)
    volumes = []
    for header in headers:
        try:
            volumes.append(read_volume(header))
        except Refused as e:
            rejections += [e.at(uri, series.STAGE) for uri in header.sources]
    return volumes, rejections


def inspect(url: str) -> str:
    """A table of what the files below ``url`` would make, and of what is refused and why; nothing that names a person."""
    headers, rejections = read_headers(url)
    lines = [f"{len(headers)} volumes"]
    for h in headers:
        affine = np.array(h.affine).reshape(4, 4)
        spacing = " x ".join(f"{s:.4g}" for s in np.linalg.norm(affine[:3, :3], axis=0))
        shape = " x ".join(map(str, h.shape))
        facts = h.facts
        what = ", ".join(str(x) for x in (h.modality, "\\".join(facts.get("type") or []), facts.get("axis")) if x)
        files = f"{len(h.sources)} files, first {h.source_paths[0]}"
        lines.append(f"  {h.uid[:12]}  {h.format:<7} {shape:>22}  {spacing} mm  {what}  {files}")
    lines.append(f"{len(rejections)} refused")
    for r in rejections:
        lines.append(f"  {r.reason:<22} {r.uri}  {r.message}")
    return "\n".join(lines)
