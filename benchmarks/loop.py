"""What the training loop costs beside a bare torch loop, and what a second rank gains.

usage: python benchmarks/loop.py [turns=5] [patches=64] [epochs=3] [launcher=torch] [folder=FOLDER]

Prints one JSON object. The dataset, ``patches`` float32 32^3 patches with labels, is made in ``folder`` (default: the temporary
one) and removed. All training is on segmentation with DiceCE, AdamW, batches of 4 and no augmentation. The first of ``epochs``
warms up: only those behind it count. Every figure is a median; programs take turns.

``step``: milliseconds per step of :func:`sparkmed.training.loop.fit` in one process against a loop of seven lines over the same
patches as tensors, with one torch thread and with one per core: with the network that a config has by default, and with a small one
(a MONAI UNet 8-16-32), whose steps are so short that a millisecond shows.
``ranks``: samples/s over all ranks with the network that a config has by default and one torch thread per rank. ``one core``: one
rank on one core. ``free``: one rank that may use all cores, for its loader's threads. ``apart``: two single ranks at once, each on
a core of its own, which do not know of each other: what this machine gives at most. ``two``: two ranks on two cores of local
Spark, started by ``launcher``.
``gpu``: null without one. Else, with patches of 64^3 and bfloat16: samples/s that the loader brings to the GPU from the disk, and
``step`` with tensors that are on the GPU already.
"""

import io
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measure import beside

from sparkmed import config
from sparkmed.learning import networks
from sparkmed.training import launch, loop
from sparkmed.training.loader import PatchLoader

SMALL = {"name": "UNet", "channels": [8, 16, 32], "strides": [2, 2]}
STEP, RANKS, DELIVERED = 1.05, 1.8, 1.0
"""Targets."""
BATCH = 4


def settings(**train) -> config.Config:
    """The network is the config's own unless given."""
    plain = {
        "processes": 1, "threads": 1, "batch_size": BATCH, "device": "cpu", "optimizer": {"name": "AdamW", "lr": 0.001},
        "warmup_epochs": 0, "schedule": "constant", "clip_norm": None, "patience": None, "augment": {}, "restarts": 0,
    }  # fmt: skip
    data = {"name": "loop", "task": "segmentation", "classes": ["background", "organ"], "archive": "none", "seed": 0}
    return config.parse(data | {"train": plain | train})


