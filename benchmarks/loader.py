"""How fast PatchLoader is, what memory it takes, and what a resume costs, beside plain pyarrow and Petastorm's DataLoader.

usage: python benchmarks/loader.py [mb=400] [turns=5] [batch=16] [memory_mb=256] [window_mb=16] [folder=FOLDER]

Prints one JSON object. Datasets of ``mb`` MB before compression with row groups of 8 MB are made in ``folder`` (default: the
temporary one) and removed: float32 32^3 and int16 64^2 patches, uncompressed and zstd, each with a number as its target.

``speed``: MB/s of patches, all of one dataset in turns behind one turn that warms up. ``raw`` reads the image column of every row
group with pyarrow, with its threads, and copies each payload into one batch buffer. PatchLoader and Petastorm (``make_reader``,
two threads) are made anew for each turn, as they come. A ratio is the median over turns of the ratio within a turn.
``memory``: growth of resident memory over an epoch with ``memory_mb`` and ``window_mb``, in a process of its own, seen at each
batch. It counts from before the loader is made, and so includes its threads, the index, what is loaded at first use (12 MB), the
batch that is looked at, and pages that Arrow's pools and malloc keep for later; ``arrow_mb`` is the most that was in use in the
pool of row groups.
``resume``: seconds from a new loader to its first batch, at places all over the epoch, against the start of the epoch.
"""

import contextlib
import io
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from measure import beside, take_turns

from sparkmed import PatchLoader

KINDS = {"float32 32^3": ("float32", (1, 32, 32, 32)), "int16 64^2": ("int16", (1, 64, 64, 1))}
TARGETS = {
    ("float32 32^3", "none"): {"sequential/raw": 0.80, "shuffled/sequential": 0.70, "shuffled/petastorm": 4},
    ("float32 32^3", "zstd"): {"sequential/raw": 0.85, "shuffled/sequential": 0.70, "shuffled/petastorm": 4},
    ("int16 64^2", "none"): {"sequential/raw": None, "shuffled/sequential": 0.70, "shuffled/petastorm": 8},
    ("int16 64^2", "zstd"): {"sequential/raw": None, "shuffled/sequential": 0.70, "shuffled/petastorm": 8},
}
"""Of speed; None is reported only."""
ROW_GROUP_BYTES = 8e6
RESUME, FLAT = 1.2, 1.05


# datasets


