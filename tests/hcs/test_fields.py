import collections
import dataclasses
import hashlib
import io
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmed import config, formats, reasons, storage
from sparkmed.formats import archive
from sparkmed.formats.instance import Instance, to_json
from sparkmed.formats.raster import AFFINE
from sparkmed.hcs import fields, indexes
from sparkmed.hcs.filenames import Plane
from sparkmed.rejection import Refused
from tests.formats import test_ome
from tests.hcs import vendors

UUID = "0A1B2C3D-4E5F-6071-8293-A4B5C6D7E8F9"


def settings(channels=(("DNA", "1"), ("GFP", "2")), **more):
    return config.Plates(channels=channels, **more)


def picture(path, shape=(1, 8, 6, 1), content=None, **more):
    """A catalogued picture, with bytes of its own unless ``content`` is given."""
    fixed = {
        "container": path, "file_size": 1, "file_mtime_ns": 0, "bytes": 1, "format": "raster", "kind": "image", "modality": "",
        "series_uid": "", "sop_uid": "", "sop_class": "", "transfer_syntax": "tiff", "affine": AFFINE, "header": "{}",
    }  # fmt: skip
    sha256 = hashlib.sha256((content or path).encode()).hexdigest()
    return Instance(uri=f"file:/archive/{path}", path=path, sha256=sha256, shape=shape, **(fixed | more))


def opera(row=1, column=1, field=1, plane=1, channel=1, time=1):
    return f"P7/Images/r{row:02d}c{column:02d}f{field:02d}p{plane:02d}-ch{channel}sk{time}fk1fl1.tiff"


def sbs(channel, well="A-01", n=1):
    return f"P1/images/Channel{channel}-{n:02d}-{well}.tif"


def assemble(instances, plates=None, index=None):
    """Fields of these instances; none of them is lost or counted twice, whatever their order."""
    plates = plates or settings()
    done = fields.assemble(instances, plates, index)
    found = collections.Counter(u for h in done.headers for u in h.sources)
    found.update(r.uri for r in done.rejections if index is None or r.uri != index.uri)
    found.update(list(done.others))
    assert found == collections.Counter(i.uri for i in instances)
    shuffled = random.Random(0).sample(instances, len(instances))
    assert fields.assemble(shuffled, plates, index) == done
    assert {r.reason for r in done.rejections} <= set(reasons.SENTENCES)
    assert {r.stage for r in done.rejections} <= {"volumes"}
    return done


def refused(done):
    return {r.uri.removeprefix("file:/archive/"): r.reason for r in done.rejections}


def names(header):
    return [p.rpartition("/")[2] for p in header.source_paths]


def test_a_field_has_its_channels_in_the_order_of_the_config():
    pictures = [picture(opera(channel=c)) for c in (1, 2, 3)]
    done = assemble(pictures, settings([("GFP", "2"), ("ER", "3"), ("DNA", "1")]))
    (header,) = done.headers
    assert [n[13:16] for n in names(header)] == ["ch2", "ch3", "ch1"]
    assert header.facts["channels"] == ["GFP", "ER", "DNA"]
    assert (header.shape, header.format, header.modality) == ((3, 8, 6, 1), "plate", "HCS")
    assert done.rejections == [] and done.others == {}
    other = assemble(pictures, settings([("DNA", "1"), ("ER", "3"), ("GFP", "2")])).headers[0]
    assert other.uid != header.uid


def test_facts_of_a_field():
    (header,) = assemble([picture(opera(16, 24, 9, 2, c, 3)) for c in (1, 2)]).headers
    assert header.facts == {
        "source": "opera", "plate": "P7", "well": "P24", "row": 16, "column": 24, "site": 9, "z": 2, "t": 3,
        "channels": ["DNA", "GFP"],
    }  # fmt: skip
    np.testing.assert_array_equal(np.reshape(header.affine, (4, 4)), np.diag([-1, -1, 1, 1]))


