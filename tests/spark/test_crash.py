"""Decoders that crash, hang or are killed in real Spark workers, and again in the child processes that a second attempt uses."""

import json
import os
import subprocess
import sys

import pytest
import torch
from archives import ct_config
from formats import dicoms

from sparkmed import config, dataset, formats
from sparkmed.config import Component
from sparkmed.learning import networks
from sparkmed.learning.model import Model, ModelSpec

pytestmark = pytest.mark.engine

# Imported by every Python process that finds it. In Spark's workers and in their children the decoder of run-length encoding is
# replaced by one that does what the frame says.
DEADLY = """
import sys
if "pyspark.daemon" in sys.orig_argv or any("isolation._serve" in a for a in sys.orig_argv):
    import ctypes, os, pathlib, signal
    from pydicom.pixels import get_decoder
    from sparkmed.formats import isolation
    isolation.SECONDS = 2
    decoders = get_decoder("1.2.840.10008.1.2.5")._available
    whole = decoders["pylibjpeg"]
    def deadly(frame, runner):
        if b"CRASHES" in frame:
            ctypes.string_at(0)
        if b"HANGS" in frame:
            ctypes.PyDLL(None).sleep(1000)
        marker = pathlib.Path(os.environ["DEADLY"])
        if b"UNLUCKY" in frame and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(frame, runner)
    decoders["pylibjpeg"] = deadly
"""

PROGRAM = """
import json, sys
from sparkmed import config
from sparkmed.spark import patches, score, session
settings, rows, model = json.load(open(sys.argv[1]))
spark = session.session(config.Spark(master="local[2]"), "tests")
url = patches.write(spark, rows, config.parse(settings), {})
scored, refused = score.predict(spark, rows, model, "cpu")
print(json.dumps([url, [r["volume"] for r in scored], [[r.uri, r.reason, r.message] for r in refused]]))
"""

FATES = {2: b"CRASHES!", 4: b"HANGS!!!", 5: b"UNLUCKY!"}
"""Eight voxels in a row of the middle slice, by subject."""


def project(folder):
    """Config, and rows of seven run-length encoded volumes; writes a model."""
    rows = []
    for s in range(7):
        voxels = dicoms.stack((8, 8, 3), seed=s)
        if s in FATES:
            voxels[:, 4, 1] = list(FATES[s])
        made = dicoms.series(voxels, SeriesInstanceUID=f"1.2.{s}", StudyInstanceUID=f"1.3.{s}")
        for ds in made:
            ds.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
        (header,), refused = formats.read_headers(str(dicoms.write(folder / "archive" / f"s{s}", made)))
        assert not refused
        split = {0: "val", 1: "test"}.get(s, "train")
        facts = {"subject": f"s{s}", "split": split, "target": s % 2, "label": None, "label_uid": None}
        rows.append(header.row() | facts)
    settings = ct_config(folder / "archive", folder / "lake", task="classification", classes=["even", "odd"])
    settings |= {
        "volumes": {"images": "{subject}/*.dcm"},
        "preprocess": {"size": [8, 8, 4]},
        "patches": {"size": [8, 8, 4], "sampler": "grid"},
    }
    spec = ModelSpec(name="m", task="classification", classes=("even", "odd"), in_channels=1, spatial_dims=3, window=(8, 8, 4),
                     network=Component(name="resnet10"), preprocess=config.parse(settings).preprocess)  # fmt: skip
    torch.manual_seed(0)
    Model(spec, networks.build(spec.network, 1, 2, 3)).save(str(folder / "model"))
    return settings, rows


def test_a_crash_a_hang_and_a_kill_cost_the_files_that_are_to_blame_and_no_other(tmp_path):
    settings, rows = project(tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DEADLY)
    (tmp_path / "project.json").write_text(json.dumps([settings, rows, str(tmp_path / "model")]))
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "DEADLY": str(tmp_path / "killed")}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "project.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "killed").exists()
    url, scored, refused = json.loads(done.stdout.splitlines()[-1])

    crashed, hung = rows[2], rows[4]
    wanted = {
        crashed["uid"]: ["DECODER_CRASH", "decoder pylibjpeg on source 2 of 3: died with signal 11"],
        hung["uid"]: ["DECODER_CRASH", "decoder pylibjpeg on source 2 of 3: took longer than 3 s"],
    }
    described = dataset.describe(url)
    assert described["refused"] == wanted
    assert described["counts"] == {"train": 3, "val": 1, "test": 1}
    assert set(scored) == {r["uid"] for r in rows} - set(wanted)
    found = {uri: [reason, message] for uri, reason, message in refused}
    assert found == {uri: wanted[r["uid"]] for r in (crashed, hung) for uri in r["sources"]}
