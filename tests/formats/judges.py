"""What judges a volume of known voxels and grid: the difference to another, and dcm2niix."""

import dataclasses
import pathlib
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from nibabel import orientations

from . import dicoms


def canonical(array, affine):
    """(C, I, J, K) array and affine with their axes turned to the nearest of RAS+."""
    turn = orientations.io_orientation(affine)
    turned = orientations.apply_orientation(np.moveaxis(np.asarray(array, np.float64), 0, -1), turn)
    return np.moveaxis(turned, -1, 0), np.asarray(affine) @ orientations.inv_ornt_aff(turn, array.shape[1:])


def difference(wanted, got) -> str:
    """What differs first between two (array, affine), empty when nothing: 0.02 mm at the corners, 1e-5 of the range."""
    (a, m), (b, n) = canonical(*wanted), canonical(*got)
    if a.shape != b.shape:
        return f"shape {b.shape}, wanted {a.shape}"
    corners = np.array([[i, j, k, 1] for i in (0, a.shape[1]) for j in (0, a.shape[2]) for k in (0, a.shape[3])]).T
    off = np.abs((m - n) @ corners).max()
    if off > 0.02:
        return f"affine by {off:.3g} mm"
    wrong = np.abs(a - b) > 1e-5 * max(1.0, np.ptp(a))
    return f"{wrong.mean():.0%} of the voxels" if wrong.any() else ""


@dataclasses.dataclass
class Expected:
    """One volume: (C, I, J, K) real-world values, the affine, and facts that the header must show."""

    array: np.ndarray
    affine: np.ndarray
    facts: dict = dataclasses.field(default_factory=dict)


def folder_of(tmp_path, made) -> pathlib.Path:
    return dicoms.write(tmp_path / "in", made)


def matched(expected: list[Expected], got: list[tuple], names: list[str]) -> list[int]:
    """For each expected volume the number of the one that reproduces it; fails with what differs."""
    found = []
    for n, wanted in enumerate(expected):
        verdicts = [difference((wanted.array, wanted.affine), g) for g in got]
        assert verdicts.count("") == 1, f"volume {n + 1} of {len(expected)}: {dict(zip(names, verdicts, strict=True))}"
        found.append(verdicts.index(""))
    assert len(got) == len(expected) == len(set(found)), f"{len(got)} volumes, wanted {len(expected)}"
    return found


def by_dcm2niix(folder: pathlib.Path, out: pathlib.Path, *flags: str) -> dict[str, tuple]:
    """(array (C, I, J, K), affine) of each NIfTI that dcm2niix writes, by file name."""
    program = shutil.which("dcm2niix", path=str(pathlib.Path(sys.executable).parent)) or shutil.which("dcm2niix")
    if not program:
        pytest.skip("needs dcm2niix")
    out.mkdir()
    done = subprocess.run([program, "-z", "n", "-b", "n", "-f", "%s_%e", *flags, "-o", out, folder], capture_output=True, text=True)
    written = {}
    for path in sorted(out.glob("*.nii")):
        image = nib.load(path)
        array = image.get_fdata()
        array = array.reshape(*(array.shape + (1, 1, 1))[:3], -1)
        written[path.name] = np.moveaxis(array, -1, 0), image.affine
    assert written, done.stdout + done.stderr
    return written