def test_each_z_t_site_and_well_is_a_field():
    places = [(1, 1, 1, 1, 1), (1, 1, 1, 2, 1), (1, 1, 1, 1, 2), (1, 1, 2, 1, 1), (1, 2, 1, 1, 1), (2, 1, 1, 1, 1)]
    pictures = [picture(opera(r, c, f, p, channel, t)) for r, c, f, p, t in places for channel in (1, 2)]
    done = assemble(pictures)
    assert [(h.facts["well"], h.facts["site"], h.facts["t"], h.facts["z"]) for h in done.headers] == [
        ("A01", 1, 1, 1), ("A01", 1, 1, 2), ("A01", 1, 2, 1), ("A01", 2, 1, 1), ("A02", 1, 1, 1), ("B01", 1, 1, 1)
    ]  # fmt: skip
    assert len({h.uid for h in done.headers}) == 6


def test_blank_fields_of_the_same_bytes_stay_apart():
    pictures = [picture(sbs(c, well), content="black") for c in (1, 2) for well in ("A-01", "A-02")]
    done = assemble(pictures)
    assert len({h.uid for h in done.headers}) == 2 and done.rejections == []


def test_a_plate_has_the_same_uids_wherever_it_lies():
    here = [picture(opera(channel=c), content=str(c)) for c in (1, 2)]
    there = [picture("other/disk/" + opera(channel=c), content=str(c)) for c in (1, 2)]
    assert assemble(here).headers[0].uid == assemble(there).headers[0].uid


def test_a_missing_channel_refuses_the_others_of_its_field():
    done = assemble([picture(opera(channel=1)), picture(opera(channel=1, field=2)), picture(opera(channel=2, field=2))])
    assert refused(done) == {opera(channel=1): "MISSING_CHANNEL"}
    assert done.rejections[0].message == "plate P7, well A01, site 1, z 1, t 1: the field lacks GFP"
    assert len(done.headers) == 1


def test_channels_that_the_config_does_not_name_are_counted():
    done = assemble([picture(opera(channel=c)) for c in (1, 2, 3, 4)])
    assert collections.Counter(done.others.values()) == {"other channel": 2} and len(done.headers) == 1


def test_two_files_for_one_plane_are_both_refused():
    again = opera(channel=1).replace("Images/", "Images/r01c01/")
    done = assemble([picture(opera(channel=1)), picture(again), picture(opera(channel=2))])
    assert refused(done) == {opera(channel=1): "DUPLICATE_PLANE", again: "DUPLICATE_PLANE", opera(channel=2): "MISSING_CHANNEL"}
    assert "lacks DNA (files that differ)" in done.rejections[0].message + done.rejections[-1].message


def test_a_copy_is_listed_and_the_first_is_used():
    first = opera(channel=1).replace("Images/", "Images/r01c01/")  # by its path
    done = assemble([picture(opera(channel=1), content="x"), picture(first, content="x"), picture(opera(channel=2))])
    assert refused(done) == {opera(channel=1): "DUPLICATE_IMAGE"}
    assert done.headers[0].source_paths == (first, opera(channel=2))


def test_channels_of_another_size():
    done = assemble([picture(opera(channel=1)), picture(opera(channel=2), shape=(1, 6, 8, 1))])
    assert set(refused(done).values()) == {"FIELD_SIZE"} and done.headers == []
    assert "channels of 6 x 8 pixels and 8 x 6 pixels" in done.rejections[0].message


def test_a_field_of_another_size_than_its_plate():
    pictures = [
        picture(opera(field=f, channel=c), shape=(1, 8, 6, 1) if f < 3 else (1, 4, 3, 1)) for f in (1, 2, 3) for c in (1, 2)
    ]
    done = assemble(pictures)
    assert refused(done) == {opera(field=3, channel=c): "FIELD_SIZE" for c in (1, 2)}
    assert "4 x 3 pixels, where 2 fields of the plate are 8 x 6 pixels" in done.rejections[0].message
    assert len(done.headers) == 2


def test_no_size_wins_a_draw():
    pictures = [picture(opera(field=f, channel=c), shape=(1, 8, 6, 1) if f < 2 else (1, 4, 3, 1)) for f in (1, 2) for c in (1, 2)]
    done = assemble(pictures)
    assert done.headers == [] and "as many fields of" in done.rejections[0].message


def test_plates_in_one_folder_have_sizes_of_their_own():
    pictures = [
        picture(f"all/{plate}_A01_s1_w{w}{UUID}.tif", shape=shape)
        for plate, shape in (("P1", (1, 8, 6, 1)), ("P2", (1, 4, 3, 1)))
        for w in (1, 2)
    ]
    done = assemble(pictures)
    assert [(h.facts["plate"], h.shape) for h in done.headers] == [("P1", (2, 8, 6, 1)), ("P2", (2, 4, 3, 1))]


