"""Instance: one image file or DICOM object. VolumeHeader: what one volume is made of. Facts only, no pixels."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any

from sparkmed.rejection import Refused

READER = 3
"""Number of the way in which headers are read and put together to volumes; a lake that was made in another is made anew."""
MAX_VOLUME_BYTES = 16 << 30
"""Decoded voxels of one image above this size in bytes are refused."""
MAX_RATIO = 1100
"""No codec at hand makes more than this many bytes of one, but for flat images, which are small: see :func:`check_size`."""
FLAT = 64 << 20
DECIDING = ("frames", "resampled", "units")
"""Facts of a volume, beside sources and affine, on which its voxels depend."""


@dataclass(frozen=True)
class Instance:
    """One image file (NIfTI, raster) or DICOM object, as far as its headers tell.

    ``shape`` is (C, I, J, K) in voxels; ``affine`` 16 numbers, row by row, of the 4x4 matrix from voxel index to RAS+ mm
    (of the one slice in DICOM), or None; ``header`` is JSON with the other facts that :func:`series.assemble` needs and
    holds nothing that identifies a person. ``patient`` is the raw identifier: it stays in memory, is never shown by
    ``repr`` and is not in :meth:`row`. ``kind`` is ``image``, ``segmentation`` (DICOM SEG and RTSTRUCT), or
    ``other`` for a DICOM object that is neither.
    """

    uri: str
    path: str
    container: str
    file_size: int
    file_mtime_ns: int
    bytes: int
    sha256: str
    format: str
    kind: str
    modality: str
    series_uid: str
    sop_uid: str
    sop_class: str
    transfer_syntax: str
    shape: tuple[int, int, int, int]
    affine: tuple[float, ...] | None
    header: str
    patient: str = field(default="", repr=False, compare=False)

    @property
    def facts(self) -> dict[str, Any]:
        """``header`` as a dictionary."""
        return json.loads(self.header)

    def row(self) -> dict[str, Any]:
        """Plain data for a table; without ``patient``."""
        return _row(self)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Instance":
        return _from_row(cls, row)


@dataclass(frozen=True)
class VolumeHeader:
    """One volume before its voxels are read: ordered sources, geometry, identity by content.

    ``uid`` is a digest of (format, SHA-256 of the ordered sources, affine, and which frames of the sources where that is not all
    there is): the same content has the same uid wherever it lies. ``sources`` and ``source_paths`` are URIs and paths in the
    order of the voxels (time by time, slice by slice), each once.
    """

    uid: str
    format: str
    modality: str
    series_uid: str
    sources: tuple[str, ...]
    source_paths: tuple[str, ...]
    source_sha256: tuple[str, ...]
    shape: tuple[int, int, int, int]
    affine: tuple[float, ...]
    header: str
    patient: str = field(default="", repr=False, compare=False)

    @property
    def facts(self) -> dict[str, Any]:
        """``header`` as a dictionary."""
        return json.loads(self.header)

    def row(self) -> dict[str, Any]:
        """Plain data for a table; without ``patient``."""
        return _row(self)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "VolumeHeader":
        return _from_row(cls, row)


def volume_header(instances: list[Instance], shape, affine, facts: dict[str, Any]) -> VolumeHeader:
    """The header of the volume that ``instances`` make up in this order."""
    first = instances[0]
    sha256 = tuple(i.sha256 for i in instances)
    affine = tuple(float(x) + 0.0 for x in affine)
    content = json.dumps([first.format, sha256, affine, *(facts[k] for k in DECIDING if facts.get(k))])
    return VolumeHeader(
        uid=hashlib.sha256(content.encode()).hexdigest()[:32],
        format=first.format,
        modality=first.modality,
        series_uid=first.series_uid,
        sources=tuple(i.uri for i in instances),
        source_paths=tuple(i.path for i in instances),
        source_sha256=sha256,
        shape=tuple(int(n) for n in shape),
        affine=affine,
        header=to_json(facts),
        patient=first.patient,
    )


def to_json(facts: dict[str, Any]) -> str:
    """Compact JSON without the facts that are None."""
    return json.dumps({k: v for k, v in facts.items() if v is not None}, separators=(",", ":"), sort_keys=True)


def check_size(shape, itemsize: float, available: int, compressed: bool):
    """Raise ``TOO_LARGE`` or ``TRUNCATED`` when an array of ``shape`` cannot come out of ``available`` bytes.

    Called with what a header claims, before anything is allocated.
    """
    if any(n <= 0 for n in shape):
        raise Refused("BAD_SHAPE", f"the header claims an array of {tuple(shape)} voxels")
    wanted = math.prod(int(n) for n in shape) * itemsize
    if wanted > MAX_VOLUME_BYTES:
        raise Refused("TOO_LARGE", f"the header claims {tuple(shape)} voxels, {wanted:.0f} bytes; the limit is {MAX_VOLUME_BYTES}")
    if not compressed and wanted > available:
        raise Refused("TRUNCATED", f"the header claims {wanted:.0f} bytes of voxels, the file holds {available}")
    if compressed and wanted > FLAT + MAX_RATIO * available:
        raise Refused("TRUNCATED", f"the header claims {wanted:.0f} bytes of voxels, the file holds {available} bytes")


def _row(value) -> dict[str, Any]:
    row = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name != "patient"}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in row.items()}


def _from_row(cls, row: dict[str, Any]):
    """``row`` may come from Arrow, pandas or Spark: lists or numpy arrays, numpy scalars, more columns than fields."""
    known = {}
    for f in dataclasses.fields(cls):
        if f.name in row:
            v = row[f.name]
            if hasattr(v, "tolist"):
                v = v.tolist()
            known[f.name] = tuple(v) if isinstance(v, list) else v
    return cls(**known)
