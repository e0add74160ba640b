"""The patch dataset by real Spark, in sessions of their own: with one slot, with seven, and with workers that are killed."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from archives import ct_config, ct_pairs

from sparkmed import config, dataset, formats, storage
from sparkmed.rejection import InputError
from sparkmed.spark import patches

pytestmark = pytest.mark.engine

# Imported by every Python process that finds it: of the workers, the first to come to the middle of either step is killed there.
DEADLY = """
import os, pathlib, signal, sys
if "sparkmed.spark.daemon" in sys.orig_argv and "DEADLY" in os.environ:
    from sparkmed import storage
    from sparkmed.imaging import patches
    def deadly(owner, name, calls):
        whole, seen = getattr(owner, name), []
        def call(*arguments, **more):
            seen.append(name)
            marker = pathlib.Path(os.environ["DEADLY"]) / name
            if len(seen) == calls and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*arguments, **more)
        setattr(owner, name, call)
    deadly(patches, "extract", 7)
    deadly(storage, "read_ranges", 3)
"""

PROGRAM = """
import json, sys
from sparkmed import config
from sparkmed.spark import patches, session
settings, rows = json.load(open(sys.argv[1]))
for i, master in enumerate(sys.argv[3:]):
    spark = session.session(config.Spark(master=master), "tests")
    print(patches.write(spark, rows, config.parse(settings | {"lake": f"{sys.argv[2]}/{i}"}), {}), flush=True)
    spark.stop()
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Config as data, and rows of ``volumes/``: 7 CT volumes with labels."""
    folder = ct_pairs(tmp_path_factory.mktemp("pairs"), 7)
    headers, refused = formats.read_headers(str(folder))
    assert not refused
    found = {h.source_paths[0]: h for h in headers}
    rows = []
    for i, split in enumerate(["train"] * 5 + ["val", "test"]):
        label = found[f"lab/s{i:02d}.nii.gz"]
        facts = {"subject": f"s{i}", "split": split, "target": None, "label": json.dumps(label.row()), "label_uid": label.uid}
        rows.append(found[f"img/s{i:02d}.nii.gz"].row() | facts)
    plain = ct_config(folder, folder / "lake")
    return plain | {"patches": plain["patches"] | {"per_volume": 20, "file_mb": 0.5, "row_groups": 12}}, rows


@pytest.fixture(scope="module")
def written(spark, project, tmp_path_factory):
    """URL of the dataset by two slots, and its files."""
    settings, rows = project
    lake = tmp_path_factory.mktemp("lake")
    url = patches.write(spark, rows, config.parse(settings | {"lake": str(lake)}), {"code_version": "x"})
    return url, contents(url)


def contents(url):
    folder = storage.local_path(url)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def by_other_spark(project, folder, *masters, **environment):
    """The files of the dataset by each of these."""
    settings, rows = project
    (folder / "sitecustomize.py").write_text(DEADLY)
    (folder / "project.json").write_text(json.dumps([settings, rows[::-1]]))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", PROGRAM, str(folder / "project.json"), str(folder / "lake"), *masters]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": path} | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [contents(url) for url in done.stdout.splitlines()[-len(masters) :]]


def parquet(files):
    return {path: data for path, data in files.items() if path.endswith(".parquet")}


def test_the_folder_holds_the_dataset_and_nothing_else(written):
    url, files = written
    described = dataset.describe(url)
    assert set(files) == {*described["files"], "_dataset.json", "_common_metadata"}
    assert described["counts"] == {"train": 100, "val": 4, "test": 4}
    assert {p: pq.read_metadata(storage.local_path(url) / p).num_rows for p in described["files"]} == described["files"]


def test_one_slot_or_seven_write_the_same_bytes(project, written, tmp_path):
    one, seven = by_other_spark(project, tmp_path, "local[1]", "local[7]")
    assert parquet(one) == parquet(seven) == parquet(written[1])


def test_workers_killed_in_the_middle_leave_no_trace(project, written, tmp_path):
    (tmp_path / "killed").mkdir()
    (files,) = by_other_spark(project, tmp_path, "local[2,4]", DEADLY=str(tmp_path / "killed"))
    assert sorted(os.listdir(tmp_path / "killed")) == ["extract", "read_ranges"]
    assert parquet(files) == parquet(written[1]) and set(files) == set(written[1])


def test_petastorm_reads_it(written):
    from petastorm import make_reader

    url, _ = written
    with make_reader(url, shuffle_row_groups=False, workers_count=1) as reader:
        rows = {r.patch_id: r for r in reader}
    assert len(rows) == 108
    assert all(
        r.image.shape == (1, 16, 16, 16) and r.image.dtype == np.float32 and r.label.dtype == np.uint8 for r in rows.values()
    )


def test_a_refused_volume_is_named_and_a_split_of_such_is_an_error(spark, project, tmp_path):
    settings, rows = project
    s = config.parse(settings | {"lake": str(tmp_path)})
    lost = [r | {"sources": [r["sources"][0] + ".gone"]} for r in rows]
    url = patches.write(spark, [lost[0], *rows[1:]], s, {})
    assert list(dataset.describe(url)["refused"]) == [rows[0]["uid"]]
    assert dataset.describe(url)["counts"]["train"] == 80
    with pytest.raises(InputError, match="split test has no patch: every volume was refused .UNREADABLE"):
        patches.write(spark, [*rows[1:6], lost[6]], s, {})
    assert list(storage.local_path(url).parent.iterdir()) == [storage.local_path(url)], "nothing is left of what failed"
