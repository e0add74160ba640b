"""What the example configs reach on their public data, measured from archive to score in one run.

usage: python benchmarks/accuracy.py DATA [hippocampus] [radiographs] [lake=FOLDER] [key=value ...]

DATA holds ``hippocampus/`` (Medical Segmentation Decathlon Task04) and ``radiographs/`` (chest against abdomen). Prints one JSON
object per example: the figures on held-out subjects with their 95 % intervals, and seconds per stage. A lake that is there
already is gone on with, and then the times of stages that were done say nothing: the default is a new temporary folder.
"""

import json
import pathlib
import sys
import tempfile
import time

import sparkmed
from sparkmed import config, pipeline, tables, tracking

CONF = pathlib.Path(__file__).parents[1] / "conf"


def measure(name: str, data: pathlib.Path, lake: pathlib.Path, overrides: list[str]) -> dict:
    settings = config.load(str(CONF / f"{name}.yaml"), [f"archive={data / name}", f"lake={lake / name}", *overrides])
    seconds, done = {}, {}
    for stage in pipeline.STAGES:
        started = time.perf_counter()
        done[stage] = pipeline.run_stage(stage, settings, lambda line: print(line, file=sys.stderr))
        seconds[stage] = round(time.perf_counter() - started, 1)
    trained = done["train"]
    figures = {k: v for k, v in trained.items() if k.startswith("test_")}
    rows = [r for r in tables.volumes(settings.lake).rows() if r["split"]]
    subjects = {s: len({r["subject"] for r in rows if r["split"] == s}) for s in ("train", "val", "test")}
    out = {"example": name, "subjects": subjects, **figures, "train_minutes": trained.get("minutes"), "seconds": seconds}
    if settings.task == "classification":
        out |= right_of_files(settings, data / name / "val")
    return out


def right_of_files(settings, folder: pathlib.Path) -> dict:
    """How many of the files in ``folder/{class}/`` the champion gets right, read as a user would; copies count as files."""
    model = sparkmed.load_model(f"models:/{settings.name}@champion", tracking_uri=tracking.of(settings).uri)
    volumes, refused = sparkmed.read_archive(str(folder))
    truth = [pathlib.PurePosixPath(v.sources[0]).parent.name for v in volumes]
    right = sum(model.predict(v).label == t for v, t in zip(volumes, truth, strict=True))
    return {"files_right": right, "files": len(volumes), "files_refused": len(refused)}


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    data, chosen = pathlib.Path(sys.argv[1]), [a for a in sys.argv[2:] if "=" not in a] or ["hippocampus", "radiographs"]
    overrides = [a for a in sys.argv[2:] if "=" in a and not a.startswith("lake=")]
    lakes = [a.removeprefix("lake=") for a in sys.argv[2:] if a.startswith("lake=")]
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            print(json.dumps(measure(name, data, pathlib.Path(lakes[0] if lakes else scratch), overrides), indent=2), flush=True)
