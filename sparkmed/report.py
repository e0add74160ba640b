"""The report: one self-contained HTML page about an archive, its model and what the model said.

Holds pseudonyms, digests and reason codes only: no URI, no file name, no identifier of an image. What is not there yet, a
section says in one sentence.
"""

import base64
import contextlib
import datetime
import hashlib
import importlib.resources
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import pyarrow.compute as pc

from sparkmed import dataset, formats, pictures, reasons, scoring, storage, tables, tracking
from sparkmed.config import Config
from sparkmed.formats import isolation
from sparkmed.formats.instance import VolumeHeader
from sparkmed.hcs import hits, quality, wells
from sparkmed.imaging.volume import Volume
from sparkmed.learning import metrics
from sparkmed.learning.model import SPEC, Model, ModelSpec
from sparkmed.rejection import InputError, Refused

PAGE = "report/index.html"
GALLERY = 12
"""Images in a grid of examples."""
LISTED = 24
"""Figures of the last look that are shown, the most changed ones."""
WORST = 12
"""Rows in a table of single subjects."""
PLATES, CURVES = 12, 16
"""Plates and compounds of a screen that are shown."""


def write(config: Config, registry: tracking.Registry) -> str:
    """Write the page to ``report/index.html`` in the lake; its URL."""
    facts = _model(config, registry)
    rows = tables.volumes(config.lake).rows()
    evaluated = _evaluated(config, facts["digest"], rows) if facts.get("digest") else []
    results = _results(config, evaluated)
    page = {
        "config": config,
        "written": _moment(datetime.datetime.now(datetime.UTC)),
        "model": facts,
        "data": _data(config, rows),
        "curves": _curves(config, registry, facts),
        "results": results,
        "examples": _examples_section(config, facts, rows, evaluated),
        "scored": _scored(config),
        "screen": _screen(config, rows, facts),
        "watch": _watched(config),
        "decisions": _decisions(config),
        "quarantine": refusals(config),
        "local_store": registry.uri.startswith("sqlite:///"),
        "experiment": registry.experiment,
    }
    page["tiles"] = _tiles(page)
    template = importlib.resources.files("sparkmed").joinpath("report.html").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"thousands": lambda n: f"{n:,}".replace(",", "\u2009"), "figure": _figure, "size": _size}
    url = storage.join(config.lake, PAGE)
    storage.write_bytes(url, environment.from_string(template).render(page).encode())
    return url


@isolation.isolated()  # a volume that no stage could decode must not end this process
def examples(config: Config, model_url: str, rows: Sequence[dict]) -> dict[str, bytes]:
    """PNGs of volume rows as the model in the folder ``model_url`` predicts them: by name of the picture.

    Segmentation: an overlay each of the best, the median and the worst of those that this model was evaluated on, or of the first
    three. Classification: one grid, the wrong ones first, then the least certain. Images are left out whose header lets one
    expect a name in the pixels.
    """
    rows = [r for r in rows if _may_be_shown(r, config)]
    known = {r["volume"]: r for r in _evaluated(config, _digest(model_url), rows)}
    if config.task == "classification":
        picture = _gallery(config, model_url, rows, list(known.values()))
        return {"test_images": picture} if picture else {}
    chosen = _chosen([r for r in rows if r["uid"] in known], known) or list(zip(("first", "second", "third"), rows, strict=False))
    pictures_of, model = {}, None
    for name, row in chosen:
        try:
            image = dataset.read_image(row)
            truth = dataset.read_label(row, image) if row["label"] else None
            model = model or Model.load(model_url, "cpu", config.imports)
            pictures_of[name] = pictures.overlay(image, model.predict(image), truth, config.classes, _limits(config))
        except Refused:
            continue  # the stage that reads every volume says why
    return pictures_of


# the sections


