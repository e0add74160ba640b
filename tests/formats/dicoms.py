"""DICOM objects written for tests: a sliced phantom of known values, any element changed."""

import copy
import dataclasses
import io
import pathlib

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
CR = "1.2.840.10008.5.1.4.1.1.1"
PET = "1.2.840.10008.5.1.4.1.1.128"
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


def seg(sources, pixels, labels=("liver", "kidney"), kind="BINARY", **arguments):
    """A DICOM SEG of ``sources`` by highdicom: ``pixels`` as it takes them, one segment per label."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    sources = [copy.deepcopy(s) for s in sources]
    for name in "PatientBirthDate PatientSex StudyID StudyDate StudyTime".split():
        setattr(sources[0], name, "")
    sources[0].SliceThickness = 2.5
    algorithm = hd.AlgorithmIdentificationSequence("hand", codes.DCM.ArtificialIntelligence, "1")
    types = [codes.SCT.Liver, codes.SCT.Kidney, codes.SCT.Spleen]
    described = [
        hd.seg.SegmentDescription(n, label, codes.SCT.Organ, type_, "AUTOMATIC", algorithm)
        for n, (label, type_) in enumerate(zip(labels, types, strict=False), start=1)
    ]
    names = {"series_instance_uid": "1.2.3.9", "sop_instance_uid": "1.2.3.9.1", "series_number": 9, "instance_number": 1}
    maker = {"manufacturer": "m", "manufacturer_model_name": "m", "software_versions": "1", "device_serial_number": "1"}
    return hd.seg.Segmentation(sources, pixels, kind, described, **(names | maker | arguments))


def seg_volume(array, affine, **arguments):
    """``array`` (I, J, K[, segments]) on a grid of its own (RAS+ mm), as highdicom takes it; frames are its (I, J) planes."""
    import highdicom as hd

    order = [2, 1, 0, 3]
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    channels = {"SegmentNumber": list(range(1, array.shape[3] + 1))} if array.ndim == 4 else None
    return hd.Volume(array.transpose(order[: array.ndim]), lps[:, [2, 1, 0, 3]], "PATIENT", "1.2.3.4.6", channels=channels)


def rtstruct(rois, series="1.2.3.4.5", study="1.2.3.4", frame="1.2.3.4.6", **elements) -> Dataset:
    """An RTSTRUCT: ``rois`` are lists of contours by name, each (n, 3) mm in LPS or a pair of its type and that."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3.8.1"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.Modality = study, "1.2.3.8", "RTSTRUCT"
    ds.PatientName, ds.PatientID = f"{SECRET}^Don", f"{SECRET}-1605"
    ds.ReferencedFrameOfReferenceSequence = [
        nested(FrameOfReferenceUID=frame, RTReferencedStudySequence=[
            nested(ReferencedSOPInstanceUID=study, RTReferencedSeriesSequence=[nested(SeriesInstanceUID=series)])
        ])
    ]  # fmt: skip
    ds.StructureSetROISequence = [nested(ROINumber=n, ROIName=name) for n, name in enumerate(rois, start=1)]
    ds.ROIContourSequence = [
        nested(ReferencedROINumber=n, ContourSequence=[_contour(c) for c in contours])
        for n, contours in enumerate(rois.values(), start=1)
    ]
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


def _contour(contour) -> Dataset:
    kind, points = contour if isinstance(contour, tuple) else ("CLOSED_PLANAR", contour)
    data = [f"{x:.9g}" for x in np.ravel(points)]
    return nested(ContourGeometricType=kind, NumberOfContourPoints=len(data) // 3, ContourData=data)


def nested(**elements) -> Dataset:
    """An item of a sequence."""
    ds = Dataset()
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


def write(folder: pathlib.Path, datasets, names=None) -> pathlib.Path:
    """The datasets as files ``000.dcm``... in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, ds in enumerate(datasets):
        (folder / (names[n] if names else f"{n:03d}.dcm")).write_bytes(encoded(ds))
    return folder


def decimal(x: float) -> str:
    """``x`` as a DS of at most 16 characters."""
    return f"{round(float(x), 9) + 0.0:.10g}"


def turned(alpha: float, beta: float, gamma: float) -> tuple[float, ...]:
    """Row and column direction of a slice turned by three angles in radians, to nine digits."""
    (ca, sa), (cb, sb), (cg, sg) = ((np.cos(x), np.sin(x)) for x in (alpha, beta, gamma))
    turn = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]]) @ np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    turn = turn @ np.array([[cg, -sg, 0], [sg, cg, 0], [0, 0, 1]])
    return tuple(np.round(np.concatenate([turn[:, 0], turn[:, 1]]), 9))


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the slices of a phantom lie: DICOM's words, LPS mm; ``spacing`` is (between rows, between columns)."""

    origin: tuple[float, ...] = (-31.5, 17.25, -40.125)
    orientation: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    spacing: tuple[float, float] = (1.25, 0.75)
    gap: float = 3.5

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.orientation[:3], self.orientation[3:])

    def position(self, k: float) -> list[float]:
        """Centre of the first pixel of slice ``k``."""
        return (np.asarray(self.origin) + k * self.gap * self.normal).tolist()

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) from (column, row, slice) to RAS+ mm, written from PS3.3 C.7.6.2.1.1 apart from the code under test."""
        row, column = np.asarray(self.orientation[:3]), np.asarray(self.orientation[3:])
        lps = np.column_stack([row * self.spacing[1], column * self.spacing[0], self.normal * self.gap, self.origin])
        return np.vstack([lps * np.array([[-1], [-1], [1]]), [0, 0, 0, 1]])


AXIAL = Grid()
OBLIQUE = Grid(orientation=turned(0.2, -0.15, 0.3))
SAGITTAL = Grid(orientation=turned(np.pi / 2, 0.1, np.pi / 2 - 0.05))


def phantom(times: int = 1, shape=(12, 10, 5), dtype=np.uint16, step: int = 1, start: int = 1) -> np.ndarray:
    """(times, columns, rows, slices) of values that are all different."""
    count = times * int(np.prod(shape))
    return (start + step * np.random.default_rng(times).permutation(count)).reshape(times, *shape).astype(dtype)


def classic(voxels: np.ndarray, grid: Grid = OBLIQUE, **elements) -> list[FileDataset]:
    """One MR object per time and slice of (C, I, J, K) ``voxels``, time by time; an element may be a function of (c, k)."""
    made = []
    times, slices = voxels.shape[0], voxels.shape[3]
    for c in range(times):
        for k in range(slices):
            own = {n: v(c, k) if callable(v) else v for n, v in elements.items()}
            defaults = {
                "SOPClassUID": MR,
                "Modality": "MR",
                "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"],
                "StudyDate": "20200102",
                "StudyTime": "101112",
                "SeriesNumber": 3,
                "InstanceNumber": c * slices + k + 1,
                "EchoTime": 4.5,
                "RepetitionTime": 500,
                "PatientPosition": "HFS",
                "ImagePositionPatient": [decimal(x) for x in grid.position(k)],
                "ImageOrientationPatient": [decimal(x) for x in grid.orientation],
                "PixelSpacing": list(grid.spacing),
                "SliceThickness": decimal(grid.gap),
                "SpacingBetweenSlices": decimal(grid.gap),
            }
            uid = pydicom.uid.generate_uid(
                entropy_srcs=[repr(sorted(own.items())), f"{grid} {c} {k}", voxels.tobytes().hex()[:500]]
            )
            made.append(dataset(np.ascontiguousarray(voxels[c, :, :, k].T), **{"SOPInstanceUID": uid} | defaults | own))
    return made
