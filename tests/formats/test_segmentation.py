import pytest

from formats import dicoms
from sparkmed.config import folded
from sparkmed.formats import segmentation
from sparkmed.formats.segmentation import WITHHELD
from sparkmed.rejection import Refused


def object_of(name="Herz^Anna-Li^M", own="4711", charset=None):
    ds = dicoms.nested(PatientName=name, PatientID=own)
    if charset:
        ds.SpecificCharacterSet = charset
    return ds


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("GTV+", "GTV+"),
        ("  Left\t kidney ", "Left kidney"),
        ("O\u0308dem", "Ödem"),
        ("50% isodose", "50% isodose"),
        (["liver", "lesion"], "liver\\lesion"),
        (None, ""),
        ("x" * 70, "x" * 64),
        ("Lebergefäß".encode().decode("latin-1"), "Lebergefäß"),
        ("Lebergefäß", "Lebergefäß"),
        ("M", "M"),
        ("Liver", "Liver"),
        ("a\x07b", WITHHELD),
        ("Gef\N{REPLACEMENT CHARACTER}", WITHHELD),
        ("Herzkranzgefäße", WITHHELD),
        ("tumour_ANNA", WITHHELD),
        ("Li 2", WITHHELD),
        ("x" * 70 + " Herz", WITHHELD),
        ("PTV/4711", WITHHELD),
    ],
)
def test_names_that_are_kept(value, kept):
    assert segmentation.legible(value, object_of()) == kept


def test_a_declared_character_set_is_believed():
    text = "Gefäß".encode().decode("latin-1")
    assert segmentation.legible(text, object_of(charset="ISO_IR 192")) == WITHHELD, "a control character"
    assert segmentation.legible("山田の肝臓", object_of("Yamada^Tarou=山田^太郎", charset="ISO_IR 192")) == WITHHELD


def test_of_a_code_name_only_the_whole_names_anybody():
    code = object_of("Pancreas-CT-0001", "Pancreas-CT-0001")
    assert segmentation.legible("Pancreas", code) == "Pancreas"
    assert segmentation.legible("pancreas-ct-0001 tumour", code) == WITHHELD


def test_a_name_that_is_withheld_may_be_any():
    segments = [{"number": 1, "label": "Liver"}, {"number": 2, "label": "", "property": ["1", "SCT", WITHHELD]}]
    with pytest.raises(Refused, match="LABEL_UNREADABLE: names of 1 of 2 segments"):
        segmentation.named(segments, {"liver": 1})
    assert segmentation.named(segments[:1], {folded("LIVER"): 1}) == {1: 1}


@pytest.mark.parametrize("numbers", [(1, 1), (1, None)])
def test_segments_have_numbers_of_their_own(numbers):
    with pytest.raises(Refused, match="BAD_VALUE: 2 segments have 1 numbers"):
        segmentation.numbered([{"number": n} for n in numbers])
