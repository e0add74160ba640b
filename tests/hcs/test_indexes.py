import gzip
import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmed.hcs import filenames, indexes
from sparkmed.hcs.filenames import Plane
from sparkmed.rejection import InputError, Refused
from tests.hcs import vendors

CSV = """Metadata_Source,Metadata_Batch,Metadata_Plate,Metadata_Well,Metadata_Site,FileName_OrigDNA,PathName_OrigDNA,FileName_OrigER,PathName_OrigER,FileName_IllumDNA,PathName_IllumDNA
source_4,2021_04_26_Batch1,BR00117035,A01,1,r01c01f01p01-ch5sk1fk1fl1.tiff,/mnt/s3/Images/,r01c01f01p01-ch4sk1fk1fl1.tiff,/mnt/s3/Images/,BR00117035_IllumDNA.npy,/illum/
source_4,2021_04_26_Batch1,BR00117035,p24,9,r16c24f09p01-ch5sk1fk1fl1.tiff,/mnt/s3/Images/,r16c24f09p01-ch4sk1fk1fl1.tiff,/mnt/s3/Images/,BR00117035_IllumDNA.npy,/illum/
"""  # noqa: E501


def read(name, data, detail=None):
    return indexes.read(name, io.BytesIO(data), None if detail is None else io.BytesIO(detail))


def reason(name, data, detail=None):
    with pytest.raises(Refused) as e:
        read(name, data, detail)
    return e.value.reason, e.value.message


OPERA = [("r01c02f03p01-ch1sk1fk1fl1.tiff", 1, 2, 3, 1, 0, 1), ("r01c02f03p01-ch2sk1fk1fl1.tiff", 1, 2, 3, 1, 0, 2)]
OPERA_7 = [("r16c24f09p02-ch01t03.tiff", 16, 24, 9, 2, 3, 1), ("r16c24f09p02-ch01t01.tiff", 16, 24, 9, 2, 1, 1)]


@pytest.mark.parametrize(("namespace", "images"), [(vendors.V5, OPERA), (vendors.V6, OPERA), (vendors.V7, OPERA_7)])
def test_harmony(namespace, images):
    index = read("Index.idx.xml", vendors.harmony(images, namespace))
    assert index.plates == ("BR00116991",)
    assert list(index.images) == [i[0] for i in images]
    for path, listed in index.images.items():
        named = filenames.parse(path)  # the index says the same as the names
        assert (listed.plane.well, listed.plane.site, listed.plane.z, listed.plane.t, listed.plane.channel) == (
            named.well, named.site, named.z, named.t, named.channel
        )  # fmt: skip
        assert listed.plane.plate == "BR00116991" and listed.channel_name == f"dye {named.channel}"
        assert listed.pixel_size_um == pytest.approx((0.59799, 0.59799))
        assert listed.stage_um == pytest.approx((-646, 323, 135_000))
    assert index.channels == {i: f"dye {i}" for i in {str(i[6]) for i in images}}


def test_harmony_skips_images_that_failed_and_knows_units():
    text = vendors.harmony(OPERA).replace(b"<URL>r01c02f03p01-ch2sk1fk1fl1.tiff</URL>", b"<URL></URL>")
    text = text.replace(b'<PositionX Unit="m">-0.000646<', b'<PositionX Unit="\xc2\xb5m">-646<')
    index = read("Index.xml", text)
    assert list(index.images) == [OPERA[0][0]]
    assert index.images[OPERA[0][0]].stage_um == pytest.approx((-646, 323, 135_000))


