"""Which wells differ from the controls, at which dose a compound acts, and whether replicates agree.

A number that the wells do not determine is NaN, with a reason beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import scipy

from sparkmed.hcs.profiles import CONTROL, MAD_TO_SD, MIN_CONTROLS, NEGATIVE, mad, median, numbers
from sparkmed.rejection import InputError

Side = Literal["two-sided", "greater", "less"]

MIN_DOSES = 4
"""Different doses that a curve of four parameters takes."""
FLAT = 0.05
"""A curve whose F-test against a constant has a higher p-value is flat."""
_HILLS = np.geomspace(0.1, 20, 41)
_PER_DECADE = 20
_TOLD = 1e-20
"""Below this sum of squares of shares the doses lie all on one end of the curve, and do not tell it from a constant."""
_BEYOND = 2.0
"""Decades beyond the doses in which the half-maximal dose is looked for."""


def score_wells(
    table: pd.DataFrame, score: str, by: str = "plate", control: str = CONTROL, reference: str = NEGATIVE, side: Side = "two-sided"
) -> pd.DataFrame:
    """The table with what each well's score says against the ``reference`` controls of its plate.

    - ``robust_z``: (score - median) / (1.4826 median absolute deviation) of the controls; NaN where that deviation is 0.
    - ``p_robust``: its tail of a normal distribution.
    - ``p_empirical``: the share of controls at least as extreme, each counted with the well itself, (1 + k) / (1 + n): never 0, and
      with n controls at least 1 / (1 + n) (Phipson & Smyth 2010, Stat Appl Genet Mol Biol 9:39); twice the smaller tail of two.
    - ``q_robust``, ``q_empirical``: false discovery rate over all wells of the table that are no control (:func:`fdr`).

    A reference control is compared with itself among the others, so its p-value means nothing and is NaN, as are those on plates
    with fewer than two controls that have a score. Other controls have p-values, but no part in the rate.
    """
    values = numbers(table, [score], [by, control])[:, 0]
    if side not in ("two-sided", "greater", "less"):
        raise InputError(f"side {side!r}: wanted two-sided, greater or less")
    kind = (table[control] == reference).to_numpy(bool, na_value=False)
    z, empirical = np.full((2, len(table)), np.nan)
    for of in table.groupby(by, sort=True, observed=True).indices.values():
        controls = np.sort(values[of[kind[of] & np.isfinite(values[of])]])
        if len(controls) < MIN_CONTROLS:
            continue
        spread = MAD_TO_SD * mad(controls)
        if spread > 0:
            z[of] = (values[of] - median(controls)) / spread
        above = (1 + len(controls) - np.searchsorted(controls, values[of], "left")) / (1 + len(controls))
        below = (1 + np.searchsorted(controls, values[of], "right")) / (1 + len(controls))
        empirical[of] = {"greater": above, "less": below}.get(side, np.minimum(1, 2 * np.minimum(above, below)))
    robust = {"greater": scipy.stats.norm.sf(z), "less": scipy.stats.norm.cdf(z)}.get(side, 2 * scipy.stats.norm.sf(np.abs(z)))
    robust, empirical = (np.where(kind | np.isnan(values), np.nan, p) for p in (robust, empirical))
    tested = table[control].isna().to_numpy()
    rates = {q: fdr(np.where(tested, p, np.nan)) for q, p in (("q_robust", robust), ("q_empirical", empirical))}
    return table.assign(robust_z=z, p_robust=robust, p_empirical=empirical, **rates)


def fdr(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values (N,) of Benjamini & Hochberg (1995, J R Stat Soc B 57:289); a NaN is no test and stays one.

    >>> fdr(np.array([0.01, np.nan, 0.04, 0.03])).tolist()
    [0.03, nan, 0.04, 0.04]
    """
    p = np.asarray(p, float)
    tests = np.flatnonzero(~np.isnan(p))
    falling = tests[np.argsort(-p[tests], kind="stable")]
    adjusted = np.full(len(p), np.nan)
    if len(tests):
        adjusted[falling] = np.minimum(1, np.minimum.accumulate(p[falling] * len(tests) / np.arange(len(tests), 0, -1)))
    return adjusted


