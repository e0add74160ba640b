import doctest
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmed.hcs import filenames
from sparkmed.hcs.filenames import Plane, parse
from sparkmed.rejection import InputError, Refused

UUID = "0A1B2C3D-4E5F-6071-8293-A4B5C6D7E8F9"

# path: (kind, convention, plate, well, site, z, t, channel), written after the vendors' forms of names
IMAGEXPRESS = {
    f"screen/P1/TimePoint_1/P1_A01_s1_w1{UUID}.tif": ("image", "P1", "A01", 1, None, 1, "1"),
    f"screen/P1/TimePoint_1/P1_A01_s1_w2{UUID}.tif": ("image", "P1", "A01", 1, None, 1, "2"),
    f"screen/P1/TimePoint_12/P1_H12_s16_w5{UUID}.tif": ("image", "P1", "H12", 16, None, 12, "5"),
    f"screen/P1/TimePoint_1/P1_A01_s1_w1_thumb{UUID}.tif": ("thumbnail", "P1", "A01", 1, None, 1, "1"),
    f"screen/P1/TimePoint_1/ZStep_3/P1_A01_s1_w1{UUID}.tif": ("image", "P1", "A01", 1, 3, 1, "1"),
    f"screen/P1/TimePoint_1/ZStep_3/P1_A01_s1_w1_thumb{UUID}.tif": ("thumbnail", "P1", "A01", 1, 3, 1, "1"),
    f"screen/P1/TimePoint_1/ZStep_0/P1_A01_s1_w1{UUID}.tif": ("projection", "P1", "A01", 1, None, 1, "1"),
    f"2021-03-04/1234/ZStep_2/P1_P24_s9_w4{UUID}.tif": ("image", "P1", "P24", 9, 2, None, "4"),
    f"P/My_Plate_2_AF48_s1_w1{UUID}.tif": ("image", "My_Plate_2", "AF48", 1, None, None, "1"),  # 1536 wells
    f"P/Z_AA01_w10{UUID}.tif": ("image", "Z", "AA01", None, None, None, "10"),  # one site
    "P/Plate10x4sites_A01_s1_w1.TIF": ("image", "Plate10x4sites", "A01", 1, None, None, "1"),
    "P/TimePoint_1/A01_s02_w1.tif": ("image", "P", "A01", 2, None, 1, "1"),  # plate by its folder
    "runs/P2.tar.gz/TimePoint_1/A01_s02_w1.tif": ("image", "P2", "A01", 2, None, 1, "1"),
    "P/a01_s1_w1.tif": ("image", "P", "A01", 1, None, None, "1"),
    f"P/Q_B02{UUID}.tif": ("image", "Q", "B02", None, None, None, None),  # one site and one wavelength
    f"P/Q_B02_s3{UUID.lower()}.tif": ("image", "Q", "B02", 3, None, None, None),
    f"P/A01_s1_w1_Q_C03_s2_w1{UUID}.tif": ("image", "A01_s1_w1_Q", "C03", 2, None, None, "1"),  # a plate named like a well
    "run/timepoint0/proto_t0_C05_s0_w0_z0.tif": ("image", "proto", "C05", 0, 0, 0, "0"),
    f"P/Q_B02_s3_w1{UUID.replace('-', '')}.tif": ("image", "Q", "B02", 3, None, None, "1"),
}
OPERA = {
    "BR00116991__2020-11-05T19_51_35-Measurement1/Images/r01c01f01p01-ch1sk1fk1fl1.tiff": (
        "image", "BR00116991", "A01", 1, 1, 1, "1"
    ),
    "BR00116991__2020-11-05T19_51_35-Measurement 1/Images/r16c24f09p01-ch5sk1fk1fl1.tiff": (
        "image", "BR00116991", "P24", 9, 1, 1, "5"
    ),
    "P7/Images/r02c03f04p05-ch6sk7fk1fl1.tiff": ("image", "P7", "B03", 4, 5, 7, "6"),
    "P7/r32c48f100p12-ch10sk120fk1fl1.tiff": ("image", "P7", "AF48", 100, 12, 120, "10"),
    "P7/images/r03c07/r03c07f01p01-ch01t01.tiff": ("image", "P7", "C07", 1, 1, 1, "1"),  # Harmony 7
    "P7.zip/r03c07f01p01-ch01t01.tiff": ("image", "P7", "C07", 1, 1, 1, "1"),
    "r03c07f001p01-ch12t113.tiff": ("image", None, "C07", 1, 1, 113, "12"),
    "P7/Images/R01C01F01P01-CH1SK1FK1FL1.TIFF".replace("-CH", "-ch"): ("image", "P7", "A01", 1, 1, 1, "1"),
}  # fmt: skip
CELLVOYAGER = {
    "BC1/AssayPlate_Greiner_#655090_C02_T0001F001L01A01Z01C01.tif": (
        "image", "AssayPlate_Greiner_#655090", "C02", 1, 1, 1, "1"
    ),
    "BC1/20200812-Cardio_B03_T0012F123L01A04Z42C04.png": ("image", "20200812-Cardio", "B03", 123, 42, 12, "4"),
    "BC1/X_AF48_T0001F001L01A01Z01C01.tif": ("image", "X", "AF48", 1, 1, 1, "1"),
    "BC1/A01_T0001F001L01A01Z01C01.tif": ("image", "BC1", "A01", 1, 1, 1, "1"),
    "BC1/DC_sCMOS #1_CAM1.tif": ("correction", "BC1", None, None, None, None, None),
    "BC1/SC_BP445-45_40x_M10_CH01.tif": ("correction", "BC1", None, None, None, None, None),
    "BC1/DC_plate_A01_T0001F001L01A01Z01C01.tif": ("image", "DC_plate", "A01", 1, 1, 1, "1"),  # a plate named DC_plate
    "BC1/MeasurementData.mlf": ("index", "BC1", None, None, None, None, None),
    "BC1/MeasurementDetail.mrf": ("index", "BC1", None, None, None, None, None),
}  # fmt: skip
CELLOMICS = {
    "MFGTMP-PC_090803110001_A01f00d0.TIF": ("image", "MFGTMP-PC_090803110001", "A01", 0, None, None, "0"),
    "x/AS_09125_050116000001_P24f08d2.png": ("image", "AS_09125_050116000001", "P24", 8, None, None, "2"),
    "x/MFGTMP_140206180002_AF48f123d10.tif": ("image", "MFGTMP_140206180002", "AF48", 123, None, None, "10"),
}
INCELL = {
    "P3/A - 01(fld 1 wv DAPI - DAPI).tif": ("image", "P3", "A01", 1, None, None, "DAPI - DAPI"),
    "P3/A - 1(fld 12 wv Cy5 - Cy5).tif": ("image", "P3", "A01", 12, None, None, "Cy5 - Cy5"),
    "P3/P - 24(fld 4 wv 390 - Blue).tif": ("image", "P3", "P24", 4, None, None, "390 - Blue"),
    "P3/AF - 48(fld 1 wv UV - DAPI z 3).tif": ("image", "P3", "AF48", 1, 3, None, "UV - DAPI"),
    "P3/B - 03(fld 1 wv TL-Brightfield - Cy3 wix 2).tif": ("image", "P3", "B03", 1, None, None, "TL-Brightfield - Cy3"),
    "P3/B - 4(fld 1 wv Red - Cy5- time 7 - 3000 ms).tif": ("image", "P3", "B04", 1, None, 7, "Red - Cy5"),
    "P3/B - 4(fld 2 wv Red - Cy5 z 2 - time 007 - 3000 ms).tif": ("image", "P3", "B04", 2, 2, 7, "Red - Cy5"),
    "P3/N - 6(fld 1- time 1 - 22858 ms).tif": ("image", "P3", "N06", 1, None, 1, None),
    "P3/N - 6(fld 1).tif": ("image", "P3", "N06", 1, None, None, None),
    "P3/Plate1_A - 01(fld 1 wv 390 - Blue).tif": ("image", "Plate1", "A01", 1, None, None, "390 - Blue"),
    "P3/A - 01(fld 1 wv DAPI - DAPI)_thumb.jpg": ("thumbnail", "P3", "A01", 1, None, None, "DAPI - DAPI"),
    "P3/P3.xdce": ("index", "P3", None, None, None, None, None),
}
SBS = {
    "hcs_plate/images/Channel1-01-A-01.tif": ("image", "hcs_plate", "A01", None, None, None, "1"),
    "hcs_plate/images/Channel2-48-D-12.tif": ("image", "hcs_plate", "D12", None, None, None, "2"),
    "P5/Channel2-1536-AF-48.tif": ("image", "P5", "AF48", None, None, None, "2"),
    "Channel1-01-A-01.tif": ("image", None, "A01", None, None, None, "1"),
}
CORPORA = {
    "imagexpress": IMAGEXPRESS, "opera": OPERA, "cellvoyager": CELLVOYAGER, "cellomics": CELLOMICS, "incell": INCELL, "sbs": SBS
}  # fmt: skip
ALL = [(convention, path, expected) for convention, corpus in CORPORA.items() for path, expected in corpus.items()]

