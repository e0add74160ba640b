import pytest
from pydicom.datadict import DicomDictionary, tag_for_keyword

from sparkmed import config
from sparkmed.formats import confidentiality
from sparkmed.formats.confidentiality import action

BASIC = config.Deidentify(dates="removed")


def tag(keyword):
    return tag_for_keyword(keyword)


@pytest.mark.parametrize(
    ("keyword", "letter"),
    [
        ("PatientAddress", "X"),
        ("AccessionNumber", "Z"),
        ("ContrastBolusAgent", "D"),  # Z/D
        ("DeviceSerialNumber", "D"),  # X/Z/D
        ("ProtocolName", "D"),  # X/D
        ("AcquisitionDate", "Z"),  # X/Z
        ("SOPInstanceUID", "U"),
        ("ReferencedImageSequence", "U"),  # X/Z/U*: references stay
        ("ReferencedPerformedProcedureStepSequence", "X"),  # X/Z/D of a sequence
        ("AcquisitionContextSequence", "Z"),  # X/Z of a sequence
        ("AnnotationGroupUID", "U"),  # D of a UID
        ("IconImageSequence", "X"),
        ("Modality", "K"),
        ("PixelData", "K"),
        ("SOPClassUID", "U"),  # which leaves those of the standard
        ("CodingSchemeUID", "U"),
        ("PatientBirthDateInAlternativeCalendar", "X"),
        ("PatientDeathDateInAlternativeCalendar", "X"),
        ("PatientAlternativeCalendar", "X"),
        ("RadiationMachineName", "Z"),
        ("ContactDisplayName", "X"),
        ("DeviceID", "X"),
        ("OwnerID", "X"),
        ("HangingProtocolCreator", "X"),
        ("EncryptedContent", "X"),
        ("RetrieveURL", "X"),
        ("PixelDataProviderURL", "X"),
        ("BreedRegistrationNumber", "X"),
        ("NTPSourceAddress", "X"),
        ("TimeSource", "X"),
        ("SubstanceAdministrationNotes", "X"),
        ("BoardingPassID", "X"),
        ("ItineraryID", "X"),
        ("AssignedLocation", "X"),
        ("FrameLabel", "X"),
        ("HangingProtocolUserGroupName", "X"),
        ("ContentDescription", "Z"),
        ("SegmentLabel", "D"),
        ("ConvolutionKernel", "K"),
        ("SegmentAlgorithmName", "K"),
        ("InterventionDescription", "X"),  # a long text that somebody types
        ("DoseComment", "X"),
        ("LongCodeValue", "K"),
        ("BeamHardeningCorrectionTechnique", "K"),
    ],
)
def test_the_table_and_its_choices(keyword, letter):
    assert action(tag(keyword), None, BASIC) == letter


def test_what_the_table_does_not_name_is_kept_only_when_it_is_known_not_to_name_a_person():
    assert action(0x00091002, "LO", BASIC) == "X"  # private
    assert action(0x00080000, "UL", BASIC) == "X"  # group length
    assert action(0x00281F77, "US", BASIC) == "X"  # in no dictionary
    assert action(tag("ImageDimensions"), "US", BASIC) == "X"  # retired
    assert action(0x60003000, "OW", BASIC) == "X" and action(0x60020010, "US", BASIC) == "X"  # overlays
    assert action(0x50000010, "US", BASIC) == "X"  # curves
    assert action(tag("Rows"), "LO", BASIC) == "X"  # a text where none belongs
    assert action(tag("Rows"), "US", BASIC) == "K"
    assert action(tag("Manufacturer"), "UN", BASIC) == "X"
    assert action(tag("Manufacturer"), "SQ", BASIC) == action(tag("Manufacturer"), "OB", BASIC) == "X"
    assert action(tag("Rows"), "UL", BASIC) == "K"  # another number


def test_no_name_of_a_person_is_ever_kept():
    for known, (vr, _, _, _, _) in DicomDictionary.items():
        if vr == "PN":
            assert action(known, vr, BASIC) in "XZD", hex(known)


def test_every_exception_is_an_element_of_the_standard():
    assert None not in confidentiality._REMOVED | confidentiality._TECHNICAL | confidentiality.LISTED.keys()
    for known, (vr, _, _, _, _) in DicomDictionary.items():
        if vr == "UR":
            assert action(known, vr, BASIC) in "XD", hex(known)


def test_dates_shift_and_birth_does_not():
    shifted = config.Deidentify()
    for keyword in ("StudyDate", "AcquisitionDateTime", "SeriesTime", "LastMenstrualDate"):
        assert action(tag(keyword), None, shifted) == "C", keyword
    assert action(tag("PatientBirthDate"), None, shifted) == "Z"
    assert action(tag("PatientBirthTime"), None, shifted) == "X"
    assert action(tag("GPSDateStamp"), None, shifted) == "X"


def test_a_date_that_everybody_knows_does_not_shift_for_it_would_tell_by_how_much():
    for keyword, letter in (("ContextGroupVersion", "D"), ("DateOfManufacture", "X"), ("DateOfLastDetectorCalibration", "D")):
        assert action(tag(keyword), None, config.Deidentify()) == letter
    assert None not in confidentiality._NEVER_SHIFTED


def test_no_date_is_kept_as_it_is():
    for settings in (BASIC, config.Deidentify(), config.Deidentify(device="kept")):
        for known, (vr, _, _, _, _) in DicomDictionary.items():
            if vr in ("DA", "DT"):
                assert action(known, vr, settings) in "XZDC", hex(known)


def test_the_device_is_kept_when_asked_for():
    kept = config.Deidentify(device="kept")
    for keyword in ("DeviceSerialNumber", "StationName", "DeviceUID", "UDISequence"):
        assert action(tag(keyword), None, kept) == "K" != action(tag(keyword), None, BASIC)
    assert action(tag("InstitutionName"), None, kept) == "D"
    assert None not in confidentiality.DEVICE


def test_every_action_of_the_table_is_one_that_can_be_carried_out():
    assert len(confidentiality.LISTED) > 640
    assert {confidentiality.without_option(t) for t in confidentiality.LISTED} == set("XZDU")
    assert all(
        not (confidentiality.dictionary_vr(t) == "SQ" and confidentiality.without_option(t) == "D") for t in confidentiality.LISTED
    )
