import errno
import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import time
import zipfile

import fsspec
import numpy as np
import pytest

from sparkmed import config, formats, storage
from sparkmed.formats import archive
from sparkmed.rejection import Refused, Rejection

from . import dicoms

SMALL = config.Catalog(max_member_bytes=1 << 20, max_ratio=10)


def listed(path, limits=None):
    return [m for f in storage.walk(str(path)) for m in archive.members(f, limits)]


def codes(found):
    return [(m.uri.split("::")[0], m.reason) for m in found if isinstance(m, Rejection)]


def make_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, data in files:
            z.writestr(name, data)
    return path


def make_tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as t:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return path


FILES = [("a/one.bin", b"1" * 10), ("two.bin", b"2" * 700), ("a/b ü::c/three", b"")]


def test_plain_file(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "f.dcm").write_bytes(b"abc")
    (member,) = listed(tmp_path)
    assert (member.path, member.container, member.bytes, member.read()) == ("x/f.dcm", member.uri, 3, b"abc")
    assert archive.open_uri(member.uri) == b"abc"


@pytest.mark.parametrize("name", ["z.zip", "Z.ZIP", "t.tar", "t.tar.gz", "t.tgz", "t.tar.bz2", "t.tar.xz"])
def test_members_are_read_in_place(tmp_path, name):
    low = name.lower()
    mode = {"gz": "w:gz", "tgz": "w:gz", "bz2": "w:bz2", "xz": "w:xz"}.get(low.rsplit(".")[-1], "w")
    (make_zip(tmp_path / name, FILES) if low.endswith("zip") else make_tar(tmp_path / name, FILES, mode))
    seen = []
    for member in listed(tmp_path):
        seen.append((member.path, member.bytes))
        assert member.container == f"file://{tmp_path}/{name}"
        assert member.file_size == (tmp_path / name).stat().st_size
    assert seen == [(f"{name}/{n}", len(d)) for n, d in FILES]
    (file,) = storage.walk(str(tmp_path))
    assert [m.read() for m in archive.members(file)] == [d for _, d in FILES]
    members = listed(tmp_path)
    assert [pickle.loads(pickle.dumps(m)).read() for m in members] == [d for _, d in FILES]  # on another machine, by URI
    assert dict(archive.read_many([m.uri for m in reversed(members)])) == {2 - n: d for n, (_, d) in enumerate(FILES)}
    with pytest.raises(Refused, match="UNREADABLE"):
        archive.open_uri(members[0].uri.replace("one", "none"))


def test_uri_is_fsspec_s(tmp_path):
    make_zip(tmp_path / "z.zip", FILES)
    member = listed(tmp_path)[0]
    assert member.uri == f"zip://a/one.bin::file://{tmp_path}/z.zip"
    with fsspec.open(member.uri) as f:
        assert f.read() == member.read()


