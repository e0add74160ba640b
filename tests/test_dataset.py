import hashlib
import io
import json
import math

import hypothesis
import hypothesis.strategies as st
import nibabel as nib
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tifffile
from archives import CELLS, ct_config, ct_pairs, plate, plate_config, plate_rows

from sparkmed import config, dataset, formats, storage
from sparkmed.formats import archive, series
from sparkmed.formats.instance import VolumeHeader
from sparkmed.hcs import crops, nuclei
from sparkmed.imaging import geometry, patches, preprocess
from sparkmed.rejection import InputError, Rejection


def headers(folder, limits=config.Catalog()):  # noqa: B008
    """Volume headers of a folder by the code that the stages run."""
    members = [m for f in storage.walk(str(folder)) for m in archive.members(f, limits)]
    found, refused = series.assemble([formats.read_instance(m) for m in members if not isinstance(m, Rejection)])
    assert not refused
    return {h.source_paths[0]: h for h in found}


def volume_row(image, label, split="train", subject="s"):
    facts = {"subject": subject, "split": split, "target": None, "label": json.dumps(label.row()), "label_uid": label.uid}
    return image.row() | facts


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    found = headers(ct_pairs(tmp_path_factory.mktemp("pairs"), 6))
    splits = ["train"] * 4 + ["val", "test"]
    return [volume_row(found[f"img/s{i:02d}.nii.gz"], found[f"lab/s{i:02d}.nii.gz"], s, f"s{i}") for i, s in enumerate(splits)]


def settings(tmp_path, **patches):
    plain = ct_config(tmp_path, tmp_path / "lake")
    return config.parse(plain | {"patches": plain["patches"] | patches})


def made(rows, s, folder, groups=1, channels=1):
    """Spills, plans and files in the order of their paths, of ``groups`` groups of volumes."""
    volumes = dataset.numbered(rows)
    group = dataset.groups(rows, s)
    facts = [(r["uid"], r["subject"], r["target"], group[r["uid"]]) for _, r in volumes]
    (folder / "spilled").mkdir(parents=True)
    spills = [dataset.spill(volumes[i::groups], s, channels, str(folder / "spilled" / str(i))) for i in range(groups)]
    plans = dataset.plan(spills, s, channels)
    for p in plans[::-1]:
        dataset.write(p, facts, s, channels, str(folder))
    return spills, plans, {p.path: (folder / p.path).read_bytes() for p in plans}


def table(data):
    return pq.read_table(io.BytesIO(data)).to_pylist()


def key(seed, row):
    return hashlib.sha256(f"{seed}/{row['patch_id']}".encode()).hexdigest()


def test_the_version_does_not_depend_on_the_order_of_the_table(rows, tmp_path):
    s = settings(tmp_path)
    assert dataset.version(rows, s) == dataset.version(rows[::-1], s)
    assert dataset.version(rows, s) != dataset.version(rows[1:], s)


@pytest.mark.parametrize("file_mb", [0.03, 0.2, 100])
def test_the_bytes_do_not_depend_on_who_cuts_which_volumes(rows, tmp_path, file_mb):
    s = settings(tmp_path, file_mb=file_mb, row_groups=3)
    found = []
    for groups, given in [(1, rows), (2, rows[::-1]), (7, rows[3:] + rows[:3])]:
        _, plans, files = made(given, s, tmp_path / str(groups), groups)
        found.append((files, dataset.description(s, given, [], plans, {})))
    assert found[0] == found[1] == found[2]
    if file_mb == 0.03:
        assert len(found[0][0]) > 6


