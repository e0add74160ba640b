"""From cells to wells to treatments, and each plate on the scale of its own controls.

Tables are pandas: columns of metadata, and the columns that are named as features. What comes back is a new table. A value that is
infinite or not a number is missing: it takes part in nothing, and stays missing.

Sources: Caicedo et al. 2017, Nature Methods 14:849 (the order of steps); Subramanian et al. 2017, Cell 171:1437 (MODZ); Kessy et
al. 2018, The American Statistician 72:309 (whitening). Where nothing is missing, numbers are those of pycytominer 1.7.1 to 1e-6.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
import scipy

from sparkmed.rejection import InputError, Rejection

STAGE = "profiles"
CONTROL = "control"
"""Column of a well's control type: ``negative``, ``positive``, ``empty``; None in wells that are tested."""
NEGATIVE, POSITIVE = "negative", "positive"
MAD_TO_SD = 1.4826
"""Of a normal distribution, the standard deviation in median absolute deviations (as rounded in the field)."""
MODZ_FLOOR = 0.01
MODZ_DIGITS = 4
MIN_CONTROLS = 2
"""One well has no spread."""

Method = Literal["standardize", "robustize", "mad_robustize", "spherize"]
Whitening = Literal["ZCA", "PCA", "ZCA-cor", "PCA-cor"]
EPSILON = {"standardize": 0.0, "robustize": 0.0, "mad_robustize": 1e-18, "spherize": 1e-6}
"""What is added to the spread, or to the singular values, that values are divided by."""


@dataclass(frozen=True)
class Scale:
    """How the wells of one plate are normalised: ``(x - center) / spread``, then ``@ rotation`` where there is one."""

    center: np.ndarray
    """(F,)"""
    spread: np.ndarray
    """(F,)"""
    rotation: np.ndarray | None = None
    """(F, F)"""

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Values (N, F) on the scale of the controls, (N, F)."""
        scaled = (values - self.center) / self.spread
        return scaled if self.rotation is None else scaled @ self.rotation


@dataclass(frozen=True)
class Normalized:
    """A table on the scale of its controls, and what was left out of it."""

    table: pd.DataFrame
    features: list[str]
    """Those that are left; under PCA their names are PC1, PC2 and so on."""
    dropped: dict[str, str]
    """Feature -> why it is in no plate's profile."""
    missing: dict[str, int]
    """Feature that is left -> wells in which it is missing."""
    refused: list[Rejection]
    """Plates that are not in the table; the URI is the plate's name."""


def aggregate(
    table: pd.DataFrame,
    by: Sequence[str],
    features: Sequence[str],
    method: Literal["median", "modz"] = "median",
    keep: Sequence[str] = (),
    count: str | None = None,
) -> pd.DataFrame:
    """One row per group of ``by``, in its order: the median of each feature, or :func:`modz` of the group's profiles.

    ``keep`` are further columns of metadata, which must say one thing in a group. ``count`` names a column for the number of rows
    of a group, such as its cells. A missing name in ``by`` makes a group as any other. A value that is missing in all rows of a
    group is missing. Raises :class:`InputError` for columns that are not there or not numbers, and for ``keep`` that varies.
    """
    by, features, keep = list(by), list(features), list(keep)
    values = numbers(table, features, [*by, *keep])
    if method not in ("median", "modz"):
        raise InputError(f"method {method!r}: wanted median or modz")
    if not by:
        raise InputError("aggregate wants one column to group by or more, got none")
    frame = pd.DataFrame(values, columns=features, index=table.index)
    groups = frame.groupby([table[c] for c in by], dropna=False, sort=True, observed=True)
    found = groups.median() if method == "median" else _modz_of_groups(groups, values, features)
    whole = table[keep].groupby([table[c] for c in by], dropna=False, sort=True, observed=True)
    for column in keep:
        varies = whole[column].nunique(dropna=False) > 1
        if varies.any():
            where = ", ".join(map(str, np.atleast_1d(np.array(varies.index[varies][0], object))))
            raise InputError(f"column {column!r} says more than one thing in {int(varies.sum())} groups, the first is {where}")
    heads = {c: whole[c].first(skipna=False) for c in keep}
    if count is not None:
        heads[count] = groups.size()
    head = pd.DataFrame(heads, index=found.index)
    return pd.concat([head, found], axis=1).reset_index()