def test_colours_are_no_plane():
    done = assemble([picture(opera(channel=1)), picture(opera(channel=2), shape=(3, 8, 6, 1))])
    assert set(refused(done).values()) == {"FIELD_SIZE"} and "3 colours" in done.rejections[0].message


def test_decoys_are_listed_as_what_they_are():
    folder = "P1/TimePoint_1/"
    decoys = {
        f"{folder}P1_A01_s1_w1_thumb{UUID}.tif": "thumbnail",
        f"{folder}ZStep_0/P1_A01_s1_w1{UUID}.tif": "projection",
        "P1/DC_sCMOS #1_CAM1.tif": "correction",
    }
    done = assemble(
        [picture(p) for p in [*decoys, f"{folder}ZStep_1/P1_A01_s1_w1{UUID}.tif", f"{folder}ZStep_1/P1_A01_s1_w2{UUID}.tif"]]
    )
    assert done.others == {f"file:/archive/{p}": kind for p, kind in decoys.items()}
    assert len(done.headers) == 1 and done.rejections == []


def z_stack(beside=True):
    steps = [f"P1/TimePoint_1/ZStep_{z}/P1_A01_s1_w{w}{UUID}.tif" for z in (1, 2, 3) for w in (1, 2)]
    projected = "P1/TimePoint_1/" if beside else "P1/TimePoint_1/ZStep_0/"
    return steps, [f"{projected}P1_A01_s1_w{w}{UUID}.tif" for w in (1, 2)]


@pytest.mark.parametrize("beside", [True, False])
def test_planes_or_projections(beside):
    steps, projections = z_stack(beside)
    pictures = [picture(p) for p in steps + projections]
    done = assemble(pictures)
    assert [h.facts["z"] for h in done.headers] == [1, 2, 3] and set(done.others.values()) == {"projection"}
    done = assemble(pictures, settings(z="projections"))
    (header,) = done.headers
    assert header.source_paths == tuple(projections) and header.facts["projection"] is True and "z" not in header.facts
    assert collections.Counter(done.others.values()) == {"plane": 6} and done.rejections == []


def test_planes_without_the_projection_that_is_wanted():
    steps, _ = z_stack()
    done = assemble([picture(p) for p in steps], settings(z="projections"))
    assert done.headers == [] and set(refused(done).values()) == {"NO_PROJECTION"}


def test_unknown_names_wells_beyond_the_plate_and_other_formats():
    pictures = [picture("P1/overview.tif"), picture(opera(row=9)), picture(opera(row=33)), picture("P1/a.nii", format="nifti")]
    done = assemble(pictures, settings(wells=96))
    assert refused(done) == {
        "P1/overview.tif": "UNKNOWN_NAME", opera(row=9): "BAD_WELL", opera(row=33): "BAD_WELL", "P1/a.nii": "UNKNOWN_NAME"
    }  # fmt: skip


def test_one_channel_that_names_do_not_tell():
    (header,) = assemble([picture("P3/N - 6(fld 1).tif")], settings([("brightfield", "1")])).headers
    assert header.shape == (1, 8, 6, 1)


def test_a_pattern():
    pattern = r"(?P<batch>b\d)_(?P<well>\w\d\d)_(?P<channel>\w+)\.png"
    done = assemble(
        [picture("s/P9/b2_B03_dna.png"), picture("s/P9/b2_B03_gfp.png")], settings([("G", "gfp"), ("D", "dna")], pattern=pattern)
    )
    (header,) = done.headers
    assert names(header) == ["b2_B03_gfp.png", "b2_B03_dna.png"]
    assert (header.facts["batch"], header.facts["plate"], header.facts["source"]) == ("b2", "P9", "pattern")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "Images/", "Images/r01c01/", "TimePoint_1/", "TimePoint_1/ZStep_0/", "TimePoint_1/ZStep_2/"]),
            st.sampled_from(["r01c01f01p01-ch1sk1fk1fl1.tiff", "r01c01f01p01-ch2sk1fk1fl1.tiff", "A01_s1_w1.tif", "A01_s1_w2.tif",
                             f"A01_s1_w1_thumb{UUID}.tif", "B99_s1_w1.tif", "Channel1-01-A-01.tif", "x.png", "A01_s1_w3.tif"]),
            st.integers(0, 1),
            st.sampled_from([(1, 8, 6, 1), (1, 8, 6, 1), (1, 4, 3, 1), (3, 8, 6, 1)]),
        ),
        unique_by=lambda x: x[:2],
        max_size=20,
    ),
    st.sampled_from(["planes", "projections"]),
)  # fmt: skip
def test_nothing_is_lost(some, z):
    pictures = [picture(f"P/{folder}{name}", shape, str(content)) for folder, name, content, shape in some]
    for header in assemble(pictures, settings(z=z)).headers:
        assert len(header.sources) == 2


