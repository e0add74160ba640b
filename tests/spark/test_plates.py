"""Plates in the catalog and volumes stages: fields, wells and what their map says."""

import collections
import functools
import gzip
import json
import os
import shutil

import numpy as np
import pytest
import tifffile
from archives import CELLS, plate, plate_config
from formats import test_ome, test_ome_zarr

from sparkmed import config, dataset, formats, storage, tables
from sparkmed.formats import ome_zarr
from sparkmed.formats.instance import VolumeHeader
from sparkmed.rejection import InputError, Refused
from sparkmed.spark import catalog, illumination, volumes

pytestmark = pytest.mark.engine
LINEAGE = {"config_digest": "c", "code_version": "v"}
KEY = b"k" * 16


@pytest.fixture
def archive(tmp_path):
    plate(tmp_path / "archive")
    return tmp_path / "archive"


def settings_of(tmp_path, **changes):
    return config.parse(plate_config(tmp_path / "archive", tmp_path / "lake", **changes))


def build(spark, settings, key=None):
    catalog.update(spark, settings.archive, settings.lake, settings.catalog, key, LINEAGE)
    counts = volumes.build(spark, settings, key, LINEAGE)
    return counts, {json.loads(r["header"])["well"]: r for r in tables.volumes(settings.lake).rows()}


def refused(settings):
    rows = tables.quarantine(settings.lake).rows()
    return sorted((storage.text(r["uri"].rpartition("/")[2]), r["reason"]) for r in rows)


def test_a_field_per_well_with_the_channels_in_the_order_of_the_config(spark, tmp_path, archive):
    settings = settings_of(tmp_path)
    _, rows = build(spark, settings)
    assert len(rows) == 16 and refused(settings) == [("map.csv", "UNKNOWN_FORMAT")]
    image = formats.read_volume(VolumeHeader.from_row(rows["B03"])).array
    stored = [tifffile.imread(archive / "images" / f"Channel{c}-07-B-03.tif") for c in (1, 2)]
    assert np.array_equal(image[..., 0], np.stack([s.T for s in stored]))
    turned = settings_of(tmp_path, plates__channels={"DNA": 2, "GFP": 1})
    _, others = build(spark, turned)
    assert np.array_equal(formats.read_volume(VolumeHeader.from_row(others["B03"])).array, image[::-1])
    assert others["B03"]["uid"] != rows["B03"]["uid"]


def test_a_plate_of_ome_tiff_is_the_plate_of_its_pages(spark, tmp_path, archive):
    settings = settings_of(tmp_path)
    _, plain = build(spark, settings)
    arrays = {well: formats.read_volume(VolumeHeader.from_row(row)).array for well, row in plain.items()}
    folder = archive / "images"
    wells = sorted({f.name.partition("-")[2][3:7] for f in folder.glob("Channel1-*")})
    for n, well in enumerate(wells):  # one file per field, both channels in it
        files = sorted(folder.glob(f"Channel*-{well}.tif"))
        place = test_ome.plate((ord(well[0]) - 65, int(well[2:]) - 1, ["Image:0"]), name="P1")
        text = test_ome.xml(test_ome.image(c=2), plate=place)
        with tifffile.TiffWriter(folder / f"field {n}.ome.tif") as writer:
            for c, file in enumerate(files):
                said = text if c == 0 else ""
                writer.write(tifffile.imread(file), photometric="minisblack", metadata=None, description=said.encode())
                file.unlink()
    counts, rows = build(spark, settings)
    assert counts["changed"] == 1 and counts["files"] == 32 and rows.keys() == plain.keys()
    assert all(np.array_equal(formats.read_volume(VolumeHeader.from_row(row)).array, arrays[w]) for w, row in rows.items())
    assert {w: (r["split"], r["target"]) for w, r in rows.items()} == {w: (r["split"], r["target"]) for w, r in plain.items()}
    assert build(spark, settings)[0]["changed"] == 0


