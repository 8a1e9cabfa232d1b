"""How near a reconstruction is to the truth."""

from __future__ import annotations

import torch
from torch import Tensor

from .._numpy import takes_numpy


def _check_real(name: str, *images: Tensor) -> None:
    if any(image.is_complex() for image in images):
        raise TypeError(f"{name}: the images must be real; give the magnitudes, image.abs(), of complex ones")


def _range(truth: Tensor, data_range: float | None) -> float:
    return float(truth.max() - truth.min()) if data_range is None else data_range


@takes_numpy
def snr(image: Tensor, truth: Tensor) -> float:
    """Return the signal-to-noise ratio in dB, ``20 log10(|truth| / |truth - image|)``, over all entries.

    Complex images are compared as they are, phases included.
    """
    wide = torch.complex128 if truth.is_complex() or image.is_complex() else torch.float64
    truth, image = truth.to(wide), image.to(wide)
    ratio = torch.linalg.vector_norm(truth) / torch.linalg.vector_norm(truth - image)
    return float(20 * torch.log10(ratio))


@takes_numpy
def psnr(image: Tensor, truth: Tensor, data_range: float | None = None) -> float:
    """Return the peak signal-to-noise ratio in dB of real images; `data_range` is that of the truth where None."""
    _check_real("psnr", image, truth)
    from skimage.metrics import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(truth.numpy(), image.numpy(), data_range=_range(truth, data_range)))


@takes_numpy
def ssim(image: Tensor, truth: Tensor, data_range: float | None = None) -> float:
    """Return the structural similarity of real images ``(H, W)``; `data_range` as in `psnr`.

    Of several slices ``(..., H, W)``, each with at least 7 rows and columns as one has, it is the mean, relative to the
    range of all.
    """
    _check_real("ssim", image, truth)
    from skimage.metrics import structural_similarity

    span = _range(truth, data_range)
    slices = (values.reshape(-1, *values.shape[-2:]).numpy() for values in (truth, image))
    values = [float(structural_similarity(*pair, data_range=span)) for pair in zip(*slices, strict=True)]
    return sum(values) / len(values)
