"""A synthetic screen whose truth is known: what compounds do, at which dose, and what plates and batches add to it."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

MOAS, COMPOUNDS, REPLICATES = 12, 4, 3
SHAPE = (8, 12)
DOSES = 10.0 ** np.arange(-1.5, 1.5, 0.5)
"""Micromolar; six, so that twelve compounds, sixteen negative and eight positive controls fill a plate of 96."""
NEGATIVES, POSITIVES = 16, 8
WIDTH = 40
REPORTER = {"positive": (100.0, 6.0), "negative": (0.0, 4.0)}
"""Mean and standard deviation of the column ``score`` in the controls of each plate, which their wells have exactly."""
Z_PRIME = 1 - 3 * (6.0 + 4.0) / 100.0
ROWS, COLUMNS = np.linspace(-1, 1, SHAPE[0]), np.cos(np.arange(SHAPE[1]))
"""Shapes of the effects of a well's row and column."""


@dataclass(frozen=True)
class Screen:
    wells: pd.DataFrame
    """A row per well: batch, plate, well, row, column, control, compound, concentration (um), moa, cells, score, and features."""
    features: list[str]
    ec50: dict[str, float]
    """By compound, of ``score`` as of all features, um."""


def screen(
    seed: int = 0,
    signal: float = 3.0,
    reporter: float = 100.0,
    plate_effect: float = 3.0,
    batch_effect: float = 6.0,
    place_effect: float = 0.0,
    leak: float = 0.0,
) -> Screen:
    """Twelve mechanisms of four compounds at six doses, three plates per batch.

    Features have noise of standard deviation 1; at full response those of a mechanism move by ``signal`` along one direction, and a
    quarter of that along the compound's own. All wells of a batch, and of a plate, are shifted by vectors of standard deviation
    ``batch_effect`` and ``plate_effect`` per feature. ``score`` rises to ``reporter`` with the dose, with noise of 4, and by
    ``place_effect`` times the shapes :data:`ROWS` and :data:`COLUMNS`.

    Without ``leak`` each of four batches holds one compound of every mechanism. With it the batch carries the mechanism: each of 24
    batches holds two compounds of one, and its treated wells, though not its controls, are shifted by a vector of that standard
    deviation. Normalising by controls cannot take it away.
    """
    rng = np.random.default_rng(seed)
    direction = rng.normal(0, 1, (MOAS, WIDTH))
    own = rng.normal(0, 0.25, (MOAS, COMPOUNDS, WIDTH))
    ec50 = 10.0 ** rng.uniform(-0.9, 0.1, (MOAS, COMPOUNDS))
    batches: dict[int, list[tuple[int, int]]] = {}
    for m in range(MOAS):
        for c in range(COMPOUNDS):
            batches.setdefault(2 * m + c // 2 if leak else c, []).append((m, c))
    parts = []
    for batch, compounds in sorted(batches.items()):
        of_batch, leaked = rng.normal(0, batch_effect, WIDTH), rng.normal(0, leak, WIDTH)
        for replicate in range(REPLICATES):
            of_plate = of_batch + rng.normal(0, plate_effect, WIDTH)
            treated = [(m, c, d) for m, c in compounds for d in DOSES]
            count = NEGATIVES + POSITIVES + len(treated)
            places = rng.permutation(SHAPE[0] * SHAPE[1])[:count]
            rows, columns = places // SHAPE[1], places % SHAPE[1]
            values = of_plate + rng.normal(0, 1, (count, WIDTH))
            score = np.concatenate([_exact(rng, NEGATIVES, "negative"), _exact(rng, POSITIVES, "positive"), np.zeros(len(treated))])
            cells = rng.poisson(200, count)
            for n, (m, c, dose) in enumerate(treated, NEGATIVES + POSITIVES):
                response = 1 / (1 + (ec50[m, c] / dose) ** 1.5)
                values[n] += signal * response * (direction[m] + own[m, c]) + leaked
                score[n] = reporter * response + rng.normal(0, 4)
                cells[n] = rng.poisson(200 * (1 - 0.3 * response * (m % 3 == 0)))
            values[NEGATIVES : NEGATIVES + POSITIVES] += 5.0
            score += place_effect * (ROWS[rows] + COLUMNS[columns])
            names = [f"m{m:02d}c{c}" for m, c, _ in treated]
            part = pd.DataFrame(
                {
                    "batch": f"b{batch:02d}",
                    "plate": f"b{batch:02d}p{replicate}",
                    "well": [f"{chr(65 + r)}{c + 1:02d}" for r, c in zip(rows, columns, strict=True)],
                    "row": rows + 1,
                    "column": columns + 1,
                    "control": ["negative"] * NEGATIVES + ["positive"] * POSITIVES + [None] * len(treated),
                    "compound": ["dmso"] * NEGATIVES + ["reference"] * POSITIVES + names,
                    "concentration": [0.0] * NEGATIVES + [1.0] * POSITIVES + [d for *_, d in treated],
                    "moa": [None] * (NEGATIVES + POSITIVES) + [f"m{m:02d}" for m, *_ in treated],
                    "cells": cells,
                    "score": score,
                }
            )
            parts.append(pd.concat([part, pd.DataFrame(values, columns=[f"f{n:02d}" for n in range(WIDTH)])], axis=1))
    truth = {f"m{m:02d}c{c}": float(ec50[m, c]) for m in range(MOAS) for c in range(COMPOUNDS)}
    return Screen(pd.concat(parts, ignore_index=True), [f"f{n:02d}" for n in range(WIDTH)], truth)


def _exact(rng: np.random.Generator, count: int, kind: str) -> np.ndarray:
    """Normal numbers whose mean and standard deviation are those of :data:`REPORTER`, not nearly so."""
    values = rng.normal(0, 1, count)
    mean, spread = REPORTER[kind]
    return mean + spread * (values - values.mean()) / values.std(ddof=1)
