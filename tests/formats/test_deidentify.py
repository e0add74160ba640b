import io
import pathlib
import warnings

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian, JPEGLSLossless, RLELossless

import sparkmed
from formats import dicoms
from formats.dicoms import SECRET
from sparkmed import config, reasons
from sparkmed.formats import deidentify as module
from sparkmed.formats.deidentify import days_back, deidentify, new_uid
from sparkmed.imaging import splits
from sparkmed.rejection import Refused

KEY = b"0123456789abcdef0123456789abcdef"
PATIENT = f"{SECRET}-1605"
PIXELS = np.arange(48, dtype=np.uint16).reshape(6, 8)


def item(**elements):
    ds = Dataset()
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


def image(**elements):
    defaults = {"StudyDate": "20240131", "StudyTime": "101500", "PatientBirthDate": "19470929", "StudyID": "S-4711"}
    return dicoms.dataset(PIXELS, **defaults | elements)


def cleaned(ds=None, key=KEY, **settings):
    """The de-identified data set."""
    out = deidentify(dicoms.encoded(ds or image()), key, config.Deidentify(**settings))
    return pydicom.dcmread(io.BytesIO(out.data))


def refusal(ds, **settings):
    with pytest.raises(Refused) as e:
        deidentify(ds if isinstance(ds, bytes) else dicoms.encoded(ds), KEY, config.Deidentify(**settings))
    assert e.value.reason in reasons.SENTENCES and SECRET.lower() not in e.value.message.lower()
    return e.value.reason


def test_the_subject_is_the_one_of_the_catalog():
    out = deidentify(dicoms.encoded(image()), KEY)
    ds = pydicom.dcmread(io.BytesIO(out.data))
    subject = splits.pseudonym(PATIENT, KEY)
    assert ds.PatientID == ds.PatientName == subject and out.path.startswith(f"{subject}/2.25.")
    assert cleaned(image(PatientID=None)).PatientID == splits.pseudonym(f"{SECRET}^Don", KEY)
    nobody = cleaned(image(PatientID=None, PatientName=None))
    assert nobody.PatientID == splits.pseudonym("study 1.2.3.4", KEY)


def test_the_copy_says_what_was_done():
    ds = cleaned(device="kept")
    assert ds.PatientIdentityRemoved == "YES" and ds.LongitudinalTemporalInformationModified == "MODIFIED"
    assert "PS3.15" in ds.DeidentificationMethod
    codes = [(c.CodeValue, c.CodingSchemeDesignator) for c in ds.DeidentificationMethodCodeSequence]
    assert codes == [("113100", "DCM"), ("113107", "DCM"), ("113109", "DCM")]
    basic = cleaned(dates="removed")
    assert basic.LongitudinalTemporalInformationModified == "REMOVED"
    assert [c.CodeValue for c in basic.DeidentificationMethodCodeSequence] == ["113100"]


def test_each_action_is_carried_out_and_listed():
    source = image(
        PatientAddress="1 Windmill Lane",
        ContrastBolusAgent="9 ml for Don",
        DeviceSerialNumber="SN-4242",
        SeriesDescription="T1 post",
        BodyPartExamined="BRAIN",
        AcquisitionDate="20240201",
    )
    ds, listed = cleaned(source), deidentify(dicoms.encoded(source), KEY).actions
    assert "PatientAddress" not in ds and "SeriesDescription" not in ds
    assert ds.AccessionNumber == "" and ds.PatientBirthDate == ""
    assert ds.ContrastBolusAgent == ds.DeviceSerialNumber == "DEIDENTIFIED"
    assert ds.BodyPartExamined == "BRAIN" and ds.Rows == 6
    wanted = {
        "(0010,1040) PatientAddress X",
        "(0008,0050) AccessionNumber Z",
        "(0018,1000) DeviceSerialNumber D",
        "(0008,0018) SOPInstanceUID U",
        "(0008,0020) StudyDate C",
    }
    assert wanted <= set(listed) and not any("Windmill" in a or "BodyPart" in a for a in listed)
    assert cleaned(source, dates="removed").AcquisitionDate == ""


