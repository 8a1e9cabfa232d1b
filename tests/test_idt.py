"""DiffractionTomography: geometry, Tikhonov, norms, Gram matrices, and the fixed point through it."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from cases import dot_test, relative_error

from oder_fast import DEQRED, Anderson, DiffractionTomography, GradientStep, Implicit, Picard, Unrolled
from oder_fast.data import beam_propagation, cell_like, led_ring

OPTICS = {"pixel_size": 0.4, "wavelength": 0.6, "numerical_aperture": 0.35, "medium_index": 1.33}


def build(size=(20, 18), depths=(-3.0, 0.0, 3.0), lights=None, **options):
    lights = torch.cat((led_ring(6, 0.33), led_ring(3, 0.15))) if lights is None else lights
    return DiffractionTomography(size, depths, lights, **(OPTICS | options))


def pair(idt, generator, batch=2, dtype=torch.float64):
    x = torch.randn(batch, *idt.image_shape, dtype=dtype.to_complex(), generator=generator)
    return x, torch.randn(batch, *idt.data_shape, dtype=dtype, generator=generator)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gram": False},
        {"axial": "vacuum"},
        {"size": (15, 17)},
        {"depths": (-3.0, -1.0, 3.0)},
        {"depths": (1.0,), "thickness": 2.0},
        {"pixel_size": 4.0, "magnification": 10.0},
    ],
)
def test_adjoint_and_gradient_belong_to_the_forward_model(options, generator):
    idt = build(**options)
    x, y = pair(idt, generator)
    assert dot_test(idt, idt.adjoint, x, y) < 1e-14
    expected = idt.adjoint(idt(x) - y)
    data_fidelity = idt.least_squares(y)
    assert relative_error(data_fidelity.gradient(x), expected) < 1e-12
    assert relative_error(data_fidelity.normal(x), idt.adjoint(idt(x))) < 1e-12
    blocks = torch.tensor([0, 4, 7])
    few = build(**options, lights=idt.illuminations[blocks])
    expected = 3 * few.adjoint(few(x) - y[:, blocks])
    assert relative_error(data_fidelity.gradient(x, blocks), expected) < 1e-12


def test_minibatches_are_unbiased(generator):
    idt = build()
    x, y = pair(idt, generator)
    gradient = idt.least_squares(y).gradient
    mean = sum(gradient(x, torch.tensor([k])) for k in range(idt.n_blocks)) / idt.n_blocks
    assert relative_error(mean, gradient(x)) < 1e-12
    drawn = torch.stack([idt.draw_blocks(4, generator) for _ in range(500)])
    assert (drawn.diff(dim=1) > 0).all()
    assert (drawn.flatten().bincount() / 500 - 4 / 9).abs().max() < 0.1


@pytest.mark.parametrize("options", [{}, {"size": (15, 17)}, {"depths": (-3.0, -1.0, 3.0)}])
def test_the_norm_is_the_largest_eigenvalue(options, generator):
    idt = build(**options)
    x, _ = pair(idt, generator, batch=1)
    for _ in range(150):
        x = x / x.norm()
        x = idt.adjoint(idt(x))
    assert float(x.norm()) > 0.99 * idt.norm_squared()
    assert float(x.norm()) <= idt.norm_squared() * (1 + 1e-9)


def test_the_expected_smoothness_bounds_each_illumination(generator):
    idt = build()
    single = []
    for one in range(idt.n_blocks):
        alone = build(lights=idt.illuminations[[one]])
        single.append(alone.norm_squared())
    assert idt.minibatch_norm_squared(1) == pytest.approx(idt.n_blocks * max(single), rel=1e-5)
    sizes = [idt.minibatch_norm_squared(b) for b in range(1, idt.n_blocks + 1)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == idt.norm_squared()


@pytest.mark.parametrize("options", [{}, {"size": (15, 17)}, {"depths": (-3.0, -1.0, 3.0)}])
def test_tikhonov_solves_the_normal_equations(options, generator):
    idt = build(**options)
    _, y = pair(idt, generator)
    weight = 0.01 * idt.norm_squared()
    x = idt.tikhonov(y, weight)
    assert relative_error(idt.adjoint(idt(x)) + weight * x, idt.adjoint(y)) < 1e-12
    assert relative_error(idt.initial(y), x) < 1e-12
    single = idt.tikhonov(y.float(), weight)
    assert single.dtype == torch.complex64
    assert relative_error(single, x) < 1e-5
    y.requires_grad_()
    probe = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    (grad,) = torch.autograd.grad((idt.tikhonov(y, weight) * probe.conj()).real.sum(), y)
    change = torch.randn(y.shape, dtype=y.dtype, generator=generator)
    along = (idt.tikhonov(change, weight) * probe.conj()).real.sum()
    assert float((grad * change).sum()) == pytest.approx(float(along), rel=1e-9)


def test_stored_transfer_functions(generator):
    idt = build()
    from oder_fast.reference.diffraction import transfer_functions

    h = transfer_functions(idt.transfer, idt.depths, idt.support, idt.optics, 18)
    stored = build(transfer_functions=h)
    assert not stored.gram
    x, y = pair(idt, generator)
    assert relative_error(stored(x), idt(x)) < 1e-12
    assert relative_error(stored.least_squares(y).gradient(x), idt.least_squares(y).gradient(x)) < 1e-12
    assert relative_error(stored.tikhonov(y, 10.0), idt.tikhonov(y, 10.0)) < 1e-10
    assert stored.norm_squared() == pytest.approx(idt.norm_squared(), rel=1e-9)
    # A function that is not zero at half the sampling rate loses those frequencies.
    full = build(transfer_functions=torch.ones_like(h))
    assert dot_test(full, full.adjoint, x, y) < 1e-14
    half = full.to(torch.float32)
    assert half.transfer.dtype == torch.complex64
    assert half.depths.dtype == torch.float64


def test_the_choice_of_gram_matrices_is_explained():
    many = build(lights=torch.cat([led_ring(20, 0.3), led_ring(10, 0.2)]))
    assert many.gram
    assert "fewer operations" in many.gram_reason
    few = build(lights=led_ring(1, 0.3))
    assert not few.gram
    assert "cost less" in few.gram_reason
    assert not build(depths=(-3.0, -1.0, 3.0)).gram
    assert build(gram=False).gram_reason == "as asked for"
    assert "gram=True" in repr(many)
    with pytest.raises(ValueError, match="unevenly spaced"):
        build(depths=(-3.0, -1.0, 3.0), gram=True)


def test_copies_and_precisions(generator):
    idt = build()
    x, y = pair(idt, generator)
    expected = idt.least_squares(y).gradient(x)
    for other in (copy.deepcopy(idt), pickle.loads(pickle.dumps(idt)), copy.deepcopy(idt).to(torch.float32)):
        assert torch.equal(other.least_squares(y).gradient(x), expected)
        assert other.illuminations.dtype == torch.float64
    assert relative_error(idt.least_squares(y.float()).gradient(x.to(torch.complex64)), expected) < 1e-5


def test_refractive_index_there_and_back(generator):
    idt = build()
    x = 0.05 * pair(idt, generator)[0]
    assert relative_error(idt.contrast(idt.refractive_index(x)), x) < 1e-13
    assert (
        relative_error(idt.refractive_index(idt.contrast(torch.full((2, 2), 1.36))), torch.tensor(1.36 + 0j))
        < 1e-6
    )


def test_a_weak_object_looks_as_beam_propagation_says():
    generator = torch.Generator().manual_seed(0)
    shape = (6, 48, 48)
    depths = [2.0 * (k - 2.5) for k in range(6)]
    lights = torch.cat((led_ring(4, 0.3), torch.zeros(1, 2, dtype=torch.float64)))
    idt = build(shape[1:], depths, lights)
    x = cell_like(1, shape, generator, index_contrast=0.002, absorption=1e-4)
    simulated = beam_propagation(x, lights, depths=torch.tensor(depths), **OPTICS)
    assert relative_error(idt(x), simulated) < 0.05


class Shrink(torch.nn.Module):
    """A denoiser that is a contraction, with a weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

    def forward(self, x):
        return self.weight * torch.tanh(x)


