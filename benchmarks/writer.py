"""How fast patches are written, against a plain loop, and the memory that a task takes while it cuts a large CT series.

usage: python benchmarks/writer.py [slices=1000] [columns=512] [volumes=8] [turns=3] [folder=FOLDER]

Prints one JSON object. ``memory``: peak resident memory of a fresh process that cuts a series of ``slices`` DICOM files of
``columns`` x ``columns`` int16 pixels with a NIfTI label, as a Spark task does, over the bytes of the voxels; ``imports`` is what
that process has before it begins. ``speed``: MB/s of patches before compression on one core, in turns: ``writer``, all that the
tasks of the patches stage do, in one process; ``plain``, a loop in that process that reads, preprocesses, cuts and writes the same
rows with pyarrow; ``stage``, the whole stage by Spark ``local[1]`` whose session is up already, with what Spark and Petastorm's
metadata take whatever the size. Everything is written to ``folder`` (default: the temporary one) and removed. ``slices=0`` or
``volumes=0`` leaves one of the two out.
"""

import io
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparkmed import config, dataset, formats
from sparkmed.formats import dicom_write, nifti
from sparkmed.formats.instance import VolumeHeader
from sparkmed.imaging import geometry, patches, phantom, preprocess
from sparkmed.imaging.volume import Volume

CLASSES = ["background", "liver", "kidneys"]
PREPROCESS = {
    "zscore": {"orientation": "RAS", "intensity": {"kind": "zscore"}},
    "window": {"orientation": "RAS", "intensity": {"kind": "window", "low": -200, "high": 300}},
    "percentile": {"orientation": "RAS", "intensity": {"kind": "percentile"}},
    "spacing": {"orientation": "RAS", "spacing": [1.0, 1.0, 1.0], "intensity": {"kind": "zscore"}},
}


def settings(folder: pathlib.Path, **changes) -> config.Config:
    plain = {"name": "writer", "task": "segmentation", "classes": CLASSES, "archive": str(folder), "lake": str(folder / "lake")}
    return config.parse(plain | {"identity": {"keep_subjects": True}} | changes)


def row(image: VolumeHeader, label: VolumeHeader, subject: str, split: str) -> dict:
    facts = {"subject": subject, "split": split, "target": None, "label": json.dumps(label.row()), "label_uid": label.uid}
    return image.row() | facts


# memory