def test_sequences_are_cleaned_at_every_depth():
    inner = item(PatientName=f"{SECRET}^Don", CodeMeaning="head", ReferencedSOPInstanceUID="1.2.3.4.99", StudyDate="20240131")
    inner.add_new(0x00091001, "LO", SECRET)
    ds = cleaned(image(AnatomicRegionSequence=Sequence([item(AnatomicRegionModifierSequence=Sequence([inner]))])))
    found = ds.AnatomicRegionSequence[0].AnatomicRegionModifierSequence[0]
    assert found.CodeMeaning == "head" and found.PatientName == ""
    assert found.ReferencedSOPInstanceUID == new_uid("1.2.3.4.99", KEY) and found.StudyDate == ds.StudyDate
    assert 0x00091001 not in found


def test_private_unknown_and_odd_elements_go():
    source = image()
    source.add_new(0x00090010, "LO", "GEMS_IDEN_01")
    source.add_new(0x00091002, "SH", SECRET)
    source.add_new(0x00091003, "SQ", [item(PatientName=SECRET)])
    source.add_new(0x00281F77, "LO", SECRET)  # not in the dictionary
    source.add_new(0x00280005, "US", 2)  # retired
    source.add_new(0x00400006, "PN", SECRET)
    source.add_new(0x60000010, "US", 6)
    source.add_new(0x60003000, "OW", b"\1\2" * 4)
    source.add_new(0x50000010, "US", 6)
    source.add_new(0xFFFCFFFC, "OB", SECRET.encode() + b"\0")
    ds = cleaned(source)
    assert not {t >> 16 for t in ds.keys()} - {0x08, 0x10, 0x12, 0x20, 0x28, 0x7FE0}
    assert 0x00281F77 not in ds and 0x00280005 not in ds


def test_a_name_where_a_number_belongs_goes():
    raw = dicoms.encoded(image(SliceThickness="1234567")).replace(b"1234567 ", b"Panza   ")
    assert "SliceThickness" not in pydicom.dcmread(io.BytesIO(deidentify(raw, KEY).data))


@pytest.mark.parametrize(
    "planted",
    [
        {"BodyPartExamined": SECRET.upper()},
        {"Manufacturer": f"built for {SECRET}"},
        {"SoftwareVersions": ["1.0", f"patched {SECRET.lower()}"]},
        {"ManufacturerModelName": "model S-4711"},
        {"SequenceName": "on 20240131"},
        {"ScanOptions": "19470929"},
        {"SequenceName": "1.2.3.4.5.777", "SeriesInstanceUID": "1.2.3.4.5.777"},
        {"AnatomicRegionSequence": Sequence([item(CodeMeaning=f"head of {SECRET}")])},
    ],
)
def test_an_identifier_planted_where_the_profile_keeps_text_is_not_clean(planted):
    assert refusal(image(**planted)) == "NOT_CLEAN"


@pytest.mark.filterwarnings("ignore")
def test_what_may_say_who_it_is_goes_wherever_it_stands():
    planted = {
        "PatientBirthDateInAlternativeCalendar": "5708-01-15",
        "RetrieveURL": "https://pacs.la-mancha.invalid/5708",
        "ContactDisplayName": "Dulcinea",
        "DeviceID": "Dulcinea",
        "DocumentTitle": "Dulcinea",
        "DoseComment": "Dulcinea",
        "EncryptedContent": b"Dulcinea",
    }
    source = image(
        **planted, AnatomicRegionSequence=Sequence([item(**planted)]), SoftwareVersions="x", RadiationMachineName="LINAC-2"
    )
    raw = dicoms.encoded(source)
    out = deidentify(raw, KEY).data
    assert not [w for w in (b"5708", b"invalid", b"Dulcinea", b"LINAC") if w in out]


def test_a_text_that_cannot_be_read_goes():
    raw = dicoms.encoded(image(Manufacturer="Abcdefgh"))
    for wrong in (b"Qui\0xote", b"Qu\xefxot\xeb!"):
        assert "Manufacturer" not in pydicom.dcmread(io.BytesIO(deidentify(raw.replace(b"Abcdefgh", wrong), KEY).data))


