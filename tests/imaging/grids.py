"""Grids to draw from, and the world as an image: shared by the imaging tests."""

import numpy as np
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from sparkmed.imaging.volume import Volume

shapes = st.tuples(*[st.integers(1, 7)] * 3)
codes = st.sampled_from(
    [f"{a}{b}{c}" for x in ("RL", "LR") for y in ("AP", "PA") for z in ("SI", "IS") for a in x for b in y for c in z]
).flatmap(lambda s: st.permutations(s).map("".join))


@st.composite
def affines(draw, oblique=True, sheared=False):
    """Affines of any orientation and handedness, spacing 0.3 to 5 mm, origin within a metre."""
    spacing = draw(st.tuples(*[st.floats(0.3, 5)] * 3))
    if oblique:
        turn = Rotation.from_euler("xyz", draw(st.tuples(*[st.floats(-180, 180)] * 3)), degrees=True).as_matrix()
    else:
        turn = np.eye(3)[list(draw(st.permutations(range(3))))] * draw(st.tuples(*[st.sampled_from((-1, 1))] * 3))
    if draw(st.booleans()):
        turn = turn[:, ::-1]
    matrix = np.eye(4)
    matrix[:3, :3] = turn * spacing
    if sheared:
        matrix[:3, :3] = matrix[:3, :3] @ (np.eye(3) + 0.2 * np.triu(np.ones((3, 3)), 1))
    matrix[:3, 3] = draw(st.tuples(*[st.floats(-1000, 1000)] * 3))
    return matrix


def numbered(shape, affine, channels=1):
    """A volume whose voxels are all different."""
    return Volume(np.arange(channels * np.prod(shape), dtype=np.int32).reshape(channels, *shape), affine)


def world(affine, shape):
    """(3, I, J, K) RAS+ mm of every voxel centre."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    return np.einsum("wa,a...->w...", affine[:3, :3], index) + affine[:3, 3][:, None, None, None]


def ramp(affine, shape, slope=(0.5, -1.0, 0.25), offset=3.0, dtype=np.float32):
    """A volume whose value is a linear function of the place in the world."""
    values = np.einsum("w,w...->...", np.array(slope), world(affine, shape)) + offset
    return Volume(values[None].astype(dtype), affine)