@pytest.mark.parametrize("gram", [True, False])
def test_the_fixed_point(gram, generator):
    idt = build((12, 10), gram=gram)
    x, _ = pair(idt, generator, batch=2)
    y = idt(0.1 * x)
    solver = Anderson(500, 1e-8)
    model = DEQRED(Shrink(), tau=1.0, solver=solver, differentiation=Implicit(solver))
    found = model(y, idt)
    denoised = torch.view_as_complex(
        model.denoiser(torch.view_as_real(found).permute(0, 1, 4, 2, 3)).permute(0, 1, 3, 4, 2).contiguous()
    )
    residual = idt.adjoint(idt(found) - y) + idt.norm_squared() * (found - denoised)
    assert residual.norm() < 1e-5 * idt.adjoint(y).norm()

    found.abs().square().sum().backward()
    implicit = model.denoiser.weight.grad.clone()
    model.denoiser.weight.grad = None
    unrolled = DEQRED(model.denoiser, tau=1.0, solver=Picard(1000, 1e-6), differentiation=Unrolled())
    unrolled(y, idt).abs().square().sum().backward()
    assert relative_error(model.denoiser.weight.grad, implicit) < 1e-4


def test_minibatches_reach_the_fixed_point(generator):
    idt = build((12, 10))
    x, _ = pair(idt, generator, batch=1)
    y = idt(0.1 * x)
    full = DEQRED(Shrink(), tau=1.0, solver=Anderson(500, 1e-8))(y, idt)
    seeded = torch.Generator().manual_seed(3)
    some = DEQRED(Shrink(), tau=1.0, step=GradientStep(None, 3), generator=seeded, solver=Picard(2000, 1e-5))
    found = some(y, idt)
    assert relative_error(found, full) < 1e-4
    found.abs().sum().backward()
    assert some.denoiser.weight.grad.isfinite()


