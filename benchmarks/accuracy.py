"""What the example configs reach on their public data, measured from archive to score in one run.

usage: python benchmarks/accuracy.py DATA [hippocampus] [radiographs] [screen_bbbc013] [nuclei] [lake=FOLDER] [key=value ...]

DATA holds ``hippocampus/`` (Medical Segmentation Decathlon Task04), ``radiographs/`` (chest against abdomen), ``hcs_plate/``
(BBBC013, for the example screen_bbbc013) and ``nuclei/`` (BBBC038: no training, the nucleus finder against masks drawn by
hand). Prints one JSON object per example: the figures on held-out subjects with their 95 % intervals, and seconds per stage. A
lake that is there already is gone on with, and then the times of stages that were done say nothing: the default is a new
temporary folder.
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

FOLDERS = {"screen_bbbc013": "hcs_plate"}
CONF = pathlib.Path(__file__).parents[1] / "conf"


def measure(name: str, data: pathlib.Path, lake: pathlib.Path, overrides: list[str]) -> dict:
    archive = data / FOLDERS.get(name, name)
    settings = config.load(str(CONF / f"{name}.yaml"), [f"archive={archive}", f"lake={lake / name}", *overrides])
    seconds, done = {}, {}
    for stage in (*pipeline.STAGES, *(["screen"] if settings.plates else [])):
        started = time.perf_counter()
        done[stage] = pipeline.run_stage(stage, settings, lambda line: print(line, file=sys.stderr))
        seconds[stage] = round(time.perf_counter() - started, 1)
    trained = done["train"]
    figures = {k: v for k, v in trained.items() if k.startswith("test_")}
    rows = [r for r in tables.volumes(settings.lake).rows() if r["split"]]
    subjects = {s: len({r["subject"] for r in rows if r["split"] == s}) for s in ("train", "val", "test")}
    out = {"example": name, "subjects": subjects, **figures, "train_minutes": trained.get("minutes"), "seconds": seconds}
    if settings.plates:
        return out | screened(settings)
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


def screened(settings) -> dict:
    """Of held-out controls and of all other wells that were not trained on: Z', and Spearman's correlation of score and dose."""
    plates = [r for r in tables.plates(settings.lake).rows() if r["feature"] == "score"]
    of_plates = {r["plate"]: {k: r[k] for k in ("positives", "negatives", "z_prime", "robust_z_prime", "ssmd")} for r in plates}
    curves = tables.compounds(settings.lake).rows()
    of_compounds = {r["compound"]: {k: r[k] for k in ("wells", "spearman", "ec50", "ec50_low", "ec50_high")} for r in curves}
    wells = tables.wells(settings.lake).rows()
    held_out = {c: [r["score"] for r in wells if r["control"] == c and r["split"] == "test"] for c in settings.classes}
    return {"plates": of_plates, "compounds": of_compounds, "held_out_scores": held_out}


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
    every = ["hippocampus", "radiographs", "screen_bbbc013", "nuclei"]
    data, chosen = pathlib.Path(sys.argv[1]), [a for a in sys.argv[2:] if "=" not in a] or every
    overrides = [a for a in sys.argv[2:] if "=" in a and not a.startswith("lake=")]
    lakes = [a.removeprefix("lake=") for a in sys.argv[2:] if a.startswith("lake=")]
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            if name == "nuclei":
                print(json.dumps(nuclei_found(data / name), indent=2), flush=True)
                continue
            print(json.dumps(measure(name, data, pathlib.Path(lakes[0] if lakes else scratch), overrides), indent=2), flush=True)
