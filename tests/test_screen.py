"""From plates to hits with real Spark and MLflow, and a model of random weights as champion."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from archives import CELLS, plate, plate_config
from hcs import screens
from test_jobs import DAEMON, JOBS

import sparkmed
from sparkmed import PatchLoader, cli, config, dataset, formats, pipeline, storage, tables, tracking
from sparkmed.formats.instance import VolumeHeader
from sparkmed.hcs import image_quality, nuclei, profiles, quality
from sparkmed.learning import networks
from sparkmed.learning.model import Model, ModelSpec
from sparkmed.pipeline.screen import answer, projection, score_class
from sparkmed.rejection import InputError

engine = pytest.mark.engine


def settings_of(folder, **changes) -> config.Config:
    plain = plate_config(folder / "archive", folder / "lake", **changes)
    (folder / "project.yaml").write_text(yaml.safe_dump(plain))
    return config.parse(plain)


def crown(settings, folder):
    """Make a classifier of random weights the champion."""
    spec = ModelSpec(
        name="plates", task="classification", classes=("negative", "positive"), in_channels=2, spatial_dims=2, window=(48, 48, 1),
        network=config.Component(name="DenseNet121", init_features=4, growth_rate=2, block_config=[1, 1]),
        preprocess=settings.preprocess,
    )  # fmt: skip
    torch.manual_seed(0)
    Model(spec, networks.build(spec.network, 2, 2, 2)).save(str(folder / "model"))
    registry = tracking.of(settings)
    with registry.run("by hand", {}, {}, {"name": "d", "version": "1", "digest": "0", "url": str(folder)}) as run:
        version = run.register(str(folder / "model"), {})
    registry.crown(version, "by hand")


@pytest.fixture(scope="module")
def scored(tmp_path_factory, spark):
    """A plate whose fields are scored."""
    folder = tmp_path_factory.mktemp("screen")
    plate(folder / "archive")
    settings = settings_of(folder)
    pipeline.catalog(settings)
    pipeline.volumes(settings)
    crown(settings, folder)
    pipeline.score(settings)
    return folder


def wells_of(settings) -> pd.DataFrame:
    return tables.wells(settings.lake).read().to_pandas().set_index("well")


@engine
def test_a_champion_of_other_light_is_refused_before_anything_is_scored(scored):
    with pytest.raises(InputError, match="light or scale was treated in another way than preprocess.illumination"):
        pipeline.score(settings_of(scored, preprocess__illumination={"least_fields": 2}))


@engine
def test_wells_are_the_medians_of_what_was_scored(scored):
    settings = settings_of(scored)
    counts = pipeline.screen(settings)
    assert (counts["fields"], counts["wells"], counts["plates"]) == (16, 16, 1)
    wells = wells_of(settings)
    scores = {r["volume"]: r["probability"][1] for r in tables.predictions(settings.lake).rows()}
    for r in tables.volumes(settings.lake).rows():
        well = json.loads(r["header"])["well"]
        assert wells.loc[well, "score"] == pytest.approx(scores[r["uid"]]) and wells.loc[well, "fields"] == 1
    assert wells["profile"].map(len).nunique() == 1 and set(wells["split"].dropna()) == {"train", "val", "test"}
    held_out = wells[(wells["split"] == "test")]
    negative, positive = (held_out[held_out["control"] == c]["score"].to_numpy() for c in ("negative", "positive"))
    (of_plate,) = (r for r in tables.plates(settings.lake).rows() if r["feature"] == "score")
    assert (of_plate["negatives"], of_plate["positives"]) == (2, 2), "controls that were trained on judge nothing"
    assert of_plate["z_prime"] == pytest.approx(float(quality.z_prime(positive, negative)))
    assert wells.loc[wells["split"].isin(["train", "val"]), ["p_robust", "q_robust"]].isna().all(axis=None)


@engine
def test_fields_are_looked_at_once_under_the_same_settings(scored):
    settings = settings_of(scored)
    pipeline.screen(settings)
    before = tables.fields(settings.lake).rows()
    pipeline.screen(settings)
    assert len(before) == 16 and tables.fields(settings.lake).rows() == before
    row = next(r for r in before if r["volume"])
    (volume,) = (r for r in tables.volumes(settings.lake).rows() if r["uid"] == row["volume"])
    array = formats.read_volume(VolumeHeader.from_row(volume)).array[..., 0]
    cells = len(nuclei.find(array[1], settings.plates.nuclei).cells)
    found = image_quality.measure(array[0], settings.plates.quality, cells)
    assert row["cells"] == cells > 0 and row["slope"][0] == pytest.approx(found.slope) and row["channels"] == ["GFP", "DNA"]
    assert wells_of(settings)["cells"].sum() == sum(r["cells"] for r in before)


@engine
def test_flagged_fields_stay_unless_the_config_leaves_them_out(scored):
    settings = settings_of(scored)
    pipeline.screen(settings)
    few = sorted(r["cells"] for r in tables.fields(settings.lake).rows())[8]
    flagging = settings_of(scored, plates__quality={"least_cells": few})
    assert pipeline.screen(flagging)["fields"] == 16
    rows = [r for r in tables.fields(flagging.lake).rows() if any("few_cells" in f for f in r["flags"])]
    assert rows and all(r["cells"] < few for r in rows)
    assert pipeline.screen(settings_of(scored, plates__quality={"least_cells": few, "leave_out": ["few_cells"]}))["fields"] < 16
    pipeline.screen(settings)


@engine
def test_the_report_shows_the_screen(scored):
    settings = settings_of(scored)
    pipeline.screen(settings)
    page = storage.read_bytes(pipeline.make_report(settings)["report"]).decode()
    section = page[page.index('id="screen"') :]
    assert "The screen" in section and section.count("data:image/png") >= 4 and str(scored) not in page


@engine
def test_the_job_does_it_on_a_cluster(scored, spark_cluster):
    settings = settings_of(scored)
    said = pipeline.screen(settings)
    before = wells_of(settings)
    ended = spark_cluster.submit(JOBS / "screen.py", scored / "project.yaml", conf=DAEMON, timeout=400)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    assert f"fields {said['fields']}, wells {said['wells']}" in ended.stdout
    assert wells_of(settings)["score"].equals(before["score"])


@engine
def test_what_cannot_be_said_is_said(scored, tmp_path, capsys):
    project = scored / "project.yaml"
    settings_of(scored)
    assert cli.main(["screen", str(project), "plates=null"]) == 2
    assert "no plates" in capsys.readouterr().err
    assert cli.main(["screen", str(project), "screen.score=third"]) == 2
    assert "wanted one of classes" in capsys.readouterr().err
    assert cli.main(["screen", str(project), f"lake={tmp_path / 'empty'}"]) == 2


@pytest.fixture(scope="module")
def of_cells(tmp_path_factory, spark):
    """The config of a plate whose champion has learnt the single cells of its controls, and has scored it."""
    folder = tmp_path_factory.mktemp("cells")
    plate(folder / "archive", size=64)
    network = {"name": "DenseNet121", "init_features": 4, "growth_rate": 2, "block_config": [1, 1]}
    train = {"device": "cpu", "processes": 1, "threads": 1, "epochs": 1, "batch_size": 8, "network": network}
    settings = settings_of(folder, **CELLS, train=train)
    pipeline.catalog(settings)
    pipeline.volumes(settings)
    pipeline.patches(settings)
    tracking.of(settings).crown(pipeline.train(settings)["version"], "by hand")
    assert pipeline.score(settings)["scored"] == 16
    return settings


COLUMNS = ("volume", "cell", "x", "y", "target", "image")


@engine
def test_cells_go_from_a_plate_to_the_loader(of_cells):
    from petastorm import make_reader

    rows = [r for r in tables.volumes(of_cells.lake).rows() if r["split"]]
    url = dataset.url(of_cells.lake, of_cells.name, dataset.version(rows, of_cells))
    cut = {(r["uid"], p.cell[0]): (r["target"], p) for r in rows for p in dataset.cut(r, of_cells)[0]}
    seen = []
    for batch in PatchLoader(url, batch_size=5, shuffle=False):
        columns = [batch[c] if c in ("volume", "cell", "image") else batch[c].tolist() for c in COLUMNS]
        seen += [row for row, real in zip(zip(*columns, strict=True), batch["weight"], strict=True) if real]
    assert len(seen) == len(cut) == sum(dataset.describe(url)["counts"].values()) >= 20
    for volume, cell, x, y, target, image in seen:
        wanted, patch = cut[volume, cell]
        assert (patch.cell, wanted) == ((cell, x, y), target) and np.array_equal(image, patch.image)
    with make_reader(f"file://{storage.local_path(url)}", reader_pool_type="dummy", num_epochs=1) as reader:
        assert {(r.volume, r.cell, r.x, r.y) for r in reader} == {s[:4] for s in seen}


@engine
def test_a_champion_of_cells_scores_each_field_once_by_its_cells(of_cells):
    registry = tracking.of(of_cells)
    model = sparkmed.load_model(f"models:/{registry.model}@champion", registry.uri, "cpu")
    assert model.spec.cells == of_cells.cells and model.spec.window == (12, 12, 1)
    volumes = {r["uid"]: r for r in tables.volumes(of_cells.lake).rows()}
    for r in tables.predictions(of_cells.lake).rows():
        found = model.cells(dataset.read_image(volumes[r["volume"]]), features=True)
        assert r["cells"] == len(found.cells) and r["probability"] == pytest.approx(found.of_field, abs=1e-5)
        assert r["features"] == pytest.approx(np.median(found.features, 0), abs=1e-5) and r["mask"] is None
        written = pd.read_parquet(storage.join(of_cells.lake, r["cell_table"]))
        assert written.cell.tolist() == list(found.cells) and set(written.volume) == {r["volume"]}
        np.testing.assert_allclose(written.probability_positive, found.probabilities[:, 1], atol=1e-5)
    assert pipeline.score(of_cells)["scored"] == 0


@engine
def test_channels_in_another_order_are_refused_before_anything_is_scored(of_cells):
    plates = of_cells.plates.model_copy(update={"channels": of_cells.plates.channels[::-1]})
    with pytest.raises(InputError, match="finds cells in channel 2, DNA; plates.channels has .'DNA', 'GFP'."):
        pipeline.score(of_cells.model_copy(update={"plates": plates}))


@engine
def test_wells_of_cells_are_the_medians_of_their_fields(of_cells):
    assert pipeline.screen(of_cells)["wells"] == 16
    wells = wells_of(of_cells)
    rows = {json.loads(r["header"])["well"]: r["uid"] for r in tables.volumes(of_cells.lake).rows()}
    by_volume = {r["volume"]: r for r in tables.predictions(of_cells.lake).rows()}
    assert all(wells.loc[w, "score"] == pytest.approx(by_volume[uid]["probability"][1]) for w, uid in rows.items())
    assert (wells["fields"] == 1).all() and wells["cells"].sum() >= sum(r["cells"] for r in by_volume.values())


@engine
def test_a_table_of_cells_is_looked_at_before_anything_else(of_cells, tmp_path):
    table = tmp_path / "cells.csv"

    def problems():
        patches = {**CELLS["patches"], "crops": {"size": 12, "table": str(table)}}
        plain = of_cells.model_dump(mode="json", exclude_defaults=True) | {"patches": patches}
        return [p for p in pipeline.check(config.parse(plain)) if "table" in p]

    assert "No such file" in problems()[0]
    table.write_text("Metadata_Plate,Metadata_Well,x,y\nP,A01,1,2\n")
    assert "wanted columns x, y, and image or plate, well and site" in problems()[0]
    table.write_text("plate,well,site,x,y\nplate,A01,1,20,30\n")
    assert not problems()


def table_of(**how) -> tuple[pd.DataFrame, list[str]]:
    made = screens.screen(**how)
    normal = made.wells.assign(split=None, unit="uM", cell_line=None, replicate=None, fields=1)
    return normal, made.features


def plates_config(**changes) -> config.Config:
    return config.parse(plate_config("archive", "lake", **changes))


def test_the_truth_of_a_made_up_screen_comes_out():
    table, features = table_of()
    normal = profiles.normalize(table, features, "mad_robustize")
    answers = answer(normal.table, normal.features, plates_config())
    assert answers.summary["nsc"] > 0.6 and answers.summary["nscb"] > 0.6 and answers.summary["nsc_cells"] < 0.4
    strong = normal.table[normal.table["control"].notna() | (normal.table["concentration"] > 2)]  # below they do little
    of_strong = answer(strong, normal.features, plates_config()).summary
    assert of_strong["nsc"] > 0.95 and of_strong["nscb"] > 0.95 and of_strong["nsc_chance"] < 0.15
    assert answers.summary["leak"] is None and of_strong["percent_replicating"] > 90
    of_score = answers.plates[answers.plates["feature"] == "score"]
    assert np.allclose(of_score["z_prime"], screens.Z_PRIME)
    truth = screens.screen().ec50
    curves = answers.compounds[answers.compounds["compound"].isin(truth)].set_index("compound")
    assert curves["identified"].all() and curves["spearman"].min() > 0.8
    inside = [curves.loc[c, "ec50_low"] <= e <= curves.loc[c, "ec50_high"] for c, e in truth.items()]
    assert np.mean(inside) > 0.85
    hit = answers.wells["hit"].eq(True)
    assert hit[answers.wells["concentration"] > 5].mean() > 0.95


def test_a_leak_through_the_batch_is_said():
    table, features = table_of(leak=8.0, signal=0.0)
    normal = profiles.normalize(table, features, "mad_robustize")
    answers = answer(normal.table, normal.features, plates_config())
    assert answers.summary["nsc"] > 0.9 and answers.summary["leak"]


def test_compounds_that_were_trained_on_are_in_no_match():
    table, features = table_of()
    trained = {"m00c0", "m01c0"}
    table["split"] = np.where(table["compound"].isin(trained), "train", None)
    normal = profiles.normalize(table, features, "mad_robustize")
    answers = answer(normal.table, normal.features, plates_config())
    assert answers.summary["trained_wells"] == table["compound"].isin(trained).sum() > 0
    assert not trained & set(answers.compounds["compound"])
    assert answers.wells.loc[answers.wells["compound"].isin(trained), "hit"].isna().all()


def test_a_screen_without_controls_has_no_hits_and_says_why():
    table, _ = table_of()
    table["control"] = None
    answers = answer(table, [], plates_config())
    assert answers.wells["hit"].isna().all() and answers.plates["z_prime"].isna().all() and answers.plates["reason"].notna().all()


def test_the_projection_lies_between_the_controls_that_were_trained_on():
    controls = [("negative", "train", (0.0, 1.0)), ("negative", "val", (0.0, 3.0)), ("positive", "train", (4.0, 2.0))]
    wells = [
        *controls,
        ("negative", "test", (100.0, 0.0)),
        (None, None, (2.0, 9.0)),
        (None, None, (8.0, -5.0)),
        (None, None, (np.nan, 0)),
    ]
    table = pd.DataFrame([(c, s, *f) for c, s, f in wells], columns=["control", "split", "f0", "f1"])
    np.testing.assert_allclose(projection(table, ["f0", "f1"])[:6], [0, 0, 1, 25, 0.5, 2])
    assert np.isnan(projection(table, ["f0", "f1"])[6])
    with pytest.raises(InputError, match="wants positive controls that were trained on"):
        projection(table[table["control"] != "positive"], ["f0", "f1"])
    with pytest.raises(InputError, match="wants score.features"):
        plates_config(screen={"by": "projection"}, score={})


def test_the_score_is_the_positive_class_unless_the_config_says_another():
    assert score_class(plates_config()) == "positive"
    assert score_class(plates_config(screen={"score": "negative"})) == "negative"
    with pytest.raises(InputError, match="wanted one of classes"):
        plates_config(screen={"score": "neither"})