def test_an_element_in_a_vr_that_is_not_its_own_goes():
    raw = dicoms.encoded(image(Manufacturer="Abcdefgh"))
    at = raw.index(b"\x08\0\x70\0LO")
    assert "Manufacturer" not in pydicom.dcmread(io.BytesIO(deidentify(raw[: at + 4] + b"UI" + raw[at + 6 :], KEY).data))


def test_uids_that_the_standard_does_not_define_are_replaced():
    ds = cleaned(image(ReferencedImageSequence=Sequence([item(ReferencedSOPClassUID="1.2.19470929", CodingSchemeUID="1.2.3.99")])))
    found = ds.ReferencedImageSequence[0]
    assert found.ReferencedSOPClassUID == new_uid("1.2.19470929", KEY) and found.CodingSchemeUID == new_uid("1.2.3.99", KEY)


def test_uids_stay_references():
    one = image(SOPInstanceUID="1.2.3.4.10")
    other = image(SOPInstanceUID="1.2.3.4.11", ReferencedImageSequence=Sequence([item(ReferencedSOPInstanceUID="1.2.3.4.10")]))
    a, b = cleaned(one), cleaned(other)
    assert b.ReferencedImageSequence[0].ReferencedSOPInstanceUID == a.SOPInstanceUID == a.file_meta.MediaStorageSOPInstanceUID
    assert (a.StudyInstanceUID, a.FrameOfReferenceUID) == (b.StudyInstanceUID, b.FrameOfReferenceUID)
    assert a.SOPClassUID == one.SOPClassUID
    assert cleaned(one, key=KEY[::-1]).SOPInstanceUID != a.SOPInstanceUID


def test_a_new_uid_is_a_uuid_and_those_of_the_standard_stay():
    uid = new_uid("1.2.3.4", KEY)
    assert uid.startswith("2.25.") and pydicom.uid.UID(uid).is_valid and int(uid[5:]) < 2**128
    assert new_uid("1.2.840.10008.5.1.4.1.1.2", KEY) == "1.2.840.10008.5.1.4.1.1.2"
    assert new_uid("1.2.840.10008.1.4.1.1", KEY) == "1.2.840.10008.1.4.1.1"  # Talairach, a frame of reference


def test_dates_of_a_subject_shift_by_the_same_days():
    first = cleaned(image(StudyDate="20240131", AcquisitionDateTime="20240131235959.5+0100", SeriesTime="235959.5"))
    second = cleaned(image(StudyDate="20240301", StudyInstanceUID="1.2.3.5"))
    days = days_back(PATIENT, KEY)

    def date(text):
        return np.datetime64(f"{text[:4]}-{text[4:6]}-{text[6:8]}")

    assert 1 <= days <= module.DAYS and date("20240131") - date(first.StudyDate) == days
    assert date(second.StudyDate) - date(first.StudyDate) == 30
    assert first.AcquisitionDateTime == f"{first.StudyDate}235959.5+0100" and first.SeriesTime == "235959.5"
    assert len({days_back(str(n), KEY) for n in range(100)}) > 90


@pytest.mark.parametrize("odd", ["", "2024", "00010101", "20241399", "tomorrow", "202401"])
def test_a_date_that_is_none_loses_its_value(odd):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = dicoms.encoded(image(StudyDate="77777777")).replace(b"77777777", odd.ljust(8).encode())
    assert pydicom.dcmread(io.BytesIO(deidentify(raw, KEY).data)).StudyDate == ""


def test_a_shifted_date_that_is_another_of_the_patient_is_no_leak():
    days = np.timedelta64(days_back(PATIENT, KEY))
    earlier = str(np.datetime64("2024-01-31") - days).replace("-", "")
    ds = cleaned(image(StudyDate="20240131", SeriesDate=earlier))
    assert ds.StudyDate == earlier and ds.SeriesDate != earlier


