"""How near a reconstruction is to the truth."""

from __future__ import annotations

import math
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from .._extras import needs
from .._numpy import takes_numpy

WINDOW = 7
"""Side of the squares in which the structural similarity compares."""


def _check(name: str, image: Tensor, truth: Tensor) -> None:
    for argument, value in (("image", image), ("truth", truth)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {type(value).__name__}")
        if value.numel() == 0:
            raise ValueError(f"{name}: {argument} must not be empty, got the shape {tuple(value.shape)}")
    if image.shape != truth.shape:
        raise ValueError(
            f"{name}: image must have the shape of truth, {tuple(truth.shape)}, got {tuple(image.shape)}"
        )


def _arrays(name: str, image: Tensor, truth: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return both as arrays, wherever the tensors live and whether or not they have a graph."""
    _check(name, image, truth)
    if image.is_complex() or truth.is_complex():
        raise TypeError(f"{name}: the images must be real; give the magnitudes, image.abs(), of complex ones")
    # NumPy knows no bfloat16.
    image, truth = (v.float() if v.dtype == torch.bfloat16 else v for v in (image, truth))
    return image.detach().cpu().numpy(), truth.detach().cpu().numpy()


def _range(name: str, truth: Tensor, data_range: float | None) -> float:
    if data_range is None:
        return float((truth.max() - truth.min()).detach())
    try:
        span = float(data_range)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: data_range must be a number or None, got {data_range!r}") from None
    if not (math.isfinite(span) and span > 0):
        raise ValueError(f"{name}: data_range must be finite and above 0, got {data_range}")
    return span


@takes_numpy
def snr(image: Tensor, truth: Tensor) -> float:
    """Return the signal-to-noise ratio in dB, ``20 log10(|truth| / |truth - image|)``, over all entries.

    Complex images are compared as they are, phases included.
    """
    _check("snr", image, truth)
    wide = torch.complex128 if truth.is_complex() or image.is_complex() else torch.float64
    truth, image = truth.detach().to(wide), image.detach().to(wide)
    ratio = torch.linalg.vector_norm(truth) / torch.linalg.vector_norm(truth - image)
    return float(20 * torch.log10(ratio))


@takes_numpy
def psnr(image: Tensor, truth: Tensor, data_range: float | None = None) -> float:
    """Return the peak signal-to-noise ratio in dB of real images; `data_range` is that of the truth where None."""
    image, truth = (torch.from_numpy(values).double() for values in _arrays("psnr", image, truth))
    return float(10 * torch.log10(_range("psnr", truth, data_range) ** 2 / (truth - image).square().mean()))


@takes_numpy
def ssim(image: Tensor, truth: Tensor, data_range: float | None = None) -> float:
    """Return the structural similarity of real images ``(H, W)``; `data_range` as in `psnr`.

    Of several slices ``(..., H, W)``, each with at least 7 rows and columns as one has, it is the mean, relative to the
    range of all.
    """
    needs("ssim", "skimage")
    from skimage.metrics import structural_similarity

    measured, expected = _arrays("ssim", image, truth)
    if expected.ndim < 2 or min(expected.shape[-2:]) < WINDOW:
        raise ValueError(
            f"ssim: images must have at least {WINDOW} rows and {WINDOW} columns, got the shape {expected.shape}"
        )
    span = _range("ssim", truth, data_range)
    slices = (values.reshape(-1, *values.shape[-2:]) for values in (expected, measured))
    values = [float(structural_similarity(*pair, data_range=span)) for pair in zip(*slices, strict=True)]
    return sum(values) / len(values)