@dataclass(frozen=True)
class Curve:
    """The response at a dose d: ``start`` + (``end`` - ``start``) / (1 + (``ec50`` / d) ^ ``hill``), with intervals (low, high).

    ``start`` is the response without the compound and ``end`` that at any high dose, so that a falling curve has ``end`` below
    ``start``. All numbers are NaN unless ``identified``; ``reason`` says why they are not: ``too few doses``, ``flat``, ``EC50
    outside the doses`` or ``EC50 interval unbounded``. An end of an interval that the wells do not bound is infinite (of ``hill``,
    beyond 0.1 to 20, also 0).
    """

    identified: bool
    reason: str | None
    wells: int
    doses: int
    start: float = np.nan
    end: float = np.nan
    hill: float = np.nan
    ec50: float = np.nan
    start_interval: tuple[float, float] = (np.nan, np.nan)
    end_interval: tuple[float, float] = (np.nan, np.nan)
    hill_interval: tuple[float, float] = (np.nan, np.nan)
    ec50_interval: tuple[float, float] = (np.nan, np.nan)
    r2: float = np.nan
    flat_p: float = np.nan
    """p-value of the F-test against a constant; NaN with too few doses."""

    def at(self, doses: np.ndarray) -> np.ndarray:
        """The response at doses, in their unit; at 0 it is ``start``."""
        return _response(np.asarray(doses, float), self.start, self.end, self.hill, np.log10(self.ec50))


def dose_response(doses: np.ndarray, responses: np.ndarray, level: float = 0.95) -> Curve:
    """The four-parameter logistic curve of wells (N,) by least squares, with intervals of confidence ``level``.

    Doses are in one unit; 0 is a well without the compound. Wells whose response is missing do not count. The search goes over a
    grid of EC50 (two decades beyond the doses) and hill (0.1 to 20), on which the two ends of the curve are a linear problem, and
    is refined from its best point: no start is needed and no local minimum is taken for the least. The intervals of EC50 and hill
    are those of the profile likelihood (Bates & Watts 1988, chapter 6: all values for which the best curve is no worse than the F
    quantile allows), which tell when there is no bound; those of the ends are by linearisation.

    Not identified, in this order: fewer than four doses or five wells; no better than a constant by the F-test at 0.05; EC50
    outside the doses above 0; its interval without a bound two decades beyond the doses.
    """
    doses, responses = np.asarray(doses, float), np.asarray(responses, float)
    if doses.shape != responses.shape or doses.ndim != 1:
        raise InputError(f"doses and responses: wanted two lists of one length, got shapes {doses.shape} and {responses.shape}")
    there = np.isfinite(responses)
    doses, responses = doses[there], responses[there]
    if not (np.isfinite(doses) & (doses >= 0)).all():
        raise InputError("doses: wanted numbers of 0 or more")
    count, different = len(doses), len(np.unique(doses))
    if different < MIN_DOSES or count < 5 or len(np.unique(doses[doses > 0])) < MIN_DOSES - 1:
        return Curve(False, "too few doses", count, different)
    constant = ((responses - responses.mean()) ** 2).sum()
    scale = np.abs(responses).max()
    if constant <= count * (64 * np.finfo(float).eps * scale) ** 2:
        return Curve(False, "flat", count, different, flat_p=1.0)
    free = count - 4
    low, high = np.log10(doses[doses > 0].min()), np.log10(doses.max())
    logs = np.arange(low - _BEYOND, high + _BEYOND + 1 / _PER_DECADE, 1 / _PER_DECADE)
    grid = _grid(doses, responses, logs, _HILLS)
    theta, least = _refined(doses, responses, logs, grid)
    f = ((constant - least) / 3) / (least / free) if least > 0 else np.inf
    flat_p = float(scipy.stats.f.sf(f, 3, free))
    if flat_p > FLAT:
        return Curve(False, "flat", count, different, flat_p=flat_p)
    start, end, hill, log = theta
    if not low <= log <= high:
        return Curve(False, "EC50 outside the doses", count, different, flat_p=flat_p)
    errors = _linear_errors(doses, theta, least / free)
    t = scipy.stats.t.ppf((1 + level) / 2, free)
    close = [
        _close(places, best, 2 * t * e)
        for places, best, e in ((logs, log, errors[3]), (np.log(_HILLS), np.log(hill), errors[2] / hill))
    ]
    fine = _grid(doses, responses, close[0], np.exp(close[1]))
    allowed = least * (1 + t**2 / free)
    bounds = _interval(*_joined(logs, grid.min(axis=1), close[0], fine.min(axis=1)), log, least, allowed)
    if not np.isfinite(bounds).all():
        return Curve(False, "EC50 interval unbounded", count, different, flat_p=flat_p)
    hills = _interval(*_joined(np.log(_HILLS), grid.min(axis=0), close[1], fine.min(axis=0)), np.log(hill), least, allowed)
    half = t * errors
    return Curve(
        True,
        None,
        count,
        different,
        float(start),
        float(end),
        float(hill),
        float(10**log),
        (float(start - half[0]), float(start + half[0])),
        (float(end - half[1]), float(end + half[1])),
        (float(np.exp(hills[0])), float(np.exp(hills[1]))),
        (float(10 ** bounds[0]), float(10 ** bounds[1])),
        float(1 - least / constant),
        flat_p,
    )