DECOYS = [
    "P1/plate_A01.tif",  # anybody's
    "P1/readme.txt", "P1/P1.mes", "P1/Thumbs.db", "P1/overview.tif", "P1/montage_s1_w1.tif", "",
    "P1/r01c01f01p01-ch1sk1fk1fl1.tiff.tmp", "P1/xr01c01f01p01-ch1sk1fk1fl1.tiff", "P1/r1c1f1p1-ch1sk1fk1fl1.tiff",
    "P1/A01_s1_w1.czi", "P1/A01_s1_w1_mask.tif", "P1/A1_s1_w1.tif", "P1/plate_A001_s1_w1.tif",
    "P1/X_A01_T0001F001L01A01Z01.tif", "P1/WHICA-VTI1_090915160001_A01f00o1.tif", "P1/x_A01f00.tif",
    "P1/A - 01(fld 1 wv DAPI - DAPI).tif.jpg.bak", "P1/A - (fld 1 wv DAPI).tif", "P1/Channel-01-A-01.tif",
    "P1/Channel1-01-A.tif", "P1/segmentation/A01-nuclei.tif", "P1/ASSAY.PLATE", "P1/load_data.tif",
    "P1/A01_s" + "9" * 5000 + "_w1.tif",
]  # fmt: skip


def told(plane: Plane) -> tuple:
    return plane.kind, plane.plate, plane.well, plane.site, plane.z, plane.t, plane.channel


