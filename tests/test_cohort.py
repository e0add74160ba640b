import dataclasses
import hashlib
import json

import numpy as np
import pytest

from sparkmed import cohort, config
from sparkmed.formats import segmentation
from sparkmed.formats.instance import VolumeHeader
from sparkmed.imaging import splits
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


ORGANS = SEGMENTATION | {"classes": ["background", "liver", "kidneys"]}
SEGMENTS = {"labels": {"segments": {"liver": "Liver", "kidneys": ["left kidney", "right kidney"]}}}
LIVER = {"labels": {"segments": {"liver": "Liver"}}}


def scan(name, **facts):
    """An image volume of the series ``name``."""
    return dataclasses.replace(
        header(f"{name}.dcm", patient=f"sub-{name}"), format="dicom", series_uid=name, header=json.dumps(facts)
    )


def seg(name, of, *labels, frame="", **facts):
    """A segmentation of the series ``of`` with these segments, in a file ``name``."""
    segments = [{"number": n, "label": label} for n, label in enumerate(labels, start=1)]
    facts = {"segments": segments, "references": [[of, frame]]} | facts
    return dataclasses.replace(
        header(f"{name}.dcm"), format="dicom_seg", shape=(len(labels), 0, 0, 0), affine=(), header=json.dumps(facts)
    )


def reasons(found):
    return sorted((r.uri.removeprefix("file:///a/"), r.reason) for r in found.rejections)


def test_segmentations_join_by_the_series_they_name():
    one = seg("x", "1", "Spleen", "LIVER", "Right Kidney", "Left  kidney")
    two = seg("y", "2", "", "", property="", segments=[{"number": 7, "label": "", "property": ["10200004", "SCT", "Liver"]}])
    found = study([two, scan("1"), scan("2"), one], ORGANS, **SEGMENTS)
    assert [(m.image.series_uid, m.label.source_paths, m.subject) for m in found.members] == [
        ("1", ("x.dcm",), "sub-1"), ("2", ("y.dcm",), "sub-2")
    ]  # fmt: skip
    assert [m.label.facts["classes"] for m in found.members] == [{"2": 1, "3": 2, "4": 2}, {"7": 1}]
    assert all(m.label.shape == (1, 4, 4, 4) and m.label.affine == m.image.affine and m.split for m in found.members)
    assert not found.rejections and not found.ignored


def test_without_segments_in_the_config_segmentations_are_ignored():
    found = study([scan("1"), seg("x", "1", "Liver")], ORGANS, labels={"allow_missing": True})
    assert len(found.members) == 1 and found.members[0].label is None and found.ignored == 1


def test_a_prediction_that_came_back_is_no_truth():
    found = study([scan("1"), seg("a", "1", "Liver"), seg("b", "1", "Liver", predicted=True)], ORGANS, **LIVER)
    assert [m.label.source_paths for m in found.members] == [("a.dcm",)]
    assert not found.rejections and found.ignored == 1


def test_segmentations_that_are_no_label_have_reasons():
    scans = [scan(n) for n in "124567"] + [scan("3", frame="1.1")]
    segs = [
        seg("a", "1", "Liver"), seg("b", "9", "Liver"), seg("c", "2", "Spleen"), seg("d", "3", "Liver", frame="2.2"),
        seg("e", "4", "Liver"), seg("f", "4", "left kidney", "LIVER"), seg("g", "5", "Liver"), seg("h", "5", "Tumour"),
        seg("i", "6", "Liver", "right kidney", segmentation.WITHHELD), seg("j", "7", "Liver"), seg("k", "7", segmentation.WITHHELD),
    ]  # fmt: skip
    found = study([*scans, *segs], ORGANS, **SEGMENTS)
    assert [m.image.series_uid for m in found.members] == ["1", "5"]
    assert reasons(found) == [
        ("2.dcm", "LABEL_REFUSED"), ("3.dcm", "LABEL_REFUSED"), ("4.dcm", "CONFLICTING_LABELS"), ("6.dcm", "LABEL_REFUSED"),
        ("7.dcm", "LABEL_REFUSED"), ("b.dcm", "LABEL_WITHOUT_IMAGE"), ("c.dcm", "LABEL_WITHOUT_SEGMENT"),
        ("d.dcm", "FRAME_OF_REFERENCE"), ("e.dcm", "CONFLICTING_LABELS"), ("f.dcm", "CONFLICTING_LABELS"),
        ("h.dcm", "LABEL_WITHOUT_SEGMENT"), ("i.dcm", "LABEL_UNREADABLE"), ("j.dcm", "LABEL_WITHOUT_IMAGE"),
        ("k.dcm", "LABEL_UNREADABLE"),
    ]  # fmt: skip