def make(folder: pathlib.Path, dtype: str, shape: tuple[int, ...], compression: str, mb: float) -> str:
    """A dataset in two files: smooth ground with noise in whole numbers, as CT has it, of sd 1 where it is float32."""
    rng = np.random.default_rng(0)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    per_group = round(ROW_GROUP_BYTES / size)
    groups = max(4, round(mb * 1e6 / size / per_group))
    axes = np.meshgrid(*[np.linspace(0, 1, s) for s in shape], indexing="ij")
    columns = {"image": pa.binary(), "target": pa.int64(), "patch_id": pa.string(), "subject": pa.string(), "volume": pa.string()}
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])
    files = {}
    for part, many in enumerate((groups // 2, groups - groups // 2)):
        path = f"split=train/part-{part:05d}.parquet"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        options = {"compression": compression, "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(folder / path, schema, **options) as out:
            for group in range(many):
                rows = []
                for i in range(per_group):
                    ground = sum(rng.normal(0, 100) * np.cos(rng.uniform(1, 6) * a) for a in axes)
                    image = np.rint(ground + rng.normal(0, 20, shape)).astype(np.int16)
                    image = image if dtype == "int16" else (image / 100).astype(np.float32)
                    name = f"{part}-{group}-{i}"
                    rows.append({"image": npy(image), "target": i % 2, "patch_id": name, "subject": name[:3], "volume": name[:3]})
                out.write_table(pa.Table.from_pylist(rows, schema))
        files[path] = many * per_group
    fields = [{"name": "image", "dtype": dtype, "shape": list(shape), "codec": "ndarray"}, {"name": "target", "dtype": "int64"}]
    fields += [{"name": name, "dtype": "str"} for name in ("patch_id", "subject", "volume")]
    meta = {"format_version": 1, "task": "classification", "counts": {"train": sum(files.values())}, "files": files}
    (folder / "_dataset.json").write_text(json.dumps(meta | {"fields": fields}))
    return folder.as_uri()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def make_all(folder: pathlib.Path, mb: float) -> dict[tuple[str, str], str]:
    """URLs of the datasets, with the metadata that Petastorm wants."""
    from petastorm.codecs import NdarrayCodec, ScalarCodec
    from petastorm.etl.dataset_metadata import materialize_dataset
    from petastorm.unischema import Unischema, UnischemaField
    from pyspark.sql.types import LongType, StringType

    from sparkmed import config
    from sparkmed.spark import session

    spark = session.session(config.Spark(master="local[1]"), "benchmark")
    urls = {}
    for kind, compression in TARGETS:
        dtype, shape = KINDS[kind]
        place = folder / f"{dtype}-{compression}"
        columns = [
            UnischemaField("image", np.dtype(dtype).type, shape, NdarrayCodec(), False),
            UnischemaField("target", np.int64, (), ScalarCodec(LongType()), False),
        ]
        columns += [UnischemaField(n, np.str_, (), ScalarCodec(StringType()), False) for n in ("patch_id", "subject", "volume")]
        with materialize_dataset(spark, place.as_uri(), Unischema("Patches", columns), row_group_size_mb=8):
            urls[kind, compression] = make(place, dtype, shape, compression, mb)
    spark.stop()
    return urls


def megabytes(url: str, files_only: bool = False) -> float:
    """Of a dataset: before compression, or of its files."""
    folder = pathlib.Path(url.removeprefix("file://"))
    if files_only:
        return sum(f.stat().st_size for f in folder.rglob("*.parquet")) / 1e6
    return sum(b.bytes for b in PatchLoader(url).dataset.blocks) / 1e6


# speed


def raw(url: str, batch: int) -> int:
    n, buffer = 0, None
    for fragment in pads.dataset(url.removeprefix("file://"), format="parquet", partitioning="hive").get_fragments():
        for group in fragment.split_by_row_group():
            for payload in group.to_table(columns=["image"])["image"]:
                view = np.frombuffer(payload.as_buffer(), np.uint8)
                if buffer is None:
                    buffer = np.empty((batch, view.size), np.uint8)
                buffer[n % batch, : view.size] = view
                n += 1
    return n


def ours(url: str, batch: int, shuffle: bool) -> int:
    return int(sum(b["weight"].sum().item() for b in PatchLoader(url, batch, shuffle=shuffle)))


def petastorm(url: str, batch: int) -> int:
    from petastorm import make_reader
    from petastorm.pytorch import DataLoader

    reader = make_reader(url, num_epochs=1, reader_pool_type="thread", workers_count=2, schema_fields=["image"])
    with DataLoader(reader, batch_size=batch) as loader:
        return sum(len(b["image"]) for b in loader)


def speed(url: str, targets: dict[str, float | None], turns: int, batch: int) -> dict:
    runs: dict[str, Callable[[], int]] = {
        "raw": lambda: raw(url, batch),
        "sequential": lambda: ours(url, batch, False),
        "shuffled": lambda: ours(url, batch, True),
        "petastorm": lambda: petastorm(url, batch),
    }
    size, rows = megabytes(url), PatchLoader(url).dataset.rows
    seconds = take_turns(runs, turns, rows)
    out = {"mb": round(size, 1), "files_mb": round(megabytes(url, files_only=True), 1), "patches": rows}
    out["mb_per_s"] = {name: round(size / statistics.median(times), 1) for name, times in seconds.items()}
    for ratio, target in targets.items():
        one, other = ratio.split("/")
        found = [b / a for a, b in zip(seconds[one], seconds[other], strict=True)]
        out[ratio] = beside(statistics.median(found), target) | {"turns": [round(r, 3) for r in found]}
    return out


# memory


def watch_this_process(url: str, batch: int, memory_mb: float, window_mb: float):
    """Prints the growth of resident memory in bytes at each batch of an epoch, and the most that Arrow's pool had in use."""
    pool = pa.mimalloc_memory_pool() if "mimalloc" in pa.supported_memory_backends() else pa.default_memory_pool()
    before, growth = resident(), []
    for _ in PatchLoader(url, batch, memory_mb=memory_mb, window_mb=window_mb):
        growth.append(resident() - before)
    print(json.dumps({"growth": growth, "arrow": pool.max_memory()}))


def resident() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(url: str, shape: tuple[int, ...], dtype: str, batch: int, memory_mb: float, window_mb: float) -> dict:
    command = [sys.executable, __file__, "--watch", url, f"batch={batch}", f"memory_mb={memory_mb}", f"window_mb={window_mb}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    seen = json.loads(done.stdout.splitlines()[-1])
    growth = [g / 2**20 for g in seen["growth"]]
    quarter = len(growth) // 4
    second, last = max(growth[quarter : 2 * quarter]), max(growth[-quarter:])
    batches = 2 * batch * math.prod(shape) * np.dtype(dtype).itemsize / 2**20
    return {
        "dataset/budget": round(megabytes(url) * 1e6 / 2**20 / memory_mb, 2),
        "most_mb": beside(max(growth), round(memory_mb + batches, 1), at_most=True),
        "arrow_mb": round(seen["arrow"] / 2**20, 1),
        "second_quarter_mb": round(second, 1),
        "last_quarter_mb": round(last, 1),
        "last/second": beside(last / second, FLAT, at_most=True),
    }


# resume


def first_batch(url: str, batch: int, seed: int, state: dict | None) -> float:
    """Seconds; what was read ahead meanwhile is waited for, but not counted."""
    started = time.perf_counter()
    loader = PatchLoader(url, batch, seed=seed)
    if state is not None:
        loader.load_state_dict(state)
    with contextlib.closing(iter(loader)) as batches:
        next(batches)
        return time.perf_counter() - started


def resume(url: str, batch: int, turns: int) -> dict:
    seconds: dict[str, list[float]] = {"start": [], "resume": []}
    rows = PatchLoader(url).dataset.rows
    for turn in range(-1, turns):
        state = PatchLoader(url, batch, seed=turn + 1).state_dict()
        state["position"] = (turn + 1) * rows // (turns + 1) // batch * batch
        for name, where in (("start", None), ("resume", state)):
            took = first_batch(url, batch, turn + 1, where)
            if turn >= 0:
                seconds[name].append(took)
    found = {name: statistics.median(times) for name, times in seconds.items()}
    out = {f"{name}_ms": round(1e3 * median, 1) for name, median in found.items()}
    return out | {"resume/start": beside(found["resume"] / found["start"], RESUME, at_most=True)}


if __name__ == "__main__":
    defaults = {"mb": 400.0, "turns": 5, "batch": 16, "memory_mb": 256.0, "window_mb": 16.0}
    given = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    rest = [a for a in sys.argv[1:] if "=" not in a]
    if set(given) - {*defaults, "folder"} or (rest and (rest[0], len(rest)) != ("--watch", 2)):
        sys.exit(__doc__)
    settings = {name: type(value)(given.get(name, value)) for name, value in defaults.items()}
    mb, turns, batch, budget, window = settings.values()
    if rest:
        watch_this_process(rest[1], batch, budget, window)
        sys.exit()
    warnings.simplefilter("ignore")  # Petastorm's, about pyarrow
    out = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", **settings, "speed": {}, "memory": {}, "resume": {}}
    with tempfile.TemporaryDirectory(dir=given.get("folder")) as scratch:
        for (kind, compression), url in make_all(pathlib.Path(scratch).resolve(), mb).items():
            name, (dtype, shape) = f"{kind}, {compression}", KINDS[kind]
            out["speed"][name] = speed(url, TARGETS[kind, compression], turns, batch)
            out["memory"][name] = memory(url, shape, dtype, batch, budget, window)
            out["resume"][name] = resume(url, batch, 3 * turns)
    print(json.dumps(out, indent=2))
