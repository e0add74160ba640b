"""What the example configs reach on their public data, measured from archive to score in one run.

usage: python benchmarks/accuracy.py DATA [hippocampus] [radiographs] [nuclei] [lake=FOLDER] [key=value ...]

DATA holds ``hippocampus/`` (Medical Segmentation Decathlon Task04), ``radiographs/`` (chest against abdomen) and ``nuclei/``
(BBBC038: no training, the nucleus finder against masks drawn by hand). Prints one JSON object per example: the figures on held-out
subjects with their 95 % intervals, and seconds per stage. A lake that is there already is gone on with, and then the times of
stages that were done say nothing: the default is a new temporary folder.
"""

import json
import pathlib
import statistics
import sys
import tempfile
import time

import sparkmed
from sparkmed import config, pipeline, tables, tracking
from sparkmed.formats import raster
from sparkmed.hcs import nuclei

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


def nuclei_found(folder: pathlib.Path) -> dict:
    """F1 at IoU 0.5 of the nucleus finder as it is by default, over the fluorescence images: mean of images, and of all nuclei."""
    found, every, others = [], nuclei.Matches(), 0
    for case in sorted(p for p in folder.iterdir() if p.is_dir()):
        image = raster.read_array(next(case.glob("images/*.png")).read_bytes())
        if not nuclei.is_fluorescence(image):
            others += 1
            continue
        truth = nuclei.joined(raster.read_array(m.read_bytes()) for m in sorted(case.glob("masks/*.png")))
        matches = nuclei.matches(nuclei.find(image[0, ..., 0], config.Nuclei()).labels, truth)
        found.append(matches.f1)
        every = every.merge(matches)
    figures = {
        "f1_mean": round(statistics.mean(found), 4),
        "f1_least": round(min(found), 4),
        "f1_of_all_nuclei": round(every.f1, 4),
    }
    return {"example": "nuclei", "images": len(found), "not_fluorescence": others, **figures}


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    data, chosen = pathlib.Path(sys.argv[1]), [a for a in sys.argv[2:] if "=" not in a] or ["hippocampus", "radiographs", "nuclei"]
    overrides = [a for a in sys.argv[2:] if "=" in a and not a.startswith("lake=")]
    lakes = [a.removeprefix("lake=") for a in sys.argv[2:] if a.startswith("lake=")]
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            if name == "nuclei":
                print(json.dumps(nuclei_found(data / name), indent=2), flush=True)
                continue
            print(json.dumps(measure(name, data, pathlib.Path(lakes[0] if lakes else scratch), overrides), indent=2), flush=True)
