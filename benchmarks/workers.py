"""What a task costs that does next to nothing, with our daemon of Python workers and with Spark's own.

usage: python benchmarks/workers.py [turns=3] [tasks=120]

Prints one JSON object. Each turn starts one local Spark of two slots after the other, in a process of its own; a ratio is the
median over turns of the ratio within a turn, Spark's own by ours. A task imports what the score stage does, if it is not there.

``first``: seconds until the first two tasks have ended, workers started and everything imported. ``tasks``: seconds for ``tasks``
more. ``cpu``: seconds of the processor that the workers took for those.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time

import psutil
from measure import beside

DAEMONS = {"ours": "sparkmed.spark.daemon", "spark": "pyspark.daemon"}


def one(daemon: str, tasks: int) -> dict[str, float]:
    from sparkmed import config
    from sparkmed.spark import session

    context = session.session(
        config.Spark(master="local[2]", conf={"spark.python.daemon.module": daemon}), "benchmark"
    ).sparkContext

    def work(n):
        from sparkmed.spark import catalog, score  # noqa: F401

        return n, os.getpid()

    def run(many: int) -> tuple[float, set[int]]:
        started = time.perf_counter()
        found = context.parallelize(range(many), many).map(work).collect()
        if [n for n, _ in found] != list(range(many)):
            sys.exit(f"{len(found)} of {many} tasks")
        return time.perf_counter() - started, {pid for _, pid in found}

    first, workers = run(2)
    before = {pid: sum(psutil.Process(pid).cpu_times()[:2]) for pid in workers}
    seconds, _ = run(tasks)
    return {"first": first, "tasks": seconds, "cpu": sum(sum(psutil.Process(p).cpu_times()[:2]) - t for p, t in before.items())}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2], int(sys.argv[3]))))
        sys.exit()
    given = {"turns": 3, "tasks": 120} | dict(a.split("=", 1) for a in sys.argv[1:])
    if set(given) != {"turns", "tasks"}:
        sys.exit(__doc__)
    found: dict[str, list[dict]] = {name: [] for name in DAEMONS}
    for _ in range(int(given["turns"])):
        for name, daemon in DAEMONS.items():
            command = [sys.executable, __file__, "--one", daemon, str(given["tasks"])]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    out: dict = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "tasks": int(given["tasks"])}
    for what in ("first", "tasks", "cpu"):
        out[what] = {name: round(statistics.median(turn[what] for turn in turns), 2) for name, turns in found.items()}
        ratios = [b[what] / max(a[what], 0.01) for a, b in zip(found["ours"], found["spark"], strict=True)]
        out[f"{what}, spark/ours"] = beside(statistics.median(ratios), None) | {"turns": [round(r, 2) for r in ratios]}
    print(json.dumps(out, indent=2))