def test_groups_weigh_the_same_in_all_and_a_patch_one_on_average():
    s = config.parse(plate_config("a", "l", patches={"balance": ["class", "plate"]}))
    rows = []
    of = [(0, "P1", "train")] * 6 + [(1, "P1", "train")] * 2 + [(1, None, "train"), (0, "P2", "val")]
    shared = {"label_uid": None, "subject": "s", "shape": [2, 48, 48, 1], "affine": np.eye(4).ravel().tolist()}
    for n, (target, name, split) in enumerate(of):
        header = json.dumps({"plate": name} if name else {})
        rows.append({"uid": f"u{n}", "target": target, "split": split, "header": header, **shared})
    found = dataset.groups(rows, s)
    assert found == dataset.groups(rows[::-1], s) and len(set(found.values())) == 4
    weights = dataset.group_weights(rows, {f"u{n}": 1 for n in range(1, 10)}, s)
    counted = [r["uid"] for r in rows[1:9]]
    assert np.mean([weights[found[uid]] for uid in counted]) == pytest.approx(1)
    sums = {g: sum(weights[found[uid]] for uid in counted if found[uid] == g) for g in {found[uid] for uid in counted}}
    assert len(sums) == 3 and list(sums.values()) == pytest.approx([8 / 3] * 3)
    assert weights[found["u9"]] == 0, "nothing of it is trained on"
    other = [r | {"header": r["header"].replace("P1", "P0")} if r["uid"] == "u3" else r for r in rows]
    assert dataset.version(rows, s) != dataset.version(other, s)
    assert [f.name for f in dataset.fields(s, 2)][-1] == "group" and dataset.version(rows, s) != dataset.version(
        rows, s.model_copy(update={"patches": s.patches.model_copy(update={"balance": ()})})
    )


@pytest.mark.parametrize("balance,said", [(["class"], "task classification"), (["plate"], "section plates")])
def test_groups_that_a_config_has_not_are_refused(tmp_path, balance, said):
    with pytest.raises(InputError, match=said):
        settings(tmp_path, balance=balance)


def test_rows_of_a_split_stand_in_the_order_of_a_hash(rows, tmp_path):
    s = settings(tmp_path, file_mb=0.1, row_groups=2)
    _, _, files = made(rows, s, tmp_path / "d", 2)
    for split in ("train", "val", "test"):
        order = [key(s.seed, r) for path in sorted(files) if f"split={split}" in path for r in table(files[path])]
        assert len(order) >= 4 and order == sorted(set(order))
    first = table(files["split=train/part-00000.parquet"])
    assert len({r["volume"] for r in first}) > 1, "a file is a draw of all volumes"


def test_the_seed_is_another_order(rows, tmp_path):
    s = settings(tmp_path)
    other = s.model_copy(update={"seed": 1})
    assert made(rows, s, tmp_path / "a")[2] != made(rows, other, tmp_path / "b")[2]
    assert dataset.version(rows, s) != dataset.version(rows, other)


def test_there_are_row_groups_for_every_rank(rows, tmp_path):
    for wanted in (1, 3, 5, 16, 1000):
        _, plans, files = made(rows, settings(tmp_path, row_groups=wanted), tmp_path / str(wanted))
        for split, count in {"train": 16, "val": 4, "test": 4}.items():
            groups = [pq.ParquetFile(io.BytesIO(files[p.path])).metadata for p in plans if p.split == split]
            assert sum(g.num_rows for g in groups) == count
            assert sum(g.num_row_groups for g in groups) >= min(wanted, count)


def test_row_groups_and_files_have_the_size_in_bytes(rows, tmp_path):
    patch = 16**3 * 5 / 1e6
    s = settings(tmp_path, row_groups=1, row_group_mb=3.5 * patch, file_mb=7.5 * patch)
    _, plans, files = made(rows, s, tmp_path / "d")
    assert [p.rows for p in plans if p.split == "train"] == [5, 5, 6]
    for data in files.values():
        meta = pq.ParquetFile(io.BytesIO(data)).metadata
        assert max(meta.row_group(g).num_rows for g in range(meta.num_row_groups)) == 3


def test_a_row_is_a_patch_of_its_volume(rows, tmp_path):
    s = settings(tmp_path, row_groups=2)
    _, _, files = made(rows, s, tmp_path / "d", 3)
    found = {r["patch_id"]: r for data in files.values() for r in table(data)}
    assert len(found) == 24
    for row in rows:
        image = formats.read_volume(VolumeHeader.from_row(row))
        image, label = preprocess.apply(image, s.preprocess, dataset.read_label(row, image))
        if row["split"] == "train":
            places, _ = patches.sample(image.spatial_shape, s.patches, f"{s.seed}/{row['uid']}", label.array[0], len(s.classes))
        else:
            places = patches.grid(image.spatial_shape, s.patches.size)
        for n, place in enumerate(places):
            written = found[f"{row['uid']}-{n:05d}"]
            assert (written["subject"], written["volume"]) == (row["subject"], row["uid"])
            assert written["image"] == npy(patches.extract(image.array, place))
            assert written["label"] == npy(patches.extract(label.array[0], place))


