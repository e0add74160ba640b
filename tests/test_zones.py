"""The whole path on an archive that names people: in headers, in paths and in labels. Nothing of it leaves the source zone."""

import os
import pathlib
import shutil
import subprocess
import sys

import pydicom
import pytest

from sparkmed import storage, tables

pytestmark = pytest.mark.engine
SHARED = pathlib.Path(os.environ.get("SPARKMED_TEST_DATA", "/nowhere"))
SCAN = SHARED.parent / "acceptance" / "phi_scan.py"
PATIENTS = ("Avasarala_Chrisjen_1", "Avasarala_Chrisjen_2", "Avasarala_Chrisjen_3")
CONFIG = """\
name: zones
task: classification
classes: [whole, crop]
archive: {folder}/source_zone
lake: {folder}/lake
identity: {{key_file: {folder}/key}}
volumes: {{images: "{{subject}}/**", labels: {{csv: labels.csv}}, max_refused: 0.9}}
catalog: {{max_refused: 0.9}}
preprocess: {{orientation: RAS, size: [16, 16, 8]}}
train:
  processes: 1
  threads: 1
  epochs: 1
  batch_size: 2
  warmup_epochs: 0
  network: {{name: DenseNet, block_config: [2], init_features: 8, growth_rate: 4}}
score: {{max_refused: 0.9}}
spark: {{master: "local[2]"}}
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """(folder, what the program said) after all stages: three volumes of a patient in folders of that name, broken files beside."""
    source = SHARED / "dicom" / "identified_study"
    if not source.exists() or not SCAN.exists():
        pytest.skip("needs shared data")
    folder = tmp_path_factory.mktemp("zones")
    archive = folder / "source_zone"
    shutil.copytree(source / "12-T1post-05670", archive / PATIENTS[0])
    shutil.copytree(source / "13_HCropVolume", archive / PATIENTS[1])
    for path in sorted((archive / PATIENTS[1]).iterdir()):
        ds = pydicom.dcmread(path)
        ds.PixelData = bytes(reversed(ds.PixelData))
        ds.SeriesInstanceUID, ds.SOPInstanceUID = "1.2.3.4", f"1.2.3.4.{ds.InstanceNumber}"
        (archive / PATIENTS[2]).mkdir(exist_ok=True)
        ds.save_as(archive / PATIENTS[2] / path.name)
    first = next((archive / PATIENTS[0]).iterdir()).read_bytes()
    (archive / "Avasarala_cut.dcm").write_bytes(first[:4000])
    (archive / "Chrisjen_notes.txt").write_text("Chrisjen Avasarala")
    rows = [
        f"{p},{label},{split}"
        for p, label, split in zip(PATIENTS, ("whole", "crop", "crop"), ("train", "val", "test"), strict=True)
    ]
    (archive / "labels.csv").write_text("subject,label,split\n" + "\n".join(rows) + "\n")
    (folder / "key").write_text("k" * 32)
    (folder / "zones.yaml").write_text(CONFIG.format(folder=folder))
    ended = subprocess.run(
        [sys.executable, "-m", "sparkmed.cli", "run", str(folder / "zones.yaml")], capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder, ended.stdout + ended.stderr  # Spark's workers and its JVM speak there too


def words(folder: pathlib.Path) -> list[str]:
    """Values of the patient module of every file, and of what else names somebody; words below four letters are everywhere."""
    found = set()
    for path in (folder / "source_zone").rglob("*.dcm"):
        ds = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        for element in ds.group_dataset(0x0010):
            if element.VR in ("PN", "LO"):
                found |= set(str(element.value).replace("^", " ").split())
        found.add(str(ds.get("AccessionNumber", "")))
    return sorted(w for w in found if len(w) > 3)


def scan(root: pathlib.Path, names: list[str]) -> str:
    ended = subprocess.run([sys.executable, str(SCAN), str(root), *names], capture_output=True, text=True)
    return "" if ended.returncode == 0 else ended.stdout


def test_headers_name_nobody_in_the_lake(told):
    folder, _ = told
    names = words(folder)
    assert {"PGBM-002", "8701449723783444"} <= set(names)
    of_headers = [n for n in names if n not in ("Avasarala", "Chrisjen")]  # paths hold these two, and the catalog holds paths
    assert not scan(folder / "lake", of_headers)


def test_beyond_catalog_and_volumes_not_even_paths_are_known(told):
    """Patches, models, runs, predictions, evaluations, promotions and the report hold pseudonyms only."""
    folder, _ = told
    lake, beyond = folder / "lake", folder / "beyond"
    shutil.copytree(lake, beyond, ignore=shutil.ignore_patterns("catalog", "volumes", "quarantine"))
    parts = {p.name for p in beyond.iterdir()}
    assert {"datasets", "report", "mlflow.db", "predictions", "evaluations", "promotions", "training"} <= parts
    assert not scan(beyond, [*words(folder), "source_zone", "1.3.6.1.4.1.14519"])


def test_what_is_said_names_nobody(told):
    _, said = told
    assert "score" in said and "report" in said
    assert not [w for w in ("avasarala", "chrisjen", "pgbm-002", "8701449723783444", "1.3.6.1.4.1.14519") if w in said.lower()]


def test_the_path_arrived(told):
    folder, _ = told
    lake = str(folder / "lake")
    rows = tables.volumes(lake).rows()
    assert {r["split"] for r in rows} == {"train", "val", "test"}
    assert all(r["subject"].startswith("sub-") for r in rows)
    assert len(tables.predictions(lake).rows()) == 3
    assert {r["reason"] for r in tables.quarantine(lake).rows()} >= {"TRUNCATED", "UNKNOWN_FORMAT"}
    page = storage.read_bytes(storage.join(lake, "report/index.html")).decode()
    assert "TRUNCATED" in page
