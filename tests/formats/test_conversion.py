"""Series of every kind become the right volumes or a refusal: known answers, and dcm2niix where it converts.

Each case writes a series whose voxels and grid are known. :func:`test_known_answer` holds the code to them,
:func:`test_peer` holds dcm2niix to the same ones: where both pass, the two programs agree voxel for voxel, and the phantom
is one that another reader of DICOM understands. A case says why where dcm2niix is not asked.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from sparkmed.formats import read_archive, read_headers, read_volume

from . import dicoms, enhanced
from .dicoms import AXIAL, OBLIQUE, SAGITTAL, classic, phantom
from .enhanced import frames, mosaic, position_major, shuffled
from .judges import Expected, by_dcm2niix, difference, folder_of, matched


@dataclasses.dataclass
class Case:
    """A series, what it becomes, and why dcm2niix is not asked (or the flags it is asked with)."""

    write: Callable
    volumes: Callable
    not_asked: str = ""
    flags: tuple = ()


CASES: dict[str, Case] = {}


def case(name: str, not_asked: str = "", flags: tuple = ()):
    """Add a function that returns (datasets, expected volumes) under ``name``."""

    def add(make):
        CASES[name] = Case(lambda: make()[0], lambda: make()[1], not_asked, flags)
        return make

    return add


def mixed(made: list) -> list:
    """The objects in another order and with instance numbers that tell nothing."""
    made = shuffled(made)
    for ds, number in zip(made, np.random.default_rng(9).permutation(len(made)), strict=True):
        ds.InstanceNumber = int(number) + 1
    return made


# ---- order


@case("instance numbers scrambled")
def _():
    voxels = phantom()
    return mixed(classic(voxels)), [Expected(voxels, OBLIQUE.affine)]


@case("instance numbers absent")
def _():
    voxels = phantom()
    return shuffled(classic(voxels, SAGITTAL, InstanceNumber=None)), [Expected(voxels, SAGITTAL.affine)]


@case("instance numbers run against the normal")
def _():
    voxels = phantom()
    return classic(voxels, InstanceNumber=lambda c, k: 5 - k), [Expected(voxels, OBLIQUE.affine)]


@case("names and study absent, two series")
def _():
    a, b = phantom(), phantom(start=2000)
    made = classic(a, AXIAL, FrameOfReferenceUID=None)
    made += classic(b, SAGITTAL, SeriesInstanceUID="1.2.3.4.9", SeriesNumber=4, FrameOfReferenceUID=None)
    return shuffled(made), [Expected(a, AXIAL.affine), Expected(b, SAGITTAL.affine)]


@case("orientations that differ by rounding")
def _():
    voxels = phantom()
    turned = [[dicoms.decimal(x + (-1) ** k * 4e-6) for x in OBLIQUE.orientation] for k in range(5)]
    return shuffled(classic(voxels, ImageOrientationPatient=lambda c, k: turned[k])), [Expected(voxels, OBLIQUE.affine)]


@case("header's own spacing of slices is wrong")
def _():
    """Positions say where slices lie; SpacingBetweenSlices and thickness are hearsay."""
    voxels = phantom()
    return classic(voxels, SpacingBetweenSlices=1, SliceThickness=9), [Expected(voxels, OBLIQUE.affine)]


@case("two acquisitions that lie end to end")
def _():
    voxels = phantom()
    made = classic(voxels, AXIAL, SOPClassUID=dicoms.CT, Modality="CT", EchoTime=None, AcquisitionNumber=lambda c, k: 1 + (k > 2))
    return shuffled(made), [Expected(voxels, AXIAL.affine)]


# ---- what sets volumes of one series apart


@case("three echoes")
def _():
    voxels, times = phantom(3), (4.9, 9.8, 14.7)
    made = classic(voxels, EchoTime=lambda c, k: times[c], EchoNumbers=lambda c, k: c + 1)
    return mixed(made), [Expected(voxels[c : c + 1], OBLIQUE.affine, {"part": {"echo": times[c]}}) for c in range(3)]


@case("magnitude and phase")
def _():
    voxels = phantom(2)
    kinds = (["ORIGINAL", "PRIMARY", "M", "ND"], ["ORIGINAL", "PRIMARY", "P", "ND"])
    made = classic(
        voxels,
        Manufacturer="SIEMENS",
        ImageType=lambda c, k: kinds[c],
        RescaleSlope=lambda c, k: (None, 2)[c],
        RescaleIntercept=lambda c, k: (None, -4096)[c],
    )
    real = (voxels[:1].astype(float), voxels[1:] * 2.0 - 4096)
    return mixed(made), [Expected(real[c], OBLIQUE.affine, {"part": {"type": kinds[c]}}) for c in range(2)]


@case("original and derived")
def _():
    voxels = phantom(2)
    kinds = (["ORIGINAL", "PRIMARY", "M", "NORM"], ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"])
    made = classic(voxels, Manufacturer="SIEMENS", ImageType=lambda c, k: kinds[c])
    return mixed(made), [Expected(voxels[c : c + 1], OBLIQUE.affine, {"part": {"type": kinds[c]}}) for c in range(2)]


@case("echoes of magnitude and phase")
def _():
    voxels, times = phantom(4), (4.9, 9.8)
    kinds = (["ORIGINAL", "PRIMARY", "M", "ND"], ["ORIGINAL", "PRIMARY", "P", "ND"])
    made = classic(
        voxels,
        Manufacturer="SIEMENS",
        ImageType=lambda c, k: kinds[c % 2],
        EchoTime=lambda c, k: times[c // 2],
        EchoNumbers=lambda c, k: c // 2 + 1,
    )
    facts = [{"part": {"echo": times[c // 2], "type": kinds[c % 2]}} for c in range(4)]
    return mixed(made), [Expected(voxels[c : c + 1], OBLIQUE.affine, facts[c]) for c in range(4)]


@case("two phases of a CT", not_asked="dcm2niix merges the acquisitions of a CT unless they have times of their own")
def _():
    voxels = phantom(2)
    made = classic(voxels, AXIAL, SOPClassUID=dicoms.CT, Modality="CT", AcquisitionNumber=lambda c, k: c + 1)
    return mixed(made), [Expected(voxels[c : c + 1], AXIAL.affine, {"part": {"acquisition": c + 1}}) for c in range(2)]


@case("three orientations of several slices each")
def _():
    grids = (AXIAL, OBLIQUE, SAGITTAL)
    voxels = [phantom(start=1 + 700 * n) for n in range(3)]
    made = [ds for v, g in zip(voxels, grids, strict=True) for ds in classic(v, g)]
    return mixed(made), [Expected(v, g.affine) for v, g in zip(voxels, grids, strict=True)]


# ---- time and b-value

B = (0, 500, 1000)


def diffusion(**elements):
    """Three b-values."""
    voxels = phantom(3)
    made = classic(voxels, **elements)
    return voxels, made


@case("b-values by the standard's element", not_asked="dcm2niix orders by instance number, which tells nothing here")
def _():
    voxels, made = diffusion(DiffusionBValue=lambda c, k: float(B[c]))
    return mixed(made), [Expected(voxels, OBLIQUE.affine, {"axis": "b", "values": list(B)})]


def private(made: list, element: int, creator: str, vr: str, value: Callable) -> list:
    """Each object with a private element, ``value`` being a function of its number."""
    for n, ds in enumerate(made):
        ds.add_new((element >> 16) << 16 | 0x10, "LO", creator)
        ds.add_new(element, vr, value(n))
    return made


@case("b-values of Siemens")
def _():
    voxels, made = diffusion(Manufacturer="SIEMENS")
    private(made, 0x0019100C, "SIEMENS MR HEADER", "IS", lambda n: str(B[n // 5]))
    return shuffled(made), [Expected(voxels, OBLIQUE.affine, {"axis": "b", "values": list(B)})]


@case("b-values of GE")
def _():
    """The first number is the b-value, in some software plus 1e9."""
    voxels, made = diffusion(Manufacturer="GE MEDICAL SYSTEMS")
    private(made, 0x00431039, "GEMS_PARM_01", "IS", lambda n: [str(B[n // 5] + 10**9 * (n // 5 > 0)), "8", "0", "0"])
    return shuffled(made), [Expected(voxels, OBLIQUE.affine, {"axis": "b", "values": list(B)})]


@case("b-values of Philips")
def _():
    voxels, made = diffusion(Manufacturer="Philips Medical Systems")
    private(made, 0x20011003, "Philips Imaging DD 001", "FL", lambda n: float(B[n // 5]))
    return shuffled(made), [Expected(voxels, OBLIQUE.affine, {"axis": "b", "values": list(B)})]


@case("b-values of Philips in another private block", not_asked="dcm2niix knows the element only in its usual block")
def _():
    voxels, made = diffusion(Manufacturer="Philips Medical Systems")
    for n, ds in enumerate(made):
        ds.add_new(0x20010010, "LO", "SOMEBODY ELSE")
        ds.add_new(0x20011003, "FL", float(n))
        ds.add_new(0x20010011, "LO", "Philips Imaging DD 001")
        ds.add_new(0x20011103, "FL", float(B[n // 5]))
    return mixed(made), [Expected(voxels, OBLIQUE.affine, {"axis": "b", "values": list(B)})]


@case("trigger times")
def _():
    voxels, times = phantom(3), (0.0, 41.5, 83.0)
    made = classic(voxels, TriggerTime=lambda c, k: times[c])
    return shuffled(made), [Expected(voxels, OBLIQUE.affine, {"axis": "trigger", "values": list(times)})]


@case("temporal positions")
def _():
    voxels = phantom(4)
    made = classic(voxels, TemporalPositionIdentifier=lambda c, k: c + 1, NumberOfTemporalPositions=4)
    return shuffled(made), [Expected(voxels, OBLIQUE.affine, {"axis": "temporal", "values": [1, 2, 3, 4]})]


@case("acquisition numbers of an EPI")
def _():
    voxels = phantom(3)
    made = classic(voxels, AcquisitionNumber=lambda c, k: c + 1)
    return shuffled(made), [Expected(voxels, OBLIQUE.affine, {"axis": "acquisition", "values": [1, 2, 3]})]


@case("b-values that repeat")
def _():
    """Unweighted, then one weight in two directions: the acquisition number tells them apart."""
    voxels, b = phantom(3), (0, 1000, 1000)
    made = classic(voxels, Manufacturer="SIEMENS", DiffusionBValue=lambda c, k: float(b[c]), AcquisitionNumber=lambda c, k: c + 1)
    return shuffled(made), [Expected(voxels, OBLIQUE.affine)]


@case("one slice over time")
def _():
    """A cine of the heart: 2-D and time."""
    voxels, times = phantom(4, (12, 10, 1)), (0.0, 30.5, 61.0, 91.5)
    made = classic(voxels, TriggerTime=lambda c, k: times[c])
    return shuffled(made), [Expected(voxels, OBLIQUE.affine, {"axis": "trigger", "values": list(times)})]


@case("only instance numbers order an EPI of GE")
def _():
    voxels = phantom(3)
    made = classic(voxels, Manufacturer="GE MEDICAL SYSTEMS", AcquisitionNumber=1, NumberOfTemporalPositions=3)
    return shuffled(made), [Expected(voxels, OBLIQUE.affine, {"axis": "number"})]


@case("only acquisition times order", not_asked="dcm2niix orders by instance number, which tells nothing here")
def _():
    voxels = phantom(3)
    made = classic(voxels, AcquisitionDate="20200102", AcquisitionTime=lambda c, k: f"10{c:02d}30.250000")
    return mixed(made), [Expected(voxels, OBLIQUE.affine, {"axis": "time"})]


@case("frames of a dynamic PET")
def _():
    voxels, times = phantom(3), (5000.0, 15000.0, 40000.0)
    made = classic(
        voxels,
        AXIAL,
        SOPClassUID=dicoms.PET,
        Modality="PT",
        EchoTime=None,
        FrameReferenceTime=lambda c, k: times[c],
        RescaleSlope=lambda c, k: dicoms.decimal(0.25 + 0.5 * c),
        RescaleIntercept=0,
    )
    real = voxels * np.array([0.25, 0.75, 1.25]).reshape(3, 1, 1, 1)
    return shuffled(made), [Expected(real, AXIAL.affine, {"axis": "frame_time", "values": list(times)})]


# ---- values


@case("CT with a rescale of its own in each slice")
def _():
    voxels = phantom()
    slopes, intercepts = [1, 0.5, 2, 1.25, 1], [-1024, -1000, 0, 3.5, -1024]
    made = classic(
        voxels,
        AXIAL,
        SOPClassUID=dicoms.CT,
        Modality="CT",
        EchoTime=None,
        RescaleSlope=lambda c, k: slopes[k],
        RescaleIntercept=lambda c, k: intercepts[k],
    )
    return shuffled(made), [Expected(voxels * np.array(slopes) + np.array(intercepts), AXIAL.affine)]


@case("PET with a slope of its own in each slice")
def _():
    voxels = phantom()
    slopes = np.array([0.125, 0.25, 1.5, 0.0625, 2.0])
    elements = {"SOPClassUID": dicoms.PET, "Modality": "PT", "EchoTime": None, "RescaleIntercept": 0, "Units": "BQML"}
    made = classic(voxels, AXIAL, RescaleSlope=lambda c, k: dicoms.decimal(slopes[k]), **elements)
    return shuffled(made), [Expected(voxels * slopes, AXIAL.affine)]


@case("twelve signed bits")
def _():
    voxels = (phantom().astype(np.int16) - 300) * 3
    made = classic((voxels & 0xFFF).astype(np.int16), BitsStored=12)
    return made, [Expected(voxels, OBLIQUE.affine)]


@case("ten of sixteen bits")
def _():
    voxels = phantom() % 1024
    return classic(voxels, BitsStored=10), [Expected(voxels, OBLIQUE.affine)]


@case("eight bits")
def _():
    voxels = (phantom() % 256).astype(np.uint8)
    return classic(voxels), [Expected(voxels, OBLIQUE.affine)]


@case("sixteen signed bits")
def _():
    voxels = (phantom().astype(np.int32) * 100 - 30000).astype(np.int16)
    return classic(voxels), [Expected(voxels, OBLIQUE.affine)]


@case("colours of a slice", not_asked="NIfTI has a colour type of its own; test_dicom holds the colours")
def _():
    red, green, blue = ((phantom(start=n)[0] % 251).astype(np.uint8) for n in (1, 90, 170))
    made = classic(phantom())
    for k, ds in enumerate(made):
        pixels = np.stack([red[:, :, k].T, green[:, :, k].T, blue[:, :, k].T], -1)
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
        ds.PixelData = pixels.tobytes()
    return made, [Expected(np.stack([red, green, blue]), OBLIQUE.affine)]


# ---- enhanced multi-frame


@case("enhanced MR, all in shared groups")
def _():
    voxels = phantom()
    return [enhanced.enhanced(frames(voxels))], [Expected(voxels, OBLIQUE.affine)]


@case("enhanced MR of Philips, all per frame, private planes half a pixel off", flags=("-p", "n"))
def _():
    voxels = phantom()
    made = enhanced.enhanced(
        frames(voxels, slope=4.25, intercept=-3, echo=3.1, temporal=1),
        share=False,
        decoy=True,
        Manufacturer="Philips Medical Systems",
        BitsStored=12,
    )
    return [made], [Expected(voxels * 4.25 - 3, OBLIQUE.affine)]


@case("enhanced MR, a slope for each frame")
def _():
    voxels = phantom()
    slopes = [1.5, 2, 0.25, 3, 1]
    made = enhanced.enhanced(
        frames(voxels, slope=lambda c, k: slopes[k], intercept=lambda c, k: k), Manufacturer="Philips Medical Systems"
    )
    return [made], [Expected(voxels * np.array(slopes) + np.arange(5), OBLIQUE.affine)]


@case("enhanced MR of Philips, times of each slice together", flags=("-p", "n"))
def _():
    voxels = phantom(4)
    made = position_major(frames(voxels, slope=2, temporal=lambda c, k: c + 1))
    ds = enhanced.enhanced(
        made, dimensions=("stack", "place", "temporal"), share=False, decoy=True, Manufacturer="Philips Medical Systems"
    )
    return [ds], [Expected(voxels * 2.0, OBLIQUE.affine, {"axis": "temporal", "values": [1, 2, 3, 4]})]


@case("enhanced MR, frames in random order")
def _():
    voxels = phantom(3)
    made = shuffled(frames(voxels, temporal=lambda c, k: c + 1))
    ds = enhanced.enhanced(made, dimensions=("stack", "place", "temporal"))
    return [ds], [Expected(voxels, OBLIQUE.affine, {"axis": "temporal", "values": [1, 2, 3]})]


@case("enhanced MR, slices against the normal")
def _():
    voxels = phantom()
    return [enhanced.enhanced(frames(voxels, place=lambda c, k: 5 - k)[::-1])], [Expected(voxels, OBLIQUE.affine)]


@case("enhanced MR without a dimension index", not_asked="dcm2niix takes the distance of slices wrong without the index")
def _():
    voxels = phantom(2)
    made = frames(voxels, SAGITTAL, stack=None, place=None, temporal=lambda c, k: c + 1)
    return [enhanced.enhanced(made, dimensions=())], [Expected(voxels, SAGITTAL.affine, {"axis": "temporal", "values": [1, 2]})]


@case("enhanced MR whose dimension index contradicts the positions", not_asked="dcm2niix follows the index")
def _():
    voxels = phantom()
    return [enhanced.enhanced(frames(voxels, place=lambda c, k: (3 * k) % 5 + 1))], [Expected(voxels, OBLIQUE.affine)]


@case("one slice over time in an enhanced object", not_asked="dcm2niix stacks the times like slices")
def _():
    voxels = phantom(4, (12, 10, 1))
    made = frames(voxels, temporal=lambda c, k: c + 1, trigger=lambda c, k: 30.5 * c)
    ds = enhanced.enhanced(made, dimensions=("stack", "place", "temporal"))
    return [ds], [Expected(voxels, OBLIQUE.affine)]


@case("breast tomosynthesis", not_asked="dcm2niix is no program for mammograms")
def _():
    voxels = phantom()
    return [enhanced.enhanced(frames(voxels, SAGITTAL), enhanced.TOMOSYNTHESIS)], [Expected(voxels, SAGITTAL.affine)]


@case("echoes in one enhanced object")
def _():
    voxels, times = phantom(2), (4.9, 9.8)
    made = position_major(frames(voxels, echo=lambda c, k: times[c]))
    ds = enhanced.enhanced(made, dimensions=("stack", "place", "echo"))
    return [ds], [Expected(voxels[c : c + 1], OBLIQUE.affine, {"part": {"echo": times[c]}}) for c in range(2)]


@case("magnitude and phase in one enhanced object")
def _():
    voxels = phantom(2)
    kinds = (["ORIGINAL", "PRIMARY", "M", "NONE"], ["ORIGINAL", "PRIMARY", "P", "NONE"])
    component = ("MAGNITUDE", "PHASE")
    made = frames(voxels, type=lambda c, k: kinds[c], component=lambda c, k: component[c])
    ds = enhanced.enhanced(made, dimensions=("stack", "place", "component"), Manufacturer="Philips Medical Systems")
    return [ds], [Expected(voxels[c : c + 1], OBLIQUE.affine, {"part": {"type": kinds[c]}}) for c in range(2)]


@case("two stacks in one enhanced object", not_asked="dcm2niix takes an object for one stack")
def _():
    a, b = phantom(), phantom(start=700)
    made = frames(a, AXIAL) + frames(b, SAGITTAL, stack="2")
    parts = [{"part": {"stack": n}} for n in "12"]
    return [enhanced.enhanced(made)], [Expected(a, AXIAL.affine, parts[0]), Expected(b, SAGITTAL.affine, parts[1])]


@case("two parallel stacks in one enhanced object", not_asked="dcm2niix takes an object for one stack")
def _():
    """Two slabs 100 mm apart: one stack would have a hole."""
    a, b = phantom(), phantom(start=700)
    far = dataclasses.replace(AXIAL, origin=(-31.5, 17.25, 90.0))
    parts = [{"part": {"stack": n}} for n in "12"]
    made = enhanced.enhanced(frames(a, AXIAL) + frames(b, far, stack="2"))
    return [made], [Expected(a, AXIAL.affine, parts[0]), Expected(b, far.affine, parts[1])]


@case("b-values in one enhanced object")
def _():
    voxels = phantom(3)
    direction = (None, (1.0, 0.0, 0.0), (1.0, 0.0, 0.0))
    made = position_major(frames(voxels, b=lambda c, k: B[c], direction=lambda c, k: direction[c]))
    ds = enhanced.enhanced(made, dimensions=("stack", "place", "b"), Manufacturer="Philips Medical Systems")
    return [ds], [Expected(voxels, OBLIQUE.affine, {"axis": "b", "values": list(B)})]


@case("one b-value in three directions")
def _():
    voxels, b = phantom(4), (0, 1300, 1300, 1300)
    direction = (None, (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    made = position_major(frames(voxels, b=lambda c, k: b[c], direction=lambda c, k: direction[c]))
    ds = enhanced.enhanced(made, dimensions=("stack", "place", "b", "direction"))
    order = [0, 3, 2, 1]  # the index ranks directions by their first component
    return [ds], [Expected(voxels[order], OBLIQUE.affine, {"values": list(b)})]


@case("heart phases in one enhanced object")
def _():
    voxels, times = phantom(3), (0.0, 41.5, 83.0)
    made = position_major(frames(voxels, trigger=lambda c, k: times[c], temporal=lambda c, k: c + 1))
    ds = enhanced.enhanced(made, dimensions=("stack", "place", "trigger"))
    return [ds], [Expected(voxels, OBLIQUE.affine)]


@case("enhanced MR of Siemens XA, an object for each time")
def _():
    voxels = phantom(3)
    made = []
    for t in range(3):
        own = frames(voxels[t : t + 1], temporal=t + 1, acquisition=t + 1, slope=1, intercept=0)
        elements = {
            "InstanceNumber": t + 1,
            "AcquisitionNumber": t + 1,
            "Manufacturer": "Siemens",
            "SoftwareVersions": "syngo MR XA30",
        }
        made.append(enhanced.enhanced(own, dimensions=("stack", "place", "temporal"), share=False, **elements))
    return made[::-1], [Expected(voxels, OBLIQUE.affine, {"axis": "temporal", "values": [1, 2, 3]})]


@case("enhanced MR of Canon, time by time with offsets")
def _():
    voxels = phantom(3)
    made = frames(voxels, temporal=lambda c, k: c + 1, offset=lambda c, k: 2.5 * c, acquisition=lambda c, k: c + 1)
    ds = enhanced.enhanced(made, dimensions=("stack", "temporal", "place"), Manufacturer="CANON_MEC")
    return [ds], [Expected(voxels, OBLIQUE.affine, {"axis": "temporal", "values": [1, 2, 3]})]


@case("enhanced CT")
def _():
    voxels = phantom(start=100)
    made = frames(voxels, AXIAL, slope=1, intercept=-1024, type=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])
    return [enhanced.enhanced(made, enhanced.ENHANCED_CT)], [Expected(voxels - 1024.0, AXIAL.affine)]


@case("enhanced PET with slopes of its own in each frame")
def _():
    voxels, slopes = phantom(2), [0.125, 0.25, 1.5, 0.0625, 2.0]
    made = frames(voxels, AXIAL, slope=lambda c, k: slopes[k] * (c + 1), temporal=lambda c, k: c + 1)
    ds = enhanced.enhanced(made, enhanced.ENHANCED_PET, dimensions=("stack", "temporal", "place"))
    real = voxels * np.array(slopes) * np.array([1, 2]).reshape(2, 1, 1, 1)
    return [ds], [Expected(real, AXIAL.affine, {"axis": "temporal", "values": [1, 2]})]


@case("one volume in two enhanced objects", not_asked="dcm2niix writes a volume for each object")
def _():
    voxels = phantom()
    made = frames(voxels)
    objects = [enhanced.enhanced(made[:2], InstanceNumber=1), enhanced.enhanced(made[2:], InstanceNumber=2)]
    return objects[::-1], [Expected(voxels, OBLIQUE.affine)]


@case("an enhanced object for each slice")
def _():
    voxels = phantom()
    made = [enhanced.enhanced([f], InstanceNumber=n + 1) for n, f in enumerate(frames(voxels))]
    return shuffled(made), [Expected(voxels, OBLIQUE.affine)]


@case("concatenation of an enhanced object", not_asked="dcm2niix writes a volume for each object")
def _():
    voxels = phantom(2)
    made = position_major(frames(voxels, temporal=lambda c, k: c + 1))
    objects = [
        enhanced.enhanced(
            made[at : at + 5],
            dimensions=("stack", "place", "temporal"),
            ConcatenationUID="1.2.3.4.8",
            SOPInstanceUIDOfConcatenationSource="1.2.3.4.10",
            InConcatenationNumber=n + 1,
            InConcatenationTotalNumber=2,
            ConcatenationFrameOffsetNumber=at,
        )
        for n, at in enumerate((0, 5))
    ]
    return objects[::-1], [Expected(voxels, OBLIQUE.affine, {"axis": "temporal", "values": [1, 2]})]


@case("legacy converted CT")
def _():
    voxels = phantom(start=100)
    made = frames(voxels, AXIAL, slope=1, intercept=-1024)
    return [enhanced.enhanced(made, enhanced.LEGACY_CT, dimensions=())], [Expected(voxels - 1024.0, AXIAL.affine)]


@case("legacy converted MR")
def _():
    voxels = phantom()
    return [enhanced.enhanced(shuffled(frames(voxels)), enhanced.LEGACY_MR, dimensions=())], [Expected(voxels, OBLIQUE.affine)]


@case("legacy converted PET with slopes", not_asked="without a dimension index dcm2niix takes the first slope for all frames")
def _():
    voxels, slopes = phantom(), [0.125, 0.25, 1.5, 0.0625, 2.0]
    made = frames(voxels, AXIAL, slope=lambda c, k: slopes[k])
    return [enhanced.enhanced(made, enhanced.LEGACY_PET, dimensions=())], [Expected(voxels * np.array(slopes), AXIAL.affine)]


@case("enhanced object of one frame")
def _():
    voxels = phantom()[..., :1]
    return [enhanced.enhanced(frames(voxels))], [Expected(voxels, OBLIQUE.affine)]


@case("reconstructed tomography of nuclear medicine")
def _():
    voxels = phantom()
    return [enhanced.emission(voxels)], [Expected(voxels, AXIAL.affine)]


@case("nuclear medicine stacked against the normal", not_asked="dcm2niix ignores the sign of the spacing")
def _():
    voxels = phantom()
    affine = AXIAL.affine.copy()
    affine[:, 2] *= -1
    ds = enhanced.emission(voxels, SpacingBetweenSlices=dicoms.decimal(-AXIAL.gap))
    return [ds], [Expected(voxels, affine)]


# ---- mosaics of Siemens


@case("mosaic")
def _():
    voxels = phantom()
    return mosaic(voxels), [Expected(voxels, OBLIQUE.affine)]


@case("mosaic with tiles against the normal")
def _():
    voxels = phantom()
    affine = OBLIQUE.affine.copy()
    affine[:, 2] *= -1
    return mosaic(voxels, sign=-1), [Expected(voxels, affine)]


@case("mosaics over time")
def _():
    voxels = phantom(3, (12, 10, 7))
    return mosaic(voxels, SAGITTAL)[::-1], [Expected(voxels, SAGITTAL.affine, {"axis": "acquisition", "values": [1, 2, 3]})]


@case("mosaic whose private header is in another block", not_asked="dcm2niix knows the header only in its usual block")
def _():
    voxels = phantom()
    made = mosaic(voxels, header=False)
    for ds in made:
        ds.add_new(0x00290010, "LO", "SOMEBODY ELSE")
        ds.add_new(0x00291010, "OB", b"SV10" + bytes(60))
        ds.add_new(0x00290011, "LO", "SIEMENS CSA HEADER")
        ds.add_new(0x00291110, "OB", enhanced.siemens_header(5, OBLIQUE.normal))
    return made, [Expected(voxels, OBLIQUE.affine)]


@case("mosaics of two echoes")
def _():
    voxels, times = phantom(2), (12.0, 30.0)
    made = mosaic(voxels, EchoTime=lambda c: times[c], EchoNumbers=lambda c: c + 1, AcquisitionNumber=1)
    return made, [Expected(voxels[c : c + 1], OBLIQUE.affine, {"part": {"echo": times[c]}}) for c in range(2)]


@case("full mosaic of nine tiles")
def _():
    voxels = phantom(1, (12, 10, 9))
    return mosaic(voxels), [Expected(voxels, OBLIQUE.affine)]


# ---- the judges


@pytest.mark.parametrize("name", CASES)
def test_known_answer(tmp_path, name):
    folder = folder_of(tmp_path, CASES[name].write())
    expected = CASES[name].volumes()
    headers, rejections = read_headers(str(folder))
    assert [(r.reason, r.message) for r in rejections] == []
    volumes = [read_volume(h) for h in headers]
    found = matched(expected, [(v.array, v.affine) for v in volumes], [h.uid for h in headers])
    for wanted, n in zip(expected, found, strict=True):
        facts = headers[n].facts
        facts["part"] = {k: v for k, v in facts.get("part", {}).items() if k in wanted.facts.get("part", facts.get("part", {}))}
        assert {k: facts[k] for k in wanted.facts} == wanted.facts
        assert len(facts.get("values", [0] * wanted.array.shape[0])) == wanted.array.shape[0] or "axis" not in facts
        assert facts["decoders"] == ["native"]
        if len(expected) == 1:
            assert not facts["part"]
    sources = sorted(s for v in volumes for s in v.sources)
    assert set(sources) == {f"file://{p.resolve()}" for p in folder.iterdir()}


@pytest.mark.parametrize("name", CASES)
def test_same_whatever_the_order_of_files(tmp_path, name):
    made = CASES[name].write()
    here, _ = read_headers(str(dicoms.write(tmp_path / "a", made)))
    there, _ = read_headers(str(dicoms.write(tmp_path / "b", made[::-1])))
    assert sorted(h.uid for h in here) == sorted(h.uid for h in there)


@pytest.mark.parametrize("seed", range(8))
def test_any_grid_in_any_object(tmp_path, seed):
    """One phantom on a random grid, as slices, frames, split frames and mosaics, is the same volume."""
    rng = np.random.default_rng(seed)
    grid = dicoms.Grid(
        origin=tuple(np.round(rng.uniform(-200, 200, 3), 3)),
        orientation=dicoms.turned(*rng.uniform(-np.pi, np.pi, 3)),
        spacing=tuple(np.round(rng.uniform(0.2, 3, 2), 3)),
        gap=float(np.round(rng.uniform(0.6, 6), 2)),
    )
    times, slices = int(rng.integers(1, 4)), int(rng.integers(4, 12))
    voxels = phantom(times, (int(rng.integers(5, 14)), int(rng.integers(5, 14)), slices))
    time = {"temporal": lambda c, k: c + 1}
    made = shuffled(frames(voxels, grid, **time), seed)
    cut = int(rng.integers(1, len(made)))
    dimensions = ("stack", "temporal", "place")
    ways = {
        "slices": shuffled(classic(voxels, grid, TemporalPositionIdentifier=lambda c, k: c + 1), seed),
        "frames": [enhanced.enhanced(made, dimensions=dimensions)],
        "frames in two objects": [enhanced.enhanced(part, dimensions=dimensions) for part in (made[:cut], made[cut:])],
        "mosaics": mosaic(voxels, grid),
    }
    for way, series in ways.items():
        volumes, rejections = read_archive(str(dicoms.write(tmp_path / way, series)))
        assert [(r.reason, r.message) for r in rejections] == [], way
        matched([Expected(voxels, grid.affine)], [(v.array, v.affine) for v in volumes], [way] * len(volumes))


@pytest.mark.parametrize("name", CASES)
def test_peer(tmp_path, name):
    """dcm2niix gives the known answer too."""
    if CASES[name].not_asked:
        pytest.skip(CASES[name].not_asked)
    folder = folder_of(tmp_path, CASES[name].write())
    written = by_dcm2niix(folder, tmp_path / "out", *CASES[name].flags)
    matched(CASES[name].volumes(), list(written.values()), list(written))


@pytest.mark.parametrize("folder, order", [
    ("identified_study/12-T1post-05670", [0]),
    ("identified_study/13_HCropVolume", [0]),
    ("dicom2nifti/philips_enhanced/anatomical/001_implicit", [0]),
    ("dicom2nifti/philips_enhanced/fmri/001", [0, 1, 2, 3]),
    ("dicom2nifti/philips_enhanced/dti/001", [3, 0, 1, 2]),  # dcm2niix puts the unweighted one last
])  # fmt: skip
def test_peer_on_scans(shared_data, tmp_path, folder, order):
    """Scans of patients, in the values that Philips displays (slope and intercept)."""
    ((array, affine),) = by_dcm2niix(shared_data / "dicom" / folder, tmp_path / "out", "-p", "n").values()
    (volume,), rejections = read_archive(str(shared_data / "dicom" / folder))
    assert rejections == []
    assert difference((array[order], affine), (volume.array, volume.affine)) == ""
