"""Whether profiles that should be alike are each other's nearest: mechanisms of action, and replicates among controls.

Every answer stands beside that of the cell count alone: what a count of cells can tell needs no profile.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import scipy

from sparkmed.hcs.hits import fdr
from sparkmed.hcs.profiles import CONTROL, NEGATIVE, numbers
from sparkmed.rejection import InputError

_BLOCK = 256
"""Profiles whose similarities to all others are in memory at a time."""
_SHOWN = 3
_LEAK_P = 0.01


@dataclass(frozen=True)
class Accuracy:
    """Of how many profiles the nearest one, among those that the rule allows, has the same mechanism of action."""

    rule: Literal["NSC", "NSCB"]
    """Not the same compound (Ljosa 2013), and not the same compound or batch (Ando 2017)."""
    accuracy: float
    """Share of the profiles judged; NaN when none is."""
    chance: float
    """The share to expect of a neighbour drawn at random from those that are allowed."""
    judged: int
    excluded: int
    """Profiles without a right answer among those that are allowed: their mechanism has one compound, or one batch. They are
    neighbours to others all the same. Also those that are 0 throughout, which have no direction; they are no neighbours."""
    mechanisms: pd.DataFrame
    """A row per mechanism: ``moa``, ``compounds``, ``judged``, ``excluded``, ``accuracy`` (NaN when none was judged)."""
    right: np.ndarray
    """(N,) what each profile counts: 1, 0, a share where several neighbours are equally near, NaN when excluded."""
    reason: str | None = None
    """Why ``accuracy`` is NaN."""


@dataclass(frozen=True)
class Matching:
    """Nearest-neighbour matching by profile, and beside it by cell count alone."""

    nsc: Accuracy
    nscb: Accuracy
    cells_nsc: Accuracy
    cells_nscb: Accuracy
    leak: str | None
    """A sentence when the nearest neighbour is found by the batch rather than the mechanism; None when nothing speaks for it."""


def require_disjoint(groups: Iterable, trained: Iterable, kind: str = "compound"):
    """Raise :class:`InputError` when groups of a metric are among those that were trained on, naming some.

    >>> require_disjoint(["a", "b"], ["c"])
    """
    groups = {str(g) for g in groups if not pd.isna(g)}
    shared = sorted(groups & {str(g) for g in trained if not pd.isna(g)})
    if shared:
        more = f" and {len(shared) - _SHOWN} more" if len(shared) > _SHOWN else ""
        raise InputError(
            f"{len(shared)} of {len(groups)} values of {kind} that the metric is over were trained on: "
            f"{', '.join(shared[:_SHOWN])}{more}; judge on held-out ones only"
        )


def moa_matching(
    table: pd.DataFrame,
    features: Sequence[str],
    cells: str,
    moa: str = "moa",
    compound: str = "compound",
    batch: str = "batch",
    trained: Mapping[str, Collection] | None = None,
) -> Matching:
    """NSC and NSCB accuracy of treatment profiles (one row per compound, dose and, for NSCB, batch), by cosine similarity.

    Each profile gets the mechanism of its nearest neighbour that is not of its compound (Ljosa et al. 2013, J Biomol Screen
    18:1321) nor, for NSCB, of its batch (Ando et al. 2017, bioRxiv 161422). ``cells`` is the column of cell counts, by whose
    difference the baseline goes. Neighbours equally near share one vote, whatever the order of rows. Rows without a mechanism take
    no part. ``trained`` are the values, by column, that the model behind the features was trained on.

    Raises :class:`InputError` for features that are missing, and by :func:`require_disjoint`.
    """
    values = _complete(table, features, [moa, compound, batch, cells], trained)
    known = table[moa].notna().to_numpy()
    table, values = table[known], values[known]
    for column in (compound, batch):
        if table[column].isna().any():
            raise InputError(f"{int(table[column].isna().sum())} profiles have no {column}")
    codes = {c: table[c].factorize()[0] for c in (moa, compound, batch)}
    unit, directed = _unit(values)
    counts = numbers(table, [cells])
    counted = np.isfinite(counts[:, 0])
    found = [
        _accuracy(rule, table, codes, similarity, usable, moa, compound, apart, what)
        for what, similarity, usable in (
            ("profile", lambda rows: unit[rows] @ unit.T, directed),
            ("cell count", lambda rows: -np.abs(counts[rows] - counts[:, 0]), counted),
        )
        for rule, apart in (("NSC", [compound]), ("NSCB", [compound, batch]))
    ]
    return Matching(*found, _leak(found[0], found[1], batch, len(set(codes[batch]))))


def average_precision(
    table: pd.DataFrame,
    features: Sequence[str],
    same: Sequence[str],
    differ: Sequence[str] = (),
    against_same: Sequence[str] = (),
    against_differ: Sequence[str] = (),
    distance: Literal["cosine", "difference"] = "cosine",
    trained: Mapping[str, Collection] | None = None,
) -> pd.DataFrame:
    """The table without features, and of each profile ``average_precision``, ``positives`` and ``candidates``.

    A profile's positives agree with it in all columns ``same`` and in none of ``differ``; its negatives likewise by
    ``against_same`` and ``against_differ``. All are ranked by similarity to it, cosine or (of cell counts) by the absolute
    difference; the average precision is the mean over positives of the share of positives down to its rank. Profiles equally
    similar stand in any order with equal chance, of which the expectation is taken (McSherry & Najork 2008), so a profile that
    tells nothing apart gains nothing. NaN without positives or without negatives.

    As Kalinin et al. 2025, Nature Communications 16:5181 (copairs); to 1e-6 the same where no positive ties with a negative.
    Raises :class:`InputError` for features or columns that are missing in a row, and by :func:`require_disjoint`.
    """
    columns = {*same, *differ, *against_same, *against_differ}
    values = _complete(table, features, sorted(columns), trained)
    if not same or not against_differ:
        raise InputError("average precision wants columns that positives share and columns that negatives differ in")
    for c in columns:
        if table[c].isna().any():
            raise InputError(f"{int(table[c].isna().sum())} profiles have no {c}")
    codes = {c: table[c].factorize()[0].astype(np.int32) for c in columns}
    usable = np.ones(len(table), bool)
    if distance == "cosine":
        unit, usable = _unit(values)
        unit = unit.astype(np.float32)
    precision = np.full(len(table), np.nan)
    positives, candidates = np.zeros((2, len(table)), np.int64)
    order = np.lexsort([codes[c] for c in same])  # a block then has few positives, and its negatives in common
    for start in range(0, len(table), _BLOCK):
        rows = order[start : start + _BLOCK]
        is_positive = _pairs(codes, rows, same, differ) & usable
        is_negative = _pairs(codes, rows, against_same, against_differ) & usable
        is_positive[np.arange(len(rows)), rows] = is_negative[np.arange(len(rows)), rows] = False
        ranked = np.flatnonzero(is_positive.any(axis=1) & usable[rows])
        others = np.flatnonzero((is_positive | is_negative)[ranked].any(axis=0))
        if distance == "cosine":
            similar = unit[rows] @ unit[others].T
        else:
            similar = -np.abs(values[rows, :1] - values[others, 0])
        for n in ranked:
            row = rows[n]
            positive = similar[n, is_positive[n, others]]
            negative = similar[n, is_negative[n, others]]
            positives[row], candidates[row] = len(positive), len(positive) + len(negative)
            precision[row] = _precision(positive, negative)
    kept = table.drop(columns=list(features))
    return kept.assign(average_precision=precision, positives=positives, candidates=candidates)


def mean_average_precision(scores: pd.DataFrame, by: Sequence[str], null: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """One row per group of ``by``: ``map``, ``profiles``, ``p`` and ``q``, of what :func:`average_precision` gave.

    ``p`` is the share of ``null`` random rankings, with as many positives and candidates of each profile, whose mean is at least as
    high, counted with the group's own: (1 + k) / (1 + null). Profiles with the same numbers share a ranking, so that none are taken
    for independent. ``q`` is the false discovery rate over the groups. So does copairs 0.5, but for means equal to the group's own,
    which it leaves out: a perfect ranking that comes by chance, such as of one positive among three, then has too small a p-value.
    A group in which no profile has an average precision has NaN and 0 ``profiles``.
    """
    if null < 1:
        raise InputError(f"null {null}: wanted one random ranking or more")
    told = scores["average_precision"].notna().to_numpy()
    settings, code = np.unique(scores.loc[told, ["positives", "candidates"]].to_numpy(), axis=0, return_inverse=True)
    chance = np.array([random_precisions(int(k), int(n), null, seed) for k, n in settings]).reshape(len(settings), null)
    grouped = scores.groupby(list(by), sort=True, observed=True, dropna=False)
    index, group = grouped.size().index, grouped.ngroup().to_numpy()[told]
    precision = scores["average_precision"].to_numpy()[told]
    profiles = np.bincount(group, minlength=len(index))
    mean = np.bincount(group, precision, minlength=len(index)) / np.where(profiles, profiles, np.nan)
    p = np.full(len(index), np.nan)
    for g in np.flatnonzero(profiles):
        shares = np.bincount(code[group == g], minlength=len(settings)) / profiles[g]
        there = np.flatnonzero(shares)
        p[g] = (1 + (shares[there] @ chance[there] >= mean[g] - 1e-6).sum()) / (1 + null)
    found = index.to_frame(index=False)
    return found.assign(map=mean, profiles=profiles, p=p, q=fdr(p))


def consistency(
    table: pd.DataFrame,
    features: Sequence[str],
    cells: str,
    moa: str = "moa",
    apart: Sequence[str] = ("compound",),
    null: int = 10_000,
    seed: int = 0,
    trained: Mapping[str, Collection] | None = None,
) -> pd.DataFrame:
    """By mechanism, whether its other profiles rank before those of other mechanisms: :func:`mean_average_precision`, with
    ``map_cells``, ``p_cells`` and ``q_cells`` of the cell count alone. Profiles of one mechanism must differ in all of ``apart`` to
    count for each other; add the batch to see past it. Rows without a mechanism take no part."""
    known = table[table[moa].notna()]
    rule = {"same": [moa], "differ": list(apart), "against_differ": [moa]}
    return _beside_cells(known, features, cells, [moa], rule, null, seed, trained)


def activity(
    table: pd.DataFrame,
    features: Sequence[str],
    cells: str,
    treatment: Sequence[str] = ("compound",),
    control: str = CONTROL,
    reference: str = NEGATIVE,
    within: Sequence[str] = (),
    null: int = 10_000,
    seed: int = 0,
    trained: Mapping[str, Collection] | None = None,
) -> pd.DataFrame:
    """By treatment, whether its wells rank before the ``reference`` controls: :func:`mean_average_precision`, with ``map_cells``,
    ``p_cells`` and ``q_cells`` of the cell count alone. ``within``, such as the plate, are columns in which the controls must agree
    with the well. Controls of other kinds take no part."""
    numbers(table, [*features, cells], [*treatment, control, *within])
    kind = (table[control] == reference).to_numpy(bool, na_value=False)
    taken = table[kind | table[control].isna().to_numpy()]
    kind = (taken[control] == reference).to_numpy(bool, na_value=False)
    tested = taken.loc[~kind]
    for c in treatment:
        if tested[c].isna().any():
            raise InputError(f"{int(tested[c].isna().sum())} wells that are no controls have no {c}")
    treated = tested.groupby(list(treatment), sort=True, observed=True).ngroup()
    # a control is nobody's replicate, and the negative of every well that is no control
    marked = taken.assign(_treatment=-1 - np.arange(len(taken)), _kind=np.where(kind, 1, 0))
    marked.loc[~kind, "_treatment"] = treated.to_numpy()
    rule = {"same": ["_treatment"], "against_differ": ["_kind"], "against_same": list(within)}
    found = _beside_cells(marked, features, cells, ["_treatment"], rule, null, seed, trained, only=~kind)
    names = tested.groupby(list(treatment), sort=True, observed=True).size().index.to_frame(index=False)
    return pd.concat([names, found.drop(columns="_treatment")], axis=1)


def random_precisions(positives: int, candidates: int, count: int, seed: int = 0) -> np.ndarray:
    """Average precisions (count,) of random rankings; the same for the same numbers and seed, whatever else is asked for."""
    rng = np.random.default_rng([seed, positives, candidates])
    found = np.empty(count, np.float64)
    rank = np.arange(1, positives + 1)
    step = max(1, 4_000_000 // max(positives, candidates if 2 * positives > candidates else 1))
    for start in range(0, count, step):
        places = _subsets(rng, min(step, count - start), positives, candidates)
        found[start : start + step] = (rank / (places + 1)).mean(axis=1)
    return found


def _subsets(rng: np.random.Generator, rows: int, size: int, total: int) -> np.ndarray:
    """Rising subsets (rows, size) of range(total), all equally likely.

    Drawn with repetition; what repeats is drawn again until nothing does. Values are treated alike, so subsets are.
    """
    if 2 * size > total:
        taken = np.ones((rows, total), bool)
        np.put_along_axis(taken, _subsets(rng, rows, total - size, total), False, axis=1)
        return np.nonzero(taken)[1].reshape(rows, size)
    places = np.sort(rng.integers(0, total, (rows, size)), axis=1)
    open_rows = np.arange(rows)
    while len(open_rows) and size > 1:
        part = places[open_rows]
        again = part[:, 1:] == part[:, :-1]
        touched = again.any(axis=1)
        open_rows, part, again = open_rows[touched], part[touched], again[touched]
        part[:, 1:][again] = rng.integers(0, total, int(again.sum()))
        places[open_rows] = np.sort(part, axis=1)
    return places


def _accuracy(rule, table, codes, similarity, usable, moa, compound, apart, what) -> Accuracy:
    count = len(table)
    right = np.full(count, np.nan)
    chance = np.full(count, np.nan)
    for start in range(0, count, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, count))
        allowed = _pairs(codes, rows, (), apart) & usable
        same = _pairs(codes, rows, [moa], ())
        answers = (allowed & same).sum(axis=1)
        near = np.where(allowed, similarity(rows).astype(np.float32), -np.inf)
        nearest = allowed & (near == near.max(axis=1, initial=-np.inf, keepdims=True))
        judged = (answers > 0) & usable[rows]
        with np.errstate(invalid="ignore", divide="ignore"):
            right[rows] = np.where(judged, (nearest & same).sum(axis=1) / nearest.sum(axis=1), np.nan)
            chance[rows] = np.where(judged, answers / allowed.sum(axis=1), np.nan)
    told = ~np.isnan(right)
    frame = pd.DataFrame({"moa": table[moa].to_numpy(), "compound": table[compound].to_numpy(), "right": right})
    grouped = frame.groupby("moa", sort=True)
    mechanisms = pd.DataFrame(
        {
            "compounds": grouped["compound"].nunique(),
            "judged": grouped["right"].count(),
            "excluded": grouped.size() - grouped["right"].count(),
            "accuracy": grouped["right"].mean(),
        }
    ).reset_index()
    reason = None
    if not told.any():
        reason = f"there is no {what}" if not usable.any() else "no mechanism has profiles that the rule allows to match"
    means = [float(v[told].mean()) if told.any() else np.nan for v in (right, chance)]
    return Accuracy(rule, *means, int(told.sum()), int((~told).sum()), mechanisms, right, reason)


def _leak(nsc: Accuracy, nscb: Accuracy, batch: str, batches: int) -> str | None:
    """Of the profiles judged by both rules, those right only with the batch at hand against those right only without it.

    A sign test (Dixon & Mood 1946) at 0.01, and more than half of what NSC has above chance must be gone: some loss is to be
    expected of fewer neighbours.
    """
    if batches < 2 or not nsc.judged:
        return None
    if not nscb.judged:
        return f"each mechanism lies in one {batch}, so nobody can tell whether neighbours share more than that"
    both = ~np.isnan(nsc.right) & ~np.isnan(nscb.right)
    near, across = nsc.right[both], nscb.right[both]
    lost, won = int((near > across).sum()), int((near < across).sum())
    if not lost or scipy.stats.binomtest(lost, lost + won, 0.5, "greater").pvalue > _LEAK_P:
        return None
    if across.mean() - nscb.chance > (near.mean() - nsc.chance) / 2:
        return None
    return (
        f"the {batch} gives the mechanism away: of {int(both.sum())} profiles {near.mean():.2f} match their nearest neighbour, "
        f"but {across.mean():.2f} that of another {batch} (chance {nscb.chance:.2f})"
    )


def _beside_cells(table, features, cells, by, rule, null, seed, trained, only=None) -> pd.DataFrame:
    counted = np.isfinite(numbers(table, [cells])[:, 0])
    only = np.ones(len(table), bool) if only is None else only
    scores = average_precision(table, features, **rule, trained=trained)[only]
    found = mean_average_precision(scores, by, null, seed)
    slim = table.drop(columns=list(features))
    beside = average_precision(slim[counted], [cells], **rule, distance="difference")[only[counted]]
    beside = mean_average_precision(beside, by, null, seed)
    return found.merge(beside.drop(columns="profiles"), on=list(by), how="left", suffixes=("", "_cells"))


def _complete(table: pd.DataFrame, features: Sequence[str], others: Sequence[str], trained) -> np.ndarray:
    values = numbers(table, features, others)
    missing = np.isnan(values)
    if missing.any():
        names = [str(f) for f, m in zip(features, missing.any(axis=0), strict=True) if m]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        gaps = int(missing.any(axis=1).sum())
        raise InputError(f"features {', '.join(names[:_SHOWN])}{more} are missing in {gaps} profiles: leave out these or those")
    for column, seen in (trained or {}).items():
        if column not in table.columns:
            raise InputError(f"the table has no column {column!r} to compare with what was trained on")
        require_disjoint(table[column].unique(), seen, column)
    return values


def _unit(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Profiles of length one, and which have a direction at all."""
    norm = np.linalg.norm(values, axis=1)
    directed = norm > 0
    return values / np.where(directed, norm, 1)[:, None], directed


