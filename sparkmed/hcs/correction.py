"""What is done to the fields of a plate before anything else: their light is evened out, their values put on the controls' scale.

Both are of the whole plate, so they are estimated once, kept in a file of the lake, and named by the headers of the fields, whose
uid depends on them. The numbers of the file come out the same whoever estimates them, so its name is a digest of what they are of.
"""

import base64
import functools
import json
from dataclasses import dataclass

import numpy as np

from sparkmed import storage
from sparkmed.hcs import illumination
from sparkmed.hcs.illumination import Light
from sparkmed.hcs.plate_intensity import ControlScale

FACT = "correction"
"""Fact of a header: ``file``, a URL, and ``of``, the settings (:attr:`~sparkmed.config.Preprocess.of_plate`)."""


@dataclass(frozen=True, eq=False)
class Correction:
    """Of one plate, by channel; None: nothing is done to it."""

    lights: tuple[Light | None, ...]
    scales: tuple[ControlScale | None, ...]

    def apply(self, array: np.ndarray) -> np.ndarray:
        """(C, I, J, 1) float32; raises what :func:`illumination.correct` does."""
        corrected = illumination.correct(array, self.lights)
        for channel, scale in zip(corrected, self.scales, strict=True):
            if scale is not None:
                channel[...] = scale.apply(channel)
        return corrected

    def write(self, url: str):
        lights = [light and {**light.row(), "grid": base64.b64encode(light.grid.tobytes()).decode()} for light in self.lights]
        scales = [scale and [scale.offset, scale.unit] for scale in self.scales]
        storage.write_json(url, {"lights": lights, "scales": scales})


@functools.lru_cache(maxsize=4)
def read(url: str) -> Correction:
    """What :meth:`Correction.write` wrote; those of the last plates are held."""
    found = json.loads(storage.read_bytes(url))
    lights = [light and Light.from_row({**light, "grid": base64.b64decode(light["grid"])}) for light in found["lights"]]
    return Correction(tuple(lights), tuple(scale and ControlScale(*scale) for scale in found["scales"]))
