"""Files in, files out: members of archives, headers, series, voxels.

    volumes, rejections = read_archive("folder or URL")

is the whole path in one process; the Spark stages call its parts: :func:`archive.members`, :func:`read_instance`,
:func:`series.assemble`, :func:`read_volume`.
"""

import hashlib
import io
import json
import posixpath
from collections import defaultdict

import numpy as np

from sparkmed import config
from sparkmed.formats import archive, dicom, dicom_seg, isolation, nifti, ome, ome_zarr, raster, rtstruct, segmentation, series
from sparkmed.formats.archive import Member, members
from sparkmed.formats.instance import MAX_VOLUME_BYTES, Instance, VolumeHeader, to_json
from sparkmed.formats.series import assemble
from sparkmed.imaging.geometry import Grid
from sparkmed.imaging.volume import Volume
from sparkmed.rejection import Refused, Rejection

__all__ = ["Instance", "Member", "VolumeHeader", "assemble", "inspect", "members", "read_archive", "read_instance", "read_volume"]

_SEGMENTATIONS = {"dicom_seg": dicom_seg, "rtstruct": rtstruct}


def read_instance(member: Member, otherwise: dict | None = None) -> Instance:
    """What the headers of one file say, with the SHA-256 of its bytes; no pixel is decoded.

    ``otherwise`` are the fields of a file whose content is of no known format, as its name makes it something.

    Raises :class:`Refused` and nothing else, whatever the bytes are. Reasons beside those of :mod:`dicom`, :mod:`nifti`
    and :mod:`raster`: ``EMPTY``, ``UNKNOWN_FORMAT``, ``UNREADABLE``, and those of :mod:`archive`.
    """
    try:
        with member.open() as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            fields = _read_header(stream, size, otherwise)
    except Refused as e:
        if e.reason == "UNKNOWN_FORMAT" and posixpath.basename(member.path) in ome_zarr.OF_GROUPS:
            e.message += "; of OME-Zarr plates are read, from folders whose names end with .zarr"
        raise
    except OSError as e:
        raise Refused("UNREADABLE", f"the file cannot be read ({type(e).__name__})") from None
    except (MemoryError, RecursionError, Exception) as e:
        raise Refused("BROKEN_FILE", f"the file cannot be parsed ({type(e).__name__})") from None
    if member.ome is not None:
        fields["header"] = to_json(json.loads(fields["header"]) | {"ome": member.ome})
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


def _read_header(stream, size: int, otherwise: dict | None) -> dict:
    """Fields of an :class:`Instance` by the content of the file, whatever its name."""
    if size == 0:
        raise Refused("EMPTY", "the file has no bytes")
    start = stream.read(64 << 10)
    stream.seek(0)
    if dicom.recognise(start):
        fields = dicom.read_header(stream, size)
        if fields["kind"] == "segmentation":
            stream.seek(0)
            more = _SEGMENTATIONS[dicom.SEGMENTATIONS[fields["sop_class"]]].read_facts(stream)
            fields["header"] = to_json(json.loads(fields["header"]) | more)
        return fields
    picture = raster.recognise(start)
    if picture:
        fields = raster.read_header(stream, size, picture)
        stream.seek(0)
        if picture == "tiff" and (said := ome.facts(stream)):
            fields["header"] = to_json(json.loads(fields["header"]) | {"ome": said})
        return fields
    head = nifti.head(start)
    if nifti.recognise(head):
        return nifti.read_header(head, size, start[:2] == nifti.GZIP_MAGIC)
    if otherwise is not None:
        return otherwise
    raise Refused("UNKNOWN_FORMAT", "not a DICOM, NIfTI, PNG, JPEG or TIFF file")