@pytest.mark.parametrize("name", ["../up.dcm", "/etc/passwd", "a/../../b", "C:\\x.dcm", "..\\up", "\\\\server\\x"])
def test_members_that_escape(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        info = zipfile.ZipInfo("placeholder")
        info.filename = name
        z.writestr(info, b"x")
        z.writestr("good", b"y")
    make_tar(tmp_path / "t.tar", [(name, b"x"), ("good", b"y")], "w")
    found = listed(tmp_path)
    assert [c for _, c in codes(found)] == ["ESCAPES_FOLDER"] * 2
    assert [m.read() for m in found if isinstance(m, archive.Member)] == [b"y", b"y"]
    with pytest.raises(Refused, match="ESCAPES_FOLDER"):
        archive.open_uri(f"tar://{name}::file://{tmp_path}/t.tar")


def test_links_and_devices(tmp_path):
    kinds = {"soft": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "pipe": tarfile.FIFOTYPE, "dev": tarfile.CHRTYPE}
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as t:
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            t.addfile(info)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        info = zipfile.ZipInfo("soft")
        info.external_attr = 0o120777 << 16
        z.writestr(info, "/etc/passwd")
    assert codes(listed(tmp_path)) == [
        ("tar://soft", "LINK"), ("tar://hard", "LINK"), ("tar://pipe", "SPECIAL_FILE"), ("tar://dev", "SPECIAL_FILE"),
        ("zip://soft", "LINK"),
    ]  # fmt: skip


def test_encrypted_member(tmp_path):
    make_zip(tmp_path / "z.zip", [("secret", b"x" * 40)])
    data = bytearray((tmp_path / "z.zip").read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "z.zip").write_bytes(data)
    assert codes(listed(tmp_path)) == [("zip://secret", "ENCRYPTED")]


def test_member_of_a_name_twice(tmp_path):
    with pytest.warns(UserWarning):
        make_zip(tmp_path / "z.zip", [("a", b"first"), ("a", b"second")])
    make_tar(tmp_path / "t.tar", [("a", b"first"), ("a", b"second")], "w")
    found = listed(tmp_path)
    assert [c for _, c in codes(found)] == ["DUPLICATE_MEMBER"] * 2
    assert len({m.uri for m in found}) == 4
    assert [archive.open_uri(m.uri) for m in found if isinstance(m, archive.Member)] == [b"first"] * 2


def test_archive_in_an_archive(tmp_path):
    make_zip(tmp_path / "z.zip", [("inner.tar.gz", b"x"), ("inner.zip", b"x")])
    make_tar(tmp_path / "t.tar", [("inner.ZIP", b"x")], "w")
    assert [c for _, c in codes(listed(tmp_path))] == ["NESTED_ARCHIVE"] * 3
    (tmp_path / "other.7z").write_bytes(b"7z")
    assert codes(listed(tmp_path / "other.7z"))[0][1] == "UNSUPPORTED_ARCHIVE"


def test_zip_bomb_by_what_it_declares(tmp_path):
    make_zip(tmp_path / "big.zip", [("big", bytes(2 << 20))])
    assert codes(listed(tmp_path, SMALL)) == [("zip://big", "BOMB")]
    make_zip(tmp_path / "ratio.zip", [("zeros", bytes(40 << 20))])
    assert codes(listed(tmp_path / "ratio.zip", config.Catalog(max_ratio=100))) == [("zip://zeros", "BOMB")]


def test_zip_bomb_that_lies(tmp_path):
    """The directory says 100 bytes; the stream holds 64 MB."""
    make_zip(tmp_path / "z.zip", [("lie", bytes(64 << 20))])
    data = bytearray((tmp_path / "z.zip").read_bytes())
    central = data.index(b"PK\x01\x02")
    data[22:26] = data[central + 24 : central + 28] = struct.pack("<L", 100)
    (tmp_path / "z.zip").write_bytes(data)
    (member,) = listed(tmp_path)
    with pytest.raises(Refused, match="BROKEN_ARCHIVE"):
        member.read()


def test_overlapping_members(tmp_path):
    make_zip(tmp_path / "z.zip", [("a", b"x" * 1000), ("b", b"y" * 1000)], zipfile.ZIP_STORED)
    data = bytearray((tmp_path / "z.zip").read_bytes())
    second = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
    data[second + 42 : second + 46] = struct.pack("<L", 0)
    (tmp_path / "z.zip").write_bytes(data)
    assert codes(listed(tmp_path))[0][1] == "BOMB"


@pytest.mark.parametrize("mode, suffix", [("w:gz", "tar.gz"), ("w:bz2", "tar.bz2"), ("w:xz", "tar.xz")])
def test_tar_bomb_is_stopped_while_reading(tmp_path, mode, suffix):
    make_tar(tmp_path / f"t.{suffix}", [("ok", b"x"), ("zeros", bytes(80 << 20)), ("after", b"y")], mode)
    limits = config.Catalog(max_ratio=10)
    found = listed(tmp_path, limits)
    assert codes(found)[-1][1] == "BOMB" and "after" not in {m.uri.split("::")[0] for m in found}
    with pytest.raises(Refused, match="BOMB"):
        archive.open_uri(f"tar://zeros::file://{tmp_path}/t.{suffix}", limits)


def test_tar_header_that_claims_a_giant(tmp_path):
    """A long-name header of 8 GB would be read at once."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, (1 << 33) - 1
    (tmp_path / "t.tar.gz").write_bytes(gzip.compress(info.tobuf() + bytes(4096)))
    assert codes(listed(tmp_path))[0][1] in ("BOMB", "BROKEN_ARCHIVE")


@pytest.mark.parametrize("damage", ["cut", "header", "text", "empty"])
@pytest.mark.parametrize("name", ["z.zip", "t.tar", "t.tar.gz"])
def test_damaged_archive(tmp_path, name, damage):
    path = tmp_path / name
    files = [(f"f{n}", bytes([n]) * 600) for n in range(5)]
    make_zip(path, files, zipfile.ZIP_STORED) if name == "z.zip" else make_tar(path, files, "w:gz" if name.endswith("gz") else "w")
    data = path.read_bytes()
    if damage == "cut":
        data = data[: len(data) // 3]
    elif damage == "header":
        raw = bytearray(gzip.decompress(data) if name.endswith("gz") else data)
        at = raw.index(b"PK\x01\x02", raw.index(b"PK\x01\x02") + 4) if name == "z.zip" else 3 * 512
        raw[at : at + 200] = b"\xee" * 200
        data = gzip.compress(bytes(raw)) if name.endswith("gz") else bytes(raw)
    elif damage == "text":
        data = b"this is no archive" * 100
    else:
        data = b""
    path.write_bytes(data)
    found = listed(tmp_path)
    broken = codes(found)
    for member in found:
        if isinstance(member, archive.Member):
            try:
                member.read()
            except Refused as e:
                broken.append((member.uri, e.reason))
    assert broken and {c for _, c in broken} == {"BROKEN_ARCHIVE"}


@pytest.mark.parametrize("name", ["z.zip", "t.tar", "t.tar.gz"])
@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "stale"), FileNotFoundError(errno.ENOENT, "gone"), TimeoutError()])
def test_a_storage_that_fails_says_nothing_of_the_archive(tmp_path, monkeypatch, name, error):
    """Refused for a reason that may pass, wherever in the file it fails; a broken one stays refused."""
    files = [(n, np.random.default_rng(0).bytes(5000)) for n in ("a", "b")]
    if name.endswith("zip"):
        make_zip(tmp_path / name, files)
    else:
        make_tar(tmp_path / name, files, "w:gz" if name.endswith("gz") else "w")
    uris = [m.uri for m in listed(tmp_path)]
    failing = {"after": 0, "reads": 0}

    class Failing(io.FileIO):
        def readinto(self, buffer):
            failing["reads"] += 1
            if failing["reads"] > failing["after"]:
                raise error
            return super().readinto(buffer)

    def opened(url, mode="rb"):
        return io.BufferedReader(Failing(storage.local_path(url)), 512)

    monkeypatch.setattr(archive.storage, "open", opened)
    for failing["after"] in range(100):
        failing["reads"] = 0
        try:
            list(archive.read_many(uris))
            break
        except Refused as e:
            assert (e.reason, type(error).__name__ in e.message) == ("UNREADABLE", True), failing
    assert 3 <= failing["after"] < 99


def test_unsupported_zip_compression(tmp_path):
    make_zip(tmp_path / "z.zip", [("a", b"x" * 100)], zipfile.ZIP_BZIP2)
    assert codes(listed(tmp_path)) == [("zip://a", "UNSUPPORTED_COMPRESSION")]


def test_compressed_tar_is_not_quadratic(tmp_path):
    data = np.random.default_rng(0).bytes(20_000)
    counts = {}
    for count in (200, 800):
        path = make_tar(tmp_path / f"{count}.tar.gz", [(f"{n:04d}", data) for n in range(count)])
        (file,) = storage.walk(str(path))
        start = time.perf_counter()
        for member in archive.members(file):
            member.read()
        uris = [f"tar://{n:04d}::{file.uri}" for n in reversed(range(count))]
        assert sum(len(d) for _, d in archive.read_many(uris)) == count * len(data)
        counts[count] = time.perf_counter() - start
    assert counts[800] < 10 * counts[200]


def test_series_in_a_zip_and_a_tar(tmp_path):
    voxels = dicoms.stack((6, 5, 4))
    files = [(f"s/{n}.dcm", dicoms.encoded(ds)) for n, ds in enumerate(reversed(dicoms.series(voxels)))]
    make_zip(tmp_path / "z.zip", files)
    (volume,), rejections = formats.read_archive(str(tmp_path))
    assert rejections == [] and volume.sources[0] == f"zip://s/3.dcm::file://{tmp_path}/z.zip"
    np.testing.assert_array_equal(volume.array[0], voxels)
    make_tar(tmp_path / "t.tar.gz", files)
    (again,), rejections = formats.read_archive(str(tmp_path))
    assert [r.reason for r in rejections] == ["DUPLICATE_INSTANCE"] * 4
    np.testing.assert_array_equal(again.array, volume.array)


def test_digest_is_of_the_member(tmp_path):
    data = dicoms.encoded(dicoms.series(dicoms.stack())[0])
    make_zip(tmp_path / "z.zip", [("a.dcm", data)])
    (member,) = listed(tmp_path)
    instance = formats.read_instance(member)
    assert (instance.sha256, instance.bytes) == (hashlib.sha256(data).hexdigest(), len(data))


def test_member_without_a_name(tmp_path):
    make_zip(tmp_path / "z.zip", [("x", b"1")])
    data = (tmp_path / "z.zip").read_bytes()
    central = data.index(b"PK\x01\x02")
    name = central + 46  # not every byte that looks like it: the time of writing may hold one
    data = data[:26] + b"\0\0" + data[28:30] + data[31:central] + data[central:name] + data[name + 1 :]
    central -= 1
    data = data[: central + 28] + b"\0\0" + data[central + 30 :]
    end = data.index(b"PK\x05\x06")
    (tmp_path / "z.zip").write_bytes(data[: end + 12] + struct.pack("<LL", end - central, central) + data[end + 20 :])
    assert codes(listed(tmp_path)) == [("zip://", "BROKEN_ARCHIVE")]


def test_names_that_are_not_utf8(tmp_path):
    bad = os.fsdecode(b"bad\xff.bin")
    (tmp_path / bad).write_bytes(b"x")
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.GNU_FORMAT) as t:
        for name in (bad, "good"):
            info = tarfile.TarInfo(name)
            info.size = 1
            t.addfile(info, io.BytesIO(b"y"))
    found = listed(tmp_path)
    assert [c for _, c in codes(found)] == ["BAD_NAME"] * 2
    assert [m.uri for m in found if isinstance(m, Rejection)] == [
        f"file://{tmp_path}/bad\\udcff.bin",
        f"tar://bad\\udcff.bin::file://{tmp_path}/t.tar",
    ]
    assert [m.read() for m in found if isinstance(m, archive.Member)] == [b"y"]


def test_archives_in_a_folder_with_colons(tmp_path):
    folder = tmp_path / "a::b"
    folder.mkdir()
    make_zip(folder / "z.zip", FILES)
    make_tar(folder / "t.tar.gz", FILES)
    members = listed(tmp_path)
    assert [m.path.split("/", 2)[2] for m in members] == [n for n, _ in FILES] * 2
    assert [archive.open_uri(m.uri) for m in members] == [d for _, d in FILES] * 2


def test_an_archive_without_a_file_is_refused(tmp_path):
    make_zip(tmp_path / "nothing.zip", [])
    make_zip(tmp_path / "folders.zip", [("a/", b"")])
    make_tar(tmp_path / "nothing.tar.gz", [])
    assert [m.reason for m in listed(tmp_path)] == ["EMPTY_ARCHIVE"] * 3


def test_excluded_files_are_not_looked_at(tmp_path):
    for name in ("a/x.dcm", "a/thumbnails/y.dcm"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"text")
    limits = config.Catalog(exclude=("**/thumbnails/*",))
    assert [f.path for f in archive.files(str(tmp_path), limits)] == ["a/x.dcm"]
    _, rejections = formats.read_archive(str(tmp_path), limits)
    assert [r.uri for r in rejections] == [f"file://{tmp_path}/a/x.dcm"]
