"""Multi-frame objects and mosaics written for tests: the same phantoms in the ways of several vendors.

Frames are dictionaries of facts (position, time, echo...); :func:`enhanced` puts them into functional groups (PS3.3
C.7.6.16). Nothing is taken from a real scan.
"""

import struct

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence

from . import dicoms
from .dicoms import Grid, decimal

ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
ENHANCED_PET = "1.2.840.10008.5.1.4.1.1.130"
LEGACY_CT = "1.2.840.10008.5.1.4.1.1.2.2"
LEGACY_MR = "1.2.840.10008.5.1.4.1.1.4.4"
LEGACY_PET = "1.2.840.10008.5.1.4.1.1.128.1"
TOMOSYNTHESIS = "1.2.840.10008.5.1.4.1.1.13.1.3"
NM = "1.2.840.10008.5.1.4.1.1.20"
DOSE = "1.2.840.10008.5.1.4.1.1.481.2"

_MODALITY = {ENHANCED_CT: "CT", LEGACY_CT: "CT", ENHANCED_PET: "PT", LEGACY_PET: "PT", TOMOSYNTHESIS: "MG"}
_FRAME_TYPE = {
    "MR": "MRImageFrameTypeSequence",
    "CT": "CTImageFrameTypeSequence",
    "PT": "PETFrameTypeSequence",
    "MG": "XRay3DFrameTypeSequence",
}
_DIMENSIONS = {
    "stack": ("StackID", "FrameContentSequence"),
    "place": ("InStackPositionNumber", "FrameContentSequence"),
    "temporal": ("TemporalPositionIndex", "FrameContentSequence"),
    "echo": ("EffectiveEchoTime", "MREchoSequence"),
    "b": ("DiffusionBValue", "MRDiffusionSequence"),
    "direction": ("DiffusionGradientOrientation", "MRDiffusionSequence"),
    "trigger": ("NominalCardiacTriggerDelayTime", "CardiacSynchronizationSequence"),
    "component": ("ComplexImageComponent", "MRImageFrameTypeSequence"),
}


def item(**elements) -> Dataset:
    """An item of a sequence; an element that is None is left out."""
    ds = Dataset()
    for name, value in elements.items():
        if value is not None:
            setattr(ds, name, value)
    return ds


def frames(voxels: np.ndarray, grid: Grid = dicoms.OBLIQUE, **facts) -> list[dict]:
    """One frame per time and slice of (C, I, J, K) ``voxels``, time by time; a fact may be a function of (c, k)."""
    made = []
    for c in range(voxels.shape[0]):
        for k in range(voxels.shape[3]):
            own = {n: v(c, k) if callable(v) else v for n, v in facts.items()}
            pixels = np.ascontiguousarray(voxels[c, :, :, k].T)
            geometry = {"position": grid.position(k), "orientation": grid.orientation, "spacing": grid.spacing, "gap": grid.gap}
            made.append({"pixels": pixels, "stack": "1", "place": k + 1} | geometry | own)
    return made


def _groups(frame: dict, modality: str) -> dict[str, Dataset]:
    """The functional groups of one frame by the name of their sequence."""
    f = frame.get
    groups = {}
    if f("position") is not None:
        groups["PlanePositionSequence"] = item(ImagePositionPatient=[decimal(x) for x in f("position")])
    if f("orientation") is not None:
        groups["PlaneOrientationSequence"] = item(ImageOrientationPatient=[decimal(x) for x in f("orientation")])
    if f("spacing") is not None:
        measures = item(PixelSpacing=list(f("spacing")), SliceThickness=decimal(f("gap")), SpacingBetweenSlices=f("between"))
        groups["PixelMeasuresSequence"] = measures
    kind = f("type") or ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    groups[_FRAME_TYPE[modality]] = item(FrameType=kind, ComplexImageComponent=f("component"))
    if f("echo") is not None:
        groups["MREchoSequence"] = item(EffectiveEchoTime=float(f("echo")))
    if f("b") is not None:
        direction = f("direction")
        groups["MRDiffusionSequence"] = item(
            DiffusionBValue=float(f("b")), DiffusionDirectionality="NONE" if direction is None else "DIRECTIONAL"
        )
        if direction is not None:
            vector = item(DiffusionGradientOrientation=[float(x) for x in direction])
            groups["MRDiffusionSequence"].DiffusionGradientDirectionSequence = Sequence([vector])
    if f("trigger") is not None:
        groups["CardiacSynchronizationSequence"] = item(NominalCardiacTriggerDelayTime=float(f("trigger")))
    if f("offset") is not None:
        groups["TemporalPositionSequence"] = item(TemporalPositionTimeOffset=float(f("offset")))
    if f("slope") is not None:
        scale = item(RescaleSlope=decimal(f("slope")), RescaleIntercept=decimal(f("intercept") or 0), RescaleType="US")
        groups["PixelValueTransformationSequence"] = scale
    groups["FrameContentSequence"] = item(
        StackID=f("stack"),
        InStackPositionNumber=f("place"),
        TemporalPositionIndex=f("temporal"),
        FrameAcquisitionNumber=f("acquisition"),
        FrameAcquisitionDateTime=f("datetime"),
        FrameReferenceDateTime=f("datetime"),
    )
    return groups


