"""What a challenger has to show before it is the champion: gates over the rows of ``evaluations/``, each with its numbers."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparkmed import scoring
from sparkmed.config import Promote
from sparkmed.learning import metrics


@dataclass(frozen=True)
class Gate:
    """One gate. ``passed`` is None where nothing was wanted, or where there is too little to judge."""

    gate: str
    number: float | None
    wanted: float | None
    passed: bool | None
    says: str

    def row(self) -> dict:
        return dataclasses.asdict(self)


def judge(
    settings: Promote,
    ours: Sequence[dict],
    theirs: Sequence[dict] | None,
    champion: str | None,
    groups: Mapping[str, Mapping[str, str]],
    megavoxels: Mapping[str, float],
    seed: int,
) -> tuple[list[Gate], dict]:
    """Every gate, and the numbers behind them.

    ``ours`` and ``theirs`` are the rows of challenger and champion on one test split, ``theirs`` None without a champion.
    ``groups`` and ``megavoxels`` are by uid of the volume.
    """
    scores = scoring.subject_scores(ours)
    mean = statistics.fmean(scores.values())
    numbers = {"challenger_mean": mean, "subjects": len(scores), "minimum": settings.minimum}
    says = f"mean {mean:.4f} over {len(scores)} test subjects, wanted at least {settings.minimum:g}"
    gates = [Gate("metric", mean, settings.minimum, mean >= settings.minimum, says)]
    if theirs is not None:
        shared = {r["volume"] for r in ours if r.get("score")} & {r["volume"] for r in theirs if r.get("score")}
        pair = (scoring.subject_scores([r for r in rows if r["volume"] in shared]) for rows in (ours, theirs))
        gate, compared = _comparison(settings, *pair, champion, seed)
        gates.append(gate)
        numbers |= compared
    by_group = _group_means(ours, groups)
    numbers["groups"] = {name: {"subjects": n, "mean": value} for name, (n, value) in by_group.items() if n}
    gates += [_group(settings, name, n, value) for name, (n, value) in by_group.items()]
    gates.append(_calibration(settings, ours))
    gates += _speed(settings, ours, theirs, champion, megavoxels)
    numbers |= {g.gate: g.number for g in gates if g.gate in ("ece", "seconds", "slowdown") and g.number is not None}
    return gates, numbers | {"gates": [g.row() for g in gates]}


def _comparison(settings: Promote, ours: dict, theirs: dict, champion: str, seed: int) -> tuple[Gate, dict]:
    shared = sorted(set(ours) & set(theirs))
    if not shared:
        says = f"no test subject in common with version {champion}: they cannot be compared"
        return Gate("comparison", None, settings.margin, False, says), {}
    a, b = [ours[s] for s in shared], [theirs[s] for s in shared]
    difference, low, high = metrics.paired_bootstrap(a, b, settings.confidence, settings.resamples, seed)
    says = (
        f"difference to version {champion} is {difference:+.4f}, {settings.confidence:.0%} interval [{low:+.4f}, {high:+.4f}] "
        f"over {len(shared)} test subjects, wanted its lower end above {settings.margin:g}"
    )
    numbers = {"champion_mean": statistics.fmean(b), "difference": difference, "low": low, "high": high, "margin": settings.margin}
    return Gate("comparison", low, settings.margin, low > settings.margin, says), numbers


def _group_means(rows: Sequence[dict], groups: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[int, float]]:
    """By group of the test split, such as ``site=A``, its subjects with a score and their mean; 0 where there are none."""
    members: dict[str, list] = {f"{name}={value}": [] for of in groups.values() for name, value in of.items()}
    for r in rows:
        for name, value in groups.get(r["volume"], {}).items():
            members[f"{name}={value}"].append(r)
    scores = {name: scoring.subject_scores(of) for name, of in sorted(members.items())}
    return {name: (len(of), statistics.fmean(of.values()) if of else 0.0) for name, of in scores.items()}


def _group(settings: Promote, name: str, subjects: int, mean: float) -> Gate:
    wanted = settings.group_minimum
    if not subjects:
        return Gate(f"group {name}", None, wanted, None, f"no test subject of {name} has a score: it cannot be judged")
    says = f"mean {mean:.4f} over {subjects} test subjects of {name}"
    if wanted is None:
        return Gate(f"group {name}", mean, None, None, says)
    if subjects < settings.least_subjects:
        return Gate(f"group {name}", mean, wanted, None, f"{says}, too few to judge: wanted {settings.least_subjects}")
    return Gate(f"group {name}", mean, wanted, mean >= wanted, f"{says}, wanted at least {wanted:g}")


def _calibration(settings: Promote, rows: Sequence[dict]) -> Gate:
    by_subject: dict[str, list] = defaultdict(list)
    for r in rows:
        if r.get("reliability"):
            by_subject[r["subject"]].append(r["reliability"])
    error = metrics.calibration_error([[sum(x) for x in zip(*of, strict=True)] for of in by_subject.values()])
    wanted = settings.max_ece
    if error is None:
        return Gate("ece", None, wanted, None, "no calibration is known: it was not measured, or there is no foreground")
    says = f"expected calibration error {error:.4f} over {len(by_subject)} test subjects"
    if wanted is None:
        return Gate("ece", error, None, None, says)
    if len(by_subject) < settings.least_subjects:
        return Gate("ece", error, wanted, None, f"{says}, too few to judge: wanted {settings.least_subjects}")
    return Gate("ece", error, wanted, error <= wanted, f"{says}, wanted at most {wanted:g}")


def _speed(settings: Promote, ours, theirs, champion: str | None, megavoxels: Mapping[str, float]) -> list[Gate]:
    rates = [r["seconds"] / megavoxels[r["volume"]] for r in ours if r["volume"] in megavoxels]
    gates, most = [], settings.max_seconds
    if rates:
        rate = statistics.median(rates)
        says = f"{rate:.3g} seconds per million voxels" + ("" if most is None else f", wanted at most {most:g}")
        gates.append(Gate("seconds", rate, most, None if most is None else rate <= most, says))
    if theirs is None:
        return gates
    then = {(r["volume"], _kind(r["device"])): r["seconds"] for r in theirs}
    ratios = [r["seconds"] / then[k] for r in ours if then.get(k := (r["volume"], _kind(r["device"])))]
    most = settings.max_slowdown
    if not ratios:
        says = f"no volume was scored on the same kind of device as by version {champion}: too few to judge"
        return [*gates, Gate("slowdown", None, most, None, says)]
    ratio = statistics.median(ratios)
    says = f"{ratio:.3g} times the seconds of version {champion}" + ("" if most is None else f", wanted at most {most:g}")
    return [*gates, Gate("slowdown", ratio, most, None if most is None else ratio <= most, says)]


def _kind(device: str | None) -> str:
    return (device or "").partition(":")[0]
