"""What a screen answers: figures of fields, profiles and scores of wells, quality of plates, curves and hits of compounds."""

import logging
import math
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import scipy

from sparkmed import lease, storage, tables
from sparkmed.config import Config
from sparkmed.hcs import hits, profiles, quality, retrieval, wells
from sparkmed.pipeline import common, ledger
from sparkmed.rejection import InputError, Rejection
from sparkmed.spark import catalog as spark_catalog
from sparkmed.spark import screen as spark_screen

log = logging.getLogger("sparkmed")
STAGE = spark_screen.STAGE
SUMMARY = "screen/summary.json"
TRAINED = ("train", "val")


def screen(config: Config) -> dict:
    """Bring ``screen/`` up to date with the champion's predictions: ``fields``, ``wells``, ``plates``, ``compounds``, and figures
    over all of them in ``summary.json``. Fields are looked at once; the other tables are replaced.

    Wells that the model was trained or validated on take no part in any p-value, figure of quality, curve or match.
    """
    if config.plates is None:
        raise InputError("the config has no plates: a screen is made of plates")
    with lease.held(lease.url(config.lake, STAGE), f"the screen of lake {config.lake}"):
        return _screen(config)


def _screen(config: Config) -> dict:
    champion, spark = ledger.pinned(config), common.spark_of(config)
    lineage = common.lineage(config, config.plates, config.screen)
    refused = _examine(config, spark, lineage)
    width = _features(config, champion.model_digest)
    index = config.classes.index(score_class(config))
    frame = spark_screen.scored_fields(spark, config.lake, champion.model_digest, champion.settings, config.plates, index, width)
    table, normal = spark_screen.wells(frame, width, config.screen.normalize)
    if table.empty:
        raise InputError(f"lake {config.lake} has no prediction of a field: run the score stage first")
    names = normal.features if normal else []
    if config.screen.by == "projection":
        table["score"] = projection(table, names)
    answers = answer(table, names, config)
    summary = answers.summary | {"fields": int(table["fields"].sum()), "wells": len(table), "score": score_class(config)}
    if normal:
        summary["dropped_features"] = len(normal.dropped)
        refused += normal.refused
    _write(config, answers, names, {**lineage, "model_digest": champion.model_digest})
    storage.write_json(storage.join(config.lake, SUMMARY), summary | {"model_digest": champion.model_digest})
    for r in refused:
        log.info("%s: %s", r.reason, r.message)
    plates = answers.plates[answers.plates["feature"] == "score"]
    return {
        "version": champion.version,
        "fields": summary["fields"],
        "wells": len(table),
        "plates": len(plates),
        "hits": int(answers.wells["hit"].eq(True).sum()),
        "z_prime": _rounded(plates["z_prime"].median()),
        **{name: _rounded(summary.get(name)) for rule in ("nsc", "nscb", "map") for name in (rule, f"{rule}_cells")},
    }


def score_class(config: Config) -> str:
    """The class whose probability is the score of a well."""
    if config.screen.score is not None:
        return config.screen.score
    return "positive" if "positive" in config.classes else config.classes[-1]


def projection(table: pd.DataFrame, features: list[str]) -> np.ndarray:
    """(N,) where the profiles of wells lie between those of the controls that the model was trained or validated on: 0 at the mean
    of the negative ones, 1 at that of the positive ones. Held-out controls have no part in the axis, so they can judge it."""
    values = table[features].to_numpy(float)
    trained = table["split"].isin(TRAINED).to_numpy() & np.isfinite(values).all(axis=1)
    means = {}
    for kind in (profiles.NEGATIVE, profiles.POSITIVE):
        of = values[trained & (table["control"] == kind).to_numpy()]
        if not len(of):
            raise InputError(
                f"screen.by projection wants {kind} controls that were trained on, and profiles of them: there is none"
            )
        means[kind] = of.mean(axis=0)
    axis = means[profiles.POSITIVE] - means[profiles.NEGATIVE]
    return (values - means[profiles.NEGATIVE]) @ axis / max(axis @ axis, np.finfo(float).tiny)


def _examine(config: Config, spark, lineage: dict) -> list[Rejection]:
    """Look at the fields that nobody looked at under these settings."""
    table, settings = tables.fields(config.lake), spark_screen.settings_digest(config.plates)
    rows = [r for r in common.volume_rows(config) if r["format"] == spark_screen.FORMAT]
    done = set(table.read(["key"])["key"].to_pylist())
    todo = [r for r in rows if spark_screen.key(r["uid"], settings) not in done]
    written, refused = spark_screen.examine(spark, todo, config.plates, config.lake, lineage)
    common.commit_files(table, written, STAGE)
    quarantine = tables.quarantine(config.lake)
    known = set(quarantine.read(["uri", "reason"], pc.field("stage") == STAGE).to_pandas().itertuples(index=False, name=None))
    new = [spark_catalog.quarantine_row(r, lineage) for r in refused if (r.uri, r.reason) not in known]
    if new:
        quarantine.commit([quarantine.write(new)])
    return refused


def _features(config: Config, model_digest: str) -> int:
    """How many features this model's predictions have; 0 where they were not kept."""
    table, mine = tables.predictions(config.lake), (pc.field("model_digest") == model_digest) & pc.field("features").is_valid()
    keys = table.read(["key"], mine)["key"]
    return len(table.read(["features"], pc.field("key") == keys[0])["features"][0]) if len(keys) else 0


class Answers:
    """Tables of wells, plates and compounds, and a summary as plain data."""

    def __init__(self, wells: pd.DataFrame, plates: pd.DataFrame, compounds: pd.DataFrame, summary: dict[str, Any]):
        self.wells, self.plates, self.compounds, self.summary = wells, plates, compounds, summary


