import dataclasses
import errno
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from archives import CELLS, plate, plate_config, plate_rows
from formats import dicoms
from monai.metrics import compute_dice

from sparkmed import config, dataset, formats, scoring, storage
from sparkmed.config import Cells, Component, Crops, Nuclei, Preprocess, Score
from sparkmed.formats import dicom_seg, nifti
from sparkmed.formats.instance import VolumeHeader
from sparkmed.hcs import crops
from sparkmed.hcs.correction import Correction
from sparkmed.hcs.plate_intensity import ControlScale
from sparkmed.imaging import intensity
from sparkmed.imaging.volume import Volume
from sparkmed.learning import networks
from sparkmed.learning.model import Model, ModelSpec
from sparkmed.rejection import Refused
from sparkmed.spark import score as spark_score


def test_dice_equals_monai():
    rng = np.random.default_rng(0)
    predicted, truth = rng.integers(0, 3, (2, 6, 7, 8))
    one_hot = [torch.nn.functional.one_hot(torch.from_numpy(x), 4).permute(3, 0, 1, 2)[None] for x in (predicted, truth)]
    expected = compute_dice(*one_hot, ignore_empty=True)[0].tolist()
    found = scoring.dice(predicted, truth, 4)
    assert found[:3] == pytest.approx(expected[:3])
    assert found[3] is None and np.isnan(expected[3])


def test_an_empty_prediction_of_something_there_is_zero():
    assert scoring.dice(np.zeros(4, int), np.array([0, 1, 1, 0]), 2)[1] == 0.0


def test_subject_scores_average_volumes_first_then_leave_absent_classes_out():
    rows = [
        {"subject": "a", "score": [1.0, 0.5, None]},
        {"subject": "a", "score": [1.0, 1.0, 0.0]},
        {"subject": "b", "score": [1.0, None, None]},
        {"subject": "c", "score": [1.0]},
    ]
    assert scoring.subject_scores(rows) == {"a": 0.5, "c": 1.0}


def of_cells(cells=Cells(crops=Crops(size=12), nuclei=Nuclei(), channel=1), **score) -> Model:  # noqa: B008
    """A classifier of the single cells of a plate."""
    spec = ModelSpec(
        name="cells", task="classification", classes=("negative", "positive"), in_channels=2, spatial_dims=2, window=(12, 12, 1),
        network=Component(name="DenseNet121", init_features=4, growth_rate=2, block_config=[1, 1]),
        preprocess=Preprocess(orientation=None), score=Score(**score),
        cells=cells,
    )  # fmt: skip
    torch.manual_seed(1)
    return Model(spec, networks.build(spec.network, 2, 2, 2))


def test_a_prediction_of_a_field_stands_on_its_cells(tmp_path):
    plate(tmp_path / "plate", 2, size=64)
    settings = config.parse(plate_config("a", "l", **CELLS))
    rows, model = plate_rows(tmp_path / "plate" / "images", settings.plates), of_cells(features=True)
    for row in rows[:3]:
        out = scoring.score(model, row, str(tmp_path / "cells.parquet"))
        cut = list(dataset.cut(row, settings)[0])
        by_hand = model.predict_patches(np.stack([p.image for p in cut]))
        assert out["cells"] == len(cut) > 0 and out["probability"] == pytest.approx(by_hand.mean(0), abs=1e-5)
        assert out["score"] == [float(np.argmax(out["probability"]) == row["target"])] and len(out["features"]) == 5
        written = pd.read_parquet(tmp_path / "cells.parquet")
        assert list(zip(written.cell, written.x, written.y, strict=True)) == [p.cell for p in cut]
        np.testing.assert_allclose(written[["probability_negative", "probability_positive"]], by_hand, atol=1e-5)
        np.testing.assert_allclose(np.median(np.stack(written.features), 0), out["features"], atol=1e-6)
        assert set(written.well) == {row["subject"]} and set(written.volume) == {row["uid"]} and written.site.isna().all()
    plain = scoring.score(of_cells(), rows[0], str(tmp_path / "plain.parquet"))
    assert "features" not in plain and "features" not in pd.read_parquet(tmp_path / "plain.parquet")


