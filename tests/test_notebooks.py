"""The notebooks run from the first cell to the last, on phantoms laid out as their data are."""

import pathlib

import nbformat
import numpy as np
import pytest
import yaml
from archives import ct_pairs, plate
from nbclient import NotebookClient
from PIL import Image

from sparkmed.imaging import phantom

pytestmark = pytest.mark.engine
ROOT = pathlib.Path(__file__).parents[1]
SMALL = {"processes": 1, "threads": 2, "epochs": 2, "batch_size": 4, "warmup_epochs": 1}


def hippocampus(folder: pathlib.Path):
    pairs = ct_pairs(folder, 20)
    (pairs / "img").rename(folder / "imagesTr")
    (pairs / "lab").rename(folder / "labelsTr")


def radiographs(folder: pathlib.Path):
    for i in range(36):
        path = folder / ("train" if i < 28 else "val") / ("abd", "chst")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = phantom.radiograph(i, i % 2, (64, 64)).array[0, :, :, 0].T
        Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB").save(path)


def screen_bbbc013(folder: pathlib.Path):
    plate(folder, 12, 64)
    (folder / "map.csv").unlink()
    lines = ["ImageNumber,Column,Row,SBS_Doses,SBS_Controls"]
    for n in range(48):
        column = n % 12 + 1
        dose = max(0, column - 2)
        lines.append(f"{n + 1},{column:02d},{'ABCD'[n // 12]},{dose},{-1 if dose == 0 else int(dose == 10)}")
    (folder / "metadata.csv").write_text("\n".join(lines))


SMALLER = {
    "hippocampus": {"preprocess": {"spacing": [4.0, 4.0, 6.0]}, "patches": {"size": [24, 24, 16]}},
    "screen_bbbc013": {"preprocess": {"size": [64, 64, 1]}, "patches": {"size": [32, 32, 1]}},
}


@pytest.mark.parametrize("write", [hippocampus, radiographs, screen_bbbc013], ids=lambda f: f.__name__)
def test_notebook(write, tmp_path, monkeypatch):
    name = write.__name__
    write(tmp_path / "archive")
    settings = yaml.safe_load((ROOT / "conf" / f"{name}.yaml").read_text())
    settings["train"] = settings["train"] | SMALL
    for section, changes in SMALLER.get(name, {}).items():
        settings[section] |= changes
    settings.pop("promote", None)  # two epochs on phantoms pass no gate
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    for variable, value in (("CONFIG", "small.yaml"), ("ARCHIVE", "archive"), ("LAKE", "lake")):
        monkeypatch.setenv(f"SPARKMED_{variable}", str(tmp_path / value))
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "notebooks")}}
    ).execute()
    printed = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    assert "'scored': 0" in printed or name != "hippocampus"
    assert "report/index.html" in printed


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.name)
def test_notebooks_are_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert all(not c.get("outputs") and c.get("execution_count") is None for c in notebook.cells if c.cell_type == "code")
