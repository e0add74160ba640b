import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmed.config import Cells, Crops, Nuclei
from sparkmed.formats.instance import VolumeHeader, to_json
from sparkmed.hcs import crops, nuclei
from sparkmed.imaging.volume import Volume
from sparkmed.rejection import InputError, Refused


def field(shape=(2, 40, 30, 1)):
    return np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)


def centres(*rows):
    return pd.DataFrame(rows, columns=["cell", "x", "y"])


@pytest.mark.parametrize("size", [4, 5])
def test_a_crop_is_what_lies_around_its_centre(size):
    array = field()
    (crop,) = crops.cut(array, centres(("7", 20.3, 11.6)), Crops(size=size))
    assert (crop.cell, crop.x, crop.y) == ("7", 20.3, 11.6)
    assert crop.array.shape == (2, size, size, 1) and crop.array.dtype == np.uint16
    np.testing.assert_array_equal(crop.array[:, size // 2, size // 2], array[:, 20, 12])
    np.testing.assert_array_equal(crop.array, array[:, 18 : 18 + size, 10 : 10 + size])


def test_cells_at_the_border_are_left_out_or_padded():
    array = field() + 1
    where = centres(("a", 0, 0), ("b", 2, 2), ("c", 37, 15), ("d", 38, 15), ("e", 39.49, 29.49))
    assert [c.cell for c in crops.cut(array, where, Crops(size=4))] == ["b", "c", "d"]
    padded = list(crops.cut(array, where, Crops(size=4, border="padded")))
    assert [c.cell for c in padded] == list("abcde")
    np.testing.assert_array_equal(padded[0].array[:, 2:, 2:], array[:, :2, :2])
    assert not padded[0].array[:, :2].any() and not padded[0].array[:, :, :2].any()
    assert padded[0].location.index == (-2, -2, 0)
    (odd,) = crops.cut(array, centres(("x", 20, 15)), Crops(size=99, border="padded"))
    assert odd.array.shape == (2, 99, 99, 1) and np.count_nonzero(odd.array) == array.size
    assert not list(crops.cut(array, centres(("x", 20, 15)), Crops(size=99)))


@given(st.floats(-0.5, 39.49), st.floats(-0.5, 29.49), st.integers(1, 60))
def test_the_centre_of_a_padded_crop_is_its_pixel(x, y, size):
    array = field() + 1
    (crop,) = crops.cut(array, centres(("1", x, y)), Crops(size=size, border="padded"))
    i, j = (int(np.clip(np.floor(at + 0.5), 0, n - 1)) for at, n in ((x, 40), (y, 30)))
    np.testing.assert_array_equal(crop.array[:, size // 2, size // 2], array[:, i, j])


@pytest.mark.parametrize("place", [(-1, 5), (5, -0.6), (39.5, 5), (5, 30), (np.nan, 5), (np.inf, 5)])
def test_a_centre_outside_the_field_is_refused(place):
    with pytest.raises(Refused, match="CENTRE_OUTSIDE: cell q lies at .* the field is of 40 x 30"):
        list(crops.cut(field(), centres(("p", 20, 15), ("q", *place)), Crops(size=4)))


def test_two_cells_of_one_id_are_refused():
    with pytest.raises(Refused, match="TWO_CELLS"):
        list(crops.cut(field(), centres(("p", 20, 15), ("p", 21, 15)), Crops(size=4)))
    with pytest.raises(InputError, match="a field is"):
        list(crops.cut(field()[0], centres(("p", 20, 15)), Crops(size=4)))


def test_no_cell_is_no_crop():
    assert not list(crops.cut(field(), centres(), Crops()))


def test_crops_of_the_finder_hold_their_nucleus():
    i, j = np.ogrid[:120, :100]
    image = np.full((2, 120, 100, 1), 50, np.uint16)
    for a, b in ((30, 30), (60, 70), (95, 40)):
        image[0, (i - a) ** 2 + (j - b) ** 2 < 64, 0] = 800
    found = nuclei.find(image[0, ..., 0], Nuclei(diameter=16)).cells
    cut = list(crops.cut(image, found, Crops(size=32)))
    assert [c.cell for c in cut] == ["1", "2", "3"]
    for crop in cut:
        assert (crop.array[0] > 100).sum() == pytest.approx(found.area[int(crop.cell) - 1], rel=0.1)


def test_tables_of_csv_and_parquet_are_the_same(tmp_path):
    rows = pd.DataFrame(
        {
            "Metadata_Plate": [101, 101, 102],
            "Metadata_Well": ["A01", "B02", "A01"],
            "Metadata_Site": [1, 1, 2],
            "x": [1.5, 2, 3],
            "Y": [4, 5, 6.25],
        }
    )
    rows.to_csv(tmp_path / "c.csv", index=False)
    rows.to_parquet(tmp_path / "c.parquet")
    a, b = crops.read(str(tmp_path / "c.csv")), crops.read(str(tmp_path / "c.parquet"))
    pd.testing.assert_frame_equal(a, b)
    assert list(a.columns) == ["plate", "well", "site", "cell", "x", "y"]
    assert a.plate.tolist() == ["101", "101", "102"] and a.x.tolist() == [1.5, 2, 3] and a.cell.tolist() == ["1", "1", "1"]


def test_cells_without_an_id_are_numbered_in_their_field():
    table = pd.DataFrame({"image": ["a", "b", "a", "a"], "x": [1, 1, 2, 3], "y": [1, 1, 1, 1]})
    assert crops.checked(table).cell.tolist() == ["1", "1", "2", "3"]
    assert crops.checked(table.iloc[:0]).empty


def test_ids_stay_text():
    table = pd.DataFrame({"image": ["a", "a"], "cell": ["007", "7"], "x": [1, 2], "y": [1, 1]})
    assert crops.checked(table).cell.tolist() == ["007", "7"]
    whole = pd.DataFrame({"image": ["a", "a"], "cell": [7.0, 8.0], "x": [1, 2], "y": [1, 1]})
    assert crops.checked(whole).cell.tolist() == ["7", "8"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x,y\n1,2\n", r"wanted columns x, y, and image or plate, well and site; got \['x', 'y'\]"),
        ("plate,well,x,y\nP,A01,1,2\n", "wanted columns x, y"),
        ("image,x\na,1\n", "wanted columns x, y"),
        ("image,x,y\na,1,2\na,,2\n", "row 2: x is no number"),
        ("image,x,y\na,1,two\n", "row 1: y is no number .'two'."),
        ("image,x,y\na,inf,2\n", "row 1: x is no number"),
        ("image,x,y\n ,1,2\n", "row 1: image is blank"),
        ("image,cell,x,y\na,,1,2\n", "row 1: cell is blank"),
        ("image,cell,x,y\na,1,1,2\na,1,5,6\na,1,7,6\n", "row 2: the cell is there twice .'1'., and 1 rows more"),
        ("image,x,y\na,1,2\na,1,2\n", "row 2: another cell lies at the same place"),
        (f"image,cell,x,y\na,{'c' * 65},1,2\n", "row 1: the id of the cell is longer than 64 bytes"),
        ("", "neither CSV nor Parquet"),
    ],
)
def test_tables_that_are_wrong(tmp_path, text, sentence):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(InputError, match=sentence):
        crops.read(str(tmp_path / "c.csv"))


def test_files_that_are_no_table(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        crops.read(str(tmp_path / "missing.csv"))
    for name, data in (("a.parquet", b"not parquet"), ("a.csv", b"\xff\xfe\x00\x01"), ("b.parquet", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match="neither CSV nor Parquet"):
            crops.read(str(tmp_path / name))


FOUND = Cells(crops=Crops(size=32), nuclei=Nuclei(diameter=16), channel=0)
LISTED = Cells(crops=Crops(size=32))


def nucleus(um=None):
    """A field of one nucleus at (60, 50)."""
    i, j = np.ogrid[:120, :100]
    array = np.full((2, 120, 100, 1), 50, np.uint16)
    array[0, (i - 60) ** 2 + (j - 50) ** 2 < 64, 0] = 800
    return Volume(array, np.diag([-(um or 1000) / 1000, -(um or 1000) / 1000, 1, 1]))


def test_cells_are_where_the_finder_or_the_table_says():
    ((cell, x, y, place),) = crops.located(nucleus(), FOUND)
    assert (cell, round(x), round(y), place.index) == ("1", 60, 50, (44, 34, 0))
    assert crops.located(nucleus(), LISTED, centres(("a", x, y))) == [("a", x, y, place)]
    with pytest.raises(InputError, match="come from a table: wanted centres with columns cell, x and y"):
        crops.located(nucleus(), LISTED)
    with pytest.raises(InputError, match="wanted no centres"):
        crops.located(nucleus(), FOUND, centres(("a", x, y)))


def test_a_field_of_no_cell_that_can_be_cut_is_refused():
    empty = nucleus()
    empty = empty.with_array(np.full_like(empty.array, 50))
    with pytest.raises(Refused, match="NO_CELLS: 0 cells are there"):
        crops.located(empty, FOUND)
    with pytest.raises(Refused, match="NO_CELLS: 1 cells are there, the crop of 32 pixels of none lies inside the field"):
        crops.located(nucleus(), LISTED, centres(("a", 3, 50)))
    with pytest.raises(Refused, match="CENTRE_OUTSIDE: cell a"):
        crops.located(nucleus(), LISTED, centres(("a", 130, 50)))
    with pytest.raises(Refused, match="CHANNELS: image has 2 channels, nuclei are looked for in number 3"):
        crops.located(nucleus(), FOUND.model_copy(update={"channel": 2}))
    with pytest.raises(Refused, match="FIELD_SHAPE"):
        crops.located(Volume(np.zeros((1, 9, 9, 4)), np.eye(4)), FOUND)


def test_a_diameter_in_um_needs_the_size_of_a_pixel():
    um = FOUND.model_copy(update={"nuclei": Nuclei(diameter=8, unit="um")})
    ((_, x, y, _),) = crops.located(nucleus(0.5), um)
    assert (round(x), round(y)) == (60, 50)
    with pytest.raises(Refused, match="MISSING_SPACING: the field does not say how large its pixels are"):
        crops.located(nucleus(), um)


def header(name, **facts):
    sources = (f"file:///a/{name}/1.tif", f"file:///a/{name}/2.tif")
    paths = tuple(s.removeprefix("file:///a/") for s in sources)
    affine = tuple(np.eye(4).ravel())
    return VolumeHeader(name, "plate", "HCS", "", sources, paths, ("0", "1"), (2, 40, 30, 1), affine, to_json(facts))


HEADERS = [
    header("u1", plate="P1", well="A01", site=1),
    header("u2", plate="P1", well="B02", site=1),
    header("u3", plate="P2", well="A01", site=1),
    header("u4", well="A01"),
]


def table(*rows):
    return crops.checked(pd.DataFrame(rows, columns=["plate", "well", "site", "cell", "x", "y"]))


ROWS = [
    ("P1", "a1", "01", "7", 1, 2),
    ("P1", "A01", "1", "10", 3, 4),
    ("P2", "A01", "1", "1", 5, 6),
    ("plate", "A1", "1", "1", 7, 8),
]


def test_a_table_is_joined_by_plate_well_and_site(tmp_path):
    made, strays = crops.joined(HEADERS, table(*ROWS, ("P3", "A01", "1", "1", 1, 1)), str(tmp_path / "centres"))
    assert strays == 1 and [h.facts["centres"]["cells"] for h in made] == [2, 0, 1, 1]
    assert len(list((tmp_path / "centres").iterdir())) == 3
    assert crops.listed(made[0]).to_dict("list") == {"cell": ["10", "7"], "x": [3.0, 1.0], "y": [4.0, 2.0]}
    assert crops.listed(made[3]).to_dict("list") == {"cell": ["1"], "x": [7.0], "y": [8.0]}
    with pytest.raises(Refused, match="NO_CENTRES: the table of cells has no row of the field"):
        crops.listed(made[1])
    with pytest.raises(Refused, match="NO_CENTRES: the volumes stage has joined no table"):
        crops.listed(HEADERS[0])
    (tmp_path / "centres" / made[0].facts["centres"]["file"].rpartition("/")[2]).unlink()
    with pytest.raises(Refused, match="UNREADABLE"):
        crops.listed(made[0])


def test_sites_that_are_counted_from_0_are_not_taken_for_the_next_ones(tmp_path):
    with pytest.raises(InputError, match="site 0, and no field is one"):
        crops.joined(HEADERS, table(*ROWS, ("P1", "A01", "0", "1", 1, 1)), str(tmp_path))


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_of_a_wide_table_what_is_wanted_is_read(tmp_path, name):
    wide = table(*ROWS).assign(**{f"Intensity_{n}": "1" for n in range(300)}).rename(columns={"well": "Metadata_Well", "x": " X"})
    save = wide.to_csv if name.endswith("csv") else wide.to_parquet
    save(tmp_path / name, index=False)
    pd.testing.assert_frame_equal(crops.read(str(tmp_path / name)), table(*ROWS))
    without = wide.drop(columns=" X")
    (without.to_csv if name.endswith("csv") else without.to_parquet)(tmp_path / name, index=False)
    with pytest.raises(InputError, match="wanted columns x, y.*Intensity_299"):
        crops.read(str(tmp_path / name))


def test_the_uid_of_a_field_depends_on_its_own_cells_alone(tmp_path):
    made, _ = crops.joined(HEADERS, table(*ROWS), str(tmp_path))
    uids = [h.uid for h in made]
    assert not {h.uid for h in HEADERS} & set(uids) and len(set(uids)) == 4
    again, _ = crops.joined(HEADERS, table(*ROWS[::-1]), str(tmp_path))
    assert again == made
    moved, _ = crops.joined(HEADERS, table(("P1", "A01", "1", "7", 1, 2.5), *ROWS[1:]), str(tmp_path))
    assert [h.uid == uid for h, uid in zip(moved, uids, strict=True)] == [False, True, True, True]
    assert crops.listed(moved[0]).y.tolist() == [4.0, 2.5] and crops.listed(made[0]).y.tolist() == [4.0, 2.0]


def test_a_table_is_joined_by_the_path_of_an_image_or_its_end(tmp_path):
    rows = pd.DataFrame([("u1/2.tif", 1, 2), ("u2/1.tif", 3, 4)], columns=["image", "x", "y"])
    made, strays = crops.joined(HEADERS, crops.checked(rows), str(tmp_path))
    assert strays == 0 and [h.facts["centres"]["cells"] for h in made] == [1, 1, 0, 0]
    rows["image"] = ["2.tif", "u2/1.tif"]
    with pytest.raises(InputError, match=r"image 2.tif is of 4 fields, such as u1/1.tif and u2/1.tif: name them by path"):
        crops.joined(HEADERS, crops.checked(rows), str(tmp_path))


def test_a_table_that_fits_no_field_or_several_is_said(tmp_path):
    with pytest.raises(
        InputError, match="none of its 1 rows is of a field that is there; the first is of plate Q, well A01, site 1"
    ):
        crops.joined(HEADERS, table(("Q", "A01", "1", "1", 1, 2)), str(tmp_path))
    with pytest.raises(InputError, match="it has no row"):
        crops.joined(HEADERS, table(), str(tmp_path))
    times = [header(f"t{t}", plate="P1", well="A01", site=1, t=t) for t in (1, 2)]
    with pytest.raises(InputError, match="plate P1, well A01, site 1 is of 2 fields"):
        crops.joined(times, table(*ROWS), str(tmp_path))