def test_a_plate_that_does_not_know_its_pixels():
    text = vendors.harmony(OPERA).replace(b"5.9799E-07", b"0")
    assert {i.pixel_size_um for i in read("Index.xml", text).images.values()} == {None}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("<Row>1</Row><Col>2</Col>", "<Row>one</Row><Col>2</Col>", "Row of an image is 'one', wanted a whole number"),
        ("<Row>1</Row><Col>2</Col>", "<Row>1</Row>", "Col of an image is '', wanted a whole number"),
        ("<Row>1</Row><Col>2</Col>", "<Row>33</Row><Col>2</Col>", "row 33, column 2"),
        ("<ChannelID>1</ChannelID>", "", "an image has no ChannelID"),
        ('<PositionX Unit="m">', '<PositionX Unit="furlong">', "PositionX is in 'furlong', a unit that is not known"),
        ("-0.000646", "nan", "PositionX is 'nan', wanted a number"),
        ("<Row>1</Row>", "<Row>1_0</Row>", "Row of an image is '1_0'"),
        ("<Row>1</Row>", "<Row>-1</Row>", "Row of an image is '-1'"),
        ("-0.000646", "1_0", "PositionX is '1_0', wanted a number"),
        ("-0.000646", "far", "PositionX is 'far', wanted a number"),
        ("ch2sk1", "ch1sk1", "is two different images"),
        ("EvaluationInputData", "Results", "the root is <Results>, wanted <EvaluationInputData>"),
        ("<Images>", "<Images><Image>", "not well-formed XML"),
        ("<URL>", "<URI>", "not well-formed XML"),
        ("<FieldID>", "<x>" * 70 + "</x>" * 70 + "<FieldID>", "nested deeper than 64"),
        ("<FieldID>", "<x>" + "y" * (2 << 20) + "</x><FieldID>", "of more than 1048576 characters"),
        ('encoding="utf-8"', 'encoding="utf-99"', "not well-formed XML"),
    ],
)
def test_broken_harmony(old, new, said):
    text = vendors.harmony(OPERA).decode()
    assert old in text
    why, message = reason("Index.idx.xml", text.replace(old, new).encode())
    assert why == "BROKEN_INDEX" and said in message


def test_an_index_of_no_image():
    assert reason("Index.idx.xml", vendors.harmony([])) == ("BROKEN_INDEX", "the index names no image")


YOKOGAWA = [
    ("P_B03_T0001F002L01A01Z01C01.tif", 2, 3, 2, 1, 1, 1, ""),
    ("P_B03_T0001F002L01A02Z01C02.tif", 2, 3, 2, 1, 1, 2, ""),
    ("P_AF48_T0012F002L01A02Z05C02.tif", 32, 48, 2, 5, 12, 2, ""),
]


def test_cellvoyager():
    index = read("MeasurementData.mlf", vendors.mlf(YOKOGAWA), vendors.mrf())
    assert index.plates == ("BC000017",)
    for name, *_ in YOKOGAWA:
        listed, named = index.images[name], filenames.parse(name)
        assert (listed.plane.well, listed.plane.site, listed.plane.z, listed.plane.t, listed.plane.channel) == (
            named.well, named.site, named.z, named.t, named.channel
        )  # fmt: skip
        assert (listed.pixel_size_um, listed.stage_um) == ((0.65, 0.65), (-324.5, 12.25, 1.5))
    assert index.images["SC_BP445-45_40x_M10_CH01.tif"].plane.kind == "correction"
    assert len(index.images) == 4  # and the record of an error is none


def test_cellvoyager_without_its_details_knows_no_pixels():
    index = read("MeasurementData.mlf", vendors.mlf(YOKOGAWA))
    assert {i.pixel_size_um for i in index.images.values()} == {None} and index.plates == ()


def test_cellvoyager_tells_projections():
    images = [(*i[:-1], ' bts:ZImageProcessing="Maximum"') for i in YOKOGAWA]
    index = read("MeasurementData.mlf", vendors.mlf(images))
    assert {i.plane.kind for i in index.images.values()} == {"projection"}


def test_the_details_alone_are_no_index():
    with pytest.raises(InputError, match="wanted MeasurementData.mlf"):
        read("MeasurementDetail.mrf", vendors.mrf())


INCELL = [
    ("B - 03(fld 2 wv DAPI - DAPI).tif", 2, 3, 2, 1, 1, "DAPI", "DAPI"),
    ("B - 03(fld 2 wv 390 - Blue z 4 - time 3 - 20 ms).tif", 2, 3, 2, 4, 3, "390", "Blue"),
]


