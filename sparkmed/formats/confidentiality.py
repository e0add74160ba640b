"""What the Basic Application Level Confidentiality Profile does to each DICOM element: PS3.15 Annex E, Table E.1-1.

The table is that of the 2026c edition as the library dicom-anonymizer holds it; here it becomes one action per element:

    X  removed
    Z  left without a value
    D  replaced by a dummy value that says nothing
    U  UID replaced by one that is a function of it and of the key
    C  date shifted by the days of the subject, time kept (option "retain longitudinal temporal information, modified dates")
    K  kept; of a sequence, its items are treated in turn

Where the table leaves a choice, the one is taken that holds for every IOD: Z of X/Z; D of X/D, Z/D and X/Z/D; U of X/Z/U*, so that
references stay. Of a sequence no dummy is made: X/D and X/Z/D remove it, Z/D and D empty it.

What the table does not name is kept only when the standard defines it and does not retire it, and when it cannot hold a person's
name: private elements, group lengths, names (PN), addresses in a net (UR), unknown values (UN), unknown and retired elements,
remarks and long texts but for a few technical ones, and elements that are written in another VR than the standard's are removed. A
UID that the standard does not define is replaced.

Of short texts (LO, SH) that the table does not name, what a device writes, a table of codes, or whoever made a part of it stays:
makes, models, versions, techniques, codes. What somebody types for one patient, order or place goes, as do identifiers of people,
accessories, hosts and journeys: labels, notes, names of beams and setups. Where an IOD asks for the element it is emptied (type 2)
or a dummy (type 1).
"""

import functools
import re

from dicomanonymizer.dicom_anonymization_databases import dicomfields_2026c as table
from pydicom.datadict import get_entry, keyword_for_tag, tag_for_keyword

from sparkmed import config

EDITION = "2026c"
TEMPORAL = frozenset({"DA", "DT", "TM"})
_NUMBERS = frozenset("AT DS FD FL IS SL SS SV UL US UV".split())
"""VRs that a file may confuse: whichever it is, a number is in it or the element goes."""
_LISTS = {
    "X": table.X_TAGS,
    "Z": table.Z_TAGS,
    "D": table.D_TAGS,
    "U": table.U_TAGS,
    "X/Z": table.X_Z_TAGS,
    "X/D": table.X_D_TAGS,
    "Z/D": table.Z_D_TAGS,
    "X/Z/D": table.X_Z_D_TAGS,
    "X/Z/U*": table.X_Z_U_STAR_TAGS,
}
LISTED = {tag[0] << 16 | tag[1]: action for action, tags in _LISTS.items() for tag in tags if len(tag) == 2}
LISTED[tag_for_keyword("RadiationMachineName")] = LISTED[tag_for_keyword("TreatmentMachineName")]
"""Action of the table by tag, but for the repeating groups: curves (50xx) and overlays (60xx), which go as a whole. The name of a
machine is one by either of its elements."""