def read_volume(header: VolumeHeader) -> Volume:
    """The voxels of a volume as real-world values on their grid.

    Sources are read from where they lie, each container once, and must still have the catalogued SHA-256 (``CHANGED``).
    DICOM: integers when rescale adds integers, else float32 (float64 for more than 24 bits). NIfTI, pictures, segmentations: see
    :func:`nifti.read_array`, :func:`raster.read_array`, :func:`segmentation.on_grid`. Raises :class:`Refused` and nothing else,
    unless decoders shall run in a child process and there can be none: see :mod:`isolation`.
    """
    try:
        size = int(np.prod(header.shape, dtype=object))
        if size > MAX_VOLUME_BYTES:
            raise Refused("TOO_LARGE", f"a volume of {header.shape} voxels")
        segments = segmentation.is_segmentation(header)
        reads = {"dicom": _read_dicom, "plate": _read_field}
        array = reads.get(header.format, _read_segmentation if segments else _read_single)(header)
        affine = np.array(header.affine, np.float64).reshape(4, 4)
        return Volume(array, affine, header.series_uid, header.modality, header.sources)
    except (Refused, isolation.Unavailable):
        raise
    except MemoryError:
        raise Refused("UNREADABLE", "the voxels cannot be read: there is too little memory") from None
    except Exception as e:
        raise Refused("BROKEN_FILE", f"the voxels cannot be read ({type(e).__name__})") from None


def _sources(header: VolumeHeader):
    """(position, bytes) of the sources, each checked against its digest."""
    for position, data in archive.read_many(header.sources):
        if hashlib.sha256(data).hexdigest() != header.source_sha256[position]:
            raise Refused("CHANGED", f"source {position + 1} of {len(header.sources)} is not the file that was catalogued")
        yield position, data


def _read_single(header: VolumeHeader) -> np.ndarray:
    ((_, data),) = _sources(header)
    read = {"nifti": nifti.read_array, "raster": raster.read_array}[header.format]
    return _of_shape(isolation.decode(read, data, what=f"{header.format} on source 1 of 1"), header)


def _read_field(header: VolumeHeader) -> np.ndarray:
    """The channels of a field of a plate, a picture each, in the order of the sources."""
    planes = [None] * len(header.sources)
    for n, data in _sources(header):
        plane = isolation.decode(raster.read_array, data, what=f"raster on source {n + 1} of {len(header.sources)}")
        if plane.shape != (1, *header.shape[1:]):
            raise Refused("BAD_SHAPE", f"channel {n + 1} has shape {plane.shape}, the header says {(1, *header.shape[1:])}")
        planes[n] = plane
    return _of_shape(np.concatenate(planes), header)


def _read_segmentation(header: VolumeHeader) -> np.ndarray:
    parts, grid = header.facts.get("parts") or [{"format": header.format, **header.facts}], Grid(header.affine, header.shape[1:])

    def painted(position, data):
        part, what = parts[position], f"{parts[position]['format']} on source {position + 1} of {len(parts)}"
        read = _SEGMENTATIONS[part["format"]].read_array
        array = isolation.decode(read, data, part, segmentation.acquired(part, grid), what=what)
        return segmentation.regular(array, part, grid)

    return _of_shape(segmentation.together(painted(n, data) for n, data in _sources(header)), header)


def _of_shape(array: np.ndarray, header: VolumeHeader) -> np.ndarray:
    if array.shape != tuple(header.shape):
        raise Refused("BAD_SHAPE", f"voxels of shape {array.shape}, the header says {tuple(header.shape)}")
    return array


