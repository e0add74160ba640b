"""Random changes of training batches on their device; each sample's is a pure function of (seed, epoch, patch id)."""

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmed.config import Augment
from sparkmed.rejection import InputError

CONTROL_SPACING = 12
"""Voxels between the control points of the elastic deformation."""


def augment(
    image: Tensor, label: Tensor | None, patch_ids: Sequence[str], spec: Augment, seed: int, epoch: int, guided: int = 0
) -> tuple[Tensor, Tensor | None]:
    """A changed copy of ``image`` (B, C, I, J, K) float and ``label`` (B, 1, I, J, K) int64, on the same device.

    Quarter turns move voxels. Flip, rotation, zoom, shift and deformation are one resampling, linear for the image and nearest for
    the label; outside the patch both repeat its edge. Planes (K = 1) stay planes. Then contrast, brightness, gamma (which keeps
    each sample's mean and deviation), noise and channel dropout, on the image alone, and not on its
    last ``guided`` channels, which are those of a first model. No sample depends on the others in the batch.
    Raises :class:`InputError` as :func:`check` does.
    """
    check(spec, (image.shape[1] - guided, *image.shape[2:]))
    if not patch_ids:
        return image, label
    keys = [_key(seed, epoch, p) for p in patch_ids]
    draws = _uniform(16, keys, 0)  # one column per decision
    if spec.rot90:
        turns = (4 * _uniform(3, keys, 3)).long().tolist()
        image = _turned(image, turns, spec)
        label = label if label is None else _turned(label, turns, spec)
    if spec.flip or spec.rotate or spec.scale or spec.translate or spec.elastic:
        grid = _grid(image.shape[2:], draws, keys, spec, image.device)
        image = F.grid_sample(image, grid, "bilinear", "border", align_corners=False)
        if label is not None:
            label = F.grid_sample(label.float(), grid, "nearest", "border", align_corners=False).round().to(label.dtype)
    if guided:
        values, said = image.split([image.shape[1] - guided, guided], 1)
        return torch.cat([_intensity(values, draws, keys, spec), said], 1), label
    return _intensity(image, draws, keys, spec), label


def check(spec: Augment, shape: Sequence[int]) -> None:
    """Raises :class:`InputError` when ``spec`` is not for samples of ``shape`` (C, I, J, K)."""
    for axis in spec.rot90:
        edges = [n for a, n in enumerate(shape[1:]) if a != axis]
        if edges[0] != edges[1]:
            raise InputError(f"augment.rot90 about axis {axis} wants equal edges there, got patches of {list(shape[1:])} voxels")
    if spec.channel_dropout and shape[0] == 1:
        raise InputError("augment.channel_dropout wants two channels or more, got images of one")


