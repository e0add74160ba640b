"""Plates of OME-Zarr: each plane read as its metadata say, with the values that the library of Zarr wrote; broken ones refused."""

import io
import json
import os
import pathlib
import shutil
import struct
import tarfile
import zipfile
import zlib

import fsspec
import numcodecs
import numpy as np
import pyarrow as pa
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec

from sparkmed import config, formats, storage
from sparkmed.formats import archive, raster, zarr_array
from sparkmed.hcs import fields
from sparkmed.rejection import Refused, Rejection

from .test_ome import damaged

VERSIONS = ["0.4", "0.5"]
UNITS = {"t": "second", "z": "micrometer", "y": "micrometer", "x": "micrometer"}
KINDS = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}


def group(path, version, attributes):
    path.mkdir(parents=True, exist_ok=True)
    if version == "0.4":
        (path / ".zgroup").write_text('{"zarr_format": 2}')
        (path / ".zattrs").write_text(json.dumps(attributes))
    else:
        ome = {"version": version} | attributes
        (path / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"ome": ome}}))


def edit(path, change, attributes=True):
    """Metadata of a group, or of an array, after ``change`` of them in place."""
    file = next(f for f in (path / "zarr.json", path / ".zarray", path / ".zattrs") if f.exists())
    said = json.loads(file.read_text())
    change(said["attributes"]["ome"] if attributes and file.name == "zarr.json" else said)
    file.write_text(json.dumps(said))


def image(path, version, array, axes, labels=None, name="0", transformations=None, **options):
    """An image of one resolution; ``options`` are those of :func:`zarr.create_array`."""
    scale = [{"type": "scale", "scale": [0.5 if a in "xy" else 1.0 for a in axes]}]
    listed = [{"name": a, "type": KINDS[a]} | ({"unit": UNITS[a]} if a in UNITS else {}) for a in axes]
    first = {"axes": listed, "datasets": [{"path": name, "coordinateTransformations": transformations or scale}]}
    first |= {"version": version} if version == "0.4" else {}
    omero = {"omero": {"channels": [{"label": x} for x in labels]}} if labels else {}
    group(path, version, {"multiscales": [first]} | omero)
    options = {"chunks": tuple(1 if a in "tcz" else 4 for a in axes), "zarr_format": 2 if version == "0.4" else 3} | options
    options.setdefault("config", {"write_empty_chunks": True})
    zarr.create_array(str(path / name), shape=array.shape, dtype=array.dtype, overwrite=True, **options)[...] = array


def plate(path, version, wells, axes="cyx", name="P7", rows="ABCDEFGH", columns=12, more=None, **options):
    """``wells``: arrays of the fields by path, such as ``{"B/3": [array, array]}``."""
    listed = [
        {"path": well, "rowIndex": rows.index(well.split("/")[0]), "columnIndex": int(well.split("/")[1]) - 1} for well in wells
    ]
    said = {"rows": [{"name": r} for r in rows], "columns": [{"name": str(c + 1)} for c in range(columns)], "wells": listed}
    said |= {"name": name} | (more or {}) | ({"version": version} if version == "0.4" else {})
    group(path, version, {"plate": said})
    for well, arrays in wells.items():
        group(path / well.split("/")[0], version, {})
        of_version = {"version": version} if version == "0.4" else {}
        group(path / well, version, {"well": {"images": [{"path": str(n)} for n in range(len(arrays))]} | of_version})
        for n, array in enumerate(arrays):
            image(path / well / str(n), version, array, axes, **options)
    return path