def _read_dicom(header: VolumeHeader) -> np.ndarray:
    facts = header.facts
    channels, columns, rows, slices = facts["stacked"]["shape"] if "stacked" in facts else header.shape
    slots = facts.get("frames") or [[n, 0] for n in range(len(header.sources))]
    times = len(slots) // slices
    array = np.empty((times, slices, channels // times, rows, columns), np.dtype(facts["dtype"]))  # as slices come
    pixels, syntaxes = facts["pixels"], facts["syntaxes"]
    by_source: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for slot, (source, frame) in enumerate(slots):
        by_source[source].append((frame, slot))
    for source, data in _sources(header):
        wanted = sorted(by_source[source])
        one, syntax = pixels[wanted[0][1] if len(pixels) > 1 else 0], syntaxes[source if len(syntaxes) > 1 else 0]
        what = f"{dicom.decoder(syntax, one) or 'native'} on source {source + 1} of {len(header.sources)}"
        decoded = isolation.decode_each(dicom.read_frames, data, one, syntax, [frame for frame, _ in wanted], what=what)
        for stored, (frame, slot) in zip(decoded, wanted, strict=True):
            if stored.shape != (channels // times, columns, rows):
                raise Refused("BAD_SHAPE", f"frame {frame + 1} of image {source + 1} decodes to {stored.shape}")
            values = dicom.real_world(stored, pixels[slot if len(pixels) > 1 else 0], header.modality, array.dtype)
            array[slot // slices, slot % slices] = values.transpose(0, 2, 1)
    if array.dtype.kind == "f":
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            raise Refused("NON_FINITE", f"{bad} of {array.size} voxels are NaN or infinite")
    array = array.transpose(0, 2, 4, 3, 1).reshape(channels, columns, rows, slices)
    return series.straightened(array, header) if "stacked" in facts else array


def read_headers(
    url: str, limits: config.Catalog | None = None, settings: config.Volumes | None = None
) -> tuple[list[VolumeHeader], list[Rejection]]:
    """What the files below ``url`` would make: volumes without their voxels, and refusals."""
    instances, rejections = [], []
    for file in archive.files(url, limits):
        for member in members(file, limits):
            if isinstance(member, Rejection):
                rejections.append(member)
                continue
            try:
                instances.append(read_instance(member))
            except Refused as e:
                rejections.append(e.at(member.uri, archive.STAGE))
    headers, refused = assemble(instances, settings)
    headers, homeless = segmentation.placed(headers)
    return headers, rejections + refused + homeless


def read_archive(
    url: str, limits: config.Catalog | None = None, settings: config.Volumes | None = None
) -> tuple[list[Volume], list[Rejection]]:
    """All volumes below ``url`` (a folder, a file, any storage URL) and why the other files are none.

    Every file is a source of a volume (a multi-frame object maybe of several) or has a rejection. A SEG or RTSTRUCT is a volume of
    modality ``SEG`` or ``RTSTRUCT`` on the grid of the images that it refers to, with a channel of 0 and 1 per segment.
    ``settings`` are those of ``volumes:`` in a config. All volumes are held in memory.
    """
    headers, rejections = read_headers(url, limits, settings)
    volumes, refused = [], []
    for header in headers:
        try:
            volumes.append(read_volume(header))
        except Refused as e:
            refused += [(header, e.at(uri, series.STAGE)) for uri in header.sources]
    used = {uri for v in volumes for uri in v.sources}
    for header, rejection in refused:  # a segmentation may fit one of several volumes of a series; an image is needed whole
        if header.format == "dicom" or rejection.uri not in used:
            rejections.append(rejection)
    return volumes, list(dict.fromkeys(rejections))


def inspect(url: str) -> str:
    """A table of what the files below ``url`` would make, and of what is refused and why; nothing that names a person."""
    headers, rejections = read_headers(url)
    lines = [f"{len(headers)} volumes"]
    for h in headers:
        affine = np.array(h.affine).reshape(4, 4)
        spacing = " x ".join(f"{s:.4g}" for s in np.linalg.norm(affine[:3, :3], axis=0))
        shape = " x ".join(map(str, h.shape))
        facts = h.facts
        part = ", ".join(f"{k} {v}" for k, v in facts.get("part", {}).items())
        along = f"channels by {facts['axis']}" if "axis" in facts else ""
        resampled = f"resampled: {facts['resampled']}" if "resampled" in facts else ""
        what = ", ".join(x for x in (h.modality, "\\".join(facts.get("type") or []), part, along, resampled) if x)
        files = f"{len(h.sources)} files, first {h.source_paths[0]}"
        lines.append(f"  {h.uid[:12]}  {h.format:<7} {shape:>22}  {spacing} mm  {what}  {files}")
    lines.append(f"{len(rejections)} refused")
    for r in rejections:
        lines.append(f"  {r.reason:<22} {r.uri}  {r.message}")
    return "\n".join(lines)