def test_the_meta_group_is_ours():
    source = image()
    source.preamble = SECRET.encode().ljust(128, b"\0")
    source.file_meta.SourceApplicationEntityTitle = SECRET
    source.file_meta.PrivateInformationCreatorUID = "1.2.3"
    source.file_meta.PrivateInformation = SECRET.encode()
    out = deidentify(dicoms.encoded(source), KEY)
    ds = pydicom.dcmread(io.BytesIO(out.data))
    assert ds.preamble == b"\0" * 128 and SECRET.encode() not in out.data
    assert {e.keyword for e in ds.file_meta} == {
        "FileMetaInformationGroupLength",
        "FileMetaInformationVersion",
        "MediaStorageSOPClassUID",
        "MediaStorageSOPInstanceUID",
        "TransferSyntaxUID",
        "ImplementationClassUID",
        "ImplementationVersionName",
    }


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEGLSLossless]
)
def test_pixels_and_encoding_stay(syntax):
    source = image()
    if syntax.is_encapsulated:
        source.compress(syntax, generate_instance_uid=False)
    source.file_meta.TransferSyntaxUID = syntax
    source.set_original_encoding(syntax.is_implicit_VR, syntax.is_little_endian)
    if not syntax.is_little_endian:
        source.PixelData = PIXELS.astype(">u2").tobytes()
    ds = cleaned(source)
    assert ds.file_meta.TransferSyntaxUID == syntax and ds.PixelData == source.PixelData
    np.testing.assert_array_equal(ds.pixel_array, PIXELS)


def test_the_same_bytes_each_time_whatever_the_options_before():
    raw = dicoms.encoded(image())
    first = deidentify(raw, KEY)
    deidentify(raw, KEY, config.Deidentify(dates="removed"))
    assert deidentify(raw, KEY) == first


def test_a_copy_can_be_deidentified_again():
    once = deidentify(dicoms.encoded(image(InstitutionName="La Mancha")), KEY).data
    twice = pydicom.dcmread(io.BytesIO(deidentify(once, KEY).data))
    assert twice.InstitutionName == "DEIDENTIFIED" and twice.PatientID != pydicom.dcmread(io.BytesIO(once)).PatientID


SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
SC, US, PHOTO = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.77.1.4"


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"BurnedInAnnotation": "YES"}, "BURNED_IN"),
        ({"SOPClassUID": PHOTO}, "BURNED_IN"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.3"}, "BURNED_IN"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.5.1"}, "BURNED_IN"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.7"}, "BURNED_IN"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.8"}, "BURNED_IN"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.2"}, "BURNED_IN"),
        ({"SOPClassUID": SLIDE, "ImageType": ["ORIGINAL", "PRIMARY", "LABEL", "NONE"]}, "BURNED_IN"),
        ({"SOPClassUID": SLIDE, "ImageType": ["ORIGINAL", "PRIMARY", "OVERVIEW"], "BurnedInAnnotation": "NO"}, "BURNED_IN"),
        ({"SOPClassUID": SLIDE, "SpecimenLabelInImage": "YES", "BurnedInAnnotation": "NO"}, "BURNED_IN"),
        ({"SOPClassUID": US}, "ULTRASOUND"),
        ({"Modality": "IVUS"}, "ULTRASOUND"),
        ({"SOPClassUID": SC}, "SECONDARY_CAPTURE"),
        ({"ConversionType": "WSD"}, "SECONDARY_CAPTURE"),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "SCREEN_SAVE"),
        ({"ImageType": ["DERIVED", "SECONDARY", "OTHER", "CT_SOM5 PROT"]}, "SCREEN_SAVE"),
        ({"BitsStored": 5}, "HIDDEN_BITS"),
    ],
)
def test_what_may_show_a_name_is_held_back_unless_asked_for(elements, reason):
    assert refusal(image(**elements)) == reason
    assert cleaned(image(**elements), allow=[reason.lower()]).PatientIdentityRemoved == "YES"
    others = {"burned_in", "ultrasound", "secondary_capture", "screen_save", "hidden_bits"} - {reason.lower()}
    assert refusal(image(**elements), allow=sorted(others)) == reason