def _ranks(made: list[dict], name: str) -> list[int]:
    """Index from 1 of each frame's value along one dimension; frames without the value come first."""
    values = [f.get(name) for f in made]
    keys = [(0,) if v is None else (1, v) for v in values]
    order = sorted(set(keys))
    return [order.index(k) + 1 for k in keys]


def enhanced(made: list[dict], sop_class=ENHANCED_MR, dimensions=("stack", "place"), share=True, decoy=False, **elements):
    """One multi-frame object of these frames, in this order.

    ``share`` puts the functional groups that are the same in all frames into the shared ones. ``dimensions`` names the
    dimension index. ``decoy`` adds a vendor's private copy of the plane, half a pixel off, as Philips does.
    """
    modality = _MODALITY.get(sop_class, "MR")
    groups = [_groups(f, modality) for f in made]
    ranks = [_ranks(made, d) for d in dimensions]
    for n, g in enumerate(groups):
        if dimensions:
            g["FrameContentSequence"].DimensionIndexValues = [r[n] for r in ranks]
    names = [n for n in groups[0] if n != "FrameContentSequence"]
    same = [n for n in names if share and all(n in g and g[n] == groups[0][n] for g in groups)]
    shared, each = Dataset(), []
    for n in same:
        setattr(shared, n, Sequence([groups[0][n]]))
    for f, g in zip(made, groups, strict=True):
        own = Dataset()
        for n, group in g.items():
            if n not in same:
                setattr(own, n, Sequence([group]))
        if decoy:
            wrong = item(
                ImagePositionPatient=[decimal(x - 0.5) for x in f["position"]],
                PixelSpacing=list(f["spacing"]),
                ImageType=["ORIGINAL", "PRIMARY"],
            )
            own.add_new(0x20050014, "LO", "Philips MR Imaging DD 005")
            own.add_new(0x2005140F, "SQ", Sequence([wrong]))
        each.append(own)
    organization = "1.2.3.4.7"
    index = []
    for d in dimensions:
        pointer, group = (pydicom.datadict.tag_for_keyword(k) for k in _DIMENSIONS[d])
        index.append(item(DimensionOrganizationUID=organization, DimensionIndexPointer=pointer, FunctionalGroupPointer=group))
    pixels = np.stack([f["pixels"] for f in made])
    nowhere = dict.fromkeys(("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"))
    defaults = nowhere | {
        "SOPClassUID": sop_class,
        "SOPInstanceUID": pydicom.uid.generate_uid(entropy_srcs=[repr(sorted(elements.items())), pixels.tobytes().hex()[:3000]]),
        "Modality": modality,
        "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        "SeriesNumber": 7,
        "InstanceNumber": 1,
        "PatientPosition": "HFS",
        "NumberOfFrames": len(made),
        "ContentDate": "20200102",
        "ContentTime": "101112",
        "AcquisitionDateTime": "20200102101112",
        "SharedFunctionalGroupsSequence": Sequence([shared]),
        "PerFrameFunctionalGroupsSequence": Sequence(each),
    }
    if dimensions:
        defaults["DimensionOrganizationSequence"] = Sequence([item(DimensionOrganizationUID=organization)])
        defaults["DimensionIndexSequence"] = Sequence(index)
    return _of(pixels, **defaults | elements)


def _of(pixels: np.ndarray, **elements) -> FileDataset:
    """A dataset of (frames, rows, columns) ``pixels``."""
    ds = dicoms.dataset(pixels[0], **elements)
    ds.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    return ds


def position_major(made: list[dict]) -> list[dict]:
    """Frames slice by slice, the times of each slice together: Philips writes them so."""
    return sorted(made, key=lambda f: f["place"])


def shuffled(made: list, seed: int = 5) -> list:
    """The same in a random order that does not change."""
    return [made[n] for n in np.random.default_rng(seed).permutation(len(made))]


def siemens_header(images: int, normal, **tags) -> bytes:
    """A CSA image header (0029,1010) of kind SV10 that says how many tiles a mosaic has and which way they are stacked."""
    values = {
        "EchoLinePosition": ("IS", ["5"]),
        "NumberOfImagesInMosaic": ("US", [str(images)] if images else []),
        "SliceNormalVector": ("FD", [f"{x:.8f}" for x in normal]),
        "ProtocolSliceNumber": ("IS", ["0"]),
        "PhaseEncodingDirectionPositive": ("IS", ["1"]),
    } | tags
    out = b"SV10\x04\x03\x02\x01" + struct.pack("<II", len(values), 77)
    for name, (vr, items) in values.items():
        count = max(6, len(items))
        out += name.encode().ljust(64, b"\0") + struct.pack("<i4siii", len(items), vr.encode().ljust(4, b"\0"), 19, count, 77)
        for n in range(count):
            text = items[n].encode() + b"\0" if n < len(items) else b""
            out += struct.pack("<4i", len(text), len(text), 77 if n < len(items) else 205, len(text))
            out += text + b"\0" * (-len(text) % 4)
    return out


