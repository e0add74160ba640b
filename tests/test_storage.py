import contextlib
import os

import pytest

from sparkmed import storage


def test_walk_is_sorted_and_relative(tmp_path):
    for name in ("b/x.txt", "a.txt", "b.txt", "b/a/z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12")
    found = list(storage.walk(str(tmp_path)))
    assert [f.path for f in found] == sorted(["a.txt", "b.txt", "b/a/z.txt", "b/x.txt"])
    assert {f.size for f in found} == {2}
    assert all(f.uri == f"file://{tmp_path}/{f.path}" for f in found)


def test_walk_of_a_file_is_itself_and_of_nothing_an_error(tmp_path):
    path = tmp_path / "x#1 %41.dcm"
    path.write_bytes(b"1")
    (only,) = storage.walk(str(path))
    assert only.path == path.name
    assert storage.read_bytes(only.uri) == b"1"
    with pytest.raises(FileNotFoundError):
        list(storage.walk(str(tmp_path / "none")))


def test_what_is_no_file_of_the_folder_is_named_as_such(tmp_path, monkeypatch):
    (tmp_path / "outside").write_bytes(b"secret")
    inside = tmp_path / "archive"
    (inside / "folder").mkdir(parents=True)
    (inside / "own").write_bytes(b"1")
    os.symlink(tmp_path / "outside", inside / "away")
    os.symlink(tmp_path, inside / "loop")
    os.symlink(inside / "missing", inside / "nowhere")
    os.symlink(inside / "own", inside / "near")
    os.symlink(inside / "folder", inside / "same folder")  # its files come under their own paths
    os.mkfifo(inside / "pipe")
    scandir = os.scandir

    def broken(folder):
        if folder.endswith("/folder"):
            raise PermissionError(folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", broken)
    found = {f.path: f.stray for f in storage.walk(str(inside))}
    links = dict.fromkeys(("away", "loop", "nowhere"), "LINK")
    assert found == links | {"own": "", "near": "", "folder/": "UNREADABLE", "pipe": "SPECIAL_FILE"}


def test_what_cannot_be_listed_or_asked_keeps_its_place_in_the_order(tmp_path, monkeypatch):
    """A folder of others, and one whose files may be listed and not looked at."""
    for name in ("study/a", "study-2", "study.zip", "listed/b"):
        storage.write_bytes(str(tmp_path / name), b"1")
    scandir = os.scandir

    class Hidden:
        def __init__(self, entry):
            self.entry = entry

        def __getattr__(self, name):
            return getattr(self.entry, name)

        def stat(self, **_):
            raise PermissionError(self.entry.path)

    @contextlib.contextmanager
    def guarded(folder):
        if str(folder).endswith("/study"):
            raise PermissionError(folder)
        with scandir(folder) as listing:
            yield [Hidden(e) for e in listing] if str(folder).endswith("/listed") else listing

    monkeypatch.setattr(os, "scandir", guarded)
    found = list(storage.walk(str(tmp_path)))
    assert {f.path: f.stray for f in found} == {"study/": "UNREADABLE", "listed/b": "UNREADABLE", "study-2": "", "study.zip": ""}
    assert [f.uri for f in found] == sorted(f.uri for f in found)


def test_write_is_whole_or_nothing(tmp_path, monkeypatch):
    url = storage.join(str(tmp_path), "deep", "file")
    storage.write_bytes(url, b"one")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        storage.write_bytes(url, b"two")
    assert storage.read_bytes(url) == b"one"
    assert [f.path for f in storage.walk(str(tmp_path))] == ["deep/file"]


@pytest.mark.parametrize("store", ["memory://streams", "local"])
def test_a_streamed_file_is_whole_or_not_there(tmp_path, store):
    url = storage.join(str(tmp_path) if store == "local" else store, "deep", "file")
    with pytest.raises(RuntimeError), storage.writing(url) as f:
        f.write(b"half")
        raise RuntimeError
    assert not storage.exists(url)
    with storage.writing(url) as f:
        f.write(b"whole")
    assert storage.read_bytes(url) == b"whole"
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == (["file"] if store == "local" else [])


@pytest.mark.parametrize("store", ["memory://ranges", "local"])
def test_ranges_come_in_the_order_asked_for_and_whole(tmp_path, store):
    urls = [storage.join(str(tmp_path) if store == "local" else store, name) for name in "ab"]
    for url, data in zip(urls, (b"0123456789", b"abcdef"), strict=True):
        storage.write_bytes(url, data)
    a, b = urls
    assert storage.read_ranges([(b, 2, 4), (a, 7, 10), (b, 0, 1), (a, 3, 3)]) == [b"cd", b"789", b"a", b""]
    assert storage.read_ranges([]) == []
    with pytest.raises(EOFError, match="3 bytes at 3, wanted 4"):
        storage.read_ranges([(a, 0, 2), (b, 3, 7)])


def test_urls_of_other_file_systems():
    storage.write_bytes("memory://bucket/a/b.txt", b"x")
    assert storage.read_bytes("memory://bucket/a/b.txt") == b"x"
    assert [f.path for f in storage.walk("memory://bucket")] == ["a/b.txt"]
    assert storage.absolute("dbfs:/data") == "file:///dbfs/data"


def test_colons_in_a_local_path_are_no_chain(tmp_path):
    url = storage.join(str(tmp_path), "a::b", "zip::c")
    storage.write_bytes(url, b"1")
    with storage.open(url) as f:
        assert f.read() == b"1"
    assert [f.path for f in storage.walk(str(tmp_path))] == ["a::b/zip::c"]
    storage.move(url, url + "d")
    assert storage.exists(url + "d") and not storage.exists(url)
    storage.remove(storage.join(str(tmp_path), "a::b"), recursive=True)
    assert list(storage.walk(str(tmp_path))) == []


def test_a_name_that_is_not_utf8_is_spelt_so_that_it_can_be_written(tmp_path):
    (tmp_path / os.fsdecode(b"bad\xff\\ \xc3\xbc")).write_bytes(b"1")
    (file,) = storage.walk(str(tmp_path))
    assert storage.read_bytes(file.uri) == b"1"
    assert storage.spelt(file.path) == "bad\\udcff\\ \u00fc"
    storage.spelt(file.uri).encode()


@pytest.mark.parametrize("store", ["memory://ordered", "local"])
def test_walk_is_in_the_order_of_whole_paths_as_they_are_spelt(tmp_path, store):
    base = str(tmp_path) if store == "local" else store
    names = ["a.b", "a/w", "a/x.y/z", "a/x/y", "a0", "b/c/d", "\u00fc", "\U0001f600/x"]
    if store == "local":
        names.append("b\udcff/x")
    for name in names:
        storage.write_bytes(f"{base}/{name}", b"x")
    found = [f.path for f in storage.walk(base)]
    assert set(found) == set(names)
    assert found == sorted(names, key=storage.spelt)


@pytest.mark.parametrize("store", ["memory://whole", "local"])
def test_a_folder_may_be_walked_as_one_file(tmp_path, store):
    base = str(tmp_path) if store == "local" else store
    for name in ("P.zarr/a/b/c/d", "P.zarr/a/e", "P.zarr-x", "P.zarr.txt", "Q/x"):
        storage.write_bytes(f"{base}/{name}", b"xy")
    found = list(storage.walk(base, (".zarr",)))
    assert [(f.path, f.size, f.folder) for f in found] == [
        ("P.zarr", 4, True), ("P.zarr-x", 2, False), ("P.zarr.txt", 2, False), ("Q/x", 2, False)
    ]  # fmt: skip
    assert [f.uri for f in found] == sorted(f.uri for f in found)
    assert list(storage.walk(f"{base}/P.zarr", (".zarr",))) == found[:1]
    for change in (lambda: storage.write_bytes(f"{base}/P.zarr/a/b/c/e", b""), lambda: storage.remove(f"{base}/P.zarr/a/e")):
        (before,) = storage.walk(f"{base}/P.zarr", (".zarr",))
        change()
        assert next(storage.walk(f"{base}/P.zarr", (".zarr",))).mtime_ns != before.mtime_ns


@pytest.mark.parametrize("store", ["memory://each", "local"])
def test_many_files_are_read_at_once_and_a_missing_one_is_none(tmp_path, store):
    base = str(tmp_path) if store == "local" else store
    for name in ("a", "b/c"):
        storage.write_bytes(f"{base}/{name}", b"12345")
    assert storage.read_each([f"{base}/{n}" for n in ("b/c", "none", "a/none", "a")], 3) == [b"123", None, None, b"123"]
    assert storage.read_each([], 3) == []
    assert storage.folder(base) == [("a", False), ("b", True)] and storage.folder(f"{base}/none") == []


def test_walk_of_a_remote_file_is_itself_and_of_nothing_an_error():
    storage.write_bytes("memory://single/x/a.txt", b"abc")
    (only,) = storage.walk("memory://single/x/a.txt")
    assert (only.path, only.size) == ("a.txt", 3) and only.uri.endswith("single/x/a.txt")
    with pytest.raises(FileNotFoundError):
        list(storage.walk("memory://single/none"))
