"""Simulated measurements: waves through scattering volumes, and noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._numpy import takes_numpy
from .._torch import fft

STEEPEST = 0.2
"""Least cosine of a wave's angle to the axis that obliquity counts; steeper waves scatter as this one."""

PUPIL_TOLERANCE = 1 + 1e-9
"""An illumination made to lie on the pupil's edge passes, whatever its rounding."""


@takes_numpy
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


@takes_numpy
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
        TypeError: Where `sinogram` is not real.
        ValueError: Unless `photons` is finite and above 0.
    """
    if not sinogram.is_floating_point():
        raise TypeError(f"add_poisson_noise: sinogram must be real, got {sinogram.dtype}")
    if not (math.isfinite(photons) and photons > 0):
        raise ValueError(f"add_poisson_noise: photons must be a finite number above 0, got {photons}")
    device = sinogram.device if generator is None else generator.device
    expected = photons * torch.exp(-sinogram.double())
    counts = torch.poisson(expected.to(device), generator=generator).to(sinogram.device)
    noisy: Tensor = -torch.log(counts.clamp_min(0.5) / photons)
    return noisy.to(sinogram.dtype)


def _check_optics(contrast: Tensor, illuminations: Tensor, depths: Tensor, lengths: dict[str, float]) -> None:
    op = "beam_propagation"
    if not contrast.is_complex():
        raise TypeError(f"{op}: contrast must be complex, got {contrast.dtype}")
    if contrast.ndim != 4 or min(contrast.shape[1:]) < 1:
        raise ValueError(
            f"{op}: contrast must be (B, Z, H, W), Z, H and W at least 1, got {tuple(contrast.shape)}"
        )
    if illuminations.ndim != 2 or illuminations.shape[1] != 2:
        raise ValueError(f"{op}: illuminations must be (L, 2), got {tuple(illuminations.shape)}")
    if depths.shape != contrast.shape[1:2]:
        raise ValueError(
            f"{op}: depths must be ({contrast.shape[1]},), one for each slice, got {tuple(depths.shape)}"
        )
    for name, value in (("contrast", contrast), ("illuminations", illuminations), ("depths", depths)):
        bad = (~torch.isfinite(value)).nonzero()
        if len(bad):
            index = tuple(bad[0].tolist())
            raise ValueError(f"{op}: {name} must be finite, got {value[index].item()} at {index}")
    for name, length in lengths.items():
        if not (math.isfinite(length) and length > 0):
            raise ValueError(f"{op}: {name} must be a finite number above 0, got {length}")
    aperture, medium = lengths["numerical_aperture"], lengths["medium_index"]
    if aperture >= medium:
        raise ValueError(f"{op}: numerical_aperture must be below medium_index {medium}, got {aperture}")
    if len(depths) > 1 and not (depths.diff() > 0).all():
        raise ValueError(f"{op}: depths must grow from slice to slice, got {depths.tolist()}")
    sines = torch.linalg.vector_norm(illuminations.double(), dim=1)
    dark = (sines > aperture * PUPIL_TOLERANCE).nonzero()
    if len(dark):
        first = int(dark[0])
        raise ValueError(
            f"{op}: illuminations must lie in the pupil, as dark field has no background to divide by: "
            f"illumination {first} has |s| = {sines[first]:.6g}, above numerical_aperture {aperture}"
        )


def _through_slice(wave: Tensor, phase: Tensor, obliquity: Tensor) -> Tensor:
    """Return exp(i O phase) wave, where O multiplies the spectrum by `obliquity`: its power series."""
    size = float(phase.abs().max() * obliquity.max())
    steps = max(1, math.ceil(size / 4))
    for _ in range(steps):
        term, order = wave, 0
        tolerance = 1e-10 * torch.linalg.vector_norm(wave)
        while order < 4 or torch.linalg.vector_norm(term) > tolerance:
            order += 1
            scattered = fft(torch.fft.ifftn, obliquity * fft(torch.fft.fftn, phase * term))
            term = scattered * (1j / (steps * order))
            wave = wave + term
    return wave


@torch.no_grad()
@takes_numpy
def beam_propagation(
    contrast: Tensor,
    illuminations: Tensor,
    *,
    pixel_size: float,
    depths: Tensor,
    wavelength: float,
    numerical_aperture: float,
    medium_index: float,
    thickness: float | None = None,
) -> Tensor:
    r"""Simulate the intensity images of a volume under plane waves, with multiple forward scattering.

    Each wave :math:`e^{2 \pi i f r}`, :math:`f = s / \lambda`, goes from slice to slice, is brought back to the
    plane of focus at depth 0 and passes the pupil :math:`|q| \le \mathrm{NA} / \lambda`:

    .. math:: U \leftarrow \exp(i \, O \, k_0 \Delta z (n - n_0)) \, U, \qquad
        \hat U(q) \leftarrow e^{i k_z(q) (z' - z)} \, \hat U(q), \qquad
        k_z(q) = 2 \pi \sqrt{(n_0 / \lambda)^2 - |q|^2},

    :math:`n^2 = n_0^2 + \varepsilon`. The operator `O` multiplies by :math:`1 / \cos\theta = k_0 n_0 / k_z(q)` in
    the spectrum of what a slice scatters, so that to first order a slice scatters at every angle as the first Born
    approximation says, along the axis it delays by its thickness to all orders, and a slice that does not absorb
    keeps the flux of energy :math:`\sum_q \cos\theta \, |\hat U|^2`. What it leaves out is light that turns back.

    The envelope :math:`U e^{-2 \pi i f r}` is what is computed, in double precision: it need not be periodic for any
    f. Scattered light that leaves the image on one side comes back on the other; leave a margin.

    Args:
        contrast: Permittivity contrast :math:`\varepsilon = n^2 - n_0^2` of the slices (no unit), shape
            ``(B, Z, H, W)``, complex; a positive imaginary part absorbs.
        illuminations: Direction sines in air :math:`s`, rows and columns (no unit), shape ``(L, 2)``, none above the
            numerical aperture.
        pixel_size: Distance of pixels in micrometres.
        depths: Of the slices in micrometres, growing along the light, shape ``(Z,)``.
        wavelength: In vacuum, in micrometres.
        numerical_aperture: Of the objective, below `medium_index`.
        medium_index: Refractive index of the medium :math:`n_0`.
        thickness: Of a slice in micrometres; None for the distance of slices that are evenly spaced.

    Returns:
        Intensity over that of the incident wave, minus 1 (no unit), shape ``(B, L, H, W)``, real, of the precision
        of `contrast`. Not differentiable.

    Raises:
        TypeError: For a contrast that is not complex.
        ValueError: For a shape or value out of range, NaN or Inf; where `thickness` is None and the slices are one
            alone or not evenly spaced.

    Example:
        >>> import torch
        >>> slab = torch.full((1, 2, 8, 8), 2 * 1.33 * 1e-3j, dtype=torch.complex64)  # absorbs
        >>> sines, depths = torch.tensor([[0.0, 0.0], [0.0, 0.3]]), torch.tensor([-1.0, 1.0])
        >>> optics = dict(pixel_size=0.5, wavelength=0.5, numerical_aperture=0.4, medium_index=1.33)
        >>> y = beam_propagation(slab, sines, depths=depths, **optics)
        >>> y.shape, y[0, :, 0, 0]
        (torch.Size([1, 2, 8, 8]), tensor([-0.0956, -0.0980]))

    References:
        Chen, Ren, Liu, Chowdhury, Waller, "Multi-layer Born multiple-scattering model for 3D phase microscopy",
        Optica 7 (2020): scattering by slices with the obliquity of Green's function, here to all orders.
    """
    op = "beam_propagation"
    # Plain numbers: of NumPy's in single precision torch drops the imaginary part of what they make.
    pixel_size, wavelength = float(pixel_size), float(wavelength)
    numerical_aperture, medium_index = float(numerical_aperture), float(medium_index)
    lengths = {
        "pixel_size": pixel_size,
        "wavelength": wavelength,
        "numerical_aperture": numerical_aperture,
        "medium_index": medium_index,
    }
    _check_optics(contrast, illuminations, depths, lengths)
    gaps = depths.double().diff().tolist()
    if thickness is None:
        if not gaps or max(gaps) - min(gaps) > 1e-4 * max(gaps):
            raise ValueError(
                f"{op}: thickness is needed where slices are not evenly spaced, or one alone: got the depths "
                f"{depths.tolist()}"
            )
        thickness = sum(gaps) / len(gaps)
    thickness = float(thickness)
    if not (math.isfinite(thickness) and thickness > 0):
        raise ValueError(f"{op}: thickness must be a finite number above 0, got {thickness}")

    height, width = contrast.shape[2:]
    device = contrast.device
    wavenumber = 2 * math.pi / wavelength
    index = torch.sqrt(medium_index**2 + contrast.to(torch.complex128))
    phase = wavenumber * thickness * (index - medium_index)
    row = torch.fft.fftfreq(height, pixel_size, dtype=torch.float64, device=device)[:, None]
    column = torch.fft.fftfreq(width, pixel_size, dtype=torch.float64, device=device)
    steepest = min(STEEPEST, math.sqrt(1 - (numerical_aperture / medium_index) ** 2))
    intensities = contrast.real.new_empty(len(contrast), len(illuminations), height, width)
    if intensities.numel() == 0:
        return intensities
    for number, s in enumerate(illuminations.double().tolist()):
        # Sines of angles in the medium, squared; the wave's own at the frequency 0 of its envelope.
        squared = ((row + s[0] / wavelength) ** 2 + (column + s[1] / wavelength) ** 2) * wavelength**2
        passes = squared <= (numerical_aperture * PUPIL_TOLERANCE) ** 2
        squared = squared / medium_index**2
        cosine = torch.sqrt(1 - squared + 0j)
        advance = 1j * wavenumber * medium_index * (cosine - cosine[0, 0])
        obliquity = (squared < 1) / cosine.real.clamp_min(steepest)
        wave = torch.ones(len(contrast), height, width, dtype=torch.complex128, device=device)
        for z, delay in enumerate(phase.unbind(1)):
            if z:
                wave = fft(torch.fft.ifftn, torch.exp(advance * gaps[z - 1]) * fft(torch.fft.fftn, wave))
            wave = _through_slice(wave, delay, obliquity)
        focus = torch.where(passes, torch.exp(-advance * depths[-1].item()), 0)
        wave = fft(torch.fft.ifftn, focus * fft(torch.fft.fftn, wave))
        intensities[:, number] = wave.real**2 + wave.imag**2 - 1
    return intensities