def test_examples():
    assert doctest.testmod(filenames).failed == 0


@pytest.mark.parametrize(("convention", "path", "expected"), ALL)
def test_golden_names(convention, path, expected):
    plane = parse(path)
    assert (plane.convention, *told(plane)) == (convention, *expected)
    assert parse(path, convention) == plane


@pytest.mark.parametrize(("convention", "path", "expected"), ALL)
def test_other_conventions_do_not_take_a_name_for_theirs(convention, path, expected):
    others = {c: parse(path, c) for c in CORPORA if c != convention}
    assert {c for c, p in others.items() if p.kind not in (None, "index")} == set()


@pytest.mark.parametrize("path", DECOYS)
def test_decoys_are_no_planes(path):
    assert parse(path) == Plane()


@pytest.mark.parametrize(
    ("path", "vendor"),
    [
        ("P/Images/Index.idx.xml", "opera"), ("P/Index.xml", "opera"), ("P/x.XDCE", "incell"), ("P/P1.HTD", "imagexpress"),
        ("a/load_data.csv", "csv"), ("a/load_data_with_illum.csv", "csv"), ("a/MeasurementData.mlf", "cellvoyager"),
    ],
)  # fmt: skip
def test_index_files(path, vendor):
    assert (parse(path).kind, parse(path).convention) == ("index", vendor)


@pytest.mark.parametrize(
    "path", ["P1/P_A49_s1_w1.tif", "P1/P_AG01_s1_w1.tif", "P1/r33c01f01p01-ch1sk1fk1fl1.tiff", "P1/A - 00(fld 1 wv a - b).tif"]
)
def test_a_well_beyond_every_plate_is_refused(path):
    with pytest.raises(Refused, match="BAD_WELL"):
        parse(path)


