"""Volume: voxels and where they are."""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, eq=False)
class Volume:
    """An image in space.

    ``array`` is (C, I, J, K) real-world values (a 2-D image has K = 1; time and colours are channels; a label volume has
    C = 1 and an integer dtype). ``affine`` is (4, 4) float64 and maps the index of a voxel's centre to RAS+ millimetres.
    ``of_plate`` is :attr:`~sparkmed.config.Preprocess.of_plate` of what was done to the field of a plate, empty: nothing.
    """

    array: np.ndarray
    affine: np.ndarray
    series_uid: str = ""
    modality: str = ""
    sources: tuple[str, ...] = ()
    of_plate: str = ""

    def __post_init__(self):
        if self.array.ndim != 4:
            raise ValueError(f"Volume.array is (C, I, J, K); got shape {self.array.shape}")
        affine = np.asarray(self.affine, np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) == 0:
            raise ValueError(f"Volume.affine is an invertible finite (4, 4) matrix; got {affine.tolist()}")
        object.__setattr__(self, "affine", affine)

    @property
    def spatial_shape(self) -> tuple[int, int, int]:
        """(I, J, K) in voxels."""
        return self.array.shape[1:]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between voxel centres along I, J, K in mm."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    def with_array(self, array: np.ndarray, affine: np.ndarray | None = None) -> "Volume":
        """The same image with other voxels, and another grid if ``affine`` is given."""
        return replace(self, array=array, affine=self.affine if affine is None else affine)