def test_a_plate_in_two_folders():
    def plate(folder, dye):
        names = (f"{folder}/AssayPlate_A01_T0001F00{f}L01A01Z01C01.tif" for f in (1, 2))
        return assemble([picture(n, content=f"{dye}{n[-22:]}") for n in names], settings([("DNA", "1")])).headers

    first, copy, other = plate("BC1", "x"), plate("BC2", "x"), plate("BC3", "y")
    kept, rejections = fields.once([*copy, *first])
    assert sorted(kept, key=lambda h: h.sources) == first
    assert {r.uri: r.reason for r in rejections} == {u: "DUPLICATE_IMAGE" for h in copy for u in h.sources}
    kept, rejections = fields.once([*other, *first])
    assert kept == [] and {r.reason for r in rejections} == {"DUPLICATE_PLANE"} and len(rejections) == 4
    assert rejections[0].message == "plate AssayPlate, well A01, site 1, z 1, t 1: different fields in BC1, BC3"


# with an index


def harmony(images, path="P7/Images/Index.idx.xml"):
    return indexes.read(path, io.BytesIO(vendors.harmony(images)), uri=f"file:/archive/{path}")


TWO_FIELDS = [opera(field=f, channel=c) for f in (1, 2) for c in (1, 2)]
LISTED = [(p.rpartition("/")[2], 1, 1, f, 1, 0, c) for p, (f, c) in zip(TWO_FIELDS, [(1, 1), (1, 2), (2, 1), (2, 2)], strict=True)]


def test_the_index_gives_sizes_positions_and_the_plate():
    done = assemble([picture(p) for p in TWO_FIELDS], index=harmony(LISTED))
    assert len(done.headers) == 2 and done.rejections == []
    header = done.headers[0]
    np.testing.assert_allclose(np.reshape(header.affine, (4, 4)), np.diag([-0.00059799, -0.00059799, 1, 1]))
    facts = header.facts
    assert facts["plate"] == "BR00116991" and facts["pixel_size_um"] == pytest.approx([0.59799] * 2)
    assert facts["stage_um"] == pytest.approx([-646, 323, 135000])


def test_the_index_may_be_left_aside():
    done = assemble([picture(TWO_FIELDS[0]), picture(TWO_FIELDS[1])], settings(index=False), harmony(LISTED))
    assert done.headers[0].facts["plate"] == "P7" and done.rejections == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"field": 7}, "the name says site 1, the index site 7"),
        ({"channel": 2}, "the name says channel 1, the index channel 2"),
        ({"row": 3}, "the name says well A01, the index well C01"),
        ({"plane": 3}, "the name says z 1, the index z 3"),
        ({"time": 4}, "the name says t 1, the index t 5"),
    ],
)
def test_name_and_index_contradict_each_other(change, said):
    name, row, column, field, plane, time, channel = LISTED[0]
    told = {"row": row, "column": column, "field": field, "plane": plane, "time": time, "channel": channel} | change
    done = assemble([picture(p) for p in TWO_FIELDS], index=harmony([(name, *told.values()), *LISTED[1:]]))
    assert refused(done) == {TWO_FIELDS[0]: "INDEX_MISMATCH", TWO_FIELDS[1]: "MISSING_CHANNEL"}
    assert said in next(r for r in done.rejections if r.reason == "INDEX_MISMATCH").message
    assert len(done.headers) == 1


def test_an_image_that_the_index_does_not_name():
    done = assemble([picture(p) for p in TWO_FIELDS], index=harmony(LISTED[:3]))
    assert refused(done) == {TWO_FIELDS[3]: "NOT_IN_INDEX", TWO_FIELDS[2]: "MISSING_CHANNEL"}