def test_cells_of_a_table_are_those_that_their_field_is_joined_with(tmp_path):
    plate(tmp_path / "plate", 2, size=64)
    rows = plate_rows(tmp_path / "plate" / "images", config.parse(plate_config("a", "l", **CELLS)).plates)[:2]
    finder, listed = of_cells(), of_cells(Cells(crops=Crops(size=12)))
    found = finder.cells(dataset.read_image(rows[0]))
    image = rows[0]["source_paths"][1]
    table = crops.checked(pd.DataFrame({"image": image, "cell": found.cells, "x": found.x, "y": found.y}))
    headers, _ = crops.joined([VolumeHeader.from_row(r) for r in rows], table, str(tmp_path / "centres"))
    first, second = ({**r, **h.row()} for r, h in zip(rows, headers, strict=True))
    out, by_finder = scoring.score(listed, first), scoring.score(finder, rows[0])
    assert out["probability"] == pytest.approx(by_finder["probability"]) and out["cells"] == by_finder["cells"]
    with pytest.raises(Refused, match="NO_CENTRES: the table of cells has no row of the field"):
        scoring.score(listed, second)
    with pytest.raises(Refused, match="NO_CENTRES: the volumes stage has joined no table"):
        scoring.score(listed, rows[0])


def test_cells_are_cut_and_scored_on_the_scale_of_their_plate(tmp_path):
    plate(tmp_path / "plate", 2, size=64)
    spec = {"orientation": None, "intensity": {"kind": "zscore", "against": "controls"}}
    settings = config.parse(plate_config("a", "l", **CELLS | {"preprocess": spec}))
    (row, *_) = plate_rows(tmp_path / "plate" / "images", settings.plates)
    plain = {p.cell[0] for p in dataset.cut(row, config.parse(plate_config("a", "l", **CELLS)))[0]}
    Correction((None, None), (ControlScale(20, 5), ControlScale(30, 4))).write(str(tmp_path / "plate.json"))
    treated = {"correction": {"file": str(tmp_path / "plate.json"), "of": settings.preprocess.of_plate}}
    row |= {"header": json.dumps(json.loads(row["header"]) | treated)}
    stored, cut = formats.read_volume(VolumeHeader.from_row(row)).array, list(dataset.cut(row, settings)[0])
    assert {p.cell[0] for p in cut} == plain and plain
    for patch in cut:
        i, j = (math.floor(at + 0.5) - 6 for at in patch.cell[1:])
        around = stored[:, i : i + 12, j : j + 12].astype(float)
        np.testing.assert_allclose(patch.image, [(around[0] - 20) / 5, (around[1] - 30) / 4], atol=1e-5)
    model = of_cells(settings.cells)
    model.spec = model.spec.model_copy(update={"preprocess": settings.preprocess})
    by_hand = model.predict_patches(np.stack([p.image for p in cut])).mean(0)
    assert scoring.score(model, row)["probability"] == pytest.approx(by_hand, abs=1e-5)
    with pytest.raises(Refused, match="OTHER_LIGHT"):
        scoring.score(of_cells(), row)


def test_what_a_field_of_cells_costs_goes_by_its_cells():
    row = {"shape": [2, 1080, 1080, 1], "affine": np.eye(4).ravel().tolist(), "format": "plate", "source_paths": ["a.tif"]}
    row["header"] = None
    finder = of_cells().spec
    table = finder.model_copy(update={"cells": Cells(crops=Crops(size=12))})
    few, many = ({**row, "header": json.dumps({"centres": {"cells": n}})} for n in (10, 1000))
    assert scoring.cost(few, table) < scoring.cost(many, table) < scoring.cost(row, finder)
    assert scoring.cost(many, table) - scoring.cost(few, table) == pytest.approx(990 * 144 * 2000)


def test_the_key_depends_on_all_three():
    keys = {scoring.key(*k) for k in [("v", "m", "c"), ("w", "m", "c"), ("v", "n", "c"), ("v", "m", "d")]}
    assert len(keys) == 4


def test_mask_paths_hold_no_path_of_the_archive():
    path = scoring.mask_path("a model/x", "3", "5e77", "sub 1", "abc")
    assert path == "predictions/masks/a%20model%2Fx/3/5e77/sub%201_abc.nii.gz"