def _pairs(codes: Mapping[str, np.ndarray], rows: np.ndarray, same: Sequence[str], differ: Sequence[str]) -> np.ndarray:
    """(R, N) whether a row and another profile agree in all of ``same`` and in none of ``differ``."""
    count = len(next(iter(codes.values())))
    found = np.ones((len(rows), count), bool)
    for c in same:
        found &= codes[c][rows, None] == codes[c]
    for c in differ:
        found &= codes[c][rows, None] != codes[c]
    return found


def _precision(positive: np.ndarray, negative: np.ndarray) -> float:
    """Average precision of similarities, in expectation over the order of those that are equal; NaN without either kind."""
    if not len(positive) or not len(negative):
        return np.nan
    negative = np.sort(negative)
    value, ours = np.unique(positive, return_counts=True)
    value, ours = value[::-1], ours[::-1]
    above = len(negative) - np.searchsorted(negative, value, "right")
    equal = ours + len(negative) - np.searchsorted(negative, value, "left") - above
    before = np.cumsum(ours) - ours
    place = np.arange(equal.sum()) - np.repeat(np.cumsum(equal) - equal, equal)
    # the chance of one of the equal ones to be positive, and of another one given that
    share, next_share = ours / equal, (ours - 1) / np.maximum(equal - 1, 1)
    hits = np.repeat(before, equal) + 1 + place * np.repeat(next_share, equal)
    return float((np.repeat(share, equal) * hits / (np.repeat(before + above, equal) + place + 1)).sum() / len(positive))
