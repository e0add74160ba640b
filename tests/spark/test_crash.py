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
if "sparkmed.spark.daemon" in sys.orig_argv or any("isolation._serve" in a for a in sys.orig_argv):
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

COPIES = """
import json, sys
from sparkmed import config, pipeline, tables
from sparkmed.formats import isolation
settings, archive, out, key = json.loads(sys.argv[1])
project = config.parse(settings)
pipeline.catalog(project)
volumes = pipeline.volumes(project)
refused = [[r["uri"], r["reason"]] for r in tables.quarantine(project.lake).rows()]
cleaned = pipeline.deidentify(config.deidentification(archive, out, [f"identity.key_file={key}"]))
held = [[r["uri"], r["reason"]] for r in tables.audit(out).rows() if r["status"] == "held"]
print(json.dumps([volumes["volumes"], refused, cleaned, held]))
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


def run(program, folder, *arguments) -> subprocess.CompletedProcess:
    """A program whose Spark workers have the deadly decoder."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(DEADLY)
    path = os.pathsep.join([str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "DEADLY": str(folder / "killed")}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_crash_a_hang_and_a_kill_cost_the_files_that_are_to_blame_and_no_other(tmp_path):
    settings, rows = project(tmp_path)
    (tmp_path / "project.json").write_text(json.dumps([settings, rows, str(tmp_path / "model")]))
    done = run(PROGRAM, tmp_path, tmp_path / "project.json")
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


def test_a_crash_where_copies_are_compared_or_cleaned_costs_that_copy(tmp_path):
    """A series, and copies of its slices in another encoding, of which one crashes the decoder that both look with."""
    voxels = dicoms.stack((12, 8, 3)).astype("uint16")
    voxels[2:10, 4, 1] = list(FATES[2])
    made = dicoms.series(voxels, PatientID="", BitsStored=12, HighBit=11)
    dicoms.write(tmp_path / "archive" / "native", made)
    for ds in made:
        ds.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
    dicoms.write(tmp_path / "archive" / "packed", made)
    (tmp_path / "key").write_bytes(b"k" * 32)
    wanted = {"labels": {"allow_missing": True}, "max_refused": 1}
    settings = ct_config(tmp_path / "archive", tmp_path / "lake") | {"volumes": wanted}
    places = [str(tmp_path / n) for n in ("archive", "out", "key")]
    done = run(COPIES, tmp_path, json.dumps([settings, *places]))
    volumes, refused, cleaned, held = json.loads(done.stdout.splitlines()[-1])
    reasons = [{uri.rpartition("/archive/")[2]: reason for uri, reason in found} for found in (refused, held)]
    copies = {f"packed/{n:03d}.dcm": "DUPLICATE_INSTANCE" for n in range(3)} | {"packed/001.dcm": "DECODER_CRASH"}
    assert volumes == 1 and reasons[0] == copies
    assert cleaned["written"] == 1, "the others are held back: two encodings of one object are two files of one name"
    assert reasons[1]["packed/001.dcm"] == "DECODER_CRASH" and "native/001.dcm" not in reasons[1]
