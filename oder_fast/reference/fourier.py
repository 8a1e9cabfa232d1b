"""Coil-weighted Cartesian Fourier sampling, by lines or by points, its adjoint and its data-fidelity gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import fft


def _transform(image: Tensor, sampling: Tensor, axis: int, inverse: bool = False) -> Tensor:
    """Transform along `axis` where lines are sampled, along both axes where points are."""
    if image.numel() == 0:  # which MKL refuses
        return image
    axes = (axis,) if sampling.ndim == 2 else (-2, -1)
    return fft(torch.fft.ifftn if inverse else torch.fft.fftn, image, axes)


def _lines(sampling: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sampled lines as indices (B, C, L, P), and where a line is meant (-1 pads)."""
    batch, coils, _, columns = like.shape
    index = sampling[:, None, :, None].expand(batch, coils, -1, columns)
    return index.clamp(min=0), index >= 0


def fourier_forward(image: Tensor, coil_maps: Tensor, sampling: Tensor, axis: int = -2) -> Tensor:
    """Return samples (B, C, L, P) of the lines of images (B, H, W), or (B, C, H, W) of a mask's points."""
    maps = coil_maps.to(image.dtype)
    spectrum = _transform(maps * image[:, None], sampling, axis)
    if sampling.ndim == 3:
        return spectrum * sampling[:, None]
    spectrum = spectrum.movedim(axis, -2)
    index, meant = _lines(sampling, spectrum)
    return torch.where(meant, spectrum.take_along_dim(index, -2), 0)


def fourier_adjoint(samples: Tensor, coil_maps: Tensor, sampling: Tensor, axis: int = -2) -> Tensor:
    """Return images (B, H, W) of samples as `fourier_forward` gives them: the exact transpose."""
    maps = coil_maps.to(samples.dtype)
    if sampling.ndim == 3:
        spectrum = samples * sampling[:, None]
    else:
        index, meant = _lines(sampling, samples)
        empty = samples.new_zeros(*samples.shape[:2], maps.shape[axis], samples.shape[-1])
        spectrum = empty.scatter_add(-2, index, torch.where(meant, samples, 0)).movedim(-2, axis)
    return (maps.conj() * _transform(spectrum, sampling, axis, inverse=True)).sum(1)


def fourier_gradient(
    image: Tensor,
    samples: Tensor | None,
    coil_maps: Tensor,
    sampling: Tensor,
    coils: Tensor | None = None,
    axis: int = -2,
) -> Tensor:
    """Return (C / |B|) A_B^H (A_B x - y_B) of images (B, H, W), over all coils or some."""
    maps = coil_maps if coils is None else coil_maps[:, coils]
    residual = fourier_forward(image, maps, sampling, axis)
    if samples is not None:
        residual = residual - (samples if coils is None else samples[:, coils])
    return fourier_adjoint(residual, maps, sampling, axis) * (coil_maps.shape[1] / maps.shape[1])