OBLIQUE = (0.8, 0.6, 0.0, -0.48, 0.64, 0.6)
CLASSES = ("background", "liver", "kidney")
SEGMENTS = {"liver": {"type": (10200004, "SCT", "Liver")}}


def segmenter(**score) -> Model:
    """A model that finds something of every class, on a grid that is no input's."""
    spec = ModelSpec(
        name="organs", task="segmentation", classes=CLASSES, in_channels=1, spatial_dims=3, window=(16, 16, 8),
        network=Component(name="UNet", channels=[4, 8], strides=[2]),
        preprocess=Preprocess(orientation="PIR", spacing=(1.7, 1.9, 2.1)), score=Score(overlap=0.25, **score),
    )  # fmt: skip
    torch.manual_seed(1)
    return Model(spec, networks.build(spec.network, 1, 3, 3))


def row_of(folder, datasets):
    """The volumes row of a series, as far as scoring looks at it, and its header."""
    ((header,), _) = formats.read_headers(str(dicoms.write(folder, datasets)))
    return {**header.row(), "subject": "sub-1", "split": None, "target": None, "label": None}, header


def series(**elements):
    return dicoms.series(dicoms.stack((18, 14, 9)), PixelSpacing=[1.5, 1.25], orientation=OBLIQUE, StudyDate="20200304", **elements)


def segs(folder, **changes):
    return dataclasses.replace(scoring.SegFolder(str(folder), "organs", "3", "d1g3st", "s3tt1ngs"), **changes)


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_a_prediction_goes_back_as_a_seg_on_the_grid_of_its_series(tmp_path, kind):
    row, header = row_of(tmp_path / "in", series(InstanceNumber=lambda k: 9 - k))
    model = segmenter(masks="seg", seg_folder=str(tmp_path / "out"), seg_type=kind, segments=SEGMENTS)
    out = scoring.score(model, row, segs=segs(tmp_path / "out"))
    labels = model.predict(formats.read_volume(header)).array
    assert len(np.unique(labels)) > 1
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == out["seg"]
    assert np.array_equal(dicom_seg.read(str(path), header).array, np.concatenate([labels == 1, labels == 2]))
    ds = pydicom.dcmread(path)
    assert (f"{ds.SOPInstanceUID}.dcm", ds.SeriesDescription, ds.ContentDate) == (out["seg"], "organs 3", "20200304")
    described = [s for s in ds.SegmentSequence if s.SegmentNumber]  # a label map describes its background too
    assert [s.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for s in described] == ["Liver", "Tissue"]
    assert not any(dicoms.SECRET in str(v) for v in out.values())


def test_a_fractional_seg_holds_the_probabilities(tmp_path):
    row, header = row_of(tmp_path / "in", series())
    model = segmenter(masks="seg", seg_folder="x", seg_type="FRACTIONAL")
    out = scoring.score(model, row, segs=segs(tmp_path / "out"))
    probabilities = model.probabilities(formats.read_volume(header)).array[1:]
    half = np.rint(np.clip(probabilities, 0, 1) * 255) >= 127.5
    assert np.array_equal(dicom_seg.read(str(tmp_path / "out" / out["seg"]), header).array, half)


def test_scored_again_it_is_the_same_object_and_under_other_settings_another(tmp_path):
    row, _ = row_of(tmp_path / "in", series())
    model = segmenter(masks="both", seg_folder="x")
    names = [scoring.score(model, row, None, segs(tmp_path / f, **c))["seg"] for f, c in
             [("a", {}), ("b", {}), ("c", {"settings": "0ther"}), ("d", {"model_digest": "0ther"})]]  # fmt: skip
    assert names[0] == names[1] and len(set(names)) == 3
    first, again = ((tmp_path / f / names[0]).read_bytes() for f in "ab")
    assert first == again


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "spec", "most"),
    [("float32", {"spacing": [1, 1, 2.5]}, 3.0), ("int16 labelled", {"intensity": {"kind": "percentile"}}, 2.5)],
)
def test_memory_of_a_worker_beside_the_model(tmp_path, dtype, spec, most):
    """In volumes as float32; the whole probabilities of three classes and their copies would be 10."""
    program = pathlib.Path(__file__).parent / "memory.py"
    arguments = ["[256, 256, 320]", dtype, json.dumps(spec), "3", str(tmp_path)]
    ended = subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout)
    assert found["growth"] / found["volume"] <= most