def test_plates_of_ome_zarr_are_the_plates_of_their_planes(spark, tmp_path, archive, monkeypatch):
    settings = settings_of(tmp_path)
    _, plain = build(spark, settings)
    arrays = {well: formats.read_volume(VolumeHeader.from_row(row)).array for well, row in plain.items()}
    shutil.rmtree(archive / "images")
    fields = {f"{well[0]}/{int(well[1:])}": [a[:, :, :, 0].transpose(0, 2, 1)] for well, a in arrays.items()}
    monkeypatch.setattr("sparkmed.formats.archive.PART_BYTES", 16_000)  # each plate is read in several parts
    for version in test_ome_zarr.VERSIONS:
        options = {"chunks": (1, 20, 48)} | ({"shards": (2, 40, 48)} if version == "0.5" else {})
        shutil.rmtree(archive / "images.zarr", ignore_errors=True)
        test_ome_zarr.plate(archive / "images.zarr", version, fields, name="P1", **options)
        counts, rows = build(spark, settings)
        assert counts["changed"] == 1 and counts["files"] == 32 and rows.keys() == plain.keys()
        assert all(np.array_equal(formats.read_volume(VolumeHeader.from_row(row)).array, arrays[w]) for w, row in rows.items())
        assert {w: (r["split"], r["target"]) for w, r in rows.items()} == {w: (r["split"], r["target"]) for w, r in plain.items()}
        assert {json.loads(r["header"])["source"] for r in rows.values()} == {"ome-zarr"}
        assert refused(settings) == [("map.csv", "UNKNOWN_FORMAT")]
    with monkeypatch.context() as patched:
        patched.setattr("sparkmed.spark.catalog._write", None)  # nothing is read and nothing is written
        version = tables.catalog(settings.lake).committed(catalog.STAGE)
        counts = catalog.update(spark, settings.archive, settings.lake, settings.catalog, None, LINEAGE)
        assert counts == {"files": 2, "new": 0, "changed": 0, "gone": 0, "refused": 1, "instances": 32}
        assert tables.catalog(settings.lake).committed(catalog.STAGE) == version
    shards = [archive / "images.zarr" / well / "0/0/c/0/0/0" for well in ("B/2", "B/3", "C/1")]
    os.rename(shards[0], tmp_path / "x"), os.rename(shards[1], shards[0]), os.rename(tmp_path / "x", shards[1])
    shards[2].unlink()
    counts, after = build(spark, settings)
    assert counts["changed"] == 1 and rows.keys() - after.keys() == {"C01"}
    assert {w for w in after if after[w]["uid"] != rows[w]["uid"]} == {"B02", "B03"}
    found = [(r["uri"].partition("::")[0], r["reason"]) for r in tables.quarantine(settings.lake).rows() if "zarr://" in r["uri"]]
    assert sorted(found) == [(f"zarr://C/1/0/0?c={c}", "MISSING_CHUNK") for c in range(2)]


def test_a_plate_of_which_a_part_could_not_be_read_is_read_again(spark, tmp_path, archive, monkeypatch):
    """A storage that fails in one of the tasks that read a large plate must not lose its wells for good."""
    settings = settings_of(tmp_path)
    shutil.rmtree(archive / "images")
    test_ome_zarr.plate(
        archive / "images.zarr", "0.5", {f"{r}/{c}": [np.ones((2, 48, 48), np.uint8)] for r in "AB" for c in (1, 2)}
    )
    monkeypatch.setattr("sparkmed.formats.archive.PART_BYTES", 2_000)
    monkeypatch.setattr(
        catalog, "_read_all", lambda spark, files, write: [write([f]) for f in files]
    )  # here, where storage can fail
    update = functools.partial(catalog.update, spark, settings.archive, settings.lake, settings.catalog, None, LINEAGE)
    whole, first = ome_zarr.Plate._read_plate, []

    def failing(plate):
        first.append(plate)
        if len(first) == 2:
            raise Refused("UNREADABLE", "the storage does not answer")
        return whole(plate)

    with monkeypatch.context() as patched:
        patched.setattr(ome_zarr.Plate, "_read_plate", failing)
        counts = update()
    assert len(first) > 2 and counts["instances"] < 8
    assert [(r["reason"], r["file_size"]) for r in tables.quarantine(settings.lake).rows() if "zarr" in r["uri"]] == [
        ("UNREADABLE", 0)
    ]
    counts = update()
    assert (counts["changed"], counts["instances"], counts["refused"]) == (1, 8, 1), "the map is no image"
    assert update() == counts | {"changed": 0}


