"""Noise of simulated measurements."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def add_gaussian_noise(y: Tensor, snr_db: float, generator: torch.Generator | None = None) -> Tensor:
    r"""Add white Gaussian noise at an exact signal-to-noise ratio.

    .. math:: \| n \| = \| y \| \, 10^{-\mathrm{SNR} / 20} \quad \text{for each entry of the batch}

    Args:
        y: Measurements, shape ``(B, ...)``, real or complex.
        snr_db: Signal-to-noise ratio in dB.
        generator: Source of the random numbers.

    Returns:
        Noisy measurements, like `y`.

    Raises:
        ValueError: For an infinite or undefined ratio.

    Example:
        >>> import torch
        >>> y = torch.ones(1, 4, 5)
        >>> noise = add_gaussian_noise(y, snr_db=20.0) - y
        >>> print(round((y.norm() / noise.norm()).item(), 3))
        10.0
    """
    if not math.isfinite(snr_db):
        raise ValueError(f"add_gaussian_noise: snr_db must be finite, got {snr_db}")
    device = y.device if generator is None else generator.device
    noise = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=device).to(y.device)
    dims = tuple(range(1, y.ndim))
    scale = torch.linalg.vector_norm(y, dim=dims, keepdim=True) * 10 ** (-snr_db / 20)
    noisy: Tensor = y + noise * (scale / torch.linalg.vector_norm(noise, dim=dims, keepdim=True))
    return noisy


def add_poisson_noise(sinogram: Tensor, photons: float, generator: torch.Generator | None = None) -> Tensor:
    r"""Replace line integrals by what a detector that counts photons measures of them.

    .. math:: N \sim \mathrm{Poisson}(N_0 e^{-y}), \qquad \tilde y = -\log(\max(N, 1/2) / N_0)

    A bin without a photon is counted as half a photon, which keeps the logarithm finite.

    Args:
        sinogram: Line integrals of the attenuation (no unit), shape ``(B, V, D)``.
        photons: Photons that leave the source towards each bin, :math:`N_0`.
        generator: Source of the random numbers.

    Returns:
        Noisy line integrals, like `sinogram`.

    Raises:
        ValueError: Unless `photons` is finite and above 0.
    """
    if not (math.isfinite(photons) and photons > 0):
        raise ValueError(f"add_poisson_noise: photons must be a finite number above 0, got {photons}")
    device = sinogram.device if generator is None else generator.device
    expected = photons * torch.exp(-sinogram.double())
    counts = torch.poisson(expected.to(device), generator=generator).to(sinogram.device)
    noisy: Tensor = -torch.log(counts.clamp_min(0.5) / photons)
    return noisy.to(sinogram.dtype)