def guided(s, output="labels", digest="a" * 64):
    cascade = config.Cascade(model="models:/whole/1", output=output, digest=digest, classes=("body", "bone"))
    return s.model_copy(update={"preprocess": s.preprocess.model_copy(update={"cascade": cascade})})


def first_model(output):
    """Thresholds, on the image's own grid."""

    def say(image):
        soft = np.clip((image.array + 200) / 500, 0, 1).astype(np.float32)
        labels = (image.array > 0).astype(np.uint8) + (image.array > 100).astype(np.uint8)
        return image.with_array(labels if output == "labels" else np.concatenate([soft, soft**2]))

    return say


@pytest.mark.parametrize("output", ["labels", "probabilities"])
@pytest.mark.parametrize("size", [[16, 16, 16], [32, 16, 16]])
def test_the_channels_of_a_first_model_follow_those_of_the_image(rows, tmp_path, output, size):
    plain = settings(tmp_path, size=size, row_groups=1)
    plain = plain.model_copy(update={"preprocess": plain.preprocess.model_copy(update={"spacing": (3.0, 4.0, 5.0)})})
    s, first = guided(plain, output), first_model(output)
    assert dataset.channels(rows, s) == 3
    for row in (rows[0], rows[4]):
        volume = formats.read_volume(VolumeHeader.from_row(row))
        image, label = preprocess.apply(volume, s.preprocess, dataset.read_label(row, volume), first=first(volume))
        assert image.array.shape[0] == 3 and np.array_equal(image.array[:1], preprocess.apply(volume, plain.preprocess).array)
        assert (set(np.unique(image.array[1:])) == {0, 1}) == (output == "labels")
        with_first, alone = list(dataset.cut(row, s, first)[0]), list(dataset.cut(row, plain)[0])
        places = patches.grid(image.spatial_shape, s.patches.size)
        for n, (found, without) in enumerate(zip(with_first, alone, strict=True)):
            assert np.array_equal(found.image[:1], without.image) and np.array_equal(found.label, without.label)
            assert found.image.shape == (3, *size) and found.image.dtype == np.float32
            if row["split"] != "train":
                assert np.array_equal(found.image, patches.extract(image.array, places[n]))
    (tmp_path / "s").mkdir()
    spills = [dataset.spill(dataset.numbered(rows), s, 3, str(tmp_path / "s" / "0"), first)]
    plans = dataset.plan(spills, s, 3)
    facts = [(r["uid"], r["subject"], r["target"], 0) for _, r in dataset.numbered(rows)]
    dataset.write(plans[0], facts, s, 3, str(tmp_path / "d"))
    (written, *_) = table((tmp_path / "d" / plans[0].path).read_bytes())
    assert np.load(io.BytesIO(written["image"])).shape == (3, *size)
    assert dataset.description(s, rows, spills, plans, {})["cascade"]["digest"] == "a" * 64


def test_the_version_depends_on_the_digest_of_the_first_model(rows, tmp_path):
    s = settings(tmp_path)
    versions = {dataset.version(rows, x) for x in (s, guided(s), guided(s, digest="b" * 64), guided(s, "probabilities"))}
    assert len(versions) == 4
    with pytest.raises(ValueError, match="the first model is not pinned"):
        dataset.version(rows, guided(s, digest=""))


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """Folder of a plate of 12 fields, and their rows."""
    folder = tmp_path_factory.mktemp("screen")
    plate(folder, 3, size=64)
    rows = plate_rows(folder / "images", cells_of().plates)
    assert len(rows) == 12
    return folder / "images", rows


def cells_of(**patches):
    """A config whose patches are cells."""
    return config.parse(plate_config("a", "l", **CELLS | {"patches": CELLS["patches"] | patches}))