def _model(config: Config, registry: tracking.Registry) -> dict[str, Any]:
    """Which model the page is about: the champion, or else the newest version."""
    try:
        champion, latest = registry.champion(), registry.latest()
    except Exception as e:  # every store raises its own
        return {"missing": f"MLflow could not be asked about models ({type(e).__name__})."}
    version = champion or latest
    if version is None:
        return {"missing": "No model is registered yet: run the train stage."}
    tags = registry.version_facts(version)
    url = registry.fetch(version, config.lake)
    spec = ModelSpec.model_validate(storage.read_json(storage.join(url, SPEC)))
    return {
        "name": registry.model,
        "version": version,
        "champion": version == champion,
        "newer": latest if latest != version else None,
        "run_id": tags["run_id"],
        "digest": _digest(url),
        "url": url,
        "spec": spec,
        "network": _component(spec.network),
        "weights": spec.weights_sha256[:16],
    }


def _data(config: Config, rows: list[dict]) -> dict[str, Any]:
    """Instances, volumes, subjects and patches."""
    files = _current(config)
    instances = files[files["kind"].notna()] if len(files) else files
    out: dict[str, Any] = {"missing": None if len(instances) else "The catalog is empty: run the catalog stage."}
    if len(instances):
        groups = instances.groupby(["format", "modality"], dropna=False)
        out["formats"] = [{"format": f, "modality": m, "instances": len(g), "bytes": int(g["bytes"].sum())} for (f, m), g in groups]
        out["instances"] = len(instances)
        out["files"] = int(instances["container"].nunique())
        out["bytes"] = int(instances["bytes"].sum())
    try:
        labelled = [r for r in rows if r["split"]]
        patches = dataset.describe(dataset.url(config.lake, config.name, dataset.version(labelled, config))) if labelled else None
    except InputError:
        patches = None
    out["patches"] = patches
    splits = []
    for split in ("train", "val", "test", None):
        members = [r for r in rows if r["split"] == split]
        if members:
            counted = patches["counts"].get(split, 0) if patches and split else None
            subjects = len({r["subject"] for r in members})
            splits.append({"split": split or "no label", "subjects": subjects, "volumes": len(members), "patches": counted})
    out["splits"] = splits
    out["volumes"], out["subjects"] = len(rows), len({r["subject"] for r in rows})
    if rows:
        out["shape"] = _ranges([r["shape"][1:] for r in rows], "{:.0f}")
        out["spacing"] = _ranges([r["spacing"] for r in rows], "{:.3g}")
    return out


def _curves(config: Config, registry: tracking.Registry, facts: dict) -> dict[str, Any]:
    """Loss, validation metric and learning rate per epoch."""
    if "missing" in facts:
        return {"missing": "No training run yet."}
    try:
        found = registry.curves(facts["run_id"])
    except Exception as e:
        return {"missing": f"MLflow has no curves of this run ({type(e).__name__})."}
    curves = {k: v for k, v in found.items() if not k.startswith("test_") and all(np.isfinite(y) for _, y in v)}
    loss = {k.removesuffix("_loss").replace("val", "validation"): v for k, v in sorted(curves.items()) if k.endswith("loss")}
    rate = {k: v for k, v in curves.items() if k in ("lr", "learning_rate")}
    default = "mean Dice" if config.task == "segmentation" else "area under ROC"
    name = config.train.metric.name if config.train.metric else default
    metric = {name: curves["val_metric"]} if "val_metric" in curves else {}
    panels = [(t, c) for t, c in (("loss", loss), (f"validation {name}", metric), ("learning rate", rate)) if c]
    if not panels:
        return {"missing": "The run has no curves."}
    first = next(iter(metric.values()), None)
    best = max(first, key=lambda p: p[1]) if first else None
    epochs = max(len(v) for _, c in panels for v in c.values())
    minutes = found.get("train_minutes")
    return {
        "picture": _inline(pictures.lines(panels, best and best[0])),
        "epochs": epochs,
        "best": best,
        "metric": name,
        "minutes": minutes[-1][1] if minutes else None,
        "final": {k: v[-1][1] for k, v in loss.items()},
    }