def test_both_masks_hold_the_same(tmp_path):
    row, header = row_of(tmp_path / "in", series())
    out = scoring.score(segmenter(masks="both", seg_folder="x"), row, str(tmp_path / "mask.nii.gz"), segs(tmp_path / "out"))
    ((mask,), _) = formats.read_archive(str(tmp_path / "mask.nii.gz"))
    seg = dicom_seg.read(str(tmp_path / "out" / out["seg"]), header).array
    assert np.array_equal(seg[0] + 2 * seg[1], mask.array[0])


@pytest.mark.parametrize("to_nifti", [True, False])
def test_a_prediction_without_a_seg_is_kept_and_says_why(tmp_path, to_nifti):
    row, _ = row_of(tmp_path / "in", series())
    mask = str(tmp_path / "mask.nii.gz") if to_nifti else None
    out = scoring.score(segmenter(masks="both", seg_folder="x"), row | {"series_uid": ""}, mask, segs(tmp_path / "out"))
    assert out["seg_refused"].reason == "SEG_SOURCE" and "seg" not in out and len(out["ml"]) == 3
    assert (tmp_path / "mask.nii.gz").exists() == to_nifti and not (tmp_path / "out").exists()


def test_a_seg_that_may_be_written_later_is_tried_again(tmp_path, monkeypatch):
    row, _ = row_of(tmp_path / "in", series())

    def gone(*_):
        raise Refused("UNREADABLE", "the file cannot be read")

    monkeypatch.setattr(dicom_seg, "_headers", gone)
    with pytest.raises(Refused, match="UNREADABLE"):
        scoring.score(segmenter(masks="seg", seg_folder="x"), row, segs=segs(tmp_path / "out"))


@pytest.mark.parametrize("pieces", [1, 4])
def test_reliability_is_of_the_voxels_that_are_predicted_or_true_foreground(pieces):
    truth = np.array([[[[0, 1, 1, 0]]]], np.uint8)
    probabilities = np.array([[[[1.0, 0.8, 0.1, 0.4]]], [[[0.0, 0.2, 0.9, 0.6]]], [[[0.0, 0.0, 0.0, 0.0]]]], np.float32)
    planes = [(slice(None),) * 3 + (slice(n, n + 4 // pieces),) for n in range(0, 4, 4 // pieces)]
    image = Volume(np.zeros((1, 1, 1, 4), np.uint8), np.eye(4))
    found = segmenter().labelled(((p, probabilities[p]) for p in planes), image, truth=truth)
    assert found.labels.array.tolist() == [[[[0, 0, 1, 1]]]] and found.probabilities is None
    assert np.reshape(found.reliability, (3, -1)).sum(1) == pytest.approx([3, 0.8 + 0.9 + 0.6, 1])


def test_a_disk_that_is_full_says_nothing_of_the_volume(tmp_path, monkeypatch):
    """It ends the task, as what spark.score makes of it, and not the volume."""
    row, _ = row_of(tmp_path / "in", series())

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(nifti, "write", full)
    monkeypatch.setattr(dicom_seg, "write", full)
    for model, arguments in ((segmenter(), [str(tmp_path / "m")]), (segmenter(masks="seg"), [None, segs(tmp_path / "out")])):
        with pytest.raises(scoring.Unwritten, match="No space left on device"):
            spark_score._tried(row, scoring.score, model, row, *arguments)
    monkeypatch.setattr(storage, "writing", full)
    with pytest.raises(scoring.Unwritten):
        spark_score._tried(row, scoring.spread, segmenter(), row, str(tmp_path / "parts"))


def test_a_prediction_describes_its_image(tmp_path):
    row, header = row_of(tmp_path / "in", series())
    out = scoring.score(segmenter(), row)
    image = formats.read_volume(header).array
    assert out["quantiles"] == pytest.approx(np.quantile(image, intensity.QUANTILES))
    assert "reliability" not in out
