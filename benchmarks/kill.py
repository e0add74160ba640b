"""Kill scoring runs by SIGKILL at random moments, run them again, and compare the ledger with one that nobody disturbed.

usage: python benchmarks/kill.py [ROUNDS, 50] [SEED, 0]

Each round is one of: the driver killed at any moment; the driver killed within 50 ms of the start of a commit; Python workers of
the executors killed while the run goes on; two runs at once, with and without the lease, of which one may be killed. After each
round no row may be wrong or double and none may lack its mask. A lake is kept until a run on it comes to its end: then all must be
there, and after a vacuum nothing else. Prints one JSON object; the exit status is 1 if that does not hold.
"""

import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter

import numpy as np
import psutil
import torch

from sparkmed import config, lease, pipeline, storage, tables, tracking
from sparkmed.formats import nifti
from sparkmed.imaging.volume import Volume
from sparkmed.learning import networks
from sparkmed.learning.model import Model, ModelSpec
from sparkmed.pipeline import ledger
from sparkmed.spark import score as spark_score

VOLUMES, BATCH = 32, 6
CLASSES = ("background", "bright", "dark")
FAILED = "run failed"
KINDS = ("commit", "workers", "two without lease", "driver", "commit", "workers", "commit", "driver", "two")
fork = multiprocessing.get_context("fork")  # what is imported is imported once; this process itself starts no thread


def settings_of(folder: pathlib.Path, lake: pathlib.Path) -> config.Config:
    lean = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"  # a JVM is started for each run
    conf = {"spark.task.maxFailures": "20", "spark.python.daemon.module": "preloaded", "spark.driver.extraJavaOptions": lean}
    return config.parse({
        "name": "killed", "task": "segmentation", "classes": list(CLASSES), "archive": str(folder / "archive"), "lake": str(lake),
        "identity": {"keep_subjects": True}, "volumes": {"images": "{subject}.nii.gz", "labels": {"allow_missing": True}},
        "score": {"commit_every": BATCH}, "spark": {"master": "local[2]", "conf": conf}, "vacuum": {"after_days": 1e-9},
        "train": {"device": "cpu"},
    })  # fmt: skip


PRELOADED = """
import runpy
import monai.inferers, monai.networks.nets
runpy.run_module("sparkmed.spark.daemon", run_name="__main__")
"""
"""Our daemon of Python workers, with MONAI too, which workers would else import when they load the model."""


def prepare(folder: pathlib.Path) -> dict:
    """A lake with a champion and volumes that nobody has scored; and what a run that nobody disturbs makes of a copy of it."""
    draw = np.random.default_rng(0)
    for n in range(VOLUMES):
        image = Volume(draw.normal(size=(1, 12, 12, 12)).astype(np.float32), np.diag([1.0, 1.0, 2.0, 1.0]))
        nifti.write(image, str(folder / "archive" / f"s{n:02d}.nii.gz"))
    settings = settings_of(folder, folder / "lake")
    pipeline.catalog(settings)
    pipeline.volumes(settings)
    spec = ModelSpec(
        name="killed", task="segmentation", classes=CLASSES, in_channels=1, spatial_dims=3, window=(8, 8, 8),
        network=config.Component(name="UNet", channels=[2, 4], strides=[2]), preprocess=config.Preprocess(),
    )  # fmt: skip
    torch.manual_seed(1)
    Model(spec, networks.build(spec.network, 1, len(CLASSES), 3)).save(str(folder / "model"))
    registry = tracking.of(settings)
    with registry.run("by hand", {}, {}, {"name": "d", "version": "1", "digest": "0", "url": str(folder)}) as run:
        registry.crown(run.register(str(folder / "model"), {}), "by hand")
    ledger.pinned(settings)  # the model is in the lake before it is copied
    shutil.copytree(folder / "lake", folder / "undisturbed")
    calm = settings_of(folder, folder / "undisturbed")
    began = time.monotonic()
    pipeline.score(calm)
    return {"seconds": time.monotonic() - began, "rows": contents(calm)}


