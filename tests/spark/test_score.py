"""The score stage on DICOM series: SEG for the hospital, pseudonyms for the lake."""

import sys

import pydicom
import pytest
import torch
from formats import dicoms

from sparkmed import config, formats, pipeline, storage, tables, tracking
from sparkmed.config import Component
from sparkmed.formats import dicom_seg
from sparkmed.formats.instance import VolumeHeader
from sparkmed.learning import networks
from sparkmed.learning.model import Model, ModelSpec
from sparkmed.pipeline import common, ledger
from sparkmed.rejection import InputError

pytestmark = pytest.mark.engine
PLAIN = {"name": "organs", "task": "segmentation", "classes": ["background", "liver", "kidney"]}


def project(tmp_path, **score):
    parts = {
        "archive": str(tmp_path / "archive"),
        "lake": str(tmp_path / "lake"),
        "tracking": {"uri": f"sqlite:///{tmp_path}/ml.db"},
    }
    return config.parse(PLAIN | parts | {"volumes": {"labels": {"allow_missing": True}}, "score": score})


def crowned(settings, tmp_path):
    """A champion of random weights."""
    spec = ModelSpec(
        name="organs", task="segmentation", classes=settings.classes, in_channels=1, spatial_dims=3, window=(16, 16, 8),
        network=Component(name="UNet", channels=[4, 8], strides=[2]), preprocess=config.Preprocess(orientation="PIR"),
    )  # fmt: skip
    torch.manual_seed(1)
    Model(spec, networks.build(spec.network, 1, 3, 3)).save(str(tmp_path / "model"))
    registry = tracking.of(settings)
    with registry.run("by hand", {}, {}, {"name": "d", "version": "1", "digest": "0", "url": str(tmp_path)}) as run:
        registry.crown(run.register(str(tmp_path / "model"), {}), "by hand")


def test_predictions_go_back_as_seg_and_the_lake_names_nobody(spark, tmp_path, caplog):
    for s in range(2):
        series = dicoms.series(dicoms.stack((18, 14, 9), seed=s), SeriesInstanceUID=f"1.2.{s}")
        dicoms.write(tmp_path / "archive" / str(s), series)
    settings = project(tmp_path, masks="both", seg_folder=str(tmp_path / "segs"))
    crowned(settings, tmp_path)
    pipeline.catalog(settings)
    pipeline.volumes(settings)
    assert pipeline.score(settings)["scored"] == 2
    assert pipeline.score(settings)["scored"] == 0
    volumes = {r["uid"]: r for r in tables.volumes(settings.lake).rows()}
    rows = tables.predictions(settings.lake).rows()
    assert {r["seg"] for r in rows} == {p.name for p in (tmp_path / "segs").iterdir()} and len(rows) == 2
    for r in rows:
        header = VolumeHeader.from_row(volumes[r["volume"]])
        path = tmp_path / "segs" / r["seg"]
        ((mask,), _) = formats.read_archive(storage.join(settings.lake, r["mask"]))
        seg = dicom_seg.read(str(path), header)
        assert (seg.array[0] + 2 * seg.array[1] == mask.array[0]).all()
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        assert (ds.PatientID, ds.SeriesDescription) == (f"{dicoms.SECRET}-1605", "organs 1")
        assert ds.ReferencedSeriesSequence[0].SeriesInstanceUID == header.series_uid
        assert dicoms.SECRET not in str(r)

    before = {p.name: p.read_bytes() for p in (tmp_path / "segs").iterdir()}
    label_map = project(tmp_path, masks="seg", seg_folder=str(tmp_path / "segs"), seg_type="LABELMAP")
    assert pipeline.score(label_map)["scored"] == 2, "another kind of SEG is another object"
    after = {p.name: p.read_bytes() for p in (tmp_path / "segs").iterdir()}
    assert len(after) == 4 and before.items() <= after.items()

    catalogued = tables.volumes(settings.lake)
    nameless = [r | {"series_uid": ""} for r in catalogued.rows()]
    catalogued.commit([catalogued.write(nameless)], replace=catalogued.paths())
    fractional = project(tmp_path, masks="both", seg_folder=str(tmp_path / "segs"), seg_type="FRACTIONAL")
    outcome = pipeline.score(fractional)
    assert (outcome["scored"], outcome["refused"]) == (2, 0), "what has no SEG is predicted all the same"
    assert pipeline.score(fractional) | {"version": None} == outcome | {"version": None, "scored": 0, "before": 2}
    assert len(list((tmp_path / "segs").iterdir())) == 4
    reasons = [r["reason"] for r in tables.quarantine(settings.lake).rows() if r["stage"] == "score"]
    assert reasons == ["SEG_SOURCE"] * 18, "every slice says why"
    assert "2 predictions have no DICOM SEG" in caplog.text and f"{tmp_path}/archive" not in caplog.text, "paths may name patients"
    assert dicoms.SECRET not in caplog.text and dicoms.SECRET.encode() not in (tmp_path / "ml.db").read_bytes()

    finer = project(tmp_path, masks="both", seg_folder=str(tmp_path / "segs"), seg_type="FRACTIONAL", overlap=0.25)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(common, "commit_files", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            pipeline.score(finer)
    assert pipeline.score(finer)["scored"] == 2, "what lost its SEG is scored again when its commit was lost too"
    assert [r["attempt"] for r in ledger.failures(finer)] == [0] * 36

    (tmp_path / "other").symlink_to(tmp_path / "lake")
    for place in ("lake", "other"):
        inside = project(tmp_path, masks="seg", seg_folder=str(tmp_path / place / "segs"))
        with pytest.raises(InputError, match="is in the lake"):
            pipeline.score(inside)
    assert any("is in the lake" in p for p in pipeline.check(inside))
