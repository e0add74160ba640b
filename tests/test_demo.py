"""The demo: what its archive promises, and the whole path on it with real engines."""

import gzip
import io
import pathlib
import re
import zipfile
from collections import Counter
from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest

from sparkmed import cli, config, demo, formats, storage, tables, tracking
from sparkmed.imaging import phantom, splits


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> pathlib.Path:
    """The folder of a demo whose archive is written and nothing else."""
    folder = tmp_path_factory.mktemp("demo")
    demo.write_archive(str(folder))
    return folder


def identifying() -> Callable[[bytes], re.Match | None]:
    """Finds what stands in the DICOM headers about patients; a date only where it is no part of a longer number or digest."""
    patients = [demo.patient(n) for n in range(1, 31)]
    words = {v for p in patients for v in (*p.name.split("^"), p.id, p.accession)}
    days = {p.birth_date for p in patients}
    dates = {rf"(?<![0-9a-f.]){day}(?![0-9a-f])" for day in days}
    expression = re.compile("|".join(sorted({re.escape(w) for w in words} | dates)).encode())
    plain = [w.encode() for w in words | days]  # the expression alone takes a second for a megabyte
    return lambda data: expression.search(data) if any(w in data for w in plain) else None


def test_volumes_are_the_phantoms_whatever_the_order_of_their_files(archive):
    volumes, _ = formats.read_archive(str(archive / "archive" / "ct"))
    assert len(volumes) == 14
    found = {min(v.sources).rsplit("/ct/")[-1].split("/")[0].split(".")[0]: v for v in volumes}
    for number in (1, 9, 12):  # zip, folder, tar.gz
        image, _ = phantom.ct(number, demo.SHAPE, demo.SPACING, organs=2, noise=30.0)
        volume = found[demo.code(number)]
        np.testing.assert_array_equal(volume.array, image.array)
        np.testing.assert_allclose(volume.affine, image.affine, atol=1e-6)


def test_instance_numbers_and_names_say_nothing_about_positions(archive):
    with zipfile.ZipFile(archive / "archive" / "ct" / "P01.zip") as f:
        slices = [pydicom.dcmread(io.BytesIO(f.read(n))) for n in f.namelist()]
    heights = [float(s.ImagePositionPatient[2]) for s in slices]
    assert heights != sorted(heights)
    by_number = [h for _, h in sorted((s.InstanceNumber, h) for s, h in zip(slices, heights, strict=True))]
    assert by_number != sorted(heights) and by_number != sorted(heights, reverse=True)
    assert str(slices[0].PatientName) == demo.patient(1).name


def test_broken_files_are_refused_for_what_they_are(archive):
    _, rejections = formats.read_headers(str(archive / "archive"))
    found = Counter(r.reason for r in rejections)
    assert found == {
        "GANTRY_TILT": 12, "MISSING_SLICE": 11, "UNKNOWN_FORMAT": 2, "TRUNCATED": 1, "ENCRYPTED": 1, "ESCAPES_FOLDER": 1,
        "DUPLICATE_INSTANCE": 1, "NOT_AN_IMAGE": 1,
    }  # fmt: skip


def test_the_archive_is_a_pure_function_of_the_seed(archive, tmp_path):
    demo.write_archive(str(tmp_path))
    files = sorted(p.relative_to(archive) for p in (archive / "archive").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path) for p in (tmp_path / "archive").rglob("*") if p.is_file())
    assert all((archive / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)


def test_every_split_has_subjects_of_both_formats(archive):
    settings = config.load(str(archive / "demo.yaml"))
    of = Counter()
    for number in range(1, 25):
        subject = splits.pseudonym(demo.code(number), (archive / "key").read_bytes())
        of[splits.split_of(subject, settings.volumes.splits), number in demo.SINGLE] += 1
    assert set(of) == {(s, nifti) for s in ("train", "val", "test") for nifti in (False, True)}


def test_what_is_there_stays(archive):
    before = {p: p.stat().st_mtime_ns for p in archive.rglob("*")}
    demo.write_archive(str(archive), seed=7)
    assert {p: p.stat().st_mtime_ns for p in archive.rglob("*")} == before


@pytest.fixture(scope="module")
def done(archive, spark):
    """The demo after a first run; the archive is the one above."""
    assert cli.main(["demo", str(archive)]) == 0
    return config.load(str(archive / "demo.yaml"))


@pytest.mark.engine
class TestWholePath:
    def test_it_arrives(self, done):
        registry = tracking.of(done)
        assert registry.champion() == "1"
        assert float(registry.version_facts("1")["test_dice"]) > 0.8
        volumes, scored = tables.volumes(done.lake).rows(), tables.predictions(done.lake).rows()
        assert Counter(r["split"] for r in volumes) == {"train": 15, "val": 4, "test": 6}
        assert len(volumes) == 25 and len(scored) == 24
        assert all(storage.exists(storage.join(done.lake, r["mask"])) for r in scored)
        page = storage.read_bytes(storage.join(done.lake, "report/index.html")).decode()
        assert "version 1" in page and "GANTRY_TILT" in page and "data:image/png" in page

    def test_what_was_refused(self, done):
        reasons = Counter((r["stage"], r["reason"]) for r in tables.quarantine(done.lake).rows())
        assert reasons == {
            ("catalog", "UNKNOWN_FORMAT"): 2, ("volumes", "TRUNCATED"): 1,
            ("catalog", "ENCRYPTED"): 1, ("catalog", "ESCAPES_FOLDER"): 1,
            ("volumes", "GANTRY_TILT"): 12, ("volumes", "MISSING_SLICE"): 11, ("volumes", "DUPLICATE_INSTANCE"): 1,
            ("volumes", "NOT_AN_IMAGE"): 1, ("volumes", "LABEL_WITHOUT_IMAGE"): 3,
            ("patches", "TRUNCATED"): 1, ("score", "TRUNCATED"): 1,
        }  # fmt: skip

    def test_nobody_is_named_anywhere(self, done):
        named, seen = identifying(), 0
        assert all(named(b"PN " + what + b" 1.2") for what in (b"Quillfeather^Clementine", b"19410217"))
        assert not named(b"PN 119410217 1.2")
        for file in storage.walk(done.lake):
            for data in unpacked(storage.read_bytes(file.uri), file.path):
                seen += 1
                assert not named(data), file.path
            assert not named(file.path.encode())
        assert seen > 50

    def test_again_does_nothing_twice(self, done, archive, capsys):
        before = files(done.lake)
        assert cli.main(["demo", str(archive)]) == 0
        said = capsys.readouterr().out
        assert "new 0" in said and "already trained" in said and "scored 0" in said
        assert str(archive / "lake" / "report" / "index.html") in said and "mlflow ui --backend-store-uri sqlite:///" in said
        assert files(done.lake) == before


def files(lake) -> dict[str, int]:
    """Everything but the page, which is written anew, and the store of MLflow, which is one file."""
    return {f.path: f.mtime_ns for f in storage.walk(lake) if not f.path.startswith(("report/", "mlflow.db"))}


def unpacked(data: bytes, path: str):
    """The bytes of a file, and what its compression hides."""
    yield data
    if path.endswith(".gz"):
        yield gzip.decompress(data)
    if path.endswith(".parquet"):
        for column in pq.read_table(io.BytesIO(data)).columns:
            yield b"\n".join(v if isinstance(v, bytes) else str(v).encode() for v in column.to_pylist())
