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
    assert segmentation.Legible(object_of())(value) == kept


def test_a_declared_character_set_is_believed():
    text = "Gefäß".encode().decode("latin-1")
    assert segmentation.Legible(object_of(charset="ISO_IR 192"))(text) == WITHHELD, "a control character"
    assert segmentation.Legible(object_of("Yamada^Tarou=山田^太郎", charset="ISO_IR 192"))("山田の肝臓") == WITHHELD


def test_of_a_code_name_only_the_whole_names_anybody():
    code = object_of("Pancreas-CT-0001", "Pancreas-CT-0001")
    assert segmentation.Legible(code)("Pancreas") == "Pancreas"
    assert segmentation.Legible(code)("pancreas-ct-0001 tumour") == WITHHELD


def test_a_name_that_is_withheld_may_be_any():
    segments = [{"number": 1, "label": "Liver"}, {"number": 2, "label": "", "property": ["1", "SCT", WITHHELD]}]
    with pytest.raises(Refused, match="LABEL_UNREADABLE: names of 1 of 2 segments"):
        segmentation.named(segments, {"liver": 1})
    assert segmentation.named(segments[:1], {folded("LIVER"): 1}) == {1: 1}


@pytest.mark.parametrize("numbers", [(1, 1), (1, None)])
def test_segments_have_numbers_of_their_own(numbers):
    with pytest.raises(Refused, match="BAD_VALUE: 2 segments have 1 numbers"):
        segmentation.numbered([{"number": n} for n in numbers])


@pytest.mark.parametrize(
    ("elements", "value"),
    [
        ({"AccessionNumber": "A7766554"}, "GTV A7766554"),
        ({"ReferringPhysicianName": "Cervantes^Miguel"}, "GTV Dr Cervantes"),
        ({"OperatorsName": "Cervantes^Miguel"}, "PTV_cervantes"),
        ({"PatientBirthDate": "19620305"}, "GTV 19620305"),
        ({"InstitutionName": "La Mancha"}, "GTV La Mancha"),
        ({"PatientName": "Müller^Jörg"}, "GTV Mueller"),
        ({"PatientName": "Panza Sancho 2"}, "GTV Panza"),
        ({"OtherPatientNames": "Lorenzo^Aldonza"}, "GTV Aldonza"),
        ({"OtherPatientIDsSequence": [dicoms.nested(PatientID="NESTED-9")]}, "nested-9"),
    ],
)
def test_names_that_say_who_somebody_is_are_withheld(elements, value):
    ds = object_of(charset="ISO_IR 192")
    for name, own in elements.items():
        setattr(ds, name, own)
    assert segmentation.Legible(ds)(value) == WITHHELD
    assert segmentation.Legible(ds)("Gefäß links") == "Gefäß links"


@pytest.mark.filterwarnings("ignore")
def test_no_name_is_kept_when_who_it_may_name_cannot_be_read():
    assert segmentation.Legible(object_of(charset="ISO_IR 999"))("Liver") == WITHHELD
