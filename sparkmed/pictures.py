"""Pictures of images, training and results: plain values in, bytes of a PNG out. No screen and no global state of matplotlib."""

import datetime
import io
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.dates import ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sparkmed.imaging import geometry
from sparkmed.imaging.volume import Volume

INK, SOFT, GRID = "#1d2733", "#5b6875", "#dfe4e9"
# Okabe and Ito (2008): told apart by colour-blind readers; the brighter row is for lines on grey images
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0568f", "#b8860b", "#3f9ad1", "#6b4fa0", "#7a5230")
ON_GREY = ("#45b0ff", "#ff9345", "#33dba5", "#ff9ad5", "#ffd84a", "#a5e0ff", "#bda4ff", "#d9a679")
DPI = 150


def colour(c: int, palette: Sequence[str] = COLOURS) -> str:
    """Of class ``c``; a segmentation's first foreground class is 1."""
    return palette[(c - 1) % len(palette)]


def lines(
    panels: Sequence[tuple[str, Mapping[str, Sequence[tuple[int, float]]]]], best: int | None = None, log: Sequence[str] = ()
) -> bytes:
    """Curves per epoch, one panel per (title, name -> points); ``best`` marks an epoch, ``log`` names panels on a log scale."""
    figure = Figure(figsize=(3.3 * len(panels), 2.7), layout="constrained")
    for axes, (title, curves) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        _plain(axes)
        for n, (name, points) in enumerate(curves.items()):
            x, y = zip(*points, strict=True)
            marker = "o" if len(points) < 40 else None
            axes.plot(x, y, color=COLOURS[n], lw=1.8, marker=marker, ms=3, label=name, ls=("-", "--", ":", "-.")[n % 4])
        if best is not None:
            axes.axvline(best, color=SOFT, lw=1, ls=":")
        if title in log:
            axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("epoch", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if len(curves) > 1:
            axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def strips(
    groups: Mapping[str, Sequence[float]],
    xlabel: str,
    intervals: Mapping[str, tuple[float, float, float]] | None = None,
    most: float | None = None,
) -> bytes:
    """One row per group: a dot per value, a box from the first to the third quartile with the median, and (mean, low, high).

    ``most`` is the end of the axis where values have one. Groups of very different size share a logarithmic axis.
    """
    figure = Figure(figsize=(9.2, 0.75 + 0.62 * len(groups)), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    axes.grid(axis="y", visible=False)
    everything = [v for values in groups.values() for v in values]
    for row, (name, values) in enumerate(groups.items()):
        values = np.asarray(values, float)
        shade = colour(row + 1)
        jitter = ((np.arange(len(values)) * 0.618034) % 1 - 0.5) * 0.42  # golden ratio: spread evenly, the same every time
        axes.scatter(values, row + jitter, s=20 if len(values) < 200 else 7, color=shade, alpha=0.55, lw=0, zorder=3)
        if len(values) > 2:
            q1, q2, q3 = np.quantile(values, [0.25, 0.5, 0.75])
            axes.barh(row, q3 - q1, left=q1, height=0.56, color=shade, alpha=0.14, lw=0, zorder=1)
            axes.plot([q2, q2], [row - 0.28, row + 0.28], color=shade, lw=2, zorder=2)
        if intervals and name in intervals:
            mean, low, high = intervals[name]
            axes.plot([low, high], [row + 0.37] * 2, color=INK, lw=1.4, zorder=4, solid_capstyle="butt")
            axes.plot([mean], [row + 0.37], marker="D", ms=4.5, color=INK, zorder=5)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=10, color=INK)
    axes.set_ylim(len(groups) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    medians = [float(np.median(v)) for v in groups.values() if len(v)]
    if most is not None:
        low = min(everything)
        axes.set_xlim(low - max(0.02, 0.06 * (most - low)), most + 0.01 * (most - low) + 0.002)
    elif min(everything) > 0 and max(medians) > 15 * min(medians):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel(xlabel, fontsize=9)
    return _png(figure)


def indices(figures: Mapping[str, tuple[float, bool]], limit: float) -> bytes:
    """A bar per figure: name -> (population stability index, whether it drifted), with the ``limit`` from which it matters."""
    figure = Figure(figsize=(9.2, 0.8 + 0.26 * len(figures)), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    axes.grid(axis="y", visible=False)
    values = [v for v, _ in figures.values()]
    axes.barh(range(len(figures)), values, height=0.62, color=[COLOURS[1] if d else "#9fb3c4" for _, d in figures.values()])
    axes.axvline(limit, color=INK, lw=1, ls=":")
    axes.set_yticks(range(len(figures)), list(figures), fontsize=8.5, color=INK)
    axes.set_ylim(len(figures) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.05 * max(*values, 1.2 * limit))
    axes.set_xlabel("population stability index", fontsize=9)
    return _png(figure)


def history(points: Sequence[tuple[datetime.datetime, float]], limit: float) -> bytes:
    """The largest population stability index over time, with the ``limit`` from which it matters."""
    figure = Figure(figsize=(9.2, 2.4), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    times, values = zip(*points, strict=True)
    axes.plot(times, values, color=COLOURS[0], lw=1.6, marker="o", ms=3)
    axes.axhline(limit, color=INK, lw=1, ls=":")
    axes.set_ylim(0, 1.1 * max(*values, limit))
    axes.set_ylabel("largest index", fontsize=9)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(axes.xaxis.get_major_locator()))
    return _png(figure)


def roc(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
    """Receiver operating characteristic: name -> (false positive rates, true positive rates)."""
    figure = Figure(figsize=(4.2, 3.9), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    axes.plot([0, 1], [0, 1], color=SOFT, lw=1, ls=":")
    for n, (name, (false, true)) in enumerate(curves.items()):
        axes.plot(false, true, color=COLOURS[n % len(COLOURS)], lw=2, label=name)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set_xlabel("false positive rate", fontsize=9)
    axes.set_ylabel("true positive rate", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return _png(figure)


def confusion(counts: np.ndarray, classes: Sequence[str]) -> bytes:
    """(classes, classes) counts, truth down, prediction across."""
    side = min(6.0, 1.9 + 0.75 * len(classes))
    figure = Figure(figsize=(side + 0.4, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15)
    for (t, p), n in np.ndenumerate(counts):
        axes.text(p, t, f"{int(n)}", ha="center", va="center", fontsize=12, color="white" if shares[t, p] > 0.6 else INK)
    axes.set_xticks(range(len(classes)), classes, rotation=0 if len(classes) < 5 else 45, fontsize=9)
    axes.set_yticks(range(len(classes)), classes, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", fontsize=9)
    axes.set_ylabel("true", fontsize=9)
    return _png(figure)


def overlay(
    image: Volume, predicted: Volume, truth: Volume | None, classes: Sequence[str], limits: tuple[float, float] | None = None
) -> bytes:
    """Three planes through the largest part of the organs: the first channel in grey, contours of prediction and truth.

    All volumes are on one grid. ``limits`` are the values shown as black and white; None: the 1st and 99.5th percentile. Axial
    and coronal planes have the patient's right on the left side, as radiologists hang them.
    """
    flat = image.spatial_shape[2] == 1
    if not flat:
        image, predicted, truth = (v and geometry.reorient(v, "LPS") for v in (image, predicted, truth))
    shown = image.array[0].astype(np.float32)
    maps = [(predicted.array[0], "-")] + ([(truth.array[0], (0, (2.2, 1.6)))] if truth is not None else [])
    organs = (truth if truth is not None and truth.array.any() else predicted).array[0] > 0
    low, high = limits or np.percentile(shown, [1, 99.5])
    planes = [("", 2)] if flat else [("axial", 2), ("coronal", 1), ("sagittal", 0)]
    figure = Figure(figsize=(3.1 * len(planes), 3.45), layout="constrained", facecolor="white")
    spacing, present = image.spacing, set()
    for axes, (name, axis) in zip(np.atleast_1d(figure.subplots(1, len(planes))), planes, strict=True):
        others = [a for a in range(3) if a != axis]
        sizes = organs.sum(axis=tuple(others))
        at = int(sizes.argmax()) if sizes.any() else organs.shape[axis] // 2
        width, height = (shown.shape[a] * spacing[a] for a in others)
        upward = axis != 2  # K is drawn upwards, to the head; J downwards, to the back
        extent = (0, width, 0, height) if upward else (0, width, height, 0)
        origin = "lower" if upward else "upper"
        axes.imshow(
            np.take(shown, at, axis).T, cmap="gray", vmin=low, vmax=high, extent=extent, origin=origin, interpolation="bilinear"
        )
        x, y = ((np.arange(shown.shape[a]) + 0.5) * spacing[a] for a in others)
        for labels, style in maps:
            plane = np.take(labels, at, axis).T
            for c in np.unique(plane[plane > 0]).tolist():
                present.add(c)
                if min(plane.shape) > 1:
                    line = "white" if style != "-" else colour(c, ON_GREY)
                    axes.contour(
                        x, y, plane == c, levels=[0.5], colors=[line], linewidths=[1.1 if style != "-" else 1.5], linestyles=[style]
                    )
        longest = max(width, height)
        axes.set_xlim(width / 2 - longest / 2, width / 2 + longest / 2)
        axes.set_ylim(*(height / 2 + s * longest / 2 for s in ((-1, 1) if upward else (1, -1))))
        axes.set_facecolor("black")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if not flat:
            axes.set_xlabel(f"{name}, slice {at + 1} of {shown.shape[axis]}", fontsize=9, color=SOFT)
            letters = {2: ("R", "A"), 1: ("R", "S"), 0: ("A", "S")}[axis]
            for letter, (u, v) in zip(letters, ((0.03, 0.5), (0.5, 0.965)), strict=True):
                axes.text(u, v, letter, transform=axes.transAxes, color="#cfd6dd", fontsize=8, ha="center", va="center")
    keys = [
        Line2D([], [], color=colour(c, ON_GREY), lw=2, label=classes[c] if c < len(classes) else str(c))
        for c in sorted(present)[:8]
    ]
    if truth is not None:
        keys.append(Line2D([], [], color="#8a949e", lw=1.4, ls=(0, (2.2, 1.6)), label="truth (white, dashed)"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=9, frameon=False, labelcolor=INK)
    return _png(figure, dpi=120)


def gallery(items: Sequence[tuple[Volume, str, bool]], columns: int = 4) -> bytes:
    """A grid of images, each under its caption, which is marked or not; of a volume its middle slice, of two channels or more than
    three the first."""
    rows = math.ceil(len(items) / columns)
    tallest = max(v.spatial_shape[1] * v.spacing[1] / (v.spatial_shape[0] * v.spacing[0]) for v, *_ in items)
    figure = Figure(figsize=(2.3 * columns, (2.15 * min(tallest, 1.6) + 0.45) * rows), layout="constrained")
    for n, axes in enumerate(figure.subplots(rows, columns, squeeze=False).ravel()):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if n >= len(items):
            continue
        image, caption, marked = items[n]
        if image.spatial_shape[2] > 1:
            image = geometry.reorient(image, "LPS")
        plane = image.array[:, :, :, image.spatial_shape[2] // 2]
        low, high = np.percentile(plane, [0.5, 99.5])
        shown = np.clip((plane - low) / max(high - low, 1e-6), 0, 1).transpose(2, 1, 0)
        spacing = image.spacing
        shown = shown if shown.shape[2] == 3 else shown[..., 0]
        axes.imshow(shown, cmap="gray", vmin=0, vmax=1, aspect=spacing[1] / spacing[0], interpolation="bilinear")
        axes.set_title(caption, fontsize=9, color="#b3261e" if marked else INK, fontweight="bold" if marked else "normal")
    return _png(figure, dpi=110)


def plates(values: Mapping[str, np.ndarray], rows: Sequence[str], label: str, columns: int = 3) -> bytes:
    """A heatmap (R, C) per plate on one scale; wells without a value stay white. ``rows`` are the letters of the rows."""
    deep, wide = next(iter(values.values())).shape
    across = min(columns, len(values))
    down = math.ceil(len(values) / across)
    figure = Figure(figsize=(3.1 * across + 0.7, (3.0 * deep / wide + 0.5) * down), layout="constrained")
    found = np.concatenate([v[np.isfinite(v)] for v in values.values()])
    low, high = (float(found.min()), float(found.max())) if len(found) else (0.0, 1.0)
    drawn = None
    for n, axes in enumerate(figure.subplots(down, across, squeeze=False).ravel()):
        axes.spines[:].set_visible(False)
        if n >= len(values):
            axes.set(xticks=[], yticks=[])
            continue
        name, array = list(values.items())[n]
        drawn = axes.imshow(array, cmap="viridis", vmin=low, vmax=high, aspect="equal")
        every = max(1, wide // 12)
        axes.set_xticks(range(0, wide, every), range(1, wide + 1, every))
        axes.set_yticks(range(0, deep, max(1, deep // 8)), rows[:: max(1, deep // 8)])
        axes.tick_params(labelsize=7, colors=SOFT, length=0)
        axes.set_title(name, loc="left", fontsize=9, color=INK)
    figure.colorbar(drawn, ax=figure.axes, shrink=0.8, label=label).ax.tick_params(labelsize=7)
    return _png(figure)


def doses(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], np.ndarray] | None, str]],
    ylabel: str,
    columns: int = 4,
) -> bytes:
    """Per compound its wells (doses, responses), the curve through them or None, and a caption; doses of 0 at the left end."""
    down = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(2.5 * min(columns, len(curves)), 2.3 * down), layout="constrained")
    grid = figure.subplots(down, min(columns, len(curves)), squeeze=False, sharey=True)
    for axes, (name, (dose, response, curve, caption)) in zip(grid.ravel(), curves.items(), strict=False):
        _plain(axes)
        positive = dose[dose > 0]
        least = positive.min() / 3 if len(positive) else 1.0
        axes.plot(np.where(dose > 0, dose, least), response, "o", ms=3, color=COLOURS[0], alpha=0.7)
        if curve is not None:
            x = np.geomspace(least, positive.max(), 200)
            axes.plot(x, curve(x), color=COLOURS[1], lw=1.6)
        axes.set_xscale("log")
        axes.set_title(f"{name}\n{caption}", loc="left", fontsize=8, color=INK)
        axes.set_xlabel("dose", fontsize=8)
    for axes in grid.ravel()[len(curves) :]:
        axes.set_visible(False)
    grid[0, 0].set_ylabel(ylabel, fontsize=8)
    return _png(figure)


def cloud(points: np.ndarray, groups: Sequence[str], xlabel: str, ylabel: str) -> bytes:
    """Points (N, 2) in the colour of their group."""
    figure = Figure(figsize=(5.4, 3.8), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    for n, name in enumerate(sorted(set(groups))):
        of = np.array([g == name for g in groups])
        axes.plot(*points[of].T, "o", ms=4, alpha=0.75, color=COLOURS[n % len(COLOURS)], label=name)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, labelcolor=INK)
    return _png(figure)


def _plain(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aab3bc")
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=SOFT, length=3)
    axes.xaxis.label.set_color(SOFT)
    axes.yaxis.label.set_color(SOFT)


def _png(figure: Figure, dpi: int = DPI) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
