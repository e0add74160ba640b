import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmed.hcs import wells
from sparkmed.rejection import InputError, Refused


def test_examples():
    assert doctest.testmod(wells).failed == 0


def test_rows_of_a_plate_of_1536_wells():
    assert [wells.row_letters(n) for n in (1, 8, 16, 26, 27, 32)] == ["A", "H", "P", "Z", "AA", "AF"]


@pytest.mark.parametrize("count", wells.FORMATS)
def test_every_well_has_a_name_of_its_own(count):
    rows, columns = wells.FORMATS[count]
    places = [(r, c) for r in range(1, rows + 1) for c in range(1, columns + 1)]
    assert len(places) == count
    names = [wells.name(*p) for p in places]
    assert len(set(names)) == count
    assert [wells.parse(n, count) for n in names] == places


@pytest.mark.parametrize("text", ["B3", "b03", "B003", " B03 ", "B - 3", "B - 03", "r02c03", "R2C3", "B-03"])
def test_spellings(text):
    assert wells.parse(text) == (2, 3)


@pytest.mark.parametrize(
    "text", ["", "A", "1", "A0", "A1B", "A0001", "AAA01", "01A", "r1c", "Ä01", "A٣", "A01\nB01", "A-1-1", "-A1"]
)
def test_what_is_no_well(text):
    with pytest.raises(Refused, match="BAD_WELL"):
        wells.parse(text)


@pytest.mark.parametrize(
    ("text", "count"), [("I01", 96), ("A13", 96), ("Q01", 384), ("A25", 384), ("AG01", 1536), ("A49", 1536), ("C1", 6)]
)
def test_beyond_the_plate(text, count):
    with pytest.raises(Refused, match=f"BAD_WELL.*plate of {count} wells"):
        wells.parse(text, count)


def test_a_format_that_is_none():
    with pytest.raises(InputError, match="6, 12, 24, 48, 96, 384, 1536 wells, got 100"):
        wells.parse("A01", 100)


@given(st.text(max_size=6))
def test_any_text_is_a_well_or_refused(text):
    try:
        row, column = wells.parse(text)
    except Refused as e:
        assert e.reason == "BAD_WELL"
    else:
        assert wells.parse(wells.name(row, column)) == (row, column)