def test_a_file_that_the_index_names_and_is_not_there():
    index = harmony([*LISTED, *((f"r02c01f0{f}p01-ch1sk1fk1fl1.tiff", 2, 1, f, 1, 0, 1) for f in (1, 2))])
    done = assemble([picture(p) for p in TWO_FIELDS[:3]], index=index)
    missing = [r for r in done.rejections if r.reason == "MISSING_FILE"]
    assert [r.uri for r in missing] == [index.uri] * 2
    assert "well A01: 1 files" in missing[0].message and "r01c01f02p01-ch2" in missing[0].message
    assert "well B01: 2 files" in missing[1].message
    assert refused(done)[TWO_FIELDS[2]] == "MISSING_CHANNEL"


def test_missing_files_of_a_channel_that_is_not_used_do_not_matter():
    index = harmony([*LISTED, ("r01c01f01p01-ch3sk1fk1fl1.tiff", 1, 1, 1, 1, 0, 3)])
    assert assemble([picture(p) for p in TWO_FIELDS], index=index).rejections == []


def test_channels_may_be_named_as_in_the_index():
    done = assemble([picture(p) for p in TWO_FIELDS], settings([("GFP", "dye 2"), ("DNA", "1")]), harmony(LISTED))
    assert [n[13:16] for n in names(done.headers[0])] == ["ch2", "ch1"]


def test_one_image_cannot_be_two_channels():
    done = assemble([picture(p) for p in TWO_FIELDS], settings([("GFP", "dye 1"), ("DNA", "1")]), harmony(LISTED))
    assert "INDEX_MISMATCH" in refused(done).values() and done.headers == []


def test_a_folder_that_was_moved_away_from_its_index():
    done = assemble([picture(p) for p in TWO_FIELDS], index=harmony(LISTED, "P7/Index.idx.xml"))
    assert len(done.headers) == 2 and done.headers[0].facts["plate"] == "BR00116991"


