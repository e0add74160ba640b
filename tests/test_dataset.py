import io
import json

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from archives import ct_config, ct_pairs

from sparkmed import config, dataset, formats, storage
from sparkmed.formats import archive, series
from sparkmed.imaging import geometry
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


def decoded(payload):
    return np.load(io.BytesIO(payload), allow_pickle=False)


def test_the_plan_takes_every_volume_once_and_keeps_splits_apart(rows, tmp_path):
    for file_mb in (0.01, 0.2, 100):
        plan = dataset.plan(rows, settings(tmp_path, file_mb=file_mb))
        assert sorted(v["uid"] for p in plan for v in p.volumes) == sorted(r["uid"] for r in rows)
        assert all({v["split"] for v in p.volumes} == {p.split} for p in plan)
        assert len({p.path for p in plan}) == len(plan)


def test_the_plan_does_not_depend_on_the_order_of_the_table(rows, tmp_path):
    s = settings(tmp_path, file_mb=0.05)
    assert dataset.plan(rows, s) == dataset.plan(rows[::-1], s)
    assert dataset.version(rows, s) == dataset.version(rows[::-1], s)
    assert dataset.version(rows, s) != dataset.version(rows[1:], s)


def test_there_are_row_groups_for_every_rank(rows, tmp_path):
    s = settings(tmp_path, row_groups=3)
    groups = {"train": 0, "val": 0, "test": 0}
    for p in dataset.plan(rows, s):
        dataset.write(p, s, 1, str(tmp_path / "d"))
        groups[p.split] += pq.ParquetFile(tmp_path / "d" / p.path).num_row_groups
    assert all(n >= 3 for n in groups.values()), groups


def test_a_file_holds_what_was_planned(rows, tmp_path):
    s = settings(tmp_path, row_groups=2)
    (plan,) = [p for p in dataset.plan(rows, s) if p.split == "train"]
    written = dataset.write(plan, s, 1, str(tmp_path / "d"))
    table = pq.read_table(tmp_path / "d" / plan.path, partitioning=None).to_pylist()
    assert written.rows == len(table) == 16
    assert len({r["patch_id"] for r in table}) == 16
    assert all(decoded(r["image"]).shape == (1, 16, 16, 16) and decoded(r["label"]).dtype == np.uint8 for r in table)
    volumes = [r["volume"] for r in table]
    assert volumes != sorted(volumes), "rows of different volumes are mixed"


def test_a_volume_that_cannot_be_read_is_refused_and_the_others_stay(rows, tmp_path):
    s = settings(tmp_path, row_groups=2)
    broken = rows[0] | {"sources": [rows[0]["sources"][0].replace("s00", "gone")]}
    (plan,) = [p for p in dataset.plan([broken, *rows[1:]], s) if p.split == "train"]
    written = dataset.write(plan, s, 1, str(tmp_path / "d"))
    assert written.rows == 12
    assert list(written.refused) == [broken["uid"]]


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
    patches, _ = dataset.cut(row, s)
    image = formats.read_volume(next(iter(series_files.values())))
    ras = geometry.reorient(image, "RAS")
    canonical = nib.as_closest_canonical(truth)
    np.testing.assert_allclose(ras.affine, canonical.affine, atol=1e-3)
    labels = np.asarray(canonical.dataobj)
    assert len(patches) == 8
    assert sum((p["label"] > 0).any() for p in patches) >= 5  # two thirds are centred on an organ
    for patch in patches:
        places = _found(ras.array[0], patch["image"][0])
        assert len(places) == 1
        i, j, k = places[0]
        np.testing.assert_array_equal(patch["label"], labels[i : i + 64, j : j + 64, k : k + 16])


def _found(array, patch):
    """Where ``patch`` lies in ``array``: candidates by its first voxels, then all of it."""
    first = np.lib.stride_tricks.sliding_window_view(array[: array.shape[0] - 63, : array.shape[1] - 63], 16, axis=2)
    candidates = np.argwhere((first == patch[0, 0, :16]).all(-1))
    return [tuple(c) for c in candidates if (array[c[0] : c[0] + 64, c[1] : c[1] + 64, c[2] : c[2] + 16] == patch).all()]
