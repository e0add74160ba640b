import dataclasses
import io
import shutil

import numpy as np
import pydicom
import pytest
from archives import SHAPE, ct_config, ct_pairs
from formats import dicoms

from sparkmed import config, dataset, formats, storage, tables
from sparkmed.formats import dicom_write, nifti
from sparkmed.imaging import phantom
from sparkmed.rejection import InputError, Rejection
from sparkmed.spark import catalog, patches, volumes

pytestmark = pytest.mark.engine
KEYS = (b"f" * 16, b"h" * 16)
"""Under each of them the eight subjects below fall into all three splits."""
LINEAGE = {"config_digest": "c", "code_version": "v"}


def settings(tmp_path, lake="lake", **changes):
    return config.parse(ct_config(tmp_path / "archive", tmp_path / lake, **changes))


def build(spark, settings, key=None):
    catalog.update(spark, settings.archive, settings.lake, settings.catalog, key, LINEAGE)
    return volumes.build(spark, settings, key, LINEAGE)


def refusals(settings):
    prefix = f"file://{settings.archive}/"
    return sorted((r["uri"].removeprefix(prefix), r["reason"]) for r in tables.quarantine(settings.lake).rows())


@pytest.fixture
def archive(tmp_path):
    return ct_pairs(tmp_path / "archive", 8)


def test_keys_of_all_formats_are_text_and_tell_series_apart(tmp_path):
    nifti.write(phantom.ct(0, SHAPE, (4.0, 4.0, 6.0))[0], str(tmp_path / "a.nii.gz"))
    for s in range(2):
        for n, ds in enumerate(dicoms.series(dicoms.stack((6, 5, 4)))):
            ds.SeriesInstanceUID = f"1.2.{s}"
            (tmp_path / f"{s}-{n}.dcm").write_bytes(dicoms.encoded(ds))
    members = [m for f in storage.walk(str(tmp_path)) for m in formats.members(f)]
    assert not any(isinstance(m, Rejection) for m in members)
    keys = [volumes.group(formats.read_instance(m)) for m in members]
    assert {type(k) for k in keys} == {str} and len(set(keys)) == 3
    sorted(keys)


def test_copies_of_a_segmentation_come_together_whatever_series_they_name(tmp_path):
    for n, name in enumerate(("1.2.3.8", "1.2.3.9")):
        (tmp_path / f"{n}.dcm").write_bytes(dicoms.encoded(dicoms.rtstruct({"organ": []}, SeriesInstanceUID=name)))
    found = [formats.read_instance(m) for f in storage.walk(str(tmp_path)) for m in formats.members(f)]
    assert len({i.series_uid for i in found}) == 2 and len({volumes.group(i) for i in found}) == 1
    assert volumes.group(found[0]) != volumes.group(dataclasses.replace(found[0], sop_uid="1.2.3.8.2"))


def test_a_lake_of_any_name(spark, archive, tmp_path):
    odd = settings(tmp_path, "la ke% [1]{x}#*?,b \u00fc")
    assert build(spark, odd)["volumes"] == 8
    again = build(spark, odd)
    assert (again["volumes"], again["changed"]) == (8, 0)
    assert len(catalog.current(spark, odd.lake).collect()) == 16


def test_a_lake_whose_name_spark_cannot_read_is_an_error(spark, archive, tmp_path):
    odd = settings(tmp_path, "a::b[1]")
    with pytest.raises(InputError, match="colon"):
        build(spark, odd)
    assert build(spark, settings(tmp_path, "a::b"))["volumes"] == 8


def test_what_was_refused_is_counted_each_time(spark, archive, tmp_path):
    nifti.write(phantom.ct(99, SHAPE, (4.0, 4.0, 6.0))[1], str(archive / "lab" / "nobody.nii.gz"))
    nifti.write(phantom.ct(98, SHAPE, (4.0, 4.0, 6.0))[0], str(archive / "elsewhere.nii.gz"))
    first = build(spark, settings(tmp_path))
    again = build(spark, settings(tmp_path))
    assert (first["files"], first["refused"], first["changed"]) == (18, 1, 1)
    assert (again["files"], again["refused"], again["changed"]) == (18, 1, 0)


