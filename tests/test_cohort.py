import hashlib

import numpy as np
import pytest

from sparkmed import cohort, config
from sparkmed.formats.instance import VolumeHeader
from sparkmed.rejection import InputError

KEY = b"0123456789abcdef"
SEGMENTATION = {"name": "p", "task": "segmentation", "classes": ["background", "organ"], "archive": "a"}
CLASSES = SEGMENTATION | {"task": "classification", "classes": ["abd", "chst"], "preprocess": {"size": [8, 8, 1]}}


def header(path, content=None, channels=1, patient=""):
    content = content or path
    return VolumeHeader(
        uid=hashlib.sha256(content.encode()).hexdigest()[:32],
        format="nifti",
        modality="",
        series_uid="",
        sources=(f"file:///a/{path}",),
        source_paths=(path,),
        source_sha256=(content,),
        shape=(channels, 4, 4, 4),
        affine=tuple(np.eye(4).ravel()),
        header="{}",
        patient=patient,
    )


def study(paths, settings=SEGMENTATION, key=KEY, **volumes):
    headers = [p if isinstance(p, VolumeHeader) else header(p) for p in paths]
    return cohort.assemble(headers, config.parse(settings | {"volumes": volumes}), key)


PAIRS = {"images": "img/{subject}.nii.gz", "labels": {"pattern": "lab/{subject}.nii.gz"}}


def test_labels_join_by_path_and_subjects_are_pseudonyms():
    found = study(["img/anna.nii.gz", "lab/anna.nii.gz", "img/ben.nii.gz", "lab/ben.nii.gz", "notes.nii.gz"], **PAIRS)
    assert [m.label.source_paths[0] for m in found.members] == ["lab/anna.nii.gz", "lab/ben.nii.gz"]
    assert all(m.subject.startswith("sub-") and m.split in ("train", "val", "test") for m in found.members)
    assert found.ignored == 1
    open_names = study(["img/anna.nii.gz", "lab/anna.nii.gz"], key=None, **PAIRS)
    assert open_names.members[0].subject == "anna"


def test_an_image_without_a_label_is_named():
    paths = ["img/a.nii.gz", "lab/a.nii.gz", "img/b.nii.gz"]
    with pytest.raises(InputError, match=r"2 images but 1 labels: none for img/b.nii.gz"):
        study(paths, **PAIRS)
    allowed = study(paths, images=PAIRS["images"], labels=PAIRS["labels"] | {"allow_missing": True})
    assert [m.split is None for m in allowed.members] == [False, True]


def test_a_label_without_an_image_is_refused_with_a_reason():
    found = study(["img/a.nii.gz", "lab/a.nii.gz", "lab/b.nii.gz"], **PAIRS)
    assert [(r.uri, r.reason) for r in found.rejections] == [("file:///a/lab/b.nii.gz", "LABEL_WITHOUT_IMAGE")]


def test_classes_and_splits_come_from_folders():
    found = study(
        ["train/abd/1.png", "val/chst/2.png"], CLASSES, images="{split}/{class}/*.png", splits={"rename": {"val": "test"}}
    )
    assert [(m.target, m.split) for m in found.members] == [(0, "train"), (1, "test")]
    with pytest.raises(InputError, match="class 'leg' of the archive is not in classes"):
        study(["train/leg/1.png"], CLASSES, images="{split}/{class}/*.png")
    with pytest.raises(InputError, match="split 'holdout'"):
        study(["holdout/abd/1.png"], CLASSES, images="{split}/{class}/*.png")


def test_of_copies_the_held_out_one_stays():
    copies = [header("train/abd/1.png", "same"), header("test/abd/2.png", "same")]
    found = study(copies, CLASSES, images="{split}/{class}/*.png")
    assert [m.split for m in found.members] == ["test"]
    assert [(r.uri, r.reason) for r in found.rejections] == [("file:///a/train/abd/1.png", "DUPLICATE_IMAGE")]


def test_one_image_with_two_classes_is_refused():
    copies = [header("train/abd/1.png", "same"), header("train/chst/2.png", "same"), header("train/abd/3.png")]
    found = study(copies, CLASSES, images="{split}/{class}/*.png")
    assert len(found.members) == 1
    assert {r.reason for r in found.rejections} == {"CONFLICTING_LABELS"} and len(found.rejections) == 2


def test_a_subject_in_two_given_splits_is_an_error():
    with pytest.raises(InputError, match="trained on and tested on"):
        study(["train/abd/p1.png", "test/abd/p1.png"], CLASSES, images="{split}/{class}/{subject}.png")


def test_different_channel_counts_are_an_error_unless_made_gray():
    mixed = [header("train/abd/1.png", channels=3), header("train/abd/2.png")]
    with pytest.raises(InputError, match="different channel counts: 1 images with 1, 1 images with 3"):
        study(mixed, CLASSES, images="{split}/{class}/*.png")
    gray = CLASSES | {"preprocess": {"size": [8, 8, 1], "channels": "gray"}}
    assert len(study(mixed, gray, images="{split}/{class}/*.png").members) == 2


def test_a_csv_gives_class_and_split(tmp_path):
    (tmp_path / "labels.csv").write_text("path,label,split\na.png,abd,train\nb.png,chst,test\n")
    settings = CLASSES | {"archive": str(tmp_path)}
    found = study(["a.png", "b.png"], settings, labels={"csv": "labels.csv"})
    assert [(m.target, m.split) for m in found.members] == [(0, "train"), (1, "test")]
    (tmp_path / "labels.csv").write_text("file,class\na.png,abd\n")
    with pytest.raises(InputError, match="wanted columns label and path or subject, got"):
        study(["a.png"], settings, labels={"csv": "labels.csv"})
    with pytest.raises(InputError, match="volumes.labels.csv none.csv"):
        study(["a.png"], settings, labels={"csv": "none.csv"})


def test_a_csv_names_label_images(tmp_path):
    (tmp_path / "labels.csv").write_text("path,label\nx.nii.gz,y.nii.gz\n")
    found = study(["x.nii.gz", "y.nii.gz"], SEGMENTATION | {"archive": str(tmp_path)}, labels={"csv": "labels.csv"})
    assert [m.label.source_paths[0] for m in found.members] == ["y.nii.gz"]


def test_the_patient_of_the_header_is_the_subject_without_a_pattern():
    found = study([header("1.nii", patient="sub-1"), header("2.nii", patient="sub-1")], labels={"allow_missing": True})
    assert {m.subject for m in found.members} == {"sub-1"}


def test_an_empty_split_is_named():
    members = study(["img/a.nii.gz", "lab/a.nii.gz"], **PAIRS).members
    with pytest.raises(InputError, match="is empty"):
        cohort.require_splits(members, config.parse(SEGMENTATION))


def test_nothing_to_work_on_is_an_error():
    with pytest.raises(InputError, match="no image volume"):
        study(["other.nii.gz"], **PAIRS)
