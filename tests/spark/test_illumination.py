"""Light and scale of plates by real Spark are those of one process, bit by bit."""

import dataclasses
import json

import numpy as np
import pytest
import tifffile
from archives import plate, plate_config

from sparkmed import config, dataset, formats, pipeline, tables
from sparkmed.config import FieldQuality, Illumination, Intensity
from sparkmed.formats.instance import VolumeHeader
from sparkmed.hcs import illumination as core
from sparkmed.hcs import image_quality
from sparkmed.hcs.illumination import FieldSum
from sparkmed.hcs.plate_intensity import Histogram
from sparkmed.imaging import preprocess
from sparkmed.rejection import InputError, Refused
from sparkmed.spark import illumination

pytestmark = pytest.mark.engine
SETTINGS = Illumination(least_fields=3)


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """Rows of two plates of two channels each, 12 fields of plate P1 and 5 of P2, in folders of single pictures."""
    folder, rng, rows = tmp_path_factory.mktemp("screen"), np.random.default_rng(0), []
    light = 1 - 0.5 * np.linspace(-1, 1, 40)[:, None] ** 2 * np.ones(36)
    for n in range(17):
        plate = "P1" if n < 12 else "P2"
        pixels = rng.poisson(light * rng.uniform(50, 500)).astype(np.uint16)
        tifffile.imwrite(folder / f"{plate}_{n:02d}.tif", pixels.T)
    headers, refused = formats.read_headers(str(folder))
    assert not refused
    for h in sorted(headers, key=lambda h: h.source_paths):
        facts = h.facts | {"plate": h.source_paths[0][:2], "channels": ["DNA"], "well": "A01", "site": 1}
        rows.append(dataclasses.replace(h, header=json.dumps(facts)).row())
    return rows


def fields(rows, plate):
    return [formats.read_volume(VolumeHeader.from_row(r)).array for r in rows if json.loads(r["header"])["plate"] == plate]


def test_lights_are_those_of_one_process(spark, screen):
    found, undefined, refused = illumination.lights(spark, screen, SETTINGS)
    assert not undefined and not refused and sorted(found) == [("P1", "DNA"), ("P2", "DNA")]
    for (name, _), light in found.items():
        total = FieldSum()
        for field in fields(screen, name):
            total = total.merge(FieldSum.of(field[0, ..., 0]))
        expected = total.compute(SETTINGS)
        assert light.fields == expected.fields == {"P1": 12, "P2": 5}[name]
        np.testing.assert_array_equal(light.grid, expected.grid)
        np.testing.assert_array_equal(light.function, expected.function)


def test_partitions_and_order_make_no_difference(spark, screen, monkeypatch):
    found, _, _ = illumination.lights(spark, screen, SETTINGS)
    monkeypatch.setattr(illumination, "TASK_BYTES", 6000.0)  # two fields per task
    again, _, _ = illumination.lights(spark, screen[::-1], SETTINGS)
    assert found.keys() == again.keys()
    for key, light in found.items():
        np.testing.assert_array_equal(light.grid, again[key].grid)


def test_scales_are_those_of_one_process(spark, screen):
    lights, _, _ = illumination.lights(spark, screen, SETTINGS)
    spec = Intensity(kind="percentile", low=1, high=99)
    controls = [r for r in screen if json.loads(r["header"])["plate"] == "P1"][::2]
    found, undefined, refused = illumination.control_scales(spark, controls, spec, lights)
    assert not undefined and not refused and list(found) == [("P1", "DNA")]
    whole = Histogram.empty()
    for field in fields(controls, "P1"):
        whole = whole.merge(Histogram.of(core.correct(field, [lights["P1", "DNA"]])))
    assert found["P1", "DNA"] == whole.compute(spec)


def test_a_broken_field_is_refused_and_the_others_count(spark, screen, tmp_path):
    bad = tmp_path / "bad.tif"
    bad.write_bytes(b"II*\0 broken")
    broken = screen[2] | {"uid": "b", "sources": [str(bad)], "source_sha256": ["0" * 64]}
    odd = screen[3] | {"uid": "o", "shape": [1, 8, 8, 1]}
    rows = [r for n, r in enumerate(screen) if n not in (2, 3)] + [broken, odd]
    found, undefined, refused = illumination.lights(spark, rows, SETTINGS)
    assert found["P1", "DNA"].fields == 10 and not undefined
    assert {(r.uri, r.reason) for r in refused} == {(str(bad), "CHANGED"), (screen[3]["sources"][0], "FIELD_SHAPE")}
    assert {r.stage for r in refused} == {"illumination"}


