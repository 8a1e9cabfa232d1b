"""Diffraction tomography beyond what all operators are tested for: the definition, data, Gram matrices, arguments."""

from __future__ import annotations

import math

import pytest
import torch
from cases import relative_error

from oder_fast import DiffractionTomography
from oder_fast.data import led_ring
from oder_fast.operators import _matrices
from oder_fast.ops import diffraction_adjoint, diffraction_forward, diffraction_gradient, diffraction_gram
from oder_fast.reference import diffraction as reference

WAVELENGTH, APERTURE, INDEX, PIXEL = 0.6, 0.32, 1.33, 0.42


def scan(height=16, width=18, n=3, lights=5, spacing=2.5, **options):
    return DiffractionTomography(
        (height, width),
        [spacing * (k - 1) for k in range(n)],
        led_ring(lights, 0.28, start=0.3),
        pixel_size=PIXEL,
        wavelength=WAVELENGTH,
        numerical_aperture=APERTURE,
        medium_index=INDEX,
        thickness=2.5,
        **options,
    )


def arguments(idt):
    return idt.transfer, idt.depths, idt.support, idt.optics


def draw(*size, generator, dtype=torch.complex128):
    return torch.randn(*size, dtype=dtype, generator=generator)


@pytest.mark.parametrize("axial", ["exact", "vacuum"])
def test_the_definition_as_published(axial, generator):
    """With separate transfer functions of phase and absorption, as Ling et al. write them."""
    idt = scan(axial=axial)
    x = draw(1, *idt.image_shape, generator=generator)
    _, height, width = idt.image_shape
    k0 = 2 * math.pi / WAVELENGTH
    fy = torch.fft.fftfreq(height, PIXEL, dtype=torch.float64)[:, None]
    fx = torch.fft.fftfreq(width, PIXEL, dtype=torch.float64)
    inner = 1 if axial == "vacuum" else 1 / INDEX**2

    def wavenumber(y, x):
        return k0 * INDEX * (1 - inner * WAVELENGTH**2 * (y**2 + x**2)).clamp(min=0).sqrt()

    images = []
    for sy, sx in (idt.illuminations / WAVELENGTH).tolist():
        intensity = 0
        at = wavenumber(torch.tensor(sy, dtype=torch.float64), torch.tensor(sx, dtype=torch.float64))
        for z, depth in enumerate(idt.depths.tolist()):
            terms = []
            # The public codes let the wave come from -s.
            for sign in (-1, 1):
                y, x_ = fy - sign * sy, fx - sign * sx
                pupil = (y**2 + x_**2 <= (APERTURE / WAVELENGTH) ** 2) & (2 * PIXEL * fy.abs() < 1)
                pupil &= 2 * PIXEL * fx.abs() < 1
                axis = wavenumber(y, x_)
                terms.append(torch.where(pupil, torch.polar(1 / axis, sign * (axis - at) * depth), 0))
            e_plus, e_minus = terms[1], terms[0]
            real, imaginary = (torch.fft.fft2(part) for part in (x[0, z].real, x[0, z].imag))
            phase = 0.5j * k0**2 * 2.5 * (e_minus - e_plus)
            absorption = -0.5 * k0**2 * 2.5 * (e_minus + e_plus)
            intensity = intensity + phase * real + absorption * imaginary
        images.append(torch.fft.ifft2(intensity))
    expected = torch.stack(images)[None]
    assert expected.imag.norm() < 1e-13 * expected.real.norm()
    assert relative_error(diffraction_forward(x, *arguments(idt), backend="reference"), expected.real) < 1e-13


def test_the_gradient_of_the_data(generator):
    """Through real intensities, of which half the spectra hold all."""
    idt = scan(height=4, width=5, n=2, lights=3)
    x = draw(1, *idt.image_shape, generator=generator).requires_grad_()
    y = draw(1, *idt.data_shape, dtype=torch.float64, generator=generator).requires_grad_()
    illuminations = torch.tensor([2, 0])
    for backend in ("reference", "cpu"):
        for some in (None, illuminations):

            def gradient(x, y, some=some, backend=backend):
                spectra = torch.fft.rfft2(y, norm="ortho")
                *scan_, optics = arguments(idt)
                return diffraction_gradient(x, spectra, *scan_, some, optics, backend=backend)

            assert torch.autograd.gradcheck(gradient, (x, y), fast_mode=True)
            assert torch.autograd.gradgradcheck(gradient, (x, y), fast_mode=True)


@pytest.mark.parametrize("size", [(8, 9), (15, 16), (16, 16), (33, 40)])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_gram_matrices_give_the_full_gradient(size, n, build, generator):
    idt = scan(*size, n=n, spacing=1.5)
    auto, pairs = _matrices.gram_matrices(_matrices.Scan(*arguments(idt), size[1]))
    assert tuple(pairs.shape[2:]) == _matrices.gram_shape(idt.support, size[1])
    x = draw(2, *idt.image_shape, generator=generator)
    y = draw(2, *idt.data_shape, dtype=torch.float64, generator=generator)
    expected = idt.adjoint(idt(x) - y)
    right = torch.fft.fft2(idt.adjoint(y), norm="ortho")
    for dtype in (d for d in build.dtypes if d.is_complex):
        tensors = (t.to(build.device, dtype) for t in (x, auto, pairs, right))
        result = diffraction_gram(*tensors, backend=build.backend)
        assert relative_error(result.cpu(), expected) < (1e-12 if dtype == torch.complex128 else 2e-6)


