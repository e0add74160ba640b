import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmed.config import Crops, Nuclei
from sparkmed.hcs import crops, nuclei
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
