"""How volumes become tasks, what workers share, and volumes in parts: with a real Spark of two slots."""

import json
import os
import pathlib

import nibabel
import numpy as np
import pytest
import torch

from sparkmed import formats, scoring, storage
from sparkmed.config import Component, Intensity, Preprocess, Score
from sparkmed.learning import networks
from sparkmed.learning.model import Model, ModelSpec
from sparkmed.spark import score

TESTS = str(pathlib.Path(__file__).parents[1])
AFFINE = np.array([[-1.1, 0, 0, 5], [0, 0.9, 0, -7], [0, 0, 2.0, 9], [0, 0, 0, 1]])


def segmenter(**more) -> Model:
    spec = ModelSpec(
        **{
            "name": "organs", "task": "segmentation", "classes": ("background", "liver", "spleen"), "in_channels": 1,
            "spatial_dims": 3, "window": (16, 16, 8), "network": Component(name="UNet", channels=[4, 8], strides=[2]),
            "preprocess": Preprocess(spacing=(1, 1.3, 1.5), intensity=Intensity(kind="percentile")),
        }
        | more
    )  # fmt: skip
    torch.manual_seed(1)
    return Model(spec, networks.build(spec.network, 1, 3, 3))


def rows_of(folder, *shapes) -> list[dict]:
    """Of new volumes."""
    folder.mkdir()
    for n, shape in enumerate(shapes):
        array = np.random.default_rng(n).integers(-900, 900, shape).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(array, AFFINE), folder / f"{n}.nii")
    headers, rejections = formats.read_headers(str(folder))
    assert len(headers) == len(shapes) and not rejections
    return [{**h.row(), "subject": "s", "split": None, "target": None, "label": None} for h in headers]


def total(model: Model) -> float:
    return sum(float(p.detach().abs().sum()) for p in model.network.parameters())


def numbers(predictions: list[dict]) -> dict:
    return {p["volume"]: {k: v for k, v in p.items() if k not in ("seconds", "scored_at")} for p in predictions}


@pytest.mark.parametrize("slots", [2, 4])
def test_tasks_of_a_mix_of_sizes_take_equally_many_windows(slots):
    rng, spec = np.random.default_rng(0), segmenter().spec
    for mix in range(5):
        factors = [20, 1, *rng.uniform(1, 20, 38)]
        rows = [
            {
                "uid": str(n),
                "shape": [1, 64, 64, round(12 * f)],
                "affine": np.eye(4).ravel(),
                "format": "nifti",
                "source_paths": ["a.nii"],
            }
            for n, f in enumerate(factors)
        ]
        costs = [scoring.cost(r, spec) for r in rows]
        windows = {r["uid"]: len(spec.windows(scoring._preprocessed_shape(r, spec))) for r in rows}
        tasks = score._tasks(rows, costs, slots)
        assert len(tasks) >= slots and sorted(r["uid"] for t in tasks for r in t) == sorted(windows)
        work = [sum(windows[r["uid"]] for r in t) for t in tasks]
        assert max(work) / np.mean(work) <= 1.25, mix


def test_the_cost_is_of_the_preprocessed_image_and_of_decoding():
    spec = segmenter().spec
    row = {"uid": "a", "shape": [1, 64, 64, 64], "affine": np.eye(4).ravel(), "format": "nifti", "source_paths": ["a.nii"]}
    fine = row | {"affine": np.diag([4.0, 4, 4, 1]).ravel()}
    assert scoring.cost(fine, spec) > 20 * scoring.cost(row, spec)
    assert scoring.cost(row | {"source_paths": ["a.nii.gz"]}, spec) > scoring.cost(row, spec)
    assert scoring.cost(row, spec, gpu=True) < scoring.cost(row, spec)
    assert scoring.megabytes(fine, spec) > 20 * scoring.megabytes(row, spec)


def test_one_volume_does_not_set_the_length_of_the_night():
    spec = segmenter().spec
    row = {"shape": [1, 400, 400, 800], "affine": np.eye(4).ravel(), "format": "nifti", "source_paths": ["a.nii"]}
    rows = [row | {"uid": "long"}, row | {"uid": "short", "shape": [1, 40, 40, 40]}]
    costs = {r["uid"]: scoring.cost(r, spec) for r in rows}
    assert [r["uid"] for r in score._cut(rows, spec, costs, 2, None)] == ["long"]
    assert score._cut(rows, spec, costs, 1, None) == [], "it would take as long in parts"
    small = [r | {"shape": [1, 40, 40, 20]} for r in rows]
    assert score._cut(small, spec, costs, 2, None) == [], "not worth it"
    assert len(score._cut(rows, spec, costs, 2, 0.01)) == 2
    assert score._cut(rows, spec.model_copy(update={"task": "classification"}), costs, 2, 0.01) == []


