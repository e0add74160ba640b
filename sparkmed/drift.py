"""Whether new volumes are like those that a model was judged on: figures of a volume, samples of subjects, tests between them.

Plain values and numpy; knows no table. A subject counts once: of several volumes the median is taken, for those of one subject are
alike and the tests take values for independent.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy

from sparkmed.imaging.intensity import QUANTILES

BINS = 10
"""Bins of the population stability index (Siddiqi 2006); fewer where a bin would hold less than :data:`PER_BIN` subjects."""
PER_BIN = 5

Key = tuple[str, str]
"""A source, such as ``modality=CT``, and a figure, such as ``liver ml``."""


@dataclass(frozen=True)
class Sample:
    """One figure of the subjects that a model was judged on: its values in order, and the edges of its bins."""

    values: np.ndarray
    edges: np.ndarray

    @classmethod
    def of(cls, values: Sequence[float]) -> "Sample":
        values = np.sort(np.asarray(values, np.float64))
        return cls(values, edges(values))


@dataclass(frozen=True)
class Finding:
    """One figure of one source, then and now.

    ``psi`` is the population stability index; ``chance`` what it stays below with probability 1 - alpha when nothing changed
    (Yurdakul 2018: a multiple of chi-squared); ``ks`` the Kolmogorov-Smirnov distance, ``p`` its two-sided p-value and
    ``adjusted`` that value after Holm (1979) over all figures of a run. None where nothing was judged.
    """

    source: str
    figure: str
    reference: int
    """Subjects that the model was judged on."""
    current: int
    """New subjects."""
    verdict: Literal["fine", "drift", "unseen", "few"]
    """``unseen``: the model was judged on nobody of this source. ``few``: not enough subjects to judge."""
    psi: float | None = None
    chance: float | None = None
    ks: float | None = None
    p: float | None = None
    adjusted: float | None = None


def figures(volume: Mapping, prediction: Mapping, classes: Sequence[str]) -> dict[str, float]:
    """The figures of one volume from its rows in ``volumes/`` and ``predictions/``, to four digits: rounding is no drift.

    Geometry (spacing in mm, field of view in ml), intensity at :data:`~sparkmed.imaging.intensity.QUANTILES` for each channel,
    probability and volume in ml by class, how many cells were scored. What a row does not hold is left out.
    """
    spacing, shape = volume["spacing"], volume["shape"][1:]
    found = {
        "finest spacing mm": min(spacing),
        "coarsest spacing mm": max(spacing),
        "field ml": math.prod(spacing) * math.prod(shape) / 1000,
        "cells": prediction.get("cells"),
    }
    values = prediction.get("quantiles") or []
    channels = len(values) // len(QUANTILES)
    for n, value in enumerate(values):
        name = f"intensity p{100 * QUANTILES[n % len(QUANTILES)]:g}"
        found[f"channel {n // len(QUANTILES)} {name}" if channels > 1 else name] = value
    ml = prediction.get("ml")
    shown = classes[1:] if ml or len(classes) == 2 else classes  # two probabilities say one thing, the background's says nothing
    for c in shown:
        n = classes.index(c)
        found[f"{c} probability"] = (prediction.get("probability") or [None] * len(classes))[n]
        found[f"{c} ml"] = ml[n] if ml else None
    return {k: float(f"{v:.4g}") for k, v in found.items() if v is not None and math.isfinite(v)}


def samples(records: Iterable[tuple[str, Sequence[str], Mapping[str, float]]]) -> dict[Key, list[float]]:
    """By source and figure one value per subject, its median, in order; a record is (subject, sources, figures) of one volume."""
    found: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for subject, sources, values in records:
        for source in sources:
            for figure, value in values.items():
                found[source, figure][subject].append(value)
    return {key: sorted(float(np.median(v)) for v in of.values()) for key, of in sorted(found.items())}


def edges(values: np.ndarray) -> np.ndarray:
    """Inner edges of bins that hold equal shares of ``values``; a bin takes its upper edge in. Equal edges are one.

    Where many values are the smallest one, what lies below it is a bin of its own.

    >>> edges(np.arange(20.0)).tolist(), np.searchsorted(edges(np.ones(20)), [0, 1, 2]).tolist()
    ([4.75, 9.5, 14.25], [0, 1, 2])
    """
    bins = min(BINS, max(2, len(values) // PER_BIN))
    inner = np.unique(np.quantile(values, np.arange(1, bins) / bins))
    return np.append(np.nextafter(values.min(), -np.inf), inner) if inner[0] == values.min() else inner


def psi(reference: np.ndarray, current: np.ndarray, inner: np.ndarray) -> float:
    """Population stability index (Siddiqi 2006, Credit Risk Scorecards): sum over bins of (a - e) ln(a / e) of their shares.

    An empty bin counts as half a subject, so that one that is empty by chance weighs little in a small sample.
    """
    shares = []
    for values in (reference, current):
        counts = np.bincount(np.searchsorted(inner, values), minlength=len(inner) + 1)
        shares.append(np.maximum(counts, 0.5) / len(values))
    expected, actual = shares
    occupied = (expected * len(reference) > 0.5) | (actual * len(current) > 0.5)  # a bin that both leave empty says nothing
    return float(np.sum(((actual - expected) * np.log(actual / expected))[occupied]))


def psi_by_chance(reference: int, current: int, inner: int, alpha: float) -> float:
    """What the index stays below with probability 1 - ``alpha`` when nothing changed: (1/n + 1/m) chi-squared of bins - 1
    degrees of freedom (Yurdakul 2018, Statistical Properties of Population Stability Index)."""
    return float((1 / reference + 1 / current) * scipy.stats.chi2.isf(alpha, inner))


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values of Holm (1979, Scandinavian Journal of Statistics 6:2): of all that are at most alpha, the chance that any
    is a false alarm is at most alpha, however the tests depend on each other.

    >>> [round(x, 6) for x in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    adjusted, most = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(p) - rank) * float(p[i])))
        adjusted[i] = most
    return adjusted


def compare(
    reference: Mapping[Key, Sample], current: Mapping[Key, Sequence[float]], minimum: int, limit: float, alpha: float
) -> list[Finding]:
    """What is said about each source and figure of ``current``.

    ``drift`` wants both: the two-sample Kolmogorov-Smirnov test at ``alpha`` after Holm over all that is judged, so that there is
    evidence; and an index of at least ``limit``, so that it matters. The index alone would alarm on small samples, where it is
    large by chance, the test alone on large ones, where nothing is too small to be found. Fewer than ``minimum`` subjects on
    either side are not judged. A figure that is constant and the same is fine, and no test.
    """
    sources = {source for source, _ in reference}
    findings: list[Finding] = []
    judged: list[tuple[Key, np.ndarray]] = []
    unseen: dict[str, int] = defaultdict(int)
    for (source, figure), values in sorted(current.items()):
        there = reference.get((source, figure))
        if source not in sources:
            unseen[source] = max(unseen[source], len(values))
        elif there is None or min(len(there.values), len(values)) < minimum:
            findings.append(Finding(source, figure, 0 if there is None else len(there.values), len(values), "few"))
        elif there.values[0] == there.values[-1] == min(values) == max(values):
            findings.append(Finding(source, figure, len(there.values), len(values), "fine", psi=0.0, ks=0.0, p=1.0, adjusted=1.0))
        else:
            judged.append(((source, figure), np.asarray(values, np.float64)))
    findings += [Finding(s, "source", 0, n, "unseen" if n >= minimum else "few") for s, n in sorted(unseen.items())]
    tests = [scipy.stats.ks_2samp(reference[key].values, values) for key, values in judged]
    for (key, values), test, adjusted in zip(judged, tests, holm([t.pvalue for t in tests]), strict=True):
        then = reference[key]
        index = psi(then.values, values, then.edges)
        findings.append(
            Finding(
                *key,
                len(then.values),
                len(values),
                "drift" if adjusted <= alpha and index >= limit else "fine",
                index,
                psi_by_chance(len(then.values), len(values), len(then.edges), alpha),
                float(test.statistic),
                float(test.pvalue),
                adjusted,
            )
        )
    return sorted(findings, key=lambda f: (f.source, f.figure))


def risen(before: tuple[int, int], now: tuple[int, int], rise: float, alpha: float) -> bool:
    """Whether a share, as (count, of how many), rose by more than ``rise`` and not by chance (Fisher's exact test, one-sided).

    >>> risen((2, 100), (30, 100), 0.1, 0.01), risen((2, 100), (1, 3), 0.1, 0.01), risen((0, 0), (50, 100), 0.1, 0.01)
    (True, False, True)
    """
    if not now[1] or now[0] / now[1] <= (before[0] / before[1] if before[1] else 0.0) + rise:
        return False
    if not before[1]:
        return bool(scipy.stats.binom.sf(now[0] - 1, now[1], rise) <= alpha)
    table = [[now[0], now[1] - now[0]], [before[0], before[1] - before[0]]]
    return bool(scipy.stats.fisher_exact(table, "greater").pvalue <= alpha)