def mosaic(voxels: np.ndarray, grid: Grid = dicoms.OBLIQUE, sign: int = 1, header=True, **elements) -> list[FileDataset]:
    """One Siemens mosaic per time of (C, I, J, K) ``voxels``: tiles row by row on a square, the rest of it empty.

    The header's position is that of the first pixel of the first slice, had the whole mosaic been one slice around the
    same centre. ``sign`` -1: the tiles are stacked against row x column.
    """
    times, columns, rows, slices = voxels.shape
    side = int(np.ceil(np.sqrt(slices)))
    row, column = np.asarray(grid.orientation[:3]), np.asarray(grid.orientation[3:])
    corner = np.asarray(grid.origin) - row * grid.spacing[1] * columns * (side - 1) / 2
    corner = corner - column * grid.spacing[0] * rows * (side - 1) / 2
    made = []
    for c in range(times):
        canvas = np.zeros((side * rows, side * columns), voxels.dtype)
        for k in range(slices):
            at = (k // side * rows, k % side * columns)
            canvas[at[0] : at[0] + rows, at[1] : at[1] + columns] = voxels[c, :, :, k].T
        own = {n: v(c) if callable(v) else v for n, v in elements.items()}
        defaults = {
            "SOPClassUID": dicoms.MR,
            "SOPInstanceUID": pydicom.uid.generate_uid(entropy_srcs=[str(c), canvas.tobytes().hex()[:3000]]),
            "Modality": "MR",
            "Manufacturer": "SIEMENS",
            "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"],
            "SeriesNumber": 3,
            "InstanceNumber": c + 1,
            "AcquisitionNumber": c + 1,
            "AcquisitionTime": f"10{c:02d}00.000000",
            "EchoTime": 30,
            "RepetitionTime": 2000,
            "PatientPosition": "HFS",
            "ImagePositionPatient": [decimal(x) for x in corner],
            "ImageOrientationPatient": [decimal(x) for x in grid.orientation],
            "PixelSpacing": list(grid.spacing),
            "SliceThickness": decimal(grid.gap - 0.5),
            "SpacingBetweenSlices": decimal(grid.gap),
        }
        ds = dicoms.dataset(canvas, **defaults | own)
        if header:
            ds.add_new(0x00290010, "LO", "SIEMENS CSA HEADER")
            ds.add_new(0x00291010, "OB", siemens_header(slices, sign * grid.normal))
        made.append(ds)
    return made


def emission(voxels: np.ndarray, grid: Grid = dicoms.AXIAL, **elements) -> FileDataset:
    """A reconstructed tomographic NM object of (1, I, J, K) ``voxels``: PS3.3 C.8.4.15, C.8.4.16."""
    detector = item(
        ImagePositionPatient=[decimal(x) for x in grid.position(0)],
        ImageOrientationPatient=[decimal(x) for x in grid.orientation],
    )
    slices = voxels.shape[3]
    defaults = {
        "SOPClassUID": NM,
        "Modality": "NM",
        "ImageType": ["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"],
        "SeriesNumber": 8,
        "InstanceNumber": 1,
        "PatientPosition": "HFS",
        "ImagePositionPatient": None,
        "ImageOrientationPatient": None,
        "PixelSpacing": list(grid.spacing),
        "SliceThickness": decimal(grid.gap),
        "SpacingBetweenSlices": decimal(grid.gap),
        "NumberOfFrames": slices,
        "NumberOfSlices": slices,
        "FrameIncrementPointer": 0x00540080,
        "SliceVector": list(range(1, slices + 1)),
        "DetectorInformationSequence": Sequence([detector]),
    }
    return _of(np.ascontiguousarray(voxels[0].transpose(2, 1, 0)), **defaults | elements)


def dose(voxels: np.ndarray, grid: Grid = dicoms.AXIAL) -> FileDataset:
    """An RT dose of (1, I, J, K) ``voxels``: frames by GridFrameOffsetVector, values by DoseGridScaling."""
    return _of(
        np.ascontiguousarray(voxels[0].transpose(2, 1, 0)),
        SOPClassUID=DOSE,
        Modality="RTDOSE",
        ImagePositionPatient=[decimal(x) for x in grid.position(0)],
        PixelSpacing=list(grid.spacing),
        NumberOfFrames=voxels.shape[3],
        GridFrameOffsetVector=[decimal(k * grid.gap) for k in range(voxels.shape[3])],
        DoseGridScaling="0.001",
        DoseUnits="GY",
    )
