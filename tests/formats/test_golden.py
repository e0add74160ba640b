"""Every file of pydicom's test files ends as the golden table says: a volume of a shape and range, or a reason.

The table was made by looking at each file with pydicom and dcm2niix, not from this code. ``outcome`` is C x I x J x K or a
reason code; two of them with a bar between depend on which decoders are installed. ``low`` and ``high`` are the smallest
and largest real-world value.
"""

import collections
import csv
import pathlib

import pytest

from sparkmed.formats import read_archive

TABLE = list(csv.DictReader(pathlib.Path(__file__).with_name("golden_pydicom.csv").open(encoding="utf-8")))
LOSSY = 3
"""Grey levels by which decoders of lossy JPEG differ."""


@pytest.fixture(scope="module")
def files(shared_data) -> pathlib.Path:
    return shared_data / "dicom/pydicom_test_files"


def test_table_is_complete(files):
    assert {r["path"] for r in TABLE} == {str(p.relative_to(files)) for p in files.rglob("*") if p.is_file()}
    assert len(TABLE) == len({r["path"] for r in TABLE})


@pytest.mark.parametrize("row", TABLE, ids=[r["path"] for r in TABLE])
def test_file_by_itself(files, row):
    volumes, rejections = read_archive(str(files / row["path"]))
    assert len(volumes) + len(rejections) == 1
    became = ["x".join(map(str, v.array.shape)) for v in volumes] + [r.reason for r in rejections]
    assert became[0] in row["outcome"].split("|"), [r.message for r in rejections]
    if volumes and row["low"]:
        array = volumes[0].array
        assert abs(float(array.min()) - float(row["low"])) <= LOSSY
        assert abs(float(array.max()) - float(row["high"])) <= LOSSY


def test_all_together(files):
    """Read as one archive: each file is in a volume or refused once, and series come together."""
    volumes, rejections = read_archive(str(files))
    named = [s for v in volumes for s in v.sources] + [r.uri for r in rejections]
    assert collections.Counter(named) == collections.Counter(f"file://{p}" for p in files.rglob("*") if p.is_file())
    reasons = {r.uri.removeprefix(f"file://{files}/"): r.reason for r in rejections}
    series = collections.Counter(
        reasons.get(f"test_files/dicomdirtests/98892003/MR700/{n}") for n in (4467, 4528, 4558, 4588, 4618, 4648, 4678)
    )
    assert series == {"MIXED_ORIENTATION": 7}  # projections turned around an axis
    same = [r["path"] for r in TABLE if "/MR_small" in r["path"]]
    assert sum(reasons.get(p) == "DUPLICATE_INSTANCE" for p in same) == len(same) - 1  # nine encodings of one instance