def _results(config: Config, evaluated: list[dict]) -> dict[str, Any]:
    """What the model is worth on the test split."""
    if not evaluated:
        return {"missing": "No model has been measured on the present test split yet."}
    confidence = f"{config.promote.confidence:.0%}".replace("%", "\u2009%")
    subjects = scoring.subject_scores(evaluated)
    common = {
        "subjects": len({r["subject"] for r in evaluated}),
        "volumes": len(evaluated),
        "confidence": confidence,
        "overall": _interval(list(subjects.values()), config),
    }
    return common | (_dice(config, evaluated) if config.task == "segmentation" else _classified(config, evaluated))


def _dice(config: Config, evaluated: list[dict]) -> dict[str, Any]:
    names = config.classes[1:]
    by_subject = defaultdict(lambda: [[] for _ in names])
    for r in evaluated:
        for c, value in enumerate(r["score"][1:]):
            if value is not None:
                by_subject[r["subject"]][c].append(value)
    means = {s: [float(np.mean(v)) if v else None for v in values] for s, values in by_subject.items()}
    groups = {name: [m[c] for m in means.values() if m[c] is not None] for c, name in enumerate(names)}
    groups = {name: v for name, v in groups.items() if v}
    intervals = {name: _interval(v, config) for name, v in groups.items()}
    total = scoring.subject_scores(evaluated)
    worst = sorted(means, key=lambda s: total.get(s, 2.0))
    return {
        "classes": [
            {"name": n, "interval": intervals[n], "median": float(np.median(v)), "least": min(v), "subjects": len(v)}
            for n, v in groups.items()
        ],
        "picture": _inline(pictures.strips(groups, "Dice per test subject", intervals, most=1.0)) if groups else None,
        "names": names,
        "worst": [{"subject": s, "mean": total.get(s), "dice": means[s]} for s in worst[:WORST]],
        "more": max(0, len(worst) - WORST),
    }


def _classified(config: Config, evaluated: list[dict]) -> dict[str, Any]:
    truth = np.array([r["target"] for r in evaluated])
    probability = np.array([r["probability"] for r in evaluated], float)
    counts = np.zeros((len(config.classes),) * 2, int)
    np.add.at(counts, (truth, probability.argmax(1)), 1)
    positives = range(1, 2) if len(config.classes) == 2 else range(len(config.classes))
    curves, areas = {}, {}
    for c in positives:
        if 0 < (truth == c).sum() < len(truth):
            false, true = _roc(probability[:, c], truth == c)
            areas[config.classes[c]] = float(np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2))
            curves[f"{config.classes[c]}: area {areas[config.classes[c]]:.3f}"] = (false, true)
    wrong = [r for r in evaluated if np.argmax(r["probability"]) != r["target"]]
    wrong.sort(key=lambda r: -max(r["probability"]))
    mistakes = [
        {
            "subject": r["subject"],
            "predicted": config.classes[int(np.argmax(r["probability"]))],
            "true": config.classes[r["target"]],
            "probability": max(r["probability"]),
        }
        for r in wrong
    ]
    return {
        "roc": _inline(pictures.roc(curves)) if curves else None,
        "areas": areas,
        "confusion": _inline(pictures.confusion(counts, config.classes)),
        "right": int(np.trace(counts)),
        "counts": counts.tolist(),
        "names": config.classes,
        "wrong": mistakes[:WORST],
        "more": max(0, len(mistakes) - WORST),
    }