def test_segmentations_of_one_image_are_put_together_when_each_holds_other_classes():
    segs = [seg("a", "1", "right kidney", "Spleen"), seg("b", "1", "Left kidney"), seg("c", "1", "Liver")]
    conflict = study([scan("1"), scan("2"), *segs, seg("d", "2", "liver")], ORGANS, **SEGMENTS)
    assert reasons(conflict) == [("1.dcm", "CONFLICTING_LABELS")] + [(f"{n}.dcm", "CONFLICTING_LABELS") for n in "abc"]
    assert "hold kidneys" in conflict.rejections[0].message
    kidneys = seg("a", "1", "right kidney", "Spleen", "left kidney")
    found = study([scan("1"), kidneys, segs[2]], ORGANS, **SEGMENTS)
    (member,) = found.members
    assert member.label.source_paths == ("a.dcm", "c.dcm") and member.label.shape == (1, 4, 4, 4)
    assert [p["classes"] for p in member.label.facts["parts"]] == [{"1": 2, "3": 2}, {"1": 1}]
    assert not found.rejections and not found.ignored
    assert member.label.uid != study([scan("1"), segs[2]], ORGANS, **LIVER).members[0].label.uid


@pytest.mark.parametrize("name", ["Tumor/Cyst", "ÖDEM", "O\u0308dem", "Lung L+R", "肝臓"])
def test_any_name_is_a_name(name):
    found = study([scan("1"), seg("a", "1", "Body", "Tumor/Cyst", "Ödem", "lung l+r", "肝臓")], ORGANS,
                  labels={"segments": {"liver": name}})  # fmt: skip
    assert list(found.members[0].label.facts["classes"].values()) == [1]


def test_a_segment_that_no_segmentation_has_is_an_error():
    labels = {"segments": {"liver": "Liver", "kidneys": "Kidny"}, "allow_missing": True}
    with pytest.raises(InputError, match="segments.kidneys: no segmentation .* has a segment 'Kidny'; there are: Kidney, Liver$"):
        study([scan("1"), seg("a", "1", "Liver", "Kidney")], ORGANS, labels=labels)
    assert len(study([scan("1")], ORGANS, labels=labels).members) == 1, "no segmentation at all: there is nothing to learn from"


def test_an_image_whose_segmentation_is_of_something_else_may_be_scored():
    labels = LIVER["labels"] | {"allow_missing": True}
    found = study([scan("1"), seg("a", "1", "Tumour"), scan("2"), seg("b", "2", "Liver", frame="x")], ORGANS, labels=labels)
    assert [(m.image.series_uid, m.split is None) for m in found.members] == [("1", True), ("2", False)]
    assert reasons(found) == [("a.dcm", "LABEL_WITHOUT_SEGMENT")]


def test_one_segmentation_labels_all_volumes_of_its_series_that_it_fits():
    echoes = [
        dataclasses.replace(scan("1"), uid=f"{n}" * 32, sources=(f"file:///a/{n}.dcm",), source_paths=(f"{n}.dcm",)) for n in "12"
    ]
    small = dataclasses.replace(echoes[1], uid="3" * 32, sources=("file:///a/3.dcm",), source_paths=("3.dcm",), shape=(1, 2, 2, 2))
    plane = [0, 0, 3, -1, 0, 0, 0, -1, 0, 1, 1]  # of 4 x 4 pixels
    labels = LIVER["labels"] | {"allow_missing": True}
    found = study([*echoes, small, seg("a", "1", "Liver", planes=[plane], size=[4, 4])], ORGANS, labels=labels)
    assert [bool(m.label) for m in found.members] == [True, True, False]
    assert not found.rejections


