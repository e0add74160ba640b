"""Edited files: whatever is in them, each ends in exactly one volume or refusal, and nothing else is raised.

The edits know the structure: elements of DICOM, facts of a series, entries of archives, fields of NIfTI. For edits of bytes see
``benchmarks/fuzz.py``. The examples are the same each time; ``HYPOTHESIS_PROFILE=default`` takes others.
"""

import gzip
import io
import pathlib
import re
import struct
import tarfile
import tempfile
import warnings
import zipfile
from collections import Counter

import nibabel as nib
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.datadict import dictionary_VR, tag_for_keyword

from sparkmed import formats, storage

from . import dicoms, enhanced

PIXELS = np.arange(5 * 6, dtype=np.uint16).reshape(5, 6)


def fuzz(examples: int):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=examples, deadline=None, suppress_health_check=checks)


def check(files: dict[str, bytes]) -> Counter:
    """Reads the files as an archive; how many volumes came, and which reasons."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (pathlib.Path(folder) / name).write_bytes(data)
        headers, _ = formats.read_headers(folder)
        volumes, rejections = formats.read_archive(folder)
        used, refused = [s for v in volumes for s in v.sources], [r.uri for r in rejections]
        named = used + refused
        assert len(refused) == len(set(refused)), refused
        several = {h.sources for h in headers if len({x.uid for x in headers if x.sources == h.sources}) > 1}
        once = [n for n in used if (n,) not in several]  # an object of many frames may make several volumes
        assert len(once) == len(set(once)), used
        both = [r for r in rejections if r.uri in used]  # some of its frames
        assert all(re.match(r"(\d+) of (?!\1 )\d+ frames: ", r.message) for r in both), both
        plain = {re.sub(r"#\d+$", "", n).rsplit("::", 1)[-1] for n in named}  # a member's second of its name is its #2
        assert plain == {f.uri for f in storage.walk(folder)}
    shapes = {(h.sources, tuple(h.shape)) for h in headers}
    for v in volumes:
        assert (v.sources, v.array.shape) in shapes
        assert np.isfinite(v.array).all() and np.isfinite(v.affine).all() and v.affine.shape == (4, 4)
        assert abs(np.linalg.det(v.affine[:3, :3])) > 0
    for r in rejections:
        assert r.reason.isupper() and dicoms.SECRET not in r.message
    return Counter(r.reason for r in rejections) + Counter({"": len(volumes)})


# elements of a DICOM object

LONG = (b"OB", b"OW", b"OF", b"OD", b"SQ", b"UN", b"UT", b"UC", b"UR", b"OL", b"OV", b"SV", b"UV")


def parsed(data: bytes) -> list[tuple[bytes, bytes, bytes, int | None]]:
    """(tag, VR, value, undefined length or None) of the elements behind the meta group, explicit little endian."""
    at = 144 + int.from_bytes(data[140:144], "little")
    found = []
    while at < len(data):
        tag, vr = data[at : at + 4], data[at + 4 : at + 6]
        begin = at + (12 if vr in LONG else 8)
        length = int.from_bytes(data[at + 8 : at + 12] if vr in LONG else data[at + 6 : at + 8], "little")
        found.append((tag, vr, data[begin : begin + length], length if length == 0xFFFFFFFF else None))
        at = begin + length
    return found


def encoded(tag: bytes, vr: bytes, value: bytes, claims: int | None = None) -> bytes:
    length = len(value) if claims is None else claims
    return tag + vr + (struct.pack("<HL", 0, length) if vr in LONG else struct.pack("<H", length & 0xFFFF)) + value


def whole(**elements) -> bytes:
    return dicoms.encoded(
        dicoms.dataset(PIXELS, InstanceNumber=1, RescaleSlope=2, RescaleIntercept=-1024, SliceThickness=3, EchoTime=7, **elements)
    )


def compressed(syntax: str) -> bytes:
    ds = dicoms.dataset(np.arange(36 * 40, dtype=np.uint16).reshape(36, 40), InstanceNumber=1)
    ds.compress(syntax, generate_instance_uid=False)
    return dicoms.encoded(ds)


VOXELS = np.arange(2 * 4 * 5 * 3, dtype=np.uint16).reshape(2, 4, 5, 3)
FRAMED = [
    dicoms.encoded(enhanced.enhanced(enhanced.frames(VOXELS, echo=lambda c, k: 5.0 + c))),
    dicoms.encoded(
        enhanced.enhanced(enhanced.frames(VOXELS, temporal=lambda c, k: c + 1), dimensions=("stack", "place", "temporal"))
    ),
    dicoms.encoded(enhanced.mosaic(VOXELS[:1])[0]),
    dicoms.encoded(enhanced.emission(VOXELS[:1])),
]
"""Objects of many frames, and a mosaic."""
BASES = [whole(), compressed("1.2.840.10008.1.2.5"), compressed("1.2.840.10008.1.2.4.90"), compressed("1.2.840.10008.1.2.4.80")]
NUMBERS = [b"nan", b"inf", b"-1", b"0", b"1e308", b"-1e308", b"1e-320", b"1e400", b"007", b"1.5", b"1,5", b"0x10", b"99999999999"]
VALUES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(NUMBERS),
    st.lists(st.sampled_from(NUMBERS), min_size=2, max_size=7).map(b"\\".join),
    st.integers(0, 65535).map(lambda n: struct.pack("<H", n)),
    st.sampled_from(
        [b"", b" ", b"\0\0", b"\\\\", b"ISO 2022 IR 87", b"MONOCHROME1 ", b"PALETTE COLOR ", b"YBR_FULL", b"A" * 70000]
    ),
)
VRS = st.sampled_from(
    [b"UN", b"SQ", b"US", b"SS", b"DS", b"IS", b"FD", b"OB", b"OW", b"LO", b"UI", b"PN", b"UT", b"??", b"\0\0", b"AT"]
)
CLAIMS = st.sampled_from([0, 1, 3, 7, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF])
TAGS = st.sampled_from(
    [
        b"\x28\0\x00\x30",
        b"\x28\0\x08\0",
        b"\x08\0\x40\x11",
        b"\x09\0\x10\0",
        b"\x09\0\x01\x10",
        b"\xe0\x7f\x08\0",
        b"\x18\0\x87\x90",
        b"\x00\x52\x29\x92",
        b"\x00\x52\x30\x92",
        b"\xfe\xff\x0d\xe0",
        b"\xfe\xff\x00\xe0",
        b"\x04\0\x20\x12",
        b"\x28\0\x02\x12",
    ]
)
PLACE = st.integers(0, 60)
EDITS = st.one_of(
    st.tuples(st.just("value"), PLACE, VALUES),
    st.tuples(st.just("vr"), PLACE, VRS),
    st.tuples(st.just("length"), PLACE, CLAIMS),
    st.tuples(st.just("drop"), PLACE, st.none()),
    st.tuples(st.just("again"), PLACE, VALUES),
    st.tuples(st.just("swap"), PLACE, PLACE),
    st.tuples(st.just("insert"), PLACE, st.tuples(TAGS, VRS, VALUES)),
    st.tuples(st.just("nest"), PLACE, st.tuples(TAGS, st.booleans(), st.integers(1, 30))),
)


def edited(data: bytes, edits) -> bytes:
    head, elements = data[: 144 + int.from_bytes(data[140:144], "little")], [list(e) for e in parsed(data)]
    for kind, place, how in edits:
        place %= max(1, len(elements))
        if kind == "insert":
            elements.insert(place, [*how, None])
        elif kind == "nest":
            tag, undefined, depth = how
            elements.insert(place, [tag, b"SQ", items(tag, undefined, depth), 0xFFFFFFFF if undefined else None])
        elif elements:
            e = elements[place]
            if kind == "drop":
                del elements[place]
            elif kind == "again":
                elements.insert(place, [e[0], e[1], how, None])
            elif kind == "swap":
                other = how % len(elements)
                elements[place], elements[other] = elements[other], e
            else:
                elements[place] = [e[0], *{"value": (e[1], how, None), "vr": (how, e[2], e[3]), "length": (e[1], e[2], how)}[kind]]
    return head + b"".join(encoded(*e) for e in elements)


SCARS = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=4)), max_size=4)


def scarred(data: bytes, scars, cut: int) -> bytes:
    data = bytearray(data)
    for at, new in scars:
        at %= max(1, len(data))
        data[at : at + len(new)] = new
    return bytes(data[: len(data) - cut % (len(data) + 1)])


def items(tag: bytes, undefined: bool, depth: int) -> bytes:
    value = b""
    for level in range(depth):
        inner = encoded(tag, b"SQ", value, 0xFFFFFFFF if undefined else None) if level else b""
        value = b"\xfe\xff\0\xe0" + struct.pack("<L", 0xFFFFFFFF if undefined else len(inner)) + inner
        value += b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0" if undefined else b""
    return value


def test_unedited_files_are_volumes():
    for data in BASES:
        assert edited(data, []) == data
        assert check({"x.dcm": data}) == {"": 1}


@fuzz(700)
@given(st.sampled_from(BASES), st.lists(EDITS, min_size=1, max_size=6), st.integers(0, 30))
def test_elements_of_an_object(data, edits, cut):
    data = edited(data, edits)
    check({"x.dcm": data[: len(data) - cut] if cut < 10 else data})


@fuzz(300)
@given(st.sampled_from(FRAMED), st.lists(EDITS, max_size=3), SCARS)
def test_elements_of_an_object_of_many_frames(data, edits, scars):
    """Also of the items of its sequences: bytes anywhere in it are other ones."""
    check({"x.dcm": scarred(edited(data, edits), scars, 0)})


# facts of a series

COORDINATE = st.one_of(
    st.integers(-3, 3).map(str),
    st.floats(-1e4, 1e4).map(lambda x: f"{x:.8g}"),
    st.sampled_from(["NaN", "inf", "1e308", "-1e308", "1e-300", "", "1e16"]),
)
DIRECTIONS = st.sampled_from(
    [["1", "0", "0", "0", "1", "0"], ["0", "1", "0", "0", "0", "-1"], ["1", "0", "0", "1", "0", "0"], ["0"] * 6, ["1", "0", "0"],
     ["0.6", "0.8", "0", "-0.8", "0.6", "0"], ["NaN", "0", "0", "0", "1", "0"], ["1e200", "0", "0", "0", "1e200", "0"]]
)  # fmt: skip
FACTS = st.one_of(
    st.tuples(st.just("ImagePositionPatient"), st.lists(COORDINATE, min_size=3, max_size=3)),
    st.tuples(st.just("ImagePositionPatient"), st.integers(-5, 5).map(lambda z: ["-10", "20", str(30 + 2.5 * z)])),
    st.tuples(st.just("ImageOrientationPatient"), DIRECTIONS),
    st.tuples(st.just("PixelSpacing"), st.lists(COORDINATE, min_size=1, max_size=3)),
    st.tuples(
        st.sampled_from(["InstanceNumber", "AcquisitionNumber", "EchoNumbers"]), st.sampled_from(["0", "1", "2", "-1", "", "x"])
    ),
    st.tuples(
        st.sampled_from(["EchoTime", "TriggerTime", "SliceThickness", "SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept"]),
        COORDINATE,
    ),
    st.tuples(
        st.sampled_from(["SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID"]),
        st.sampled_from(["1.2.3", "1.2.4", "", None]),
    ),
    st.tuples(st.just("ImageType"), st.sampled_from([["ORIGINAL", "PRIMARY", "LOCALIZER"], ["DERIVED"], None, ["MOSAIC"]])),
    st.tuples(st.just("Modality"), st.sampled_from(["MR", "CT", "PT", "SEG", "", "US"])),
    st.tuples(st.sampled_from(["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "StudyInstanceUID"]), st.none()),
    st.tuples(st.sampled_from(["Rows", "NumberOfFrames", "BitsStored"]), st.integers(0, 6)),
)
SLICES = [dicoms.encoded(ds) for ds in dicoms.series(dicoms.stack((6, 5, 5)))]


@fuzz(500)
@given(st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, 4, None]), FACTS), min_size=1, max_size=8))
def test_facts_of_a_series(edits):
    files = {}
    for n, data in enumerate(SLICES):
        elements = {tag: value for place, (tag, value) in edits if place in (n, None)}
        files[f"{n}.dcm"] = with_facts(data, elements)
    check(files)


def with_facts(data: bytes, facts: dict) -> bytes:
    """The object with text values put in as bytes, whatever the library thinks of them."""
    known = {t: (vr, v) for t, vr, v, _ in parsed(data)}
    for name, value in facts.items():
        number = tag_for_keyword(name)
        tag = struct.pack("<HH", number >> 16, number & 0xFFFF)
        if value is None:
            known.pop(tag, None)
            continue
        if isinstance(value, int):
            value = str(value).encode() if name == "NumberOfFrames" else struct.pack("<H", value)
        else:
            value = "\\".join([value] if isinstance(value, str) else value).encode()
        known[tag] = (dictionary_VR(number).encode(), value + b" " * (len(value) % 2))
    ordered = sorted(known, key=lambda t: (t[1], t[0], t[3], t[2]))
    return data[: 144 + int.from_bytes(data[140:144], "little")] + b"".join(encoded(t, *known[t]) for t in ordered)


# archives

NAMES = st.sampled_from(
    [
        "a.dcm",
        "b.dcm",
        "a.dcm",
        "../up",
        "/abs",
        "C:\\x",
        "dir/",
        "dir/c.dcm",
        "z.zip",
        "t.tar.gz",
        "a::b",
        "\u00fc",
        "x" * 300,
        ".",
        "..",
        "a\\b",
    ]
)
CONTENTS = st.sampled_from([whole(), b"", b"text", whole()[:200], bytes(3000)])
MEMBERS = st.lists(st.tuples(NAMES, CONTENTS, st.integers(0, 6)), max_size=5)


@fuzz(400)
@given(MEMBERS, SCARS, st.sampled_from([0, 0, 0, 1, 22, 100, 600]))
def test_entries_of_a_zip(members, scars, cut):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, data, kind in members:
            info = zipfile.ZipInfo("x")
            info.filename = name
            info.compress_type = zipfile.ZIP_DEFLATED if kind % 2 else zipfile.ZIP_STORED
            info.external_attr = 0o120777 << 16 if kind == 6 else 0
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the name that is there already
                z.writestr(info, data)
    check({"x.zip": scarred(out.getvalue(), scars, cut)})


@fuzz(400)
@given(MEMBERS, SCARS, st.sampled_from([0, 0, 0, 1, 512, 10240]), st.sampled_from(["", ".gz", ".bz2", ".xz"]))
def test_entries_of_a_tar(members, scars, cut, packing):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{packing.strip('.')}") as t:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.type = [
                tarfile.REGTYPE,
                tarfile.REGTYPE,
                tarfile.SYMTYPE,
                tarfile.DIRTYPE,
                tarfile.FIFOTYPE,
                b"Z",
                tarfile.REGTYPE,
            ][kind]
            t.addfile(info, io.BytesIO(data))
    check({f"x.tar{packing}": scarred(out.getvalue(), scars, cut)})


# NIfTI

HEADERS = {"n1": nib.Nifti1Header, "n2": nib.Nifti2Header}
FIELDS = [f for f in nib.Nifti1Header.template_dtype.names if f in nib.Nifti2Header.template_dtype.names]
FIELD_VALUES = st.sampled_from([0, 1, -1, 2, 3, 7, 8, 16, 64, 127, 32767, -32768, float("nan"), float("inf"), -1e38, 1e-30, 4096.5])


@fuzz(500)
@given(
    st.sampled_from(sorted(HEADERS)),
    st.lists(st.tuples(st.sampled_from(FIELDS), st.integers(0, 7), FIELD_VALUES), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([0, 0, 0, 1, 50, 1000]),
    st.booleans(),
)
def test_fields_of_nifti(kind, edits, packed, cut, swapped):
    header = HEADERS[kind]()
    header.set_data_dtype(np.int16)
    header.set_data_shape((4, 5, 6))
    header.set_sform(np.diag([2.0, 2.0, 3.0, 1.0]), 1)
    header["magic"] = b"n+1" if kind == "n1" else b"n+2\0\r\n\x1a\n"
    header["vox_offset"] = 352 if kind == "n1" else 544
    if swapped:
        header = header.as_byteswapped(">")
    for field, place, value in edits:
        with np.errstate(all="ignore"):
            if header[field].dtype.kind == "S":
                header[field] = str(value).encode()[: header[field].dtype.itemsize]
                continue
            number = np.array(value).astype(header[field].dtype)
            if header[field].ndim:
                header[field].flat[place % header[field].size] = number
            else:
                header[field] = number
    data = header.binaryblock + bytes(4) + np.arange(120, dtype=np.int16).tobytes()
    data = data[: len(data) - cut]
    check({"x.nii.gz": gzip.compress(data)} if packed else {"x.nii": data})