@isolation.isolated()
def _examples_section(config: Config, facts: dict, rows: list[dict], evaluated: list[dict]) -> dict[str, Any]:
    """Pictures of test subjects; masks that the score stage has written are used, the others predicted here."""
    if not evaluated:
        return {"missing": "There is no evaluated test volume to show."}
    by_uid = {r["uid"]: r for r in rows}
    evaluated = [r for r in evaluated if _may_be_shown(by_uid[r["volume"]], config)]
    if not evaluated:
        return {"missing": "The headers of all test images let one expect a name in the pixels."}
    if config.task == "classification":
        picture = _gallery(config, facts["url"], [by_uid[r["volume"]] for r in evaluated], evaluated)
        return (
            {"gallery": _inline(picture), "shown": min(GALLERY, len(evaluated))}
            if picture
            else {"missing": "No test image could be read."}
        )
    known = {r["volume"]: r for r in evaluated}
    scored = tables.predictions(config.lake).read(["volume", "mask"], pc.field("model_digest") == facts["digest"]).to_pylist()
    masks = {r["volume"]: r["mask"] for r in scored if r["mask"]}
    shown = []
    for name, row in _chosen([by_uid[u] for u in known], known):
        try:
            image = dataset.read_image(row)
            predicted = _mask(config, masks.get(row["uid"]), image) or Model.load(facts["url"], "cpu", config.imports).predict(
                image
            )
            png = pictures.overlay(image, predicted, dataset.read_label(row, image), config.classes, _limits(config))
        except Refused as e:
            shown.append({"name": name, "subject": row["subject"], "refused": e.reason})
            continue
        dice = {n: d for n, d in zip(config.classes[1:], known[row["uid"]]["score"][1:], strict=True) if d is not None}
        shown.append({"name": name, "subject": row["subject"], "picture": _inline(png), "dice": dice})
    return {"overlays": shown}


def _scored(config: Config) -> dict[str, Any]:
    """What was predicted, by which version, when."""
    columns = ["model_version", "scored_at", "seconds", "device", "subject", "ml", "probability", "predicted"]
    rows = tables.predictions(config.lake).read(columns).to_pylist()
    if not rows:
        return {"missing": "No volume has been scored yet: run the score stage after a model is promoted."}
    versions = []
    for version in sorted({r["model_version"] for r in rows}, key=lambda v: (len(v), v)):  # numbers, then ensembles
        by = [r for r in rows if r["model_version"] == version]
        times = [r["scored_at"] for r in by]
        versions.append(
            {
                "version": version,
                "volumes": len(by),
                "first": _moment(min(times)),
                "last": _moment(max(times)),
                "seconds": float(np.median([r["seconds"] for r in by])),
                "device": ", ".join(sorted({r["device"] for r in by})),
            }
        )
    last = max(rows, key=lambda r: r["scored_at"])["model_version"]
    present = [r for r in rows if r["model_version"] == last]
    out = {"versions": versions, "version": last, "volumes": len(present), "subjects": len({r["subject"] for r in present})}
    if config.task == "segmentation":
        groups = {name: [r["ml"][c] for r in present] for c, name in enumerate(config.classes) if c}
        found = {n: [v for v in values if v > 0] for n, values in groups.items()}
        out["picture"] = (
            _inline(pictures.strips({n: v for n, v in found.items() if v}, "ml per volume")) if any(found.values()) else None
        )
        out["classes"] = [_amounts(n, values) for n, values in groups.items()]
    else:
        likely = Counter(r["predicted"] for r in present)
        groups = {c: [max(r["probability"]) for r in present if r["predicted"] == c] for c in config.classes}
        out["picture"] = _inline(
            pictures.strips({c: v for c, v in groups.items() if v}, "probability of the predicted class", most=1.0)
        )
        out["classes"] = [
            {"name": c, "volumes": likely[c], "median": float(np.median(groups[c])) if groups[c] else None} for c in config.classes
        ]
    return out


def _amounts(name: str, values: list[float]) -> dict[str, Any]:
    q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75])
    spread = {"median": float(median), "q1": float(q1), "q3": float(q3), "least": min(values), "most": max(values)}
    return {"name": name, **spread, "absent": sum(v == 0 for v in values)}


_ALARMS = {
    "drift": "drifted",
    "unseen": "the champion was judged on none",
    "quarantine": "more is refused than then",
    "backlog": "waits too long",
}