def test_labels_and_splits_are_those_of_the_plate_map(spark, tmp_path, archive):
    _, rows = build(spark, settings_of(tmp_path))
    found = {w: (r["split"], r["target"]) for w, r in rows.items() if r["split"]}
    split = {"A": "train", "B": "val", "C": "test", "D": "test"}
    assert found == {f"{r}0{c}": (split[r], int(c == 4)) for r in "ABCD" for c in (1, 4)}
    treatment = json.loads(rows["C02"]["header"])["treatment"]
    assert (treatment["compound"], round(treatment["concentration"], 3), treatment.get("control")) == ("two", 3.333, None)


@pytest.mark.parametrize("target, classes", [("moa", ["first", "second"]), ("compound", ["one", "reference"])])
def test_what_is_no_class_has_no_label(spark, tmp_path, archive, target, classes):
    """A compound that is trained on, and one that is kept for later; a number is a name like others, and no class by its place."""
    lines = (archive / "map.csv").read_text().replace(",two,", ",1,").splitlines()
    moas = {"one": "first", "1": "1", "reference": "second"}
    lines = [f"{line},{moas.get(line.split(',')[2], '')}" for line in lines]
    (archive / "map.csv").write_text("\n".join([f"{lines[0]}moa", *lines[1:]]))
    changes = {"plates__target": target, "classes": classes, "plates__split_by": "well"}
    with pytest.raises(InputError, match="label"):
        build(spark, settings_of(tmp_path, **changes, volumes__labels={"allow_missing": False}))
    _, rows = build(spark, settings_of(tmp_path, **changes))
    compounds = {w: json.loads(r["header"])["treatment"].get("compound") for w, r in rows.items()}
    named = {"one": 0, "reference": 1}
    assert {w: r["target"] for w, r in rows.items()} == {w: named.get(c) for w, c in compounds.items()}
    assert {c for c in compounds.values()} >= {"one", "1", "reference"}


def test_a_changed_map_makes_the_volumes_anew_and_nothing_else_does(spark, tmp_path, archive):
    settings = settings_of(tmp_path)
    build(spark, settings)
    assert build(spark, settings)[0]["changed"] == 0
    text = (archive / "map.csv").read_text().replace("two", "three")
    (archive / "map.csv").write_text(text)
    counts, rows = build(spark, settings)
    assert counts["changed"] == 1 and json.loads(rows["C02"]["header"])["treatment"]["compound"] == "three"


def test_compounds_are_pseudonyms_under_a_key_and_together_in_one_split(spark, tmp_path, archive):
    settings = settings_of(tmp_path, plates__split_by="compound", plates__splits={}, plates__target="compound",
                           classes=["one", "two", "reference"])  # fmt: skip
    catalog.update(spark, settings.archive, settings.lake, settings.catalog, KEY, LINEAGE)
    with pytest.raises(InputError, match="split .* is empty"):  # three compounds are few
        volumes.build(spark, settings, KEY, LINEAGE)
    wide = settings_of(tmp_path, plates__split_by="compound", plates__splits={"train": "?02", "val": "?03", "test": "?04"},
                       plates__target="compound", classes=["one", "two", "reference"])  # fmt: skip
    with pytest.raises(InputError, match="more than one split, such as sub-"):
        volumes.build(spark, wide, KEY, LINEAGE)


def spoil_channel(archive):
    (archive / "images" / "Channel2-06-B-02.tif").unlink()


def spoil_size(archive):
    tifffile.imwrite(archive / "images" / "Channel2-06-B-02.tif", np.zeros((8, 8), np.uint8))


def spoil_file(archive):
    path = archive / "images" / "Channel2-06-B-02.tif"
    path.write_bytes(path.read_bytes()[:40])


def spoil_copy(archive):
    data = (archive / "images" / "Channel2-07-B-03.tif").read_bytes()
    (archive / "images" / "Channel2-99-B-02.tif").write_bytes(data)


def spoil_map(archive):
    lines = (archive / "map.csv").read_text().splitlines()
    (archive / "map.csv").write_text("\n".join([*lines, "B,2,one,1,"]))