@pytest.mark.engine
def test_a_volume_in_parts_gives_what_it_gives_as_a_whole(spark, tmp_path, monkeypatch):
    """Masks to the byte, the numbers but for time; whatever the number of tasks. A broken one is refused as ever."""
    rows = rows_of(tmp_path / "in", (40, 33, 21), (9, 30, 50), (12, 12, 5))
    segmenter().save(str(tmp_path / "model"))
    broken = pathlib.Path(storage.local_path(rows[2]["sources"][0]))
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    found, tasks = {}, {}
    for name, split, many in (("whole", None, None), ("parts", 1e-3, None), ("more parts", 1e-3, 100)):
        if many:
            monkeypatch.setattr(score, "_tasks", lambda items, weights, slots: [[i] for i in items])
        masks = {r["uid"]: str(tmp_path / name / f"{r['uid']}.nii.gz") for r in rows}
        scratch = str(tmp_path / "scratch")
        predictions, refused = score.predict(
            spark, rows, str(tmp_path / "model"), "cpu", masks, Score(overlap=0.5), scratch=scratch, split_mb=split
        )
        tasks[name] = [r.reason for r in refused]
        found[name] = numbers(predictions), {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
        assert not list((tmp_path / "scratch").glob("*")), "nothing is left"
    assert found["whole"] == found["parts"] == found["more parts"] and len(found["whole"][0]) == 2
    assert tasks["whole"] == tasks["parts"] == tasks["more parts"] == ["CHANGED"]
    assert all(min(p["ml"]) > 0 for p in found["whole"][0].values()), "every class is somewhere"


@pytest.mark.engine
def test_a_worker_loads_a_model_once_from_a_copy_that_all_share(spark, tmp_path):
    """A remote model; two workers at once, each asked for it many times. Another model is another, also at the same place."""
    url, log = f"counted://{tmp_path}/model", str(tmp_path / "opens")

    def ask(_):
        import sys

        def total(model):  # nothing of this module: workers cannot import it
            return sum(float(p.detach().abs().sum()) for p in model.network.parameters())

        sys.path.insert(0, TESTS)
        os.environ["COUNTED_OPENS"], os.environ["TMPDIR"] = log, str(tmp_path)
        import tempfile

        from training import remote  # noqa: F401

        tempfile.tempdir = str(tmp_path)
        try:
            model = score._model(url, "cpu", None, ())
        finally:
            tempfile.tempdir = None
        return (
            os.getpid(),
            id(model.network),
            total(model),
            torch.get_num_threads(),
        )

    for turn in range(2):
        model = segmenter()
        with torch.no_grad():
            next(model.network.parameters()).add_(turn + 1)
        model.save(str(tmp_path / "model"))
        answers = spark.sparkContext.parallelize(range(12), 12).map(ask).collect()
        assert len({a[0] for a in answers}) == len({a[:2] for a in answers}) <= 2
        assert {round(a[2], 3) for a in answers} == {round(total(model), 3)}
        assert {a[3] for a in answers} == {1}, "one torch thread per task slot of one core"
        opened = [pathlib.Path(line).name for line in pathlib.Path(log).read_text().splitlines()]
        assert opened.count("weights.safetensors") == turn + 1


def test_a_damaged_copy_is_fetched_again(tmp_path, monkeypatch):
    import tempfile

    from training import remote

    monkeypatch.setenv("COUNTED_OPENS", str(tmp_path / "opens"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    segmenter().save(str(tmp_path / "model"))
    url = f"counted://{tmp_path}/model"
    Model.load(url)
    (copy,) = (p for p in tmp_path.glob("sparkmed-cache-*/*") if p.name != "lock")
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    loaded = Model.load(url)
    assert json.loads((tmp_path / "model" / "spec.json").read_text())["weights_sha256"] == loaded.spec.weights_sha256
    assert remote.opened().count("weights.safetensors") == 2
    assert Model.load(url) and remote.opened().count("weights.safetensors") == 2


def test_whatever_a_network_raises_costs_one_volume():
    for odd in (lambda: {}["x"], lambda: [][0], lambda: None.shape, lambda: 1 / 0):
        found, (rejection,) = score._tried({"sources": ["file:///a"]}, odd)
        assert found is None and (rejection.uri, rejection.reason) == ("file:///a", scoring.FAILED)
    with pytest.raises(KeyboardInterrupt):
        score._tried({"sources": ["file:///a"]}, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