@isolation.isolated()
def _screen(config: Config, rows: list[dict], facts: dict) -> dict[str, Any] | None:
    """What a screen answers; None for a project that has no plates. Compounds go by the names of the plate map."""
    if config.plates is None:
        return None
    table = tables.wells(config.lake).read().to_pandas()
    if table.empty or set(table["model_digest"]) != {facts.get("digest")}:
        return {"missing": "The screen stage has not looked at this model's predictions yet."}
    shape = wells.FORMATS[config.plates.wells]
    shown = sorted(table["plate"].unique())[:PLATES]
    maps = {p: quality.heatmap(table[table["plate"] == p], ["score"], shape)[0] for p in shown}
    judged = table[~table["split"].isin(["train", "val"])]
    kinds = judged["control"].fillna("treated")
    plates = tables.plates(config.lake).read().to_pandas()
    compounds = tables.compounds(config.lake).read().to_pandas().sort_values(["hits", "compound"], ascending=[False, True])
    summary = storage.read_json(storage.join(config.lake, "screen", "summary.json"))
    out = {
        "summary": summary,
        "wells": len(table),
        "hits": int(table["hit"].eq(True).sum()),
        "plates": [r for r in plates[plates["feature"] == "score"].to_dict("records") if r["plate"] in shown],
        "more_plates": max(0, table["plate"].nunique() - PLATES),
        "maps": _inline(pictures.plates(maps, [wells.row_letters(n + 1) for n in range(shape[0])], "score")),
        "controls": _inline(
            pictures.strips({k: judged.loc[kinds == k, "score"].dropna().tolist() for k in sorted(set(kinds))}, "score")
        ),
        "compounds": compounds.head(CURVES).to_dict("records"),
        "more_compounds": max(0, len(compounds) - CURVES),
    }
    curves = {}
    for c in compounds.head(CURVES).to_dict("records"):
        of = judged[(judged["compound"] == c["compound"]) & judged["concentration"].notna()]
        fitted = (
            hits.Curve(True, None, c["wells"], c["doses"], c["start"], c["end"], c["hill"], c["ec50"]) if c["identified"] else None
        )
        caption = f"EC50 {c['ec50']:.3g} ({c['ec50_low']:.3g} to {c['ec50_high']:.3g})" if fitted else c["reason"]
        curves[c["compound"]] = of["concentration"].to_numpy(), of["score"].to_numpy(), fitted and fitted.at, caption
    out["curves"] = _inline(pictures.doses(curves, "score")) if curves else None
    profiled = table[table["profile"].notna()]
    if len(profiled) > 2:
        values = np.stack(profiled["profile"])
        left, size, _ = np.linalg.svd(values - values.mean(0), full_matrices=False)
        share = 100 * size**2 / max((size**2).sum(), 1e-300)
        named = profiled["moa"].fillna(profiled["control"]).fillna("treated")
        few = named if named.nunique() <= 8 else profiled["control"].fillna("treated")
        axes = [f"principal component {n + 1} ({share[n]:.0f} % of the variance)" for n in (0, 1)]
        out["cloud"] = _inline(pictures.cloud(left[:, :2] * size[:2], few.tolist(), *axes))
    items = []
    place = ["plate", "well"]
    by_well = {(f.get("plate", "plate"), f["well"]): r for r in rows for f in [json.loads(r["header"])] if "well" in f}
    for r in judged[judged["hit"].eq(True)].sort_values("robust_z", key=abs, ascending=False).to_dict("records"):
        with contextlib.suppress(Refused):
            image = dataset.read_image(by_well[tuple(r[k] for k in place)])
            dose = "" if pd.isna(r["concentration"]) else f", {r['concentration']:g} {r['unit'] or ''}".rstrip()
            items.append((image, f"{r['well']} {r['compound'] or ''}{dose}\nscore {r['score']:.2f}", False))
        if len(items) == GALLERY:
            break
    out["gallery"] = _inline(pictures.gallery(items)) if items else None
    return out


