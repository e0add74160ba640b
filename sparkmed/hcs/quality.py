"""How good a plate is: how far its controls lie apart, and whether the place of a well shows in its values.

Values are (N,) or (N, F), wells and features; NaN is missing. A figure is NaN, never a limit such as 1, where it is not defined:
with fewer than two wells of a kind, where wells of a kind are all equal (for robust figures, more than half), and where both kinds
have one centre. Wells are at (row, column), both counted from 1.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy

from sparkmed.hcs.profiles import CONTROL, MAD_TO_SD, NEGATIVE, POSITIVE, median, numbers
from sparkmed.rejection import InputError

MIN_WELLS = 2
POLISHES = 10
"""Sweeps of the median polish at most, as in R's medpolish."""
POLISHED = 1e-4
"""It ends when a sweep changes the sum of absolute residuals by less than this share."""


def z_prime(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """1 - 3 (s_p + s_n) / |m_p - m_n| of means and standard deviations (Zhang, Chung & Oldenburg 1999, J Biomol Screen 4:67).

    >>> float(z_prime(np.array([99.0, 100, 101]), np.array([9.0, 10, 11]))), float(z_prime(np.ones(3), np.zeros(3)))
    (0.9333333333333333, nan)
    """
    (mp, sp), (mn, sn) = _moments(positive), _moments(negative)
    return 1 - 3 * (sp + sn) / _distance(mp, mn)


def robust_z_prime(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Z' of medians and 1.4826 median absolute deviations (Birmingham et al. 2009, Nature Methods 6:569)."""
    (mp, sp), (mn, sn) = _robust_moments(positive), _robust_moments(negative)
    return 1 - 3 * (sp + sn) / _distance(mp, mn)


def ssmd(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Strictly standardised mean difference, (m_p - m_n) / sqrt(s_p^2 + s_n^2) (Zhang XD 2007, Genomics 89:552)."""
    (mp, sp), (mn, sn) = _moments(positive), _moments(negative)
    return np.where(_distance(mp, mn) > 0, (mp - mn) / np.hypot(sp, sn), np.nan)[()]


def robust_ssmd(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """SSMD of medians and 1.4826 median absolute deviations (Zhang XD 2007)."""
    (mp, sp), (mn, sn) = _robust_moments(positive), _robust_moments(negative)
    return np.where(_distance(mp, mn) > 0, (mp - mn) / np.hypot(sp, sn), np.nan)[()]


def signal_window(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """(|m_p - m_n| - 3 (s_p + s_n)) / s, s of the controls of higher mean (Sittampalam et al. 1997, J Biomol Screen 2:159)."""
    (mp, sp), (mn, sn) = _moments(positive), _moments(negative)
    return (_distance(mp, mn) - 3 * (sp + sn)) / np.where(mp > mn, sp, sn)


def v_factor(positive: np.ndarray, negative: np.ndarray, groups: Sequence[np.ndarray] = ()) -> np.ndarray:
    """1 - 6 s / |m_p - m_n|, s the mean standard deviation of both controls and of all ``groups`` of replicates (Ravkin 2004).

    A group is the wells of one compound at one dose; one of fewer than two wells, or of equal ones, says nothing of the spread and
    does not count. Without groups it is Z'.
    """
    (mp, sp), (mn, sn) = _moments(positive), _moments(negative)
    others = np.array([_moments(g)[1] for g in groups]).reshape(len(groups), *np.shape(sp))
    there = np.isfinite(others)
    spread = (sp + sn + np.where(there, others, 0).sum(axis=0)) / (2 + there.sum(axis=0))
    return 1 - 6 * spread / _distance(mp, mn)


def plate_quality(
    table: pd.DataFrame,
    features: Sequence[str],
    by: str = "plate",
    control: str = CONTROL,
    positive: str = POSITIVE,
    negative: str = NEGATIVE,
    replicates: Sequence[str] = (),
) -> pd.DataFrame:
    """One row per plate and feature: the figures of this module, the wells of both controls that have a value, and ``reason``.

    ``reason`` says why figures are NaN, None where none is. ``replicates`` are the columns that tell treatments apart, compound and
    dose, for the V-factor: all wells of a plate that agree in them and are no control are one group.
    """
    values = numbers(table, features, [by, control, *replicates])
    kind = table[control].to_numpy(object)
    tested = table[control].isna().to_numpy()
    treatment = table.groupby(list(replicates), dropna=False).ngroup().to_numpy() if replicates else np.zeros(len(table), int)
    parts = []
    for name, of in table.groupby(by, sort=True, observed=True).indices.items():
        p, n = values[of[kind[of] == positive]], values[of[kind[of] == negative]]
        groups = []
        if replicates:
            wells = of[tested[of]]
            wells = wells[np.argsort(treatment[wells], kind="stable")]
            groups = [values[g] for g in np.split(wells, np.flatnonzero(np.diff(treatment[wells])) + 1) if len(g) >= MIN_WELLS]
        figures = {
            "z_prime": z_prime(p, n),
            "robust_z_prime": robust_z_prime(p, n),
            "ssmd": ssmd(p, n),
            "robust_ssmd": robust_ssmd(p, n),
            "v_factor": v_factor(p, n, groups),
            "signal_window": signal_window(p, n),
        }
        counts = {"positives": np.isfinite(p).sum(axis=0), "negatives": np.isfinite(n).sum(axis=0)}
        parts.append(pd.DataFrame({by: name, "feature": list(features), **counts, **figures, "reason": _reasons(p, n)}))
    columns = [by, "feature", "positives", "negatives", "z_prime", "robust_z_prime", "ssmd", "robust_ssmd", "v_factor"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*columns, "signal_window", "reason"])


def edge_effects(
    table: pd.DataFrame,
    features: Sequence[str],
    shape: tuple[int, int],
    by: str = "plate",
    row: str = "row",
    column: str = "column",
) -> pd.DataFrame:
    """One row per plate and feature: whether the outer ring of wells differs from those inside.

    ``effect`` is Cliff's delta: how much more often a well of the ring lies above one inside than below, -1 to 1; ``p`` is that of
    the two-sided Mann-Whitney test. NaN with fewer than two wells on either side or where all are equal. Give tested wells only:
    controls often stand in the outer columns and differ for another reason.
    """
    values = numbers(table, features, [by, row, column])
    rows, columns = _places(table, shape, row, column)
    ring = (rows == 0) | (rows == shape[0] - 1) | (columns == 0) | (columns == shape[1] - 1)
    parts = []
    for name, of in table.groupby(by, sort=True, observed=True).indices.items():
        outer, inner = values[of[ring[of]]], values[of[~ring[of]]]
        m, n = np.isfinite(outer).sum(axis=0), np.isfinite(inner).sum(axis=0)
        effect, p = np.full((2, len(features)), np.nan)
        both = np.concatenate([outer, inner])
        told = np.flatnonzero((m >= MIN_WELLS) & (n >= MIN_WELLS))
        told = told[np.nanmin(both[:, told], axis=0) < np.nanmax(both[:, told], axis=0)] if len(told) else told
        if len(told):
            test = scipy.stats.mannwhitneyu(outer[:, told], inner[:, told], axis=0, nan_policy="omit", method="asymptotic")
            effect[told], p[told] = 2 * test.statistic / (m[told] * n[told]) - 1, test.pvalue
        parts.append(pd.DataFrame({by: name, "feature": list(features), "ring": m, "inside": n, "effect": effect, "p": p}))
    empty = pd.DataFrame(columns=[by, "feature", "ring", "inside", "effect", "p"])
    return pd.concat(parts, ignore_index=True) if parts else empty


def heatmap(table: pd.DataFrame, features: Sequence[str], shape: tuple[int, int], row: str = "row", column: str = "column"):
    """The values of one plate as they lie on it, (F, R, C); NaN where no well is. :class:`InputError` for two in one place."""
    values = numbers(table, features, [row, column])
    rows, columns = _places(table, shape, row, column)
    places = rows * shape[1] + columns
    seen, times = np.unique(places, return_counts=True)
    if (times > 1).any():
        where = seen[times > 1][0]
        raise InputError(f"{times.max()} rows at row {where // shape[1] + 1}, column {where % shape[1] + 1}: wanted one per well")
    plate = np.full((len(features), *shape), np.nan)
    plate[:, rows, columns] = values.T
    return plate


def median_polish(plates: np.ndarray) -> np.ndarray:
    """Residuals (..., R, C) of additive row and column effects, by Tukey's median polish (Tukey 1977); NaN is missing."""
    residuals = np.array(plates, float)
    total = np.nansum(np.abs(residuals), axis=(-2, -1))
    for _ in range(POLISHES):
        residuals -= _along(residuals, -1)
        residuals -= _along(residuals, -2)
        before, total = total, np.nansum(np.abs(residuals), axis=(-2, -1))
        if (np.abs(before - total) <= POLISHED * total).all():
            break
    return residuals


def b_scores(
    table: pd.DataFrame,
    features: Sequence[str],
    shape: tuple[int, int],
    by: str = "plate",
    row: str = "row",
    column: str = "column",
) -> pd.DataFrame:
    """The table with each feature as B-score: residual of the plate's :func:`median_polish` in 1.4826 median absolute deviations.

    Brideau et al. 2003, J Biomol Screen 8:634; Malo et al. 2006, Nature Biotechnology 24:167. NaN on a plate where the deviation
    is 0. Give tested wells only, and most of them without effect: a column of controls is an effect of the column to the polish,
    and so are active wells that fill one.
    """
    values = numbers(table, features, [by, row, column])
    found = np.full(values.shape, np.nan)
    for name, of in table.groupby(by, sort=True, observed=True).indices.items():
        part = table.iloc[of]
        try:
            residuals = median_polish(heatmap(part, features, shape, row, column))
        except InputError as e:
            raise InputError(f"{by} {name}: {e}") from None
        rows, columns = _places(part, shape, row, column)
        wells = residuals[:, rows, columns].T
        spread = MAD_TO_SD * median(np.abs(wells - median(wells)))
        found[of] = wells / np.where(spread > _noise(values[of]), spread, np.nan)
    return table.assign(**dict(zip(features, found.T, strict=True)))


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (n - 1) along the wells; both NaN where they are too few or all equal."""
    values = np.asarray(values, float)
    there = np.isfinite(values)
    count = there.sum(axis=0)
    filled = np.where(there, values, 0.0)
    mean = filled.sum(axis=0) / np.maximum(count, 1)
    spread = np.sqrt((np.where(there, values - mean, 0.0) ** 2).sum(axis=0) / np.maximum(count - 1, 1))
    low, high = (
        np.where(there, values, np.inf).min(axis=0, initial=np.inf),
        np.where(there, values, -np.inf).max(axis=0, initial=-np.inf),
    )
    told = (count >= MIN_WELLS) & (low < high)  # rounding gives equal values a spread that is not quite 0
    return np.where(told, mean, np.nan), np.where(told, spread, np.nan)


def _robust_moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(values, float)
    middle = median(values)
    spread = MAD_TO_SD * median(np.abs(values - middle))
    told = (np.isfinite(values).sum(axis=0) >= MIN_WELLS) & (spread > 0)
    return np.where(told, middle, np.nan), np.where(told, spread, np.nan)


def _distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    distance = np.abs(one - other)
    return np.where(distance > 0, distance, np.nan)[()]


def _reasons(positive: np.ndarray, negative: np.ndarray) -> list[str | None]:
    said: list[list[str]] = [[] for _ in range(positive.shape[1])]
    for kind, values in (("positive", positive), ("negative", negative)):
        few = np.isfinite(values).sum(axis=0) < MIN_WELLS
        flat, robust_flat = np.isnan(_moments(values)[1]), np.isnan(_robust_moments(values)[1])
        for n in np.flatnonzero(flat | robust_flat):
            if few[n]:
                said[n].append(f"fewer than {MIN_WELLS} {kind} control wells")
            else:
                said[n].append(f"{'all' if flat[n] else 'more than half of the'} {kind} controls are equal")
    for n in np.flatnonzero(np.nan_to_num(_moments(positive)[0] - _moments(negative)[0], nan=1) == 0):
        said[n].append("both controls have the same mean")
    for n in np.flatnonzero(np.nan_to_num(_robust_moments(positive)[0] - _robust_moments(negative)[0], nan=1) == 0):
        said[n].append("both controls have the same median")
    return ["; ".join(s) or None for s in said]


def _places(table: pd.DataFrame, shape: tuple[int, int], row: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns from 0, which lie on the plate."""
    rows, columns = table[row].to_numpy(int) - 1, table[column].to_numpy(int) - 1
    off = (rows < 0) | (rows >= shape[0]) | (columns < 0) | (columns >= shape[1])
    if off.any():
        n = int(np.flatnonzero(off)[0])
        raise InputError(
            f"row {rows[n] + 1}, column {columns[n] + 1} lies outside a plate of {shape[0]} rows and {shape[1]} columns"
        )
    return rows, columns


def _along(plates: np.ndarray, axis: int) -> np.ndarray:
    """Medians along an axis, which is kept; 0 where nothing is."""
    if not np.isnan(plates).any():
        return np.median(plates, axis=axis, keepdims=True)
    return np.expand_dims(np.nan_to_num(median(np.moveaxis(plates, axis, 0))), axis)


def _noise(values: np.ndarray) -> np.ndarray:
    """What rounding alone leaves of values (N, F) after additions and subtractions."""
    return 64 * np.finfo(float).eps * np.max(np.abs(np.nan_to_num(values)), axis=0, initial=0)
