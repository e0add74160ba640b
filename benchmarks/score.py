"""What scoring on Spark costs beside a plain torch loop, how evenly tasks are filled, and what memory a worker takes.

usage: python benchmarks/score.py [turns=5] [volumes=8] [size=64] [folder=FOLDER]

Prints one JSON object. Volumes are noise in int16, made in ``folder`` (default: the temporary one) and removed; the network is a
MONAI UNet 16-32-64 of random weights, windows of 32^3 overlap by half. Programs take turns; a ratio is the median over turns of the
ratio within a turn. Everything has run once before it counts.

``throughput``: seconds for ``volumes`` of ``size``^3 from file to mask. ``spark``: two slots, one torch thread each, as Spark sets
it. ``loop``: one process that reads, preprocesses, calls ``monai.inferers.sliding_window_inference``, takes the argmax on the
volume's own grid and writes it, with two torch threads. ``apart``: two such processes, with one torch thread and half of the
volumes each: what this machine gives at most. ``cpu``: the same in seconds of the processor, of all processes together (JVM too),
which others on the machine disturb less.
``windows``: stitching alone, in one process: this package's against MONAI's.
``straggler``: slowest / mean task in time of 24 volumes of sizes 1:20, the largest 5/8 ``size`` x 5/8 ``size`` x 5/2 ``size``; by
cost as they are packed, and as packing by count would have it.
``parts``: a volume of 8 times as many voxels in parts by two slots against the same by one.
``memory``: growth of a process that scores a volume, in volumes as float32 (the larger of stored and preprocessed).
"""

import contextlib
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import nibabel
import numpy as np
import psutil
import torch
from measure import beside
from monai.inferers import sliding_window_inference

from sparkmed import config, formats
from sparkmed.config import Component, Preprocess
from sparkmed.formats import nifti
from sparkmed.formats.instance import VolumeHeader
from sparkmed.imaging import postprocess, preprocess
from sparkmed.learning import inference, networks
from sparkmed.learning.model import Model, ModelSpec

THROUGHPUT, STRAGGLER, MEMORY = 1.15, 1.25, 3.0
"""Targets."""
MEMORY_CASES = {
    "int16": ("int16", {}, 3),
    "float32": ("float32", {}, 3),
    "int16, labelled": ("int16 labelled", {}, 3),
    "float32, resampled": ("float32", {"spacing": [1, 1, 2.5]}, 3),
    "int16, percentiles": ("int16", {"intensity": {"kind": "percentile"}}, 3),
    "float32, 8 classes": ("float32", {}, 8),
}


def save_model(folder: pathlib.Path) -> str:
    spec = ModelSpec(
        name="m", task="segmentation", classes=("background", "a", "b"), in_channels=1, spatial_dims=3, window=(32, 32, 32),
        network=Component(name="UNet", channels=[16, 32, 64], strides=[2, 2]), preprocess=Preprocess(spacing=(1, 1, 1)),
    )  # fmt: skip
    torch.manual_seed(0)
    Model(spec, networks.build(spec.network, 1, 3, 3)).save(str(folder))
    return str(folder)


def rows_of(folder: pathlib.Path, shapes: list[tuple[int, ...]]) -> list[dict]:
    folder.mkdir()
    for n, shape in enumerate(shapes):
        array = np.random.default_rng(n).normal(0, 300, shape).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.0, 1.0, 1.25, 1.0])), folder / f"{n:03d}.nii.gz")
    headers, _ = formats.read_headers(str(folder))
    return [{**h.row(), "subject": "s", "split": None, "target": None, "label": None} for h in headers]


# the plain loop


def loop(model: Model, rows: list[dict], out: str) -> float:
    started, spec = time.perf_counter(), model.spec
    for row in rows:
        image = formats.read_volume(VolumeHeader.from_row(row))
        ready = preprocess.apply(image, spec.preprocess)
        with torch.inference_mode():
            scores = sliding_window_inference(
                torch.from_numpy(ready.array)[None], spec.window, spec.score.window_batch, lambda x: model.network(x).softmax(1),
                overlap=spec.score.overlap, mode=spec.score.blending,
            )[0].numpy()  # fmt: skip
        labels = postprocess.as_labels(preprocess.to_input_grid(ready.with_array(scores), image))
        nifti.write(labels, f"{out}/{row['uid']}.nii.gz")
    return time.perf_counter() - started


def _looping(connection, url: str, out: str):
    torch.set_num_threads(1)
    model = Model.load(url)
    while rows := connection.recv():
        connection.send(loop(model, rows, out))


class Apart:
    """Two processes that loop."""

    def __init__(self, url: str, out: str):
        context = multiprocessing.get_context("spawn")
        self.ends = []
        for _ in range(2):
            ours, theirs = context.Pipe()
            context.Process(target=_looping, args=(theirs, url, out), daemon=True).start()
            self.ends.append(ours)

    def __call__(self, rows: list[dict]) -> float:
        started = time.perf_counter()
        for n, end in enumerate(self.ends):
            end.send(rows[n::2])
        for end in self.ends:
            end.recv()
        return time.perf_counter() - started

    def stop(self):
        for end in self.ends:
            end.send([])