def test_row_and_column_go_with_the_well():
    plane = parse("P7/r32c48f1p1-ch1sk1fk1fl1.tiff")
    assert (plane.well, plane.row, plane.column) == ("AF48", 32, 48)


def test_an_unknown_convention():
    with pytest.raises(InputError, match="'phenix': wanted one of incell, opera, sbs, cellvoyager, imagexpress, cellomics"):
        parse("x.tif", "phenix")


def test_pattern_on_the_name_of_the_file():
    pattern = r"(?P<well>[A-P]\d\d)-f(?P<site>\d+)-t(?P<t>\d+)-z(?P<z>\d+)-(?P<channel>\w+)\.tif"
    plane = parse("batch7/P9/Images/B03-f2-t3-z4-DNA.tif", pattern=pattern)
    assert plane == Plane("image", "pattern", "P9", "B03", 2, 3, 2, 4, 3, "DNA")
    assert parse("B03-f2-t3-z4-DNA.tif.bak", pattern=pattern) == Plane()
    assert parse("x-B03-f2-t3-z4-DNA.tif", pattern=pattern) == Plane()
    assert parse(f"P/P_A01_s1_w1{UUID}.tif", pattern=pattern) == Plane()  # and nothing else is tried


def test_pattern_on_the_path():
    pattern = r"(?P<batch>[^/]+)/(?P<plate>[^/]+)/(?P<row>\w)-(?P<column>\d+)_(?P<channel>\d+)\.png"
    plane = parse("week 1/BC0001/C-7_002.png", pattern=pattern)
    assert (plane.batch, plane.plate, plane.well, plane.channel, plane.site) == ("week 1", "BC0001", "C07", "2", None)
    assert parse("other/week 1/BC0001/C-7_002.png", pattern=pattern) == Plane()
    assert parse("week 1/BC0001/Index.idx.xml", pattern=pattern).kind == "index"


def test_rows_of_a_pattern_may_be_numbers():
    pattern = r"(?P<row>\d+)x(?P<column>\d+)\.tif"
    assert parse("P/27x01.tif", pattern=pattern).well == "AA01"


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (
            r"(?P<well>\w+)_(?P<filed>\d+)\.tif",
            "names filed, wanted groups among batch, channel, column, plate, row, site, t, well, z",
        ),
        (r"(?P<site>\d+)\.tif", "wants a group well, or row and column, got site"),
        (r"(?P<row>\w)\.tif", "wants a group well, or row and column, got row"),
        (r"(?P<well>\w)(?P<row>\w)(?P<column>\w)\.tif", "wants a group well, or row and column"),
        (r"(?P<well>\w)(?P<row>\w)\.tif", "wants a group well, or row and column"),
        (r"\d+\.tif", "got none"),
        (r"(?P<well>", "is no regular expression"),
    ],
)
def test_a_wrong_pattern_is_one_sentence(pattern, said):
    with pytest.raises(InputError, match=re.escape(said)):
        parse("x.tif", pattern=pattern)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("A01_x_1.tif", "BAD_NAME"), ("ZZ1_1_1.tif", "BAD_WELL"), ("Q_1_1.tif", "BAD_WELL"), ("_1_1.tif", "BAD_WELL")],
)
def test_what_a_pattern_finds_must_make_sense(path, reason):
    with pytest.raises(Refused, match=reason):
        parse(path, pattern=r"(?P<well>\w*)_(?P<site>\w+)_(?P<channel>\d+)\.tif")


PARTS = [*"AZaf019_-swTLCrcp( )/", "A01", "_s1", "_w1", "wv ", "(fld 1", "ZStep_", "TimePoint_", "Channel1-", UUID, ".tif", ").tif"]


@given(st.lists(st.sampled_from(PARTS), max_size=12).map("".join))
def test_any_path_has_an_answer(path):
    try:
        plane = parse(path)
    except Refused as e:
        assert e.reason == "BAD_WELL"
    else:
        assert (plane.well is None) == (plane.row is None) == (plane.kind in (None, "index", "correction"))
