"""How near a reconstruction is to the truth."""

from __future__ import annotations

import torch
from torch import Tensor


def _range(truth: Tensor, data_range: float | None) -> float:
    return float(truth.max() - truth.min()) if data_range is None else data_range


def snr(image: Tensor, truth: Tensor) -> float:
    """Return the signal-to-noise ratio in dB, ``20 log10(|truth| / |truth - image|)``, over all entries."""
    ratio = torch.linalg.vector_norm(truth.double()) / torch.linalg.vector_norm((truth - image).double())
    return float(20 * torch.log10(ratio))


def psnr(image: Tensor, truth: Tensor, data_range: float | None = None) -> float:
    """Return the peak signal-to-noise ratio in dB; `data_range` is that of the truth where None."""
    from skimage.metrics import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(truth.numpy(), image.numpy(), data_range=_range(truth, data_range)))


def ssim(image: Tensor, truth: Tensor, data_range: float | None = None) -> float:
    """Return the structural similarity of images ``(H, W)``; `data_range` as in `psnr`."""
    from skimage.metrics import structural_similarity

    return float(structural_similarity(truth.numpy(), image.numpy(), data_range=_range(truth, data_range)))