def write_series(folder: pathlib.Path, columns: int, slices: int):
    """A CT series of ``columns`` x ``columns`` x ``slices``, and its label, written in slabs; noise, as anatomy does not matter."""
    affine = geometry.lps_to_ras(np.diag([0.8, 0.8, 1.0, 1.0]))
    rng = np.random.default_rng(0)
    patient = dicom_write.Patient("Bench^Mark", "BENCH")
    (folder / "series").mkdir(parents=True)
    for first in range(0, slices, 50):
        many = min(50, slices - first)
        voxels = rng.normal(0, 300, (1, columns, columns, many)).astype(np.int16)
        at = affine.copy()
        at[2, 3] = first
        numbers = range(first + 1, first + many + 1)
        for number, data in zip(numbers, dicom_write.ct_series(Volume(voxels, at), patient, "bench", numbers), strict=True):
            header = renamed(data, number)
            (folder / "series" / f"{number:05d}.dcm").write_bytes(header)
    label = np.zeros((1, columns, columns, slices), np.uint8)
    label[:, columns // 4 : columns // 2, columns // 4 : columns // 2] = 1
    label[:, columns // 2 : columns // 2 + 20, columns // 4 : columns // 2] = 2
    nifti.write(Volume(label, affine), str(folder / "label.nii.gz"))


def renamed(data: bytes, number: int) -> bytes:
    """The object with a UID of its own: slabs number their slices from 0."""
    import pydicom

    read = pydicom.dcmread(io.BytesIO(data))
    read.SOPInstanceUID = read.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=["bench", str(number)])
    stream = io.BytesIO()
    read.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def peak() -> int:
    """Largest resident memory of this process so far in bytes; getrusage would add that of the program which started it."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])


def cut_in_this_process(folder: pathlib.Path, name: str):
    """Spill the patches of the series, as a task does; prints peak memory before and after."""
    image, label = (VolumeHeader.from_row(json.loads((folder / f"{n}.json").read_text())) for n in ("image", "label"))
    cutting = {"size": [64, 64, 64], "sampler": "grid"}
    s = settings(folder, preprocess=PREPROCESS[name], patches=cutting)
    before = peak()
    started = time.perf_counter()
    spilled = dataset.spill([(0, row(image, label, "s", "train"))], s, 1, str(folder / "spilled"))
    seconds = time.perf_counter() - started
    assert not spilled.refused, spilled.refused
    cut = sum(len(run.keys) for run in spilled.runs)
    print(json.dumps({"imports": before, "peak": peak(), "patches": cut, "seconds": seconds}))


def memory(folder: pathlib.Path, columns: int, slices: int) -> dict:
    write_series(folder, columns, slices)
    (label,), _ = formats.read_headers(str(folder / "label.nii.gz"))
    (image,), refused = formats.read_headers(str(folder / "series"))
    assert not refused, refused[0]
    for name, header in (("image", image), ("label", label)):
        (folder / f"{name}.json").write_text(json.dumps(header.row()))
    volume = 2 * columns * columns * slices
    out = {"series": [columns, columns, slices], "volume_mb": round(volume / 1e6, 1)}
    for name in PREPROCESS:
        command = [sys.executable, __file__, "cut", str(folder), name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        found = json.loads(done.stdout.splitlines()[-1])
        out[name] = {
            "imports_mb": round(found["imports"] / 1e6, 1),
            "peak_mb": round(found["peak"] / 1e6, 1),
            "ratio": round(found["peak"] / volume, 3),
            "ratio_without_imports": round((found["peak"] - found["imports"]) / volume, 3),
            "patches": found["patches"],
            "seconds": round(found["seconds"], 1),
        }
    return out


# speed


def plain_loop(rows: list[dict], s: config.Config, folder: pathlib.Path) -> int:
    """Bytes of patches that were read, preprocessed, cut and written, in the order of the volumes, one row group at a time."""
    schema = dataset.arrow_schema(dataset.fields(s, 1))
    size = dataset.patch_bytes(s, 1)
    per_group = max(1, int(s.patches.row_group_mb * 1e6 / size))
    written = 0
    for split in ("train", "val", "test"):
        folder.joinpath(f"split={split}").mkdir(parents=True)
        waiting = []
        path = folder / f"split={split}" / "part-00000.parquet"
        options = {"compression": s.patches.compression, "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(path, schema, **options) as out:
            for r in (r for r in rows if r["split"] == split):
                image = formats.read_volume(VolumeHeader.from_row(r))
                image, label = preprocess.apply(image, s.preprocess, dataset.read_label(r, image))
                seed = f"{s.seed}/{r['uid']}"
                if split == "train":
                    places, _ = patches.sample(image.spatial_shape, s.patches, seed, label.array[0], len(s.classes))
                else:
                    places = patches.grid(image.spatial_shape, s.patches.size, s.patches.overlap)
                for n, place in enumerate(places):
                    found = {"image": patches.extract(image.array, place), "label": patches.extract(label.array[0], place)}
                    names = {"patch_id": dataset.patch_id(r["uid"], n), "subject": r["subject"], "volume": r["uid"]}
                    waiting.append(names | {name: npy(array) for name, array in found.items()})
                    written += size
                    if len(waiting) == per_group:
                        out.write_table(pa.Table.from_pylist(waiting, schema))
                        waiting = []
            if waiting:
                out.write_table(pa.Table.from_pylist(waiting, schema))
        with path.open("rb") as f:
            os.fsync(f.fileno())  # the writer does so too
    return written


def writer(rows: list[dict], s: config.Config, folder: pathlib.Path):
    """What the tasks of the patches stage do, one after the other."""
    folder.mkdir()
    volumes = dataset.numbered(rows)
    facts = [(r["uid"], r["subject"], r["target"]) for _, r in volumes]
    spilled = dataset.spill(volumes, s, 1, str(folder / "_spilled"))
    for planned in dataset.plan([spilled], s, 1):
        dataset.write(planned, facts, s, 1, str(folder))


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def speed(folder: pathlib.Path, volumes: int, turns: int) -> dict:
    from sparkmed.spark import patches as spark_patches
    from sparkmed.spark import session

    rows = []
    for i in range(volumes):
        image, label = phantom.ct(i, (160, 160, 96), (2.5, 2.5, 4.0))
        image = image.with_array(np.rint(image.array).astype(np.int16))
        for name, volume in (("img", image), ("lab", label)):
            nifti.write(volume, str(folder / name / f"s{i:02d}.nii.gz"))
        (image,), _ = formats.read_headers(str(folder / "img" / f"s{i:02d}.nii.gz"))
        (label,), _ = formats.read_headers(str(folder / "lab" / f"s{i:02d}.nii.gz"))
        rows.append(row(image, label, f"s{i}", {0: "val", 1: "test"}.get(i, "train")))
    cutting = {"size": [64, 64, 64], "sampler": "balanced", "per_volume": 64}
    spec = {"orientation": "RAS", "intensity": {"kind": "zscore"}}
    spark = session.session(config.Spark(master="local[1]"), "benchmark")
    seconds: dict[str, list[float]] = {"writer": [], "plain": [], "stage": []}
    for turn in range(-1, turns):  # the first is for imports and for the files' way into memory
        s = settings(folder, lake=str(folder / f"lake{turn}"), preprocess=spec, patches=cutting)
        times = [time.perf_counter()]
        writer(rows, s, folder / f"writer{turn}")
        times.append(time.perf_counter())
        written = plain_loop(rows, s, folder / f"plain{turn}")
        times.append(time.perf_counter())
        url = spark_patches.write(spark, rows, s, {})
        times.append(time.perf_counter())
        if turn >= 0:
            for name, taken in zip(seconds, np.diff(times).tolist(), strict=True):
                seconds[name].append(taken)
        assert sum(dataset.describe(url)["counts"].values()) * dataset.patch_bytes(s, 1) == written
    spark.stop()
    out = {"mb": round(written / 1e6, 1)}
    out |= {f"{name}_mb_per_s": round(written / 1e6 / statistics.median(times), 1) for name, times in seconds.items()}
    for name in ("writer", "stage"):
        ratios = [plain / taken for taken, plain in zip(seconds[name], seconds["plain"], strict=True)]
        out[f"{name}_to_plain"] = {"median": round(statistics.median(ratios), 3), "turns": [round(r, 3) for r in ratios]}
    return out | {"seconds": {name: [round(t, 2) for t in times] for name, times in seconds.items()}}


if __name__ == "__main__":
    if sys.argv[1:2] == ["cut"]:
        cut_in_this_process(pathlib.Path(sys.argv[2]), sys.argv[3])
        sys.exit()
    given = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    unknown = set(given) - {"slices", "columns", "volumes", "turns", "folder"}
    if unknown or len(given) < len(sys.argv) - 1:
        sys.exit(__doc__)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(dir=given.get("folder")) as scratch:
        folder = pathlib.Path(scratch)
        out = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
        if int(given.get("slices", 1000)):
            out["memory"] = memory(folder / "memory", int(given.get("columns", 512)), int(given.get("slices", 1000)))
        if int(given.get("volumes", 8)):
            out["speed"] = speed(folder / "speed", int(given.get("volumes", 8)), int(given.get("turns", 3)))
        print(json.dumps(out, indent=2))
