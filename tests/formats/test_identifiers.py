import pytest
from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from sparkmed.formats.identifiers import Identifiers, encodings, require_absent
from sparkmed.rejection import Refused


def dataset(**elements):
    ds = Dataset()
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


@pytest.mark.parametrize(
    ("elements", "held"),
    [
        ({"PatientName": "Quixote^Don"}, "the QUIXOTE protocol"),
        ({"PatientName": "Li^Wei"}, "for Wei Li, knee"),
        ({"ReferringPhysicianName": "Panza^Sancho"}, "panza"),
        ({"PatientID": "A-1605"}, "xa-1605x"),
        ({"PatientID": "31415"}, "id 31415."),
        ({"AccessionNumber": "314159"}, "0314159265"),
        ({"InstitutionName": "La Mancha General"}, "LA MANCHA GENERAL"),
        ({"StudyDate": "20240131"}, "scan of 20240131"),
        ({"DeviceSerialNumber": "SN-77"}, "sn-77"),
        ({"RadiationMachineName": "LINAC-2"}, "linac-2"),
        ({"PatientID": "0000314159"}, "id 314159"),
        ({"PatientBirthDate": "19470929"}, "born 1947-09-29"),
        ({"PatientBirthDate": "19470929"}, "born 29.09.1947"),
        ({"PatientName": "M\u00fcller^J"}, "MULLER"),
        ({"PatientName": "M\u00fcller^J"}, "Mueller"),
        ({"PatientName": "Mueller^J"}, "m\u00fcller"),
        ({"PatientName": "We\u00df^Gro\u00dfmann"}, "GROSSMANN"),
        ({"PatientName": "Pe\u00f1aranda"}, "pen\u0303aranda"),
        ({"PatientName": "\u00c7EL\u0130K"}, "\u00e7elik"),
        ({"PatientName": "\u0418\u0432\u0430\u043d\u043e\u0432"}, "\u0418\u0412\u0410\u041d\u041e\u0412"),
        ({"PatientName": "O'Quixo^P"}, "OQUIXO"),
        ({"PatientName": "Quixote^Don"}, "Q u i x o t e"),
        ({"PatientName": "Quixote^Don"}, "\uff31uixote"),  # full width
        ({"PatientName": "\u738b^\u4f1f"}, "B30 \u738b\u4f1f"),
        ({"PatientName": "Li^O"}, "for O. Li"),
        ({"PatientBirthDate": "19620305"}, "born 5.3.1962"),
        ({"PatientBirthDate": "19620305"}, "born 5 Mar 1962"),
        ({"PatientBirthDate": "19620305"}, "March 5, 1962"),
        ({"PatientBirthDate": "19620305"}, "geb. 5. M\u00e4rz 62"),
        ({"PatientBirthDate": "19620305"}, "03/05/62"),
        ({"PatientBirthDate": "19620305"}, "x 620305"),
        ({"StudyDate": "20240131"}, "on 31/1/2024"),
        ({"PatientID": "1234567"}, "id 123 4567"),
    ],
)
def test_identifying_values_are_found(elements, held):
    assert Identifiers(dataset(**elements)).found_in(held) is not None


@pytest.mark.parametrize(
    ("elements", "held"),
    [
        ({"PatientName": "Don^Q^^MR"}, "MR"),  # words below four letters are everywhere
        ({"PatientID": "1605"}, "3.16051"),  # as are short numbers
        ({"PatientID": "7"}, "7"),
        ({"StudyDescription": "BRAIN"}, "BRAIN"),  # describes, names nobody
        ({"PatientName": "Li^O"}, "liol li, oli"),
        ({"PatientName": "\uff2d\uff32"}, "MR"),  # Latin of full width
        ({"PatientName": "\u2014 \u2014"}, "a \u2014\u2014 b"),
        ({"StudyDate": "20240131"}, "version 1.31.24"),  # of two digits are those of birth alone
        ({"PatientBirthDate": "19620305"}, "1620305"),
    ],
)
def test_what_says_nothing_is_not(elements, held):
    assert Identifiers(dataset(**elements)).found_in(held) is None


def test_names_of_other_scripts_and_nested_ones_are_found():
    ds = dataset(OtherPatientIDsSequence=Sequence([dataset(PatientID="NESTED-9")]))
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientName = "Yamada^Tarou=山田^太郎"
    known = Identifiers(ds)
    assert known.found_in("山田") and known.found_in_bytes("太郎".encode("utf-16-le")) and known.found_in("nested-9")


def test_uids_are_found_with_more_behind_them():
    known = Identifiers(dataset())
    known.add_uid("1.2.3.4.5.6", 0x0020000D)
    assert known.found_in("of 1.2.3.4.5.6.77!") == known.found_in("uid1.2.3.4.5.6") == 0x0020000D
    assert known.found_in("1.2.3.4.5.66") is None


def test_hostile_values_take_no_time():
    known = Identifiers(dataset(PatientName="Quixote^Don"))
    known.add_uid("1.2.3.4.5.6", 0x0020000D)
    assert known.found_in("7" * 5_000_000) is None
    with pytest.raises(Refused, match="NOT_CLEAN"):
        Identifiers(dataset(OtherPatientNames=[f"Name{n}^X" for n in range(4000)]))


def test_nothing_of_it_is_shown():
    assert "uixote" not in repr(Identifiers(dataset(PatientName="Quixote^Don")))