def dose_responses(
    table: pd.DataFrame, response: str, compound: str = "compound", dose: str = "concentration", level: float = 0.95
) -> pd.DataFrame:
    """One row per compound: the fields of its :class:`Curve`, intervals as two columns ``ec50_low`` and ``ec50_high``, ..."""
    numbers(table, [response, dose], [compound])
    rows = []
    for name, of in table.groupby(compound, sort=True, observed=True):
        try:
            curve = dose_response(of[dose].to_numpy(float), of[response].to_numpy(float), level)
        except InputError as e:
            raise InputError(f"{compound} {name}: {e}") from None
        row = {compound: name}
        for key, value in vars(curve).items():
            row |= {f"{key[:-9]}_low": value[0], f"{key[:-9]}_high": value[1]} if key.endswith("_interval") else {key: value}
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Reproducibility:
    """How replicates agree: ``groups`` has a row per treatment, its replicates and their median pairwise correlation."""

    groups: pd.DataFrame
    """The columns of the treatment, ``replicates``, ``correlation``, ``threshold`` (of the null) and ``replicating``."""
    percent: float
    """Of the treatments that could be judged, those above the threshold; NaN when there is none."""
    judged: int
    excluded: int
    """Treatments without two replicates to compare."""


def reproducibility(
    table: pd.DataFrame,
    features: Sequence[str],
    treatment: Sequence[str],
    apart: str | None = None,
    null: int = 1000,
    seed: int = 0,
    quantile: float = 0.95,
) -> Reproducibility:
    """Median pairwise Pearson correlation of each treatment's profiles, against as many profiles of different treatments.

    A treatment replicates if that is above the ``quantile`` of ``null`` draws of as many profiles, no two of one treatment (percent
    replicating: Way et al. 2022, Cell Systems 13:911). With ``apart``, such as the plate, only pairs that differ in it count, among
    the draws too. Features that are missing are an :class:`InputError`; a constant profile correlates with nothing and does not
    count. Leave controls out: of thousands of wells every pair would be looked at.
    """
    values = numbers(table, features, [*treatment, *([apart] if apart else [])])
    if np.isnan(values).any():
        raise InputError(
            f"{int(np.isnan(values).any(axis=1).sum())} profiles have features that are missing: leave out those or these"
        )
    centered = values - values.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(centered, axis=1)
    usable = norm > 64 * np.finfo(float).eps * np.abs(values).max(axis=1, initial=0) * np.sqrt(values.shape[1])
    unit = centered / np.where(usable, norm, np.nan)[:, None]
    part = table[apart].factorize(use_na_sentinel=False)[0] if apart else np.arange(len(table))
    grouped = table.groupby(list(treatment), dropna=False, sort=True, observed=True)
    names, code = grouped.size().index, grouped.ngroup().to_numpy()
    members = _members(code, usable, len(names))
    found = np.array([_median_correlation(unit[m], part[m]) for m in members])
    sizes = np.array([len(m) for m in members])
    limits = {}
    for size in sorted(set(sizes[np.isfinite(found)])):
        draws = _null_correlations(unit, part, [m for m in members if len(m)], int(size), null, seed)
        draws = draws[np.isfinite(draws)]
        limits[size] = np.quantile(draws, quantile) if len(draws) else np.nan
    threshold = np.array([limits.get(s, np.nan) if np.isfinite(c) else np.nan for s, c in zip(sizes, found, strict=True)])
    judged = np.isfinite(found) & np.isfinite(threshold)
    groups = names.to_frame(index=False)
    groups["replicates"], groups["correlation"], groups["threshold"] = sizes, found, threshold
    groups["replicating"] = pd.array(np.where(judged, found > threshold, False), "boolean")
    groups.loc[~judged, "replicating"] = pd.NA
    percent = float(100 * (found[judged] > threshold[judged]).mean()) if judged.any() else np.nan
    return Reproducibility(groups, percent, int(judged.sum()), int((~judged).sum()))