def cells_in(files):
    """Rows by volume and cell, images as arrays."""
    rows = [r for data in files.values() for r in table(data)]
    return {(r["volume"], r["cell"]): r | {"image": np.load(io.BytesIO(r["image"]))} for r in rows}


def pixels(folder, row):
    """(C, I, J) of a field, by a peer."""
    return np.stack([tifffile.imread(folder / path).T for path in row["source_paths"]])


@pytest.mark.parametrize("border", ["excluded", "padded"])
def test_patches_of_cells_are_what_lies_around_their_centres(screen, tmp_path, border):
    folder, rows = screen
    s = cells_of(crops={"size": 13, "border": border})
    spills, plans, files = made(rows, s, tmp_path / "d", 2, channels=2)
    written, there = cells_in(files), set()
    for row in rows:
        array = pixels(folder, row)
        values = np.stack([(c - c.mean()) / c.std() for c in array.astype(np.float64)])
        wide = np.pad(values, ((0, 0), (6, 6), (6, 6)))
        for nucleus in nuclei.find(array[1], s.plates.nuclei).cells.itertuples():
            i, j = math.floor(nucleus.x + 0.5), math.floor(nucleus.y + 0.5)
            if border == "excluded" and not (6 <= i < 58 and 6 <= j < 58):
                continue
            found = written[row["uid"], str(nucleus.cell)]
            assert (found["x"], found["y"]) == (nucleus.x, nucleus.y) and found["target"] == row["target"]
            np.testing.assert_allclose(found["image"][..., 0], wide[:, i : i + 13, j : j + 13], atol=1e-4)
            there.add((row["uid"], str(nucleus.cell)))
    assert set(written) == there and len(there) > 24
    said = dataset.description(s, rows, spills, plans, {})
    assert sum(said["counts"].values()) == len(there) and said["cells"]["nuclei"]["channel"] == "DNA"
    assert [f["name"] for f in said["fields"]][-3:] == ["cell", "x", "y"]


def test_the_bytes_of_cells_do_not_depend_on_who_cuts_which_fields(screen, tmp_path):
    s = cells_of(file_mb=0.006, per_volume=3)
    _, rows = screen
    found = []
    for groups, given in [(1, rows), (2, rows[::-1]), (7, rows[5:] + rows[:5])]:
        spills, plans, files = made(given, s, tmp_path / str(groups), groups, 2)
        found.append((files, dataset.description(s, given, spills, plans, {})))
    assert found[0] == found[1] == found[2] and len(found[0][0]) > 3


def test_cells_are_drawn_by_lot_and_keep_their_names(screen, tmp_path):
    _, rows = screen
    whole = cells_in(made(rows, cells_of(), tmp_path / "all", channels=2)[2])
    two = cells_in(made(rows, cells_of(per_volume=2), tmp_path / "two", channels=2)[2])
    three = cells_in(made(rows, cells_of(per_volume=3), tmp_path / "three", channels=2)[2])
    assert set(two) < set(three) <= set(whole)
    assert all(r["patch_id"] == whole[k]["patch_id"] and np.array_equal(r["image"], whole[k]["image"]) for k, r in two.items())
    for row in rows:
        assert sum(k[0] == row["uid"] for k in two) == min(2, sum(k[0] == row["uid"] for k in whole))
    other = cells_of(per_volume=2).model_copy(update={"seed": 1})
    assert set(cells_in(made(rows, other, tmp_path / "other", channels=2)[2])) != set(two)


def test_groups_weigh_by_the_cells_that_were_cut(screen, tmp_path):
    _, rows = screen
    s = cells_of(balance=["class"])
    spills, plans, files = made(rows, s, tmp_path / "d", 3, 2)
    split = {r["uid"]: r["split"] for r in rows}
    trained = [r for r in cells_in(files).values() if split[r["volume"]] == "train"]
    weights = dataset.description(s, rows, spills, plans, {})["group_weights"]
    sums = [sum(weights[r["group"]] for r in trained if r["target"] == t) for t in (0, 1)]
    assert sums == pytest.approx([len(trained) / 2] * 2) and weights[0] < weights[1]