def pixels(*shape, dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(0, 250, shape).astype(dtype)


def packed(name):
    return name and numcodecs.get_codec({"id": name})


def small(tmp_path, version="0.4", **options):
    """A plate with two wells, in one of them two fields, of two channels."""
    wells = {"A/1": [pixels(2, 6, 7, seed=1), pixels(2, 6, 7, seed=2)], "C/12": [pixels(2, 6, 7, seed=3)]}
    return plate(tmp_path / "P7.zarr", version, wells, **options)


def listed(path, limits=None):
    return [m for f in archive.files(str(path), limits) for m in archive.members(f, limits)]


def read(member):
    return raster.read_array(member.read())[0, :, :, 0].T


def codes(path):
    """(what is before ``::``, reason) of what is refused, headers of planes included; and how many planes are read."""
    found, count = [], 0
    for m in listed(path):
        try:
            if isinstance(m, Rejection):
                found.append((m.uri.rpartition("::")[0].removeprefix("zarr://"), m.reason))
            else:
                formats.read_instance(m)
                count += 1
        except Refused as e:
            found.append((m.uri.rpartition("::")[0].removeprefix("zarr://"), e.reason))
    return sorted(found), count


STORED = [
    ("0.4", {"compressors": None}), ("0.4", {"dtype": ">u2"}), ("0.4", {"dtype": "f4", "order": "F"}), ("0.4", {"dtype": "?"}),
    ("0.5", {}), ("0.5", {"compressors": None, "dtype": "u1"}), ("0.5", {"compressors": BloscCodec(cname="lz4"), "dtype": "f8"}),
    ("0.5", {"compressors": GzipCodec(), "filters": [TransposeCodec(order=(4, 3, 2, 1, 0))]}),
    ("0.5", {"compressors": [ZstdCodec(checksum=True), Crc32cCodec()], "dtype": "i4"}),
    ("0.5", {"shards": (2, 2, 2, 8, 4), "dtype": "u2"}), ("0.5", {"shards": (1, 2, 4, 8, 8), "compressors": BloscCodec()}),
    ("0.5", {"chunk_key_encoding": {"name": "v2", "separator": "/"}}),
    ("0.5", {"chunk_key_encoding": {"name": "default", "separator": "."}}),
]  # fmt: skip


@pytest.mark.parametrize("version, options", STORED)
@pytest.mark.parametrize("chunks", [(1, 1, 1, 4, 4), (2, 2, 2, 4, 4)])
def test_each_plane_holds_what_was_written(tmp_path, version, options, chunks):
    options = dict(options)
    array = pixels(2, 2, 3, 6, 7).astype(options.pop("dtype", "u2"))
    if "shards" in options:
        chunks = (1, *chunks[1:3], 4, 4)
    plate(tmp_path / "P.zarr", version, {"A/1": [array]}, "tczyx", chunks=chunks, **options)
    members = listed(tmp_path)
    assert len(members) == 12
    for m in members:
        at = tuple(m.ome[a] - 1 for a in "tcz")
        assert m.uri == f"zarr://A/1/0/0?t={at[0]}&c={at[1]}&z={at[2]}::file://{tmp_path}/P.zarr"
        instance = formats.read_instance(m)
        assert instance.shape == (1, 7, 6, 1) and instance.transfer_syntax == "zarr" and instance.path == "P.zarr/A/1/0"
        found = read(m)
        assert np.array_equal(found, array[at]) and found.dtype.isnative
    assert dict(archive.read_many([m.uri for m in members])) == {n: m.read() for n, m in enumerate(members)}


@pytest.mark.parametrize("compressor", ["blosc", "zlib", "gzip", "zstd"])
@pytest.mark.parametrize("separator", "./")
def test_planes_of_the_compressors_of_zarr_v2(tmp_path, compressor, separator):
    array = pixels(2, 6, 7)
    keys = {"name": "v2", "separator": separator}
    plate(tmp_path / "P.zarr", "0.4", {"A/1": [array]}, compressors=packed(compressor), chunk_key_encoding=keys)
    said = json.loads((tmp_path / "P.zarr/A/1/0/0/.zarray").read_text())
    assert (said["compressor"]["id"], said["dimension_separator"]) == (compressor, separator)
    assert [np.array_equal(read(m), array[n]) for n, m in enumerate(listed(tmp_path))] == [True, True]


@pytest.mark.parametrize("axes", ["yx", "cyx", "zyx", "tyx", "czyx", "tzyx"])
def test_axes_may_be_absent(tmp_path, axes):
    array = pixels(*(2,) * (len(axes) - 2), 5, 6)
    plate(tmp_path / "P.zarr", "0.5", {"A/1": [array]}, axes)
    members = listed(tmp_path)
    assert len(members) == 2 ** (len(axes) - 2)
    for m in members:
        assert np.array_equal(read(m), array[tuple(m.ome[a] - 1 for a in axes[:-2])])
        assert not any(a in m.ome for a in "tcz" if a not in axes)


SPECIFIED = {  # after the examples of the specification, 0.4
    "": {"plate": {"acquisitions": [{"id": 1, "maximumfieldcount": 2}, {"id": 2, "maximumfieldcount": 2}], "field_count": 4,
                   "columns": [{"name": "1"}, {"name": "2"}, {"name": "3"}], "name": "test", "rows": [{"name": "A"}, {"name": "B"}],
                   "version": "0.4", "wells": [{"path": "B/3", "rowIndex": 1, "columnIndex": 2}]}},
    "B": {},
    "B/3": {"well": {"images": [{"acquisition": 1 + n // 2, "path": str(n)} for n in range(4)], "version": "0.4"}},
    **{f"B/3/{n}": {"multiscales": [{
        "axes": [{"name": a, "type": KINDS[a]} | ({"unit": UNITS[a]} if a in UNITS else {}) for a in "tczyx"],
        "coordinateTransformations": [{"scale": [0.1, 1.0, 2.0, 1.0, 1.0], "type": "scale"}],
        "datasets": [{"coordinateTransformations": [{"scale": [1.0, 1.0, 0.5, 0.5 * 2**k, 0.4 * 2**k], "type": "scale"},
                                                    {"translation": [0, 0, 7.0, 10.0, 20.0], "type": "translation"}],
                      "path": f"{k}"} for k in range(2)],
        "name": "example", "type": "gaussian", "version": "0.4"}],
        "omero": {"channels": [{"label": "LaminB1", "window": {"start": 0}}, {"color": "0000FF"}], "id": 1}} for n in range(4)},
}  # fmt: skip


def test_what_the_specification_says(tmp_path):
    top = tmp_path / "plates" / "5966.ome.zarr"
    arrays = [pixels(2, 2, 3, 8, 6, seed=n) for n in range(4)]
    for path, attributes in SPECIFIED.items():
        group(top / path, "0.4", attributes)
    for n, array in enumerate(arrays):
        for level, data in (("0", array), ("1", array[..., ::2, ::2])):
            options = {"chunks": (1, 1, 1, 8, 8), "zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}}
            where = str(top / f"B/3/{n}" / level)
            zarr.create_array(where, shape=data.shape, dtype=data.dtype, config={"write_empty_chunks": True}, **options)[...] = data
        group(top / f"B/3/{n}" / "labels", "0.4", {"labels": ["cells"]})
        group(top / f"B/3/{n}" / "labels" / "cells", "0.4", {"image-label": {"version": "0.4"}})
    group(top / "OME", "0.4", {"series": ["B/3/0"]})
    (top / "OME" / "METADATA.ome.xml").write_text("<OME/>")
    members = listed(tmp_path)
    assert len(members) == 4 * 12 and {m.container for m in members} == {top.as_uri()}
    common = {"plate": "test", "row": 2, "column": 3, "ngff": "0.4", "pixel_size_um": [0.4, 0.5]}
    first, last = members[0], members[-1]
    place = {"sample": 1, "acquisition": 1, "t": 1, "c": 1, "z": 1, "stage_um": [20, 10, 14]}
    assert first.ome == common | place | {"channel": "LaminB1"}
    assert last.ome == common | {"sample": 4, "acquisition": 2, "t": 2, "c": 2, "z": 3, "stage_um": [20, 10, 16]}
    assert np.array_equal(read(last), arrays[3][1, 1, 2])
    settings = config.Plates(channels={"Lamin": "LaminB1", "other": 2})
    found = fields.assemble([formats.read_instance(m) for m in members], settings)
    assert not found.rejections and not found.others and len(found.headers) == 4 * 2 * 3
    facts = found.headers[0].facts
    place = {"source": "ome-zarr", "plate": "test", "well": "B03", "row": 2, "column": 3, "site": 1, "z": 1, "t": 1}
    assert place.items() <= facts.items() and facts["stage_um"] == [20, 10, 14] and facts["pixel_size_um"] == [0.4, 0.5]
    volume = formats.read_volume(found.headers[-1])
    assert volume.array.shape == (2, 6, 8, 1) and volume.spacing[:2] == pytest.approx((0.0004, 0.0005))
    assert np.array_equal(volume.array[:, :, :, 0].transpose(0, 2, 1), arrays[3][1, :, 2])


@pytest.mark.parametrize(
    "rows, columns, wells, places",
    [
        ("ABCD", ["1", "2", "3"], ["B/3"], [(2, 3)]),
        ("B", ["03"], ["B/03"], [(2, 3)]),  # only what was acquired is listed
        (["1", "2"], ["0", "1"], ["2/1"], [(2, 2)]),
        (["top", "low"], ["left", "mid"], ["low/left"], [(2, 1)]),
        (["A", "AF"], ["1", "48"], ["AF/48"], [(32, 48)]),
    ],
)
def test_where_a_well_is(tmp_path, rows, columns, wells, places):
    top = tmp_path / "P.zarr"
    listed_wells = [
        {"path": w, "rowIndex": list(rows).index(w.split("/")[0]), "columnIndex": columns.index(w.split("/")[1])} for w in wells
    ]
    names = {"rows": [{"name": r} for r in rows], "columns": [{"name": c} for c in columns]}
    group(top, "0.5", {"plate": names | {"wells": listed_wells}})
    for well in wells:
        group(top / well, "0.5", {"well": {"images": [{"path": "0"}]}})
        image(top / well / "0", "0.5", pixels(5, 6), "yx")
    assert [(m.ome["row"], m.ome["column"]) for m in listed(tmp_path)] == places


def test_a_plate_without_a_name_has_that_of_its_folder(tmp_path):
    for name in ("P1.zarr", "P2.ome.zarr"):
        plate(tmp_path / "x" / name, "0.4", {"A/1": [pixels(1, 5, 6, seed=len(name))]}, name=None)
    settings = config.Plates(channels={"DNA": 1})
    groups = {name: [formats.read_instance(m) for m in listed(tmp_path) if name in m.uri] for name in ("P1.", "P2.")}
    assert [fields.assemble(g, settings).headers[0].facts["plate"] for g in groups.values()] == ["P1", "P2"]


def test_planes_are_no_volumes_of_their_own(tmp_path):
    small(tmp_path)
    headers, refused = formats.read_headers(str(tmp_path))
    assert headers == [] and [r.reason for r in refused] == ["MULTI_PAGE"] * 6


# one container


def stamp(path):
    (file,) = archive.files(str(path))
    return file.size, file.mtime_ns


def test_a_plate_is_one_file_in_the_order_of_others(tmp_path):
    small(tmp_path)
    for name in ("P7.zarr-old.txt", "P7.zarr.txt", "P7.zar", "P8.txt", "sub/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = list(archive.files(str(tmp_path)))
    assert [f.path for f in found] == sorted(f.path for f in found) and [f.path for f in found if f.folder] == ["P7.zarr"]
    sizes = sum(f.stat().st_size for f in (tmp_path / "P7.zarr").rglob("*") if f.is_file())
    assert next(f for f in found if f.folder).size == sizes
    (alone,) = archive.files(str(tmp_path / "P7.zarr"))
    assert (alone.uri, alone.path) == (f"file://{tmp_path}/P7.zarr", "P7.zarr")
    assert not any(f.folder for f in storage.walk(str(tmp_path)))  # unless it is asked for
    assert [f.path for f in archive.files(str(tmp_path), config.Catalog(exclude=("*.zarr", "*.txt")))] == ["P7.zar", "sub/x.txt"]


def change_chunk(path):
    chunk = path / "A/1/0/0/0.0.0"
    chunk.write_bytes(chunk.read_bytes()[::-1])


def exchange_chunks(path):
    """Same bytes in all, and no newer time."""
    a, b = path / "A/1/0/0/0.0.0", path / "A/1/0/0/0.0.1"
    os.rename(a, path / "c"), os.rename(b, a), os.rename(path / "c", b)


@pytest.mark.parametrize(
    "change",
    [
        change_chunk, exchange_chunks, lambda p: (p / "A/1/0/0/0.0.0").unlink(), lambda p: (p / "A/1/0/0/9.9.9").write_bytes(b""),
        lambda p: (p / "A/1/.zattrs").write_text("{}"), lambda p: shutil.rmtree(p / "C"),
    ],
)  # fmt: skip
def test_any_change_below_it_is_one_of_the_plate(tmp_path, change):
    path = small(tmp_path)
    before = stamp(path)
    assert stamp(path) == before
    change(path)
    assert stamp(path) != before


def test_a_plate_far_away_is_the_same_one(tmp_path):
    small(tmp_path, "0.5", shards=(2, 8, 8), chunks=(1, 4, 4))
    small(tmp_path / "more", "0.4", compressors=None)
    far = fsspec.filesystem("memory")
    far.put(str(tmp_path) + "/", "/ome_zarr/", recursive=True)
    try:
        near, there = listed(tmp_path), listed("memory://ome_zarr")
        assert [m.uri.partition("::")[0] for m in near] == [m.uri.partition("::")[0] for m in there] and len(near) == 12
        assert [m.read() for m in near] == [m.read() for m in there] == [archive.open_uri(m.uri) for m in there]
        before = stamp("memory://ome_zarr/P7.zarr")
        far.rm("/ome_zarr/P7.zarr/A/1/0/0/c/0/0/0")
        assert stamp("memory://ome_zarr/P7.zarr") != before
        reasons = {r for _, r in codes("memory://ome_zarr/P7.zarr")[0]}
        assert reasons == {"MISSING_CHUNK"}
    finally:
        far.rm("/ome_zarr", recursive=True)


def test_parts_together_are_the_whole(tmp_path, monkeypatch):
    path = small(tmp_path)
    (path / "stray.txt").write_text("x")
    (file,) = archive.files(str(path))
    assert list(archive.parts(file)) == [file]
    monkeypatch.setattr(archive, "PART_BYTES", file.size // 3)
    parts = list(archive.parts(file))
    assert [p.part for p in parts] == [(n, 4) for n in range(4)] and {p.size for p in parts} == {file.size}
    found = [m.uri for p in parts for m in archive.members(p)]
    assert sorted(found) == sorted(m.uri for m in archive.members(file)) and len(found) == 7


def test_without_the_package_a_plate_is_refused_once_and_taken_up_when_it_is_there(tmp_path, monkeypatch):
    path = small(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(zarr_array, "is_installed", lambda: False)
        assert stamp(path) == (0, 0)
        (refused,) = listed(path)
    assert refused.reason == "NOT_INSTALLED" and "sparkmed[zarr]" in refused.message and refused.uri == path.as_uri()
    (file,) = archive.files(str(path))
    assert file.size and archive.readable(file) == file
    member = next(iter(archive.members(file)))
    monkeypatch.setattr(zarr_array, "is_installed", lambda: False)
    with pytest.raises(Refused, match="NOT_INSTALLED"):  # of an executor without it
        raster.read_array(member.read())


def test_a_folder_of_another_name_is_no_plate_and_the_reason_says_so(tmp_path):
    small(tmp_path).rename(tmp_path / "plate")
    _, refused = formats.read_headers(str(tmp_path))
    assert {r.reason for r in refused} == {"UNKNOWN_FORMAT"}
    assert "names end with .zarr" in next(r.message for r in refused if r.uri.endswith("plate/.zattrs"))


# digests


def digests(path):
    return {m.uri.partition("::")[0]: formats.read_instance(m).sha256 for m in listed(path)}


def test_a_digest_is_of_the_pixels_alone(tmp_path):
    array = pixels(3, 2, 6, 7)
    one = digests(plate(tmp_path / "a.zarr", "0.5", {"A/1": [array[:2]]}, "tcyx", name="one"))
    two = digests(plate(tmp_path / "b.zarr", "0.5", {"A/1": [array]}, "tcyx", name="two"))  # a time later
    assert one.items() <= two.items() and len(set(two.values())) == 6
    other = plate(tmp_path / "c.zarr", "0.5", {"A/1": [array]}, "tcyx")
    chunk = other / "A/1/0/0/c/2/1/0/0"
    chunk.write_bytes((other / "A/1/0/0/c/2/1/1/1").read_bytes())
    changed = digests(other)
    assert {k for k in two if two[k] != changed[k]} == {"zarr://A/1/0/0?t=2&c=1"}


def test_a_plane_that_changed_is_not_read_for_the_old_one(tmp_path):
    path = small(tmp_path)
    found = fields.assemble([formats.read_instance(m) for m in listed(path)], config.Plates(channels={"a": 1, "b": 2}))
    (path / "A/1/0/0/1.0.0").write_bytes((path / "A/1/0/0/1.0.1").read_bytes())
    with pytest.raises(Refused, match="CHANGED"):
        formats.read_volume(found.headers[0])
    assert formats.read_volume(found.headers[1]).array.shape == (2, 7, 6, 1)


# what is broken


def of_plate(**changes):
    return lambda p: edit(p, lambda s: s["plate"].update(changes))


def of_well(change):
    return lambda p: edit(p / "A/1", lambda s: change(s["well"]))


def of_image(change):
    return lambda p: edit(p / "A/1/0", lambda s: change(s["multiscales"][0]))


def of_array(**changes):
    return lambda p: edit(p / "A/1/0/0", lambda s: s.update(changes), False)


def first_well(**changes):
    return lambda p: edit(p, lambda s: s["plate"]["wells"][0].update(changes))


def shards(**changes):
    index = [{"name": "bytes", "configuration": {"endian": "little"}}]
    said = {"chunk_shape": [1, 2, 2], "codecs": [{"name": "bytes"}], "index_codecs": index} | changes
    return of_array(codecs=[{"name": "sharding_indexed", "configuration": said}])


def pairs(refused):
    return sorted((r.rpartition(" ")[0], r.rpartition(" ")[2]) for r in refused.split(", "))


MOVED = "coordinateTransformations"
A, C = [{"path": "A/1", "rowIndex": 0, "columnIndex": 0}], [{"path": "C/12", "rowIndex": 2, "columnIndex": 11}]
BROKEN = {  # what is refused, why; the other planes of 6 are read
    "no json": (lambda p: (p / ".zattrs").write_text("{"), "BROKEN_ZARR", 0),
    "deep json": (lambda p: (p / ".zattrs").write_text("[" * 99999), "BROKEN_ZARR", 0),
    "a list": (lambda p: (p / ".zattrs").write_text("[]"), "BROKEN_ZARR", 0),
    "no metadata": (lambda p: [(p / n).unlink() for n in (".zattrs", ".zgroup")], "BROKEN_ZARR", 0),
    "other version": (of_plate(version="0.3"), "OTHER_VERSION", 0),
    "newer version": (of_plate(version=6), "OTHER_VERSION", 0),
    "image of a version": (of_image(lambda s: s.update(version="0.3")), "A/1/0 OTHER_VERSION", 4),
    "rows are a text": (of_plate(rows="ABC"), "BROKEN_ZARR", 0),
    "rows twice": (of_plate(rows=[{"name": "A"}] * 3), "BROKEN_ZARR", 0),
    "no wells": (of_plate(wells=[]), "BROKEN_ZARR", 0),
    "too many wells": (of_plate(wells=A * 2000), "BROKEN_ZARR", 0),
    "name": (of_plate(name=["P"]), "BROKEN_ZARR", 0),
    "long name": (of_plate(name="P" * 201), "BROKEN_ZARR", 0),
    "well twice": (of_plate(wells=A + A + C), "A/1 BROKEN_ZARR", 2),
    "well not listed": (of_plate(wells=C), "A/1 NOT_IN_INDEX", 2),
    "row outside": (first_well(path="J/1"), "A/1 NOT_IN_INDEX, J/1 BROKEN_ZARR", 2),
    "column outside": (first_well(path="A/13"), "A/1 NOT_IN_INDEX, A/13 BROKEN_ZARR", 2),
    "index contradicts": (first_well(rowIndex=1), "A/1 BROKEN_ZARR", 2),
    "well escapes": (first_well(path="../1"), "A/1 NOT_IN_INDEX, wells[0] ESCAPES_FOLDER", 2),
    "well is absolute": (first_well(path="/etc"), "A/1 NOT_IN_INDEX, wells[0] ESCAPES_FOLDER", 2),
    "well is a number": (first_well(path=3), "A/1 NOT_IN_INDEX, wells[0] BROKEN_ZARR", 2),
    "well is none": (of_plate(wells=[None, *C]), "A/1 NOT_IN_INDEX, wells[0] BROKEN_ZARR", 2),
    "well beyond": (
        of_plate(columns=[{"name": str(n + 1)} for n in range(99)], wells=[*A, {"path": "C/12"}, {"path": "A/49"}]),
        "A/49 BAD_WELL", 6,
    ),
    "well missing": (lambda p: shutil.rmtree(p / "A/1"), "A/1 MISSING_FILE", 2),
    "well metadata": (lambda p: (p / "A/1/.zattrs").write_text("\xff"), "A/1 BROKEN_ZARR", 2),
    "well without": (lambda p: (p / "A/1/.zattrs").write_text("{}"), "A/1 BROKEN_ZARR", 2),
    "no images": (of_well(lambda s: s.update(images=[])), "A/1 BROKEN_ZARR", 2),
    "too many images": (of_well(lambda s: s.update(images=[{}] * 10_001)), "A/1 TOO_LARGE", 2),
    "image twice": (of_well(lambda s: s["images"].append({"path": "1"})), "A/1/1 BROKEN_ZARR", 4),
    "image not named": (of_well(lambda s: s["images"].pop(0)), "A/1/0 NOT_IN_INDEX", 4),
    "image missing": (of_well(lambda s: s["images"].append({"path": "7"})), "A/1/7 MISSING_FILE", 6),
    "image escapes": (of_well(lambda s: s["images"].append({"path": "../../C/12/0"})), "A/1 ESCAPES_FOLDER", 6),
    "image is odd": (of_well(lambda s: s["images"].append(5)), "A/1 BROKEN_ZARR", 6),
    "acquisition": (
        lambda p: (of_plate(acquisitions=[{"id": 1}])(p), of_well(lambda s: s["images"][0].update(acquisition=2))(p)),
        "A/1/0 BROKEN_ZARR", 4,
    ),
    "no multiscales": (lambda p: edit(p / "A/1/0", lambda s: s.pop("multiscales")), "A/1/0 BROKEN_ZARR", 4),
    "axes of 0.3": (of_image(lambda s: s.update(axes=["c", "y", "x"])), "A/1/0 BROKEN_ZARR", 4),
    "axes in another order": (of_image(lambda s: s["axes"].reverse()), "A/1/0 BAD_AXES", 4),
    "axes unknown": (of_image(lambda s: s["axes"][0].update(name="tile")), "A/1/0 BAD_AXES", 4),
    "axes of another kind": (of_image(lambda s: s["axes"][0].update(type="space")), "A/1/0 BAD_AXES", 4),
    "axes too few": (of_image(lambda s: (s["axes"].pop(0), s["datasets"][0].pop(MOVED))), "A/1/0 BROKEN_ZARR", 4),
    "no datasets": (of_image(lambda s: s.update(datasets=[])), "A/1/0 BROKEN_ZARR", 4),
    "array missing": (of_image(lambda s: s["datasets"][0].update(path="s0")), "A/1/0 MISSING_FILE", 4),
    "array escapes": (of_image(lambda s: s["datasets"][0].update(path="../1/0")), "A/1/0 ESCAPES_FOLDER", 4),
    "scale": (of_image(lambda s: s.update({MOVED: [{"type": "scale", "scale": [1]}]})), "A/1/0 BROKEN_ZARR", 4),
    "scale of nothing": (of_image(lambda s: s.update({MOVED: [{"type": "scale", "scale": [1, 0, 1]}]})), "A/1/0 BROKEN_ZARR", 4),
    "scale of all": (of_image(lambda s: s.update({MOVED: [{"type": "scale", "scale": [1, 1, 10**400]}]})), "A/1/0 BROKEN_ZARR", 4),
    "channels": (lambda p: edit(p / "A/1/0", lambda s: s.update(omero={"channels": [{"label": "a"}]})), "A/1/0 BROKEN_ZARR", 4),
    "billions": (of_array(shape=[2, 10**6, 10**6]), "A/1/0 TOO_LARGE", 4),
    "billions of planes": (of_array(shape=[10**9, 6, 7]), "A/1/0 TOO_LARGE", 4),
    "large chunks": (of_array(chunks=[1, 10**5, 10**5]), "A/1/0 TOO_LARGE", 4),
    "small chunks": (of_array(shape=[2, 6000, 6000], chunks=[1, 1, 1]), "A/1/0 TOO_LARGE", 4),
    "no shape": (of_array(shape=[]), "A/1/0 BROKEN_ZARR", 4),
    "shape is odd": (of_array(shape=[2, -6, True]), "A/1/0 BROKEN_ZARR", 4),
    "six axes": (of_array(shape=[1] * 6, chunks=[1] * 6), "A/1/0 BROKEN_ZARR", 4),
    "chunks are odd": (of_array(chunks=[1, 4]), "A/1/0 BROKEN_ZARR", 4),
    "type": (of_array(dtype="<c8"), "A/1/0 BAD_TYPE", 4),
    "structured": (of_array(dtype=[["a", "<u2"]]), "A/1/0 BAD_TYPE", 4),
    "objects": (of_array(dtype="|O", filters=[{"id": "pickle"}]), "A/1/0 BAD_TYPE", 4),
    "compressor": (of_array(compressor={"id": "lzma"}), "A/1/0 NO_DECODER", 4),
    "compressor is odd": (of_array(compressor=["zstd"]), "A/1/0 BROKEN_ZARR", 4),
    "filters": (of_array(filters=[{"id": "pickle"}]), "A/1/0 NO_DECODER", 4),
    "separator": (of_array(dimension_separator="../"), "A/1/0 BROKEN_ZARR", 4),
    "zarr 4": (of_array(zarr_format=4), "A/1/0 BROKEN_ZARR", 4),
    "stray files": (lambda p: [(p / n).write_text("x") for n in ("a.txt", "A/b.dcm", "A/1/Thumbs.db")],
                    "A/1/Thumbs.db UNKNOWN_FORMAT, A/b.dcm UNKNOWN_FORMAT, a.txt UNKNOWN_FORMAT", 6),
    "stray folder": (lambda p: (p / "old").mkdir(), "old NOT_IN_INDEX", 6),
    "another shape": (of_array(shape=[2, 60, 70]), "A/1/0/0?c=0 MISSING_CHUNK, A/1/0/0?c=1 MISSING_CHUNK", 4),
    "all chunks": (lambda p: [f.unlink() for f in (p / "C/12/0/0").glob("[01]*")],
                   "C/12/0/0?c=0 MISSING_CHUNK, C/12/0/0?c=1 MISSING_CHUNK", 4),
    "a chunk": (lambda p: (p / "C/12/0/0/1.1.1").unlink(), "C/12/0/0?c=1 MISSING_CHUNK", 5),
    "an empty chunk": (lambda p: (p / "C/12/0/0/1.1.1").write_bytes(b""), "C/12/0/0?c=1 TRUNCATED", 5),
    "a long chunk": (lambda p: (p / "C/12/0/0/1.1.1").write_bytes(bytes(99999)), "C/12/0/0?c=1 BOMB", 5),
    "a folder for a chunk": (
        lambda p: ((p / "C/12/0/0/1.1.1").unlink(), (p / "C/12/0/0/1.1.1").mkdir()), "C/12/0/0?c=1 UNREADABLE", 5,
    ),
    "another type": (of_array(dtype="<u4"), "A/1/0/0?c=0 BROKEN_PICTURE, A/1/0/0?c=1 BROKEN_PICTURE", 4),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_refused_by_name_and_the_rest_is_read(tmp_path, what):
    spoil, refused, planes = BROKEN[what]
    path = small(tmp_path)
    spoil(path)
    assert codes(path) == (pairs(refused), planes)


BROKEN_3 = {
    "array at the top": (lambda p: edit(p, lambda s: s.update(node_type="array"), False), "BROKEN_ZARR", 0),
    "version": (lambda p: edit(p, lambda s: s.update(version="0.6")), "OTHER_VERSION", 0),
    "version of a well": (lambda p: edit(p / "A/1", lambda s: s.update(version="0.4")), "A/1 OTHER_VERSION", 2),
    "a group for an array": (of_array(node_type="group"), "A/1/0 BROKEN_ZARR", 4),
    "type": (of_array(data_type="string"), "A/1/0 BAD_TYPE", 4),
    "grid": (of_array(chunk_grid={"name": "rectilinear"}), "A/1/0 NO_DECODER", 4),
    "keys": (of_array(chunk_key_encoding={"name": "suffix"}), "A/1/0 NO_DECODER", 4),
    "codec": (of_array(codecs=[{"name": "bytes"}, {"name": "lzma"}]), "A/1/0 NO_DECODER", 4),
    "no codecs": (of_array(codecs=[]), "A/1/0 NO_DECODER", 4),
    "codecs are odd": (of_array(codecs=[None]), "A/1/0 BROKEN_ZARR", 4),
    "shards in shards": (shards(codecs=[{"name": "sharding_indexed"}]), "A/1/0 NO_DECODER", 4),
    "shards of thirds": (shards(chunk_shape=[1, 3, 3]), "A/1/0 BROKEN_ZARR", 4),
    "packed index": (shards(index_codecs=[{"name": "gzip"}]), "A/1/0 NO_DECODER", 4),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN_3)
def test_what_is_broken_on_zarr_v3(tmp_path, what):
    spoil, refused, planes = BROKEN_3[what]
    path = small(tmp_path, "0.5")
    spoil(path)
    assert codes(path) == (pairs(refused), planes)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_image_is_no_plate_and_is_said_to_be_one(tmp_path, version):
    image(tmp_path / "image.zarr", version, pixels(2, 6, 7), "cyx")
    (refused,) = listed(tmp_path)
    assert (refused.uri, refused.reason) == ((tmp_path / "image.zarr").as_uri(), "NOT_A_PLATE") and "an image" in refused.message


def test_links_are_not_followed(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(32))
    path = small(tmp_path, compressors=None)
    chunk = path / "C/12/0/0/0.0.0"
    chunk.unlink(), chunk.symlink_to(tmp_path / "secret")
    shutil.move(path / "A/1/1", tmp_path / "elsewhere")
    (path / "A/1/1").symlink_to(tmp_path / "elsewhere")
    assert codes(path) == ([("A/1/1", "LINK"), ("C/12/0/0?c=0", "LINK")], 3)
    shutil.move(path / "C", tmp_path / "row")
    (path / "C").symlink_to(tmp_path / "row")
    assert codes(path) == ([("A/1/1", "LINK"), ("C", "LINK"), ("C/12", "LINK")], 2)


SHARDED = {
    "gone": (lambda f, d: f.unlink(), "MISSING_CHUNK"),
    "cut": (lambda f, d: f.write_bytes(d[:-1]), "TRUNCATED"),
    "short": (lambda f, d: f.write_bytes(d[-9:]), "TRUNCATED"),
    "start cut": (lambda f, d: f.write_bytes(d[len(d) // 2 :]), "TRUNCATED"),
    "index changed": (lambda f, d: f.write_bytes(d[:-30] + bytes([d[-30] ^ 1]) + d[-29:]), "TRUNCATED"),
}


@pytest.mark.parametrize("what", SHARDED)
def test_shards_that_are_broken(tmp_path, what):
    path = small(tmp_path, "0.5", shards=(2, 8, 8), chunks=(1, 4, 4))
    shard = path / "C/12/0/0/c/0/0/0"
    SHARDED[what][0](shard, shard.read_bytes())
    assert codes(path) == ([(f"C/12/0/0?c={c}", SHARDED[what][1]) for c in range(2)], 4)


def test_a_chunk_that_a_shard_does_not_hold_is_missing(tmp_path):
    array = pixels(2, 6, 7)
    array[1, :4, :4] = 0
    options = {"shards": (2, 8, 8), "chunks": (1, 4, 4), "config": {"write_empty_chunks": False}}
    path = plate(tmp_path / "P.zarr", "0.5", {"A/1": [array]}, **options)
    assert codes(path) == ([("A/1/0/0?c=1", "MISSING_CHUNK")], 1)


BOMB = 4 << 20


def blosc_bomb(data):
    return data[:4] + struct.pack("<I", BOMB) + data[8:]


@pytest.mark.parametrize(
    "compressor, bomb, reason",
    [
        ("blosc", lambda d: d[:-3], "TRUNCATED"), ("blosc", lambda d: d[:9], "TRUNCATED"), ("blosc", blosc_bomb, "BOMB"),
        ("zstd", lambda d: d[:-3], "TRUNCATED"), ("zstd", lambda d: pa.compress(bytes(BOMB), "zstd", asbytes=True), "BOMB"),
        ("zstd", lambda d: d + d, "BOMB"), ("zstd", lambda d: b"x" * 20, "BROKEN_PICTURE"),
        ("zstd", lambda d: d + b"x", "TRUNCATED"),
        ("zlib", lambda d: d[:-6], "BROKEN_PICTURE"), ("zlib", lambda d: zlib.compress(bytes(BOMB)), "BOMB"),
        ("gzip", lambda d: d[:-9], "BROKEN_PICTURE"), ("gzip", lambda d: d + d, "BOMB"),
        ("gzip", lambda d: d[:5] + b"x", "BROKEN_PICTURE"),
        (None, lambda d: d[:-1], "TRUNCATED"), (None, lambda d: d + b"x", "BOMB"),
    ],
)  # fmt: skip
def test_chunks_that_are_not_what_they_should_be(tmp_path, compressor, bomb, reason):
    options = {"chunks": (50, 100), "compressors": packed(compressor)}
    path = plate(tmp_path / "P.zarr", "0.4", {"A/1": [pixels(100, 100)]}, "yx", **options)
    chunk = path / "A/1/0/0/1.0"
    chunk.write_bytes(bomb(chunk.read_bytes()))
    (member,) = listed(path)
    with pytest.raises(Refused) as e:
        raster.read_array(member.read())
    assert e.value.reason == reason


def test_zstd_that_does_not_say_how_long_it_is(tmp_path):
    array = pixels(50, 100)
    path = plate(tmp_path / "P.zarr", "0.4", {"A/1": [array]}, "yx", chunks=(50, 100), compressors=packed("zstd"))
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(array.tobytes())
    data = out.getvalue().to_pybytes()
    size, said = zarr_array._zstd_size(data)
    assert size >= array.nbytes and not said
    (path / "A/1/0/0/0.0").write_bytes(data)
    (member,) = listed(path)
    assert np.array_equal(read(member), array)


def test_every_cut_and_flip_of_a_plane_is_refused_or_read(tmp_path):
    path = small(tmp_path, "0.5", compressors=[BloscCodec(), Crc32cCodec()])
    for some in damaged(listed(path)[0].read(), 40, 80):
        try:
            raster.read_header(io.BytesIO(some), len(some), "zarr")
            assert raster.read_array(some).ndim == 4
        except Refused:
            continue


@pytest.mark.parametrize("version", VERSIONS)
def test_metadata_whose_values_are_of_any_kind_are_refused_or_read(tmp_path, version):
    path = small(tmp_path, version)
    names = [n for n in (".zattrs", "zarr.json", ".zarray") for n in path.rglob(n)]
    texts = {n: json.loads(n.read_text()) for n in names}

    def places(value, at=()):
        yield at
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, one in inner:
            yield from places(one, (*at, key))

    looked_at = {n: s for n, s in texts.items() if "C/12/0" in str(n) or n.parent in (path, path / "C/12")}
    everything = [(n, at) for n, said in looked_at.items() for at in places(said) if at]
    draw = np.random.default_rng(0)
    for n in draw.choice(len(everything), 60, replace=False):
        file, at = everything[n]
        said = json.loads(json.dumps(texts[file]))
        *above, last = at
        where = said
        for key in above:
            where = where[key]
        where[last] = [None, -1, 1e308, "x/../y", [], {}, [[[]]], True, "\udcff"][draw.integers(9)]
        file.write_text(json.dumps(said))
        found, count = codes(path)
        assert len(found) + count > 0
        file.write_text(json.dumps(texts[file]))
    assert codes(path) == ([], 6)


def test_urls_that_nobody_wrote_lead_nowhere(tmp_path):
    (tmp_path / "outside.zarr").mkdir()
    uri = small(tmp_path).as_uri()
    names = ["../x/0?c=0", "A/1/0/0?c=9", "A/1/0/0", "A/1/0/0?c=0&z=0", "A/1/0/7?c=0", "A/1/0/0?c=x", "A/1//0?c=0", "A/1/0/0?c=-1"]
    for name in names:
        with pytest.raises(Refused):
            archive.open_uri(f"zarr://{name}::{uri}")


# in archives


def test_in_an_archive_it_is_refused_once(tmp_path):
    files = [(f, f.relative_to(tmp_path)) for f in sorted(small(tmp_path / "in").rglob("*")) if f.is_file()]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z, tarfile.open(tmp_path / "b.tar.gz", "w:gz") as t:
        z.writestr("other.txt", b"x")
        for file, name in files:
            z.write(file, name)
            t.add(file, str(name))
    for name in ("c.zip", "d.ozx"):
        with zipfile.ZipFile(tmp_path / name, "w") as z:
            for file, path in files:
                z.write(file, pathlib.Path(*path.parts[2:]))
    shutil.rmtree(tmp_path / "in")
    found = listed(tmp_path)
    assert [(m.uri, m.reason) for m in found if isinstance(m, Rejection)] == [
        (f"zip://in/P7.zarr::file://{tmp_path}/a.zip", "NESTED_ARCHIVE"),
        (f"tar://in/P7.zarr::file://{tmp_path}/b.tar.gz", "NESTED_ARCHIVE"),
        (f"file://{tmp_path}/c.zip", "UNSUPPORTED_ARCHIVE"),
        (f"file://{tmp_path}/d.ozx", "UNSUPPORTED_ARCHIVE"),
    ]
    assert [m.path for m in found if not isinstance(m, Rejection)] == ["a.zip/other.txt"]


def test_texts_of_no_encoding_can_be_written(tmp_path):
    path = small(tmp_path, labels=["a", "\ud800"], name="P\udcff")
    members = listed(path)
    assert json.dumps([m.ome for m in members], ensure_ascii=False).encode()
    assert (members[1].ome["plate"], members[1].ome["channel"]) == ("P\\udcff", "\\ud800")


def test_names_that_are_not_utf8(tmp_path):
    path = small(tmp_path)
    (path / os.fsdecode(b"bad\xff")).write_bytes(b"x")
    before = stamp(path)
    assert stamp(path) == before and codes(path) == ([("bad\\udcff", "UNKNOWN_FORMAT")], 6)