DEVICE = frozenset(
    tag_for_keyword(k)
    for k in (
        "CassetteID DetectorID DeviceDescription DeviceLabel DeviceSerialNumber DeviceUID GantryID GeneratorID LensMake LensModel "
        "LensSerialNumber LensSpecification ManufacturerDeviceClassUID ManufacturerDeviceIdentifier PerformedStationAETitle "
        "PerformedStationGeographicLocationCodeSequence PerformedStationName PerformedStationNameCodeSequence PlateID "
        "ScheduledProcedureStepLocation ScheduledStationAETitle ScheduledStationGeographicLocationCodeSequence "
        "ScheduledStationName ScheduledStationNameCodeSequence ScheduledStudyLocation ScheduledStudyLocationAETitle "
        "SourceManufacturer SourceSerialNumber StationName TransducerIdentificationSequence TreatmentMachineName "
        "RadiationMachineName UDISequence UniqueDeviceIdentifier XRayDetectorID XRayDetectorLabel XRaySourceID"
    ).split()
)
"""Column "Rtn. Dev. Id. Opt." of the table."""
_NEVER_SHIFTED = frozenset(
    tag_for_keyword(k)
    for k in (
        "PatientBirthDate PatientBirthTime "
        "ContextGroupVersion ContextGroupLocalVersion TemplateVersion TemplateLocalVersion "
        "DateOfManufacture DateOfInstallation DateOfLastCalibration TimeOfLastCalibration DateTimeOfLastCalibration "
        "CalibrationDate CalibrationTime CalibrationDateTime DateOfLastDetectorCalibration TimeOfLastDetectorCalibration "
        "SourceStrengthReferenceDate SourceStrengthReferenceTime ProductExpirationDateTime EffectiveDateTime "
        "InformationIssueDateTime HangingProtocolCreationDateTime "
        "EthicsCommitteeApprovalEffectivenessStartDate EthicsCommitteeApprovalEffectivenessEndDate"
    ).split()
)
"""Dates that are not of the patient's course: of birth, and those that others know too (of a code table, a device, a trial), from
which the days of the shift could be read off. Those of a GPS (group 0016) are not shifted either."""
_REMOVED = frozenset(
    tag_for_keyword(k)
    for k in (
        "PatientBirthDateInAlternativeCalendar PatientDeathDateInAlternativeCalendar PatientAlternativeCalendar ContactDisplayName "
        "DeviceID OwnerID ImageID HangingProtocolCreator EncryptedAttributesSequence EncryptedContent HPGLDocument "
        "RecordKey PriorRecordKey "
        # of people, animals, hosts, devices and journeys
        "BreedRegistrationNumber ComponentWelderIDs NTPSourceAddress TimeSource GridID ProductLotIdentifier PrinterName "
        "SubstanceAdministrationDeviceID AuthorizationEquipmentCertificationNumber StorageMediaFileSetID AssessmentSetID "
        "AccessoryCode PatientSupportAccessoryCode TrayAccessoryCode BoardingPassID ItineraryID ItineraryIDType "
        "ItineraryIDAssigningAuthority RouteID RouteIDAssigningAuthority RouteSegmentID RouteSegmentStartLocationID "
        "RouteSegmentEndLocationID CarrierID AssignedLocation "
        # typed for one patient, order or place
        "SubstanceAdministrationNotes FrameLabel FrameLabelVector FrameOfInterestDescription InstructionText ProtocolElementName "
        "AcquisitionProtocolName TreatmentProtocols TargetLabel IndicationLabel PropertyLabel TickLabel AssessmentLabel "
        "RouteOfAdmissions PerformedProcedureTypeDescription CompletionFlagDescription ConfidentialityCode ResourceDescription "
        "ReasonForChannelOmissionDescription ContainerComponentDescription LensStatusDescription VitreousStatusDescription "
        "PatientAdditionalPosition PatientSetupLabel ApplicationSetupName BeamName BlockName RTImageName ToleranceTableLabel "
        "SurfaceModelLabel PlanningLandmarkDescription GraphicLayerDescription GraphicGroupLabel WorklistLabel ProcedureStepLabel "
        "DisplaySubsystemName DisplaySubsystemDescription ConfigurationName ConfigurationDescription FilmSessionLabel "
        "HangingProtocolName HangingProtocolDescription HangingProtocolUserGroupName ImageSetLabel DisplaySetLabel "
        "DisplaySetPresentationGroupDescription DataSetDescription HPGLDocumentLabel"
    ).split()
)
"""What the table does not name and yet says who somebody is, or may."""
_ASKED_FOR = {
    "Z": "ContentDescription FixationDeviceLabel ShieldingDeviceLabel SetupDeviceLabel",
    "D": "SegmentLabel TrackSetLabel RTImageLabel",
}
LISTED |= {tag_for_keyword(k): action for action, keywords in _ASKED_FOR.items() for k in keywords.split()}
_REMARKS = re.compile("Comment|Explanation|Remark")
_LONG_TEXTS = frozenset({"LT", "ST", "UC", "UT"})
_TECHNICAL = frozenset(
    tag_for_keyword(k)
    for k in (
        "BeamHardeningCorrectionTechnique CodingSchemeName DetectorDescription DetectorMode EXIFVersion "
        "ExposureControlModeDescription GridAbsorbingMaterial GridSpacingMaterial ImageDisplayFormat LinearityCorrectionTechnique "
        "LongCodeValue OECFColumnNames SpatialFrequencyResponseColumnNames"
    ).split()
)
"""Long texts that a device writes and nobody types."""


@functools.lru_cache(65536)
def action(tag: int, vr: str | None, settings: config.Deidentify) -> str:
    """The letter of what happens to an element; ``vr`` is how the file writes it, None when it does not say (implicit VR)."""
    group = tag >> 16
    if group & 1 or group < 8 or tag & 0xFFFF == 0 or group >> 8 in (0x50, 0x60):
        return "X"
    listed, defined, retired = LISTED.get(tag), *_defined(tag)
    if not defined:
        return "X"
    if vr == "SQ" and defined != ("SQ",) or defined == ("SQ",) and vr not in ("SQ", None):
        return "X"
    if listed:
        if settings.device == "kept" and tag in DEVICE:
            return "K"
        if settings.dates == "shifted" and defined[0] in TEMPORAL and tag not in _NEVER_SHIFTED and group != 0x0016:
            return "C"
        return without_option(tag)
    if retired or defined[0] in ("PN", "UN", "UR") or tag in _REMOVED or _REMARKS.search(keyword_for_tag(tag)):
        return "X"
    if defined[0] in _LONG_TEXTS and tag not in _TECHNICAL:
        return "X"
    if vr is not None and vr not in defined and vr not in _NUMBERS:
        return "X"
    if defined[0] == "UI":
        return "U"
    if defined[0] in TEMPORAL:
        return "C" if settings.dates == "shifted" else "X"
    return "K"


def without_option(tag: int) -> str:
    """X, Z, D or U: what the profile alone does to an element; X to one that the table does not name."""
    listed = LISTED.get(tag, "X")
    choices = listed.removesuffix("*").split("/")
    vr = dictionary_vr(tag)
    if choices[-1] == "D" and vr == "SQ":
        return "X" if "X" in choices else "Z"
    return "U" if choices[-1] == "D" and vr == "UI" else choices[-1]


def dictionary_vr(tag: int) -> str:
    """The VR of the standard, the first where it allows several; UN for what it does not define."""
    return (_defined(tag)[0] or ("UN",))[0]


@functools.lru_cache(8192)
def _defined(tag: int) -> tuple[tuple[str, ...], bool]:
    """(the VRs that the standard allows, whether it retires the element); no VR when it does not define it."""
    try:
        vr, _, _, retired, _ = get_entry(tag)
    except KeyError:
        return (), False
    return tuple(vr.split(" or ")), bool(retired)


def label(tag: int) -> str:
    """How a report names an element, without anything that it holds.

    >>> label(0x00100010), label(0x00091002)
    ('(0010,0010) PatientName', '(0009,1002) private')
    """
    name = "private" if tag >> 16 & 1 else keyword_for_tag(tag) or "unknown"
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X}) {name}"