def answer(table: pd.DataFrame, features: list[str], config: Config) -> Answers:
    """What is said of a table of wells: ``plate``, ``well``, ``row``, ``column``, ``batch``, the treatment, ``split``, ``score``,
    ``cells`` and profiles in ``features`` on the scale of the negative controls."""
    table = table.reset_index(drop=True)
    judged = table[~table["split"].isin(TRAINED)]
    found = hits.score_wells(judged, "score", side=config.screen.side)
    columns = ["robust_z", "p_robust", "q_robust", "p_empirical", "q_empirical"]
    table = table.join(found[columns])
    table["hit"] = (table["q_robust"] <= config.screen.fdr).astype("boolean").mask(table["q_robust"].isna())
    whole = judged.dropna(subset=features) if features else judged
    replicates = ["compound", "concentration"]
    of_plates = quality.plate_quality(judged, ["score", *features], replicates=replicates)
    treated = judged[judged["control"].isna()]
    shape = wells.FORMATS[config.plates.wells]
    edges = quality.edge_effects(treated, ["score", *features], shape).rename(columns={"effect": "edge_effect", "p": "edge_p"})
    of_plates = of_plates.merge(edges[["plate", "feature", "edge_effect", "edge_p"]], on=["plate", "feature"], how="left")
    summary: dict[str, Any] = {"judged_wells": len(judged), "trained_wells": len(table) - len(judged)}
    if features:
        summary |= _matching(whole[whole["control"].isna()], features, table)
    return Answers(table, of_plates, _compounds(table), summary)


def _compounds(table: pd.DataFrame) -> pd.DataFrame:
    """Curves of the compounds over wells that were not trained on; a well of dose 0 counts where the map names the compound."""
    given = table[~table["split"].isin(TRAINED) & (table["control"] != "empty")]
    given = given[given["compound"].notna() & given["concentration"].notna()]
    if given.empty:
        return pd.DataFrame(columns=["compound"])
    curves = hits.dose_responses(given, "score")
    grouped = given.groupby("compound", sort=True)
    more = pd.DataFrame(
        {
            "moa": grouped["moa"].first(),
            "hits": grouped["hit"].sum().astype("Int64"),
            "spearman": grouped.apply(_spearman, include_groups=False),
        }
    )
    return curves.merge(more, left_on="compound", right_index=True)


def _spearman(of: pd.DataFrame) -> float:
    both = of[["score", "concentration"]].dropna()
    if both["score"].nunique() < 2 or both["concentration"].nunique() < 2:
        return math.nan
    return float(scipy.stats.spearmanr(both["score"], both["concentration"]).statistic)


def _matching(treated: pd.DataFrame, features: list[str], table: pd.DataFrame) -> dict[str, Any]:
    """Replicates and nearest-neighbour matching of treatments, of compounds that nothing was trained on."""
    trained = {"compound": set(table.loc[table["split"].isin(TRAINED), "compound"].dropna())}
    named = treated[treated["compound"].notna()]
    treated = named[~named["compound"].isin(trained["compound"])]
    if treated.empty:
        reason = f"the model was trained on all {named['compound'].nunique()} compounds that are judged"
        return {} if named.empty else {"nsc_reason": reason}
    treated = treated.assign(batch=treated["batch"].fillna("one"))
    replicating = hits.reproducibility(treated, features, ["compound", "concentration"])
    out: dict[str, Any] = {"percent_replicating": replicating.percent, "replicates_judged": replicating.judged}
    if treated["moa"].nunique() < 2:
        return out
    by = ["compound", "concentration", "batch"]
    treatments = profiles.aggregate(treated, by, features, "modz", keep=["moa"])
    cells = treated.groupby(by, dropna=False)["cells"].mean().reset_index()
    treatments = treatments.merge(cells, on=by, how="left")
    found = retrieval.moa_matching(treatments, features, "cells", trained=trained)
    for rule, accuracy, alone in (("nsc", found.nsc, found.cells_nsc), ("nscb", found.nscb, found.cells_nscb)):
        out |= {rule: accuracy.accuracy, f"{rule}_chance": accuracy.chance, f"{rule}_judged": accuracy.judged}
        out |= {f"{rule}_cells": alone.accuracy, f"{rule}_reason": accuracy.reason}
    agreeing = retrieval.consistency(treatments, features, "cells", trained=trained)
    out |= {"map": float(agreeing["map"].mean()), "map_cells": float(agreeing["map_cells"].mean())}
    out["mechanisms_consistent"] = int((agreeing["q"] <= 0.05).sum())
    return out | {"leak": found.leak}


def _write(config: Config, answers: Answers, features: list[str], lineage: dict):
    """Replace the three tables, each in one step."""
    wells_table = answers.wells.copy()
    if features:
        values = wells_table[features].to_numpy(float)
        wells_table["profile"] = [None if np.isnan(v).any() else v.tolist() for v in values]
        wells_table = wells_table.drop(columns=features)
    compounds = answers.compounds
    for table, frame in (
        (tables.wells(config.lake), wells_table),
        (tables.plates(config.lake), answers.plates),
        (tables.compounds(config.lake), compounds),
    ):
        rows = [_plain(r) | lineage for r in frame.to_dict("records")]
        rows = [{k: v for k, v in r.items() if k in table.schema.names} for r in rows]
        number = table.committed(STAGE) + 1
        table.commit([table.write(rows)] if rows else [], (STAGE, number), replace=table.paths())
        table.sweep()


def _plain(row: dict) -> dict:
    """NaN as null; whole numbers that pandas made floats as they were."""
    return {k: None if not isinstance(v, list) and pd.isna(v) else v for k, v in row.items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(float(value), 3)