def _response(doses: np.ndarray, start: float, end: float, hill: float, log: float) -> np.ndarray:
    return start + (end - start) * _share(doses, hill, log)


def _share(doses, hill, log) -> np.ndarray:
    """d^h / (d^h + e^h), 0 at dose 0."""
    with np.errstate(divide="ignore"):
        exponent = np.asarray(hill) * (np.log(doses) - np.asarray(log) * np.log(10))
    return 1 / (1 + np.exp(-np.clip(exponent, -700, 700)))


def _close(places: np.ndarray, best: float, reach: float) -> np.ndarray:
    """Places near the best one, within those of the whole grid, which is too coarse for wells with little noise."""
    reach = min(reach, places[-1] - places[0])
    return np.clip(best + reach * np.linspace(-1, 1, 61), places[0], places[-1])


def _joined(places: np.ndarray, profile: np.ndarray, close: np.ndarray, fine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fine profile near the best place, that of the whole grid elsewhere."""
    off = (places < close[0]) | (places > close[-1])
    return np.append(places[off], close), np.append(profile[off], fine)


def _grid(doses: np.ndarray, responses: np.ndarray, logs: np.ndarray, hills: np.ndarray) -> np.ndarray:
    """Sum of squares (E, H) of the best curve at each log10 EC50 and hill of the grid: a straight line in the share."""
    share = _share(doses, hills[None, :, None], logs[:, None, None])
    centered = share - share.mean(axis=-1, keepdims=True)
    response = responses - responses.mean()
    squares = (centered**2).sum(axis=-1)
    product = centered @ response
    told = squares > _TOLD
    return np.maximum((response**2).sum() - np.where(told, product**2 / np.where(told, squares, 1), 0), 0)


def _refined(doses: np.ndarray, responses: np.ndarray, logs: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, float]:
    """(start, end, hill, log10 EC50) of the least sum of squares, and that sum."""
    e, h = np.unravel_index(np.argmin(grid), grid.shape)
    hill, log = _HILLS[h], logs[e]

    def ends(hill, log):
        share = _share(doses, hill, log)
        centered = share - share.mean()
        squares = (centered**2).sum()
        change = centered @ responses / squares if squares > _TOLD else 0.0
        start = responses.mean() - change * share.mean()
        return start, start + change

    scale = np.ptp(responses)

    def residuals(free):
        start, end = ends(np.exp(free[0]), free[1])
        return (_response(doses, start, end, np.exp(free[0]), free[1]) - responses) / scale

    box = ([np.log(_HILLS[0]), logs[0]], [np.log(_HILLS[-1]), logs[-1]])
    first = np.clip([np.log(hill), log], np.array(box[0]) + 1e-9, np.array(box[1]) - 1e-9)
    best = scipy.optimize.least_squares(residuals, first, bounds=box, xtol=1e-12, ftol=1e-12, gtol=1e-12, max_nfev=100)
    least = float((best.fun**2).sum() * scale**2)
    hill, log = (np.exp(best.x[0]), best.x[1]) if least <= grid[e, h] else (hill, log)
    return np.array([*ends(hill, log), hill, log]), min(least, float(grid[e, h]))


def _interval(places: np.ndarray, profile: np.ndarray, best: float, least: float, allowed: float) -> tuple[float, float]:
    """Where the profile of sums of squares crosses what is allowed, on both sides of the best place; infinite where it does not.

    Between places the square root is taken for linear, as it is near the least; the outermost crossing counts.
    """
    order = np.argsort(np.append(places, best), kind="stable")
    x, y = np.append(places, best)[order], np.append(np.maximum(profile, least), least)[order]
    inside = np.flatnonzero(y <= allowed)
    ends = []
    for first, step in ((inside[0], -1), (inside[-1], 1)):
        n = first + step
        if not 0 <= n < len(x):
            ends.append(step * np.inf)
            continue
        a, b = np.sqrt(y[first] - least), np.sqrt(y[n] - least)
        ends.append(x[first] + (x[n] - x[first]) * ((np.sqrt(allowed - least) - a) / (b - a) if b > a else 1.0))
    return ends[0], ends[1]


def _linear_errors(doses: np.ndarray, theta: np.ndarray, variance: float) -> np.ndarray:
    """Standard errors (4,) of the parameters, from the derivatives of the curve; infinite where wells do not tell them."""
    start, end, hill, log = theta
    share = _share(doses, hill, log)
    slope = (end - start) * share * (1 - share)
    with np.errstate(divide="ignore", invalid="ignore"):
        by_hill = np.where(doses == 0, 0.0, slope * (np.log(doses) - log * np.log(10)))
    jacobian = np.stack([1 - share, share, by_hill, -slope * hill * np.log(10)], axis=1)
    weight = np.linalg.norm(jacobian, axis=0)
    told = weight > 0
    errors = np.full(4, np.inf)
    errors[told] = np.sqrt(np.diag(np.linalg.pinv((jacobian[:, told] / weight[told]).T @ (jacobian[:, told] / weight[told]))))
    errors[told] *= np.sqrt(variance) / weight[told]
    return errors


def _members(code: np.ndarray, usable: np.ndarray, groups: int) -> list[np.ndarray]:
    order = np.argsort(code, kind="stable")
    parts = np.split(order, np.searchsorted(code[order], np.arange(1, groups)))
    return [p[usable[p]] for p in parts[:groups]]


def _median_correlation(unit: np.ndarray, part: np.ndarray) -> float:
    """Over the pairs of rows of different ``part``; NaN when there is none."""
    first, second = np.triu_indices(len(unit), 1)
    pairs = part[first] != part[second]
    return float(np.median((unit @ unit.T)[first[pairs], second[pairs]])) if pairs.any() else np.nan


def _null_correlations(unit, part, members: list[np.ndarray], size: int, draws: int, seed: int) -> np.ndarray:
    """Median correlation of ``size`` rows of different treatments, as often as ``draws``; fewer rows where treatments are fewer."""
    rng = np.random.default_rng([seed, size])
    size = min(size, len(members))
    found = np.empty(draws)
    for n in range(draws):
        chosen = rng.choice(len(members), size, replace=False)
        rows = np.array([members[c][rng.integers(len(members[c]))] for c in chosen])
        found[n] = _median_correlation(unit[rows], part[rows])
    return found
