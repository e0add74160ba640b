"""What the reason codes of refused files and volumes mean, in one plain sentence each."""

SENTENCES = {
    # archives
    "BAD_NAME": "The name of the file or member is not UTF-8.",
    "BOMB": "The archive claims or gives far more bytes than it weighs; reading stopped at the limit.",
    "BROKEN_ARCHIVE": "The zip or tar is damaged.",
    "DUPLICATE_MEMBER": "The archive holds two members of one name; the first is used.",
    "EMPTY_ARCHIVE": "The archive holds no file.",
    "ENCRYPTED": "The member is encrypted.",
    "ESCAPES_FOLDER": "The member's name leads out of its archive.",
    "LINK": "A link inside an archive, or one that leads out of it, is not followed.",
    "NESTED_ARCHIVE": "An archive inside an archive is not read.",
    "SPECIAL_FILE": "Only plain files are read, no pipes or devices.",
    "UNSUPPORTED_ARCHIVE": "Only zip and tar archives are read.",
    "UNSUPPORTED_COMPRESSION": "The member is compressed by a method that is not read.",
    "BROKEN_FILE": "The file could not be parsed, and nothing better is known about it.",
    "EMPTY": "The file has no bytes.",
    "UNREADABLE": "The file could not be opened or read.",
    "FAILED": "Scoring broke off for a reason that may pass; it is tried again.",
    "CHANGED": "The file changed after the catalog read it.",
    # single files
    "ALPHA": "The picture has an alpha channel that is not constant.",
    "BAD_AFFINE": "The matrix from voxels to millimetres cannot be one.",
    "BAD_GEOMETRY": "Position, orientation or spacing in the header cannot be right.",
    "BAD_SHAPE": "The header claims a shape that cannot be one.",
    "BAD_TYPE": "The voxel type of the header is not known or cannot be right.",
    "BAD_VALUE": "A header value that is needed cannot be right.",
    "BROKEN_DICOM": "The file is not DICOM, or its header is damaged.",
    "BROKEN_NIFTI": "The file is not NIfTI, or its header or compression is damaged.",
    "BROKEN_PICTURE": "The picture is damaged.",
    "BROKEN_PIXELS": "The pixels could not be decoded.",
    "CHANNELS": "The image has another number of channels than the model takes.",
    "DEEP_NESTING": "The DICOM sequences are nested deeper than any real object's.",
    "MULTI_FRAME": "Multi-frame DICOM is not read yet.",
    "MULTI_PAGE": "A picture of several pages is not read yet.",
    "MOSAIC": "A Siemens mosaic is not read yet.",
    "NIFTI_PAIR": "A NIfTI of two files (hdr and img) is not read.",
    "NON_FINITE": "The header holds numbers that are infinite or not numbers.",
    "NOT_AN_IMAGE": "The DICOM object holds no image.",
    "NOT_FINITE": "Voxels are infinite or not numbers.",
    "NO_DECODER": "There is no decoder for the compression of the pixels.",
    "NO_PIXEL_DATA": "The DICOM object has no pixels.",
    "PIXEL_LENGTH": "The pixels are more or fewer than the header says.",
    "SINGLETON_AXIS": "The image has an axis of length one where none is expected.",
    "TOO_LARGE": "The header claims more voxels than the limit.",
    "TOO_MANY_DIMENSIONS": "The image has more dimensions than three and channels.",
    "TRUNCATED": "The file ends before its data do.",
    "UNKNOWN_FORMAT": "The file is of no format that is read.",
    "VOXEL_TYPE": "The voxels are not numbers on one scale.",
    # series
    "CONFLICTING_INSTANCE": "Two DICOM objects with different content claim to be the same.",
    "DUPLICATE_INSTANCE": "The same DICOM object occurs twice; it is used once.",
    "DUPLICATE_POSITION": "Two slices of one series lie at one position.",
    "FRAME_OF_REFERENCE": "Slices of one series are placed in different coordinate systems.",
    "GANTRY_TILT": "The slices are not stacked along their normal: the gantry was tilted.",
    "IRREGULAR_SPACING": "The gaps between slices are not equal.",
    "LOCALIZER": "A localizer is no slice of a volume.",
    "MISSING_POSITION": "Slices do not say where they lie.",
    "MISSING_SLICE": "A slice of the series is missing.",
    "MISSING_SPACING": "Slices do not say how large their pixels are.",
    "MIXED_ORIENTATION": "Slices of one series lie in different planes.",
    "MIXED_PATIENT": "One series names several patients.",
    "MIXED_SHAPE": "Slices of one series differ in rows or columns.",
    "MIXED_SPACING": "Slices of one series differ in pixel spacing.",
    "MODALITY_LUT": "Values go through a lookup table, which is not read.",
    # cohort and labels
    "CONFLICTING_LABELS": "The same image has two different labels.",
    "DUPLICATE_IMAGE": "The same image is in the archive twice; it is used once.",
    "LABEL_CHANNELS": "The label image has more than one channel.",
    "LABEL_GRID_MISMATCH": "The label does not lie on the grid of its image.",
    "LABEL_NOT_INTEGER": "The label holds values that are not whole numbers.",
    "LABEL_OUT_OF_RANGE": "The label holds values beyond the classes.",
    "LABEL_REFUSED": "The image was left out because its label was refused, or does not fit it.",
    "LABEL_WITHOUT_IMAGE": "No image belongs to the label, or its image was refused.",
    "MIXED_PATHS": "Files of one series lie where different subjects are expected.",
    "TWO_LABELS": "The label table names the image twice.",
}


def sentence(code: str) -> str:
    """What ``code`` means; of an unknown code, its words.

    >>> sentence("ENCRYPTED")
    'The member is encrypted.'
    >>> sentence("ODD_THING")
    'Odd thing.'
    """
    return SENTENCES.get(code) or code.replace("_", " ").capitalize() + "."
