"""Two ranks started by Horovod against two started by TorchDistributor: the same config, dataset and Spark, turn about.

usage: python benchmarks/launch.py [TURNS, 3]

Prints one JSON object of medians over the turns: ``start_up_s`` from the call to the first step, ``step_s`` of the optimizer steps
behind the first epoch, ``end_s`` from the last epoch to the return of the call, and what torch takes of Horovod's.
"""

import json
import math
import pathlib
import statistics
import sys
import tempfile
import threading
import time

from sparkmed import config
from sparkmed.spark import session
from sparkmed.training import launch, loop

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "training"))
import datasets  # noqa: E402

PATCHES, EPOCHS, RANKS, BATCH = 32, 4, 2, 2
TRAIN = {
    "network": {"name": "UNet", "channels": [16, 32, 64], "strides": [2, 2], "num_res_units": 1, "norm": "instance"},
    "processes": RANKS, "batch_size": BATCH, "epochs": EPOCHS, "threads": 1, "patience": None,
}  # fmt: skip


def measure(launcher: str, url: str, folder: pathlib.Path) -> dict[str, float]:
    told = {"name": "launch", "task": "segmentation", "classes": ["background", "organ"], "archive": "none"}
    settings = config.parse(told | {"patches": {"size": [32, 32, 32]}, "train": TRAIN | {"launcher": launcher}})
    seen, called = [], time.time()

    def watch():
        while not (folder / loop.HISTORY).exists():
            time.sleep(0.005)
        seen.append(time.time())

    threading.Thread(target=watch, daemon=True).start()
    history = launch.run(settings, url, str(folder), slots=RANKS)["history"]
    returned, last = time.time(), (folder / loop.HISTORY).stat().st_mtime
    steps = math.ceil(PATCHES / (BATCH * RANKS))
    return {
        "start_up_s": seen[0] - history[0]["seconds"] - called,
        "step_s": statistics.median(PATCHES / row["samples_per_s"] / steps for row in history[1:]),
        "end_s": returned - last,
    }


if __name__ == "__main__":
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    spark = session.session(config.Spark(master=f"local[{RANKS}]"), "launch")
    spark.range(RANKS).count()
    found = {"horovod": [], "torch": []}
    with tempfile.TemporaryDirectory() as scratch:
        rows = {"train": [datasets.balls(PATCHES, (32, 32, 32))], "val": [datasets.balls(4, (32, 32, 32), seed=1, prefix="v")]}
        url = datasets.write(pathlib.Path(scratch) / "dataset", rows)
        for turn in range(turns):
            for launcher in found:
                found[launcher].append(measure(launcher, url, pathlib.Path(scratch) / f"{launcher}{turn}"))
                print(launcher, found[launcher][-1], file=sys.stderr)
    medians = {k: {m: round(statistics.median(t[m] for t in v), 4) for m in v[0]} for k, v in found.items()}
    ratio = {m: round(medians["torch"][m] / medians["horovod"][m], 3) for m in medians["torch"]}
    print(json.dumps({"ranks": RANKS, "turns": turns, **medians, "torch / horovod": ratio}, indent=2))