def _watched(config: Config) -> dict[str, Any]:
    """What the last look at new volumes found, and how the largest index went from look to look."""
    rows = tables.watch(config.lake).rows()
    if not rows:
        return {"missing": "Nothing has been watched yet: the score stage does it at its end."}
    by_look = defaultdict(list)
    for r in rows:
        by_look[r["watched_at"]].append(r)
    last = by_look[max(by_look)]
    limit = config.watch.psi
    indices = {f"{r['figure']}, {r['source']}": (r["psi"], r["verdict"] == "drift") for r in last if r["psi"] is not None}
    largest = sorted(indices, key=lambda n: -indices[n][0])[:LISTED]
    most = [(t, max(p)) for t, looked in sorted(by_look.items()) if (p := [r["psi"] for r in looked if r["psi"] is not None])]
    return {
        "when": _moment(last[0]["watched_at"]),
        "version": last[0]["model_version"],
        "looks": len(by_look),
        "alarms": [{**r, "says": _ALARMS[r["verdict"]]} for r in last if r["verdict"] in _ALARMS],
        "judged": sum(r["check"] == "drift" and r["verdict"] != "few" for r in last),
        "few": sorted({r["source"] for r in last if r["check"] == "drift" and r["verdict"] == "few"}),
        "drift": sorted((r for r in last if r["psi"] is not None), key=lambda r: -r["psi"])[:LISTED],
        "more": max(0, len(indices) - LISTED),
        "picture": _inline(pictures.indices({n: indices[n] for n in largest}, limit)) if largest else None,
        "history": _inline(pictures.history(most, limit)) if len(most) > 1 else None,
        "quarantine": [r for r in last if r["check"] == "quarantine"],
        "service": [r for r in last if r["check"] == "service"],
    }


def _decisions(config: Config) -> list[dict[str, Any]]:
    """Every decision about the champion, the last one first."""
    rows = sorted(tables.promotions(config.lake).rows(), key=lambda r: r["decided_at"], reverse=True)
    return [
        {
            "when": _moment(r["decided_at"]),
            "action": r["action"],
            "challenger": r["challenger"],
            "champion": r["champion"],
            "reason": r["reason"],
            "numbers": {k.replace("_", " "): v for k, v in json.loads(r["numbers"] or "{}").items() if isinstance(v, int | float)},
            "gates": [g for g in json.loads(r["numbers"] or "{}").get("gates", []) if g["wanted"] is not None],
        }
        for r in rows
    ]


def refusals(config: Config) -> dict[str, Any]:
    """What was refused: per stage and reason how many files, what the code means, and one message."""
    files = _current(config)
    latest = dict(zip(files["container"], files["run"], strict=True)) if len(files) else {}
    rows = [r for r in tables.quarantine(config.lake).rows() if r["stage"] != "catalog" or latest.get(r["container"]) == r["run"]]
    groups = defaultdict(list)
    for r in rows:
        groups[r["stage"], r["reason"]].append(r)
    order = {stage: n for n, stage in enumerate(("catalog", "volumes", "patches", "score"))}
    listed = [
        {
            "stage": stage,
            "reason": reason,
            "files": len({r["uri"] for r in group}),
            "meaning": reasons.sentence(reason),
            "example": _example(reason, group),
        }
        for (stage, reason), group in groups.items()
    ]
    listed.sort(key=lambda g: (order.get(g["stage"], 9), -g["files"], g["reason"]))
    return {"groups": listed, "files": len({r["uri"] for r in rows})}


