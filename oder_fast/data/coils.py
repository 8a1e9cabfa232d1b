"""Coil sensitivity maps, noise pre-whitening and readout oversampling of multi-coil k-space."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .._numpy import takes_numpy
from .._torch import fft

LEAST_SHIFTS = 5
"""Positions of the ESPIRiT kernel along each axis without which the maps of smooth coils come out wrong."""


def centered_fft(values: Tensor, dim: int, *, inverse: bool) -> Tensor:
    """Transform along an axis, orthonormally, with the zero frequency and the origin at index ``n // 2``."""
    transform = torch.fft.ifftn if inverse else torch.fft.fftn
    shifted: Tensor = torch.fft.fftshift(fft(transform, torch.fft.ifftshift(values, dim), (dim,)), dim)
    return shifted


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one CPU thread: LAPACK splits even a tiny matrix, which on busy cores cost 7 to 50 times more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_complex(name: str, argument: str, values: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {type(values).__name__}")
    if not values.is_complex():
        raise TypeError(f"{name}: {argument} must be complex, got {values.dtype}")


def _check_finite(name: str, argument: str, values: Tensor) -> None:
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        index = tuple(bad[0].tolist())
        raise ValueError(f"{name}: {argument} must be finite, got {values[index].item()} at {index}")


@takes_numpy
def birdcage_maps(n_coils: int, shape: tuple[int, int], *, radius: float = 1.5) -> Tensor:
    r"""Model the coil sensitivity maps of a birdcage array, from straight wires around the image.

    .. math:: S_c(z) = \frac{w_c}{1 - z e^{-i \varphi_c} / R}, \qquad \varphi_c = 2 \pi c / C, \qquad
        z = x + i y

    which by the law of Biot and Savart is the field that rotates with the spins, of a wire at
    :math:`R e^{i \varphi_c}` with the phase :math:`\varphi_c`; the phases agree in the centre, x points right
    and y down. The weight :math:`w_c(z) > 0` is that of the root sum of squares, so that
    :math:`\sum_c |S_c|^2 = 1` in each pixel.

    Args:
        n_coils: Number of coils ``C``, at least 1.
        shape: Rows and columns ``(H, W)``.
        radius: Distance :math:`R` of the wires from the centre, in halves of each side of the image; above
            the square root of 2, where the corners are.

    Returns:
        Coil sensitivity maps, shape ``(C, H, W)``, complex64.

    Raises:
        ValueError: For an argument out of range.

    Example:
        >>> maps = birdcage_maps(8, (32, 48))
        >>> maps.shape, round(maps.abs().square().sum(0).mean().item(), 4)
        (torch.Size([8, 32, 48]), 1.0)

    References:
        Roemer et al., "The NMR phased array", Magn. Reson. Med. 16 (1990).
    """
    if n_coils < 1:
        raise ValueError(f"birdcage_maps: n_coils must be at least 1, got {n_coils}")
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"birdcage_maps: shape must be (H, W), both at least 1, got {tuple(shape)}")
    if not (math.isfinite(radius) and radius > math.sqrt(2)):
        raise ValueError(f"birdcage_maps: radius must be finite and above sqrt(2), got {radius}")
    y, x = ((2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in shape)
    z = torch.complex(x.expand(shape), -y[:, None].expand(shape))
    phase = 2 * math.pi * torch.arange(n_coils, dtype=torch.float64) / n_coils
    maps = 1 / (1 - z * torch.polar(torch.full_like(phase, 1 / radius), -phase)[:, None, None])
    normalized: Tensor = maps / torch.linalg.vector_norm(maps, dim=0)
    return normalized.to(torch.complex64)


def _calibration_region(sampled: Tensor, size: int, kernel_size: int) -> tuple[slice, slice]:
    """Find the largest fully sampled rectangle around the zero frequency, of at most `size` a side."""
    height, width = sampled.shape
    area = torch.zeros(height + 1, width + 1, dtype=torch.int64)
    area[1:, 1:] = sampled.cpu().long().cumsum(0).cumsum(1)
    count = area.numpy()

    def spans(n: int) -> list[tuple[int, int]]:
        found = set()
        for length in range(1, min(size, n) + 1):
            for before in (length // 2, (length - 1) // 2):
                start = n // 2 - before
                if start >= 0 and start + length <= n:
                    found.add((start, start + length))
        return sorted(found)

    # Patches first; the area after them, so that a region too thin for any can be named.
    best = (0, 0, (0, 0), (0, 0))
    for top, bottom in spans(height):
        for left, right in spans(width):
            inside = int(count[bottom, right] - count[top, right] - count[bottom, left] + count[top, left])
            if inside == (bottom - top) * (right - left):
                shifts = bottom - top - kernel_size + 1, right - left - kernel_size + 1
                patches = math.prod(shifts) if min(shifts) >= LEAST_SHIFTS else 0
                best = max(best, (patches, inside, (top, bottom), (left, right)))
    patches, _, (top, bottom), (left, right) = best
    if patches < 2 * kernel_size**2:
        least = kernel_size + LEAST_SHIFTS - 1
        raise ValueError(
            f"espirit_maps: kspace has too few calibration lines for kernel_size {kernel_size}: it needs a fully "
            f"sampled centre of at least {least} rows and columns with {2 * kernel_size**2} positions of the kernel, "
            f"found {bottom - top} rows by {right - left} columns"
        )
    return slice(top, bottom), slice(left, right)


@takes_numpy
def espirit_maps(
    kspace: Tensor,
    mask: Tensor | None = None,
    *,
    calibration_size: int = 24,
    kernel_size: int = 6,
    threshold: float = 0.02,
    crop: float = 0.0,
) -> Tensor:
    r"""Estimate coil sensitivity maps from the calibration lines in the centre of k-space (ESPIRiT).

    Patches of :math:`k \times k` samples of all coils, cut from the calibration lines, span a space with the
    projection :math:`\Pi`. What the coils see of a pixel at :math:`r` lies in it, hence

    .. math:: G(r) \, S(r) = S(r), \qquad
        G_{cd}(r) = \frac{1}{k^2} \sum_{p, q} e^{2 \pi i (p - q) \cdot r / N} \, \Pi_{(c, p), (d, q)}

    and the map is the eigenvector of the largest eigenvalue (at most 1) in each pixel. It has unit norm over
    the coils. Its phase is chosen so that a virtual coil, the strongest combination of the coils over the
    calibration lines (with the phase of the first coil that has a large part in it), sees each pixel with
    phase 0. Only the first set of maps is returned: an image that is folded within the field of view needs
    two.

    Args:
        kspace: Multi-coil Cartesian k-space with the zero frequency at ``(H // 2, W // 2)``, shape
            ``(C, H, W)``, complex.
        mask: Sampling mask, shape ``(W,)`` or ``(1, W)`` (lines along the columns), ``(H, 1)`` or ``(H, W)``, bool.
            Where None, a sample counts as measured where any coil is not zero.
        calibration_size: Most rows and columns of the calibration region. The largest fully sampled
            rectangle within it is used.
        kernel_size: Rows and columns of a patch, :math:`k`.
        threshold: Singular values of the calibration matrix below this share of the largest are noise.
        crop: Maps are 0 where the largest eigenvalue is below this (0.8 to 0.95 in other packages): there is no object.
            A fixed point knows nothing of such pixels but what the denoiser makes of them; hence no crop by default.

    Returns:
        Coil sensitivity maps, shape ``(C, H, W)``, dtype and device of `kspace`; not differentiable.

    Raises:
        TypeError: Where `kspace` is not complex or `mask` not bool.
        ValueError: For a wrong shape, an argument out of range, NaN or Inf, a k-space that is zero, or too
            few calibration lines: the kernel needs ``kernel_size + 4`` rows and columns and ``2 kernel_size**2``
            positions among them; the message says what was found.

    Example:
        >>> import torch
        >>> true = birdcage_maps(4, (32, 32))
        >>> image = torch.zeros(32, 32)
        >>> image[6:26, 8:24] = 1 + torch.rand(20, 16, generator=torch.Generator().manual_seed(0))
        >>> kspace = torch.fft.fft2(torch.fft.ifftshift(true * image, dim=(1, 2)), norm="ortho")
        >>> maps = espirit_maps(torch.fft.fftshift(kspace, dim=(1, 2)))
        >>> overlap = (maps.conj() * true).sum(0).abs()
        >>> bool((overlap[6:26, 8:24] > 0.999).all())
        True

    References:
        Uecker et al., "ESPIRiT - an eigenvalue approach to autocalibrating parallel MRI: where SENSE meets
        GRAPPA", Magn. Reson. Med. 71 (2014).
    """
    name = "espirit_maps"
    _check_complex(name, "kspace", kspace)
    if kspace.ndim != 3 or 0 in kspace.shape:
        raise ValueError(f"{name}: kspace must be (C, H, W), none of them 0, got {tuple(kspace.shape)}")
    _check_finite(name, "kspace", kspace)
    if not 1 <= kernel_size <= calibration_size:
        raise ValueError(f"{name}: kernel_size must be in 1..{calibration_size}, got {kernel_size}")
    for argument, value in (("threshold", threshold), ("crop", crop)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}: {argument} must be at least 0 and below 1, got {value}")
    height, width = kspace.shape[1:]
    if mask is None:
        sampled = (kspace != 0).any(0)
    elif mask.dtype != torch.bool:
        raise TypeError(f"{name}: mask must be bool, got {mask.dtype}")
    elif mask.shape not in ((width,), (1, width), (height, 1), (height, width)):
        raise ValueError(
            f"{name}: mask must be ({width},), ({height}, 1) or ({height}, {width}) as kspace is, got "
            f"{tuple(mask.shape)}"
        )
    else:
        sampled = mask.expand(height, width)
    if not bool((kspace != 0).any()):
        raise ValueError(f"{name}: kspace must not be zero everywhere")
    rows, columns = _calibration_region(sampled, calibration_size, kernel_size)
    with torch.no_grad(), one_thread():
        calibration = kspace[:, rows, columns]
        return _espirit(kspace, calibration / calibration.abs().amax(), kernel_size, threshold, crop)


def _espirit(kspace: Tensor, calibration: Tensor, kernel_size: int, threshold: float, crop: float) -> Tensor:
    coils, height, width = kspace.shape
    k = kernel_size
    patches = calibration.unfold(1, k, 1).unfold(2, k, 1).permute(1, 2, 0, 3, 4).reshape(-1, coils * k * k)
    _, singular, rows = torch.linalg.svd(patches, full_matrices=False)
    rows = rows[singular > threshold * singular[0]]
    projection = (rows.mT @ rows.conj()).reshape(coils, k, k, coils, k, k)
    # Sum over pairs of samples (p, q) with the same displacement p - q.
    kernel = kspace.new_zeros(coils, coils, 2 * k - 1, 2 * k - 1)
    for i in range(k):
        for j in range(k):
            kernel[:, :, k - 1 - i : 2 * k - 1 - i, k - 1 - j : 2 * k - 1 - j] += projection[
                :, :, :, :, i, j
            ].permute(0, 3, 1, 2)
    kernel /= k * k

    def phases(n: int) -> Tensor:
        displacement = torch.arange(1 - k, k, dtype=torch.float64)
        turns = displacement[:, None] * (torch.arange(n, dtype=torch.float64) - n // 2) / n
        return torch.polar(torch.ones_like(turns), 2 * math.pi * turns).to(kspace)

    gram = calibration.flatten(1) @ calibration.flatten(1).mH
    virtual = torch.linalg.eigh(gram / gram.abs().amax())[1][:, -1]
    strong = virtual.abs() >= virtual.abs().amax() / 2
    virtual = virtual * virtual[strong][0].conj().sgn()
    along_rows, along_columns = phases(height), phases(width)
    maps = torch.empty_like(kspace, memory_format=torch.contiguous_format)
    # About 64 MiB of matrices at once.
    step = max(1, 2**23 // (coils * coils * width))
    for start in range(0, height, step):
        rows_now = along_rows[:, start : start + step]
        matrices = torch.einsum("cdyx,yh,xw->hwcd", kernel, rows_now, along_columns)
        values, vectors = torch.linalg.eigh(matrices)
        vector = vectors[..., -1]
        phase = (vector * virtual.conj()).sum(-1, keepdim=True).sgn()
        vector = vector * torch.where(phase == 0, 1, phase.conj())
        vector = vector * (values[..., -1:] >= crop)
        maps[:, start : start + step] = vector.permute(2, 0, 1)
    return maps


@takes_numpy
def noise_covariance(noise: Tensor) -> Tensor:
    r"""Estimate the noise covariance of the coils from samples without signal.

    .. math:: \Psi = \frac{1}{N} \sum_{n = 1}^N \eta_n \eta_n^H

    The noise is taken to have zero mean.

    Args:
        noise: Samples, shape ``(C, ...)``, complex, at least as many of each coil as there are coils:
            a noise acquisition (``metadata["noise"]`` of `read_kspace`) or the corners of an image.

    Returns:
        Noise covariance, shape ``(C, C)``, complex128, Hermitian.

    Raises:
        TypeError: Where `noise` is not complex.
        ValueError: For a wrong shape, fewer samples than coils, or NaN or Inf.

    Example:
        >>> import torch
        >>> noise = torch.randn(4, 10000, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
        >>> bool((noise_covariance(noise) - torch.eye(4)).abs().max() < 0.05)
        True
    """
    _check_complex("noise_covariance", "noise", noise)
    if noise.ndim < 2 or noise[0].numel() < noise.shape[0] or noise.shape[0] == 0:
        raise ValueError(
            "noise_covariance: noise must be (C, ...) with at least C samples of each coil, got "
            f"{tuple(noise.shape)}"
        )
    _check_finite("noise_covariance", "noise", noise)
    samples = noise.flatten(1).to(torch.complex128)
    return samples @ samples.mH / samples.shape[1]


@takes_numpy
def whiten(kspace: Tensor, covariance: Tensor) -> Tensor:
    r"""Decorrelate the noise of the coils and bring it to unit variance (pre-whitening).

    .. math:: \tilde y = L^{-1} y, \qquad \Psi = L L^H

    The coil sensitivity maps of the whitened k-space are :math:`L^{-1} S`: estimate them after whitening, or
    whiten them, too.

    Args:
        kspace: Shape ``(..., C, H, W)``, complex: k-space, coil images or maps.
        covariance: Noise covariance :math:`\Psi`, shape ``(C, C)``, Hermitian positive definite, of the square
            of the unit of `kspace`; see `noise_covariance`.

    Returns:
        Shape and dtype of `kspace`; each complex sample has noise of variance 1, uncorrelated between coils.

    Raises:
        TypeError: Where `kspace` is not complex.
        ValueError: For a wrong shape, or a covariance that is not finite, Hermitian and positive definite.

    Example:
        >>> import torch
        >>> kspace = torch.ones(2, 4, 4, dtype=torch.complex64)
        >>> whiten(kspace, torch.tensor([[4.0, 0.0], [0.0, 0.25]]))[:, 0, 0].real
        tensor([0.5000, 2.0000])

    References:
        Pruessmann et al., "Advances in sensitivity encoding with arbitrary k-space trajectories", Magn. Reson.
        Med. 46 (2001).
    """
    _check_complex("whiten", "kspace", kspace)
    if kspace.ndim < 3:
        raise ValueError(f"whiten: kspace must be (..., C, H, W), got {tuple(kspace.shape)}")
    coils = kspace.shape[-3]
    if covariance.shape != (coils, coils):
        raise ValueError(
            f"whiten: covariance must be ({coils}, {coils}) for {coils} coils, got {tuple(covariance.shape)}"
        )
    _check_finite("whiten", "covariance", covariance)
    psi = covariance.to(kspace.device, torch.complex128)
    asymmetry = float((psi - psi.mH).abs().max() / psi.abs().max().clamp_min(1e-300))
    if asymmetry > 1e-5:
        raise ValueError(
            f"whiten: covariance must be Hermitian, got one that differs by {asymmetry:.2g} of its largest entry"
        )
    factor, info = torch.linalg.cholesky_ex((psi + psi.mH) / 2)
    if int(info) != 0:
        least = float(torch.linalg.eigvalsh((psi + psi.mH) / 2)[0])
        raise ValueError(
            f"whiten: covariance must be positive definite, got one with the eigenvalue {least:.3g}"
        )
    inverse = torch.linalg.solve_triangular(
        factor, torch.eye(coils, dtype=factor.dtype, device=factor.device), upper=False
    )
    return torch.einsum("cd,...dhw->...chw", inverse.to(kspace.dtype), kspace)


@takes_numpy
def remove_oversampling(kspace: Tensor, axis: int, factor: float = 2) -> Tensor:
    r"""Cut the image to the middle of an oversampled readout.

    .. math:: \tilde y = F_{[n / f]} \, C \, F_n^{-1} y

    with centred orthonormal transforms :math:`F` and :math:`C` the middle :math:`n / f` pixels, rounded, so that the
    zero frequency moves to the middle of those and pixel values stay what they were. White noise
    keeps its variance in each sample and the pixel keeps its size; the field of view shrinks. Where the
    object lies inside, the samples of a whole `factor` are those of every `factor`-th one times its square root.

    Args:
        kspace: Centred k-space, any shape, complex.
        axis: Readout axis, which must be sampled fully (``metadata["readout_axis"]`` of `read_kspace`).
        factor: Oversampling :math:`f`, at least 1.

    Returns:
        K-space with ``round(n / factor)`` samples along the readout, dtype of `kspace`; differentiable.

    Raises:
        TypeError: Where `kspace` is not complex.
        ValueError: For an axis that is not there, or a factor below 1 or that leaves nothing of it.

    Example:
        >>> import torch
        >>> remove_oversampling(torch.ones(2, 64, 32, dtype=torch.complex64), axis=-2).shape
        torch.Size([2, 32, 32])
    """
    name = "remove_oversampling"
    _check_complex(name, "kspace", kspace)
    if not -kspace.ndim <= axis < kspace.ndim:
        raise ValueError(f"{name}: axis must be one of the {kspace.ndim} axes of kspace, got {axis}")
    n = kspace.shape[axis]
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(f"{name}: factor must be finite and at least 1, got {factor}")
    kept = round(n / factor)
    if kept < 1:
        raise ValueError(f"{name}: factor must leave some of the {n} samples of axis {axis}, got {factor}")
    image = centered_fft(kspace, axis, inverse=True).narrow(axis, n // 2 - kept // 2, kept)
    return centered_fft(image, axis, inverse=False)