def test_a_field_without_a_cell_is_refused_by_name_and_the_others_stay(screen, tmp_path):
    _, rows = screen
    (tmp_path / "blank").mkdir()
    for channel in (1, 2):
        tifffile.imwrite(tmp_path / "blank" / f"Channel{channel}-96-H-12.tif", np.full((64, 64), 20, np.uint8))
    (blank,) = plate_rows(tmp_path / "blank", cells_of().plates)
    every = [*rows, blank]
    spills, plans, files = made(every, cells_of(), tmp_path / "d", 2, 2)
    said = dataset.description(cells_of(), every, spills, plans, {})
    assert said["refused"] == {blank["uid"]: ["NO_CELLS", "0 cells are there"]}
    assert cells_in(files).keys() == cells_in(made(rows, cells_of(), tmp_path / "alone", 1, 2)[2]).keys()


def listed(rows, centres, folder):
    """Rows of the fields that a table is joined with."""
    joined, _ = crops.joined([VolumeHeader.from_row(r) for r in rows], crops.checked(pd.DataFrame(centres)), str(folder))
    return [r | h.row() for r, h in zip(rows, joined, strict=True)]


def test_a_table_of_what_the_finder_finds_gives_the_same_crops(screen, tmp_path):
    folder, rows = screen
    s, by_table = cells_of(), cells_of(crops={"size": 12, "table": "cells.csv"})
    centres = [
        {"image": row["source_paths"][0], "cell": n.cell, "x": n.x, "y": n.y}
        for row in rows
        for n in nuclei.find(pixels(folder, row)[1], s.plates.nuclei).cells.itertuples()
    ]
    found = cells_in(made(rows, s, tmp_path / "found", channels=2)[2])
    given = listed(rows, centres, tmp_path / "centres")
    again = cells_in(made(given, by_table, tmp_path / "table", 2, 2)[2])
    uid = {r["uid"]: before["uid"] for r, before in zip(given, rows, strict=True)}
    assert {(uid[volume], cell) for volume, cell in again} == set(found)
    for (volume, cell), r in again.items():
        same = found[uid[volume], cell]
        assert (r["x"], r["y"]) == (same["x"], same["y"]) and np.array_equal(r["image"], same["image"])
    assert dataset.patch_count(given[0], by_table) == sum(c["image"] == rows[0]["source_paths"][0] for c in centres)


def test_a_table_with_a_centre_outside_or_without_a_field_loses_that_field_alone(screen, tmp_path):
    _, rows = screen
    s = cells_of(crops={"size": 12, "table": "cells.csv"})
    centres = [{"image": r["source_paths"][0], "x": 30, "y": 20.4} for r in rows]
    whole = listed(rows, centres, tmp_path / "centres")
    centres[2]["x"] = 64
    spoilt = listed(rows, centres[:-1], tmp_path / "centres")
    assert dataset.version(whole, s) != dataset.version(spoilt, s) == dataset.version(spoilt[::-1], s)
    assert [a["uid"] == b["uid"] for a, b in zip(whole, spoilt, strict=True)] == [n not in (2, 11) for n in range(12)]
    spills, plans, files = made(spoilt, s, tmp_path / "d", 2, 2)
    said = dataset.description(s, spoilt, spills, plans, {})
    assert said["refused"] == {
        spoilt[2]["uid"]: ["CENTRE_OUTSIDE", "cell 1 lies at (64, 20.4), the field is of 64 x 64 pixels"],
        spoilt[11]["uid"]: ["NO_CENTRES", "the table of cells has no row of the field"],
    }
    assert sum(said["counts"].values()) == 10 == len(cells_in(files))
    assert dataset.spill([(0, rows[0])], s, 2, str(tmp_path / "x")).refused[rows[0]["uid"]].reason == "NO_CENTRES"