def _tiles(page: dict[str, Any]) -> list[dict[str, str]]:
    """The headline figures."""
    tiles, results, data = [], page["results"], page["data"]
    if "overall" in results and results["overall"]:
        mean, low, high = results["overall"]
        segmentation = page["config"].task == "segmentation"
        note = f"{results['confidence']} interval {low:.3f} to {high:.3f} over {results['subjects']} subjects"
        tiles.append({"value": f"{mean:.3f}", "label": "mean test Dice" if segmentation else "test accuracy", "note": note})
        for c in results.get("classes", [])[:3] if segmentation else []:
            mean, low, high = c["interval"]
            tiles.append({"value": f"{mean:.3f}", "label": f"Dice, {c['name']}", "note": f"{low:.3f} to {high:.3f}"})
        for name, area in results.get("areas", {}).items():
            tiles.append({"value": f"{area:.3f}", "label": f"area under ROC, {name}", "note": f"{results['volumes']} images"})
    splits = ", ".join(f"{s['subjects']} {s['split']}" for s in data["splits"])
    if data["volumes"]:
        tiles.append({"value": str(data["subjects"]), "label": "subjects", "note": splits})
    if "volumes" in page["scored"]:
        note = f"by version {page['scored']['version']}"
        tiles.append({"value": str(page["scored"]["volumes"]), "label": "volumes scored", "note": note})
    note = "each with a reason, below" if page["quarantine"]["files"] else "nothing was left out"
    tiles.append({"value": str(page["quarantine"]["files"]), "label": "files refused", "note": note})
    return tiles[:6]


# what the sections share


def _current(config: Config) -> pd.DataFrame:
    """Of each file that is there now, the catalog rows and refusals of the run that read it last; a refusal has no ``kind``."""
    read = tables.catalog(config.lake).read(["container", "run", "format", "kind", "modality", "bytes"]).to_pandas()
    kept_out = tables.quarantine(config.lake).read(["container", "run", "stage"]).to_pandas()
    kept_out = kept_out[kept_out["stage"] == "catalog"].drop(columns="stage")
    rows = pd.concat([read, kept_out], ignore_index=True)
    rows = rows[rows["run"] <= tables.catalog(config.lake).committed("catalog")]  # a later run has not finished
    if not len(rows):
        return rows
    last = rows.groupby("container")["run"].transform("max")
    return rows[(rows["run"] == last) & (rows["format"] != "gone")]


def _evaluated(config: Config, model_digest: str, rows: Sequence[dict]) -> list[dict]:
    """Test scores of a model, of the volumes that are in the test split now."""
    test = {(r["uid"], r["subject"], r["target"]) for r in rows if r["split"] == "test"}
    found = {}
    for r in sorted(tables.evaluations(config.lake).rows(), key=lambda r: r["scored_at"]):  # under the last settings
        if r["model_digest"] == model_digest and (r["volume"], r["subject"], r["target"]) in test:
            found[r["volume"]] = r
    return [found[u] for u in sorted(found)]


def _may_be_shown(row: dict, config: Config) -> bool:
    """Whether a picture of a volume may leave the archive: not where BurnedInAnnotation (PS3.3 C.7.6.1.1.5) is YES, nor of
    ultrasound, on which scanners write who is examined, unless ``deidentify.allow`` lets them pass."""
    allow = config.deidentify.allow
    burned_in = VolumeHeader.from_row(row).facts.get("burned_in") and "burned_in" not in allow
    return not burned_in and (row["modality"] not in ("US", "IVUS") or "ultrasound" in allow)


def _digest(model_url: str) -> str:
    return hashlib.sha256(storage.read_bytes(storage.join(model_url, SPEC))).hexdigest()


