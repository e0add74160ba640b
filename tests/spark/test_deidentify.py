import collections
import io
import os
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pydicom
import pytest
from formats import dicoms

from sparkmed import cli, config, pipeline, storage, tables
from sparkmed.formats import archive as files
from sparkmed.formats import isolation
from sparkmed.rejection import InputError
from sparkmed.spark import deidentify

pytestmark = pytest.mark.engine
VOXELS = dicoms.stack()
SCAN = pathlib.Path(os.environ.get("SPARKMED_TEST_DATA", "/nowhere")).parent / "acceptance" / "phi_scan.py"


@pytest.fixture
def archive(tmp_path):
    """Four slices of a patient (whose name is in a path), one of them twice; a zip; and files that must not leave."""
    folder = tmp_path / f"{dicoms.SECRET}_archive"
    slices = dicoms.series(VOXELS, StudyDate="20240131", InstitutionName=f"Hospital of {dicoms.SECRET}")
    dicoms.write(folder / f"{dicoms.SECRET}^Don", slices)
    dicoms.write(folder / "again", slices[:1])
    with zipfile.ZipFile(folder / "more.zip", "w") as z:
        other = dicoms.series(VOXELS, SeriesInstanceUID="1.2.3.4.7", StudyDate="20240201")
        z.writestr(f"{dicoms.SECRET}/a.dcm", dicoms.encoded(other[0]))
        z.writestr("b.dcm", dicoms.encoded(other[1])[:-9])
    (folder / "planted.dcm").write_bytes(dicoms.encoded(dicoms.dataset(VOXELS[..., 0], BodyPartExamined=dicoms.SECRET.upper())))
    (folder / "screen.dcm").write_bytes(
        dicoms.encoded(dicoms.dataset(VOXELS[..., 0], ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"]))
    )
    (folder / "notes.txt").write_text(dicoms.SECRET)
    return folder


def wanted(archive, tmp_path, *overrides):
    return config.deidentification(str(archive), str(tmp_path / "out"), [f"identity.key_file={_key(tmp_path)}", *overrides])


def _key(tmp_path):
    path = tmp_path / "the.key"
    path.write_bytes(b"k" * 32)
    return path


def rows(tmp_path):
    return tables.audit(str(tmp_path / "out")).rows()


def snapshot(*folders):
    return {f.uri: f.mtime_ns for folder in folders for f in storage.walk(str(folder))}


def copies(tmp_path):
    return {f.path: storage.read_bytes(f.uri) for f in storage.walk(str(tmp_path / "out"))}


def test_every_file_is_written_clean_or_held_back_and_has_one_row(spark, archive, tmp_path):
    done = pipeline.deidentify(wanted(archive, tmp_path))
    assert done == {"files": 9, "opened": 9, "written": 5, "held": 5}
    assert (tmp_path / "out.audit").stat().st_mode & 0o777 == 0o700  # it names sources
    found = rows(tmp_path)
    assert len({r["uri"] for r in found}) == len(found) == 10
    held = collections.Counter(r["reason"] for r in found if r["status"] == "held")
    assert held == {"NOT_CLEAN": 1, "SCREEN_SAVE": 1, "NOT_DICOM": 1, "TRUNCATED": 1, "DUPLICATE_INSTANCE": 1}
    written = [r for r in found if r["status"] == "written"]
    assert {r["output"] for r in written} == set(copies(tmp_path))
    assert all("(0010,0010) PatientName Z" in r["actions"] and len(r["sha256"]) == 64 for r in written)
    assert all(len(pathlib.PurePath(r["output"]).parts) == 4 for r in written)
    values = str([{k: v for k, v in r.items() if k not in ("uri", "path", "container")} for r in found])
    assert dicoms.SECRET.lower() not in values.lower() and "20240131" not in values
    series = sorted((pydicom.dcmread(io.BytesIO(d)) for d in copies(tmp_path).values()), key=lambda d: d.get("InstanceNumber"))
    assert len({d.PatientID for d in series}) == 1 and len({d.SeriesInstanceUID for d in series}) == 2
    for d in series:
        if len([s for s in series if s.SeriesInstanceUID == d.SeriesInstanceUID]) == 4:
            np.testing.assert_array_equal(d.pixel_array.T, VOXELS[..., d.InstanceNumber - 1])


@pytest.mark.skipif(not SCAN.exists(), reason="needs shared data")
def test_nothing_that_leaves_holds_a_name(spark, archive, tmp_path):
    pipeline.deidentify(wanted(archive, tmp_path))
    ended = subprocess.run(
        [sys.executable, str(SCAN), str(tmp_path / "out"), dicoms.SECRET, "1.2.3.4.5", "20240131", "Hospital"],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout


def test_a_second_run_does_nothing_twice(spark, archive, tmp_path):
    pipeline.deidentify(wanted(archive, tmp_path))
    before = snapshot(tmp_path / "out", tmp_path / "out.audit")
    again = pipeline.deidentify(wanted(archive, tmp_path))
    assert again == {"files": 9, "opened": 0, "written": 5, "held": 5}
    assert snapshot(tmp_path / "out", tmp_path / "out.audit") == before

    lost = next(f for f in storage.walk(str(tmp_path / "out")))
    bytes_before = copies(tmp_path)
    storage.remove(lost.uri)
    stray = tmp_path / "out" / "sub-0" / "1" / "2" / "3.dcm"  # what a killed run under another key left
    stray.parent.mkdir(parents=True)
    stray.touch()
    (stray.parent / ".4.dcm.0.partial").touch()
    assert pipeline.deidentify(wanted(archive, tmp_path))["opened"] <= 2
    assert copies(tmp_path) == bytes_before and len(rows(tmp_path)) == 10
    assert not (tmp_path / "out" / "sub-0").exists()


def test_changes_of_the_archive_and_of_the_settings_are_followed(spark, archive, tmp_path):
    pipeline.deidentify(wanted(archive, tmp_path))
    first = set(copies(tmp_path))
    twin = pydicom.dcmread(archive / "again" / "000.dcm")
    twin.InstanceNumber = 99
    twin.save_as(archive / "again" / "000.dcm")
    done = pipeline.deidentify(wanted(archive, tmp_path))
    assert done == {"files": 9, "opened": 2, "written": 4, "held": 6}  # two of one name and different content: neither
    assert [r["reason"] for r in rows(tmp_path)].count("CONFLICTING_INSTANCE") == 2
    assert set(copies(tmp_path)) < first

    (archive / "again" / "000.dcm").unlink()
    (archive / "new.dcm").write_bytes(dicoms.encoded(dicoms.dataset(VOXELS[..., 0] + 1, StudyDate="20240131")))
    done = pipeline.deidentify(wanted(archive, tmp_path))
    assert done["opened"] == 2  # the new one, and the one whose rival is gone
    assert (
        len(copies(tmp_path)) == done["written"] == 6 and [r["reason"] for r in rows(tmp_path)].count("CONFLICTING_INSTANCE") == 1
    )
    assert pipeline.deidentify(wanted(archive, tmp_path)) == done | {"opened": 0}

    again = pipeline.deidentify(wanted(archive, tmp_path, "deidentify.dates=removed", "deidentify.allow=[screen_save]"))
    assert again["opened"] == again["files"] == 9 and again["held"] == 3
    assert len({r["uri"] for r in rows(tmp_path)}) == len(rows(tmp_path))
    assert all(pydicom.dcmread(io.BytesIO(d)).get("StudyDate", "") == "" for d in copies(tmp_path).values())


def test_places_that_would_mix_the_zones_are_errors(spark, archive, tmp_path):
    for out in (archive, archive / "out", archive.parent):
        with pytest.raises(InputError, match="keep the two zones apart"):
            pipeline.deidentify(config.deidentification(str(archive), str(out), [f"identity.key_file={_key(tmp_path)}"]))
    (tmp_path / "elsewhere").symlink_to(archive)
    with pytest.raises(InputError, match="keep the two zones apart"):
        inside = str(tmp_path / "elsewhere" / "out")
        pipeline.deidentify(config.deidentification(str(archive), inside, [f"identity.key_file={_key(tmp_path)}"]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(InputError, match="choose a new folder"):
        pipeline.deidentify(wanted(archive, tmp_path))
    with pytest.raises(InputError, match="does not exist"):
        pipeline.deidentify(wanted(tmp_path / "nowhere", tmp_path))


def test_strays_are_what_is_older_than_the_audit(tmp_path):
    out, audit = tmp_path / "out", tables.audit(str(tmp_path / "out"))
    for name in ("old.dcm", "claimed.dcm", ".half.dcm.partial"):
        (out / "sub-1").mkdir(parents=True, exist_ok=True)
        (out / "sub-1" / name).touch()
        os.utime(out / "sub-1" / name, ns=(1, 1))
    audit.commit([])
    deidentify._remove_strays(str(out), set(), audit)
    assert len(list(out.rglob("*.*"))) == 3, "no run has come to its end yet"
    audit.commit([audit.write([{"uri": "x"}])], ("deidentify", 1))
    of_another_run = out / "sub-1" / "young.dcm"
    of_another_run.touch()
    os.utime(of_another_run, ns=(2**62, 2**62))
    deidentify._remove_strays(str(out), {"sub-1/claimed.dcm"}, audit)
    assert {f.name for f in out.rglob("*.*")} == {"claimed.dcm", "young.dcm"}


def test_the_command_makes_a_key_beside_the_copies_and_says_nothing_of_patients(spark, archive, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("SPARKMED_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    slices = archive / f"{dicoms.SECRET}^Don"
    slices.rename(archive / "don")
    assert cli.main(["deidentify", str(archive / "don"), "out", "deidentify.device=kept"]) == 0
    said = "".join(capfd.readouterr())
    assert "files 4, opened 4, written 4, held 0" in said
    key = tmp_path / "out.key"
    assert key.stat().st_mode & 0o777 == 0o600 and key.read_bytes() not in b"".join(copies(tmp_path).values())
    assert cli.main(["deidentify", str(archive / "don"), "out", "deidentify.dates=never"]) == 2
    assert "dates" in capfd.readouterr().err
    assert cli.main(["deidentify", str(archive / "don"), "out", "identity.keep_subjects=true"]) == 2


def test_a_decoding_process_that_cannot_start_blames_no_file(tmp_path, monkeypatch):
    made = dicoms.dataset(VOXELS[..., 0].astype("uint16"), BitsStored=12, HighBit=11)
    made.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
    dicoms.write(tmp_path / "archive", [made])
    (file,) = storage.walk(str(tmp_path / "archive"))
    settings = wanted(tmp_path / "archive", tmp_path)
    monkeypatch.setattr(isolation, "_PROGRAM", "raise SystemExit(1)")
    with isolation.isolated(), pytest.raises(isolation.Unavailable):  # so Spark tries the task again
        list(deidentify.outcomes(file, settings, b"k" * 32))


def test_a_zarr_is_held_as_one_file(archive, tmp_path):
    (archive / "P.zarr" / "A").mkdir(parents=True)
    (archive / "P.zarr" / "A" / "0").write_bytes(b"x")
    settings = wanted(archive, tmp_path)
    (file,) = files.files(str(archive / "P.zarr"))
    (held,) = deidentify.outcomes(file, settings, b"k" * 32)
    assert (held["uri"], held["reason"], held["status"]) == (file.uri, "NOT_DICOM", "held")
