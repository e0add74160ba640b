"""DICOM objects written for tests: a sliced phantom of known values, any element changed."""

import io
import pathlib

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
CR = "1.2.840.10008.5.1.4.1.1.1"
SECRET = "Quixote"
"""Part of every patient's name and id: it must never come back."""


def dataset(pixels: np.ndarray, **elements) -> FileDataset:
    """One image of (rows, columns) or (rows, columns, 3) unsigned or signed integers; ``None`` deletes an element."""
    sop_class = elements.pop("SOPClassUID", CT)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class or CT
    meta.TransferSyntaxUID = elements.pop("TransferSyntaxUID", ExplicitVRLittleEndian)
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    bits = pixels.dtype.itemsize * 8
    defaults = {
        "SOPClassUID": sop_class,
        "SOPInstanceUID": pydicom.uid.generate_uid(entropy_srcs=[repr(sorted(elements.items())), pixels.tobytes().hex()[:2000]]),
        "StudyInstanceUID": "1.2.3.4",
        "SeriesInstanceUID": "1.2.3.4.5",
        "PatientName": f"{SECRET}^Don",
        "PatientID": f"{SECRET}-1605",
        "AccessionNumber": SECRET,
        "ReferringPhysicianName": SECRET,
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 3 if pixels.ndim == 3 else 1,
        "PhotometricInterpretation": "RGB" if pixels.ndim == 3 else "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "ImagePositionPatient": [0, 0, 0],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [1, 1],
        "FrameOfReferenceUID": "1.2.3.4.6",
    }
    if pixels.ndim == 3:
        defaults["PlanarConfiguration"] = 0
    for name, value in (defaults | elements).items():
        if value is not None:
            setattr(ds, name, value)
    if "HighBit" not in elements:
        ds.HighBit = ds.BitsStored - 1
    ds.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    meta.MediaStorageSOPInstanceUID = elements.get("SOPInstanceUID") or ds.get("SOPInstanceUID", "1.2.3")
    return ds


def encoded(ds: FileDataset) -> bytes:
    """The bytes of the file."""
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


def stack(shape=(6, 5, 4), dtype=np.uint16, seed=0) -> np.ndarray:
    """(columns, rows, slices) random integers below 1000."""
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


def series(voxels: np.ndarray, gap: float = 2.5, origin=(-10.0, 20.0, 30.0), orientation=(1, 0, 0, 0, 1, 0), **elements):
    """One dataset per slice of (I, J, K) ``voxels``; an element may be a function of the slice index."""
    normal = np.cross(orientation[:3], orientation[3:])
    made = []
    for k in range(voxels.shape[2]):
        position = np.asarray(origin) + k * gap * normal
        own = {n: v(k) if callable(v) else v for n, v in elements.items()}
        own = {
            "InstanceNumber": k + 1,
            "ImagePositionPatient": [f"{x:.10g}"[:16] for x in position],
            "ImageOrientationPatient": [f"{x:.12g}"[:16] for x in orientation],
        } | own
        made.append(dataset(np.ascontiguousarray(voxels[:, :, k].T), **own))
    return made


def write(folder: pathlib.Path, datasets, names=None) -> pathlib.Path:
    """The datasets as files ``000.dcm``... in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, ds in enumerate(datasets):
        (folder / (names[n] if names else f"{n:03d}.dcm")).write_bytes(encoded(ds))
    return folder