def test_pixels_of_two_sizes_are_no_one_plate():
    text = vendors.harmony(LISTED).replace(b"5.9799E-07", b"2.9899E-07", 8 // 2)
    index = indexes.read("P7/Images/Index.idx.xml", io.BytesIO(text))
    done = assemble([picture(p) for p in TWO_FIELDS], index=index)
    assert set(refused(done).values()) == {"FIELD_SIZE"} and "um" in done.rejections[0].message


def test_yokogawa_projections_and_corrections_are_told_by_the_index():
    image = "BC/P_B03_T0001F002L01A01Z01C01.tif"
    listed = [(image[3:], 2, 3, 2, 1, 1, 1, ' bts:ZImageProcessing="Maximum"')]
    index = indexes.read("BC/MeasurementData.mlf", io.BytesIO(vendors.mlf(listed)), io.BytesIO(vendors.mrf(correction="flat.tif")))
    one = settings([("DNA", "1")])
    done = assemble([picture(image), picture("BC/flat.tif")], one, index)
    assert done.others == {f"file:/archive/{image}": "projection", "file:/archive/BC/flat.tif": "correction"}
    done = assemble([picture(image)], settings([("DNA", "1")], z="projections"), index)
    assert done.headers[0].facts["projection"] is True and done.headers[0].facts["pixel_size_um"] == [0.65, 0.65]


def test_htd_checks_wells_sites_and_wavelengths():
    index = indexes.read("P1/P1.HTD", io.BytesIO(vendors.htd(wells=("A01", "A02", "B03"))))
    good = [f"P1/TimePoint_1/P1_A01_s{s}_w{w}{UUID}.tif" for s in (1, 4) for w in (1, 2)]
    bad = [f"P1/TimePoint_1/P1_{x}{UUID}.tif" for x in ("A03_s1_w1", "A02_s5_w1", "A01_s1_w3")]
    done = assemble([picture(p) for p in good + bad], index=index)
    assert len(done.headers) == 2
    assert {p: r for p, r in refused(done).items() if p in bad} == dict.fromkeys(bad, "INDEX_MISMATCH")
    missing = [r.message for r in done.rejections if r.reason == "MISSING_FILE"]
    assert [m.partition(":")[0] for m in missing] == ["plate P1, well A02", "plate P1, well B03"]
    by_name = assemble([picture(p) for p in good], settings([("green", "FITC"), ("blue", "DAPI")]), index)
    assert [p.partition("_w")[2][0] for p in by_name.headers[0].source_paths] == ["2", "1"]


LIST = """Metadata_Batch,Metadata_Plate,Metadata_Well,Metadata_Site,FileName_DNA,PathName_DNA,FileName_OrigER,PathName_OrigER
b1,BC1,A01,1,a.tif,/mnt/old/BC1/,b.tif,/mnt/old/BC1/
b1,BC2,A01,1,a.tif,/mnt/old/BC2/,b.tif,/mnt/old/BC2/
b1,BC2,A02,1,c.tif,/mnt/old/BC2/,d.tif,/mnt/old/BC2/
b1,BC3,A01,1,a.tif,/mnt/old/BC3/,b.tif,/mnt/old/BC3/
"""


def test_a_csv_list_names_whatever_files():
    index = indexes.read("load_data.csv", io.BytesIO(LIST.encode()))
    pictures = [picture(f"copied/BC2/{n}.tif") for n in "abcx"]
    done = assemble(pictures, settings([("ER", "ER"), ("DNA", "DNA")]), index)
    (header,) = done.headers
    assert names(header) == ["b.tif", "a.tif"]
    assert {k: header.facts[k] for k in ("source", "batch", "plate", "well", "site")} == {
        "source": "csv", "batch": "b1", "plate": "BC2", "well": "A01", "site": 1
    }  # fmt: skip
    assert done.others == {"file:/archive/copied/BC2/x.tif": "unlisted"}
    missing = [r for r in done.rejections if r.uri == "load_data.csv"]
    assert len(missing) == 1 and "plate BC2, well A02: 1 files" in missing[0].message  # of other plates nothing is said here
    assert refused(done)["copied/BC2/c.tif"] == "MISSING_CHANNEL"


def test_a_list_that_fits_two_plates_fits_none():
    index = indexes.read("load_data.csv", io.BytesIO(LIST.encode()))
    done = assemble([picture("copied/elsewhere/a.tif")], settings([("DNA", "DNA")]), index)
    assert done.others == {"file:/archive/copied/elsewhere/a.tif": "unlisted"}


def test_real_plate(shared_data):
    from sparkmed.formats import archive, members, read_instance

    found = [read_instance(m) for f in archive.files(str(shared_data / "hcs_plate" / "images")) for m in members(f)]
    done = fields.assemble(found, settings([("DNA", "2"), ("GFP", "1")], wells=96))
    assert (len(found), len(done.headers), done.rejections, done.others) == (96, 48, [], {})
    assert {h.shape for h in done.headers} == {(2, 640, 640, 1)}
    assert all(names(h)[0].startswith("Channel2-") and names(h)[1].startswith("Channel1-") for h in done.headers)
    assert [h.facts["well"] for h in done.headers] == [f"{r}{c:02d}" for r in "ABCD" for c in range(1, 13)]


# OME-TIFF


def page(path, number, **said):
    ome = {"plate": "P7", "row": 2, "column": 3, "sample": 1, "c": 1, "pages": 4} | said
    header = to_json({"ome": {k: v for k, v in ome.items() if v is not None}})
    one = picture(path, content=f"{path} {number}", header=header)
    return dataclasses.replace(one, uri=f"tiff://{number}::{one.uri}")


def test_pages_of_one_file_are_the_channels_of_its_fields():
    pages = [page("x/f.ome.tif", n, c=1 + n % 2, sample=1 + n // 2, pixel_size_um=[0.5, 0.5]) for n in range(4)]
    done = assemble(pages)
    assert [h.sources for h in done.headers] == [tuple(p.uri for p in pages[n : n + 2]) for n in (0, 2)]
    facts = done.headers[1].facts
    assert {k: facts[k] for k in ("source", "plate", "well", "site")} == {"source": "ome", "plate": "P7", "well": "B03", "site": 2}
    assert facts["pixel_size_um"] == [0.5, 0.5] and len({h.uid for h in done.headers}) == 2


def test_channels_of_pages_by_their_names():
    pages = [page("f.ome.tif", n, c=1 + n, channel=name) for n, name in enumerate(["Hoechst", "Alexa 488"])]
    done = assemble(pages, settings((("GFP", "Alexa 488"), ("DNA", "Hoechst"))))
    assert [h.sources for h in done.headers] == [(pages[1].uri, pages[0].uri)]


def test_a_name_and_xml_that_contradict_each_other():
    pages = [page("P1_C03_s4.ome.tif", n, c=n + 1, plate=None) for n in range(2)]
    assert {r.reason for r in assemble(pages).rejections} == {"INDEX_MISMATCH"}
    pages = [page("P1_B03_s4.ome.tif", n, c=n + 1, plate=None) for n in range(2)]
    (header,) = assemble(pages).headers
    assert (header.facts["plate"], header.facts["site"]) == ("P1", 4)  # vendors number sites, OME does not


def test_a_name_says_the_well_that_xml_does_not():
    nowhere = {"plate": None, "row": None, "column": None, "sample": None}
    pages = [page("screen/P9/P9_B03_s4.ome.tif", n, c=n + 1, **nowhere) for n in range(2)]
    pages += [page("screen/P9/field 7.ome.tif", n, c=n + 1, **nowhere) for n in range(2)]
    done = assemble(pages)
    assert [h.facts["well"] for h in done.headers] == ["B03"]
    assert {r.reason for r in done.rejections} == {"UNKNOWN_NAME"} and len(done.rejections) == 2


def test_a_plate_without_a_name_has_that_of_its_folder():
    (header,) = assemble([page("screen/P9/f.ome.tif", n, c=n + 1, plate=None) for n in range(2)]).headers
    assert header.facts["plate"] == "P9"


def test_xml_of_one_page_adds_to_an_index_and_a_name_and_replaces_neither():
    one = {"pages": None, "plate": None, "row": None, "column": None, "sample": None, "c": None}
    ome = {"pixel_size_um": [0.5, 0.5]}
    places = {str(n): Plane("image", "csv", "P1", "A01", 1, 1, 1, channel=str(n)) for n in (1, 2)}
    listed = {f"img{n}.tif": indexes.Listed(place) for n, place in places.items()}
    index = indexes.Index("csv", listed, path="load_data.csv", uri="file:/archive/load_data.csv")
    done = assemble([page(f"img{n}.tif", 0, **one, **ome) for n in (1, 2, 3)], index=index)
    (header,) = done.headers
    assert header.facts["pixel_size_um"] == [0.5, 0.5] and header.facts["well"] == "A01"
    assert not done.rejections and list(done.others.values()) == ["unlisted"]


def test_a_projection_stays_one_whatever_its_xml_says():
    one = {"pages": None, "plate": None, "row": None, "column": None, "sample": None, "c": None}
    files = [page(f"P1/ZStep_{z}/P1_A01_s1_w{w}.tif", 0, **one) for z in (0, 1) for w in (1, 2)]
    done = assemble(files)
    assert len(done.headers) == 1 and list(done.others.values()) == ["projection"] * 2
    files = [page(f"P1/ZStep_{z}/P1_B03_s1_w{w}.tif", w, c=w, plate=None) for z in (0, 1) for w in (1, 2)]
    assert list(assemble(files).others.values()) == ["projection"] * 2


@pytest.mark.parametrize("layout", range(len(test_ome.LAYOUTS)))
def test_fields_of_ome_tiff_have_the_values_that_were_written(tmp_path, layout):
    blocks = '<TiffData IFD="{0}" FirstC="0"/><TiffData IFD="{1}" FirstC="1"/>'
    images = [test_ome.image(f"I{n}", c=2, blocks=blocks.format(n, n + 2)) for n in range(2)]
    text = test_ome.xml(*images, plate=test_ome.plate((0, 0, ["I0"]), (1, 5, ["I1"])))
    data, array = test_ome.tiff(text, 4, **test_ome.LAYOUTS[layout])
    (tmp_path / "plate.ome.tif").write_bytes(data)
    instances = [formats.read_instance(m) for file in storage.walk(str(tmp_path)) for m in archive.members(file)]
    done = assemble(instances, settings((("GFP", "GFP"), ("DNA", "DNA"))))
    assert [(h.facts["plate"], h.facts["well"]) for h in done.headers] == [("P7", "A01"), ("P7", "B06")]
    for n, header in enumerate(done.headers):
        found = formats.read_volume(header).array
        assert np.array_equal(found[..., 0].transpose(0, 2, 1), array[[n + 2, n]])
    (tmp_path / "plate.ome.tif").write_bytes(test_ome.tiff(text, 4, seed=1)[0])
    with pytest.raises(Refused, match="not the file that was catalogued"):
        formats.read_volume(done.headers[0])