@pytest.mark.filterwarnings("ignore:Invalid value")
@pytest.mark.parametrize(
    "leak",
    [
        {"BodyPartExamined": "QUIXOTE"},
        {"StudyDate": "20240131"},
        {"AcquisitionDateTime": "20240131101500"},
        {"FrameOfReferenceUID": "1.2.3.4.5.6"},
        {"StudyTime": "101500 or so"},
        {"SliceThickness": "314159"},
        {"SliceThickness": "314159.0"},
        {"InstanceNumber": "+314159"},
        {"InstanceNumber": "00314159"},
        {"ReferencedSOPClassUID": "1.2.20240131"},  # no class of the standard
        {"Manufacturer": "see 1.2.3.4.5.6"},
        {"ReferencedImageSequence": Sequence([dataset(ReferencedSOPInstanceUID="1.2.3.4.5.6")])},
    ],
)
def test_what_is_left_is_refused_without_its_value(leak):
    known = Identifiers(dataset(PatientName="Quixote^Don", StudyDate="20240131", AccessionNumber="314159"))
    known.add_uid("1.2.3.4.5.6", 0x00200052)
    with pytest.raises(Refused) as e:
        require_absent(known, dataset(**leak), {}, {"20200101"}, {"1.2.3.4.5.6"})
    assert e.value.reason == "NOT_CLEAN"
    assert not any(v in e.value.message.lower() for v in ("quixote", "20240131", "1.2.3.4.5.6", "314159"))


def test_what_may_stay_passes():
    known = Identifiers(dataset(PatientName="Quixote^Don", StudyDate="20240131"))
    clean = dataset(StudyDate="20200101", StudyTime="101500.5", Modality="CT", SliceThickness="1e-3", SOPInstanceUID="2.25.1")
    require_absent(known, clean, {}, {"20200101"}, {"1.2.3.4.5.6"})


def test_bytes_that_are_no_text_are_searched_in_every_encoding():
    known = Identifiers(dataset(PatientName="Quixote^Don", AccessionNumber="314159"))
    assert known.found_in_bytes(b"\0\xffQUIXOTE\0") and known.found_in_bytes("xquixote".encode("utf-16-le"))
    assert known.found_in_bytes(b"\xff314159") and not known.found_in_bytes(b"\xff31415")
    assert known.found_in_bytes(b"\xff314159", shortest=7) is None
    assert known.found_in_bytes(b"\0\0mluc" + "Quixote".encode("utf-16-be"))  # of an ICC profile
    born = Identifiers(dataset(PatientBirthDate="19620305"))
    assert born.found_in_bytes(b"\0\0" + b"1962-03-05") and born.found_in_bytes("05.03.1962".encode("utf-16-be"))


def test_a_name_of_another_encoding_than_declared_is_found():
    ds = dataset(SpecificCharacterSet="ISO_IR 100")
    ds[0x00100010] = RawDataElement(Tag(0x00100010), "PN", 0, "M\u00fcller^J\u00f6rg".encode(), 0, False, True)
    assert Identifiers(ds).found_in("tumor M\u00fcller")


@pytest.mark.parametrize(
    ("charset", "codec", "name", "text"),
    [
        ("ISO_IR 144", "iso8859-5", "\u0418\u0432\u0430\u043d\u043e\u0432^\u041f", "\u0418\u0412\u0410\u041d\u041e\u0412"),
        ("ISO_IR 101", "iso8859-2", "Dvo\u0159\u00e1k^A", "DVO\u0158\u00c1K"),
        ("GB18030", "gb18030", "\u738b\u5c0f\u4e1c", "\u738b\u5c0f\u4e1c"),
        ("ISO 2022 IR 6\\ISO 2022 IR 87", "iso2022_jp", "Y=\u5c71\u7530^\u592a\u90ce", "\u982d \u5c71\u7530"),
    ],
)
def test_texts_are_decoded_by_the_character_set_of_their_own_data_set(charset, codec, name, text):
    known = Identifiers(dataset(SpecificCharacterSet="ISO_IR 192", PatientName=name))
    item = dataset(SpecificCharacterSet=charset.split("\\"))
    item[0x00080104] = RawDataElement(Tag(0x00080104), "LO", 0, text.encode(codec), 0, False, True)
    with pytest.raises(Refused, match="NOT_CLEAN"):
        require_absent(known, dataset(AnatomicRegionSequence=Sequence([item])), {}, set(), set())


@pytest.mark.parametrize("raw", [b"Schl\0ter", b"M\xfcller", b"\x1b$B;3ED"])
def test_a_text_that_cannot_be_decoded_is_refused(raw):
    ds = Dataset()
    ds[0x00080070] = RawDataElement(Tag(0x00080070), "LO", 0, raw, 0, False, True)
    with pytest.raises(Refused, match="cannot be decoded"):
        require_absent(Identifiers(Dataset()), ds, {}, set(), set())


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_character_set_is_refused():
    for term in ("Quixote", "utf-7", "ISO_IR 999"):
        with pytest.raises(Refused, match="BAD_VALUE"):
            encodings(dataset(SpecificCharacterSet=term))
    assert encodings(dataset(SpecificCharacterSet="ISO-IR 100")) == ["latin_1"]
    assert encodings(Dataset()) == ["ascii"] and encodings(Dataset(), ["UTF8"]) == ["UTF8"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("vr", ["LO", "UT", "SH", "CS", "AE", "OB", "UN"])
def test_a_name_under_another_vr_is_a_name(vr):
    ds = Dataset()
    ds[0x00100010] = RawDataElement(Tag(0x00100010), vr, 0, b"Quixote^Don", 0, False, True)
    assert Identifiers(ds).found_in("for quixote")