def _key(seed: int, epoch: int, patch_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{patch_id}".encode()).digest()[:8], "big") >> 1


def _uniform(n: int, keys: Sequence[int], stream: int) -> Tensor:
    """(B, n) of [0, 1), apart from what other streams of the same keys give."""
    return torch.stack([torch.rand(n, generator=torch.Generator().manual_seed(k ^ stream)) for k in keys])


def _turned(batch: Tensor, turns: list[list[int]], spec: Augment) -> Tensor:
    """(B, C, I, J, K) with each sample turned by as many quarters about each axis as ``turns`` (B, 3) says."""
    for axis in range(3):
        if axis in spec.rot90:
            plane = [1 + a for a in range(3) if a != axis]
            batch = torch.stack([x.rot90(quarters[axis], plane) for x, quarters in zip(batch, turns, strict=True)])
    return batch


def _between(draw: Tensor, largest: float) -> Tensor:
    """Uniform numbers of [0, 1) to [-largest, largest)."""
    return (2 * draw - 1) * largest


def _grid(shape: Sequence[int], draws: Tensor, keys: Sequence[int], spec: Augment, device) -> Tensor:
    """Where each voxel is read, (B, I, J, K, 3), as ``grid_sample`` wants it: K, J, I from -1 to 1 between outer edges.

    All is worked out at few control points and stretched over the patch: linear interpolation keeps what is linear.
    """
    plane = shape[2] == 1
    points = [min(n, 2) if n == 1 or not spec.elastic else max(3, round(n / CONTROL_SPACING) + 2) for n in shape]
    axes = [torch.linspace(-(n - 1) / 2, (n - 1) / 2, m) for n, m in zip(shape, points, strict=True)]
    centred = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # (3, *points) voxels from the middle of the patch
    matrix, shift = _affine(draws, spec, plane)
    source = (matrix @ centred.reshape(3, -1) + shift[:, :, None]).reshape(len(draws), 3, *points)
    if spec.elastic:
        moved = torch.stack([torch.rand(3, *points, generator=torch.Generator().manual_seed(k ^ 1)) for k in keys])
        moved = _between(moved, spec.elastic)
        if plane:
            moved[:, 2] = 0
        source += moved
    source *= 2 / torch.tensor(shape)[:, None, None, None]  # from the middle: 2 v / n is (2 (v + (n - 1) / 2) + 1) / n - 1
    return _stretched(source.flip(1).to(device), shape).movedim(1, -1)


def _stretched(points: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, 3, *points) to (B, 3, I, J, K), linear between points, the outer ones on the outer voxels."""
    for axis in (4, 3, 2):  # the smaller arrays first; by turns it is several times faster than trilinear
        n, m = shape[axis - 2], points.shape[axis]
        if n != m:
            at = torch.arange(n, device=points.device) * ((m - 1) / (n - 1))
            low = at.long().clamp(max=m - 2)
            weight = (at - low).reshape(-1, *[1] * (4 - axis))
            points = torch.lerp(points.index_select(axis, low), points.index_select(axis, low + 1), weight)
    return points


def _affine(draws: Tensor, spec: Augment, plane: bool) -> tuple[Tensor, Tensor]:
    """(B, 3, 3) and (B, 3): source voxel from the middle = matrix @ voxel from the middle + shift."""
    n = len(draws)
    angles = torch.deg2rad(_between(draws[:, 0:3], spec.rotate))
    zoom = 1 + _between(draws[:, 3], spec.scale)
    shift = _between(draws[:, 4:7], spec.translate)
    flip = torch.ones(n, 3)
    for axis in spec.flip:
        flip[:, axis] = torch.where(draws[:, 7 + axis] < 0.5, -1.0, 1.0)
    if plane:
        angles[:, :2] = 0
        shift[:, 2] = 0
    rotation = torch.eye(3).expand(n, 3, 3)
    for axis in range(3):
        a, b = [x for x in range(3) if x != axis]
        turn = torch.eye(3).repeat(n, 1, 1)
        cos, sin = angles[:, axis].cos(), angles[:, axis].sin()
        turn[:, a, a], turn[:, b, b], turn[:, a, b], turn[:, b, a] = cos, cos, -sin, sin
        rotation = rotation @ turn
    return rotation * flip[:, None, :] / zoom[:, None, None], shift


def _intensity(image: Tensor, draws: Tensor, keys: Sequence[int], spec: Augment) -> Tensor:
    draws = draws.to(image.device)[:, :, None, None, None, None]
    if spec.contrast:
        image = image * (1 + _between(draws[:, 10], spec.contrast))
    if spec.brightness:
        image = image + _between(draws[:, 11], spec.brightness)
    if spec.gamma:
        image = _gamma(image, torch.exp(_between(draws[:, 12], math.log1p(spec.gamma))))
    if spec.noise:
        deviation = draws[:, 13] * spec.noise
        generators = [torch.Generator(image.device).manual_seed(k ^ 2) for k in keys]
        noise = [torch.randn(image.shape[1:], generator=g, device=image.device) for g in generators]
        image = image + deviation * torch.stack(noise)
    if spec.channel_dropout:
        drawn = _uniform(image.shape[1], keys, 4)
        dropped = (drawn < spec.channel_dropout) & (drawn < drawn.amax(1, keepdim=True))  # the one drawn highest stays
        image = image.masked_fill(dropped.to(image.device)[:, :, None, None, None], 0)
    return image


def _gamma(image: Tensor, exponent: Tensor) -> Tensor:
    """Values to the power of ``exponent`` on [minimum, maximum] of each sample and channel, at the mean and deviation they had."""
    dims = (2, 3, 4)
    low, high = image.amin(dims, keepdim=True), image.amax(dims, keepdim=True)
    span = (high - low).clamp_min(1e-6)
    mean, deviation = _moments(image)
    bent = ((image - low) / span).pow(exponent)
    bent_mean, bent_deviation = _moments(bent)
    changed = (bent - bent_mean) * (deviation / bent_deviation.clamp_min(1e-6)) + mean
    return torch.where(deviation < 1e-6, image, changed)


def _moments(image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each sample and channel; several times faster than ``Tensor.std``."""
    mean = image.mean((2, 3, 4), keepdim=True)
    return mean, (image - mean).square().mean((2, 3, 4), keepdim=True).sqrt()