def test_fields_left_out_do_not_count_and_few_are_said(spark, screen):
    background = [image_quality.measure(f[0, ..., 0], FieldQuality()).background for f in fields(screen, "P2")]
    dim = FieldQuality(background=sorted(background)[1], leave_out=["bright"])
    found, undefined, refused = illumination.lights(spark, screen, SETTINGS, dim)
    assert ("P2", "DNA") not in found and not refused
    assert undefined["P2", "DNA"].reason == "FEW_FIELDS" and "2 fields" in undefined["P2", "DNA"].message
    only_flagged = dim.model_copy(update={"leave_out": ()})
    assert illumination.lights(spark, screen, SETTINGS, only_flagged)[0]["P2", "DNA"].fields == 5
    black = FieldQuality(background=0, leave_out=["bright"])
    found, undefined, _ = illumination.lights(spark, screen, SETTINGS, black)
    assert not found and len(undefined) == 2
    _, undefined, _ = illumination.control_scales(spark, screen, Intensity(), quality=black)
    assert {e.reason for e in undefined.values()} == {"NO_CONTROLS"}


@pytest.mark.parametrize("facts", [{}, {"plate": "P1"}, {"plate": "P1", "channels": ["DNA", "GFP"]}])
def test_rows_that_are_no_fields_are_said(spark, screen, facts):
    with pytest.raises(InputError, match="is no field of a plate"):
        illumination.lights(spark, [screen[0] | {"header": json.dumps(facts)}], SETTINGS)


def test_no_row_is_no_plate(spark):
    assert illumination.lights(spark, [], SETTINGS) == ({}, {}, [])
    assert illumination.control_scales(spark, [], Intensity()) == ({}, {}, [])


CORRECTED = {"preprocess__illumination": {"least_fields": 10}, "preprocess__intensity": {"kind": "zscore", "against": "controls"}}


def volumes_of(folder, **changes):
    settings = config.parse(plate_config(folder / "archive", folder / "lake", **{"volumes__max_refused": 1.0} | changes))
    pipeline.catalog(settings)
    return settings, pipeline.volumes(settings)


def by_well(settings):
    return {json.loads(r["header"])["well"]: r for r in tables.volumes(settings.lake).rows()}


@pytest.fixture()
def project(spark, tmp_path):
    """A plate of 16 fields whose right side is half as bright."""
    for name in plate(tmp_path / "archive", 4):
        path = tmp_path / "archive" / "images" / name
        pixels = tifffile.imread(path)
        tifffile.imwrite(path, (pixels * np.linspace(1, 0.5, pixels.shape[1])).astype(np.uint8))
    return tmp_path


def test_fields_are_read_even_and_on_the_scale_of_the_controls(project):
    plain, _ = volumes_of(project)
    before = by_well(plain)
    settings, done = volumes_of(project, **CORRECTED)
    assert done["changed"] and done["volumes"] == 16
    rows = by_well(settings)
    assert all(rows[w]["uid"] != before[w]["uid"] for w in rows), "other voxels are another volume"
    controls = np.stack([dataset.read_image(rows[f"{r}01"]).array for r in "ABCD"])
    assert np.allclose(controls.mean((0, 2, 3, 4)), 0, atol=1e-3) and np.allclose(controls.std((0, 2, 3, 4)), 1, atol=1e-3)
    everything = np.stack([dataset.read_image(r).array for r in rows.values()])[:, :, :, :, 0]
    stored = np.stack([formats.read_volume(VolumeHeader.from_row(r)).array for r in rows.values()])[:, :, :, :, 0]
    left, right = stored[:, :, :12].mean((0, 2, 3)), stored[:, :, -12:].mean((0, 2, 3))
    assert (left / right > 1.4).all()
    level = everything + stored.mean() / stored.std()  # a scale moves both by as much
    left, right = level[:, :, :12].mean((0, 2, 3)), level[:, :, -12:].mean((0, 2, 3))
    assert np.allclose(left / right, 1, atol=0.15)

    patches = list(dataset.cut(rows["B02"], settings)[0])
    assert np.allclose(patches[0].image, preprocess.apply(dataset.read_image(rows["B02"]), settings.preprocess).array)
    with pytest.raises(Refused, match="light and scale of the plate were treated by no settings") as e:
        preprocess.apply(formats.read_volume(VolumeHeader.from_row(rows["B02"])), settings.preprocess)
    assert e.value.reason == "OTHER_LIGHT"
    with pytest.raises(Refused, match="wanted no settings"):
        preprocess.apply(dataset.read_image(rows["B02"]), plain.preprocess)


