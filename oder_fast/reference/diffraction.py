"""Intensity diffraction tomography in the first Born approximation, its adjoint and its data-fidelity gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch import fft


def signed(k: Tensor, n: int) -> Tensor:
    """Return the frequency numbers of indices of a transform of length n, below 0 from half the length on."""
    k = k % n
    return torch.where(2 * k < n, k, k - n)


def signed_frequencies(n: int, device: torch.device | None = None) -> Tensor:
    """Return the frequency number of each index, int64: 0, 1, ..., -2, -1."""
    return signed(torch.arange(n, device=device), n)


def pupils(support: Tensor, width: int) -> Tensor:
    """Return which frequencies pass with each illumination, bool (L, H, W), from the intervals of each row.

    Half the sampling rate is its own negative: it is in no pupil.
    """
    k, i = signed_frequencies(width, support.device), signed_frequencies(support.shape[1], support.device)
    inner = (2 * k != -width) & (2 * i[:, None] != -support.shape[1])
    return (k >= support[..., :1]) & (k < support[..., 1:]) & inner


def _axial(squared: Tensor, optics: Sequence[float]) -> Tensor:
    """Return the axial wavenumber, radians per unit of length, of squared transverse frequencies."""
    _, cutoff, scale, *_ = optics
    return 2 * math.pi * scale * (cutoff**2 - squared).clamp(min=0).sqrt()


def waves(
    illuminations: Tensor,
    depths: Tensor,
    optics: Sequence[float],
    rows: Tensor,
    columns: Tensor,
    shape: tuple[int, int],
) -> Tensor:
    """Return the transfer functions (L, Z, ...), complex128, as if the pupils had no end.

    Args:
        illuminations: Their frequencies (L, 2).
        depths: Of the slices (Z,).
        optics: Numbers as in `oder_fast.ops.Optics`.
        rows: Row frequency numbers.
        columns: Column frequency numbers; the two are broadcast.
        shape: Rows and columns of the images.
    """
    pixel_size, _, _, amplitude, first, spacing = optics
    if spacing != 0:
        depths = first + spacing * torch.arange(len(depths), dtype=torch.float64, device=depths.device)
    f = illuminations.to(torch.float64).reshape(-1, 2, *[1] * max(rows.ndim, columns.ndim))
    row = rows.to(torch.float64) / (shape[0] * pixel_size) + f[:, 0]
    column = columns.to(torch.float64) / (shape[1] * pixel_size) + f[:, 1]
    axial = _axial(row**2 + column**2, optics)
    incident = _axial((f**2).sum(1), optics)
    phase = (incident - axial)[:, None] * depths.to(torch.float64).reshape(-1, *[1] * (axial.ndim - 1))
    return torch.polar((amplitude / axial)[:, None].expand(phase.shape), phase + math.pi / 2)


def transfer_functions(
    transfer: Tensor, depths: Tensor, support: Tensor, optics: Sequence[float], width: int
) -> Tensor:
    """Return the transfer functions (L, Z, H, W), complex128, zero outside the pupils.

    Args:
        transfer: Frequencies of the illuminations (L, 2), or the transfer functions themselves.
        depths: Of the slices (Z,).
        support: Intervals of the pupils, int32 (L, H, 2).
        optics: Numbers as in `oder_fast.ops.Optics`.
        width: Columns of the images.
    """
    inside, height = pupils(support, width)[:, None], support.shape[1]
    if transfer.is_complex():
        return torch.where(inside, transfer.to(torch.complex128), 0)
    rows, columns = (signed_frequencies(n, support.device) for n in (height, width))
    return torch.where(inside, waves(transfer, depths, optics, rows[:, None], columns, (height, width)), 0)


def _scattered(image: Tensor, functions: Tensor) -> Tensor:
    if image.numel() == 0:  # which MKL refuses
        return image.new_zeros(image.shape[0], len(functions), *image.shape[2:]).real
    spectrum = fft(torch.fft.fftn, image)
    field = fft(torch.fft.ifftn, torch.einsum("lzhw,bzhw->blhw", functions, spectrum))
    return 2 * field.real


def _back(intensities: Tensor, functions: Tensor) -> Tensor:
    if intensities.numel() == 0:
        return functions.new_zeros(intensities.shape[0], *functions.shape[1:])
    spectrum = fft(torch.fft.fftn, intensities.to(functions.dtype))
    return 2 * fft(torch.fft.ifftn, torch.einsum("lzhw,blhw->bzhw", functions.conj(), spectrum))


def diffraction_forward(
    image: Tensor, transfer: Tensor, depths: Tensor, support: Tensor, optics: Sequence[float]
) -> Tensor:
    """Return intensities (B, L, H, W) of the permittivity contrast (B, Z, H, W) of slices."""
    functions = transfer_functions(transfer, depths, support, optics, image.shape[-1])
    return _scattered(image, functions.to(image.dtype))


def diffraction_adjoint(
    intensities: Tensor, transfer: Tensor, depths: Tensor, support: Tensor, optics: Sequence[float]
) -> Tensor:
    """Return slices (B, Z, H, W) of intensities (B, L, H, W): the exact transpose over the reals."""
    functions = transfer_functions(transfer, depths, support, optics, intensities.shape[-1])
    return _back(intensities, functions.to((intensities[..., :0] * 1j).dtype))


def diffraction_gradient(
    image: Tensor,
    spectra: Tensor | None,
    transfer: Tensor,
    depths: Tensor,
    support: Tensor,
    illuminations: Tensor | None,
    optics: Sequence[float],
) -> Tensor:
    """Return (L / |B|) A_B^T (A_B x - y_B) over all illuminations or some, from half the spectra of the data."""
    functions = transfer_functions(transfer, depths, support, optics, image.shape[-1]).to(image.dtype)
    used = functions if illuminations is None else functions[illuminations]
    residual = _scattered(image, used)
    if spectra is not None and spectra.numel() > 0:
        data = spectra if illuminations is None else spectra[:, illuminations]
        residual = residual - fft(torch.fft.irfftn, data, size=image.shape[-2:])
    return _back(residual, used) * (functions.shape[0] / used.shape[0])


def diffraction_gram(image: Tensor, auto: Tensor, pairs: Tensor, spectrum: Tensor | None) -> Tensor:
    """Return A^T A x, or A^T (A x - y) with the spectrum of A^T y, of evenly spaced slices (B, Z, H, W).

    At a frequency u the slices' spectra X are mapped to the Hermitian Toeplitz matrix of auto(u) times X(u), plus
    pairs(u) times the conjugate of X(-u).
    """
    if image.numel() == 0:
        return torch.zeros_like(image)
    x = fft(torch.fft.fftn, image)
    n = image.shape[1]
    distance = torch.arange(n, device=image.device)[:, None] - torch.arange(n, device=image.device)
    auto = auto.to(image.dtype)[distance.abs()]
    auto = torch.where((distance >= 0)[..., None, None], auto, auto.conj())
    result = torch.einsum("yzhw,bzhw->byhw", auto, x)
    # At -u the matrix is the transposed one.
    other_half = pairs[..., 1:].flip(2, 3).transpose(0, 1)
    pairs = torch.cat((other_half, pairs), 3).to(image.dtype)
    i, j = (torch.arange(-(k // 2), k // 2 + 1, device=image.device) for k in pairs.shape[2:])
    i = i[:, None]
    mirrored = x[:, :, -i, -j].conj()
    result[:, :, i, j] = result[:, :, i, j] + torch.einsum("yzkm,bzkm->bykm", pairs, mirrored)
    if spectrum is not None:
        result = result - spectrum
    return fft(torch.fft.ifftn, result)