@pytest.mark.parametrize("only, left", [
    ({}, "abc"),
    ({"modality": "MR"}, "ab"),
    ({"echo": 4.9}, "a"),
    ({"echo": "4.9", "modality": "MR"}, "a"),
    ({"type": "*PRIMARY*M*"}, "ab"),
    ({"echo": "*"}, "abc"),
    ({"nothing": 1}, ""),
])  # fmt: skip
def test_only_images_with_these_facts(only, left):
    facts = {
        "a": {"type": ["ORIGINAL", "PRIMARY", "M"], "part": {"echo": 4.9}},
        "b": {"type": ["ORIGINAL", "PRIMARY", "M"], "part": {"echo": 9.8}},
        "c": {"type": ["ORIGINAL", "PRIMARY", "AXIAL"]},
    }
    images = [
        dataclasses.replace(header(f"img/{n}.nii.gz"), modality="CT" if n == "c" else "MR", header=json.dumps(f))
        for n, f in facts.items()
    ]
    settings = {"images": PAIRS["images"], "labels": {"allow_missing": True}, "only": only}
    if not left:
        with pytest.raises(InputError, match="no image volume"):
            study(images, **settings)
    else:
        found = study(images, key=None, **settings)
        assert "".join(m.subject for m in found.members) == left and found.ignored == 3 - len(left)


def grouped(tmp_path, table, **groups):
    (tmp_path / "groups.csv").write_text(table)
    settings = config.parse(SEGMENTATION | {"groups": {"csv": str(tmp_path / "groups.csv"), **groups}})
    scanner = json.dumps({"scanner": "GE Discovery"})

    def row(uid, subject, path, modality, header):
        facts = {"modality": modality, "format": "dicom" if modality else "nifti", "header": header}
        return {"uid": uid, "subject": subject, "source_paths": [path]} | facts

    rows = [
        row("1", splits.pseudonym("anna", KEY), "img/anna.nii.gz", "", "{}"),
        row("2", splits.pseudonym("ben", KEY), "img/ben.nii.gz", "CT", scanner),
        row("3", "other", "x", "CT", scanner),
    ]
    return cohort.groups(rows, settings, KEY)


def test_groups_by_subject_pseudonym_or_path(tmp_path):
    pseudonym = splits.pseudonym("ben", KEY)
    table = f"subject,path,site,sex\nanna,,A,F\n{pseudonym},,B,\n,x,A,M\nnobody,,C,F\n"
    found = grouped(tmp_path, table, by=["modality", "site", "sex"])
    assert found == {
        "1": {"modality": "nifti", "site": "A", "sex": "F"},
        "2": {"modality": "CT", "site": "B"},
        "3": {"modality": "CT", "site": "A", "sex": "M"},
    }


def test_a_scanner_is_of_the_header_unless_the_table_has_one(tmp_path):
    of_header = {"scanner": "GE Discovery"}
    assert grouped(tmp_path, "subject,site\nanna,A\n", by="scanner") == {"1": {}, "2": of_header, "3": of_header}
    assert grouped(tmp_path, "subject,scanner\nanna,S1\n", by="scanner") == {"1": {"scanner": "S1"}, "2": {}, "3": {}}


def test_groups_that_contradict_or_name_everybody_are_errors(tmp_path):
    with pytest.raises(InputError, match="two rows of one subject differ"):
        grouped(tmp_path, "subject,site\nanna,A\nanna,B\n", by="site")
    with pytest.raises(InputError, match="wanted columns site and path or subject"):
        grouped(tmp_path, "subject,place\nanna,A\n", by="site")
    with pytest.raises(InputError, match="column site has 65 values"):
        grouped(tmp_path, "subject,site\n" + "".join(f"p{n},{n}\n" for n in range(65)), by="site")
    with pytest.raises(InputError, match="groups: by names site, wanted csv"):
        config.parse(SEGMENTATION | {"groups": {"by": ["site"]}})
    with pytest.raises(InputError, match="a group is of many"):
        config.parse(SEGMENTATION | {"groups": {"by": ["subject"], "csv": "x"}})
