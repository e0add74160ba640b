"""A driver killed by SIGKILL between any two things that others can see: run again, it ends as if it had never been killed."""

import json
import pathlib
import signal
import subprocess
import sys

import pytest
import yaml
from archives import ct_config, ct_pairs

from sparkmed import config, storage, tables, tracking
from sparkmed.spark import catalog

pytestmark = pytest.mark.engine

# Drivers of the whole path, one after the other until one comes to its end, forked from a process that has imported what they need.
# Each is killed before the n-th thing in it that others could see: those before it are done then, and what was prepared for it lies
# about. Prints how they ended.
DRIVERS = """
import itertools, json, os, signal, sys
import monai.networks.nets
from sparkmed import config, pipeline, report, storage, tables, tracking
ends = []
for kill_at in itertools.islice(itertools.cycle((5, 4)), 20):  # a stage of two commits begins anew when killed between them
    driver = os.fork()
    if not driver:
        break
    ends.append(os.waitstatus_to_exitcode(os.waitpid(driver, 0)[1]))
    print("ended", ends[-1], file=sys.stderr)
    if ends[-1] != -signal.SIGKILL:
        break
if driver:
    print(json.dumps(ends))
    sys.exit()
os.dup2(2, 1)
seen = 0
def deadly(owner, name):
    whole = getattr(owner, name)
    def call(*arguments, **more):
        global seen
        seen += 1
        print("visible", seen, name, getattr(arguments[0], "url", ""), file=sys.stderr)
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **more)
    setattr(owner, name, call)
for owner, name in [(tables.Table, "commit"), (storage, "move"), (tracking.Run, "register"), (tracking.Registry, "crown")]:
    deadly(owner, name)
pipeline.run(config.load(sys.argv[1]))
"""


def settings_of(folder):
    archive = ct_pairs(folder / "archive", 12)
    (archive / "notes.txt").write_text("not an image")
    (archive / "lab" / "s11.nii.gz").unlink()  # an image that is only scored
    settings = ct_config(archive, folder / "lake", name="killed", spark={"master": "local[2]"}, score={"commit_every": 6})
    settings["train"] |= {"epochs": 1}
    settings["volumes"]["labels"]["allow_missing"] = True
    (folder / "project.yaml").write_text(yaml.safe_dump(settings))
    return config.load(str(folder / "project.yaml"))


def test_a_driver_killed_again_and_again_ends_as_if_it_never_was(spark, tmp_path):
    settings = settings_of(tmp_path)
    command = [sys.executable, "-c", DRIVERS, str(tmp_path / "project.yaml")]
    with open(tmp_path / "said", "w+") as said:  # a file: a pipe would be open until the JVM of a killed driver has gone
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=said, timeout=840)
        said.seek(0)
        text = said.read()[-20000:]
    assert ended.returncode == 0, text
    ends = json.loads(ended.stdout)
    assert ends[-1] == 0, text
    assert ends[:-1] == [-signal.SIGKILL] * (len(ends) - 1) and len(ends) > 3, text

    lake, registry = settings.lake, tracking.of(settings)
    images = [f"img/s{i:02d}.nii.gz" for i in range(12)]
    rows = tables.volumes(lake).rows()
    sources = {r["uid"]: r["source_paths"] for r in rows}
    assert sorted(r.path for r in catalog.current(spark, lake).collect()) == images + [f"lab/s{i:02d}.nii.gz" for i in range(11)]
    assert [(r.path, r.reason) for r in catalog.refused(spark, lake).collect()] == [("notes.txt", "UNKNOWN_FORMAT")]
    assert sorted(sources.values()) == [[i] for i in images] and len(rows) == 12
    described = [f.path for f in storage.walk(storage.join(lake, "datasets")) if f.path.endswith("_dataset.json")]
    assert len([d for d in described if ".writing-" not in d]) == 1
    assert len(registry.client.search_model_versions(f"name='{registry.model}'")) == 1 and registry.champion() == "1"
    assert [(r["action"], r["challenger"]) for r in tables.promotions(lake).rows()] == [("promoted", "1")]
    assert sorted(sources[r["volume"]] for r in tables.predictions(lake).rows()) == [[i] for i in images]


def test_killed_runs_of_scoring_leave_the_ledger_that_nobody_disturbed(tmp_path):
    """Three of the rounds of ``benchmarks/kill.py``: a driver within a commit, workers of executors, two runs at once."""
    program = pathlib.Path(__file__).parents[1] / "benchmarks" / "kill.py"
    with open(tmp_path / "said", "w+") as said:
        ended = subprocess.run([sys.executable, program, "3", "5"], stdout=subprocess.PIPE, stderr=said, timeout=600)
        said.seek(0)
        text = said.read()[-5000:]
    assert ended.returncode == 0, text
    found = json.loads(ended.stdout)
    assert found["rounds"] == 3 and len(found["rounds by kind"]) == 3 and found["killed"], text
    assert [v for k, v in found.items() if k.startswith(("keys", "rows wrong", "masks", "runs failed"))] == [0] * 5, text
    assert found["leftovers after vacuum"] == {}
