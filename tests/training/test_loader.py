import collections
import gc
import io
import itertools
import json
import pathlib
import threading
import time
import weakref

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparkmed.rejection import InputError
from sparkmed.training.loader import ALLOCATED, OVERHEAD, PatchLoader

from . import datasets


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> str:
    """51 patches in row groups of 4 and less, an empty file, a file of one row, a split of one patch."""
    files = [datasets.numbered(13), [], datasets.numbered(1, start=13), datasets.numbered(25, start=14)]
    splits = {"train": files, "val": [datasets.numbered(11, start=39)], "test": [datasets.numbered(1, start=50)]}
    return datasets.write(tmp_path_factory.mktemp("uneven"), splits)


def epoch(url, rank=0, world_size=1, number=0, **arguments):
    loader = PatchLoader(url, rank=rank, world_size=world_size, **arguments)
    loader.set_epoch(number)
    batches = list(loader)
    assert len(batches) == len(loader)
    return batches


def real(batches) -> list[str]:
    return [p for b in batches for p, w in zip(b["patch_id"], b["weight"].tolist(), strict=True) if w > 0]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 3), st.booleans(), st.sampled_from([0.0, 0.002, 64]))
def test_each_patch_once_and_equal_steps(uneven, world, batch, seed, shuffle, window):
    ranks = [epoch(uneven, r, world, 1, batch_size=batch, seed=seed, shuffle=shuffle, window_mb=window) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert collections.Counter(p for b in ranks for p in real(b)) == collections.Counter(f"p{i:05d}" for i in range(51))
    for batches in ranks:
        assert all(len(b["patch_id"]) == len(b["weight"]) == len(b["image"]) == batch for b in batches)
    for step in zip(*ranks, strict=True):
        assert sum(float(b["weight"].sum()) for b in step) == step[0]["total"].item() == step[-1]["total"].item()


def test_rows_stay_together(uneven):
    for batch in epoch(uneven, batch_size=7, seed=3):
        for i, (name, weight) in enumerate(zip(batch["patch_id"], batch["weight"], strict=True)):
            number = int(name[1:]) if weight else 0
            assert (batch["image"][i] == number).all() and (batch["label"][i] == number % 2).all()
            assert batch["subject"][i] == batch["volume"][i].replace("v", "s") == (f"s{number // 2}" if weight else "")
    assert batch["image"].shape == (7, 1, 4, 4, 4) and batch["image"].dtype == torch.float32
    assert batch["label"].shape == (7, 1, 4, 4, 4)
    moved = PatchLoader(uneven).to_device(batch, torch.device("cpu"))
    assert moved["image"].dtype == torch.float32 and moved["label"].dtype == torch.int64
    assert len(moved["image"]) == len(moved["patch_id"]) == int(batch["weight"].sum())
    assert batch["weight"].dtype == torch.float32


def test_the_order_is_a_function_of_seed_and_epoch(uneven):
    first = real(epoch(uneven, seed=0))
    assert first == real(epoch(uneven, seed=0, memory_mb=0))
    assert first != real(epoch(uneven, seed=1)) and first != real(epoch(uneven, seed=0, number=1))
    plain = real(epoch(uneven, shuffle=False))
    assert plain == real(epoch(uneven, shuffle=False, number=5)) and plain != first
    assert real(epoch(uneven, seed=0, window_mb=0.002)) != first


@pytest.mark.parametrize("window", [0.002, 64])
def test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks(uneven, window):
    def steps(world):
        ranks = [epoch(uneven, r, world, 2, batch_size=12 // world, window_mb=window) for r in range(world)]
        return [sorted(real(step)) for step in zip(*ranks, strict=True)]

    assert steps(1) == steps(2) == steps(3) == steps(12)


@pytest.mark.parametrize("window", [0.002, 64])
def test_resumes_behind_any_step_and_with_other_ranks(uneven, window):
    whole = epoch(uneven, number=3, batch_size=4, window_mb=window)
    for stop in range(len(whole) + 1):
        loader = PatchLoader(uneven, batch_size=4, window_mb=window)
        loader.set_epoch(3)
        iterator = iter(loader)
        for _ in range(stop):
            next(iterator)
        state = json.loads(json.dumps(loader.state_dict()))
        resumed = PatchLoader(uneven, batch_size=4, window_mb=window)
        resumed.load_state_dict(state)
        resumed.set_epoch(3)
        assert resumed.state_dict() == state
        assert [b["patch_id"] for b in resumed] == [b["patch_id"] for b in whole[stop:]]
        assert len(list(resumed)) == len(whole)  # iterated again it is a whole epoch
        rest = []
        for rank in range(3):
            other = PatchLoader(uneven, batch_size=2, rank=rank, world_size=3, window_mb=window)
            other.load_state_dict(state)
            rest += real(other)
        assert sorted(rest) == sorted(real(whole[stop:]))


def test_a_resumed_loader_reads_one_window_at_most(uneven, monkeypatch):
    loader = PatchLoader(uneven, batch_size=4, window_mb=0, memory_mb=0)
    state = loader.state_dict() | {"position": 40}
    read = []
    original = loader.dataset.read
    monkeypatch.setattr(loader.dataset, "read", lambda block: read.append(block) or original(block))
    loader.load_state_dict(state)
    iterator = iter(loader)
    next(iterator)
    iterator.close()
    assert len(read) <= 2 + 3 * 2  # a batch of 4 in row groups of 4, and what was prefetched


def test_a_state_of_another_order_is_refused(uneven, tmp_path):
    state = PatchLoader(uneven).state_dict()
    other = datasets.write(tmp_path, {"train": [datasets.numbered(51)]})
    loaders = [PatchLoader(uneven, **arguments) for arguments in ({"seed": 1}, {"shuffle": False}, {"window_mb": 1})]
    for loader in [*loaders, PatchLoader(other)]:
        with pytest.raises(InputError, match="another order of samples"):
            loader.load_state_dict(state)
    for wrong in (99, None, "3"):
        with pytest.raises(InputError, match=f"position {wrong}"):
            PatchLoader(uneven).load_state_dict(state | {"position": wrong})


def test_a_split_is_read_alone(uneven):
    assert sorted(real(epoch(uneven, split="val", batch_size=4))) == [f"p{i:05d}" for i in range(39, 50)]
    one = [epoch(uneven, r, 4, split="test", batch_size=2) for r in range(4)]
    assert [len(b) for b in one] == [1, 1, 1, 1] and sum(len(real(b)) for b in one) == 1
    with pytest.raises(InputError, match="no Parquet file of split vali; splits: train, val, test"):
        PatchLoader(uneven, split="vali")


def test_a_small_split_is_read_once(uneven, monkeypatch):
    loader = PatchLoader(uneven, batch_size=4)
    read = []
    original = loader.dataset.read
    monkeypatch.setattr(loader.dataset, "read", lambda block: read.append(block) or original(block))
    for number in range(3):
        loader.set_epoch(number)
        assert len(real(loader)) == 51
    assert len(read) == len(loader.dataset.blocks)


def test_the_reader_thread_ends_with_its_iterator(uneven):
    def readers():
        return [t for t in threading.enumerate() if t.name == "patch-reader"]

    iterator = iter(PatchLoader(uneven, batch_size=1))
    next(iterator)
    assert readers()
    del iterator
    gc.collect()
    deadline = time.monotonic() + 5
    while readers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not readers()


def test_a_slow_consumer_gets_everything(uneven):
    rng = np.random.default_rng(0)
    for i in range(200):
        names = []
        for batch in PatchLoader(uneven, batch_size=5, memory_mb=(0, 24.01, 512)[i % 3]):
            time.sleep(rng.choice([0, 0, 0, 0.002]))
            names += real([batch])
        assert len(set(names)) == len(names) == 51


def test_classification_batches(tmp_path):
    url = datasets.write(tmp_path, {"train": [datasets.numbered(5, (2, 3, 3, 1))]}, task="classification")
    (batch,) = epoch(url, batch_size=6)
    assert batch["target"].dtype == torch.int64 and batch["target"].shape == (6,) and "label" not in batch
    assert batch["target"].tolist()[:5] == [int(p[1:]) % 2 for p in batch["patch_id"][:5]]


def test_other_ways_numpy_saves_an_array(tmp_path):
    rows = datasets.numbered(3, (1, 2, 3, 4))
    for r in rows:
        r["image"] = np.asfortranarray(np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4) + int(r["patch_id"][1:]))
        assert not r["image"].flags.c_contiguous
    (batch,) = epoch(datasets.write(tmp_path, {"train": [rows]}), batch_size=3)
    for image, name in zip(batch["image"], batch["patch_id"], strict=True):
        assert (image.numpy() == np.arange(24).reshape(1, 2, 3, 4) + int(name[1:])).all()


def test_integer_images_are_scaled_on_the_device(tmp_path):
    rows = datasets.numbered(4)
    for r in rows:
        r["image"] = (r["image"] * -1000).astype(np.int16)
    url = datasets.write(tmp_path, {"train": [rows]})
    loader = PatchLoader(url, batch_size=6)
    (batch,) = loader
    assert batch["image"].dtype == torch.int16
    moved = loader.to_device(batch, torch.device("cpu"))["image"]
    assert sorted(moved[:, 0, 0, 0, 0].tolist()) == [-3000, -2000, -1000, 0] and moved.dtype == torch.float32
    meta = json.loads((tmp_path / "_dataset.json").read_text())
    meta["fields"][0] |= {"scale": 0.5, "offset": 10}
    (tmp_path / "_dataset.json").write_text(json.dumps(meta))
    scaled = PatchLoader(url, batch_size=6)
    (batch,) = scaled
    moved = scaled.to_device(batch, torch.device("cpu"))["image"]
    assert sorted(moved[:, 0, 0, 0, 0].tolist()) == [-1490, -990, -490, 10]
    with pytest.raises(InputError, match="another order"):
        scaled.load_state_dict(loader.state_dict())


def test_a_rank_reads_its_share_of_the_row_groups(tmp_path, monkeypatch):
    url = datasets.write(tmp_path, {"train": [datasets.numbered(400)]}, row_group=5)
    reads = []
    for rank in range(4):
        loader = PatchLoader(url, batch_size=16, rank=rank, world_size=4, memory_mb=0)
        original = loader.dataset.read
        monkeypatch.setattr(loader.dataset, "read", lambda block, read=original: reads.append(block) or read(block))
        assert len(real(loader)) == 100
    assert len(reads) < 4 * 80 * 0.6  # all ranks read 80 each if a batch is dealt out row by row


def test_what_is_held_stays_within_the_memory(tmp_path, monkeypatch):
    url = datasets.write(tmp_path, {"train": [datasets.numbered(200)]}, row_group=5)
    size = PatchLoader(url).dataset.blocks[0].bytes
    memory = (OVERHEAD + ALLOCATED * 10 * size) / 2**20
    loader = PatchLoader(url, batch_size=2, shuffle=False, window_mb=2 * size / 2**20, memory_mb=memory)
    alive, most = weakref.WeakSet(), 0
    original = loader.dataset.read

    def read(block):
        nonlocal most
        columns = original(block)
        alive.add(columns["image"])
        most = max(most, len(alive))
        return columns

    monkeypatch.setattr(loader.dataset, "read", read)
    deadline = time.monotonic() + 60
    for _ in loader:
        while most < 3 and time.monotonic() < deadline:  # the readers go on while the first batch is in use
            time.sleep(0.01)
        time.sleep(0.001)
    assert 3 <= most <= 10  # read ahead, and what is read takes memory too


WRONG = [
    {"batch_size": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}, {"seed": -1}, {"world_size": 0}, {"memory_mb": float("nan")},
    {"window_mb": -1},
]  # fmt: skip


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_arguments(uneven, arguments):
    with pytest.raises(InputError, match="PatchLoader wants"):
        PatchLoader(uneven, **arguments)


def damaged(tmp_path, damage) -> str:
    """A dataset whose file ``part-00001`` suffered ``damage(path)``."""
    folder = tmp_path / "dataset"
    url = datasets.write(folder, {"train": [datasets.numbered(8), datasets.numbered(9, start=8)]})
    damage(folder / "split=train" / "part-00001.parquet")
    return url


def truncate(path: pathlib.Path):
    path.write_bytes(path.read_bytes()[:-40])


def cut_in_the_middle(path: pathlib.Path):
    data = bytearray(path.read_bytes())
    data[100:600] = bytes(500)
    path.write_bytes(data)


def add_a_row(path: pathlib.Path):
    datasets.write(path.parent.parent / "other", {"train": [datasets.numbered(10)]})
    (path.parent.parent / "other" / "split=train" / "part-00000.parquet").replace(path)


def copy_beside(path: pathlib.Path):
    path.with_name("part-00001-copy.parquet").write_bytes(path.read_bytes())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "part-00001.parquet .* is not a readable Parquet file"),
        (pathlib.Path.unlink, "split=train/part-00001.parquet is missing"),
        (copy_beside, "part-00001-copy.parquet is not in _dataset.json"),
        (lambda p: p.write_bytes(b""), "part-00001.parquet .0 bytes. is not a readable"),
    ],
)
def test_damage_is_found_when_the_index_is_made(tmp_path, damage, said):
    with pytest.raises(InputError, match=said):
        PatchLoader(damaged(tmp_path, damage))