def test_a_plate_is_estimated_once_and_again_when_it_changes(project):
    settings, _ = volumes_of(project, **CORRECTED)
    (file,) = (project / "lake" / "corrections").iterdir()
    written, first = file.stat().st_mtime_ns, by_well(settings)
    assert volumes_of(project, **CORRECTED)[1]["changed"] == 0
    settings, done = volumes_of(project, **CORRECTED, volumes__splits={"train": 0.5, "val": 0.25, "test": 0.25})
    assert (
        done["changed"]
        and file.stat().st_mtime_ns == written
        and {r["uid"] for r in by_well(settings).values()} == {r["uid"] for r in first.values()}
    )
    for name in ("Channel1-16-D-04.tif", "Channel2-16-D-04.tif"):
        (project / "archive" / "images" / name).unlink()
    settings, _ = volumes_of(project, **CORRECTED, vacuum={"after_days": 1e-9})
    rows = by_well(settings)
    assert len(rows) == 15 and all(rows[w]["uid"] != first[w]["uid"] for w in rows)
    assert len(list((project / "lake" / "corrections").iterdir())) == 2
    assert [x.path for x in pipeline.vacuum(settings) if x.what.startswith("correction")] == [f"corrections/{file.name}"]
    assert dataset.read_image(rows["B02"]).of_plate == settings.preprocess.of_plate


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"preprocess__illumination": {"least_fields": 17}}, "FEW_FIELDS"),
        (
            {"preprocess__intensity": {"against": "controls"}, "plates__maps__controls": {"neg": "empty", "pos": "positive"}},
            "NO_CONTROLS",
        ),
    ],
)
def test_a_plate_that_cannot_be_treated_is_refused_as_a_whole(project, changes, reason):
    settings, done = volumes_of(project, **changes)
    assert done["volumes"] == 0 and not (project / "lake" / "corrections").exists()
    refused = [r for r in tables.quarantine(settings.lake).rows() if r["uri"].endswith(".tif")]
    assert [(r["reason"], r["stage"]) for r in refused] == [(reason, "volumes")] * 32
    with pytest.raises(pipeline.StageFailed, match="max_refused"):
        volumes_of(project, **changes, volumes__max_refused=0.5)


def test_a_broken_field_is_no_part_of_its_plate_and_stays_refused(project):
    path = project / "archive" / "images" / "Channel2-07-B-03.tif"
    path.write_bytes(path.read_bytes()[:-1500])
    found = []
    for splits in ({"train": 0.5, "val": 0.25, "test": 0.25}, {"train": 0.4, "val": 0.3, "test": 0.3}):
        settings, done = volumes_of(project, **CORRECTED, volumes__splits=splits)
        refused = [r for r in tables.quarantine(settings.lake).rows() if r["uri"].endswith(".tif")]
        assert done["volumes"] == 15 and {r["reason"] for r in refused} == {"BROKEN_PICTURE"} and len(refused) == 2
        found.append({w: r["uid"] for w, r in by_well(settings).items()})
        assert len(list((project / "lake" / "corrections").iterdir())) == 1
    assert found[0] == found[1] and "B03" not in found[0]
    assert dataset.read_image(by_well(settings)["B02"]).of_plate == settings.preprocess.of_plate


def test_a_correction_that_is_gone_is_estimated_again_and_another_lake_has_its_own(project, tmp_path):
    settings, _ = volumes_of(project, **CORRECTED)
    first = by_well(settings)
    (file,) = (project / "lake" / "corrections").iterdir()
    file.unlink()
    with pytest.raises(Refused, match="how the plate is treated cannot be read"):
        dataset.read_image(dict(first["B02"], header=first["B02"]["header"].replace("corrections", "corrections/.")))
    assert volumes_of(project, **CORRECTED)[1]["changed"] and file.exists()
    (project / "lake").rename(project / "moved")
    moved = config.parse(plate_config(project / "archive", project / "moved", **{"volumes__max_refused": 1.0} | CORRECTED))
    assert pipeline.volumes(moved)["changed"]
    rows = by_well(moved)
    assert rows["B02"]["uid"] == first["B02"]["uid"] and str(project / "moved") in rows["B02"]["header"]
    (project / "link").symlink_to(project / "moved")
    link = plate_config(project / "archive", project / "link", vacuum={"after_days": 1e-9}, **CORRECTED)
    assert [x for x in pipeline.vacuum(config.parse(link)) if x.what.startswith("correction")] == []


def test_functions_of_the_user_are_used_as_they_are(project):
    lights = project / "illum"
    lights.mkdir()
    for n, channel in enumerate(("DNA", "GFP"), 1):
        np.save(lights / f"plate_{channel}.npy", np.full((48, 48), float(n)))
    changes = {"preprocess__illumination": {"files": str(lights / "{plate}_{channel}.npy")}}
    settings, _ = volumes_of(project, **changes)
    row = by_well(settings)["C03"]
    stored = formats.read_volume(VolumeHeader.from_row(row)).array
    names = json.loads(row["header"])["channels"]
    factors = [1.0 if c == "DNA" else 2.0 for c in names]
    assert np.array_equal(dataset.read_image(row).array, stored / np.float32(factors)[:, None, None, None])
    np.save(lights / "plate_GFP.npy", np.full((48, 48), 4.0))
    settings, done = volumes_of(project, **changes)
    assert done["changed"] and dataset.read_image(by_well(settings)["C03"]).array[names.index("GFP")].max() == pytest.approx(
        stored[names.index("GFP")].max() / 4
    )
    np.save(lights / "plate_GFP.npy", np.full((40, 48), 1.0))
    assert volumes_of(project, **changes)[1]["volumes"] == 0
    assert {r["reason"] for r in tables.quarantine(settings.lake).rows() if r["uri"].endswith(".tif")} == {"FIELD_SHAPE"}
    (lights / "plate_GFP.npy").unlink()
    with pytest.raises(InputError, match="plate_GFP.npy cannot be read"):
        volumes_of(project, **changes)