def contents(settings: config.Config) -> dict[str, list]:
    """By key what was predicted, and the digest of the mask; a key that is there twice has two."""
    found: dict[str, list] = {}
    for r in tables.predictions(settings.lake).rows():
        mask = storage.join(settings.lake, r["mask"])
        content = config.digest(storage.read_bytes(mask).hex()) if storage.exists(mask) else "missing"
        found.setdefault(r["key"], []).append([r["volume"], r["ml"], r["probability"], r["config_digest"], content])
    return found


def leftovers(settings: config.Config) -> dict[str, int]:
    return dict(Counter(x.what for x in pipeline.vacuum(settings, dry_run=True)))


def compared(settings: config.Config, undisturbed: dict[str, list], whole: bool) -> dict[str, int]:
    found = contents(settings)
    return {
        "missing": len(undisturbed.keys() - found.keys()) if whole else 0,
        "doubled": sum(len(v) > 1 for v in found.values()),
        "wrong": sum(v[0] != undisturbed.get(k, [None])[0] for k, v in found.items()),
        "masks missing": sum(x[-1] == "missing" for v in found.values() for x in v),
    }


def scored(folder: str, lake: str, told, with_lease: bool):
    """Runs the score stage, and says when it comes to what others can see."""
    os.setpgid(0, 0)
    sys.stdout = sys.stderr = open(f"{lake}.log", "a")
    os.dup2(sys.stderr.fileno(), 2)

    def marked(owner, name):
        whole = getattr(owner, name)

        def call(*arguments, **more):
            told.send(f"{name} {getattr(arguments[0], 'url', '').rpartition('/')[2]}".strip())
            outcome = whole(*arguments, **more)
            told.send(f"after {name}")
            return outcome

        setattr(owner, name, call)

    marked(spark_score, "predict")
    marked(tables.Table, "commit")
    if not with_lease:
        lease.held = lambda *_, **__: contextlib.nullcontext()
    outcome = pipeline.score(settings_of(pathlib.Path(folder), pathlib.Path(lake)))
    told.send(f"ended {outcome['scored']}")


class Run:
    def __init__(self, folder: pathlib.Path, lake: pathlib.Path, with_lease: bool = True):
        self.heard, told = fork.Pipe(duplex=False)
        self.process = fork.Process(target=scored, args=(str(folder), str(lake), told, with_lease))
        self.process.start()
        told.close()
        self.phase = "start"

    def until(self, wanted: str, count: int = 1, seconds: float = 300.0) -> bool:
        """Listen until the run says ``wanted`` for the count-th time; False when it ended before, or time is over."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and self.heard.poll(left):
            try:
                self.phase = self.heard.recv()
            except EOFError:
                return False
            count -= self.phase.startswith(wanted)
            if not count:
                return True
        return False

    def killed(self, left: list[psutil.Process]) -> str | None:
        """SIGKILL; what the run was at, None when it had ended. ``left`` gets the processes that it had started."""
        with contextlib.suppress(psutil.Error):
            left += psutil.Process(self.process.pid).children(recursive=True)
        self.until("nothing", seconds=0.001)
        alive = self.process.is_alive()
        self.process.kill()
        self.process.join()
        return self.phase if alive and not self.phase.startswith("ended") else None

    def ended(self) -> int:
        self.until("ended")
        self.process.join()
        return self.process.exitcode

    def workers(self) -> list[psutil.Process]:
        """Python processes that Spark's daemon has forked."""
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(self.process.pid).children(recursive=True)
            python = {p.pid: p for p in below if "python" in p.name()}
            return [p for p in python.values() if p.ppid() in python]
        return []


