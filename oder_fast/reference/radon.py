"""Radon transform by Joseph's method: march along the axis nearer the ray, interpolate along the other.

The ray of view ``v`` and bin ``d`` is ``x cos(theta_v) + y sin(theta_v) = s_d``, with x to the right and y
upward from the image centre, and ``s_d = (d - (n_bins - 1) / 2) * bin_spacing + bin_offset``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Views at 45 degrees could march along either axis; the margin keeps every backend on the same choice although
# their cosines differ in the last bit.
TIE_MARGIN = 1e-9


def _view_samples(
    theta: float, height: int, width: int, n_bins: int, bin_spacing: float, bin_offset: float, like: Tensor
) -> tuple[bool, Tensor, float]:
    """Return (march over rows?, positions along the other axis (n_steps, n_bins), step length), in pixels."""
    c, s = math.cos(theta), math.sin(theta)
    rows = abs(c) + TIE_MARGIN >= abs(s)
    options: dict[str, Any] = {"dtype": torch.float64, "device": like.device}
    detector = (torch.arange(n_bins, **options) - (n_bins - 1) / 2) * bin_spacing + bin_offset
    if rows:
        y = (height - 1) / 2 - torch.arange(height, **options)
        return rows, (detector - y[:, None] * s) / c + (width - 1) / 2, 1 / abs(c)
    x = torch.arange(width, **options) - (width - 1) / 2
    return rows, (height - 1) / 2 - (detector - x[:, None] * c) / s, 1 / abs(s)


def _taps(positions: Tensor, length: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the lower index into a line padded by one zero on each side, and both weights."""
    floor = positions.clamp(-2, length + 1).floor()
    inside = (floor >= -1) & (floor < length)
    fraction = torch.where(inside, positions - floor, 0).to(like.dtype)
    lower = (floor + 1).clamp(0, length).long()
    return lower, (1 - fraction) * inside, fraction * inside


def radon_forward(
    image: Tensor,
    angles: Tensor,
    n_bins: int,
    bin_spacing: float = 1.0,
    bin_offset: float = 0.0,
    pixel_size: float = 1.0,
) -> Tensor:
    """Project images (B, H, W) to sinograms (B, V, D)."""
    batch, height, width = image.shape
    sinogram = []
    for theta in angles.tolist():
        rows, positions, step = _view_samples(
            theta, height, width, n_bins, bin_spacing / pixel_size, bin_offset / pixel_size, image
        )
        lines = image if rows else image.transpose(1, 2)
        padded = torch.nn.functional.pad(lines, (1, 1))
        lower, w0, w1 = _taps(positions, lines.shape[2], image)
        index = lower.expand(batch, -1, -1)
        samples = padded.gather(2, index) * w0 + padded.gather(2, index + 1) * w1
        sinogram.append(samples.sum(1) * (step * pixel_size))
    return torch.stack(sinogram, 1) if sinogram else image.new_zeros(batch, 0, n_bins)


def radon_adjoint(
    sinogram: Tensor,
    angles: Tensor,
    height: int,
    width: int,
    bin_spacing: float = 1.0,
    bin_offset: float = 0.0,
    pixel_size: float = 1.0,
) -> Tensor:
    """Back-project sinograms (B, V, D) to images (B, H, W): the exact transpose of `radon_forward`."""
    batch, _, n_bins = sinogram.shape
    image = sinogram.new_zeros(batch, height, width)
    for v, theta in enumerate(angles.tolist()):
        rows, positions, step = _view_samples(
            theta, height, width, n_bins, bin_spacing / pixel_size, bin_offset / pixel_size, sinogram
        )
        length = width if rows else height
        lower, w0, w1 = _taps(positions, length, sinogram)
        index = lower.expand(batch, -1, -1)
        values = (sinogram[:, v] * (step * pixel_size))[:, None]
        padded = sinogram.new_zeros(batch, positions.shape[0], length + 2)
        padded = padded.scatter_add(2, index, values * w0).scatter_add(2, index + 1, values * w1)
        lines = padded[:, :, 1:-1]
        image = image + (lines if rows else lines.transpose(1, 2))
    return image


def _pixel_taps(
    theta: float,
    height: int,
    width: int,
    n_bins: int,
    bin_spacing: float,
    bin_offset: float,
    pixel_size: float,
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `_taps` of every pixel's centre in a row of the sinogram."""
    options: dict[str, Any] = {"dtype": torch.float64, "device": like.device}
    y = ((height - 1) / 2 - torch.arange(height, **options))[:, None] * pixel_size
    x = (torch.arange(width, **options) - (width - 1) / 2) * pixel_size
    position = (x * math.cos(theta) + y * math.sin(theta) - bin_offset) / bin_spacing + (n_bins - 1) / 2
    return _taps(position.flatten(), n_bins, like)


def radon_backproject(
    sinogram: Tensor,
    angles: Tensor,
    height: int,
    width: int,
    bin_spacing: float = 1.0,
    bin_offset: float = 0.0,
    pixel_size: float = 1.0,
) -> Tensor:
    """Sum, for every pixel, the rows of the sinogram interpolated linearly at the pixel's centre."""
    batch, _, n_bins = sinogram.shape
    geometry = (height, width, n_bins, bin_spacing, bin_offset, pixel_size)
    image = sinogram.new_zeros(batch, height * width)
    for v, theta in enumerate(angles.tolist()):
        lower, w0, w1 = _pixel_taps(theta, *geometry, sinogram)
        row = torch.nn.functional.pad(sinogram[:, v], (1, 1))
        image = image + row[:, lower] * w0 + row[:, lower + 1] * w1
    return image.reshape(batch, height, width)


def radon_backproject_transpose(
    image: Tensor,
    angles: Tensor,
    n_bins: int,
    bin_spacing: float = 1.0,
    bin_offset: float = 0.0,
    pixel_size: float = 1.0,
) -> Tensor:
    """Apply the transpose of `radon_backproject` to images (B, H, W)."""
    batch, height, width = image.shape
    geometry = (height, width, n_bins, bin_spacing, bin_offset, pixel_size)
    pixels = image.flatten(1)
    sinogram = []
    for theta in angles.tolist():
        lower, w0, w1 = _pixel_taps(theta, *geometry, image)
        row = image.new_zeros(batch, n_bins + 2)
        index = lower.expand(batch, -1)
        row = row.scatter_add(1, index, pixels * w0).scatter_add(1, index + 1, pixels * w1)
        sinogram.append(row[:, 1:-1])
    return torch.stack(sinogram, 1)


def radon_gradient(
    image: Tensor,
    sinogram: Tensor | None,
    angles: Tensor,
    views: Tensor | None,
    n_bins: int,
    bin_spacing: float = 1.0,
    bin_offset: float = 0.0,
    pixel_size: float = 1.0,
) -> Tensor:
    """Return n_views / len(views) * A_B^T (A_B x - y_B); y = 0 without `sinogram`."""
    n_views = angles.shape[0]
    if views is not None:
        angles = angles[views]
        sinogram = None if sinogram is None else sinogram[:, views]
    geometry = (bin_spacing, bin_offset, pixel_size)
    residual = radon_forward(image, angles, n_bins, *geometry)
    if sinogram is not None:
        residual = residual - sinogram
    scale = n_views / angles.shape[0]
    return radon_adjoint(residual, angles, image.shape[1], image.shape[2], *geometry) * scale