def test_a_spacing_and_any_support_mean_the_same_on_all_backends(build, generator):
    """Depths follow from the spacing; half the sampling rate and what lies beyond is in no pupil."""
    idt = scan(16, 18)
    dtype = next(d for d in build.dtypes if d.is_complex)
    x = draw(1, *idt.image_shape, dtype=dtype, generator=generator)
    support = idt.support.clone()
    support[0, 0], support[1, 3] = torch.tensor([-1000, 1000]), torch.tensor([-9, 9])
    transfer = 0.1 * idt.transfer
    args = (transfer, 2 * idt.depths, support)
    expected = diffraction_forward(x.to(torch.complex128), *args, idt.optics, backend="reference")
    args = [t.to(build.device) for t in args]
    result = diffraction_forward(x.to(build.device), *args, idt.optics, backend=build.backend)
    assert relative_error(result.cpu(), expected) < 2e-6


def test_frequencies_in_no_pupil_give_zero(build, generator):
    idt = scan(20, 24, lights=1)
    dtype = next(d for d in build.dtypes if d.is_complex)
    transfer, depths, support, optics = arguments(idt)
    args = [t.to(build.device) for t in (transfer, depths, support)]
    y = torch.ones(1, 1, 20, 24, dtype=dtype.to_real(), device=build.device)
    y += torch.randn(y.shape, generator=generator).to(y)
    spectrum = torch.fft.fft2(diffraction_adjoint(y, *args, optics, backend=build.backend)).cpu()
    inside = reference.pupils(support, 24)
    assert spectrum[:, :, inside[0]].abs().min() > 1e-3
    assert spectrum[:, :, ~inside[0]].abs().max() < 1e-3 * spectrum.abs().max() * 1e-2


def test_indices_out_of_range_are_refused():
    idt = scan()
    x = torch.zeros(1, *idt.image_shape, dtype=torch.complex64)
    *args, optics = arguments(idt)
    for illuminations in (torch.tensor([5]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="illuminations must"):
            diffraction_gradient(x, None, *args, illuminations, optics)


@pytest.mark.parametrize(
    "change, error, reason",
    [
        ({"image": torch.zeros(1, 3, 16, 18)}, TypeError, "image must be complex64 or complex128"),
        (
            {"image": torch.zeros(3, 16, 18, dtype=torch.complex64)},
            ValueError,
            "image must have 4 dimensions",
        ),
        ({"image": torch.zeros(1, 2, 16, 18, dtype=torch.complex64)}, ValueError, "image must have shape"),
        ({"transfer": torch.zeros(5, 2)}, TypeError, "transfer must be float64 illuminations"),
        ({"transfer": torch.zeros(5, 3, dtype=torch.float64)}, ValueError, "transfer must have shape"),
        (
            {"transfer": torch.zeros(5, 3, 16, 17, dtype=torch.complex64)},
            ValueError,
            "transfer must have shape",
        ),
        ({"depths": torch.zeros(3)}, TypeError, "depths must be float64"),
        ({"support": torch.zeros(5, 16, 2)}, TypeError, "support must be int32"),
        ({"support": torch.zeros(4, 16, 2, dtype=torch.int32)}, ValueError, "support must have shape"),
        ({"optics": (1.0, 2.0)}, ValueError, "optics must be"),
        ({"optics": ("a", 2.0, 1.0, 1.0, 0.0, 0.0)}, TypeError, "optics must be an ops.Optics of numbers"),
        ({"optics": (1.0, 2.0, 1.0, float("nan"), 0.0, 0.0)}, ValueError, "optics must be finite"),
        ({"optics": (0.0, 2.0, 1.0, 1.0, 0.0, 0.0)}, ValueError, "optics must be finite"),
    ],
)
def test_bad_arguments(change, error, reason):
    idt = scan()
    transfer, depths, support, optics = arguments(idt)
    image = torch.zeros(1, *idt.image_shape, dtype=torch.complex64)
    call = {
        "image": image,
        "transfer": transfer,
        "depths": depths,
        "support": support,
        "optics": optics,
    } | change
    with pytest.raises(error, match=f"diffraction_forward: {reason}"):
        diffraction_forward(**call)
    if "image" not in change:
        y = torch.zeros(1, *idt.data_shape)
        rest = {k: v for k, v in call.items() if k != "image"}
        with pytest.raises(error, match="diffraction_adjoint"):
            diffraction_adjoint(y, **rest)


def test_bad_data():
    idt = scan()
    x = torch.zeros(1, *idt.image_shape, dtype=torch.complex64)
    *args, optics = arguments(idt)
    with pytest.raises(ValueError, match=r"spectra must have shape \(1, 5, 16, 10\)"):
        diffraction_gradient(x, torch.zeros(1, 5, 16, 18, dtype=torch.complex64), *args, None, optics)
    with pytest.raises(TypeError, match="spectra must have the dtype of image"):
        diffraction_gradient(x, torch.zeros(1, 5, 16, 10, dtype=torch.complex128), *args, None, optics)
    with pytest.raises(TypeError, match="intensities must be float32 or float64"):
        diffraction_adjoint(x, *args, optics)
    with pytest.raises(ValueError, match="intensities must have shape"):
        diffraction_adjoint(torch.zeros(1, 4, 16, 18), *args, optics)
    auto, pairs = (t.to(torch.complex64) for t in _matrices.gram_matrices(_matrices.Scan(*args, optics, 18)))
    with pytest.raises(ValueError, match="auto must have shape"):
        diffraction_gram(x, auto[:2], pairs, None)
    with pytest.raises(ValueError, match="pairs must have shape"):
        diffraction_gram(x, auto, pairs[:, :, 1:], None)
    with pytest.raises(ValueError, match="spectrum must have shape"):
        diffraction_gram(x, auto, pairs, x[..., :10])