def _chosen(rows: list[dict], known: dict[str, dict]) -> list[tuple[str, dict]]:
    """The best, the median and the worst volume by mean Dice over foreground classes."""

    def mean(row):
        values = [v for v in known[row["uid"]]["score"][1:] if v is not None]
        return (float(np.mean(values)) if values else 1.0, row["uid"])

    ranked = sorted(rows, key=mean, reverse=True)
    if len(ranked) < 3:
        return list(zip(("best", "worst"), ranked, strict=False))
    return [("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])]


def _gallery(config: Config, model_url: str, rows: Sequence[dict], evaluated: list[dict]) -> bytes | None:
    """Wrong ones first, then the least certain; images without an evaluation are predicted here."""
    certain = {r["volume"]: (np.argmax(r["probability"]) == r["target"], max(r["probability"]), r["volume"]) for r in evaluated}
    known = {r["volume"]: r["probability"] for r in evaluated}
    ranked = sorted(rows, key=lambda r: certain.get(r["uid"], (True, 2.0, r["uid"])))
    items, model = [], None
    for row in ranked[:GALLERY]:
        try:
            image = dataset.read_image(row)
            if row["uid"] not in known:
                model = model or Model.load(model_url, "cpu", config.imports)
                known[row["uid"]] = list(model.predict(image, scoring.centres(model, row)).values())
        except Refused:
            continue
        p = int(np.argmax(known[row["uid"]]))
        right = p == row["target"]
        caption = f"{'right' if right else 'wrong'}: {config.classes[p]} {known[row['uid']][p]:.2f}"
        items.append((image, caption if right else f"{caption}\ntrue: {config.classes[row['target']]}", not right))
    return pictures.gallery(items) if items else None


def _mask(config: Config, path: str | None, image: Volume) -> Volume | None:
    """A label map that the score stage wrote, if it is there and on the image's grid."""
    if not path or not storage.exists(storage.join(config.lake, path)):
        return None
    volumes, _ = formats.read_archive(storage.join(config.lake, path))
    fits = len(volumes) == 1 and volumes[0].spatial_shape == image.spatial_shape
    return volumes[0].with_array(volumes[0].array.astype(np.uint8)) if fits else None


def _limits(config: Config) -> tuple[float, float] | None:
    intensity = config.preprocess.intensity
    return (intensity.low, intensity.high) if intensity.kind == "window" else None


def _interval(values: Sequence[float], config: Config) -> tuple[float, float, float] | None:
    """(mean, low, high) over subjects."""
    if not values:
        return None
    low, high = metrics.bootstrap_interval(values, config.promote.confidence, config.promote.resamples, config.seed)
    return float(np.mean(values)), low, high


def _roc(score: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1); equal scores are one step.

    >>> _roc(np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, True, False, False]))[1].tolist()
    [0.0, 0.5, 1.0, 1.0]
    """
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)
    true, false = np.cumsum(positive[order])[last], np.cumsum(~positive[order])[last]
    return np.append(0.0, false / max(false[-1], 1)), np.append(0.0, true / max(true[-1], 1))


def _example(reason: str, rows: list[dict]) -> str:
    """One of the messages, unless it says no more than the meaning of the code."""
    message = _without_names(min(r["message"] for r in rows), rows)
    return "" if message.strip(". ").lower() == reasons.sentence(reason).strip(". ").lower() else message


_NAMELIKE = re.compile(r"[A-Za-z0-9+.-]+://\S*|(?<![\w.])/[^\s,;:]+|\b\d+(?:\.\d+){3,}\b")


def _without_names(message: str, rows: list[dict]) -> str:
    """A message without what could be a URL, a path, a UID, or part of the name of a file that it was said about.

    Messages hold none of these by contract; the page relies on nobody.
    """
    for r in rows:
        uri, path = r["uri"] or "", r["path"] or ""
        for name in (uri, path, *path.split("/"), uri.rsplit("/", 1)[-1], uri.partition("::")[0].rsplit("/", 1)[-1]):
            if len(name) > 3 and not (name.isalpha() and name.islower()):  # a lower-case word is rather a word of the message
                message = message.replace(name, "[file]")
    return _NAMELIKE.sub("[...]", message)


def _component(component) -> str:
    arguments = ", ".join(f"{k} {v}" for k, v in component.arguments.items())
    return component.name + (f" ({arguments})" if arguments else "")


def _ranges(values: list[list[float]], form: str) -> str:
    """The median along each axis, and the range where there is one."""
    columns = np.asarray(values, float).T
    times = " \u00d7 ".join
    middle = times(form.format(np.median(c)) for c in columns)
    if all(np.ptp(c) < 1e-6 for c in columns):
        return middle
    low, high = times(form.format(c.min()) for c in columns), times(form.format(c.max()) for c in columns)
    return f"{middle} (from {low} to {high})"


def _moment(time: datetime.datetime) -> str:
    return time.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _figure(value: Any, digits: int = 3) -> str:
    """A number for a table; a dash for what is not there."""
    if value is None or value != value:
        return "\u2013"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