@pytest.mark.parametrize("damage", [truncate, pathlib.Path.unlink, add_a_row, cut_in_the_middle, lambda p: p.write_bytes(b"")])
def test_damage_behind_the_index_ends_the_epoch_with_the_name_of_the_file(tmp_path, damage):
    url = damaged(tmp_path, lambda path: None)
    loader = PatchLoader(url, batch_size=2)
    damage(pathlib.Path(url) / "split=train" / "part-00001.parquet")
    with pytest.raises(InputError, match="part-00001.parquet"):
        list(loader)


def test_counts_that_do_not_add_up(tmp_path):
    splits = {"train": [datasets.numbered(8)], "val": [datasets.numbered(2)]}
    url = datasets.write(tmp_path, splits, counts={"train": 9, "val": 2}, files=False)
    with pytest.raises(InputError, match="8 patches, _dataset.json says 9; rows by file: split=train/part-00000.parquet 8"):
        PatchLoader(url, split="train")
    assert len(PatchLoader(url, batch_size=1, split="val")) == 2


def test_a_dataset_without_a_description_is_refused(tmp_path):
    url = datasets.write(tmp_path, {"train": [datasets.numbered(8)]})
    (tmp_path / "_dataset.json").unlink()
    with pytest.raises(InputError, match="no _dataset.json.*to vouch for it"):
        PatchLoader(url)
    (tmp_path / "_dataset.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        PatchLoader(url)
    (tmp_path / "_dataset.json").write_text('{"format_version": 2}')
    with pytest.raises(InputError, match="format_version 2, wanted 1"):
        PatchLoader(url)


def wrong_dtype(rows):
    rows[5]["image"] = rows[5]["image"].astype(np.float64)


def wrong_shape(rows):
    rows[5]["image"] = rows[5]["image"][:, :3]


def pickled(rows):
    rows[5]["label"] = np.full((4, 4, 4), object())


def not_npy(rows):
    rows[5]["subject"], rows[5]["image"] = "x", np.array("just text")


@pytest.mark.parametrize("change", [wrong_dtype, wrong_shape, pickled, not_npy])
def test_payloads_that_are_not_the_field(tmp_path, change):
    rows = datasets.numbered(8)
    change(rows)
    loader = PatchLoader(datasets.write(tmp_path, {"train": [rows]}), batch_size=8)
    with pytest.raises(InputError, match="part-00000.parquet, row group 1: field (image|label)"):
        list(loader)


def test_a_dataset_of_others_that_is_vouched_for(tmp_path):
    rng = np.random.default_rng(0)
    pictures, arrays = rng.integers(0, 255, (2, 7, 6, 5), np.uint8)
    (tmp_path / "split=train").mkdir()
    table = {
        "picture": [png(p) for p in pictures],
        "mask": pa.array([compressed(a) for a in arrays]),
        "age": pa.array(range(7), pa.int32()),
    }
    pq.write_table(pa.table(table), tmp_path / "split=train" / "0.parquet", row_group_size=3)
    fields = [
        {"name": "image", "column": "picture", "dtype": "uint8", "shape": [6, 5], "codec": "image"},
        {"name": "label", "column": "mask", "dtype": "uint8", "shape": [6, 5], "codec": "compressed_ndarray"},
        {"name": "age", "dtype": "int64"},
    ]
    batches = list(PatchLoader(str(tmp_path), batch_size=4, schema={"fields": fields}))
    order = [a for b in batches for a, w in zip(b["age"].tolist(), b["weight"], strict=True) if w]
    assert sorted(order) == list(range(7)) and order != sorted(order)
    assert np.array_equal(torch.cat([b["image"] for b in batches])[:7], pictures[order])
    assert np.array_equal(torch.cat([b["label"] for b in batches])[:7], arrays[order])
    assert len(set(real(batches))) == 7 and "split=train/0.parquet/2/0" in real(batches)
    for wrong, said in [
        ([fields[0] | {"shape": [5, 6]}], "row group .: field image holds an array .6, 5. of uint8, wanted .5, 6. of uint8"),
        ([fields[0] | {"codec": "compressed_ndarray"}], "pickled data"),
        ([fields[1] | {"name": "image", "codec": "image"}], "cannot identify image file"),
        ([fields[0] | {"codec": "pickle"}], "codec 'pickle'; known are ndarray, compressed_ndarray, image, scalar"),
        ([fields[0] | {"column": "photo"}], "has no column photo"),
        ([fields[2]], "image among them"),
        ([fields[0], fields[2] | {"name": "weight", "column": "age"}], "not weight or total"),
        ([fields[0], fields[0]], "of different names"),
        ([fields[0] | {"colum": "x"}], "field image has keys colum, which mean nothing"),
        ([fields[0] | {"shape": [None, 5]}], "field image has shape .None, 5., wanted whole numbers above 0"),
        ([fields[0] | {"dtype": "int61"}], "dtype 'int61', which numpy does not know"),
        ([fields[0] | {"dtype": ">i2"}], "dtype >i2, wanted whole or real numbers in native order"),
        ([fields[0] | {"codec": "scalar"}], "field image has codec scalar, wanted one of ndarray"),
        ([fields[0], fields[2] | {"name": "patch_id", "column": "age"}], "field patch_id wants dtype str"),
        ([fields[0], fields[2] | {"dtype": "int8"}], "split=train/0.parquet, row group .: Cannot cast"),
        ([fields[0], fields[2] | {"dtype": "str"}], "row group .: field age is a column of int32, wanted text"),
        (None, "wants a list of fields"),
    ]:
        with pytest.raises(InputError, match=said):
            list(PatchLoader(str(tmp_path), schema={"fields": wrong}))


def test_a_url_that_is_no_folder(tmp_path):
    fields = {"fields": [{"name": "image", "dtype": "uint8", "shape": [2], "codec": "ndarray"}]}
    with pytest.raises(InputError, match="there is no such folder"):
        PatchLoader(str(tmp_path / "none"), schema=fields)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(InputError, match="is a file, wanted the folder"):
        PatchLoader(str(tmp_path / "a.parquet"), schema=fields)


def png(array) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def compressed(array) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, arr=array)
    return stream.getvalue()


def test_many_loaders_at_once(uneven):
    loader = PatchLoader(uneven, batch_size=3)
    a, b = iter(loader), iter(loader)
    assert [x["patch_id"] for x in itertools.islice(a, 5)] == [x["patch_id"] for x in itertools.islice(b, 5)]