def forget_well(archive):
    lines = (archive / "map.csv").read_text().splitlines()
    (archive / "map.csv").write_text("\n".join(x for x in lines if not x.startswith("B,2,")))


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (spoil_channel, "MISSING_CHANNEL"), (spoil_size, "FIELD_SIZE"), (spoil_file, "MISSING_CHANNEL"),
        (spoil_copy, "DUPLICATE_PLANE"), (spoil_map, "TWO_ENTRIES"), (forget_well, "NO_ENTRY"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_one_well_keeps_no_other_out(spark, tmp_path, archive, spoil, reason):
    spoil(archive)
    settings = settings_of(tmp_path)
    _, rows = build(spark, settings)
    assert set(rows) == {f"{r}0{c}" for r in "ABCD" for c in (1, 2, 3, 4)} - {"B02"}
    kinds = collections.Counter(r for name, r in refused(settings) if "B-02" in name)
    assert kinds[reason] and sum(kinds.values()) == len(list((archive / "images").glob("*B-02*")))


def test_a_channel_that_no_file_has_is_said(spark, tmp_path, archive):
    with pytest.raises(InputError, match=r"no image of the archive is of plates.channels \{'GFP': '5'\}, 32 are of other channels"):
        build(spark, settings_of(tmp_path, plates__channels={"GFP": 5}, plates__nuclei=None))


def test_a_table_of_cells_becomes_a_part_of_its_fields(spark, tmp_path, archive, caplog):
    lines = [f"plate,{row}{column},1,{20 + n},30" for row in "ABCD" for column in (1, 2, 3, 4) for n in (1, 2)]
    table = archive / "cells.csv"
    table.write_text("\n".join(["Metadata_Plate,Metadata_Well,Metadata_Site,X,Y", *lines[:-2], "plate,H12,1,1,1"]))
    settings = settings_of(tmp_path, **CELLS, patches__crops={"size": 12, "table": "cells.csv"})
    _, rows = build(spark, settings)
    assert "has none of 1 of 16 fields, and 1 rows of no field" in caplog.text
    assert dataset.read_centres(rows["B03"]).to_dict("list") == {"cell": ["1", "2"], "x": [21.0, 22.0], "y": [30.0, 30.0]}
    assert build(spark, settings)[0]["changed"] == 0
    table.write_text(table.read_text().replace("plate,B3,1,22,30", "plate,B3,1,23,30"))
    counts, again = build(spark, settings)
    assert counts["changed"] == 1 and [w for w in rows if rows[w]["uid"] != again[w]["uid"]] == ["B03"]
    assert illumination.there(again.values())
    storage.remove(json.loads(again["A01"]["header"])["centres"]["file"])
    assert not illumination.there(again.values()), "the volumes stage has to make it again"
    _, plain = build(spark, settings_of(tmp_path, **CELLS))
    assert plain["B03"]["uid"] not in (rows["B03"]["uid"], again["B03"]["uid"]) and "centres" not in plain["B03"]["header"]


def test_what_the_maps_lack_is_said_at_the_door(spark, tmp_path, archive):
    with pytest.raises(InputError, match=r"has no column 'Dosis' for concentration; did you mean 'Dose'"):
        build(spark, settings_of(tmp_path, plates__maps__columns={"row": "Row", "column": "Col", "concentration": "Dosis"}))
    with pytest.raises(InputError, match=r"plates.maps.tables maps/\*.csv: no such file"):
        build(spark, settings_of(tmp_path, plates__maps__tables="maps/*.csv"))
    with pytest.raises(InputError, match="missing.csv cannot be read"):
        build(spark, settings_of(tmp_path, plates__maps__barcodes="missing.csv"))


def test_an_index_gives_what_names_do_not_and_is_no_quarantine(spark, tmp_path, archive):
    rows = ["Metadata_Plate,Metadata_Well,Metadata_Site,FileName_OrigGFP,FileName_OrigDNA"]
    for n, well in enumerate(f"{r}0{c}" for r in "ABCD" for c in (1, 2, 3, 4)):
        names = [f"Channel{c}-{n + 1:02d}-{well[0]}-{well[1:]}.tif" for c in (1, 2)]
        rows.append(",".join(["P7", well, "1", *names]))
    (archive / "images" / "load_data.csv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    settings = settings_of(tmp_path, plates__channels={"GFP": "GFP", "DNA": "DNA"})
    _, found = build(spark, settings)
    facts = json.loads(found["C03"]["header"])
    assert (facts["plate"], facts["site"], facts["channels"]) == ("P7", 1, ["GFP", "DNA"])
    assert refused(settings) == [("map.csv", "UNKNOWN_FORMAT")]
    (archive / "images" / "load_data.csv.gz").write_bytes(gzip.compress("\n".join(rows).encode())[:-20])
    _, found = build(spark, settings_of(tmp_path))
    assert len(found) == 16 and ("load_data.csv.gz", "BROKEN_INDEX") in refused(settings)