def test_the_version_of_cells_depends_on_how_they_are_found(screen):
    _, rows = screen
    finders = [{}, {"plates__nuclei": {"channel": "GFP"}}, {"plates__nuclei": {"channel": "DNA", "diameter": 9}}]
    many = [config.parse(plate_config("a", "l", **CELLS | f)) for f in finders]
    many += [cells_of(per_volume=5), cells_of(crops={"size": 14}), cells_of(crops={"size": 12, "border": "padded"})]
    assert len({dataset.version(rows, s) for s in many}) == len(many)


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_a_volume_smaller_than_a_patch_is_padded_with_0_after_scaling(rows, tmp_path):
    s = settings(tmp_path, size=[32, 16, 16], row_groups=1)
    found, _ = dataset.cut(rows[0], s)
    for patch in found:
        assert patch.image.dtype == np.float32 and patch.image.shape == (1, 32, 16, 16)
        assert not patch.image[:, :4].any() and not patch.image[:, -4:].any() and patch.image[:, 4:-4].any()


def test_a_volume_that_cannot_be_read_loses_only_its_own_patches(rows, tmp_path):
    s = settings(tmp_path, row_groups=4, file_mb=0.1)
    whole = {r["patch_id"]: r for data in made(rows, s, tmp_path / "whole")[2].values() for r in table(data)}
    broken = rows[0] | {"sources": [rows[0]["sources"][0].replace("s00", "gone")]}
    spills, plans, files = made([broken, *rows[1:]], s, tmp_path / "broken", 2)
    left = {r["patch_id"]: r for data in files.values() for r in table(data)}
    assert left == {i: r for i, r in whole.items() if r["volume"] != broken["uid"]}
    said = dataset.description(s, rows, spills, plans, {})
    assert said["refused"] == {broken["uid"]: ["UNREADABLE", "the file cannot be read: FileNotFoundError"]}
    assert said["counts"] == {"train": 12, "val": 4, "test": 4} and sum(said["files"].values()) == 20
    groups = [pq.ParquetFile(io.BytesIO(d)).num_row_groups for p, d in files.items() if "train" in p]
    assert sum(groups) >= 4


def test_a_shortfall_is_said(rows, tmp_path):
    s = settings(tmp_path, sampler="balanced", class_weights=[1, 0, 0], per_volume=4).model_copy(
        update={"classes": ("background", "liver", "kidneys", "spleen")}
    )
    s = s.model_copy(update={"patches": s.patches.model_copy(update={"class_weights": (1, 0, 0, 1)})})
    spills, plans, _ = made(rows, s, tmp_path / "d", 3)
    assert dataset.description(s, rows, spills, plans, {})["shortfall"] == {"spleen": 8}


def test_the_files_on_a_remote_store_are_the_same(rows, tmp_path):
    s = settings(tmp_path, row_groups=4, file_mb=0.1)
    local = made(rows, s, tmp_path / "d")[2]
    volumes = dataset.numbered(rows)
    facts = [(r["uid"], r["subject"], r["target"], 0) for _, r in volumes]
    spills = [dataset.spill(volumes[i::2], s, 1, f"memory://writer/spilled/{i}") for i in range(2)]
    for p in dataset.plan(spills, s, 1):
        dataset.write(p, facts, s, 1, "memory://writer")
        assert storage.read_bytes(f"memory://writer/{p.path}") == local.pop(p.path)
    assert not local


def test_a_spill_that_lost_its_end_is_an_error(rows, tmp_path):
    s = settings(tmp_path)
    volumes = dataset.numbered(rows)
    spilled = tmp_path / "spilled"
    plans = dataset.plan([dataset.spill(volumes, s, 1, str(spilled))], s, 1)
    with open(spilled, "r+b") as f:
        f.truncate(spilled.stat().st_size - 1)
    with pytest.raises(EOFError, match="wanted"):
        for p in plans:
            dataset.write(p, [(r["uid"], r["subject"], None, 0) for _, r in volumes], s, 1, str(tmp_path / "d"))
    assert not [f for f in (tmp_path / "d").rglob("*partial")]


def runs(draw):
    """Spills of made-up keys, dealt out at random; a split has few patches or many."""
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    counts = {"train": draw(st.integers(1, 300)), "val": draw(st.integers(0, 7))}
    few_keys = draw(st.booleans())
    found = []
    for split, n in counts.items():
        keys = rng.integers(0, 5 if few_keys else 2**64, n, dtype=np.uint64)
        for i, part in enumerate(np.split(keys, np.sort(rng.integers(0, n + 1, draw(st.integers(0, 6)))))):
            if len(part):
                found.append(dataset.Run(f"memory://{split}{i}", 1000 * i, split, np.sort(part)))
    rng.shuffle(found)
    return counts, [dataset.Spill((run,), {}, {}) for run in found]


