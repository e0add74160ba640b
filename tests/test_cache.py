import contextlib
import fcntl
import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import threading
import time
import warnings

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from training import datasets, remote

from sparkmed.cache import FetchError, FileCache, version
from sparkmed.rejection import InputError
from sparkmed.training.dataset import DatasetError, PatchDataset
from sparkmed.training.loader import PatchLoader

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(autouse=True)
def count(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTED_OPENS", str(tmp_path / "opens"))


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def remote_file(folder: pathlib.Path, name: str, size: int = 1000, seed: int = 0) -> tuple[str, bytes]:
    folder.mkdir(exist_ok=True)
    data = np.random.default_rng(seed).bytes(size)
    (folder / name).write_bytes(data)
    return f"counted://{folder}/{name}", data


def read(cache: FileCache, url: str) -> bytes:
    with cache.open(url, os.path.getsize(url.removeprefix("counted://")), version(url)) as file:
        return bytes(file.read())


def held(cache: FileCache) -> list[pathlib.Path]:
    return sorted(p for p in cache.folder.iterdir() if p.name != "lock")


def parts(cache: FileCache) -> list[pathlib.Path]:
    return [p for p in held(cache) if p.suffix == ".part"] if cache.folder.exists() else []


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_file_is_fetched_once_and_read_from_its_copy(tmp_path):
    url, data = remote_file(tmp_path / "r", "a")
    cache = FileCache(str(tmp_path / "c"))
    assert read(cache, url) == read(cache, url) == read(FileCache(str(tmp_path / "c")), url) == data
    assert remote.opened() == ["a"]
    (copy,) = held(cache)
    assert copy.read_bytes() == data and cache.folder.stat().st_mode & 0o777 == 0o700 and copy.stat().st_mode & 0o777 == 0o600


def test_a_changed_file_is_not_served_stale(tmp_path):
    url, old = remote_file(tmp_path / "r", "a")
    cache = FileCache(str(tmp_path / "c"))
    assert read(cache, url) == old
    _, new = remote_file(tmp_path / "r", "a", seed=1)  # of the same size
    os.utime(tmp_path / "r/a", ns=(1, 1))
    assert read(cache, url) == new != old


@pytest.mark.parametrize("damage", ["flipped", "short", "empty"])
def test_a_damaged_copy_is_fetched_again(tmp_path, damage):
    url, data = remote_file(tmp_path / "r", "a")
    cache = FileCache(str(tmp_path / "c"))
    read(cache, url)
    (copy,) = held(cache)
    bad = {"flipped": data[:500] + bytes([data[500] ^ 1]) + data[501:], "short": data[:-1], "empty": b""}[damage]
    copy.write_bytes(bad)
    assert read(FileCache(str(tmp_path / "c")), url) == data  # a process that did not see it yet
    assert remote.opened() == ["a", "a"]
    time.sleep(0.02)
    held(cache)[0].write_bytes(bad)
    assert read(cache, url) == data  # one that did
    assert remote.opened() == ["a"] * 3 and len(held(cache)) == 1


def test_the_least_recently_used_makes_room(tmp_path):
    urls = [remote_file(tmp_path / "r", name)[0] for name in "abcd"]
    cache = FileCache(str(tmp_path / "c"), 3500e-9)
    for name in "abcab":
        read(cache, urls["abcd".index(name)])
    read(cache, urls[3])  # instead of c
    assert remote.opened() == list("abcd") and len(held(cache)) == 3
    for name in "abd":
        read(cache, urls["abcd".index(name)])
    assert remote.opened() == list("abcd")
    read(FileCache(str(tmp_path / "c"), 1000e-9), urls[2])  # another process with a lower limit
    assert remote.opened() == list("abcdc") and len(held(cache)) == 1


def test_an_open_copy_outlives_its_room(tmp_path):
    (url, data), (other, _) = remote_file(tmp_path / "r", "a"), remote_file(tmp_path / "r", "b")
    cache = FileCache(str(tmp_path / "c"), 1000e-9)
    with cache.open(url, 1000, version(url)) as file:
        read(cache, other)
        assert len(held(cache)) == 1 and bytes(file.read()) == data
    assert read(cache, url) == data and remote.opened() == ["a", "b", "a"]


def test_what_is_larger_than_the_limit_is_read_where_it_is(tmp_path):
    url, data = remote_file(tmp_path / "r", "a")
    for gb in (999e-9, 0):
        cache = FileCache(str(tmp_path / "c"), gb)
        assert read(cache, url) == data
    assert not cache.folder.exists()


def test_what_tells_no_version_is_read_where_it_is(tmp_path):
    url, data = remote_file(tmp_path / "r", "a")
    cache = FileCache(str(tmp_path / "c"))
    with cache.open(url, 1000, "") as file:
        assert file.read() == data
    assert not cache.folder.exists()


def test_files_of_others_stay(tmp_path):
    urls = [remote_file(tmp_path / "r", name)[0] for name in "ab"]
    cache = FileCache(str(tmp_path / "c"), 1000e-9)
    read(cache, urls[0])
    strange = cache.folder / "notes.txt"
    strange.write_text("x" * 5000)
    read(cache, urls[1])
    assert strange.exists() and len(held(cache)) == 2


def test_a_remote_folder_is_refused():
    with pytest.raises(InputError, match="local disk, got s3://bucket/cache"):
        FileCache("s3://bucket/cache")


def test_errors_of_the_remote_file_are_its_own(tmp_path):
    url, _ = remote_file(tmp_path / "r", "a")
    cache = FileCache(str(tmp_path / "c"))
    stamp = version(url)
    for size, sentence in ((999, "listed with 999 bytes, more came"), (1001, "listed with 1001 bytes, 1000 came")):
        with pytest.raises(FetchError, match=sentence):
            cache.open(url, size, stamp)
    with pytest.raises(FetchError, match="it changed"):
        cache.open(url, 1000, "mtime=1")
    (tmp_path / "r/a").unlink()
    with pytest.raises(FetchError, match="No such file"):
        cache.open(url, 1000, stamp)
    with pytest.raises(FetchError, match="No such file"):
        version(url)
    assert held(cache) == []


@pytest.mark.parametrize("obstacle", ["file", "foreign"])
def test_without_a_usable_folder_files_are_read_where_they_are(tmp_path, monkeypatch, obstacle):
    urls = [remote_file(tmp_path / "r", name) for name in "ab"]
    cache = FileCache(str(tmp_path / "c"))
    if obstacle == "file":
        (tmp_path / "c").write_text("")
    else:
        cache.folder.mkdir(parents=True)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.warns(UserWarning, match="remote files are read without a cache") as caught:
        assert [read(cache, url) for url, _ in urls * 2] == [data for _, data in urls * 2]
    assert len(caught) == 1 and str(cache.folder) in str(caught[0].message)
    assert remote.opened() == ["a", "b"] * 2


@contextlib.contextmanager
def no_file_above(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_copies_are_read_while_there_is_no_space_for_more(tmp_path):
    (old, data), (new, other) = remote_file(tmp_path / "r", "a"), remote_file(tmp_path / "r", "b", 2000)
    cache = FileCache(str(tmp_path / "c"))
    with no_file_above(1500):
        read(cache, old)
        with pytest.warns(UserWarning, match="File too large") as caught:
            assert read(cache, new) == other
        assert read(cache, old) == data and read(cache, new) == other
    assert len(caught) == 1 and remote.opened() == ["a", "b", "b"] and len(held(cache)) == 1


def test_processes_that_want_the_same_file_fetch_it_once(tmp_path, monkeypatch):
    url, data = remote_file(tmp_path / "r", "a")
    monkeypatch.setenv("COUNTED_SECONDS", "0.2")
    monkeypatch.setenv("COUNTED_BYTES", "100")
    answers = SPAWN.Queue()
    ranks = [SPAWN.Process(target=remote.fetch, args=(str(tmp_path / "c"), url, answers)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    assert [answers.get(timeout=60) for _ in ranks] == [data, data]
    for rank in ranks:
        rank.join()
    assert remote.opened() == ["a"] and len(held(FileCache(str(tmp_path / "c")))) == 1


def test_threads_that_want_the_same_file_fetch_it_once(tmp_path):
    url, data = remote_file(tmp_path / "r", "a", 100_000)
    cache, found = FileCache(str(tmp_path / "c")), []
    threads = [threading.Thread(target=lambda: found.append(read(cache, url))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [data] * 8 and remote.opened() == ["a"]


def test_a_process_killed_while_it_fetches_leaves_nothing(tmp_path, monkeypatch):
    (url, data), _, (other, _) = (remote_file(tmp_path / "r", name) for name in "abc")
    cache, answers = FileCache(str(tmp_path / "c")), SPAWN.Queue()
    for name in ("a", "b"):
        with monkeypatch.context() as slow:
            slow.setenv("COUNTED_SECONDS", "0.5")
            slow.setenv("COUNTED_BYTES", "10")
            rank = SPAWN.Process(target=remote.fetch, args=(str(tmp_path / "c"), f"counted://{tmp_path}/r/{name}", answers))
            rank.start()
            wait_for(lambda name=name: name in remote.opened())  # it has room by then, and is read slowly
            os.kill(rank.pid, signal.SIGKILL)
            rank.join()
        assert len(parts(cache)) == 1
        assert read(cache, url) == data  # fetched again, then had
    assert len(parts(cache)) == 1
    read(cache, other)  # whoever fetches anything removes what was left of b
    assert parts(cache) == [] and remote.opened() == ["a", "a", "b", "c"]


def test_a_file_that_another_process_fetches_is_neither_removed_nor_overlooked(tmp_path):
    url, data = remote_file(tmp_path / "r", "a")
    cache = FileCache(str(tmp_path / "c"), 1500e-9)
    cache.folder.mkdir(parents=True)
    part = cache.folder / ("0" * 32 + ".part")
    with open(part, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(600)
        assert read(cache, url) == data  # there is no room beside it
        assert held(cache) == [part]
        file.truncate(500)
        read(cache, url)
        assert len(held(cache)) == 2
    assert remote.opened() == ["a", "a"]


def test_many_threads_keep_the_limit(tmp_path):
    files = [remote_file(tmp_path / "r", f"f{i}", 1000 + i, seed=i) for i in range(12)]
    caches, largest, wrong, stop = [FileCache(str(tmp_path / "c"), 5000e-9) for _ in range(3)], [], [], threading.Event()

    def work(seed):
        for i in np.random.default_rng(seed).integers(0, 12, 60):
            url, data = files[i]
            if read(caches[seed % 3], url) != data:
                wrong.append(url)

    def watch():
        while not stop.is_set():
            with caches[0]._alone(), contextlib.suppress(FileNotFoundError):
                largest.append(sum(p.stat().st_size for p in held(caches[0])))

    caches[0].folder.mkdir(parents=True)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    watcher = threading.Thread(target=watch)
    for thread in [watcher, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    watcher.join()
    assert not wrong and 3000 < max(largest) <= 5000 and parts(caches[0]) == []


@pytest.fixture
def dataset(tmp_path) -> pathlib.Path:
    splits = {"train": [datasets.numbered(10), datasets.numbered(9, start=10)], "val": [datasets.numbered(3, start=19)]}
    (tmp_path / "data").mkdir()
    datasets.write(tmp_path / "data", splits)
    return tmp_path / "data"


def batches(loader: PatchLoader, epoch: int) -> list:
    loader.set_epoch(epoch)
    return [json.dumps({k: v if isinstance(v, list) else v.tolist() for k, v in b.items()}) for b in loader]


def test_a_remote_dataset_gives_the_same_batches(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    near, far = (PatchLoader(u, batch_size=4, split="train", memory_mb=0) for u in (str(dataset), f"counted://{dataset}"))
    for epoch in range(2):
        assert batches(near, epoch) == batches(far, epoch)
    once = remote.opened()
    assert len(held(far.dataset._cache)) == 2  # below the system's folder for temporary files
    assert batches(near, 2) == batches(far, 2)
    assert remote.opened() == once and once.count("part-00000.parquet") == 2  # the footer, the file


def test_a_local_dataset_has_no_copies(dataset, tmp_path):
    cache = FileCache(str(tmp_path / "c"))
    found = PatchDataset(str(dataset), cache=cache)
    found.read(found.blocks[0])
    assert not cache.folder.exists()


def test_any_fsspec_file_system_will_do(dataset, tmp_path):
    fsspec.filesystem("memory").put(str(dataset), "/cached", recursive=True)
    try:
        cache = FileCache(str(tmp_path / "c"))
        found = PatchDataset("memory://cached", cache=cache)
        for block in found.blocks:
            assert found.read(block)["patch_id"] == PatchDataset(str(dataset)).read(block)["patch_id"]
        assert len(held(cache)) == 3
    finally:
        fsspec.filesystem("memory").rm("/cached", recursive=True)


def test_of_a_dataset_larger_than_the_limit_a_part_is_copied(dataset, tmp_path):
    sizes = sorted(p.stat().st_size for p in dataset.rglob("*.parquet"))
    cache = FileCache(str(tmp_path / "c"), (sizes[-1] + 100) * 1e-9)
    found = PatchDataset(f"counted://{dataset}", "train", cache)
    for _ in range(3):
        for block in found.blocks:
            found.read(block)
    assert len(held(cache)) == 1 and remote.opened().count("part-00000.parquet") == 2  # the footer, the file
    assert remote.opened().count("part-00001.parquet") == 1 + 3 * sum(b.path.endswith("1.parquet") for b in found.blocks)


def test_damage_of_a_remote_dataset_is_told_by_its_name(dataset, tmp_path):
    cache = FileCache(str(tmp_path / "c"))
    found = PatchDataset(f"counted://{dataset}", cache=cache)
    found.read(found.blocks[0])
    first, second = (dataset / f"split=train/part-0000{i}.parquet" for i in range(2))
    first.unlink()
    found.read(found.blocks[0])  # of its copy
    shutil.copy(dataset / "split=val/part-00000.parquet", second)
    block = next(b for b in found.blocks if b.path.endswith("part-00001.parquet"))
    with pytest.raises(DatasetError, match="data: split=train/part-00001.parquet, row group 0: it was listed with") as error:
        found.read(block)
    assert str(cache.folder) not in str(error.value)
    data = bytearray((dataset / "split=val/part-00000.parquet").read_bytes())
    data[200:260] = bytes(60)  # whole as a file
    (dataset / "split=val/part-00000.parquet").write_bytes(data)
    found = PatchDataset(f"counted://{dataset}", "val", cache)
    with pytest.raises(DatasetError, match="data: split=val/part-00000.parquet, row group 0") as error:
        found.read(found.blocks[0])
    assert str(cache.folder) not in str(error.value)


def test_copies_are_opened_by_pyarrow_itself(dataset, tmp_path):
    url = f"counted://{dataset}/split=val/part-00000.parquet"
    cache = FileCache(str(tmp_path / "c"))
    read(cache, url)
    with cache.open(url, (dataset / "split=val/part-00000.parquet").stat().st_size, version(url)) as file:
        assert isinstance(file, pa.OSFile) and file.tell() == 0