def throughput(spark, folder: pathlib.Path, turns: int, volumes: int, size: int) -> dict:
    from sparkmed.spark import score

    url, rows = save_model(folder / "model"), rows_of(folder / "in", [(size,) * 3] * volumes)
    out, model = str(folder / "out"), Model.load(url)
    apart = Apart(url, out)

    def on_spark():
        started = time.perf_counter()
        predictions, _ = score.predict(spark, rows, url, "cpu", {r["uid"]: f"{out}/{r['uid']}.nii.gz" for r in rows})
        if len(predictions) != volumes:
            sys.exit(f"{len(predictions)} of {volumes} were scored")
        return time.perf_counter() - started

    def in_one():
        torch.set_num_threads(2)
        return loop(model, rows, out)

    runs = {"spark": on_spark, "loop": in_one, "apart": lambda: apart(rows)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-1, turns):
        for name, run in runs.items():
            if name == "spark":  # which ends workers that had nothing to do for a minute
                score.predict(spark, rows[:2], url, "cpu")
            before = processor_seconds()
            took = run()
            if turn >= 0:
                seconds[name].append(took)
                cpu[name].append(processor_seconds() - before)
    apart.stop()
    result: dict = {}
    for kind, times in (("seconds", seconds), ("cpu", cpu)):
        result[kind] = {name: round(statistics.median(s), 2) for name, s in times.items()}
        result |= {f"{kind}, spark/{name}": ratio(times["spark"], times[name], THROUGHPUT) for name in ("loop", "apart")}
    return result


def processor_seconds() -> float:
    """Of this process and all below it."""
    total = 0.0
    for process in (this := psutil.Process()), *this.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:2])
    return total


def ratio(one: list[float], other: list[float], target: float | None) -> dict:
    found = [a / b for a, b in zip(one, other, strict=True)]
    return beside(statistics.median(found), target, at_most=True) | {"turns": [round(f, 3) for f in found]}


def windows(folder: pathlib.Path, turns: int, size: int) -> dict:
    torch.set_num_threads(1)
    network = Model.load(str(folder / "model")).network
    array = np.random.default_rng(0).normal(size=(1, size, size, size)).astype(np.float32)

    def monai():
        with torch.inference_mode():
            sliding_window_inference(
                torch.from_numpy(array)[None], (32, 32, 32), 4, lambda x: network(x).softmax(1), overlap=0.5, mode="gaussian"
            )

    runs = {"ours": lambda: inference.scores(network, array, (32, 32, 32)), "monai": monai}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-1, turns):
        for name, run in runs.items():
            started = time.process_time()
            run()
            if turn >= 0:
                seconds[name].append(time.process_time() - started)
    return {"ours/monai": ratio(seconds["ours"], seconds["monai"], THROUGHPUT)}


def straggler(spark, folder: pathlib.Path, turns: int, size: int) -> dict:
    from sparkmed import scoring
    from sparkmed.spark import score

    url, rng = str(folder / "model"), np.random.default_rng(0)
    sizes = [20.0, 1.0, *rng.uniform(1, 20, 22)]
    across, along = round(0.625 * size), size / 8
    rows = rows_of(folder / "mix", [(across, across, round(along * s)) for s in sizes])
    spec = Model.load(url).spec
    tasks = score._tasks(rows, [scoring.cost(r, spec) for r in rows], 2)
    order = sorted(rows, key=lambda r: r["uid"])
    counted = [order[n :: len(tasks)] for n in range(len(tasks))]
    found: dict[str, list[float]] = {"by cost": [], "by count": []}
    for turn in range(-1, turns):
        predictions, _ = score.predict(spark, rows, url, "cpu")
        if turn < 0:
            continue
        took = {p["volume"]: p["seconds"] for p in predictions}
        for name, groups in (("by cost", tasks), ("by count", counted)):
            times = [sum(took[r["uid"]] for r in g) for g in groups]
            found[name].append(max(times) / statistics.fmean(times))
    out = {"tasks": len(tasks), "by count": round(statistics.median(found["by count"]), 3)}
    turns_found = [round(f, 3) for f in found["by cost"]]
    return out | {"by cost": beside(statistics.median(found["by cost"]), STRAGGLER, at_most=True) | {"turns": turns_found}}


def parts(spark, folder: pathlib.Path, turns: int, size: int) -> dict:
    from sparkmed.spark import score

    url, rows = str(folder / "model"), rows_of(folder / "large", [(2 * size,) * 3])
    seconds: dict[str, list[float]] = {"parts": [], "whole": []}
    for turn in range(-1, turns):
        for name, split in (("parts", 1e-3), ("whole", None)):
            started = time.perf_counter()
            score.predict(spark, rows, url, "cpu", scratch=str(folder / "scratch"), split_mb=split)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {"parts/whole": ratio(seconds["parts"], seconds["whole"], None)}


def memory(folder: pathlib.Path) -> dict:
    program, out = pathlib.Path(__file__).parents[1] / "tests" / "memory.py", {}
    for name, (dtype, spec, classes) in MEMORY_CASES.items():
        command = [sys.executable, program, "[256, 256, 320]", dtype, json.dumps(spec), str(classes), str(folder)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        out[name] = beside(found["growth"] / found["volume"], MEMORY, at_most=True)
    return out


if __name__ == "__main__":
    from sparkmed.spark import session

    defaults = {"turns": 5, "volumes": 8, "size": 64}
    given = dict(a.split("=", 1) for a in sys.argv[1:])
    if set(given) - {*defaults, "folder"}:
        sys.exit(__doc__)
    turns, volumes, size = (int(given.get(name, value)) for name, value in defaults.items())
    out = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "load": [round(x, 1) for x in os.getloadavg()]}
    with tempfile.TemporaryDirectory(dir=given.get("folder")) as scratch:
        folder = pathlib.Path(scratch)
        spark = session.session(config.Spark(master="local[2]"), "benchmark")
        out["throughput"] = throughput(spark, folder, turns, volumes, size)
        out["straggler"] = straggler(spark, folder, turns, size)
        out["parts"] = parts(spark, folder, max(1, turns // 2), size)
        spark.stop()
        out["windows"] = windows(folder, turns, size)
        out["memory"] = memory(folder)
    print(json.dumps(out | {"load at the end": [round(x, 1) for x in os.getloadavg()]}, indent=2))