@hypothesis.given(st.data(), st.floats(0.02, 5), st.floats(0.02, 5), st.integers(1, 40))
@hypothesis.settings(deadline=None, max_examples=100)
def test_every_patch_goes_to_one_file_and_files_are_consecutive(data, file_mb, row_group_mb, row_groups):
    counts, spills = data.draw(st.composite(runs)())
    cutting = {"size": [16, 16, 16], "file_mb": file_mb, "row_group_mb": row_group_mb, "row_groups": row_groups}
    s = config.parse(ct_config("a", "b") | {"patches": cutting})
    by_url = {run.url: run for spill in spills for run in spill.runs}
    plans = dataset.plan(spills, s, 1)
    record = 16**3 * 5 + 128 + 128
    for split, count in counts.items():
        taken, highest = {url: 0 for url, run in by_url.items() if run.split == split}, 0
        of_split = [p for p in plans if p.split == split]
        assert sum(p.rows for p in of_split) == count
        for p in of_split:
            keys = []
            for url, index, first, rows in p.stretches:
                run = by_url[url]
                assert index == run.start + 16 * taken[url] and first == run.start + 16 * len(run.keys) + record * taken[url]
                keys += run.keys[taken[url] : taken[url] + rows].tolist()
                taken[url] += rows
            assert min(keys) >= highest
            highest = max(keys)
        assert taken == {url: len(by_url[url].keys) for url in taken}
        if len({k for url in taken for k in by_url[url].keys.tolist()}) == count:
            assert max((p.rows for p in of_split), default=0) - min((p.rows for p in of_split), default=0) <= 1
            assert sum(-(-p.rows // p.rows_per_group) for p in of_split) >= min(count, row_groups)


def test_an_unfinished_dataset_is_refused(tmp_path):
    with pytest.raises(InputError, match="no finished patch dataset"):
        dataset.describe(str(tmp_path))


def test_image_and_label_of_a_ct_series_agree(shared_data, tmp_path):
    """A patch of the DICOM series and of its NIfTI label show the same place: every voxel is found again in both files."""
    source = shared_data / "dicom" / "totalseg"
    series_files = headers(source / "example_ct_dicom")
    label_files = headers(source / "example_seg_dicom.nii.gz")
    row = volume_row(*series_files.values(), *label_files.values())
    truth = nib.load(source / "example_seg_dicom.nii.gz")
    classes = [f"c{i}" for i in range(int(np.asarray(truth.dataobj).max()) + 1)]
    plain = ct_config(source, tmp_path / "lake", classes=classes)
    cutting = {"size": [64, 64, 16], "sampler": "foreground"}
    s = config.parse(plain | {"preprocess": {"orientation": "RAS", "intensity": {"kind": "none"}}, "patches": cutting})
    found, _ = dataset.cut(row, s)
    found = list(found)
    image = formats.read_volume(next(iter(series_files.values())))
    ras = geometry.reorient(image, "RAS")
    canonical = nib.as_closest_canonical(truth)
    np.testing.assert_allclose(ras.affine, canonical.affine, atol=1e-3)
    labels = np.asarray(canonical.dataobj)
    assert len(found) == 8
    assert sum((p.label > 0).any() for p in found) >= 5  # two thirds are centred on an organ
    for patch in found:
        places = _found(ras.array[0], patch.image[0])
        assert len(places) == 1
        i, j, k = places[0]
        np.testing.assert_array_equal(patch.label, labels[i : i + 64, j : j + 64, k : k + 16])


def _found(array, patch):
    """Where ``patch`` lies in ``array``: candidates by its first voxels, then all of it."""
    first = np.lib.stride_tricks.sliding_window_view(array[: array.shape[0] - 63, : array.shape[1] - 63], 16, axis=2)
    candidates = np.argwhere((first == patch[0, 0, :16]).all(-1))
    return [tuple(c) for c in candidates if (array[c[0] : c[0] + 64, c[1] : c[1] + 64, c[2] : c[2] + 16] == patch).all()]