@pytest.mark.parametrize(
    "change, error, reason",
    [
        ({"size": (3, 8)}, ValueError, "image_size must be rows and columns, at least 4"),
        ({"size": (8.0, 8)}, ValueError, "image_size"),
        ({"depths": []}, ValueError, "depths must have shape"),
        ({"depths": [1.0, float("nan")]}, ValueError, "depths must be finite"),
        ({"depths": [1.0, 0.0]}, ValueError, "depths must grow"),
        ({"depths": [1.0]}, ValueError, "needs a thickness"),
        ({"lights": (torch.zeros(2, 2), torch.zeros(2))}, TypeError, "of a tuple of two give the first"),
        ({"depths": torch.tensor([1j, 2j])}, TypeError, "depths must be real numbers"),
        ({"depths": "deep"}, TypeError, "depths must be numbers"),
        ({"thickness": 0.0}, ValueError, "thickness must be a finite number above 0"),
        ({"lights": torch.zeros(3)}, ValueError, "illuminations must have shape"),
        (
            {"lights": torch.tensor([[0.0, 0.1], [0.0, 0.4]])},
            ValueError,
            "illumination 1 .* outside the pupil",
        ),
        ({"lights": torch.full((2, 2), float("inf"))}, ValueError, "illuminations must be finite"),
        ({"wavelength": 0}, ValueError, "wavelength must be a finite number above 0"),
        ({"wavelength": "green"}, TypeError, "wavelength must be a number"),
        ({"pixel_size": float("nan")}, ValueError, "pixel_size must be"),
        ({"magnification": -1.0}, ValueError, "magnification must be"),
        ({"numerical_aperture": 1.4}, ValueError, "numerical_aperture must be below medium_index"),
        ({"axial": "paper"}, ValueError, "axial must be"),
        ({"gram": "yes"}, ValueError, "gram must be"),
        (
            {"transfer_functions": torch.zeros(9, 3, 20, 18)},
            TypeError,
            "must be a complex64 or complex128 tensor",
        ),
        ({"transfer_functions": torch.zeros(9, 3, 20, 17) * 1j}, ValueError, "must have shape"),
    ],
)
def test_bad_geometry(change, error, reason):
    with pytest.raises(error, match=f"DiffractionTomography: .*{reason}"):
        build(**change)


def test_bad_data(generator):
    idt = build()
    x, y = pair(idt, generator, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"image must have shape \(B, 3, 20, 18\)"):
        idt(x[:, 0])
    with pytest.raises(TypeError, match="image must be complex"):
        idt(x.real)
    with pytest.raises(ValueError, match=r"intensities must have shape \(B, 9, 20, 18\)"):
        idt.adjoint(y[:, 1:])
    with pytest.raises(TypeError, match="intensities must be real"):
        idt.least_squares(y * 1j)
    with pytest.raises(ValueError, match="weight must be"):
        idt.tikhonov(y, 0.0)
    with pytest.raises(ValueError, match="1 to 9 illuminations, got 10"):
        idt.draw_blocks(10)
    y[0, 0, 0, 0] = float("nan")
    for call in (idt.least_squares, idt.initial):
        with pytest.raises(ValueError, match="must be finite"):
            call(y)


def test_data_of_another_form_are_refused(generator):
    idt = build()
    x, y = pair(idt, generator)
    with pytest.raises(ValueError, match=r"image must have shape \(B, 3, 20, 18\)"):
        idt.least_squares(y).gradient(x[:, :1])
    with pytest.raises(TypeError, match="single or double precision"):
        idt.least_squares(y.half()).gradient(x)
    with pytest.raises(ValueError, match="weight is too small"):
        idt.tikhonov(y, 1e-300)
    stored = build(transfer_functions=torch.ones(9, 3, 20, 18, dtype=torch.complex128))
    with pytest.raises(TypeError, match=r"call \.to\(torch.float32\) on the operator"):
        stored.adjoint(y.float())
    for name in ("refractive_index", "contrast"):
        with pytest.raises(TypeError, match="must be a real or complex"):
            getattr(idt, name)(1.33)
    assert idt.refractive_index(torch.tensor(-3.0)).imag > 0


def test_numbers_of_numpy_are_numbers():
    expected = build()
    options = {name: np.float32(value) for name, value in OPTICS.items()}
    idt = DiffractionTomography((np.int64(20), 18), np.array([-3.0, 0.0, 3.0]), led_ring(6, 0.3), **options)
    assert idt.optics == pytest.approx(expected.optics, rel=1e-6)


def test_mixed_units_are_noticed():
    with pytest.warns(UserWarning, match="in micrometres"):
        build(wavelength=600.0)


def test_coarse_pixels_are_noticed():
    with pytest.warns(UserWarning, match="sample up to"):
        build(pixel_size=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build()
