"""Radon transform by Joseph's method: march along the axis nearer the ray, interpolate along the other.

The ray of view ``v`` and bin ``d`` is ``x cos(theta_v) + y sin(theta_v) = s_d``, with x to the right and y
upward from the image centre, and ``s_d = (d - (n_bins - 1) / 2) * spacing + offset``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Views at 45 degrees could march along either axis; the margin keeps every backend on the same choice although
# their cosines differ in the last bit.
TIE_MARGIN = 1e-9


class Detector(NamedTuple):
    r"""A row of bins, at :math:`s_d = (d - (D - 1)/2)\,\mathrm{spacing} + \mathrm{offset}`; lengths in one unit.

    Attributes:
        n_bins: Number of bins ``D``.
        spacing: Distance of neighbouring bins.
        offset: Position of the middle of the row; 0 is the axis of rotation.
        pixel_size: Edge of a pixel of the images; projections are in this unit times theirs.
    """

    n_bins: int
    spacing: float = 1.0
    offset: float = 0.0
    pixel_size: float = 1.0


def _view_samples(
    theta: float, height: int, width: int, detector: Detector, like: Tensor
) -> tuple[bool, Tensor, float]:
    """Return (march over rows?, positions along the other axis (n_steps, n_bins), step length), in pixels."""
    c, s = math.cos(theta), math.sin(theta)
    rows = abs(c) + TIE_MARGIN >= abs(s)
    options: dict[str, Any] = {"dtype": torch.float64, "device": like.device}
    n_bins, *lengths, pixel_size = detector
    spacing, offset = (length / pixel_size for length in lengths)
    bins = (torch.arange(n_bins, **options) - (n_bins - 1) / 2) * spacing + offset
    if rows:
        y = (height - 1) / 2 - torch.arange(height, **options)
        return rows, (bins - y[:, None] * s) / c + (width - 1) / 2, 1 / abs(c)
    x = torch.arange(width, **options) - (width - 1) / 2
    return rows, (height - 1) / 2 - (bins - x[:, None] * c) / s, 1 / abs(s)


def _taps(positions: Tensor, length: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the lower index into a line padded by one zero on each side, and both weights."""
    floor = positions.clamp(-2, length + 1).floor()
    inside = (floor >= -1) & (floor < length)
    fraction = torch.where(inside, positions - floor, 0).to(like.dtype)
    lower = (floor + 1).clamp(0, length).long()
    return lower, (1 - fraction) * inside, fraction * inside


def radon_forward(image: Tensor, angles: Tensor, detector: Detector) -> Tensor:
    """Project images (B, H, W) to sinograms (B, V, D)."""
    batch, height, width = image.shape
    sinogram = []
    for theta in angles.tolist():
        rows, positions, step = _view_samples(theta, height, width, detector, image)
        lines = image if rows else image.transpose(1, 2)
        padded = torch.nn.functional.pad(lines, (1, 1))
        lower, w0, w1 = _taps(positions, lines.shape[2], image)
        index = lower.expand(batch, -1, -1)
        samples = padded.gather(2, index) * w0 + padded.gather(2, index + 1) * w1
        sinogram.append(samples.sum(1) * (step * detector.pixel_size))
    return torch.stack(sinogram, 1) if sinogram else image.new_zeros(batch, 0, detector.n_bins)


def radon_adjoint(
    sinogram: Tensor, angles: Tensor, detector: Detector, image_shape: tuple[int, int]
) -> Tensor:
    """Back-project sinograms (B, V, D) to images (B, H, W): the exact transpose of `radon_forward`."""
    batch, (height, width) = len(sinogram), image_shape
    image = sinogram.new_zeros(batch, height, width)
    for v, theta in enumerate(angles.tolist()):
        rows, positions, step = _view_samples(theta, height, width, detector, sinogram)
        length = width if rows else height
        lower, w0, w1 = _taps(positions, length, sinogram)
        index = lower.expand(batch, -1, -1)
        values = (sinogram[:, v] * (step * detector.pixel_size))[:, None]
        padded = sinogram.new_zeros(batch, positions.shape[0], length + 2)
        padded = padded.scatter_add(2, index, values * w0).scatter_add(2, index + 1, values * w1)
        lines = padded[:, :, 1:-1]
        image = image + (lines if rows else lines.transpose(1, 2))
    return image


def _pixel_taps(
    theta: float, height: int, width: int, detector: Detector, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `_taps` of every pixel's centre in a row of the sinogram."""
    n_bins, spacing, offset, pixel_size = detector
    options: dict[str, Any] = {"dtype": torch.float64, "device": like.device}
    y = ((height - 1) / 2 - torch.arange(height, **options))[:, None] * pixel_size
    x = (torch.arange(width, **options) - (width - 1) / 2) * pixel_size
    position = (x * math.cos(theta) + y * math.sin(theta) - offset) / spacing + (n_bins - 1) / 2
    return _taps(position.flatten(), n_bins, like)


def radon_backproject(
    sinogram: Tensor, angles: Tensor, detector: Detector, image_shape: tuple[int, int]
) -> Tensor:
    """Sum, for every pixel, the rows of the sinogram interpolated linearly at the pixel's centre."""
    batch, (height, width) = len(sinogram), image_shape
    image = sinogram.new_zeros(batch, height * width)
    for v, theta in enumerate(angles.tolist()):
        lower, w0, w1 = _pixel_taps(theta, height, width, detector, sinogram)
        row = torch.nn.functional.pad(sinogram[:, v], (1, 1))
        image = image + row[:, lower] * w0 + row[:, lower + 1] * w1
    return image.reshape(batch, height, width)


def radon_backproject_transpose(image: Tensor, angles: Tensor, detector: Detector) -> Tensor:
    """Apply the transpose of `radon_backproject` to images (B, H, W)."""
    batch, height, width = image.shape
    pixels = image.flatten(1)
    sinogram = []
    for theta in angles.tolist():
        lower, w0, w1 = _pixel_taps(theta, height, width, detector, image)
        row = image.new_zeros(batch, detector.n_bins + 2)
        index = lower.expand(batch, -1)
        row = row.scatter_add(1, index, pixels * w0).scatter_add(1, index + 1, pixels * w1)
        sinogram.append(row[:, 1:-1])
    return torch.stack(sinogram, 1)


def radon_gradient(
    image: Tensor, sinogram: Tensor | None, angles: Tensor, detector: Detector, views: Tensor | None = None
) -> Tensor:
    """Return n_views / len(views) * A_B^T (A_B x - y_B); y = 0 without `sinogram`."""
    n_views = angles.shape[0]
    if views is not None:
        angles = angles[views]
        sinogram = None if sinogram is None else sinogram[:, views]
    residual = radon_forward(image, angles, detector)
    if sinogram is not None:
        residual = residual - sinogram
    return radon_adjoint(residual, angles, detector, (image.shape[1], image.shape[2])) * (
        n_views / len(angles)
    )