def test_incell():
    index = read("P3.xdce", vendors.xdce(INCELL))
    for name, *_ in INCELL:
        listed, named = index.images[name], filenames.parse(name)
        assert (listed.plane.well, listed.plane.site, listed.plane.channel) == (named.well, named.site, named.channel)
        assert named.z in (None, listed.plane.z) and named.t in (None, listed.plane.t)
        assert (listed.pixel_size_um, listed.stage_um) == ((0.65, 0.65), (4500.5, -9000, 12.5))
        assert index.images[f"{name}.thumb.jpg"].plane.kind == "thumbnail"


def test_incell_places_fields_by_their_offsets_else():
    index = read("P3.xdce", vendors.xdce(INCELL, position=False))
    assert index.images[INCELL[0][0]].stage_um == (250, 250, None)


def test_metaxpress():
    index = read("P1.HTD", vendors.htd(wells=("A01", "B03"), waves=("DAPI", "Cy5, long")))
    assert index.plates == ("P1",) and index.channels == {"1": "DAPI", "2": "Cy5, long"}
    assert (index.wells, index.sites, index.images) == (frozenset({"A01", "B03"}), 4, {})


def test_metaxpress_without_sites():
    assert read("P1.HTD", vendors.htd().replace(b'"Sites", TRUE', b'"Sites", FALSE')).sites == 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"XWells", 3', '"XWells", 99', "2 x 99 wells"),
        ('"XWells", 3', '"XWells", 3.5', "XWells of an image is '3.5'"),
        ('"XWells", 3\r\n', "", "does not say XWells"),
        ('"WellsSelection2", FALSE, ', '"WellsSelection2", ', "WellsSelection2 of the HTD has 2 of 3 values"),
        ('"WaveName2", "FITC"\r\n', "", "names 1 of 2 wavelengths"),
    ],
)
def test_broken_htd(old, new, said):
    text = vendors.htd().decode()
    assert old in text
    why, message = reason("P1.htd", text.replace(old, new).encode())
    assert why == "BROKEN_INDEX" and said in message


def test_load_data():
    index = read("load_data.csv", CSV.encode())
    assert index.plates == ("BR00117035",) and index.channels == {"DNA": "DNA", "ER": "ER"}
    assert sorted(index.images) == [f"/mnt/s3/Images/r{r}p01-ch{c}sk1fk1fl1.tiff" for r in ("01c01f01", "16c24f09") for c in (4, 5)]
    listed = index.images["/mnt/s3/Images/r16c24f09p01-ch4sk1fk1fl1.tiff"]
    assert listed.plane == Plane("image", "csv", "BR00117035", "P24", 16, 24, 9, batch="2021_04_26_Batch1")
    assert listed.channel_name == "ER"
    assert read("load_data_with_illum.csv.gz", gzip.compress(CSV.encode())).images == index.images
    assert read("load_data.csv", b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode()) == index


def test_load_data_of_urls():
    text = "Metadata_Plate,Metadata_Row,Metadata_Col,URL_DNA\nP1,2,3,s3://bucket/P1//a.tif\n"
    index = read("load_data.csv", text.encode())
    assert index.images["s3://bucket/P1//a.tif"].plane.well == "B03"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (",9,r16", ",nine,r16", "Metadata_Site of an image is 'nine'"),
        (",p24,", ",Q99,", "line 3: row 17, column 99"),
        (",p24,", ",,", "line 3: Metadata_Col of an image is ''"),
        ("source_4,2021_04_26_Batch1,BR00117035,p24", "Batch1,BR00117035,p24", "line 3: 10 cells, where the header has 11"),
        ("FileName_OrigER", "FileName_OrigDNA", "a column occurs twice: FileName_OrigDNA"),
        ("FileName_", "File_", "no column FileName_<channel>"),
        ("r16c24f09p01-ch4", "r16c24f09p01-ch5", "is two different images"),
        ("BR00117035_IllumDNA.npy", '"BR', "line"),
    ],
)
def test_broken_load_data(old, new, said):
    assert old in CSV
    why, message = reason("load_data.csv", CSV.replace(old, new).encode())
    assert why == "BROKEN_INDEX" and said in message


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xfe\x00", b"Metadata_Well\n\0", b"\x1f\x8b\x08\x00rubbish", gzip.compress(CSV.encode(), mtime=0)[:60]],
    ids=["nothing", "UTF-16", "a NUL", "no gzip", "half a gzip"],
)
def test_a_list_that_is_no_text(data):
    assert reason("load_data.csv", data)[0] == "BROKEN_INDEX"