def test_a_slide_without_its_label_passes():
    volume = {"SOPClassUID": SLIDE, "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], "SpecimenLabelInImage": "NO"}
    assert cleaned(image(**volume)).SOPClassUID == SLIDE


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.104.1"}, "DOCUMENT"),
        ({"EncapsulatedDocument": b"%PDF"}, "DOCUMENT"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.33"}, "STRUCTURED_REPORT"),
        ({"ContentSequence": Sequence([item(TextValue="x")])}, "STRUCTURED_REPORT"),
        ({"GraphicAnnotationSequence": Sequence([item()])}, "ANNOTATION"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.9.4.1"}, "VOICE"),
        ({"SOPClassUID": "1.3.12.2.1107.5.9.1"}, "PRIVATE_CLASS"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2.778899"}, "PRIVATE_CLASS"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.38.1"}, "PRIVATE_CLASS"),
        ({"SpecificCharacterSet": SECRET}, "BROKEN_DICOM"),
        ({"StudyInstanceUID": None}, "MISSING_UID"),
    ],
)
def test_what_the_profile_leaves_nothing_of_is_held_back(elements, reason):
    assert refusal(image(**elements), allow=["burned_in", "ultrasound", "secondary_capture", "screen_save"]) == reason


def test_overlays_in_the_pixels_are_held_back_and_negative_numbers_are_not():
    source = image(BitsStored=12)
    for tag, vr, value in ((0x60000010, "US", 6), (0x60000011, "US", 8), (0x60000102, "US", 12)):
        source.add_new(tag, vr, value)
    assert refusal(source) == "HIDDEN_BITS"
    negative = dicoms.dataset(-np.arange(48, dtype=np.int16).reshape(6, 8), BitsStored=12)
    assert cleaned(negative).BitsStored == 12


@pytest.mark.parametrize("data", [b"", b"not DICOM", b"\x89PNG\r\n\x1a\n" + b"\0" * 200])
def test_other_files_are_not_dicom(data):
    assert refusal(data) in ("NOT_DICOM", "EMPTY")


def test_a_file_that_ends_early_is_never_written():
    source = image(AnatomicRegionSequence=Sequence([item(CodeMeaning="head")]))
    source.compress(RLELossless, generate_instance_uid=False)
    raw = dicoms.encoded(source)
    reasons_of_halves = {
        refusal(raw[:length]) for length in range(150, len(raw) - 4)
    }  # the length of the last delimiter is nothing
    assert reasons_of_halves <= {"TRUNCATED", "BROKEN_DICOM", "MISSING_UID", "UNKNOWN_SYNTAX", "NO_PIXEL_DATA"}


def test_bytes_behind_the_image_are_held_back():
    source = image()
    source.PixelData += SECRET.ljust(8).encode()
    assert refusal(source) == "PIXEL_LENGTH"


def test_the_copies_make_the_same_volume(tmp_path):
    voxels = dicoms.stack()
    source = dicoms.write(tmp_path / "source", dicoms.series(voxels, InstanceNumber=lambda k: [3, 1, 4, 2][k]))
    (tmp_path / "copies").mkdir()
    for path in source.iterdir():
        (tmp_path / "copies" / path.name).write_bytes(deidentify(path.read_bytes(), KEY).data)
    ((before,), _), ((after,), _) = (sparkmed.read_archive(str(tmp_path / f)) for f in ("source", "copies"))
    np.testing.assert_array_equal(after.array, before.array)
    np.testing.assert_array_equal(after.affine, before.affine)
    assert after.series_uid == new_uid(before.series_uid, KEY)


def test_damaged_files_are_refused_or_clean():
    """Bytes changed, cut out, put in and repeated at random: nothing but Refused is raised, and no copy holds the name."""
    source = image(AnatomicRegionSequence=Sequence([item(CodeMeaning="head", PatientName=SECRET)]))
    raw, random = dicoms.encoded(source), np.random.default_rng(0)
    written = 0
    for _ in range(400):
        data = bytearray(raw)
        for _ in range(random.integers(1, 4)):
            at, other, length = random.integers(132, len(raw) - 100, 3) % len(data)
            piece = [bytes([length % 256]), b"", bytes(data[other : other + length % 64]), b"\xff\xff\xff\xff", b"UN\0\0"][
                length % 5
            ]
            data[at : at + [1, length % 16, 0, 4, 4][length % 5]] = piece
        try:
            out = deidentify(bytes(data), KEY)
        except Refused as e:
            assert e.reason in reasons.SENTENCES
            continue
        written += 1
        copy = pydicom.dcmread(io.BytesIO(out.data))
        assert SECRET.lower().encode() not in out.data.replace(copy.PixelData, b"").lower()
    assert written > 20


