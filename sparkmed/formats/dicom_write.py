"""CT series as a scanner would write them: for the demo and for tests that know the answer."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComprehensiveSRStorage, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from sparkmed.imaging import geometry
from sparkmed.imaging.volume import Volume

_AIR = -1024  # HU of a stored 0


@dataclass(frozen=True)
class Patient:
    """Whose images they are: what must never leave the archive."""

    name: str
    """``Family^Given``."""
    id: str
    birth_date: str = "19500101"
    accession: str = "A0000001"


def ct_series(volume: Volume, patient: Patient, identity: str, instance_numbers: Sequence[int] | None = None) -> list[bytes]:
    """One CT Image Storage object (PS3.3 A.3) per slice along K, in the order of K.

    ``volume`` is (1, I, J, K) in HU, columns along I and rows along J; positions and cosines follow from its affine, so a sheared
    affine gives a tilted gantry. UIDs are a pure function of ``identity``. ``instance_numbers`` default to 1, 2, ...; a real
    archive does not promise that they follow the positions.
    """
    if len(volume.array) != 1:
        raise ValueError(f"a CT slice has one channel; got {len(volume.array)}")
    count = volume.spatial_shape[2]
    numbers = range(1, count + 1) if instance_numbers is None else instance_numbers
    affine, spacing = geometry.lps_to_ras(volume.affine), volume.spacing  # its own inverse: RAS to LPS here
    cosines = affine[:3, :2] / spacing[:2]
    stored = np.clip(volume.array[0] - _AIR, 0, 4095).astype(np.uint16)
    objects = []
    for k, number in zip(range(count), numbers, strict=True):
        slice_ = _object(CTImageStorage, patient, identity, f"slice {k}", "CT")
        slice_.InstanceNumber = int(number)
        slice_.ImagePositionPatient = [_decimal(x) for x in affine[:3, 3] + k * affine[:3, 2]]
        slice_.ImageOrientationPatient = [_decimal(x) for x in cosines.T.ravel()]
        slice_.PixelSpacing = [_decimal(spacing[1]), _decimal(spacing[0])]
        slice_.SliceThickness = _decimal(spacing[2])
        slice_.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        slice_.Rows, slice_.Columns = stored.shape[1], stored.shape[0]
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 12, 11, 0
        slice_.RescaleSlope, slice_.RescaleIntercept, slice_.RescaleType = 1, _AIR, "HU"
        slice_.PixelData = np.ascontiguousarray(stored[:, :, k].T).astype("<u2").tobytes()
        objects.append(_bytes(slice_))
    return objects


def report(patient: Patient, identity: str) -> bytes:
    """A structured report of the same study: a DICOM object that holds no image."""
    document = _object(ComprehensiveSRStorage, patient, identity, "report", "SR")
    document.SeriesInstanceUID = generate_uid(entropy_srcs=[identity, "report series"])
    document.ValueType, document.ContinuityOfContent = "CONTAINER", "SEPARATE"
    return _bytes(document)


def _object(sop_class: str, patient: Patient, identity: str, part: str, modality: str) -> Dataset:
    out = Dataset()
    out.file_meta = FileMetaDataset()
    out.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    out.file_meta.MediaStorageSOPClassUID = out.SOPClassUID = sop_class
    out.file_meta.MediaStorageSOPInstanceUID = out.SOPInstanceUID = generate_uid(entropy_srcs=[identity, part])
    out.StudyInstanceUID = generate_uid(entropy_srcs=[identity, "study"])
    out.SeriesInstanceUID = generate_uid(entropy_srcs=[identity, "series"])
    out.FrameOfReferenceUID = generate_uid(entropy_srcs=[identity, "frame"])
    out.Modality = modality
    out.PatientName, out.PatientID = patient.name, patient.id
    out.PatientBirthDate, out.PatientSex = patient.birth_date, "O"
    out.AccessionNumber, out.StudyID = patient.accession, "1"
    out.StudyDate = out.SeriesDate = "20240102"
    out.StudyTime, out.SeriesNumber = "101500", 1
    return out


def _bytes(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _decimal(value: float) -> str:
    """A decimal string of at most 16 characters (PS3.5 6.2)."""
    return f"{float(value) + 0.0:.10g}"[:16]
