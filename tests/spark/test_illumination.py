"""Light and scale of plates by real Spark are those of one process, bit by bit."""

import dataclasses
import json

import numpy as np
import pytest
import tifffile

from sparkmed import formats
from sparkmed.config import Illumination, Intensity
from sparkmed.formats.instance import VolumeHeader
from sparkmed.hcs import illumination as core
from sparkmed.hcs.illumination import FieldSum
from sparkmed.hcs.plate_intensity import Histogram
from sparkmed.rejection import InputError
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
    for (plate, _), light in found.items():
        total = FieldSum()
        for field in fields(screen, plate):
            total = total.merge(FieldSum.of(field[0, ..., 0]))
        expected = total.compute(SETTINGS)
        assert light.fields == expected.fields == {"P1": 12, "P2": 5}[plate]
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
    out = frozenset((r["uid"], "DNA") for r in screen[12:15])
    found, undefined, refused = illumination.lights(spark, screen, SETTINGS, out)
    assert list(found) == [("P1", "DNA")] and not refused
    assert undefined["P2", "DNA"].reason == "FEW_FIELDS" and "2 fields" in undefined["P2", "DNA"].message
    everything = frozenset((r["uid"], "DNA") for r in screen)
    found, undefined, _ = illumination.lights(spark, screen, SETTINGS, everything)
    assert not found and len(undefined) == 2


@pytest.mark.parametrize(
    "facts", [{}, {"plate": "P1"}, {"plate": "P1", "channels": ["DNA", "GFP"]}, {"plate": "", "channels": ["DNA"]}]
)
def test_rows_that_are_no_fields_are_said(spark, screen, facts):
    with pytest.raises(InputError, match="is no field of a plate"):
        illumination.lights(spark, [screen[0] | {"header": json.dumps(facts)}], SETTINGS)


def test_no_row_is_no_plate(spark):
    assert illumination.lights(spark, [], SETTINGS) == ({}, {}, [])
    assert illumination.control_scales(spark, [], Intensity()) == ({}, {}, [])