def one_round(
    kind: str, folder: pathlib.Path, lake: pathlib.Path, seconds: float, draw: random.Random, left: list[psutil.Process]
) -> tuple[list[str], bool]:
    """What was killed, and at what, and whether a run came to its end; ``left`` gets the processes of killed drivers."""
    two = [Run(folder, lake, kind != "two without lease") for _ in range(2 if kind.startswith("two") else 1)]
    run, hits = two[0], []
    if kind == "commit":
        if run.until("commit", draw.randint(1, VOLUMES // BATCH)):
            time.sleep(draw.uniform(0, 0.05))
        hits.append(run.killed(left))
    elif kind == "driver":
        run.until("predict", seconds=draw.choice((300, draw.uniform(0, seconds))))
        run.until("nothing", seconds=draw.uniform(0, seconds / 2))
        hits.append(run.killed(left))
    elif kind == "workers":
        run.until("predict")
        while run.process.is_alive() and len(hits) < 4:
            run.until("nothing", seconds=draw.uniform(0, 1.0))
            for worker in draw.sample(found := run.workers(), min(len(found), draw.randint(1, 2))):
                with contextlib.suppress(psutil.Error):
                    worker.kill()
                    hits.append(f"worker at {run.phase}")
    elif draw.random() < 0.5:
        run.until("predict")
        run.until("nothing", seconds=draw.uniform(0, seconds / 2))
        hits.append(run.killed(left))
    outcomes = [other.ended() for other in two]
    hits += [FAILED for code in outcomes if code not in (0, -signal.SIGKILL)]
    return [h for h in hits if h], 0 in outcomes


def in_child(work, *arguments):
    """What ``work`` returns, done in a process of its own: threads that it starts are not there when the next one is forked."""
    heard, told = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: told.send(work(*arguments)))
    child.start()
    told.close()
    outcome = heard.recv()
    child.join()
    return outcome


def main(rounds: int, seed: int) -> int:
    draw, said, problems = random.Random(seed), [], Counter()
    before, after, lakes = Counter(), Counter(), 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        (folder / "preloaded.py").write_text(PRELOADED)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *sys.path[1:]])
        calm = in_child(prepare, folder)
        lake, left = None, []
        for number in range(rounds):
            if lake is None:
                lake = folder / f"lake-{number}"
                shutil.copytree(folder / "lake", lake)
            settings, kind = settings_of(folder, lake), KINDS[number % len(KINDS)]
            hits, ended = one_round(kind, folder, lake, calm["seconds"], draw, left)
            if number == rounds - 1 and not ended:
                ended = Run(folder, lake).ended() == 0
            found = in_child(compared, settings, calm["rows"], ended)
            if ended:
                psutil.wait_procs(left, 120)  # executors of killed drivers, which may be writing still
                before.update(in_child(leftovers, settings))
                in_child(lambda settings=settings: len(pipeline.vacuum(settings)))
                after.update(in_child(leftovers, settings))
                for what, count in in_child(compared, settings, calm["rows"], True).items():
                    found[what] += count
                lakes, lake = lakes + 1, None
            found["failed"] = hits.count(FAILED)
            problems.update(found)
            said.append([kind, *(hits or ["nothing left to kill"])])
            print(f"{number + 1:3d} {kind:18s} {', '.join(said[-1][1:])}  {found}", file=sys.stderr, flush=True)
        minutes = (time.monotonic() - began) / 60
    places = Counter(f"{kind}: {hit}" for kind, *hits in said for hit in hits)
    result = {
        "rounds": rounds, "seed": seed, "volumes": VOLUMES, "commits of a run": -(-VOLUMES // BATCH), "lakes": lakes,
        "minutes": round(minutes, 1),
        "rounds by kind": dict(Counter(kind for kind, *_ in said)), "killed": dict(sorted(places.items())),
        "keys missing": problems["missing"], "keys doubled": problems["doubled"], "rows wrong": problems["wrong"],
        "masks missing": problems["masks missing"], "runs failed": problems["failed"],
        "leftovers before vacuum": dict(before), "leftovers after vacuum": dict(after),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    return int(any(problems.values()) or bool(after))


if __name__ == "__main__":
    sys.exit(main(*(int(a) for a in (sys.argv[1:] + ["50", "0"][len(sys.argv) - 1 :]))))