def make(folder: pathlib.Path, patches: int, size: int) -> str:
    """Bright boxes in noise with their labels, in row groups of 8 MB; two patches for validation."""
    rng = np.random.default_rng(0)
    names = ("patch_id", "subject", "volume")
    schema = pa.schema([(n, pa.string()) for n in names] + [("image", pa.binary()), ("label", pa.binary())])
    counts = {"train": patches, "val": 2}
    for split, many in counts.items():
        rows = []
        for i in range(many):
            label = np.zeros((size, size, size), np.uint8)
            a, b, c = rng.integers(0, size // 2, 3)
            label[a : a + size // 2, b : b + size // 2, c : c + size // 2] = 1
            image = (rng.normal(0, 0.5, label.shape) + label).astype(np.float32)[None]
            rows.append(dict.fromkeys(names, f"{split}{i}") | {"image": npy(image), "label": npy(label)})
        place = folder / f"split={split}" / "part-00000.parquet"
        place.parent.mkdir(parents=True)
        per_group = max(1, round(8e6 / (5 * size**3)))
        pq.write_table(pa.Table.from_pylist(rows, schema), place, per_group, compression="none", use_dictionary=False)
    fields = [{"name": "image", "dtype": "float32", "shape": [1, size, size, size], "codec": "ndarray"}]
    fields += [{"name": "label", "dtype": "uint8", "shape": [size] * 3, "codec": "ndarray"}]
    fields += [{"name": n, "dtype": "str"} for n in names]
    meta = {"format_version": 1, "task": "segmentation", "counts": counts, "fields": fields}
    (folder / "_dataset.json").write_text(json.dumps(meta))
    return str(folder)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def behind_first(history: list[dict]) -> list[float]:
    """samples/s of the epochs that count."""
    return [row["samples_per_s"] for row in history[1:]]


# step


def bare(settings: config.Config, image: torch.Tensor, label: torch.Tensor, device: torch.device) -> list[float]:
    """samples/s of each epoch that counts over tensors on ``device``: the loop that one would write for them."""
    import monai.losses

    torch.manual_seed(settings.seed)
    network = networks.build(settings.train.network, 1, 2, 3).to(device)
    loss_of = monai.losses.DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.001)
    half = settings.train.precision == "bfloat16"
    rates = []
    for _ in range(settings.train.epochs):
        started = time.perf_counter()
        network.train()
        for x, y in zip(image.split(BATCH), label.split(BATCH), strict=True):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                output = network(x)
            loss_of(output.float(), y).backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(len(image) / (time.perf_counter() - started))
    return rates[1:]


def step(url: str, turns: int, scratch: str, **train) -> dict:
    s = settings(**train)
    device = torch.device(s.train.device)
    feed = PatchLoader(url, BATCH, shuffle=False, split="train")
    batches = [feed.to_device(batch, device) for batch in feed]
    image, label = (torch.cat([b[name] for b in batches]) for name in ("image", "label"))
    rates: dict[str, list[list[float]]] = {"loop": [], "bare": []}
    torch.set_num_threads(s.train.threads)
    for _ in range(turns):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            rates["loop"].append(behind_first(loop.fit(s, url, folder)["history"]))
        rates["bare"].append(bare(s, image, label, device))
    found = [statistics.median(b) / statistics.median(a) for a, b in zip(rates["loop"], rates["bare"], strict=True)]
    out = {f"{name}_ms": round(1e3 * BATCH / statistics.median(sum(r, [])), 2) for name, r in rates.items()}
    return out | {"loop/bare": beside(statistics.median(found), STEP, at_most=True) | {"turns": [round(r, 3) for r in found]}}


# ranks


def alone(url: str, epochs: int, scratch: str, cores: list[set[int]]) -> float:
    """samples/s of single ranks at once, summed: a process on each set of cores."""
    command = [sys.executable, __file__, "--rank", url, scratch, f"epochs={epochs}"]
    started = [
        subprocess.Popen([*command, ",".join(map(str, c))], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for c in cores
    ]
    return sum(statistics.median(json.loads(process.communicate()[0].splitlines()[-1])) for process in started)


def rank_in_this_process(url: str, scratch: str, epochs: int, cores: set[int]):
    """Prints samples/s of the epochs that count."""
    for thread in os.listdir("/proc/self/task"):  # those of libraries too
        os.sched_setaffinity(int(thread), cores)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        print(json.dumps(behind_first(loop.fit(settings(epochs=epochs), url, folder)["history"])))


def ranks(url: str, turns: int, epochs: int, scratch: str, launcher: str) -> dict:
    from sparkmed.spark import session

    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        return {"skipped": "fewer than two cores"}
    spark = session.session(config.Spark(master="local[2]"), "benchmark")
    s = settings(processes=2, epochs=epochs, launcher=launcher)
    rates: dict[str, list[float]] = {name: [] for name in ("one core", "free", "apart", "two")}
    for _ in range(turns):
        rates["one core"].append(alone(url, epochs, scratch, [{cores[0]}]))
        rates["free"].append(alone(url, epochs, scratch, [set(cores)]))
        rates["apart"].append(alone(url, epochs, scratch, [{c} for c in cores]))
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            rates["two"].append(statistics.median(behind_first(launch.run(s, url, folder, slots=2)["history"])))
    spark.stop()
    out = {"launcher": launcher, "samples_per_s": {name: round(statistics.median(r), 2) for name, r in rates.items()}}
    for two in ("apart", "two"):
        for one in ("one core", "free"):
            found = [b / a for a, b in zip(rates[one], rates[two], strict=True)]
            target = RANKS if two == "two" else None
            out[f"{two}/{one}"] = beside(statistics.median(found), target) | {"turns": [round(r, 3) for r in found]}
    return out


# gpu


def gpu(folder: pathlib.Path, turns: int, epochs: int, device: str = "cuda", patches: int = 512, size: int = 64) -> dict | None:
    """The loader may hold a quarter of the dataset, so it reads each epoch anew."""
    if device == "cuda" and not torch.cuda.is_available():
        return None
    url = make(folder / "gpu", patches, size)
    held = 5 * size**3 * patches / 2**20 / 4
    delivered = []
    for _ in range(turns + 1):
        loader = PatchLoader(url, BATCH, split="train", memory_mb=held, pin_memory=device == "cuda")
        started = time.perf_counter()
        for batch in loader:
            loader.to_device(batch, torch.device(device))
        if device == "cuda":
            torch.cuda.synchronize()
        delivered.append(patches / (time.perf_counter() - started))
    train = {"epochs": epochs, "device": device, "precision": "bfloat16", "memory_mb": held, "threads": torch.get_num_threads()}
    steps = step(url, turns, str(folder), **train)
    brings, consumes = statistics.median(delivered[1:]), 1e3 * BATCH / steps["bare_ms"]
    out = {"name": torch.cuda.get_device_name() if device == "cuda" else device, "delivered_per_s": round(brings, 1)}
    return out | {"consumed_per_s": round(consumes, 1), "delivered/consumed": beside(brings / consumes, DELIVERED), "step": steps}


if __name__ == "__main__":
    defaults = {"turns": 5, "patches": 64, "epochs": 3}
    given = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    rest = [a for a in sys.argv[1:] if "=" not in a]
    if set(given) - {*defaults, "folder", "launcher"} or (rest and (rest[0], len(rest)) != ("--rank", 4)):
        sys.exit(__doc__)
    turns, patches, epochs = (int(given.get(name, value)) for name, value in defaults.items())
    if rest:
        rank_in_this_process(rest[1], rest[2], epochs, {int(c) for c in rest[3].split(",")})
        sys.exit()
    out = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "patches": patches, "turns": turns, "epochs": epochs}
    with tempfile.TemporaryDirectory(dir=given.get("folder")) as scratch:
        url = make(pathlib.Path(scratch) / "data", patches, 32)
        out["step"] = {}
        for name, network in (("default", {}), ("small", {"network": SMALL})):
            for threads in sorted({1, len(os.sched_getaffinity(0))}):
                out["step"][f"{name}, threads {threads}"] = step(url, turns, scratch, **network, epochs=epochs, threads=threads)
        out["ranks"] = ranks(url, max(1, turns // 2), epochs, scratch, given.get("launcher", "torch"))
        out["gpu"] = gpu(pathlib.Path(scratch), turns, epochs)
    print(json.dumps(out, indent=2))