def modz(values: np.ndarray) -> np.ndarray:
    """The consensus (F,) of replicate profiles (R, F): their mean, weighted by how much each agrees with the others.

    A profile's weight is its mean Spearman correlation with the others, of which negative ones count as 0, at least 0.01; weights
    sum to one and are rounded to four digits (Subramanian 2017; cmapPy and pycytominer round so too). Where so many profiles share
    the weight that rounding would change its sum by more than a hundredth, nothing is rounded. A correlation that is undefined
    does not count; if all are, weights are equal. A missing value is left out, and the weights of the others are made up for it.
    """
    count = len(values)
    if count == 1:
        return values[0].copy()
    finite = np.isfinite(values)
    if finite.all():
        ranks = scipy.stats.rankdata(values, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            correlation = np.corrcoef(ranks)
        constant = np.ptp(ranks, axis=1) == 0
        correlation[constant] = correlation[:, constant] = np.nan
    else:
        correlation = pd.DataFrame(values.T).corr(method="spearman").to_numpy(copy=True)
    np.fill_diagonal(correlation, np.nan)
    others = np.isfinite(correlation).sum(axis=1)
    total = np.nansum(np.clip(correlation, 0, None), axis=1)
    weights = np.where(others > 0, np.maximum(total / np.maximum(others, 1), MODZ_FLOOR), 0.0)
    weights = weights / weights.sum() if weights.any() else np.full(count, 1 / count)
    rounded = np.round(weights, MODZ_DIGITS)
    if abs(rounded.sum() - 1) <= 0.01:
        weights = rounded
    if finite.all():
        return weights @ values
    present = weights @ finite  # of the features that nothing is missing of, it is the sum of the weights
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(present > 0, weights @ np.where(finite, values, 0.0) * weights.sum() / present, np.nan)


def normalize(
    table: pd.DataFrame,
    features: Sequence[str],
    method: Method,
    by: str = "plate",
    control: str = CONTROL,
    reference: str = NEGATIVE,
    whitening: Whitening = "ZCA-cor",
    epsilon: float | None = None,
) -> Normalized:
    """Each plate (or other group of ``by``) on the scale of its own wells whose ``control`` is ``reference``.

    - ``standardize``: mean and standard deviation (of the population).
    - ``robustize``: median and the distance between quartiles.
    - ``mad_robustize``: median and 1.4826 times the median absolute deviation, plus ``epsilon``.
    - ``spherize``: the controls become uncorrelated with unit variance, by ``whitening`` (Kessy 2018); ``epsilon`` is added to
      the singular values of the controls, so that directions in which they hardly vary are not blown up. PCA and PCA-cor give each
      group axes of its own: such profiles compare within a group only.

    A profile needs the same features on all plates. So one that has no spread on the controls of any plate (all are equal; under
    the robust methods the middle half or more than half is) is dropped from all, as is one that is missing on all controls of a
    plate and, under ``spherize``, one that is missing in any well. Values that are missing elsewhere stay missing and are counted.

    A plate is refused, by its name: NO_CONTROLS with fewer than two controls; DEPENDENT_FEATURES if under ``spherize`` features
    are sums of each other. Raises :class:`InputError` for wrong arguments, and for a table without plate names.
    """
    features = list(features)
    values = numbers(table, features, [by, control])
    require_method(method, whitening)
    if table[by].isna().any():
        raise InputError(f"{int(table[by].isna().sum())} rows have no {by}")
    rows = table.groupby(by, sort=True, observed=True).indices
    controls = (table[control] == reference).to_numpy(bool, na_value=False)
    refused = []
    for name in list(rows):
        there = int(controls[rows[name]].sum())
        if there < MIN_CONTROLS:
            refused.append(no_controls(by, name, there, reference))
            del rows[name]
    unfit: dict[str, tuple[str, str, int]] = {}
    for name, of in rows.items():
        for feature, why in unfit_features(values[of], controls[of], features, method).items():
            _, first, times = unfit.get(feature, (why, f"{by} {name}", 0))
            unfit[feature] = (unfit[feature][0] if times else why, first, times + 1)
    dropped = {f: dropped_because(*unfit[f]) for f in features if f in unfit}
    left = [n for n, f in enumerate(features) if f not in unfit]
    names = [features[n] for n in left]
    parts = []
    for name, of in rows.items():
        part = values[np.ix_(of, left)]
        try:
            scale = fit(part[controls[of]], method, whitening, epsilon)
        except DependentFeatures as e:
            refused.append(Rejection(str(name), STAGE, "DEPENDENT_FEATURES", f"{by} {name}: {e}"))
            continue
        parts.append((of, scale.apply(part)))
    taken = np.sort(np.concatenate([of for of, _ in parts])) if parts else np.array([], int)
    normal = np.full(values[:, left].shape, np.nan)
    for of, part in parts:
        normal[of] = part
    normal = pd.DataFrame(normal[taken], columns=named(names, method, whitening), index=table.index[taken])
    counts = normal.isna().sum()
    return Normalized(
        pd.concat([table.drop(columns=features).iloc[taken], normal], axis=1),
        list(normal.columns),
        dropped,
        {f: int(n) for f, n in counts.items() if n},
        refused,
    )


class DependentFeatures(Exception):
    """Whitening is not defined: features of the controls are linear combinations of each other."""


def fit(controls: np.ndarray, method: Method, whitening: Whitening = "ZCA-cor", epsilon: float | None = None) -> Scale:
    """The scale of control wells (N, F), each feature of which has a spread; NaN is missing, under ``spherize`` nothing may be."""
    epsilon = EPSILON[method] if epsilon is None else epsilon
    if epsilon < 0:
        raise InputError(f"epsilon {epsilon}: wanted 0 or more")
    if not controls.shape[1]:
        return Scale(np.zeros(0), np.ones(0))
    if method == "standardize":
        return Scale(np.nanmean(controls, axis=0), np.nanstd(controls, axis=0) + epsilon)
    if method == "robustize":
        low, middle, high = quantiles(controls, [0.25, 0.5, 0.75])
        return Scale(middle, high - low + epsilon)
    if method == "mad_robustize":
        return Scale(median(controls), MAD_TO_SD * mad(controls) + epsilon)
    return _whitened(controls, whitening, epsilon)


def quantiles(values: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Quantiles (Q, F) of values (N, F), linear between values (type 7 of Hyndman & Fan 1996).

    What is not finite is missing, for which numpy's own go column by column.

    >>> quantiles(np.array([[1.0, 1], [2, np.nan], [4, 5], [3, np.nan]]), [0.5, 1]).tolist()
    [[2.5, 3.0], [4.0, 5.0]]
    """
    there = np.isfinite(values)
    count = there.sum(axis=0)
    if not len(values):
        return np.full((len(shares), *values.shape[1:]), np.nan)
    rising = np.sort(np.where(there, values, np.nan), axis=0)
    place = np.multiply.outer(np.asarray(shares, float), np.maximum(count - 1, 0))
    below = np.floor(place).astype(int)
    low = np.take_along_axis(rising, below, axis=0)
    high = np.take_along_axis(rising, np.ceil(place).astype(int), axis=0)
    return low + (high - low) * (place - below)


def median(values: np.ndarray) -> np.ndarray:
    """Median (F,) of values (N, F); NaN is missing."""
    return quantiles(values, [0.5])[0]


def mad(values: np.ndarray) -> np.ndarray:
    """Median absolute deviation (F,) of values (N, F) from their median; NaN is missing."""
    return median(np.abs(values - median(values)))


def unfit_features(values: np.ndarray, controls: np.ndarray, features: Sequence[str], method: Method) -> dict[str, str]:
    """Features that cannot be normalised on one plate, and why: values (N, F), ``controls`` (N,) tells which wells are that."""
    found = {}
    missing = np.isnan(values)
    if method == "spherize":
        found |= {features[n]: "is missing in wells" for n in np.flatnonzero(missing.any(axis=0))}
    reference, absent = values[controls], missing[controls].all(axis=0)
    found |= {features[n]: "is missing in all controls" for n in np.flatnonzero(absent)}
    there = np.flatnonzero(~absent)
    reference = reference[:, there]
    constant = np.nanmin(reference, axis=0) == np.nanmax(reference, axis=0) if len(there) else np.zeros(0, bool)
    none = constant
    if method in ("robustize", "mad_robustize") and len(there):
        none = fit(reference, method, epsilon=0.0).spread == 0
    for n in np.flatnonzero(none | constant):
        why = "is constant in the controls" if constant[n] else "has the same value in most controls"
        found.setdefault(features[there[n]], why)
    return found


def dropped_because(why: str, where: str, times: int) -> str:
    """The sentence on a feature that ``times`` plates cannot normalise, the first of which is ``where``."""
    return f"{why} of {where}" + (f" and {times - 1} more" if times > 1 else "")


def no_controls(by: str, name: object, there: int, reference: str) -> Rejection:
    have = f"{there} {reference} control wells" if there else f"no {reference} control wells"
    return Rejection(str(name), STAGE, "NO_CONTROLS", f"{by} {name} has {have}, normalising takes {MIN_CONTROLS} or more")


def named(features: Sequence[str], method: Method, whitening: Whitening) -> list[str]:
    """Names of the normalised features: PCA makes new ones."""
    rotated = method == "spherize" and whitening.startswith("PCA")
    return [f"PC{n}" for n in range(1, len(features) + 1)] if rotated else list(features)


def require_method(method: str, whitening: str):
    for given, wanted in ((method, get_args(Method)), (whitening, get_args(Whitening))):
        if given not in wanted:
            raise InputError(f"normalisation {given!r}: wanted one of {', '.join(wanted)}")


def numbers(table: pd.DataFrame, features: Sequence[str], others: Sequence[str] = ()) -> np.ndarray:
    """The features (N, F) as float64, infinite as NaN. Raises :class:`InputError` for columns that are absent, double or text."""
    absent = [c for c in [*features, *others] if c not in table.columns]
    if absent:
        raise InputError(
            f"the table has no column {', '.join(map(repr, absent[:5]))}: it has {', '.join(map(str, table.columns[:20]))}"
        )
    if not features:
        raise InputError("wanted one feature or more, got none")
    double = sorted({str(c) for c in features if list(features).count(c) > 1}) if len(set(features)) < len(features) else []
    double += [str(c) for c in features if c in others]
    if double:
        raise InputError(f"column {double[0]!r} is named twice")
    part = table.loc[:, list(features)]
    texts = [c for c, kind in part.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)]
    if texts:
        raise InputError(f"feature {texts[0]!r} holds {part[texts[0]].dtype}, wanted numbers")
    values = part.to_numpy(np.float64, na_value=np.nan, copy=True)
    values[~np.isfinite(values)] = np.nan
    return values


def _modz_of_groups(groups, values: np.ndarray, features: list[str]) -> pd.DataFrame:
    index = groups.size().index
    places = groups.ngroup().to_numpy()
    order = np.argsort(places, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(places[order])) + 1) if len(order) else []
    rows = [modz(values[part]) for part in parts]
    return pd.DataFrame(np.array(rows).reshape(len(index), len(features)), columns=features, index=index)


def _whitened(controls: np.ndarray, whitening: Whitening, epsilon: float) -> Scale:
    """By the singular values of the centred controls, X = U S V': W = V (S + epsilon)^-1 sqrt(n - 1), for ZCA times V'.

    Controls fewer than features span no more than n - 1 directions; along all others the last singular value is used.
    """
    count, width = controls.shape
    center = controls.mean(axis=0)
    spread = controls.std(axis=0) if whitening.endswith("-cor") else np.ones(width)
    centered = (controls - center) / spread
    rank = np.linalg.matrix_rank(centered)
    if rank not in (width, count - 1):
        raise DependentFeatures(f"{width} features of {count} control wells have rank {rank}: some are sums of others")
    _, singular, right = np.linalg.svd(centered, full_matrices=True)
    if count <= width:
        singular = np.concatenate([singular[:rank], np.repeat(singular[rank - 1], width - rank)])
    rotation = (right / (singular + epsilon)[:, None]).T * np.sqrt(count - 1)
    return Scale(center, spread, rotation @ right if whitening.startswith("ZCA") else rotation)