WHOLE = {
    "Index.idx.xml": (vendors.harmony(OPERA, vendors.V6), None),
    "MeasurementData.mlf": (vendors.mlf(YOKOGAWA), vendors.mrf()),
    "P.xdce": (vendors.xdce(INCELL), None),
    "P.HTD": (vendors.htd(), None),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_truncated_index_is_refused_wherever_it_ends(name):
    data, detail = WHOLE[name]
    end = len(data) - (len('"EndFile"') + 7 if name == "P.HTD" else 1)  # nothing is lost with the last line of an HTD
    for size in [*range(0, end, 97), end]:
        assert reason(name, data[:size], detail)[0] == "BROKEN_INDEX", size


@pytest.mark.parametrize("size", [0, 100, 500])
def test_truncated_details_are_refused(size):
    assert reason("MeasurementData.mlf", vendors.mlf(YOKOGAWA), vendors.mrf()[:size])[0] == "BROKEN_INDEX"


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10 if n else "lol"}">' for n in range(10))
DOCTYPES = {
    "billion laughs": f"<!DOCTYPE lolz [{LAUGHS}]>",
    "an outer entity": '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/hostname">]>',
    "an outer DTD": '<!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd">',
    "a quadratic entity": f'<!DOCTYPE x [<!ENTITY e "{"e" * 50_000}">]>',
    "none to speak of": "<!DOCTYPE EvaluationInputData>",
}


@pytest.mark.parametrize("doctype", DOCTYPES)
@pytest.mark.parametrize("name", ["Index.idx.xml", "MeasurementData.mlf", "P.xdce"])
def test_a_dtd_is_refused(name, doctype):
    text = WHOLE[name][0].decode()
    text = re.sub(r"(<\?xml.*?\?>)", lambda m: m[0] + DOCTYPES[doctype], text, count=1).replace(".tif", "&l9;.tif")
    assert reason(name, text.encode()) == ("BROKEN_INDEX", "an index with a DTD or entities is not read")


def test_memory_does_not_grow_with_what_is_not_kept(monkeypatch):
    kept = []
    monkeypatch.setattr(
        indexes._Reader, "_end", lambda self, name, end=indexes._Reader._end: (end(self, name), kept.append(len(self.done)))
    )
    images = [(f"r01c01f{n:03d}p01-ch1sk1fk1fl1.tiff", 1, 1, n, 1, 0, 1) for n in range(2000)]
    assert len(read("Index.idx.xml", vendors.harmony(images)).images) == 2000
    assert max(kept) < 300  # elements of one chunk


@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 10**6), st.binary(max_size=8), st.integers(0, 8))
def test_whatever_the_bytes_are_it_is_an_index_or_refused(name, at, new, gone):
    data, detail = WHOLE[name]
    at %= len(data)
    try:
        index = read(name, data[:at] + new + data[at + gone :], detail)
    except Refused as e:
        assert e.reason == "BROKEN_INDEX"
    else:
        assert all(i.plane.kind for i in index.images.values())


def test_too_many_images(monkeypatch):
    monkeypatch.setattr(indexes, "MOST_IMAGES", 1)
    for name, (data, detail) in WHOLE.items():
        if name != "P.HTD":
            assert reason(name, data, detail)[0] == "TOO_LARGE"
    assert reason("load_data.csv", CSV.encode())[0] == "TOO_LARGE"


def test_a_name_of_no_index():
    with pytest.raises(InputError, match="a name of no index file"):
        read("images.xml", b"")