def test_a_private_or_unknown_transfer_syntax_is_refused():
    raw = dicoms.encoded(image()).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.113619.5.2\0\0")
    assert refusal(raw) == "UNKNOWN_SYNTAX"


@pytest.mark.parametrize("depth", [100, 1000, 5000])
def test_deep_nesting_is_refused(depth):
    opened = b"\x08\x00\x18\x22SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * depth
    closed = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0" * depth
    at = dicoms.encoded(image()).index(b"\x10\x00\x10\x00PN")
    raw = dicoms.encoded(image())
    assert refusal(raw[:at] + opened + closed + raw[at:]) == "DEEP_NESTING"


def test_every_public_test_file_is_clean_or_held_back(shared_data):
    """None raises, and no copy holds a word of a name, an id or a UID of its source."""
    written, held = 0, {}
    allow = ("ultrasound", "secondary_capture", "burned_in", "hidden_bits")
    for path in sorted(p for p in (shared_data / "dicom" / "pydicom_test_files").rglob("*") if p.is_file()):
        raw = path.read_bytes()
        try:
            out = deidentify(raw, KEY, config.Deidentify(allow=allow))
        except Refused as e:
            held.setdefault(e.reason, []).append(path.name)
            continue
        written += 1
        _require_clean(raw, out.data)
    assert written > 90
    assert {"NOT_DICOM", "MISSING_UID", "NOT_CLEAN", "NO_PIXEL_DATA"} < set(held)
    assert held["BAD_VALUE"] == ["badVR.dcm"] and held["PIXEL_LENGTH"] == [
        "JPEG2000-embedded-sequence-delimiter.dcm",  # planted in the size of the codestream
        "MR_small_padded.dcm",
    ]
    assert held["HIDDEN_BYTES"] == ["GDCMJ2K_TextGBR.dcm"]  # a file of JPEG 2000, where a codestream belongs
    assert sorted(held["TRUNCATED"]) == ["MR_truncated.dcm", "rtplan_truncated.dcm"]
    assert held["BROKEN_DICOM"] == ["SC_rgb_jpeg.dcm"]  # says explicit VR and is implicit
    assert len(held["STRUCTURED_REPORT"]) == 3


def _require_clean(raw: bytes, out: bytes):
    """By another way than the module's own: plain words of the source's header in the bytes of the copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source, copy = (pydicom.dcmread(io.BytesIO(b), force=True) for b in (raw, out))
        assert source.get("PixelData") == copy.get("PixelData")
        head = out.replace(copy.get("PixelData") or b"\0\0\0\0", b"").lower()
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "AccessionNumber"):
            value = str(source.get(keyword, "")).encode()
            assert len(value) < 6 or value not in head, keyword
        for word in str(source.get("PatientName", "")).replace("^", " ").replace("=", " ").split():
            assert len(word) < 4 or word.lower().encode() not in head
        assert not any(e.tag.is_private for e in copy.iterall())


def test_the_example_of_a_hospital_comes_out_clean(shared_data):
    folder = pathlib.Path(shared_data) / "dicom" / "identified_study"
    words = [b"avasarala", b"chrisjen", b"pgbm-002", b"8701449723783444", b"14519.5.2.1", b"20200119"]
    for path in sorted(folder.rglob("*.dcm"))[::9]:
        out = deidentify(path.read_bytes(), KEY).data
        copy = pydicom.dcmread(io.BytesIO(out))
        head = out.replace(copy.PixelData, b"").lower()
        assert not [w for w in words if w in head]