def test_a_label_is_refused_only_if_no_image_uses_it(spark, archive, tmp_path):
    scout = phantom.ct(50, (12, 12, 1), (40.0, 40.0, 6.0))[0]
    nifti.write(scout, str(archive / "scout" / "s03.nii.gz"))
    two = settings(tmp_path)
    two = two.model_copy(
        update={"volumes": two.volumes.model_copy(update={"images": ("img/{subject}.nii.gz", "scout/{subject}.nii.gz")})}
    )
    assert build(spark, two)["volumes"] == 8
    assert refusals(two) == [("scout/s03.nii.gz", "LABEL_REFUSED")]
    (row,) = tables.quarantine(two.lake).rows()
    assert "LABEL_GRID_MISMATCH" in row["message"]

    nifti.write(phantom.ct(51, (12, 12, 1), (40.0, 40.0, 6.0))[0], str(archive / "img" / "s03.nii.gz"))
    assert build(spark, two)["volumes"] == 7
    assert refusals(two) == [
        ("img/s03.nii.gz", "LABEL_REFUSED"),
        ("lab/s03.nii.gz", "LABEL_GRID_MISMATCH"),
        ("scout/s03.nii.gz", "LABEL_REFUSED"),
    ]


def test_segmentations_of_dicom_series_are_labels_down_to_the_patches(spark, tmp_path):
    truth = {}
    for i in range(8):
        image, label = phantom.ct(i, SHAPE, (4.0, 4.0, 6.0))
        slices = [
            pydicom.dcmread(io.BytesIO(b)) for b in dicom_write.ct_series(image, dicom_write.Patient("A^B", f"s{i}"), f"s{i}")
        ]
        dicoms.write(tmp_path / "archive" / f"s{i}", slices)
        stacked = np.moveaxis(np.stack([label.array[0] == c for c in (1, 2)], axis=-1), (0, 1, 2), (2, 1, 0)).astype(np.uint8)
        each = (
            [(stacked, ("Liver/1", "Kidneys"))] if i % 2 else [(stacked[..., :1], ("Liver/1",)), (stacked[..., 1:], ("Kidneys",))]
        )
        for n, (pixels, names) in enumerate(each):
            uids = {"series_instance_uid": f"1.9.{i}", "sop_instance_uid": f"1.9.{i}.{n}"}
            dicoms.seg(slices, pixels, names, **uids).save_as(tmp_path / "archive" / f"s{i}-{n}.dcm")
        truth[slices[0].SeriesInstanceUID] = np.bincount(label.array.ravel(), minlength=3).tolist()
    (tmp_path / "archive" / "report.dcm").write_bytes(dicom_write.report(dicom_write.Patient("A^B", "s0"), "s0"))
    labels = {"segments": {"liver": "liver/1", "kidneys": ["kidneys", "Kidney"]}}
    study = settings(tmp_path, volumes={"labels": labels, "splits": {"train": 0.4, "val": 0.3, "test": 0.3}})
    counts = build(spark, study, KEYS[0])
    assert (counts["volumes"], counts["refused"], counts["ignored"]) == (8, 1, 0)
    rows = tables.volumes(study.lake).rows()
    assert {r["series_uid"]: r["label_counts"] for r in rows} == truth
    assert refusals(study) == [("report.dcm", "NOT_AN_IMAGE")]
    assert build(spark, study, KEYS[0])["changed"] == 0
    facts = dataset.describe(patches.write(spark, rows, study, LINEAGE))
    assert not facts["refused"] and sum(facts["counts"].values()) > 0


def test_another_key_makes_other_subjects_and_leaves_no_old_one(spark, archive, tmp_path):
    for i in range(8):  # names that a search of bytes finds
        for kind in ("img", "lab"):
            shutil.move(archive / kind / f"s{i:02d}.nii.gz", archive / kind / f"Miller{i}.nii.gz")
    kept = settings(tmp_path)
    thirds = kept.volumes.splits.model_copy(update={"train": 0.4, "val": 0.3, "test": 0.3})
    kept = kept.model_copy(update={"volumes": kept.volumes.model_copy(update={"splits": thirds})})
    assert build(spark, kept)["volumes"] == 8
    old = {r["subject"] for r in tables.volumes(kept.lake).rows()}
    for key in KEYS:
        before = tables.volumes(kept.lake).paths()
        assert build(spark, kept, key)["changed"] == 1
        now = {r["subject"] for r in tables.volumes(kept.lake).rows()}
        assert len(now) == 8 and not now & old
        assert not any(storage.exists(storage.join(kept.lake, "volumes", name)) for name in before)
        old |= now
